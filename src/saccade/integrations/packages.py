"""The operator in a package: its functions and classes, wherever they have been imported to."""

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
    as_forward,
    is_autograd_function,
    is_candidate,
    is_class,
    original_of,
    replacement_of,
)


def patch_package(package: ModuleType) -> tuple[list[str], dict[str, str]]:
    """Replaces the operator in a package; names of what was replaced, and of what was left and why."""
    replaced, left = [], _import_operators(package)
    for owner, name, found in _everything_imported():
        full_name = f"{_name_of(owner)}.{name}"
        if original_of(found) is not None and _belongs_to(original_of(found), package):
            replaced.append(full_name)
        elif is_candidate(found) and _belongs_to(found, package):
            replacement = replacement_of(found)
            if isinstance(replacement, str):
                left[full_name] = replacement
                continue
            setattr(owner, name, as_forward(found) if is_class(owner) else replacement)
            replaced.append(full_name)
    return sorted(replaced), left


def unpatch_package(package: ModuleType) -> list[str]:
    """Undoes `patch_package`; names of what was restored."""
    restored = []
    for owner, name, found in _everything_imported():
        original = original_of(found)
        if original is not None and _belongs_to(original, package):
            setattr(owner, name, original)
            restored.append(f"{_name_of(owner)}.{name}")
    return sorted(restored)


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
        except (Exception, SystemExit) as error:  # an extension that is missing, usually; a script
            failed[name] = f"it cannot be imported: {type(error).__name__}: {error}"
    return failed


def _files(package: ModuleType) -> Iterator[tuple[str, Path]]:
    for folder in getattr(package, "__path__", []):
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            # transformers generates its models from files called modular_*, which nothing imports.
            generated_from = path.name.startswith("modular_")
            if all(map(str.isidentifier, parts)) and not generated_from and path.is_file():
                yield ".".join((package.__name__, *parts)), path


def _defines_an_operator(path: Path) -> bool:
    """Whether a function in it takes sampling locations: without running the file."""
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
