"""The house: layers, a fast silent import, the public names, no trace of a machine."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import saccade

PACKAGE = Path(__file__).resolve().parent.parent / "src/saccade"

# From the top down; a module may import from its own layer and from those below it.
LAYERS = [
    {"__main__", "cli", "__init__"},
    {"vision", "doctor", "bench", "export", "terminal", "timing"},
    {"integrations"},
    {"nn", "compositions", "convolution"},
    {"functional"},
    {"backend"},
    # The operator calls the GPU kernels when they are needed, and they read its arguments by name.
    {"ops", "backends"},
    {"reference"},
    {"sampling"},
    {"call"},
    {"checks", "files"},
]
CORE = {
    *("checks", "files", "call", "sampling", "reference", "ops", "backend", "functional"),
    *("compositions", "convolution", "nn", "integrations"),
}


@functools.cache
def modules():
    """The part of the package, the path and the syntax tree of each file."""
    return [
        (path.relative_to(PACKAGE).with_suffix("").parts[0], path, ast.parse(path.read_text()))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_layer(part):
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def test_imports_go_downward_only():
    parts = {part for part, _, _ in modules()}
    for part, path, tree in modules():
        for name in imported(tree):
            if name.split(".")[0] != "saccade":
                continue
            target = name.split(".")[1] if "." in name else "__init__"
            if target not in parts or target == "__init__":
                # The package's public names are for the modules that use the library as its users do.
                assert find_layer(part) <= 1, f"{path.name} imports {name} from the top"
                continue
            assert find_layer(part) <= find_layer(target), f"{path.name} imports {name} upward"


@pytest.mark.slow
def test_exports_do_not_depend_on_benchmarks():
    for part, path, tree in modules():
        if part == "export":
            benchmarks = [name for name in imported(tree) if name.startswith("saccade.bench")]
            assert not benchmarks, path


def test_the_core_depends_on_torch_alone():
    for part, path, tree in modules():
        if part not in CORE:
            continue
        for name in imported(tree):
            root = name.split(".")[0]
            assert root in {"saccade", "torch"} | sys.stdlib_module_names, f"{path}: {name}"


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_import_is_silent_and_loads_nothing_but_torch():
    code = """
import socket, subprocess, sys, torch
def refuse(*args, **kwargs): raise AssertionError("import reached outside")
socket.socket.connect = subprocess.Popen.__init__ = refuse
before = set(sys.modules)
import saccade
extra = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
assert extra <= {"saccade", "torch"}, extra
"""
    process = python(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout == process.stderr == ""


@pytest.mark.nightly
@pytest.mark.slow
def test_import_patches_nothing():
    code = """
from transformers.models.deformable_detr import modeling_deformable_detr as module
before = module.MultiScaleDeformableAttention.forward
import saccade
assert module.MultiScaleDeformableAttention.forward is before
"""
    process = python(code)
    assert process.returncode == 0, process.stderr


def test_versions_and_extras_agree_with_the_project_file():
    import re

    from saccade import doctor

    project = (PACKAGE.parent.parent / "pyproject.toml").read_text()
    assert f'version = "{saccade.__version__}"' in project
    for extra in doctor.EXTRAS:
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def test_public_names():
    for name in (
        "deformable_attention", "deformable_convolution", "depth_weighted_deformable_attention",
        "multi_camera_deformable_aggregation", "nn", "Sampling", "reference", "which_backend",
        "use_backend",
        "patch", "unpatch", "fused_deformable_attention", "register_flop_formulas", "Backend",
    ):  # fmt: skip
        assert hasattr(saccade, name)
        assert getattr(saccade, name).__doc__


@pytest.mark.slow
def test_docstrings_run():
    import doctest
    import importlib
    import pkgutil

    from saccade import doctor

    attempted = 0
    for module in pkgutil.walk_packages(saccade.__path__, "saccade."):
        if module.name in ("saccade.__main__", "saccade._native"):  # the latter is not for Python
            continue
        if module.name.startswith("saccade.backends.triton") and not doctor.installed("triton"):
            continue
        result = doctest.testmod(importlib.import_module(module.name))
        assert not result.failed, module.name
        attempted += result.attempted
    assert attempted >= 20


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/definition.md",
        "docs/compositions.md",
        "docs/deformable_convolution.md",
        "docs/backends.md",
        pytest.param("docs/export.md", marks=pytest.mark.slow),
    ],
)
def test_examples_of_the_pages_run(page):
    import doctest

    result = doctest.testfile(str(PACKAGE.parent.parent / page), module_relative=False)
    assert result.attempted > 0
    assert not result.failed


def test_no_file_is_too_long_to_keep_in_mind():
    root = PACKAGE.parent.parent
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split() or [str(path.relative_to(root)) for path in PACKAGE.rglob("*.py")]
    for name in names:
        path = root / name
        if path.suffix in {".py", ".cpp", ".h", ".inl"} and path.exists():
            assert len(path.read_text().splitlines()) <= 600, name
