"""The sampling rule in plain PyTorch: from reference points and offsets to the cells that a point reads.

Everything here is differentiable. The reference, the explanations and the compositions use this one
rule; `docs/definition.md` states it in words, and every kernel is tested against it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.call import Coordinates, Interpolation, Options, Padding
from saccade.checks import has_queries, parse_reference_index

# Pixels of an axis: a number, or a tensor of numbers.
Size = Any
# At this distance from the border pixels, in pixels, all corners of a point are outside the map.
MARGIN = 2


class Sampling(NamedTuple):
    """Where each query looked and how much each point counted: `return_sampling=True` of a module.

    With `queries_per_map` the T queries of all maps take the place of batch and queries.

    The points of all levels lie flat, level after level (P points in all).
    `saccade.deformable_attention` on the module's value with these locations and weights gives the
    module's result before its output projection.
    """

    reference_points: Tensor
    """[B, Q, 1 or L, N or 2 N]: (x, y) or (x, y, width, height), normalized to the map; in one
    dimension (x) or (x, width), in three (x, y, z) or (x, y, z, width, height, depth)."""
    sampling_offsets: Tensor
    """[B, Q, M, P, N]: (x, y), in pixels of their level (points) or in parts of the box (boxes)."""
    sampling_locations: Tensor
    """[B, Q, M, P, N]: (x, y), normalized: 0 and 1 are the outer edges of the map."""
    attention_weights: Tensor
    """[B, Q, M, P]: positive, sum to 1 over the points of a head."""


def sampling_locations(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Sequence[tuple[int, ...]],
    num_points: Sequence[int],
    *,
    reference_index: Sequence[int] | None = None,
    coordinates: Coordinates = "normalized",
) -> Tensor:
    """Sampling locations from reference points or boxes and predicted offsets.

    Args:
        reference_points (Tensor[B, Q, R, N or 2 N]): (x), (x, y) or (x, y, z), or boxes: the centre,
            then the size along the same axes; R is 1 or L, one for each level, or any number with
            `reference_index`. Other axes may stand in place of B and Q, the same in both tensors.
        sampling_offsets (Tensor[B, Q, M, P, N]): (x), (x, y) or (x, y, z) of each point, the points
            of all levels one after the other.
        spatial_shapes: `(width,)`, `(height, width)` or `(depth, height, width)` of each of the L
            levels.
        num_points: number of points of each level, L numbers with the sum P.
        reference_index: for each of the P points the number of the reference point it starts from.
        coordinates: unit of reference points and locations, as in `saccade.deformable_attention`.

    Returns:
        Tensor[B, Q, M, P, N]. Points: reference + offset pixels, which in normalized coordinates is
        reference + offset / (W_l, H_l). Boxes: centre + offset * (0.5 / K_l) * (width, height).

    Raises:
        ValueError: `reference_points` or `spatial_shapes` does not fit the offsets.

    Source:
        Zhu et al., Deformable DETR, section 4.1 and appendix A.3, https://arxiv.org/abs/2010.04159

    Example:
        >>> import torch
        >>> from saccade.sampling import sampling_locations
        >>> reference = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)
        >>> offset = torch.tensor([1.0, -1.0]).view(1, 1, 1, 1, 2)      # one pixel right, one up
        >>> sampling_locations(reference, offset, [(4, 8)], [1]).flatten().tolist()
        [0.625, 0.25]
    """
    spatial_dims = sampling_offsets.shape[-1]
    if any(len(shape) != spatial_dims for shape in spatial_shapes):
        raise ValueError(
            f"spatial_shapes: expected {spatial_dims} sizes for each level, as many as the last axis "
            f"of sampling_offsets {list(sampling_offsets.shape)} has, got {list(spatial_shapes)}"
        )
    some_queries = has_queries(sampling_offsets.shape[:-3])
    if not some_queries and reference_index is None:
        # Checked with one point of each level, without lists that are as long as all points.
        num_points = [1] * len(num_points)
    index = parse_reference_index(
        reference_points, sampling_offsets.shape[:-3], num_points, reference_index, spatial_dims
    )
    if not some_queries:
        return sampling_offsets + reference_points.sum()[None]  # of no elements: 0
    # One reference point per point, or one for all: [B, Q, 1, P or 1, N or 2 N].
    references = reference_points[..., index if any(index) else [0], :].unsqueeze(-3)
    step = offset_step(
        spatial_shapes,
        num_points,
        coordinates,
        boxes=reference_points.shape[-1] > spatial_dims,
        like=sampling_offsets,
    )  # [P, N or 1]
    moved = sampling_offsets * step  # [B, Q, M, P, N]
    if references.shape[-1] > spatial_dims:
        moved = moved * references[..., spatial_dims:]
    return references[..., :spatial_dims] + moved


def offset_step(
    spatial_shapes: Sequence[tuple[int, ...]],
    num_points: Sequence[int],
    coordinates: Coordinates,
    *,
    boxes: bool,
    like: Tensor,
) -> Tensor:
    """The factor from an offset to a distance in the unit of the locations.

    Returns:
        Tensor[P, N]: for points one pixel of the point's level. Tensor[P, 1]: for boxes, half of the
        box divided by the number of points of the level, in parts of the box.
    """
    if boxes:
        share = [0.5 / count for count in num_points for _ in range(count)]
        return torch.tensor(share, dtype=like.dtype, device=like.device)[:, None]
    scales = [
        [_scale(size, coordinates) for size in reversed(shape)]  # (x, y), but a shape is (H, W)
        for shape, count in zip(spatial_shapes, num_points, strict=True)
        for _ in range(count)
    ]
    step = 1 / torch.tensor(scales, dtype=like.dtype, device=like.device)
    # With one pixel all locations coincide in this unit: the step is 0.
    return step.masked_fill(step.isinf(), 0) if coordinates == "normalized_corners" else step


def _scale(size: Size, coordinates: Coordinates) -> Size:
    """The number of pixels per unit of the coordinates, along an axis of `size` pixels."""
    return {"normalized": size, "normalized_corners": size - 1, "pixel": 1}[coordinates]


def pixel_position(
    location: Tensor, size: Size, coordinates: Coordinates, shift: float = 0.0
) -> Tensor:
    """The position along an axis in pixels, plus `shift`: 0 is the centre of the first pixel."""
    if coordinates == "normalized":
        shift -= 0.5
    # Rounded twice, never fused: every backend agrees on the position to the last bit.
    position: Tensor = location * _scale(size, coordinates) + shift
    return position


def clamp_position(position: Tensor, size: int) -> Tensor:
    """The position along an axis, clamped to the centres of the first and the last of `size` pixels."""
    return position.clamp(0, _last_pixel(size, position.dtype))


def clamp_sizes(shape: Sequence[int], padding: Padding) -> list[int | None]:
    """For each axis of a location, the number of pixels that positions are clamped to; None: never."""
    return [
        {"zeros": None, "border": size, "border_height": min(size, shape[0])}[padding]
        for size in reversed(shape)
    ]


class Cell(NamedTuple):
    """One of the cells that points read along one axis."""

    pixel: Tensor  # int64; outside the map where it is below 0 or not below the size
    weight: Tensor  # of the interpolation, 0 to 1
    slope: Tensor  # the derivative of the weight by the location


def axis_cells(
    location: Tensor,
    size: Size,
    interpolation: Interpolation,
    coordinates: Coordinates,
    clamp_size: int | None = None,
    margin: int = MARGIN,
) -> list[Cell]:
    """The cells that points read along one axis: two for linear interpolation, else one.

    Args:
        location (Tensor[...]): a finite coordinate of each point, in the unit of `coordinates`.
        size: number of pixels of the axis; a tensor of them broadcasts against `location`.
        interpolation: as in `saccade.deformable_attention`.
        coordinates: as in `saccade.deformable_attention`.
        clamp_size: positions are clamped to the first and the last pixel of so many; None: never.
        margin: a position so many pixels outside the map stands for all positions beyond it.
    """
    # The discrete rule rounds what counts from the edge as if it counted from a centre, and rounds down.
    shift = 1.0 if interpolation == "discrete" else 0.0
    position = pixel_position(location, size, coordinates, shift)  # [...]
    slope = torch.ones_like(position) * _scale(size, coordinates)
    if clamp_size is not None:
        # As in grid_sample: no gradient at or beyond the centres of the border pixels.
        clamped = clamp_position(position, clamp_size)
        inside = (position > 0) & (position < _last_pixel(clamp_size, position.dtype))
        position = torch.where(inside, position, clamped.detach())
        slope = torch.where(inside, slope, 0)
    # One distance stands for all beyond: infinity minus infinity would not be a number.
    near = (position > -margin) & (position < size - 1 + margin)
    beyond = position.detach().clamp(min=-margin).clamp(max=size - 1 + margin)
    position = torch.where(near, position, beyond)
    if interpolation != "linear":
        detached = position.detach()
        index = detached.round() if interpolation == "nearest" else detached.floor()  # half to even
        # The weight depends on the position formally: its gradient is 0, not missing.
        return [Cell(index.to(torch.int64), 1 + 0 * position, torch.zeros_like(index))]
    lower = position.detach().floor()
    fraction = position - lower
    index = lower.to(torch.int64)
    return [Cell(index, 1 - fraction, -slope), Cell(index + 1, fraction, slope)]


class Corner(NamedTuple):
    """One of the 2^N cells that points read on a level (one for nearest and discrete sampling)."""

    row: Tensor  # [...] int64, index among the positions of the level; 0 where outside
    inside: Tensor  # [...] bool; a corner outside the map, or of a non-finite location, counts as 0
    weight: Tensor  # [...] weight of the interpolation; 0 where outside
    weight_gradient: Tensor  # [..., N] derivative of the weight by the location; 0 where outside


def corners(locations: Tensor, shape: Sequence[int], options: Options) -> Iterator[Corner]:
    """The corners of points on one level: the combinations of their cells along the axes.

    Args:
        locations (Tensor[..., N]): (x), (x, y) or (x, y, z) of each point.
        shape: (W), (H, W) or (D, H, W) of the level.
        options: those of the call.
    """
    finite = torch.isfinite(locations).all(-1)  # [...]
    axes = []
    sizes = zip(reversed(shape), clamp_sizes(shape, options.padding), strict=True)
    for axis, (size, clamp_size) in enumerate(sizes):  # a location is (x, y), a shape is (H, W)
        location = torch.where(finite, locations[..., axis], 0)
        axes.append(
            axis_cells(location, size, options.interpolation, options.coordinates, clamp_size)
        )
    for cells in itertools.product(*axes):
        inside, row, weight = finite, torch.zeros_like(finite, dtype=torch.int64), None
        for cell, size in zip(reversed(cells), shape, strict=True):
            inside = inside & (cell.pixel >= 0) & (cell.pixel <= size - 1)
            row = row * size + torch.where(inside, cell.pixel, 0)
            weight = cell.weight if weight is None else weight * cell.weight
        assert weight is not None
        gradients = [
            math.prod((other.weight for other in cells if other is not cell), start=cell.slope)
            for cell in cells
        ]
        yield Corner(
            torch.where(inside, row, 0),
            inside,
            torch.where(inside, weight, 0),
            torch.where(inside[..., None], torch.stack(gradients, -1), 0),
        )


def _last_pixel(size: int, dtype: torch.dtype) -> float:
    """The last of `size` pixels, or the largest number of the dtype below it where it has no number."""
    last = torch.tensor(size - 1, dtype=dtype)
    below = last.item() <= size - 1  # compared as Python numbers, which are exact
    return (last if below else last.nextafter(torch.zeros_like(last))).item()


def directions(count: int, spatial_dims: int) -> Tensor:
    """The directions in which the heads of an untrained module look, spread evenly.

    Returns:
        Tensor[count, N], the longest coordinate of each 1 or -1. In two dimensions they divide the
        circle, as in the Deformable-DETR family; on a line they go right and left by turns; in
        three they lie evenly on a sphere (a Fibonacci lattice).

    Example:
        >>> from saccade.sampling import directions
        >>> directions(4, 1).flatten().tolist()
        [1.0, -1.0, 1.0, -1.0]
    """
    number = torch.arange(count, dtype=torch.float32)
    if spatial_dims == 1:
        return (1 - 2 * (number % 2))[:, None]
    if spatial_dims == 2:
        angle = number * (2 * math.pi / count)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
    else:
        # Heights at equal distances, each a golden angle on from the last.
        height = 1 - (2 * number + 1) / count
        angle = number * (math.pi * (3 - math.sqrt(5)))
        radius = (1 - height**2).sqrt()
        direction = torch.stack((radius * angle.cos(), radius * angle.sin(), height), -1)
    return direction / direction.abs().amax(-1, keepdim=True)
