"""transformers models: their attention operator, computed by Saccade.

The models of the Deformable-DETR family carry a parameterless submodule
`MultiScaleDeformableAttention`, found here by name and signature; nothing of transformers is imported.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import NamedTuple

from torch import Tensor, nn

from saccade.functional import deformable_attention

OPERATOR_CLASS = "MultiScaleDeformableAttention"
_PARAMETERS = (
    "value",
    "value_spatial_shapes",
    "value_spatial_shapes_list",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "im2col_step",
)


class PatchReport(NamedTuple):
    """What `patch` or `unpatch` did: names of the submodules, and why others were left alone."""

    replaced: list[str]
    left: dict[str, str]


def patch(model: nn.Module) -> PatchReport:
    """Makes the deformable attention of a loaded transformers model run on Saccade.

    Parameters, buffers and the state dict stay as they are; only the forward of the submodules that
    compute the operator is replaced, on this model and no other. Calling it twice changes nothing.

    Args:
        model: a model that carries transformers' `MultiScaleDeformableAttention` (Deformable DETR,
            Grounding DINO, RT-DETR, RF-DETR, LW-DETR, OmDet-Turbo and others).

    Returns:
        PatchReport: the submodules that now run on Saccade, and those left alone with the reason.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: the model has no submodule that can be replaced; the message says what was found.

    Example:
        >>> import saccade
        >>> from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
        >>> model = DeformableDetrForObjectDetection(config)            # doctest: +SKIP
        >>> saccade.patch(model).replaced                               # doctest: +SKIP
        ['model.encoder.layers.0.self_attn.attn', ...]
    """
    report = PatchReport([], {})
    for name, module in _operators(model):
        found = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if found != _PARAMETERS:
            report.left[name] = f"its forward takes {found}, expected {_PARAMETERS}"
            continue
        module.forward = MethodType(_forward, module)
        report.replaced.append(name)
    if not report.replaced:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left.items())
        raise ValueError(
            f"model: expected submodules of class {OPERATOR_CLASS} as in transformers' Deformable "
            f"DETR, got {type(model).__name__} with {reasons or 'none'}"
        )
    return report


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes `patch`: the model computes its attention as transformers wrote it.

    Returns:
        PatchReport: `replaced` names the submodules that were restored.
    """
    report = PatchReport([], {})
    for name, module in _operators(model):
        if getattr(module.__dict__.get("forward"), "__func__", None) is _forward:
            del module.forward
            report.replaced.append(name)
        else:
            report.left[name] = "it was not patched"
    return report


def _operators(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == OPERATOR_CLASS and not list(module.parameters())
    ]


def _forward(
    self: nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    # im2col_step batches the work of the CUDA op of 2020; nothing here needs it.
    return deformable_attention(
        value, value_spatial_shapes_list, sampling_locations, attention_weights
    )
