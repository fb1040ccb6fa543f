"""`python -m benchmarks.gpu` where there is no GPU: its checks, its steps, its report."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import saccade

pytest.importorskip("benchmarks.gpu", reason="benchmarks/ is not in a wheel")

from benchmarks.gpu import checks, special, speed, steps, variants
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu.__main__ import NO_GPU, command_of, main
from benchmarks.gpu.peers import SACCADE, UPSTREAM
from benchmarks.gpu.report import failed_checks
from benchmarks.gpu.results import Deadline, OutOfTimeError, Results, reason_of
from benchmarks.gpu.variants import AXES, Variant
from saccade import reference

CPU = torch.device("cpu")


def library(plain=saccade.deformable_attention, fused=saccade.fused_deformable_attention):
    return SimpleNamespace(deformable_attention=plain, fused_deformable_attention=fused)


def changed(change):
    """A library whose plain results are changed."""
    return library(lambda *given, **named: change(saccade.deformable_attention(*given, **named)))


def test_every_pair_of_values_is_planned():
    plan = variants.planned()
    assert len(plan) < 90
    assert len({variant.name for variant in plan}) == len(plan)
    for one, other in itertools.combinations(AXES, 2):
        covered = {(getattr(variant, one), getattr(variant, other)) for variant in plan}
        for a, b in itertools.product(AXES[one], AXES[other]):
            values = {one: a, other: b}
            plain_with_references = (
                values.get("form") == "plain" and values.get("references", "one") != "one"
            )
            height_without_image = (
                values.get("sampling") == "discrete border_height"
                and values.get("spatial_dims", 2) != 2
            )
            if not (plain_with_references or height_without_image):
                assert (a, b) in covered, values


def test_the_cpu_kernels_are_right_in_every_variant(tmp_path):
    results = Results(tmp_path / "gpu.json", {})
    with pytest.raises(OutOfTimeError):
        checks.check_variants(results, CPU, Deadline(-1), seed=1)
    assert results.found["checks_cut"] == "66 of 66 planned variants"
    checks.check_variants(results, CPU, Deadline(30), seed=1, quick=True)
    plan = variants.planned()[: checks.QUICK_VARIANTS]
    assert [row["name"] for row in results.rows("checks")] == [variant.name for variant in plan]
    for number, variant in enumerate(variants.planned()):
        error, allowed = checks.check_variant(variant, number, CPU)
        assert error <= allowed
    assert not failed_checks(results.found)


def unwritten(output):
    """As a kernel that forgets its last row."""
    found = torch.empty_like(output)
    found[:, :-1] = output[:, :-1]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unwritten, "NaN: never written"),
        (lambda output: output * (1 + 1e-4), "off by"),
        (lambda output: output.roll(1, 1), "off by"),
        (lambda output: output + 1e-7 * torch.randn_like(output), "two calls"),
        (lambda output: output.double(), "torch.float64"),
        (lambda output: output[:, :-1], "expected"),
        (lambda output: output.mT.contiguous().mT, "not contiguous"),
    ],
)
def test_a_wrong_kernel_is_found(change, message):
    with pytest.raises(ArithmeticError, match=message):
        checks.check_variant(Variant(), 3, CPU, changed(change))


def test_poisoned_memory_is_nan_and_only_inside():
    with checks.new_memory_is_nan():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.full((8,), 255, dtype=torch.uint8).view(dtype).isnan().all()


def test_positions_in_16_bits_and_positions_rounded_once_are_found():
    def narrow(value, shapes, locations, weights, **options):
        return saccade.deformable_attention(value, shapes, locations.bfloat16(), weights, **options)

    def wide(value, shapes, locations, weights, **options):
        return reference.deformable_attention(
            value.double(), shapes, locations.double(), weights.double(), **options
        ).to(value.dtype)

    with pytest.raises(ArithmeticError, match="off by"):
        checks.check_variant(Variant("bfloat16"), 1, CPU, library(narrow))
    checks.check_variant(Variant("bfloat16"), 1, CPU, library(wide))
    ties = Variant(sampling="nearest zeros", places="ties")
    with pytest.raises(ArithmeticError, match="off by"):
        checks.check_variant(ties, 1, CPU, library(wide))


def test_special_checks_find_what_they_are_for():
    found = special.special_checks()
    assert {f"workload {name}, bfloat16" for name in speed.WORKLOADS} <= found.keys()
    for name in ("plain: under autocast", "infinite values"):
        error, allowed = found[name](CPU, saccade, 1)
        assert 0 < error <= allowed
    for name in ("plain: side stream", "a map of more than 2^31 numbers"):
        assert "needs a GPU" in found[name](CPU, saccade, 1)

    def finite(value, *given, **named):
        return saccade.deformable_attention(value.nan_to_num(), *given, **named)

    with pytest.raises(ArithmeticError, match="isnan holds in other places"):
        found["infinite values"](CPU, library(finite), 1)
    with pytest.raises(ArithmeticError, match="torch.bfloat16"):
        found["plain: under autocast"](CPU, changed(torch.Tensor.bfloat16), 1)
    with pytest.raises(ArithmeticError, match="NaN"):
        found["workload rfdetr-nano, float32"](
            CPU, changed(lambda output: output.index_fill(1, torch.tensor([7]), math.nan)), 1
        )


def arguments(tmp_path, **changes):
    given = {
        "step": "variants", "seconds": 30.0, "json": tmp_path / "gpu.json", "device": "cpu", "case": [],
        "quick": True, "small": True, "peer_path": [], "resume": False, "minutes": 1.0, "seed": 7,
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


def test_a_failed_check_is_a_row_and_makes_the_exit_code(tmp_path, monkeypatch, capsys):
    given = arguments(tmp_path)
    steps.begin_file(given, "command")
    original = saccade.deformable_attention
    monkeypatch.setattr(
        saccade, "deformable_attention", lambda *given, **named: original(*given, **named) * 1.01
    )
    assert steps.run_step(given) == steps.DONE
    assert "WRONG: plain float32" in capsys.readouterr().out
    found = Results(given.json).found
    assert len(found["checks"]) == checks.QUICK_VARIANTS
    failed = failed_checks(found)
    assert {row["name"].split()[0] for row in failed} == {"plain"}
    monkeypatch.setattr(steps, "run_all", lambda *given: None)
    words = ["--device", "cpu", "--json", str(given.json), "--plot", str(tmp_path / "gpu.png")]
    assert main(words) == 1
    printed = capsys.readouterr().out
    Results(given.json, {"machine": {}})
    assert main([*words, "--section", "time"]) == 0
    assert main(words) == 1  # nothing was checked
    assert "WRONG: plain float32" in printed
    assert "no picture" in printed


def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    given = arguments(tmp_path)
    steps.begin_file(given, "command")
    steps.run_restarting(given, "variants", Deadline(60))
    found = json.loads(given.json.read_text())
    assert len(found["checks"]) == checks.QUICK_VARIANTS
    assert all(row["ok"] for row in found["checks"])
    assert found["backend"].startswith(("cpu", "reference"))
    assert found["machine"]["gpu"] == "none, a CPU for tests"
    assert "stopped" not in found


@pytest.mark.parametrize(
    ("code", "reason"), [(-11, "exit code -11"), (None, "ended"), (70, "lost")]
)
def test_after_a_crash_the_part_goes_on_without_its_cause(tmp_path, monkeypatch, code, reason):
    given = arguments(tmp_path)
    steps.begin_file(given, "command")
    doing = [
        {"key": "checks", "name": "one"},
        {"key": "figures", "name": "detr", "peer": UPSTREAM},
        {"key": "figures", "name": "detr", "peer": SACCADE},
        {"key": "floors", "name": "dino"},
        {"key": "backward", "name": "backward: detr", "peer": SACCADE},
    ]
    begun = iter(doing)

    def crash(given, name, seconds):
        now = next(begun, None)
        if now is None:
            return steps.DONE
        results = Results(given.json)
        results.put("doing", now)
        if code == 70:
            results.put("error", "lost: an illegal access")
        return code

    monkeypatch.setattr(steps, "run_process", crash)
    steps.run_restarting(given, "time", Deadline(60))
    found = Results(given.json).found
    assert [row["name"] for row in found["checks"]] == [
        "one",
        "timed: detr",
        "timed: backward: detr",
    ]
    assert all(reason in row["reason"] for row in found["checks"])
    assert [row["peer"] for row in found["crashed"]] == [UPSTREAM]
    assert found["skipped"] == ["detr", "dino", "backward: detr"]
    assert len(found["stopped"]) == len(doing)


def test_an_error_of_the_benchmark_ends_the_part_once(tmp_path, monkeypatch):
    given = arguments(tmp_path)
    steps.begin_file(given, "command")
    calls = []
    monkeypatch.setattr(steps, "run_process", lambda *given: calls.append(given) or 1)
    steps.run_restarting(given, "floors", Deadline(60))
    assert len(calls) == 1
    with pytest.raises(FileNotFoundError):
        steps.run_step(arguments(tmp_path / "nowhere"))


def test_all_parts_fit_and_what_has_no_time_is_named(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    without_compilers = [s for s in steps.planned_steps(steps.SECTIONS) if "compiled" not in s.name]
    assert sum(step.seconds for step in without_compilers) < 60 * steps.MINUTES
    assert sum(s.seconds for s in steps.planned_steps(steps.SECTIONS, quick=True)) < 180
    ran = []
    monkeypatch.setattr(steps, "run_process", lambda given, name, s: ran.append(name) or 0)
    given = arguments(tmp_path, quick=False, minutes=None)
    seconds = []
    monkeypatch.setattr(steps, "run_restarting", lambda given, name, end: seconds.append(end.left))
    steps.run_all(arguments(tmp_path, minutes=60.0), ["time"], "command", Console())
    assert sum(seconds) > 1800  # more time than is needed is used where it is given
    monkeypatch.undo()
    monkeypatch.setattr(steps, "run_process", lambda given, name, s: ran.append(name) or 0)
    steps.run_all(given, steps.SECTIONS, "command", Console())
    assert ran[:4] == ["variants", "special", "gradients", "special_gradients"]
    assert ran[4:6] == ["time", "backward"]
    assert len(ran) == 14
    ran.clear()
    steps.run_all(arguments(tmp_path, minutes=0.2), steps.SECTIONS, "command", Console())
    assert ran == []
    found = Results(tmp_path / "gpu.json").found
    assert [row["reason"] for row in found["stopped"]] == ["no time is left for it"] * 9


def test_results_are_whole_on_disk_and_json(tmp_path):
    results = Results(tmp_path / "sub" / "gpu.json", {"command": "c"})
    results.add("figures", {"peer": "a", "error": math.nan, "times": {"x": (1.0, math.inf)}})
    results.add("figures", {"peer": "b"})
    assert json.loads(results.path.read_text()) == {
        "command": "c",
        "figures": [{"peer": "a", "error": None, "times": {"x": [1.0, None]}}, {"peer": "b"}],
    }
    assert Results(results.path).rows("figures")[1] == {"peer": "b"}
    assert [path.name for path in results.path.parent.iterdir()] == ["gpu.json"]
    assert reason_of(ValueError("first\nsecond")) == "ValueError: first"


def test_dry_run_and_the_sentence_without_a_gpu(capsys, monkeypatch, tmp_path):
    assert main(["--dry-run", "--case", "tadtr-1d"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "variants: 50 s",
        "DDP over one process",
        "training",
        "tadtr-1d, bfloat16",
        "upstream CUDA: ",
        "≤ 60 µs (aim 45)",
    ):
        assert part in printed
    assert "detr-decoder, float32, model-like" not in printed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert capsys.readouterr().err.strip() == NO_GPU
    for words in (["--section", "nonsense"], ["--case", "nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    command = command_of(
        ["--quick", "--json", str(tmp_path / "x.json"), f"--peer-path={tmp_path}", "--seed", "1"]
    )
    assert command == "python -m benchmarks.gpu --quick --seed 1"


def test_the_hub_kernel_is_used_only_where_it_is_there():
    class MultiScaleDeformableAttention(torch.nn.Module):
        def forward(self):
            pass

    model = torch.nn.Sequential(MultiScaleDeformableAttention())
    assert "AttributeError" in gpu_models.take_hub_kernel(model)
    model.set_use_kernels = lambda wanted: None
    assert "no module" in gpu_models.take_hub_kernel(model)
    model[0].forward = MultiScaleDeformableAttention.forward.__get__(model[0])
    assert "fell back" in gpu_models.take_hub_kernel(model)
    model[0].forward = lambda: None
    assert gpu_models.take_hub_kernel(model) == ""


@pytest.mark.slow
def test_whole_models_are_compared_and_timed(tmp_path):
    results = Results(tmp_path / "gpu.json", {})
    gpu_models.measure_model(results, CPU, Deadline(4), "deformable-detr", "eager", small=True)
    rows = results.rows("models")
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["reason"] == ""
    assert rows[0]["difference"] < 1e-3
    assert rows[0]["against"] == "the unpatched model"
    assert rows[0]["ratio"] == pytest.approx(
        rows[0]["before"]["median"] / rows[0]["after"]["median"], rel=1e-3
    )
