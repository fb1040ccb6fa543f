"""The sampling rule in Triton: from locations, or reference points and offsets, to corners of the value.

Along each axis of a level with `size` pixels, and for each point:

    location  = reference + offset * step         step: a pixel, or half of the box / points of the level
    position  = location * size - 0.5             normalized; pixels, the centre of one is a whole number
              = location * (size - 1)             normalized_corners
              = location                          pixel
    lower     = floor(position)                   linear; nearest rounds half to even, discrete adds 1
    fraction  = position - lower                  the weight of the upper cell, 1 - fraction of the lower

A corner is one of the 2^N combinations of lower and upper cells, its weight the product over the axes.
Products and sums are never fused here: the definition rounds a position twice.

`[...]` in the comments on shapes is the shape of a block of points: [BLOCK_QUERIES], one point of each
query, or [BLOCK_QUERIES, BLOCK_POINTS], all of them. Axes are counted from x. `C` is `plan.Constants`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

MAX_SOFTMAX_BLOCK = tl.constexpr(16)


class Cell(NamedTuple):
    """The two cells between which points lie along one axis, each field [...]."""

    lower: Any
    """The lower cell; -2 far outside, or where the location is not finite: neither cell is inside then."""
    fraction: Any
    """The weight of the upper cell."""
    lower_inside: Any
    """Whether the lower cell lies inside the map."""
    upper_inside: Any
    """Whether the upper cell lies inside the map."""
    slope: Any
    """The derivative of `fraction` with respect to the location."""


class Cells(NamedTuple):
    """The fields of `Cell` and the size of the level, each a tuple with one [...] per axis.

    A tuple of `Cell` would lose the names of their fields in Triton 3.6, which joins tuples without them.
    """

    lower: Any
    fraction: Any
    lower_inside: Any
    upper_inside: Any
    slope: Any
    size: Any


class Samples(NamedTuple):
    """A block of points with their attention weights."""

    offset: Any
    """[...], the index of the point among those of the program's (query, head) pairs."""
    in_range: Any
    """[...], whether there is such a point."""
    level: Any
    """The level of the points: a number, or [BLOCK_POINTS]."""
    cells: Cells
    steps: Any
    """What the offsets are multiplied by, per axis [...]."""
    weight: Any
    """[...], the attention weight."""


class Corner(NamedTuple):
    """One of the 2^N corners of each point, each field [...]."""

    inside: Any
    address: Any
    weight: Any


class SoftmaxTerms(NamedTuple):
    """weight = exp(logit - max_logit) * scale, each field [BLOCK_QUERIES]."""

    max_logit: Any
    scale: Any


@triton.jit
def level_size(sizes, level, AXIS: tl.constexpr, C: tl.constexpr):
    """The pixels of a level along an axis; `sizes` has (depth, height, width) of each level.

    The sizes are arguments, not a table in memory: nothing is copied to the card before a call. Each
    comes as 2 * size + 1, because Triton compiles another kernel for a number that is 1 or a multiple of
    16, and one kernel has to serve every resolution.
    """
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    NUM_LEVELS: tl.constexpr = C.NUM_LEVELS
    result = sizes[SPATIAL_DIMS - 1 - AXIS]
    for other in tl.static_range(1, NUM_LEVELS):
        result = tl.where(
            level == other, sizes[other * SPATIAL_DIMS + SPATIAL_DIMS - 1 - AXIS], result
        )
    return (result >> 1).to(tl.int32)


@triton.jit
def num_cells(sizes, level, MARGIN: tl.constexpr, C: tl.constexpr):
    """The product of a level's sizes, each enlarged by MARGIN: positions with 0, cells with 1."""
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    count = (level_size(sizes, level, 0, C) + MARGIN).to(tl.int64)
    for axis in tl.static_range(1, SPATIAL_DIMS):
        count *= level_size(sizes, level, axis, C) + MARGIN
    return count


@triton.jit
def level_start(sizes, level, MARGIN: tl.constexpr, C: tl.constexpr):
    """The sum of `num_cells` over the levels before each of `level`, a block of levels."""
    NUM_LEVELS: tl.constexpr = C.NUM_LEVELS
    start = tl.zeros(level.shape, tl.int64)  # [BLOCK_POINTS], the shape of level
    end = tl.full((), 0, tl.int64)
    for other in tl.static_range(NUM_LEVELS - 1):
        end += num_cells(sizes, other, MARGIN, C)
        start = tl.where(level > other, end, start)
    return start


@triton.jit
def _last_pixel(sizes, level, AXIS: tl.constexpr, C: tl.constexpr):
    """The last pixel that a position is clamped to."""
    size = level_size(sizes, level, AXIS, C)
    if C.PADDING == "border_height":
        size = tl.minimum(size, level_size(sizes, level, 1, C))
    return size - 1


@triton.jit
def select_constant(constants: tl.constexpr, index):
    """The element `index` of a tuple of constants, in registers; a constant if all are the same."""
    result = constants[0]
    for other in tl.static_range(1, len(constants)):
        if constants[other] != constants[other - 1]:
            result = tl.where(index >= other, constants[other], result)
    return result


@triton.jit
def _quotient(numerator: tl.constexpr, count, dtype: tl.constexpr):
    """numerator / count, rounded once."""
    divisor = (count + tl.zeros((), tl.int32)).to(dtype)
    if dtype == tl.float32:
        quotient = tl.div_rn(numerator, divisor)
    else:
        quotient = numerator / divisor
    return quotient


@triton.jit
def offset_step(size, points_of_level, dtype: tl.constexpr, BOXES: tl.constexpr,
                COORDINATES: tl.constexpr):  # fmt: skip
    """What an offset is multiplied by: a pixel; with boxes, half of the box over the level's points, still
    to be multiplied by the size of the box.
    """
    if BOXES:
        step = _quotient(0.5, points_of_level, dtype)
    elif COORDINATES == "normalized":
        step = _quotient(1.0, size, dtype)
    elif COORDINATES == "normalized_corners":
        # With one pixel, all locations coincide: the step is 0.
        step = tl.where(size > 1, _quotient(1.0, tl.maximum(size - 1, 1), dtype), 0)
    else:
        step = 1.0
    return step


@triton.jit
def _load_coordinates(pointer, offset, in_range, C: tl.constexpr, dtype: tl.constexpr):
    """N coordinates in a row from each `offset` on, per axis [...]; NaN where not in range, so that such
    a point reads nothing.
    """
    NAN: tl.constexpr = float("nan")
    if C.SPATIAL_DIMS == 1:
        result = (tl.load(pointer + offset, mask=in_range, other=NAN).to(dtype),)
    elif C.SPATIAL_DIMS == 2:
        # One load for both.
        pairs = tl.expand_dims(pointer + offset, -1) + tl.arange(0, 2)  # [..., 2]
        x, y = tl.split(tl.load(pairs, mask=tl.expand_dims(in_range, -1), other=NAN))  # [...]
        result = (x.to(dtype), y.to(dtype))
    else:
        x = tl.load(pointer + offset, mask=in_range, other=NAN)  # [...]
        y = tl.load(pointer + offset + 1, mask=in_range, other=NAN)  # [...]
        z = tl.load(pointer + offset + 2, mask=in_range, other=NAN)  # [...]
        result = (x.to(dtype), y.to(dtype), z.to(dtype))
    return result


@triton.jit
def _locate(coordinate, reference, box, size, points_of_level, C: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """The location of each point along an axis [...], and what its offset is multiplied by [...]."""
    BOXES: tl.constexpr = C.REFERENCE == "boxes"
    COORDINATES: tl.constexpr = C.COORDINATES
    location = coordinate  # [...]
    step = coordinate  # [...]
    if C.REFERENCE != "none":
        step = offset_step(size, points_of_level, dtype, BOXES, COORDINATES)
        shift = coordinate * step  # [...]
        if BOXES:
            shift = shift * box
            step = step * box
        location = reference + shift
    return location, step


@triton.jit
def _find_cell(location, size, last, C: tl.constexpr):
    """The `Cell` of each location [...] along an axis; `last` is the pixel that the padding clamps to."""
    position = location  # [...], pixels
    slope = tl.full((), 1, location.dtype)
    if C.COORDINATES == "normalized":
        # The discrete rule adds a pixel to the half that every rule subtracts.
        slope = size.to(location.dtype)
        position = location * slope + (0.5 if C.INTERPOLATION == "discrete" else -0.5)
    else:
        if C.COORDINATES == "normalized_corners":
            slope = (size - 1).to(location.dtype)
            position = location * slope
        if C.INTERPOLATION == "discrete":
            position = position + 1
    if C.PADDING == "zeros":
        # Compared before anything is converted to an integer, which cannot hold every such number.
        near = (position >= -1) & (position < size.to(location.dtype))  # [...]
    else:
        near = location - location == 0  # [...]
        slope = tl.where((position > 0) & (position < last.to(location.dtype)), slope, 0)
        position = tl.minimum(tl.maximum(position, 0), last.to(location.dtype))
    position = tl.where(near, position, -2)
    floor = tl.floor(position)  # [...]
    fraction = position - floor  # [...]
    lower = floor.to(tl.int32)  # [...]
    if C.PADDING != "zeros":
        # On a map with more pixels than a float counts exactly, the last one may have been rounded up.
        lower = tl.minimum(lower, last)
    if C.INTERPOLATION == "nearest":
        # Half to even.
        lower += ((fraction > 0.5) | ((fraction == 0.5) & (lower % 2 != 0))).to(tl.int32)
    if C.INTERPOLATION != "linear":
        slope = tl.full((), 0, location.dtype)
    # Negative numbers are large as unsigned ones.
    lower_inside = lower.to(tl.uint32, bitcast=True) < size.to(tl.uint32)  # [...]
    upper_inside = (lower + 1).to(tl.uint32, bitcast=True) < size.to(tl.uint32)  # [...]
    return Cell(lower, fraction, lower_inside, upper_inside, slope)


@triton.jit
def _find_cells(points, offset, reference_points, reference, in_range, sizes, level,
                points_of_level, C: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The `Cells` of the points with these offsets [...], and what their own offsets are multiplied by.

    `reference` [...] is the index of their reference point.
    """
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    coordinates = _load_coordinates(points, offset * SPATIAL_DIMS, in_range, C, dtype)
    start, box = coordinates, coordinates
    if C.REFERENCE == "points":
        start = _load_coordinates(reference_points, reference * SPATIAL_DIMS, in_range, C, dtype)
    if C.REFERENCE == "boxes":
        start = _load_coordinates(
            reference_points, reference * 2 * SPATIAL_DIMS, in_range, C, dtype
        )
        box = _load_coordinates(
            reference_points + SPATIAL_DIMS, reference * 2 * SPATIAL_DIMS, in_range, C, dtype
        )
    lower, fraction, lower_inside, upper_inside, slope = (), (), (), (), ()
    level_sizes, steps = (), ()
    for axis in tl.static_range(SPATIAL_DIMS):
        size = level_size(sizes, level, axis, C)
        location, step = _locate(
            coordinates[axis], start[axis], box[axis], size, points_of_level, C, dtype
        )
        last = _last_pixel(sizes, level, axis, C)
        cell = _find_cell(location, size, last, C)
        lower = lower + (cell.lower,)
        fraction = fraction + (cell.fraction,)
        lower_inside = lower_inside + (cell.lower_inside,)
        upper_inside = upper_inside + (cell.upper_inside,)
        slope = slope + (cell.slope,)
        level_sizes = level_sizes + (size,)
        steps = steps + (step,)
    return Cells(lower, fraction, lower_inside, upper_inside, slope, level_sizes), steps


@triton.jit
def lower_row(cells, C: tl.constexpr):
    """The index in its level of the value's row in which the lower corner of each point lies, [...]."""
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    row = cells.lower[SPATIAL_DIMS - 1]  # [...]
    if C.USE_INT64_OFFSETS:
        row = row.to(tl.int64)
    for axis in tl.static_range(SPATIAL_DIMS - 2, -1, -1):
        row = row * cells.size[axis] + cells.lower[axis]
    return row


@triton.jit
def find_corner(first, cells, corner: tl.constexpr, ROW: tl.constexpr, C: tl.constexpr):
    """A `Corner` of each point: bit `axis` of `corner` tells the upper cell from the lower one. The lowest
    corner is at `first` [...], and rows are ROW elements apart.
    """
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    inside = cells.upper_inside[0] if corner % 2 == 1 else cells.lower_inside[0]  # [...]
    address = first + (corner % 2) * ROW  # [...]
    weight = cells.fraction[0] if corner % 2 == 1 else 1 - cells.fraction[0]  # [...]
    for axis in tl.static_range(1, SPATIAL_DIMS):
        inside = inside & (
            cells.upper_inside[axis] if (corner >> axis) % 2 == 1 else cells.lower_inside[axis]
        )
        weight *= cells.fraction[axis] if (corner >> axis) % 2 == 1 else 1 - cells.fraction[axis]
        if (corner >> axis) % 2 == 1:
            step = cells.size[0]
            if axis == 2:
                step = step * cells.size[1]
            if C.USE_INT64_OFFSETS:
                step = step.to(tl.int64)
            address += step * ROW
    return Corner(inside, address, weight)


@triton.jit
def find_softmax_terms(logits, offset, in_range, C: tl.constexpr, dtype: tl.constexpr):
    """The `SoftmaxTerms` of each query, whose logits begin at `offset` [BLOCK_QUERIES].

    The logits are read block by block, element by element, and reduced once at the end: Triton 3.6 does
    not compile a reduction that a loop carries.
    """
    BLOCK_QUERIES: tl.constexpr = C.BLOCK_QUERIES
    NUM_POINTS: tl.constexpr = C.NUM_POINTS
    BLOCK: tl.constexpr = (
        triton.next_power_of_2(NUM_POINTS) if NUM_POINTS < MAX_SOFTMAX_BLOCK else MAX_SOFTMAX_BLOCK
    )
    row = tl.expand_dims(logits + offset, -1)  # [BLOCK_QUERIES, 1]
    point = tl.arange(0, BLOCK)  # [BLOCK]
    in_row = tl.expand_dims(in_range, -1)  # [BLOCK_QUERIES, 1]
    largest = tl.full((BLOCK_QUERIES, BLOCK), float("-inf"), dtype)  # [BLOCK_QUERIES, BLOCK]
    for first in range(0, NUM_POINTS, BLOCK):
        logit = tl.load(row + (first + point), mask=in_row & (first + point < NUM_POINTS),
                        other=float("-inf")).to(dtype)  # [BLOCK_QUERIES, BLOCK]  # fmt: skip
        largest = tl.maximum(largest, logit)
    max_logit = tl.max(largest, 1)  # [BLOCK_QUERIES]
    powers = tl.zeros((BLOCK_QUERIES, BLOCK), dtype)  # [BLOCK_QUERIES, BLOCK]
    for first in range(0, NUM_POINTS, BLOCK):
        logit = tl.load(row + (first + point), mask=in_row & (first + point < NUM_POINTS),
                        other=float("-inf")).to(dtype)  # [BLOCK_QUERIES, BLOCK]  # fmt: skip
        powers += tl.exp(logit - tl.expand_dims(max_logit, -1))
    return SoftmaxTerms(max_logit, 1 / tl.sum(powers, 1))


@triton.jit
def find_point(inputs, queries, in_range, point, level, points_of_level, softmax, C: tl.constexpr,
               dtype: tl.constexpr):  # fmt: skip
    """One point of each query, as `Samples` of [BLOCK_QUERIES]; `softmax` is empty or `SoftmaxTerms`."""
    REFERENCE_INDEX: tl.constexpr = C.REFERENCE_INDEX
    offset = queries * (C.NUM_HEADS * C.NUM_POINTS) + point  # [BLOCK_QUERIES]
    reference = queries * C.NUM_REFERENCES  # [BLOCK_QUERIES]
    if C.NUM_REFERENCES > 1:
        reference += select_constant(REFERENCE_INDEX, point)
    cells, steps = _find_cells(
        inputs.points, offset, inputs.reference_points, reference, in_range, inputs.sizes, level,
        points_of_level, C, dtype
    )  # fmt: skip
    weight = tl.load(inputs.weights + offset, mask=in_range, other=0).to(dtype)  # [BLOCK_QUERIES]
    if C.SOFTMAX:
        weight = tl.exp(weight - softmax.max_logit) * softmax.scale
    return Samples(offset, in_range, level, cells, steps, weight)


@triton.jit
def find_points(inputs, queries, query_in_range, C: tl.constexpr, dtype: tl.constexpr):
    """All points of each query, as `Samples` of [BLOCK_QUERIES, BLOCK_POINTS]."""
    REFERENCE_INDEX: tl.constexpr = C.REFERENCE_INDEX
    LEVEL_OF_POINT: tl.constexpr = C.LEVEL_OF_POINT
    POINTS_OF_LEVEL: tl.constexpr = C.POINTS_OF_LEVEL
    BLOCK_POINTS: tl.constexpr = C.BLOCK_POINTS
    point = tl.arange(0, BLOCK_POINTS)  # [BLOCK_POINTS]
    level = tl.zeros((BLOCK_POINTS,), tl.int32) + select_constant(LEVEL_OF_POINT, point)
    in_range = tl.expand_dims(query_in_range, 1) & (point < C.NUM_POINTS)
    column = tl.expand_dims(queries, 1)  # [BLOCK_QUERIES, 1]
    offset = column * (C.NUM_HEADS * C.NUM_POINTS) + point  # [BLOCK_QUERIES, BLOCK_POINTS]
    reference = column * C.NUM_REFERENCES + tl.zeros((BLOCK_POINTS,), tl.int32)
    if C.NUM_REFERENCES > 1:
        reference += select_constant(REFERENCE_INDEX, point)
    cells, steps = _find_cells(
        inputs.points, offset, inputs.reference_points, reference, in_range, inputs.sizes, level,
        select_constant(POINTS_OF_LEVEL, point), C, dtype
    )  # fmt: skip
    if C.SOFTMAX:
        logit = tl.load(inputs.weights + offset, mask=in_range, other=float("-inf")).to(dtype)
        power = tl.exp(logit - tl.expand_dims(tl.max(logit, 1), 1))  # [BLOCK_QUERIES, BLOCK_POINTS]
        weight = power * tl.expand_dims(1 / tl.sum(power, 1), 1)
    else:
        weight = tl.load(inputs.weights + offset, mask=in_range, other=0).to(dtype)
    return Samples(offset, in_range, level, cells, steps, weight)
