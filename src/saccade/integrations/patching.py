"""`patch` and `unpatch`: a loaded model, or a package by name.

`operators` knows the operator when it sees it; `submodules` finds and replaces it in a model, `packages` in a
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
    `left` those left alone, with the reason. `str` writes it out.
    """

    replaced: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        replaced = [f"replaced: {name or 'the module itself'}" for name in self.replaced]
        left = [f"left: {name or 'the module itself'}: {why}" for name, why in self.left.items()]
        return "\n".join(replaced + left)


def patch(target: nn.Module | ModuleType | str) -> PatchReport:
    """Makes the deformable attention of a loaded model, or of a package, run on Saccade.

    On a model only the submodules that compute the operator change, on this model and no other;
    parameters, buffers and the state dict stay as they are. Of a package, the functions and classes
    that are the operator are replaced, wherever they have been imported to: models made before and
    after run on Saccade, except those that kept a function of their own (D-FINE, RT-DETRv2): patch
    these themselves. Calling it twice changes nothing.

    What can be replaced is found by its arguments and then tried: a function must give Saccade's
    numbers on a small random map. Files of a package in which such a function is defined are
    imported, which runs them.

    Args:
        target: a model (of transformers, mmdet, RF-DETR, RT-DETR, D-FINE, Grounding DINO, detrex,
            or of any fork of Deformable-DETR); or a package, imported or by name ("mmcv").

    Returns:
        PatchReport: what now runs on Saccade, and what was left alone with the reason.

    Raises:
        TypeError: `target` is of another type.
        ValueError: there is nothing that can be replaced; the message says what was found.
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
            _note(report, name, patch_module(module))
        what = f"{type(target).__name__} with"
    else:
        package = _package(target)
        report = PatchReport(*patch_package(package))
        what = f"package {package.__name__} with"
    if not report.replaced:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left.items())
        raise ValueError(
            "target: expected deformable attention in it, called with a value, shapes, sampling "
            f"locations and attention weights, got {what} {reasons or 'none'}"
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
        return PatchReport(unpatch_package(_package(target)), {})
    report = PatchReport([], {})
    for name, module in target.named_modules():
        _note(report, name, unpatch_module(module))
    return report


def _note(report: PatchReport, name: str, outcome: str | None) -> None:
    """Enters one submodule: None for one without the operator, "" for a success, or a reason."""
    if outcome == "":
        report.replaced.append(name)
    elif outcome is not None:
        report.left[name] = outcome


def _package(target: object) -> ModuleType:
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
        # It is there, but not what it needs.
        raise ImportError(f"target: {target} cannot be imported: {error}", name=target) from error
