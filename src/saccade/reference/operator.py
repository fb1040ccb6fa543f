"""The operator on an understood call, and its gradients, in plain PyTorch operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from saccade.arguments import Call
from saccade.checks import Coordinates, Interpolation

# Queries are worked on in slices so that no intermediate holds more elements than this
# (a single query of a very large batch excepted).
MAX_INTERMEDIATE_ELEMENTS = 1 << 22

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def execute(call: Call) -> Tensor:
    """The operator on an understood call: [B, Q, M * D] in the value's dtype."""
    if call.queries_per_map is not None:
        outputs = [execute(part) for part, _ in _maps(call)]
        if outputs:
            return torch.cat(outputs, 1)
        # Without maps there are no queries: those of a map that is not there.
        nothing = call.value.sum(0, keepdim=True)
        return execute(call._replace(value=nothing, queries_per_map=None))
    batch_size, num_queries, num_heads = call.sampling_locations.shape[:3]
    slices = []
    for queries in _query_slices(call):
        total = None
        for level in _levels(call, queries):
            corners = _corners(level, call)
            # z(p), what each point reads: [B, q, M, K, D]
            sampled = sum(
                corner.weight[..., None] * _gather(level.value, corner) for corner in corners
            )
            # Summed over the points of this level: [B, q, M, D]
            attended = (level.attention_weights[..., None] * sampled).sum(3)
            total = attended if total is None else total + attended
        assert total is not None
        slices.append(total)
    output = torch.cat(slices, 1).to(call.value.dtype)
    return output.reshape(batch_size, num_queries, num_heads * call.value.shape[3])


def execute_backward(
    grad_output: Tensor, call: Call, output_mask: Sequence[bool] = (True, True, True)
) -> Gradients:
    """The gradients (value, sampling_locations, attention_weights) of `execute`, written out.

    `grad_output` is [B, Q, M * D]. A gradient whose entry of `output_mask` is False is None. Made
    of differentiable operations, so second derivatives are derivatives of this function.
    """
    if call.queries_per_map is not None:
        return _execute_backward_of_maps(grad_output, call, output_mask)
    compute_dtype = compute_dtype_of(call.value)
    batch_size, num_queries, num_heads = call.sampling_locations.shape[:3]
    by_head = (batch_size, num_queries, num_heads, call.value.shape[3])
    grad_output = grad_output.reshape(by_head).to(compute_dtype)
    level_sizes = [math.prod(shape) for shape in call.spatial_shapes]
    grad_levels = [
        torch.zeros_like(part, dtype=compute_dtype) for part in call.value.split(level_sizes, 1)
    ]
    grad_locations, grad_weights = [], []
    for queries in _query_slices(call):
        grad = grad_output[:, queries, :, None, :]  # [B, q, M, 1, D]
        grad_location_levels, grad_weight_levels = [], []
        for index, level in enumerate(_levels(call, queries)):
            weights = level.attention_weights
            grad_weight = torch.zeros_like(weights)
            grad_location = torch.zeros_like(level.locations)
            for corner in _corners(level, call):
                if output_mask[0]:
                    scattered = (corner.weight * weights)[..., None] * grad
                    grad_levels[index] = _scatter(grad_levels[index], corner, scattered)
                if not (output_mask[1] or output_mask[2]):
                    continue
                # <gradient of the output, value at this corner>: [B, q, M, K]
                dot = (grad * _gather(level.value, corner)).sum(-1)
                moved = corner.weight_gradient * (weights * dot)[..., None]
                # A corner outside takes no part, not even with infinite numbers.
                grad_weight = grad_weight + torch.where(corner.inside, corner.weight * dot, 0)
                grad_location = grad_location + torch.where(corner.inside[..., None], moved, 0)
            grad_location_levels.append(grad_location)
            grad_weight_levels.append(grad_weight)
        grad_locations.append(torch.cat(grad_location_levels, 3))
        grad_weights.append(torch.cat(grad_weight_levels, 3))
    return (
        torch.cat(grad_levels, 1).to(call.value.dtype) if output_mask[0] else None,
        torch.cat(grad_locations, 1).to(call.sampling_locations.dtype) if output_mask[1] else None,
        torch.cat(grad_weights, 1).to(call.attention_weights.dtype) if output_mask[2] else None,
    )


def _maps(call: Call) -> Iterator[tuple[Call, slice]]:
    """Of a call with queries_per_map: each map with its queries as a call, and where they are."""
    assert call.queries_per_map is not None
    begin = 0
    for number, count in enumerate(call.queries_per_map):
        queries = slice(begin, begin + count)
        begin += count
        part = call._replace(
            value=call.value[number : number + 1],
            sampling_locations=call.sampling_locations[:, queries],
            attention_weights=call.attention_weights[:, queries],
            queries_per_map=None,
        )
        yield part, queries


def _execute_backward_of_maps(
    grad_output: Tensor, call: Call, output_mask: Sequence[bool]
) -> Gradients:
    # Beginning with nothing, for calls without maps.
    values, locations = [call.value[:0]], [call.sampling_locations[:, :0]]
    weights = [call.attention_weights[:, :0]]
    for part, queries in _maps(call):
        found = execute_backward(grad_output[:, queries], part)
        for gradients, gradient in zip((values, locations, weights), found, strict=True):
            gradients.append(cast(Tensor, gradient))
    return (
        torch.cat(values) if output_mask[0] else None,
        torch.cat(locations, 1) if output_mask[1] else None,
        torch.cat(weights, 1) if output_mask[2] else None,
    )


class _Level(NamedTuple):
    """One level of the map and the points of a slice of queries that fall on it."""

    value: Tensor  # [B, H*W, M or 1, D], compute dtype
    shape: tuple[int, ...]  # (H, W)
    locations: Tensor  # [B, q, M, K, N], compute dtype, (x, y)
    attention_weights: Tensor  # [B, q, M, K], compute dtype


class _Corner(NamedTuple):
    """One of the 2^N cells that a point reads."""

    row: Tensor  # [B, q, M, K] int64, index into the level's positions, 0 where not inside
    inside: Tensor  # [B, q, M, K] bool, False: outside the map, counts as 0
    weight: Tensor  # [B, q, M, K] interpolation weight
    weight_gradient: Tensor  # [B, q, M, K, N] derivative of the weight by the location


def compute_dtype_of(value: Tensor) -> torch.dtype:
    """Of positions, weights and sums."""
    # Positions in 16 bits would be off by whole pixels on a map of a few hundred.
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _query_slices(call: Call) -> Iterator[slice]:
    batch_size, num_queries, num_heads = call.sampling_locations.shape[:3]
    per_query = batch_size * num_heads * max(call.num_points) * call.value.shape[3]
    step = max(1, MAX_INTERMEDIATE_ELEMENTS // max(1, per_query))
    # At least one slice, so that a call without queries still yields its empty output.
    for begin in range(0, max(1, num_queries), step):
        yield slice(begin, begin + step)


def _levels(call: Call, queries: slice) -> Iterator[_Level]:
    compute_dtype = compute_dtype_of(call.value)
    parts = zip(
        call.value.split([math.prod(shape) for shape in call.spatial_shapes], 1),
        call.spatial_shapes,
        call.sampling_locations[:, queries].to(compute_dtype).split(call.num_points, 3),
        call.attention_weights[:, queries].to(compute_dtype).split(call.num_points, 3),
        strict=True,
    )
    for value, shape, locations, weights in parts:
        # Converted before it is gathered from, so that its gradient sums up in the compute dtype.
        yield _Level(value.to(compute_dtype), shape, locations, weights)


def _corners(level: _Level, call: Call) -> Iterator[_Corner]:
    """The corners of every point: per axis one or two cells, and their combinations."""
    finite = torch.isfinite(level.locations).all(-1)
    axes = []
    sizes = tuple(reversed(level.shape))  # a location is (x, y), a shape is (H, W)
    for axis, size in enumerate(sizes):
        location = torch.where(finite, level.locations[..., axis], 0)
        last = {
            "zeros": None,
            "border": size - 1,
            "border_height": min(size, level.shape[0]) - 1,
        }[call.padding]
        axes.append(_axis_cells(location, size, last, call.interpolation, call.coordinates))
    for cells in itertools.product(*axes):
        inside, row, weight = finite, torch.zeros_like(finite, dtype=torch.int64), None
        for cell, size in zip(reversed(cells), level.shape, strict=True):
            inside = inside & (cell.number >= 0) & (cell.number <= size - 1)
            row = row * size + torch.where(inside, cell.number, 0)
            weight = cell.weight if weight is None else weight * cell.weight
        assert weight is not None
        gradients = [
            math.prod((other.weight for other in cells if other is not cell), start=cell.slope)
            for cell in cells
        ]
        yield _Corner(
            torch.where(inside, row, 0),
            inside,
            torch.where(inside, weight, 0),
            torch.where(inside[..., None], torch.stack(gradients, -1), 0),
        )


class _Cell(NamedTuple):
    """A cell along one axis: its number and weight."""

    number: Tensor  # int64
    weight: Tensor
    slope: Tensor  # derivative of the weight by the location


def _axis_cells(
    location: Tensor,
    size: int,
    last: float | None,
    interpolation: Interpolation,
    coordinates: Coordinates,
) -> list[_Cell]:
    """The cells along one axis; positions are clamped to 0 … `last`, unless that is None."""
    scale = {"normalized": size, "normalized_corners": size - 1, "pixel": 1}[coordinates]
    shift = -0.5 if coordinates == "normalized" else 0.0
    if interpolation == "discrete":
        # It rounds what counts from the edge as if it counted from a centre, and rounds down.
        shift += 1.0
    # Rounded twice, never fused: every backend agrees on the position to the last bit.
    pixel = location * scale + shift
    slope = torch.full_like(pixel, scale)
    if last is not None:
        last = _representable(last, pixel.dtype)
        # As grid_sample has it: no gradient at or beyond the centres of the border pixels.
        moves = (pixel > 0) & (pixel < last)
        pixel = torch.where(moves, pixel, pixel.detach().clamp(0, last))
        slope = torch.where(moves, slope, 0)
    # Further out is as good as two cells out, and infinity minus infinity would be no number.
    near = (pixel > -2) & (pixel < size + 1)
    pixel = torch.where(near, pixel, pixel.detach().clamp(-2, size + 1))
    if interpolation != "linear":
        found = pixel.detach()
        index = found.round() if interpolation == "nearest" else found.floor()  # half to even
        # 0 * pixel: a gradient of zeros to the locations, not none.
        return [_Cell(index.to(torch.int64), 1 + 0 * pixel, torch.zeros_like(index))]
    lower = pixel.detach().floor()
    fraction = pixel - lower
    cell = lower.to(torch.int64)
    return [_Cell(cell, 1 - fraction, -slope), _Cell(cell + 1, fraction, slope)]


def _representable(last: float, dtype: torch.dtype) -> float:
    """The last pixel, or of a map that is wider than numbers are exact the one that has a number."""
    number = torch.tensor(last, dtype=dtype)
    below = number.item() <= last  # as float64: the tensor would round it again
    return (number if below else number.nextafter(torch.zeros_like(number))).item()


def _batch_and_head(value: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Index tensors that broadcast against `row` [B, q, M, K]; a single head serves all."""
    batch = torch.arange(row.shape[0], device=row.device).view(-1, 1, 1, 1)
    head = torch.arange(row.shape[2], device=row.device).view(1, 1, -1, 1)
    return batch, head if value.shape[2] > 1 else torch.zeros_like(head)


def _gather(value: Tensor, corner: _Corner) -> Tensor:
    """The value rows at a corner, 0 outside the map: [B, q, M, K, D]."""
    batch, head = _batch_and_head(value, corner.row)
    rows = value[batch, corner.row, head]
    # Masked, not multiplied by 0: an infinite value must not leak from a row nobody reads.
    return rows.masked_fill(~corner.inside[..., None], 0)


def _scatter(grad_value: Tensor, corner: _Corner, rows: Tensor) -> Tensor:
    """`grad_value` with `rows` added at a corner: the transpose of `_gather`."""
    batch, head = _batch_and_head(grad_value, corner.row)
    rows = rows.masked_fill(~corner.inside[..., None], 0)
    return grad_value.index_put((batch, corner.row, head), rows, accumulate=True)
