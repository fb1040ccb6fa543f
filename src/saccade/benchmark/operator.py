"""Saccade's operator beside the `grid_sample` path, the code that detectors run on a CPU today."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import saccade
from saccade.benchmark.timing import alternate
from saccade.benchmark.workloads import Inputs, Workload, draw

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Figure(NamedTuple):
    """One line of the table: times in milliseconds, ratio = peer / saccade."""

    workload: str
    direction: str
    locations: str
    dtype: str
    threads: int
    ratio: float
    saccade_ms: float
    grid_sample_ms: float


def saccade_call(workload: Workload) -> Attend:
    """The public function on this workload."""

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return saccade.deformable_attention(
            value, workload.shapes, locations, weights, num_points=workload.points
        )

    return attend


def grid_sample_call(workload: Workload) -> Attend:
    """transformers' own code on this workload: that of D-FINE for lists, else of Deformable DETR."""
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    shapes = [tuple(shape) for shape in workload.shapes]
    points = workload.points
    operator = MultiScaleDeformableAttention()

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        value = value.expand(-1, -1, workload.num_heads, -1)
        if len(set(points)) > 1:
            found: Tensor = multi_scale_deformable_attention_v2(
                value, torch.tensor(shapes), locations, weights, points
            )
            return found
        by_level = (len(shapes), points[0])
        attended: Tensor = operator(
            value,
            torch.tensor(shapes),
            shapes,
            None,
            locations.unflatten(3, by_level),
            weights.unflatten(3, by_level),
            64,
        )
        return attended

    return attend


def compare(
    workload: Workload,
    *,
    dtype: torch.dtype = torch.float32,
    uniform: bool = False,
    backward: bool = True,
    seconds: float = 5.0,
) -> Iterator[Figure]:
    """Times forward, and forward with backward, of both; the results are compared first.

    The peer always computes in float32: in 16 bits its positions, and so its work, are others.

    Raises:
        ArithmeticError: the two disagree, so that their times mean nothing.
    """
    inputs = draw(workload, dtype=dtype, uniform=uniform)
    wide = Inputs(*(tensor.float() for tensor in inputs))
    ours, theirs = saccade_call(workload), grid_sample_call(workload)
    _check_equal(ours(*inputs[:3]), theirs(*wide[:3]))
    timed = {"forward": (_forward(ours, inputs), _forward(theirs, wide))}
    if backward:
        timed["forward + backward"] = (_both(ours, inputs), _both(theirs, wide))
    for direction, (mine, peer) in timed.items():
        times = alternate({"saccade": mine, "grid_sample": peer}, seconds)
        yield Figure(
            workload.name,
            direction,
            "uniform" if uniform else "model-like",
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            round(times["grid_sample"] / times["saccade"], 1),
            round(times["saccade"], 3),
            round(times["grid_sample"], 3),
        )


def _forward(attend: Attend, inputs: Inputs) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            attend(*inputs[:3])

    return run


def _both(attend: Attend, inputs: Inputs) -> Callable[[], object]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]

    def run() -> None:
        torch.autograd.grad(attend(*leaves), leaves, inputs.grad_output)

    return run


def _check_equal(found: Tensor, expected: Tensor) -> None:
    error = (found.float() - expected).abs().max().item()
    allowed = (1e-4 if found.dtype == torch.float32 else 2e-2) * expected.abs().max().item()
    if not error <= allowed:
        raise ArithmeticError(f"saccade and grid_sample differ by {error}, allowed {allowed}")
