"""The table of docs/export.md is what the code gives: one cell here, every cell under `make test-all`."""

from __future__ import annotations

import importlib.util
import re
import shutil

import pytest

from benchmarks import export_matrix
from benchmarks.export_matrix import CALLS, PAGE, RUNTIMES, Work, cell
from benchmarks.export_targets import TARGETS
from saccade.ops import native

# What is refused, and a part of the message; everything else is equal to eager.
REFUSED = {(target, "trace"): {"other resolution": "value: expected"} for target in TARGETS}
# Of Swin, run for the page alone, for its export takes some minutes.
SWIN = "patched Mask2Former, Swin"
REFUSED |= {
    (SWIN, name): {"other resolution": ""} for name in RUNTIMES if name not in ("compile", "trace")
}
REFUSED[SWIN, "export"] = {"batch 1": "", "other resolution": ""}
SMALL = [name for name, target in TARGETS.items() if not target.whole]
WHOLE = [name for name, target in TARGETS.items() if target.whole and name != SWIN]
# AOTInductor compiles for half a minute; the embedded detector's package is in test_export_cpp.py.
QUICK = [name for name in RUNTIMES if name != "AOTI"]
NEEDS = {
    "ONNX": ("onnx", "onnxscript", "onnxruntime"),
    "OpenVINO": ("onnx", "onnxscript", "openvino"),
    "plugin": ("onnxruntime_extensions",),
    "native": ("onnxruntime_extensions",),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}"),
]


@pytest.fixture(scope="module")
def work_on(tmp_path_factory):
    """A target's work, begun once: what it has exported serves several tests."""
    begun = {}

    def get(target):
        if target not in begun:
            begun.clear()  # the tests come target by target
            begun[target] = Work(TARGETS[target], tmp_path_factory.mktemp("work"))
        return begun[target]

    return get


def need(runtime):
    for part, packages in NEEDS.items():
        for package in packages if part in runtime else ():
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{runtime} needs {package}")
    if runtime == "AOTI" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("AOTInductor needs a C++ compiler")


def check(work, target, runtime):
    need(runtime)
    refused = REFUSED.get((target, runtime), {})
    outcomes = cell(work, runtime)
    assert outcomes.keys() == CALLS.keys()
    for call, told in outcomes.items():
        if call in refused:
            assert refused[call] in told
            assert export_matrix.explained(target, told), "not explained"
        else:
            assert told == "yes", call


@pytest.mark.slow
def test_one_cell(work_on):
    check(work_on("op"), "op", "ONNX Runtime, gather")


@pytest.mark.nightly
@pytest.mark.parametrize("runtime", QUICK)
@pytest.mark.parametrize("target", SMALL)
def test_operators_and_modules(work_on, target, runtime):
    check(work_on(target), target, runtime)


@pytest.mark.nightly
def test_a_package_compiled_ahead_of_time(work_on):
    target = "nn.MultiScaleDeformableAttention"
    check(work_on(target), target, "AOTI")


@pytest.mark.nightly
@pytest.mark.parametrize("runtime", ["export", "ONNX Runtime, grid_sample"])
@pytest.mark.parametrize("target", WHOLE)
def test_whole_models(work_on, target, runtime):
    pytest.importorskip("transformers")
    check(work_on(target), target, runtime)


def test_a_difference_is_not_a_success(tmp_path, monkeypatch):
    """The same as `cell` says of what runs but gives other numbers."""
    work = Work(TARGETS["op"], tmp_path)
    monkeypatch.setitem(RUNTIMES, "wrong", lambda work: lambda *inputs: work.module(*inputs) + 1e-3)
    assert all("not close" in told for told in cell(work, "wrong").values())
    monkeypatch.setitem(RUNTIMES, "none", lambda work: 1 / 0)
    assert cell(work, "none") == dict.fromkeys(CALLS, "ZeroDivisionError: division by zero")


def test_the_page_says_the_same():
    marked = export_matrix.MARKED.search(PAGE.read_text())
    lines = marked[0].splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if "|" in line]
    assert rows[0][1:] == list(RUNTIMES)
    assert [row[0] for row in rows[2:]] == list(TARGETS)
    notes = dict(re.findall(r"^(\d+)\. (.+)$", marked[0], flags=re.MULTILINE))
    assert set(notes.values()) <= set(export_matrix.EXPLAINED.values()), "a refusal not explained"
    for target, *cells in rows[2:]:
        for runtime, told in zip(RUNTIMES, cells, strict=True):
            refused = REFUSED.get((target, runtime), {})
            assert (told == "yes") == (not refused), (target, runtime, told)
            assert {call for call in CALLS if call in told} == set(refused)
            assert set(re.findall(r"\((\d+)\)", told)) <= notes.keys()
