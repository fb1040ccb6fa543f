"""`python -m benchmarks.gpu`: its checks of gradients, and that they find what they are for."""

from __future__ import annotations

import argparse
import random
from types import SimpleNamespace

import pytest
import torch

import saccade

pytest.importorskip("benchmarks.gpu", reason="benchmarks/ is not in a wheel")

from benchmarks.gpu import ahead, checks, race, special_gradients, steps, variants
from benchmarks.gpu.gradient_truth import truth_of_gradients
from benchmarks.gpu.gradients import check_gradients, draw_grad_output
from benchmarks.gpu.report import failed_checks
from benchmarks.gpu.results import Deadline, Results
from benchmarks.gpu.variants import Inputs, Variant, draw
from saccade import reference

CPU = torch.device("cpu")
ATTEND = saccade.deformable_attention


@pytest.fixture(autouse=True)
def one_thread():
    """Many small calls: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_plain(function):
    """A library of which the plain operator is this one."""
    return SimpleNamespace(
        deformable_attention=function, fused_deformable_attention=saccade.fused_deformable_attention
    )


class Changed(torch.autograd.Function):
    """Gives what it gets; the gradient is changed on its way back."""

    @staticmethod
    def forward(ctx, tensor, change):
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def library(*, value=None, locations=None, weights=None, output=None):
    """The plain operator with a fault in one gradient, or in what its backward is given."""

    def changed(tensor, change):
        return tensor if change is None else Changed.apply(tensor, change)

    def attend(given_value, shapes, given_locations, given_weights, **options):
        found = ATTEND(
            changed(given_value, value),
            shapes,
            changed(given_locations, locations),
            changed(given_weights, weights),
            **options,
        )
        return changed(found, output)

    return of_plain(attend)


def test_the_cpu_kernels_have_right_gradients_in_every_variant(tmp_path):
    results = Results(tmp_path / "gpu.json", {})
    checks.check_variants(
        results, CPU, Deadline(60), 1, quick=True, check=check_gradients, of="backward: "
    )
    plan = variants.planned()
    names = [f"backward: {variant.name}" for variant in plan[: checks.QUICK_VARIANTS]]
    assert [row["name"] for row in results.rows("checks")] == names
    assert not failed_checks(results.found)
    for number, variant in enumerate(plan):
        error, allowed = check_gradients(variant, number, CPU)
        assert error <= allowed
    for variant in (Variant(), Variant("float64"), Variant(form="fused")):
        error, allowed = check_gradients(variant, 1, CPU)
        assert 0 < error < 0.1 * allowed  # float32 is far from what is allowed


def test_wrong_gradients_are_rows_of_their_step(tmp_path, monkeypatch):
    json = tmp_path / "gpu.json"
    Results(json, {"seed": 1, "machine": {}})
    given = argparse.Namespace(
        step="gradients", seconds=30.0, json=json, device="cpu", case=[], quick=True, small=True
    )
    fault = library(weights=lambda gradient: 1.01 * gradient).deformable_attention
    monkeypatch.setattr(saccade, "deformable_attention", fault)
    monkeypatch.setattr(checks, "QUICK_VARIANTS", 3)
    assert steps.run_step(given) == steps.DONE
    found = Results(json).found
    assert len(found["checks"]) == 3
    names = {row["name"].partition(",")[0] for row in failed_checks(found)}
    assert names == {"backward: plain float32", "backward: plain bfloat16"}
    assert all("grad_attention_weights" in row["reason"] for row in failed_checks(found))


def test_kernels_are_compiled_ahead_by_others(monkeypatch):
    with ahead.compiling_ahead("gradients", CPU) as number:
        assert number == 0
    called = []

    def check(variant, seed, device):
        called.append(variant)
        raise RuntimeError("whatever is wrong is found elsewhere")

    monkeypatch.setitem(ahead.CHECKS, "gradients", check)
    for first in "012":
        ahead.main(["gradients", first, "3"], "cpu")
    plan = variants.planned()
    assert called == plan[::3] + plan[1::3] + plan[2::3]
    commands, ended = [], []

    class Process:
        def __init__(self, command, **options):
            commands.append(command)

        def kill(self):
            ended.append(self)

        wait = kill

    monkeypatch.setattr(ahead.subprocess, "Popen", Process)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 6)
    with ahead.compiling_ahead("variants", torch.device("cuda")) as number:
        assert number == 3
        assert [command[-3:] for command in commands] == [["variants", n, "3"] for n in "012"]
        assert not ended
    assert len(ended) == 6


def lost(gradient):
    """As when one of two addends to one row is lost."""
    found = gradient.clone()
    found[0, 7, 3] *= 0.5
    return found


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"value": lambda g: g * (1 + 3e-5)}, "grad_value is off by"),
        ({"value": lost}, "grad_value is off by .* at 32 of"),
        ({"value": lambda g: torch.full_like(g, torch.nan)}, "grad_value: .* NaN: never written"),
        ({"locations": lambda g: -g}, "grad_sampling_locations is off by"),
        ({"locations": lambda g: g.flip(-1)}, "grad_sampling_locations is off by"),
        ({"weights": lambda g: g + 3e-4}, "grad_attention_weights is off by"),
        ({"weights": lambda g: g.bfloat16().float()}, "grad_attention_weights is off by"),
        ({"output": lambda g: g.roll(1, 1)}, "is off by"),
        (
            {"value": lambda g: g * (1 + 2e-7 * torch.randint(2, g.shape))},
            "grad_value in deterministic mode is another one again",
        ),
    ],
)
def test_a_wrong_gradient_is_found(fault, message):
    with pytest.raises(ArithmeticError, match=message):
        check_gradients(Variant(), 3, CPU, library(**fault))


def test_sums_in_16_bits_and_positions_rounded_otherwise_are_found():
    def narrow(value, shapes, locations, weights, **options):
        """The gradient of each half of the queries is rounded, then they are added."""
        halves = [slice(0, 18), slice(18, None)]
        parts = [
            saccade.deformable_attention(value, shapes, locations[:, h], weights[:, h], **options)
            for h in halves
        ]
        return torch.cat(parts, 1)

    def wide(value, shapes, locations, weights, **options):
        found = reference.deformable_attention(
            value.double(), shapes, locations.double(), weights.double(), **options
        )
        return found.to(value.dtype)

    with pytest.raises(ArithmeticError, match="grad_value is off by"):
        check_gradients(Variant("bfloat16"), 1, CPU, of_plain(narrow))
    at_grid_lines = Variant(places="ties")
    with pytest.raises(ArithmeticError, match="grad_sampling_locations is off by"):
        check_gradients(at_grid_lines, 1, CPU, of_plain(wide))
    check_gradients(at_grid_lines, 1, CPU)


def test_an_error_in_deterministic_mode_only_is_found():
    def refusing(*given, **named):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("saccade does not have a deterministic implementation")
        return saccade.deformable_attention(*given, **named)

    with pytest.raises(RuntimeError, match="deterministic implementation"):
        check_gradients(Variant(), 3, CPU, of_plain(refusing))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_truth_is_that_of_the_reference_where_nothing_is_rounded():
    for number, form in enumerate(("plain", "fused")):
        variant = Variant("float64", form, coordinates="pixel", places="non-finite")
        drawn, grad_output = draw(variant, number), draw_grad_output(variant, number)
        leaves = [tensor.requires_grad_() for tensor in (drawn.value, *drawn.points)]
        output = variants.call(variant, Inputs(leaves[0], tuple(leaves[1:]), None), reference)
        wanted = torch.autograd.grad(output, leaves, grad_output)
        found = truth_of_gradients(variant, drawn.map(torch.Tensor.detach), grad_output)
        for expected, gradient in zip(found, wanted, strict=True):
            torch.testing.assert_close(expected.gradient, gradient, rtol=1e-12, atol=1e-12)
    # An expanded gradient of the output, and a transposed one, are among those that are drawn.
    strides = [draw_grad_output(Variant(), seed).stride() for seed in range(20)]
    assert (0, 0, 1) in strides
    assert any(stride[-1] > 1 for stride in strides)


@pytest.fixture
def few_runs(monkeypatch):
    monkeypatch.setattr(race, "RUNS", 6)
    monkeypatch.setattr(race, "SMALL", [(5, 7), (3, 4), (2, 2), (1, 2)])
    race._case.cache_clear()


def test_the_race_check_finds_races(few_runs):
    def check(mode, **fault):
        given = library(**fault) if fault else saccade
        return race.check_race("detr-encoder", "float32", mode, CPU, given, 1, small=True)

    for mode in ("fast", "deterministic"):
        error, allowed, note = check(mode)
        assert 0 < error <= allowed
        assert "all bitwise equal" in note
    chance = random.Random(0)

    def reordered(gradient):
        return gradient * (1 + 1e-7 * torch.randint(2, gradient.shape))

    def sometimes_lost(gradient):
        return lost(gradient) if chance.random() < 0.5 else gradient

    assert "6 runs, errors" in check("fast", value=reordered)[2]
    assert "differ from the first, by at most" in check("fast", value=reordered)[2]
    with pytest.raises(ArithmeticError, match="of 6 runs differ from the first"):
        check("deterministic", value=reordered)
    with pytest.raises(ArithmeticError, match="grad_value is off by"):
        check("fast", value=sometimes_lost)


def test_special_checks_of_gradients(few_runs):
    found = special_gradients.special_gradient_checks()
    on_cpu = [name for name in found if "compile" not in name]
    done = {name: found[name](CPU, saccade, 2) for name in on_cpu}
    undone = {name for name, result in done.items() if isinstance(result, str)}
    assert all("side stream" in n or "current" in n or "2^31" in n for n in undone), undone
    for name in set(on_cpu) - undone:
        error, allowed = done[name][:2]
        assert 0 < error <= allowed, name
    wrong = library(value=lambda gradient: 1.01 * gradient)
    for name in (
        "plain: backward in a CUDA graph, replayed with other inputs, fast",
        "plain: backward under autocast",
        "plain: activation checkpointing",
        "DDP over one process",
    ):
        with pytest.raises(ArithmeticError, match="grad_value is off by"):
            found[name](CPU, wrong, 2)
    for spread in (
        {"value": lambda g: g + 0 * g.sum()},
        {"locations": lambda g: g.nan_to_num(0.0)},
        {"weights": lambda g: g.nan_to_num(0.0)},
    ):
        with pytest.raises(ArithmeticError, match="holds in other places"):
            found["backward: infinite values and gradients, fast"](CPU, library(**spread), 2)
    with pytest.raises(ArithmeticError, match="second derivative"):
        found["plain: second derivatives"](CPU, wrong, 2)
    changing = library(value=lambda gradient: gradient * (1 + 0.02 * torch.rand(())))
    with pytest.raises(ArithmeticError, match="off by|not that of a call"):
        found["plain: backward in a CUDA graph, replayed with other inputs, deterministic"](
            CPU, changing, 2
        )


@pytest.mark.slow
def test_gradients_of_compiled_calls_are_checked():
    found = special_gradients.special_gradient_checks()
    error, allowed = found["plain: torch.compile of forward and backward"](CPU, saccade, 2)
    assert 0 < error <= allowed


def test_parts_of_huge_calls_are_compared():
    numbers = torch.Generator().manual_seed(1)
    value = torch.randn(2, 16, 8, 32, generator=numbers).bfloat16()
    locations = torch.rand(2, 9, 8, 4, 2, generator=numbers)
    weights = torch.rand(2, 9, 8, 4, generator=numbers)
    grad_output = torch.randn(2, 9, 256, generator=numbers).bfloat16()
    given = ([(4, 4)], value, locations, weights, grad_output)
    found = special_gradients._gradients_of_large(saccade, *given)
    for some in (found, found[1:]):
        error, allowed = special_gradients._some_right([(4, 4)], some, *given[1:])
        assert 0 < error <= allowed
    with pytest.raises(ArithmeticError, match="grad_attention_weights is off"):
        special_gradients._some_right([(4, 4)], (*found[:2], found[2].roll(1, 1)), *given[1:])
