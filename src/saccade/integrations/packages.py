"""Replaces and restores the operator in a package, under every name that it was imported to."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from saccade.integrations.operators import (
    get_original,
    is_autograd_function,
    is_candidate,
    is_class,
    make_forward,
    make_replacement,
)


def patch_package(package: ModuleType) -> tuple[list[str], dict[str, str]]:
    """Replaces the operator in a package.

    Returns:
        The names that were replaced; and those that were left as they are, with the reason.
    """
    replaced, left = [], _import_operators(package)
    for owner, name, target in _list_imported():
        full_name = f"{_get_name(owner)}.{name}"
        if get_original(target) is not None and _belongs_to(get_original(target), package):
            replaced.append(full_name)
        elif is_candidate(target) and _belongs_to(target, package):
            replacement = make_replacement(target)
            if isinstance(replacement, str):
                left[full_name] = replacement
                continue
            setattr(owner, name, make_forward(target) if is_class(owner) else replacement)
            replaced.append(full_name)
    return sorted(replaced), left


def unpatch_package(package: ModuleType) -> list[str]:
    """Undoes `patch_package`; returns the names that were restored."""
    restored = []
    for owner, name, target in _list_imported():
        original = get_original(target)
        if original is not None and _belongs_to(original, package):
            setattr(owner, name, original)
            restored.append(f"{_get_name(owner)}.{name}")
    return sorted(restored)


def _list_imported() -> list[tuple[Any, str, Any]]:
    """The names in every imported file, and the forward of every nn.Module class, each once."""
    entries: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if is_class(value):
                if issubclass(value, nn.Module) and "forward" in vars(value):
                    entries[id(value), "forward"] = (value, "forward", vars(value)["forward"])
                if not is_autograd_function(value):
                    continue
            entries[id(module), name] = (module, name, value)
    return list(entries.values())


def _belongs_to(target: Any, package: ModuleType) -> bool:
    home = getattr(target, "__module__", None) or ""
    return home == package.__name__ or home.startswith(package.__name__ + ".")


def _get_name(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def _import_operators(package: ModuleType) -> dict[str, str]:
    """Imports the files of a package that define the operator; returns why some could not be."""
    failed = {}
    for name, path in _iterate_files(package):
        if name in sys.modules or not _defines_an_operator(path):
            continue
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # usually a missing extension; or a script
            failed[name] = f"it cannot be imported: {type(error).__name__}: {error}"
    return failed


def _iterate_files(package: ModuleType) -> Iterator[tuple[str, Path]]:
    for folder in getattr(package, "__path__", []):
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            # transformers generates its models from files called modular_*, which are not imported.
            generated_from = path.name.startswith("modular_")
            if all(map(str.isidentifier, parts)) and not generated_from and path.is_file():
                yield ".".join((package.__name__, *parts)), path


def _defines_an_operator(path: Path) -> bool:
    """Whether a function in a file has a parameter for sampling locations; the file is not run."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(text if "sampling_loc" in text else "")
    except (OSError, SyntaxError, ValueError):
        return False
    return any(
        argument.arg.startswith("sampling_loc")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for argument in node.args.args
    )
