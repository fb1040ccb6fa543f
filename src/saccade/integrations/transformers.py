"""transformers models: their attention operator, computed by Saccade.

The models carry the operator in one of three ways, found here by names and signatures; nothing of
transformers is imported:

- a parameterless submodule `MultiScaleDeformableAttention` (Deformable DETR and most of the family);
- a function kept as an attribute of the attention module (D-FINE, DEIMv2);
- a function that the attention module's forward finds in its file (RT-DETRv2, Mask2Former, OneFormer).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from saccade.functional import deformable_attention

OPERATOR_CLASS = "MultiScaleDeformableAttention"
CORE_ATTRIBUTE = "ms_deformable_attn_core"
_PARAMETERS = (
    "value",
    "value_spatial_shapes",
    "value_spatial_shapes_list",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "im2col_step",
)
_OF_LEVELS = ("value", "value_spatial_shapes", "sampling_locations", "attention_weights")
_OF_FLAT_POINTS = (*_OF_LEVELS, "num_points_list", "method")
# What the functions of flat points call method. transformers clamps each axis by itself.
_METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "discrete": {"interpolation": "discrete", "padding": "border"},
}


class PatchReport(NamedTuple):
    """What `patch` or `unpatch` did: names of the submodules, and why others were left alone."""

    replaced: list[str]
    left: dict[str, str]


def patch(model: nn.Module) -> PatchReport:
    """Makes the deformable attention of a loaded transformers model run on Saccade.

    Parameters, buffers and the state dict stay as they are; only the submodules that compute the
    operator change, on this model and no other. Calling it twice changes nothing.

    Args:
        model: a transformers model with deformable attention (Deformable DETR, Grounding DINO,
            RT-DETR, RT-DETRv2, D-FINE, RF-DETR, LW-DETR, Mask2Former, OneFormer and others).

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
        reason = None if _is_patched(module) else _replace(module)
        if reason is None:
            report.replaced.append(name)
        else:
            report.left[name] = reason
    if not report.replaced:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left.items())
        raise ValueError(
            f"model: expected submodules of class {OPERATOR_CLASS} as in transformers' Deformable "
            f"DETR, or the functions of RT-DETRv2, D-FINE or Mask2Former, got "
            f"{type(model).__name__} with {reasons or 'none'}"
        )
    return report


def unpatch(model: nn.Module) -> PatchReport:
    """Undoes `patch`: the model computes its attention as transformers wrote it.

    Returns:
        PatchReport: `replaced` names the submodules that were restored.
    """
    report = PatchReport([], {})
    for name, module in _operators(model):
        if not _is_patched(module):
            report.left[name] = "it was not patched"
            continue
        core = module.__dict__.get(CORE_ATTRIBUTE)
        if isinstance(core, _FlatPoints):
            setattr(module, CORE_ATTRIBUTE, core.original)
        else:
            del module.forward
        report.replaced.append(name)
    return report


def _operators(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        is_operator = type(module).__name__ == OPERATOR_CLASS and not list(module.parameters())
        if is_operator or CORE_ATTRIBUTE in module.__dict__ or _functions_of(module):
            yield name, module


def _functions_of(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """The operators that the forward of the module's class finds in its file, by name."""
    forward = type(module).forward
    return {
        name: forward.__globals__[name]
        for name in getattr(getattr(forward, "__code__", None), "co_names", ())
        if name in ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2")
        and isinstance(forward.__globals__.get(name), FunctionType)
    }


def _is_patched(module: nn.Module) -> bool:
    if isinstance(module.__dict__.get(CORE_ATTRIBUTE), _FlatPoints):
        return True
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return getattr(function, "runs_on_saccade", False) is True


def _replace(module: nn.Module) -> str | None:
    """Makes one submodule run on Saccade, or says why it cannot."""
    method = getattr(module, "decoder_method", getattr(module, "method", "default"))
    if method not in _METHODS:
        return f"its method is {method!r}, expected one of {', '.join(_METHODS)}"
    core = module.__dict__.get(CORE_ATTRIBUTE)
    if core is not None:
        replacement = _replacement_of(core)
        if isinstance(replacement, str):
            return replacement
        setattr(module, CORE_ATTRIBUTE, replacement)
        return None
    functions = _functions_of(module)
    if functions:
        replacements = {name: _replacement_of(found) for name, found in functions.items()}
        for replacement in replacements.values():
            if isinstance(replacement, str):
                return replacement
        module.forward = MethodType(_rebound(type(module).forward, replacements), module)
        return None
    found = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if found != _PARAMETERS:
        return f"its forward takes {found}, expected {_PARAMETERS}"
    module.forward = MethodType(_forward, module)
    return None


def _replacement_of(function: Callable[..., Any]) -> Callable[..., Tensor] | str:
    """Saccade behind the signature of one of the two functions, or why not."""
    found = tuple(inspect.signature(function).parameters)
    if found == _OF_LEVELS:
        return _of_levels
    if found == _OF_FLAT_POINTS:
        return _FlatPoints(function)
    return f"its function takes {found}, expected {_OF_LEVELS} or {_OF_FLAT_POINTS}"


def _rebound(forward: Any, replacements: dict[str, Any]) -> FunctionType:
    """The same forward, finding other functions under some names.

    The file's own names stay as they are, for they belong to every model of the process. The copy of
    them goes without `__name__`: torch.compile would look the names up in the file again.
    """
    names = {key: found for key, found in forward.__globals__.items() if key != "__name__"}
    function = FunctionType(
        forward.__code__,
        names | replacements,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    function.__kwdefaults__ = forward.__kwdefaults__
    function.runs_on_saccade = True  # type: ignore[attr-defined]
    return function


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


_forward.runs_on_saccade = True  # type: ignore[attr-defined]


def _of_levels(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights)


class _FlatPoints:
    """Saccade behind `multi_scale_deformable_attention_v2`, which it keeps for `unpatch`."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(
        self,
        value: Tensor,
        value_spatial_shapes: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: list[int],
        method: str = "default",
    ) -> Tensor:
        if method not in _METHODS:
            raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
        return deformable_attention(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            num_points=num_points_list,
            **_METHODS[method],
        )
