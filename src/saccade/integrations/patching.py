"""`patch` and `unpatch`: a loaded model, or a package by name.

A model carries the operator in one of three ways: as a submodule without parameters that is nothing but
the operator, as a function kept by the attention module, or as a function (or an autograd function) that
the attention module's forward finds in its file. A package carries functions and classes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from saccade.integrations.operators import (
    is_autograd_function,
    is_candidate,
    is_class,
    original_of,
    replacement_of,
)
from saccade.integrations.rebinding import rebound, used_by


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
    numbers on a small random map.

    Args:
        target: a model (of transformers, mmdet, RF-DETR, RT-DETR, D-FINE, Grounding DINO, detrex,
            or of any fork of Deformable-DETR); or a package, imported or by name ("mmcv").

    Returns:
        PatchReport: what now runs on Saccade, and what was left alone with the reason.

    Raises:
        TypeError: `target` is of another type.
        ValueError: there is nothing that can be replaced; the message says what was found.
        ModuleNotFoundError: there is no package of this name.

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
            _note(report, name, _patch_module(module))
        what = f"{type(target).__name__} with"
    else:
        package = _package(target)
        report = _patch_package(package)
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
        return _unpatch_package(_package(target))
    report = PatchReport([], {})
    for name, module in target.named_modules():
        _note(report, name, _unpatch_module(module))
    return report


def _note(report: PatchReport, name: str, outcome: str | None) -> None:
    """Enters one submodule: None for one without the operator, "" for a success, or a reason."""
    if outcome == "":
        report.replaced.append(name)
    elif outcome is not None:
        report.left[name] = outcome


# A model: its submodules one by one


class _Carried(NamedTuple):
    """The operator as one submodule carries it."""

    kept: dict[str, Any]
    """Functions that the module keeps as attributes, or partial calls of them."""
    used: list[Any]
    """Functions and autograd functions that its forward finds in its file."""
    itself: bool
    """Whether the module is nothing but the operator."""


def _carried(module: nn.Module, is_wanted: Callable[[object], bool]) -> _Carried:
    forward = type(module).forward
    kept = {
        name: found
        for name, found in vars(module).items()
        if name != "forward" and is_wanted(getattr(found, "func", found))
    }
    itself = is_wanted(forward) and next(module.parameters(), None) is None
    return _Carried(kept, list(used_by(forward, is_wanted)), itself)


def _patch_module(module: nn.Module) -> str | None:
    if _is_patched(module):
        return ""
    carried = _carried(module, is_candidate)
    forward = type(module).forward
    if not any(carried):
        # Nothing left to replace: perhaps because its package is patched.
        return "" if any(_carried(module, _is_replaced)) else None
    # A copy of a patched model, come back from a file, holds the forward of its class.
    own = vars(module).get("forward", forward)
    own = getattr(own, "__func__", own)
    if own is not forward and (carried.used or carried.itself):
        return "its forward is not that of its class: something else has replaced it before"
    reason = _why_not(module, carried)
    if reason:
        return reason
    for name, found in carried.kept.items():
        setattr(module, name, _in_its_place(found))
    if carried.itself:
        module.forward = MethodType(_as_forward(forward), module)
    elif carried.used:
        function = rebound(forward, is_candidate, replacement_of)  # type: ignore[arg-type]
        function.saccade_original = forward  # type: ignore[attr-defined]
        module.forward = MethodType(function, module)
    return ""


def _unpatch_module(module: nn.Module) -> str | None:
    if not _is_patched(module):
        if any(_carried(module, is_candidate)):
            return "it was not patched"
        if any(_carried(module, _is_replaced)):
            return "its package is patched, not this model"
        return None
    for name, found in list(vars(module).items()):
        original = original_of(found)
        if original is None:
            continue
        if name == "forward":
            del module.forward
        else:
            setattr(module, name, original)
    return ""


def _is_patched(module: nn.Module) -> bool:
    return any(original_of(found) is not None for found in vars(module).values())


def _is_replaced(found: object) -> bool:
    return original_of(found) is not None


def _why_not(module: nn.Module, carried: _Carried) -> str:
    originals = [getattr(found, "func", found) for found in carried.kept.values()] + carried.used
    if carried.itself:
        originals.append(type(module).forward)
    method = getattr(module, "decoder_method", getattr(module, "method", None))
    for original in originals:
        replacement = replacement_of(original)
        if isinstance(replacement, str):
            return f"{original.__name__}: {replacement}"
        if "method" in replacement.roles.values() and method not in (None, *replacement.methods):
            return f"its method is {method!r}, expected one of {', '.join(replacement.methods)}"
    return ""


def _in_its_place(found: Any) -> Any:
    """A replacement of a function, or of a partial call of one."""
    if not isinstance(found, functools.partial):
        return replacement_of(found)
    replacement = functools.partial(_in_its_place(found.func), *found.args, **found.keywords)
    replacement.saccade_original = found  # type: ignore[attr-defined]
    return replacement


def _as_forward(original: Any) -> Callable[..., Any]:
    """The forward of a module that is the operator."""
    replacement: Any = replacement_of(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *positional: Any, **named: Any) -> Any:
        return replacement(*positional, **named)

    forward.saccade_original = original  # type: ignore[attr-defined]
    return forward


# A package: its functions and classes, wherever they have been imported to


def _package(target: object) -> ModuleType:
    if isinstance(target, ModuleType):
        return target
    if not isinstance(target, str):
        raise TypeError(
            "target: expected a torch.nn.Module, a package or the name of one, got "
            f"{type(target).__name__}"
        )
    return importlib.import_module(target)


def _patch_package(package: ModuleType) -> PatchReport:
    report = PatchReport([], _import_operators(package))
    replacements: dict[int, Any] = {}
    for owner, name, found in _everything_imported():
        if original_of(found) is not None and _belongs_to(original_of(found), package):
            report.replaced.append(f"{_name_of(owner)}.{name}")
        elif is_candidate(found) and _belongs_to(found, package):
            replacement = replacement_of(found)
            if isinstance(replacement, str):
                report.left[f"{_name_of(owner)}.{name}"] = replacement
                continue
            if isinstance(owner, type):
                replacement = replacements.setdefault(id(found), _as_forward(found))
            setattr(owner, name, replacement)
            report.replaced.append(f"{_name_of(owner)}.{name}")
    report.replaced.sort()
    return report


def _unpatch_package(package: ModuleType) -> PatchReport:
    report = PatchReport([], {})
    for owner, name, found in _everything_imported():
        original = original_of(found)
        if original is not None and _belongs_to(original, package):
            setattr(owner, name, original)
            report.replaced.append(f"{_name_of(owner)}.{name}")
    report.replaced.sort()
    return report


def _everything_imported() -> list[tuple[Any, str, Any]]:
    """The names of every imported file, and the forward of every class of modules, each once."""
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if is_class(value):
                if issubclass(value, nn.Module) and "forward" in vars(value):
                    found[id(value), "forward"] = (value, "forward", vars(value)["forward"])
                if not is_autograd_function(value):
                    continue
            found[id(module), name] = (module, name, value)
    return list(found.values())


def _belongs_to(found: Any, package: ModuleType) -> bool:
    home = getattr(found, "__module__", None) or ""
    return home == package.__name__ or home.startswith(package.__name__ + ".")


def _name_of(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def _import_operators(package: ModuleType) -> dict[str, str]:
    """Imports the files of a package in which the operator is defined; why some could not be."""
    failed = {}
    for name, path in _files(package):
        if name in sys.modules or not _defines_an_operator(path):
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a compiled extension or a package that is missing, usually
            failed[name] = f"it cannot be imported: {type(error).__name__}: {error}"
    return failed


def _files(package: ModuleType) -> Iterator[tuple[str, Path]]:
    for folder in getattr(package, "__path__", []):
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            # transformers generates its models from files called modular_*, which nothing imports.
            if all(part.isidentifier() for part in parts) and not path.name.startswith("modular_"):
                yield ".".join((package.__name__, *parts)), path


def _defines_an_operator(path: Path) -> bool:
    """Whether a function in it takes sampling locations: without running the file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if "sampling_loc" not in text:
        return False
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return any(
        argument.arg.startswith("sampling_loc")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for argument in node.args.args
    )
