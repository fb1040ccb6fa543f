"""`python -m benchmarks.gpu`: goals, report and picture of made-up figures."""

from __future__ import annotations

import pytest
from test_benchmark import not_blank

pytest.importorskip("benchmarks.gpu", reason="benchmarks/ is not in a wheel")

from rich.console import Console

from benchmarks.gpu import goals, speed
from benchmarks.gpu.goals import COLD, DETERMINISTIC, EAGER, FILLING, SINGLE, WARM
from benchmarks.gpu.peers import SACCADE, all_peers
from benchmarks.gpu.plot import save_plot
from benchmarks.gpu.report import print_report

KEYS = ("figures", "floors", "backward", "training")


def timings(microseconds, ways=(COLD, WARM, SINGLE, EAGER)):
    quarters = {"low": microseconds, "high": 1.1 * microseconds, "rounds": 15, "calls": 9}
    return {way: {"median": microseconds} | quarters for way in ways}


def made_up(ratio=3.3, own=50.0, floor=0.8, of_forward=2.5, of_fast=1.4, step=1.5):
    """Figures of every setting and peer."""
    figures, floors, backward = [], [], []
    for one in speed.settings():
        head = one._asdict()
        first = own * one.batch_size if one.workload == "detr-encoder" else 5.0
        for number, name in enumerate(all_peers()):
            factor = 1 if name == SACCADE else ratio + number / 10
            row = head | {"peer": name, "computes_in": one.dtype, "error": 1e-6, "exact": True}
            row |= {"sets": 3, "ratios": dict.fromkeys((COLD, WARM, SINGLE, EAGER), factor)}
            figures.append(row | {"times": timings(first * factor)})
            times = timings(of_forward * first * factor * (1 if name == SACCADE else 1.3))
            both = {"both": timings(9 * first), "peak_bytes": 2**27, "forward": timings(first)}
            backward.append(row | {"times": times} | both)
        for name, factor in ((DETERMINISTIC, of_fast), (FILLING, 1.1 * of_fast)):
            times = timings(of_forward * first * factor)
            backward.append(backward[-1] | {"peer": name, "times": times})
        for name in ("bytes", "gathers", "scatter", "sort"):
            floors.append(head | {"peer": name, "times": timings(first * floor, (COLD, WARM))})
    training = {
        "model": "deformable-detr", "reason": "", "input": "batch 4", "steps": 300, "steps_wanted": 300,
        "against": "the model with the hub kernel", "why": "", "ratio": step, "not_finite_at": None,
        "before": timings(step * 2e5)[COLD] | {"peak_bytes": 2**34},
        "after": timings(2e5)[COLD] | {"peak_bytes": int(2**34 * (1.1 - step / 10))},
    }  # fmt: skip
    machine = {"gpu": "GPU", "torch": "2", "triton": "3"}
    found = {"machine": machine, "seed": 1, "figures": figures, "floors": floors}
    return found | {"backward": backward, "training": [training]}


def goals_of(found):
    return goals.goals(*(found[key] for key in KEYS))


def test_goals_are_met_missed_or_without_a_figure():
    assert {goal.met for goal in goals.goals([], [])} == {None}
    assert {goal.met for goal in goals_of(made_up())} == {True}
    found = made_up(ratio=1.5, own=80.0, floor=0.4, of_forward=3.2, of_fast=1.6, step=0.9)
    found["training"][0] |= {"not_finite_at": 17, "steps": 17}
    missed = {goal.name: goal.measured for goal in goals_of(found) if goal.met is False}
    forward, gradients, training = 6 + 2 * len(goals.ENCODERS), 2 + 2 + 2, 3
    assert len(missed) == forward + gradients + training
    for part, measured in (
        ("detr-encoder forward, bfloat16", "80.0 µs cold"),
        ("detr-encoder float32 against upstream", "1.70 ×"),
        ("plain-single-map, bfloat16: share", "0.40"),
        ("backward, float32, of its own forward", "3.20 × cold (256 µs), 3.20 × warm"),
        ("backward float32 against upstream", "2.21 ×"),
        ("backward bfloat16 against the best", "2.21 × (upstream CUDA)"),
        ("float32, deterministic of fast mode", "1.60 ×; 1.76 × where torch fills"),
        ("against the hub kernel", "0.90 ×"),
        ("peak memory", "16.16 GiB, before 16.00"),
        ("without NaN", "17 steps, not finite at step 17"),
    ):
        assert measured in next(text for name, text in missed.items() if part in name)


def test_a_training_step_that_is_not_against_the_hub_kernel_decides_nothing():
    found = made_up()
    found["training"][0] |= {"why": "kernels is not installed", "against": "the unpatched model"}
    found["training"][0] |= {"steps": 120}
    speed_goal, memory, steps = goals_of(found)[-3:]
    assert speed_goal.met is memory.met is steps.met is None
    assert "1.50 ×, against the unpatched model: kernels is not" in speed_goal.measured
    assert steps.measured == "120 steps, no NaN"
    reason = [{"model": "deformable-detr", "reason": "ImportError: scipy"}]
    assert {goal.measured for goal in goals.goals([], [], [], reason)[-3:]} == {reason[0]["reason"]}


def test_report_and_picture(tmp_path):
    found = made_up() | {
        "checks": [
            {"name": "x", "ok": False, "reason": "off by 3"},
            {"name": "race", "ok": True, "reason": "", "note": "100 runs, [all] equal"},
        ],
        "left_out": [
            speed.settings()[0]._asdict() | {"peer": "mmcv CUDA", "reason": "[no] bf16"},
            speed.settings()[0]._asdict() | {"peer": "mach9", "reason": "backward: none"},
        ],
        "models": [{"model": "m", "mode": "eager", "dtype": "", "reason": "[out] of time"}],
        "stopped": [{"step": "models", "reason": "no time"}],
        "gradients_cut": "backward: 7 of 66 planned variants",
    }
    found["figures"][8] |= {"exact": False, "error": None}
    found["backward"][9] |= {"exact": False, "error": 0.25}
    found["training"].append({"model": "other", "reason": "[scipy] is missing"})
    console = Console(record=True, width=240, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(found, console, details=True)
    text = console.export_text()
    for part in (
        *("WRONG: x: off by 3", "[no] bf16", "[out] of time", "NOT RIGHT", "3.4 ×", "met"),
        *("race: 100 runs, [all] equal", "mach9: backward: none", "2.5 ×", "128 MiB", "[scipy]"),
        *("300 of 300 steps, all losses finite", "16.00 GiB", "7 of 66 planned", "scatter / backw"),
    ):
        assert part in text, part
    assert text.index("NOT RIGHT") < text.index("checks on") < text.index("the two floors")
    save_plot(found, tmp_path / "gpu.png")
    assert not_blank(tmp_path / "gpu.png")
    with pytest.raises(ValueError, match="got none"):
        save_plot({"machine": {}}, tmp_path / "none.png")
