"""`patch` and `unpatch`: a loaded model, or a package by name.

`operators` recognises the operator; `submodules` finds and replaces it in a model, and `packages` in a
package.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from torch import nn

from saccade.integrations.packages import patch_package, unpatch_package
from saccade.integrations.submodules import patch_module, unpatch_module


class PatchReport(NamedTuple):
    """What `patch` or `unpatch` did.

    `replaced` has the names of the submodules of a model, or of the functions and classes of a package;
    `left` has those that were left as they are, with the reason. `str` gives one line for each.
    """

    replaced: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        replaced = [f"replaced: {name or 'the module itself'}" for name in self.replaced]
        left = [f"left: {name or 'the module itself'}: {why}" for name, why in self.left.items()]
        return "\n".join(replaced + left)


def patch(target: nn.Module | ModuleType | str) -> PatchReport:
    """Makes the deformable attention of a loaded model, or of a package, run on Saccade.

    Of a model only the submodules that compute the operator change, and no other model does;
    parameters, buffers and the state dict stay as they are. Of a package, the functions and classes
    that are the operator are replaced under every name that they were imported to. Models made before
    and after run on Saccade, except those that keep a function of their own (D-FINE, RT-DETRv2), which
    have to be patched themselves. A second call changes nothing.

    The operator is recognised by its arguments and then tried: a function must give Saccade's result
    on a small random map. Files of a package that define such a function are imported, which runs them.

    Args:
        target: a model (of transformers, mmdet, RF-DETR, RT-DETR, D-FINE, Grounding DINO, detrex,
            or of any fork of Deformable-DETR); or a package, imported or by name ("mmcv").

    Returns:
        PatchReport: what now runs on Saccade, and what was left as it is, with the reason.

    Raises:
        TypeError: `target` is of another type.
        ValueError: nothing can be replaced; the message names what resembles the operator.
        ModuleNotFoundError: there is no package of this name.
        ImportError: the package cannot be imported.

    Example:
        >>> import saccade
        >>> from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
        >>> model = DeformableDetrForObjectDetection(config)            # doctest: +SKIP
        >>> saccade.patch(model).replaced                               # doctest: +SKIP
        ['model.encoder.layers.0.self_attn.attn', ...]
        >>> saccade.patch("mmcv").replaced                              # doctest: +SKIP
        ['mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction', ...]
    """
    if isinstance(target, nn.Module):
        report = PatchReport([], {})
        for name, module in target.named_modules():
            _add(report, name, patch_module(module))
        description = type(target).__name__
    else:
        package = _import_package(target)
        report = PatchReport(*patch_package(package))
        description = f"package {package.__name__}"
    if not report.replaced:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left.items())
        raise ValueError(
            "target: expected deformable attention in it, called with a value, shapes, sampling "
            f"locations and attention weights, got {description} with {reasons or 'none'}"
        )
    return report


def unpatch(target: nn.Module | ModuleType | str) -> PatchReport:
    """Undoes `patch`: the model or the package computes its attention as it was written.

    Args:
        target: as in `patch`.

    Returns:
        PatchReport: `replaced` names what was restored.
    """
    if not isinstance(target, nn.Module):
        return PatchReport(unpatch_package(_import_package(target)), {})
    report = PatchReport([], {})
    for name, module in target.named_modules():
        _add(report, name, unpatch_module(module))
    return report


def _add(report: PatchReport, name: str, outcome: str | None) -> None:
    """Adds one submodule; the outcome is None without the operator, "" for a success, or a reason."""
    if outcome == "":
        report.replaced.append(name)
    elif outcome is not None:
        report.left[name] = outcome


def _import_package(target: object) -> ModuleType:
    if isinstance(target, ModuleType):
        return target
    if not isinstance(target, str):
        raise TypeError(
            "target: expected a torch.nn.Module, a package or the name of one, got "
            f"{type(target).__name__}"
        )
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name == target.partition(".")[0]:
            raise
        # The package is installed, but something that it imports is not.
        raise ImportError(f"target: {target} cannot be imported: {error}", name=target) from error
