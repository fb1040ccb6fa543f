"""Fused against separate steps, and ragged against padded queries: `python -m benchmarks.fused`.

For bevformer-sca, what lies between the projections of BEVFormer's cross attention to six cameras, with
the geometry of a car: without padding, and padded and rebatched as its code has it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

import saccade
from benchmarks.cpu import grid_sample_anywhere
from benchmarks.results_file import RESULTS, write_results
from saccade.bench.command import milliseconds, times
from saccade.bench.operator import (
    OFFSET_PIXELS,
    WORKLOADS,
    Workload,
    reference_points,
    saccade_function,
)
from saccade.sampling import sampling_locations
from saccade.timing import alternate

CASES = (
    *("detr-encoder", "mask2former-encoder", "bevformer-tsa", "detr-decoder", "dfine-decoder"),
    *("tadtr-1d", "medical-3d"),
)
VIEWS = "bevformer-sca"
DIRECTIONS = ("forward", "forward + backward")
METHOD = (
    "variants in one process, taking turns, on the same random tensors; medians of the rounds, after "
    "the results were compared; ratio = the variant's time / that of the first"
)
TOLERANCE = 1e-4

Function = Callable[..., Tensor]


class Row(NamedTuple):
    """One variant's time."""

    workload: str
    direction: str
    threads: int
    variant: str
    ratio: float
    milliseconds: float
    note: str = ""


def measure_workload(name: str, seconds: float) -> list[Row]:
    """The variants of a workload, in both directions.

    Raises:
        ArithmeticError: two variants give different numbers.
    """
    if name == VIEWS:
        return _ragged_rows(WORKLOADS[name], seconds)
    return _fused_rows(WORKLOADS[name], seconds)


def _fused_rows(workload: Workload, seconds: float) -> list[Row]:
    random = torch.Generator().manual_seed(0)
    shapes, points = workload.shapes, workload.points
    pairs = (workload.batch_size, workload.queries, workload.num_heads, sum(points))
    value = torch.randn(
        workload.batch_size, workload.num_positions, workload.num_heads, workload.head_dim,
        generator=random,
    )  # fmt: skip
    references = reference_points(workload, random)[None, :, None]
    references = references.expand(workload.batch_size, -1, -1, -1).contiguous()
    offsets = torch.randn(*pairs, workload.spatial_dims, generator=random) * OFFSET_PIXELS
    logits = torch.randn(pairs, generator=random)
    located = sampling_locations(references, offsets, shapes, points)
    grid_sample = grid_sample_anywhere(workload)

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return saccade.fused_deformable_attention(
            value, shapes, references, offsets, logits, num_points=points
        )

    def operator(value: Tensor, locations: Tensor, logits: Tensor) -> Tensor:
        return saccade.deformable_attention(
            value, shapes, locations, logits.softmax(-1), num_points=points
        )

    def unfused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return operator(value, sampling_locations(references, offsets, shapes, points), logits)

    def by_grid_sample(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        locations = sampling_locations(references, offsets, shapes, points)
        return grid_sample(value, locations, logits.softmax(-1))

    predicted, ready = (value, offsets, logits), (value, located, logits)
    variants: dict[str, tuple[Function, Sequence[Tensor]]] = {
        "fused": (fused, predicted),
        "softmax, operator (locations given)": (operator, ready),
        "locations, softmax, operator": (unfused, predicted),
        "locations, softmax, grid_sample": (by_grid_sample, predicted),
    }
    return _measure(workload.name, variants, seconds)


def _measure(
    name: str,
    variants: dict[str, tuple[Function, Sequence[Tensor]]],
    seconds: float,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """The variants in both directions; a ratio is the time over that of the first."""
    rows = []
    for direction in DIRECTIONS:
        functions = {
            variant: _call(function, inputs, direction == DIRECTIONS[1])
            for variant, (function, inputs) in variants.items()
        }
        expected: Tensor | None = None
        for variant, function in functions.items():
            output = function()
            expected = output if expected is None else expected
            error = (output - expected).abs().max() / expected.abs().max()
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{name}: {variant} differs by {error:.2g} of the largest")
        timings = alternate(functions, seconds)
        ours = timings[next(iter(variants))].milliseconds
        for variant, timing in timings.items():
            ratio = float(f"{timing.milliseconds / ours:.4g}")
            threads, note = torch.get_num_threads(), notes.get(variant, "")
            rows.append(Row(name, direction, threads, variant, ratio, timing.milliseconds, note))
    return rows


def _call(function: Function, inputs: Sequence[Tensor], backward: bool) -> Callable[[], Tensor]:
    """The call that is timed; it gives the output."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    # Drawn by the first call, which is not timed: it tells the shape.
    grad_output: list[Tensor] = []

    def both() -> Tensor:
        output = function(*leaves)
        if not grad_output:
            grad_output.append(torch.randn(output.shape, generator=torch.Generator()))
        torch.autograd.grad(output, leaves, grad_output)
        return output.detach()

    return both


# --- ragged against padded queries ------------------------------------------------------------------

# A car as in nuScenes: six cameras of 1600 x 900 pixels by yaw in degrees and focal length in pixels,
# the rear one with a wider lens; BEVFormer's 200 x 200 cells of half a metre, at four heights over
# the sensor's.
CAMERAS = ((0, 1266), (-55, 1266), (55, 1266), (180, 809), (110, 1266), (-110, 1266))
CAMERA_PIXELS = (1600, 900)
CELLS, CELL_METRES = 200, 0.512
HEIGHTS = (-4.0, -2.0, 0.0, 2.0)


def seen_by_cameras() -> tuple[Tensor, Tensor]:
    """reference_points [1, 6, Q, 4, 2], normalized, and visible [1, 6, Q]: the geometry of a car."""
    ahead = (torch.arange(CELLS) + 0.5 - CELLS / 2) * CELL_METRES
    y, x = torch.meshgrid(ahead, ahead, indexing="ij")
    ground = torch.stack((x.flatten(), y.flatten()), -1)
    heights = torch.tensor(HEIGHTS)
    references, visible = [], []
    for yaw, focal in CAMERAS:
        cosine, sine = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
        depth = ground @ torch.tensor([cosine, sine])
        right = ground @ torch.tensor([sine, -cosine])
        safe = depth.clamp(min=1e-3)[:, None]
        u = 0.5 + focal * right[:, None] / safe / CAMERA_PIXELS[0]
        v = 0.5 - focal * heights / safe / CAMERA_PIXELS[1]
        references.append(torch.stack((u.expand_as(v), v), -1))
        inside = (u > 0) & (u < 1) & (v > 0) & (v < 1) & (depth[:, None] > 1e-3)
        visible.append(inside.any(-1))
    return torch.stack(references)[None], torch.stack(visible)[None]


def _ragged_rows(workload: Workload, seconds: float) -> list[Row]:
    torch.manual_seed(0)
    references, visible = seen_by_cameras()
    _, num_views, num_queries = visible.shape
    channels = workload.num_heads * workload.head_dim
    module = saccade.nn.MultiViewDeformableAttention(
        channels, workload.num_heads, len(workload.shapes), workload.num_points
    )
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.05)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.05)
    query = torch.randn(1, num_queries, channels)
    value = torch.randn(1, num_views, workload.num_positions, channels)
    # What differs lies between the projections: they are left out of both.
    for projection in ("value_proj", "output_proj"):
        setattr(module, projection, torch.nn.Identity())
    counts = visible.sum(-1).flatten().tolist()
    index = [visible[0, view].nonzero().flatten() for view in range(num_views)]
    grid_sample = grid_sample_anywhere(workload)

    def ragged(query: Tensor, value: Tensor) -> Tensor:
        output: Tensor = module(query, references, visible, value, workload.shapes)
        return output

    def padded_by(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Function:
        def padded(query: Tensor, value: Tensor) -> Tensor:
            """As BEVFormer has it: each camera's queries, padded to the most that one has."""
            rows = query.new_zeros(num_views, max(counts), channels)
            anchors = query.new_zeros(num_views, max(counts), *references.shape[3:])
            for view, seen in enumerate(index):
                rows[view, : len(seen)] = query[0, seen]
                anchors[view, : len(seen)] = references[0, view, seen]
            offsets, logits = module.predict(rows)
            by_head = value[0].unflatten(-1, (workload.num_heads, -1))
            output = attend(by_head, anchors, offsets, logits)
            slots = torch.zeros_like(query)
            for view, seen in enumerate(index):
                slots[0, seen] += output[view, : len(seen)]
            return slots / visible.sum(1).clamp(min=1)[..., None]

        return padded

    starts = [k % len(HEIGHTS) for count in workload.points for k in range(count)]

    def by_saccade(value: Tensor, anchors: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return saccade.fused_deformable_attention(
            value, workload.shapes, anchors, offsets, logits,
            num_points=workload.points, reference_index=starts,
        )  # fmt: skip

    def located_by(operator: Function) -> Function:
        def attend(value: Tensor, anchors: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            """As BEVFormer has it: locations and weights first."""
            locations = sampling_locations(
                anchors, offsets, workload.shapes, workload.points, reference_index=starts
            )
            return operator(value, locations, logits.softmax(-1))

        return attend

    inputs = (query, value)
    variants: dict[str, tuple[Function, Sequence[Tensor]]] = {
        "ragged": (ragged, inputs),
        "pad and rebatch, Saccade's fused operator": (padded_by(by_saccade), inputs),
        "pad and rebatch, Saccade's operator": (
            padded_by(located_by(saccade_function(workload))),
            inputs,
        ),
        "pad and rebatch, grid_sample": (padded_by(located_by(grid_sample)), inputs),
    }
    notes = {
        "ragged": f"{sum(counts)} pairs of camera and query: {', '.join(map(str, counts))}",
        "pad and rebatch, Saccade's fused operator": f"{num_views} x {max(counts)} queries",
    }
    return _measure(workload.name, variants, seconds, notes)


def main() -> None:
    """Measures, prints and writes."""
    known = [*CASES, VIEWS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused", description=__doc__)
    parser.add_argument("--case", action="append", choices=known, help="default: all")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--seconds", type=float, default=5, help="of taking turns per measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "fused.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    names = arguments.case or known
    rows = [row for name in names for row in measure_workload(name, arguments.seconds)]
    for row in rows:
        print(row.workload, row.direction, row.variant, row.note, sep=", ")
        print(f"{times(row.ratio):>8} {milliseconds(row.milliseconds)}")
    content = {"method": METHOD, "measurements": [row._asdict() for row in rows]}
    write_results(arguments.output, "python -m benchmarks.fused", content)


if __name__ == "__main__":
    main()
