"""The same backward a hundred times: every run within what is allowed, deterministic ones bitwise equal."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import saccade
from benchmarks.gpu.gradient_truth import Expected, truth_of_gradients
from benchmarks.gpu.gradients import MODES, compare_gradients, gradients
from benchmarks.gpu.rows import corner_rows
from benchmarks.gpu.variants import Inputs, Variant
from saccade.benchmark.workloads import WORKLOADS, Workload, draw

RUNS = 100
# Fast mode sums up in order where there are many points for each cell; additions are raced there too.
ADDITIONS = "by atomic additions"
CASES = ("detr-encoder", "detr-decoder")
# In --quick and on a CPU: as many queries a cell, a tenth of the sides.
SMALL = [(10, 17), (5, 8), (3, 4), (2, 2)]


class OfWorkload(Variant):
    """A workload of the registry as a variant, so that the truth of a variant is its truth."""

    workload: Workload

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the levels."""
        return [tuple(shape) for shape in self.workload.shapes]

    @property
    def num_points(self) -> list[int]:
        """Of each level."""
        return self.workload.points

    @property
    def looks(self) -> tuple[int, ...]:
        """The axes before the heads."""
        return (self.workload.batch_size, self.workload.queries)


def of_workload(workload: Workload, dtype: str) -> OfWorkload:
    """The variant."""
    found = OfWorkload(
        dtype,
        spatial_dims=workload.spatial_dims,
        head_dim=workload.head_dim,
        num_heads=workload.num_heads,
        heads="shared" if workload.shared_head else "own",
    )
    found.workload = workload
    return found


def race_checks(quick: bool = False) -> dict[str, Any]:
    """By name, as special checks are."""
    found = {}
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            for mode in (*MODES, ADDITIONS) if case == "detr-encoder" else MODES:
                found[f"backward: {case}, {dtype}, {mode}: {RUNS} times the same"] = (
                    lambda device, library, seed, given=(case, dtype, mode): check_race(
                        *given, device, library, seed, small=quick or device.type != "cuda"
                    )
                )
    return found


def check_race(
    case: str,
    dtype: str,
    mode: str,
    device: torch.device,
    library: Any,
    seed: int,
    *,
    small: bool,
) -> tuple[float, float, str]:
    """Worst error, what was allowed there, and how far the runs lie apart.

    Every run has to be within what is allowed, number by number; deterministic runs have to be bitwise
    equal. A race that loses an addend does so in some runs only, and in few numbers.

    Raises:
        ArithmeticError: a run is wrong, or is not like the others.
    """
    variant, inputs, grad_output, truth = _case(case, dtype, seed, small)
    expected = [
        Expected(name, gradient.to(device), allowed.to(device), of)
        for name, gradient, allowed, of in truth
    ]
    inputs = inputs.map(lambda tensor: tensor.to(device))
    grad_output = grad_output.to(device)
    ratios, first, apart, unequal = [], {}, 0.0, 0
    worst = (0.0, 0.0)
    with additions() if mode == ADDITIONS else MODES[mode]():
        for _ in range(RUNS):
            found = gradients(variant, inputs, grad_output, library)
            error, allowed = compare_gradients(found, expected)
            if allowed and error / allowed >= max(ratios, default=0.0):
                worst = (error, allowed)
            ratios.append(error / allowed if allowed else 0.0)
            first = first or found
            distance = max(_distance(found[name], first[name]) for name in first)
            apart, unequal = max(apart, distance), unequal + (distance > 0)
    if mode == "deterministic" and unequal:
        raise ArithmeticError(
            f"{unequal} of {RUNS} runs differ from the first, by {apart:.2g} of the largest gradient"
        )
    spread = (
        "all bitwise equal"
        if not unequal
        else f"{unequal} differ from the first, by at most {apart:.2g} of the largest gradient"
    )
    shares = f"{min(ratios):.3g} to {max(ratios):.3g} of what is allowed"
    return (*worst, f"{RUNS} runs, errors {shares}, {spread}")


@contextmanager
def additions() -> Iterator[None]:
    """The gradient of the value is summed up by atomic additions, however many points there are."""
    try:
        from saccade.backends.triton import backward, tuning
    except ImportError:  # then there are no kernels to choose from
        yield
        return
    with mock.patch.object(tuning, "sums_in_order", return_value=False):
        backward._remembered.clear()
        yield
    backward._remembered.clear()


@functools.lru_cache(1)
def _case(
    case: str, dtype: str, seed: int, small: bool
) -> tuple[Variant, Inputs, Tensor, list[Expected]]:
    """The call and its truth on the CPU, which both modes are held to."""
    workload = WORKLOADS[case]
    if small:
        workload = workload._replace(shapes=SMALL)
    variant = of_workload(workload, dtype)
    drawn = draw(workload, dtype=getattr(torch, dtype), uniform=False, seed=seed)
    inputs = Inputs(drawn.value, tuple(drawn[1:3]), None)
    rows = corner_rows(workload, drawn.sampling_locations)
    most = int(rows[rows >= 0].bincount().max())
    # The CPU's kernels in float64: of an encoder the reference would take minutes.
    truth = truth_of_gradients(variant, inputs, drawn.grad_output, saccade, of_a_cell=most)
    return variant, inputs, drawn.grad_output, truth


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, in parts of the largest number; infinite where a number is none."""
    if torch.equal(one, other):
        return 0.0
    distance = float((one.double() - other.double()).abs().max() / other.double().abs().max())
    return distance if distance == distance else math.inf
