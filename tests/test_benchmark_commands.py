"""`saccade bench models` and `saccade bench sweep`, on small models and shapes."""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys

import pytest
import torch
from test_benchmark import not_blank, run, shrink

from saccade.benchmark import detectors, models, sweep
from saccade.benchmark.detectors import DETECTORS
from saccade.benchmark.operator import Truth
from saccade.benchmark.workloads import WORKLOADS, Workload


@pytest.fixture
def small(monkeypatch):
    """Small maps and small models, for the commands."""
    for name, workload in list(WORKLOADS.items()):
        monkeypatch.setitem(WORKLOADS, name, shrink(workload))
    measure = models.measure
    monkeypatch.setattr(
        models, "measure", lambda detector, seconds: measure(detector, seconds, small=True)
    )


def test_whole_models_are_timed_eager_and_patched(small, tmp_path, capsys):
    file = tmp_path / "models.json"
    names = ("--model", "mask2former", "--model", "rf-detr")
    assert run("bench", "models", *names, "--seconds", 0, "--threads", 1, "--json", file) == 0
    assert "Mask2Former" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["command"] == (
        "saccade bench models --model mask2former --model rf-detr --threads 1 --seconds 0.0"
    )
    assert {"processor", "torch", "transformers", "backend"} <= found["machine"].keys()
    assert [row["model"] for row in found["models"]] == ["mask2former", "rf-detr"]
    for row in found["models"]:
        assert row["reason"] == ""
        assert row["ratio"] == pytest.approx(row["eager_ms"] / row["patched_ms"], rel=0.02)
        assert 0 < row["patched_share"] < 1
        assert 0 < row["eager_share"] < 1
        assert row["attention_modules"] == 2
        assert row["largest_difference"] < 1e-3


def test_a_model_that_cannot_be_made_is_shown_with_the_reason(small, tmp_path, capsys, monkeypatch):
    def absent(small):
        raise ImportError("cannot import name 'NewDetr'\nfrom transformers")

    broken = DETECTORS["rt-detr"]._replace(make=absent)
    monkeypatch.setitem(detectors.DETECTORS, "rt-detr", broken)
    file = tmp_path / "models.json"
    assert run("bench", "models", "--model", "rt-detr", "--json", file) == 0
    assert "ImportError: cannot import name" in " ".join(capsys.readouterr().out.split())
    [row] = json.loads(file.read_text())["models"]
    assert row["reason"] == "ImportError: cannot import name 'NewDetr'"
    assert row["ratio"] is None
    tables = pytest.importorskip("benchmarks.tables", reason="benchmarks/ is not in a wheel")
    assert "NewDetr" in "\n".join(tables.models(json.loads(file.read_text())))


def test_wrong_outputs_of_a_patched_model_are_an_error(small, capsys, monkeypatch):
    from saccade.integrations import operators as integration

    operator = integration.deformable_attention
    monkeypatch.setattr(
        integration,
        "deformable_attention",
        # In the trial before a function is replaced, which is in float64, right.
        lambda value, *given, **options: (
            operator(value, *given, **options) + (value.dtype == torch.float32)
        ),
    )
    assert run("bench", "models", "--model", "rf-detr", "--seconds", 0) == 1
    assert "wrong numbers: rf-detr: patched and eager outputs differ" in capsys.readouterr().err
    assert run("bench", "models", "--model", "nonsense") == 2
    assert "--model: expected one of deformable-detr, " in capsys.readouterr().err


def test_models_as_an_option(monkeypatch, capsys):
    measured = []

    def measure(detector, seconds):
        measured.append(detector.name)
        return models.ModelFigure(detector.name, detector.input, reason="nottoday")

    monkeypatch.setattr(models, "measure", measure)
    assert run("bench", "--models") == 0
    assert measured == list(DETECTORS)
    assert capsys.readouterr().out.count("nottoday") == len(DETECTORS)


def test_infinite_logits_agree_when_they_are_in_the_same_place():
    want = [torch.tensor([[1.0, -math.inf], [2.0, -math.inf]])]
    assert models._compare("model", want, want) == 0
    with pytest.raises(ArithmeticError, match="differ in 50%"):
        models._compare("model", [want[0] * 1.5], want)
    with pytest.raises(ArithmeticError, match="finite in different places"):
        models._compare("model", [torch.tensor([[1.0, 0.0], [2.0, 0.0]])], want)
    with pytest.raises(ArithmeticError, match="finite in different places"):
        models._compare("model", [want[0] * math.nan], want)


def test_random_shapes_are_seeded_and_strange():
    found = sweep.random_workloads(200)
    assert found == sweep.random_workloads(200)
    assert found != sweep.random_workloads(200, seed=1)
    for workload in found:
        assert all(
            workload.queries % factor for factor in range(2, math.isqrt(workload.queries) + 1)
        )
        assert workload.queries >= 2
    assert {len(workload.shapes) for workload in found} == set(range(1, 10))
    assert any(workload.head_dim % 2 for workload in found)
    assert any(workload.shared_head for workload in found)
    assert any(len(set(workload.points)) > 1 for workload in found)
    works = sorted(sweep.work(one) for one in found)
    assert works[len(works) // 10] > sweep.LEAST_BYTES / 2
    assert works[-len(works) // 10] < sweep.MOST_BYTES * 2


def test_work_is_counted_in_value_rows():
    workload = Workload("", "", [(10, 10), (5, 5)], 7, 2, 3, num_points=[1, 4], batch_size=2)
    # Of 16 rows of 12 bytes, which fill 3 lines, two reach from one into the next.
    assert sweep.lines_of_a_row(12) == 18 / 16
    assert [sweep.lines_of_a_row(size) for size in (4, 32, 64, 128, 96)] == [1, 1, 1, 2, 2]
    assert sweep.work(workload) == 2 * 7 * 2 * 5 * 4 * 64 * 18 / 16
    assert sweep.work_of_both(workload) == 3 * sweep.work(workload) + 2 * 125 * 2 * 3 * 4
    assert sweep.work_of_both(workload._replace(shared_head=True)) == (
        3 * sweep.work(workload) + 2 * 125 * 3 * 4
    )
    assert sweep.describe(workload) == "B2 Q7 M2 D3 K[1, 4] [10x10, 5x5]"


def test_summary_names_the_worst():
    figures = [
        sweep.ShapeFigure(f"shape-{index}", "sizes", 16, 1, 1, 1, bandwidth, 2 * bandwidth)
        for index, bandwidth in enumerate([10, 20, 5, 40, 30])
    ]
    forward, both = sweep.summarise(figures)
    assert (forward.median, both.median) == (20, 40)
    assert forward.worst_ratio == both.worst_ratio == forward.worst_ratio_of_full_vectors == 4
    assert forward.worst[:2] == ["shape-2: sizes", "shape-0: sizes"]


@pytest.fixture
def kept(monkeypatch):
    """Stands in for `keep_memory`, which would hold for all tests that follow."""
    calls = []
    monkeypatch.setattr(sweep, "keep_memory", lambda: calls.append(True))
    return calls


def test_memory_is_kept():
    program = """
import resource, torch
from saccade.benchmark.sweep import keep_memory
keep_memory()
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("memory is kept by glibc's mallopt")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    faults = [int(number) for number in done.stdout.split()]
    # The first calls find their places in the heap, which stays theirs.
    assert 4 * max(faults[-5:]) < faults[0]


def test_sweep_command(small, kept, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    monkeypatch.setattr(sweep, "MOST_BYTES", 2 * sweep.LEAST_BYTES)
    options = ("--shapes", 3, "--seed", 5, "--threads", 1, "--seconds", 0)
    assert run("bench", "sweep", *options, "--json", file, "--plot", picture) == 0
    printed = capsys.readouterr().out
    assert "forward + backward: the worst shape is" in printed
    assert "levels x points" in printed
    found = json.loads(file.read_text())
    assert found["command"] == "saccade bench sweep --shapes 3 --seed 5 --threads 1 --seconds 0.0"
    assert found["threads"] == 1
    assert len(found["shapes"]) == len(WORKLOADS) + 3
    assert {row["curve"] for row in found["scaling"]} == {"queries", "levels x points", "threads"}
    assert [row["direction"] for row in found["summary"]] == list(sweep.DIRECTIONS)
    assert not_blank(picture)
    assert kept


def test_sweep_command_ends_with_1_on_wrong_numbers(small, kept, capsys, monkeypatch):
    def refuse(self, peer, found):
        raise ArithmeticError("output: saccade and the reference differ")

    monkeypatch.setattr(Truth, "check", refuse)
    assert run("bench", "sweep", "--shapes", 0, "--seconds", 0) == 1
    assert "wrong numbers: output: saccade" in capsys.readouterr().err
