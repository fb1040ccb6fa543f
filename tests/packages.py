"""Downstream packages, in processes of their own: `.ci/packages.txt` says which, and why apart."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("SACCADE_PACKAGES", ROOT / ".venv/packages"))

# What torchvision's Python files expect of its native library, at import.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Registrations live as long as this list does.
_defined: list[torch.library.Library] = []


def run(code: str, *names: str, timeout: float = 300) -> str:
    """Runs Python code in a process that finds the packages `names`; what it prints.

    The test is skipped where one of them is not installed. torchvision, if named, is imported first.
    """
    for name in names:
        if not _is_installed(name):
            pytest.skip(
                f"{name} is not installed: "
                "pip install --no-deps --target .venv/packages -r .ci/packages.txt"
            )
    lines = ["import packages", "packages.add_to_path()"]
    if "torchvision" in names:
        lines.append("packages.import_torchvision()")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, code])],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_to_path() -> None:
    """Behind all others: what the environment has itself is found there."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def import_torchvision() -> ModuleType:
    """torchvision, beside a torch for the CPU too.

    PyPI has its build for CUDA, whose native library does not load there. All but its own operators works
    without that library once two schemas are there, which it registers fakes for.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # The import that failed has left parts of the package behind.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _defined.append(library)
    return importlib.import_module("torchvision")


def _is_installed(name: str) -> bool:
    return (FOLDER / name).is_dir() or importlib.util.find_spec(name) is not None
