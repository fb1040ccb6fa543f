"""Stage one of the GPU kernels: from locations, or references and offsets, to cells of the value.

Along each axis a point has a lower cell, a fraction, and knows which of its two cells lie inside the map
(`axis_cells`); all coordinates, paddings and interpolations end there. Everything works on points of any
shape: a block of queries, or queries and points.

Products and sums are never fused here: the definition rounds a position twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def level_size(sizes, level, AXIS: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr):
    """Pixels of a level along an axis, 0 for x; `sizes` has (depth, height, width) of each level.

    The sizes are arguments, not a table in memory: nothing is copied to the card before a call. Each
    comes as 2 * size + 1, for Triton makes a kernel of its own for a number that is 1 or a multiple of
    16, and shall not for every resolution.
    """
    found = sizes[AXES - 1 - AXIS]
    for other in tl.static_range(1, LEVELS):
        found = tl.where(level == other, sizes[other * AXES + AXES - 1 - AXIS], found)
    return (found >> 1).to(tl.int32)


@triton.jit
def cells_of_level(sizes, level, MORE: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr):
    """The product of a level's sizes, each counted as MORE than it is."""
    count = (level_size(sizes, level, 0, AXES, LEVELS) + MORE).to(tl.int64)
    for axis in tl.static_range(1, AXES):
        count *= level_size(sizes, level, axis, AXES, LEVELS) + MORE
    return count


@triton.jit
def cells_before(sizes, level, MORE: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr):
    """The sum of what `cells_of_level` gives for the levels before `level`, a tensor of levels."""
    before = tl.zeros(level.shape, tl.int64)
    end = tl.full((), 0, tl.int64)
    for other in tl.static_range(LEVELS - 1):
        end += cells_of_level(sizes, other, MORE, AXES, LEVELS)
        before = tl.where(level > other, end, before)
    return before


@triton.jit
def _last(sizes, level, AXIS: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
          PADDING: tl.constexpr):  # fmt: skip
    """The last pixel that a position is clamped to."""
    last = level_size(sizes, level, AXIS, AXES, LEVELS)
    if PADDING == "border_height":
        last = tl.minimum(last, level_size(sizes, level, 1, AXES, LEVELS))
    return last - 1


@triton.jit
def entry(numbers: tl.constexpr, index, COUNT: tl.constexpr):
    """The entry `index` of a tuple of constants; a constant if all are the same."""
    found = numbers[0]
    for other in tl.static_range(1, COUNT):
        if numbers[other] != numbers[other - 1]:
            found = tl.where(index >= other, numbers[other], found)
    return found


@triton.jit
def _quotient(number: tl.constexpr, count, dtype: tl.constexpr):
    """number / count, rounded once."""
    divisor = (count + tl.zeros((), tl.int32)).to(dtype)
    if dtype == tl.float32:
        quotient = tl.div_rn(number, divisor)
    else:
        quotient = number / divisor
    return quotient


@triton.jit
def offset_step(size, points_of_level, dtype: tl.constexpr, COORDINATES: tl.constexpr,
                BOXES: tl.constexpr):  # fmt: skip
    """What an offset is multiplied by: a pixel, or of boxes half of the box over the level's points."""
    if BOXES:
        step = _quotient(0.5, points_of_level, dtype)
    elif COORDINATES == "normalized":
        step = _quotient(1.0, size, dtype)
    elif COORDINATES == "normalized_corners":
        # Between the corners of a single pixel there is no way to go.
        step = tl.where(size > 1, _quotient(1.0, tl.maximum(size - 1, 1), dtype), 0)
    else:
        step = 1.0
    return step


@triton.jit
def _numbers(start, place, in_range, AXES: tl.constexpr, dtype: tl.constexpr):
    """AXES numbers in a row from each `place` on, axis by axis; not finite where not in range, so that
    such a point reads nothing.
    """
    NOTHING: tl.constexpr = float("nan")
    if AXES == 1:
        found = (tl.load(start + place, mask=in_range, other=NOTHING).to(dtype),)
    elif AXES == 2:
        # One load for both.
        pairs = tl.expand_dims(start + place, -1) + tl.arange(0, 2)
        x, y = tl.split(tl.load(pairs, mask=tl.expand_dims(in_range, -1), other=NOTHING))
        found = (x.to(dtype), y.to(dtype))
    else:
        x = tl.load(start + place, mask=in_range, other=NOTHING)
        y = tl.load(start + place + 1, mask=in_range, other=NOTHING)
        z = tl.load(start + place + 2, mask=in_range, other=NOTHING)
        found = (x.to(dtype), y.to(dtype), z.to(dtype))
    return found


@triton.jit
def _coordinate(number, reference, box, size, points_of_level, KIND: tl.constexpr,
                COORDINATES: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """A coordinate of the location of a point, of what is given or of an offset, and what an offset is
    multiplied by.
    """
    location = number
    step = number
    if KIND != "given":
        step = offset_step(size, points_of_level, dtype, COORDINATES, KIND == "boxes")
        moved = number * step
        if KIND == "boxes":
            moved = moved * box
            step = step * box
        location = reference + moved
    return location, step


@triton.jit
def axis_cells(location, size, last, COORDINATES: tl.constexpr, PADDING: tl.constexpr,
          INTERPOLATION: tl.constexpr):  # fmt: skip
    """The lower cell that a point reads along an axis, the share of the upper one, whether each lies
    inside the map, and how that share grows with the location. `last` is where `PADDING` clamps to.

    Far outside, or not finite: the cell is -2, so that neither is inside, and the share is finite.
    """
    position = location
    slope = tl.full((), 1, location.dtype)
    if COORDINATES == "normalized":
        # Of cells counted from the edge the discrete rule rounds up what linear takes off.
        slope = size.to(location.dtype)
        position = location * slope + (0.5 if INTERPOLATION == "discrete" else -0.5)
    else:
        if COORDINATES == "normalized_corners":
            slope = (size - 1).to(location.dtype)
            position = location * slope
        if INTERPOLATION == "discrete":
            position = position + 1
    if PADDING == "zeros":
        # Compared before anything is converted to an integer, which has no such numbers.
        near = (position >= -1) & (position < size.to(location.dtype))
    else:
        near = location - location == 0
        slope = tl.where((position > 0) & (position < last.to(location.dtype)), slope, 0)
        position = tl.minimum(tl.maximum(position, 0), last.to(location.dtype))
    position = tl.where(near, position, -2)
    floor = tl.floor(position)
    fraction = position - floor
    cell = floor.to(tl.int32)
    if PADDING != "zeros":
        # Of a map that is wider than numbers are exact, the last pixel may have been rounded up.
        cell = tl.minimum(cell, last)
    if INTERPOLATION == "nearest":
        # Half to even.
        cell += ((fraction > 0.5) | ((fraction == 0.5) & (cell % 2 != 0))).to(tl.int32)
    if INTERPOLATION != "linear":
        slope = tl.full((), 0, location.dtype)
    # As unsigned numbers negative ones are large.
    inside = cell.to(tl.uint32, bitcast=True) < size.to(tl.uint32)
    above_inside = (cell + 1).to(tl.uint32, bitcast=True) < size.to(tl.uint32)
    return cell, fraction, inside, above_inside, slope


@triton.jit
def cells_of_points(points, place, references, reference, in_range, sizes, level, points_of_level,
           KIND: tl.constexpr, COORDINATES: tl.constexpr, PADDING: tl.constexpr,
           INTERPOLATION: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
           dtype: tl.constexpr):  # fmt: skip
    """Stage one for the points whose number is `place`: along each axis what `axis_cells` finds, the size
    of the level, and what an offset is multiplied by. `reference` is the number of their reference point.
    """
    numbers = _numbers(points, place * AXES, in_range, AXES, dtype)
    start, box = numbers, numbers
    if KIND == "points":
        start = _numbers(references, reference * AXES, in_range, AXES, dtype)
    if KIND == "boxes":
        start = _numbers(references, reference * 2 * AXES, in_range, AXES, dtype)
        box = _numbers(references + AXES, reference * 2 * AXES, in_range, AXES, dtype)
    cells = ()
    sizes_of_level = ()
    steps = ()
    for axis in tl.static_range(AXES):
        size = level_size(sizes, level, axis, AXES, LEVELS)
        location, step = _coordinate(numbers[axis], start[axis], box[axis], size, points_of_level,
                                     KIND, COORDINATES, dtype)  # fmt: skip
        last = _last(sizes, level, axis, AXES, LEVELS, PADDING)
        cells = cells + (axis_cells(location, size, last, COORDINATES, PADDING, INTERPOLATION),)
        sizes_of_level = sizes_of_level + (size,)
        steps = steps + (step,)
    return cells, sizes_of_level, steps


@triton.jit
def lower_row(cells, sizes_of_level, WIDE: tl.constexpr):
    """The number of the row of the value, in its level, in which the lower corner of a point lies."""
    AXES: tl.constexpr = len(cells)
    row = cells[AXES - 1][0]
    if WIDE:
        row = row.to(tl.int64)
    for axis in tl.static_range(AXES - 2, -1, -1):
        row = row * sizes_of_level[axis] + cells[axis][0]
    return row


@triton.jit
def corner_of_cells(first, cells, sizes_of_level, corner: tl.constexpr, ROW: tl.constexpr,
                    WIDE: tl.constexpr):  # fmt: skip
    """One of the 2^N corners of a point: whether it lies inside the map, where it is if the lower one is
    at `first` and rows are ROW apart, and its weight.
    """
    inside = cells[0][2 + corner % 2]
    place = first + (corner % 2) * ROW
    weight = cells[0][1] if corner % 2 == 1 else 1 - cells[0][1]
    for axis in tl.static_range(1, len(cells)):
        inside = inside & cells[axis][2 + (corner >> axis) % 2]
        weight *= cells[axis][1] if (corner >> axis) % 2 == 1 else 1 - cells[axis][1]
        if (corner >> axis) % 2 == 1:
            step = sizes_of_level[0]
            if axis == 2:
                step = step * sizes_of_level[1]
            if WIDE:
                step = step.to(tl.int64)
            place += step * ROW
    return inside, place, weight


@triton.jit
def softmax_terms(logits, place, in_range, POINTS: tl.constexpr, QUERIES: tl.constexpr,
                  dtype: tl.constexpr):  # fmt: skip
    """The largest logit of each look, and 1 / the sum of the powers: weight = exp(logit - largest) * it.

    The blocks of a look are gone through element by element and reduced once, at the end: Triton 3.6
    does not compile a reduction that a loop carries.
    """
    MOST: tl.constexpr = 16
    BLOCK: tl.constexpr = triton.next_power_of_2(POINTS) if POINTS < MOST else MOST
    row = tl.expand_dims(logits + place, -1)
    point = tl.arange(0, BLOCK)
    in_row = tl.expand_dims(in_range, -1)
    most = tl.full((QUERIES, BLOCK), float("-inf"), dtype)
    for first in range(0, POINTS, BLOCK):
        some = tl.load(row + (first + point), mask=in_row & (first + point < POINTS),
                       other=float("-inf")).to(dtype)  # fmt: skip
        most = tl.maximum(most, some)
    largest = tl.max(most, 1)
    powers = tl.zeros((QUERIES, BLOCK), dtype)
    for first in range(0, POINTS, BLOCK):
        some = tl.load(row + (first + point), mask=in_row & (first + point < POINTS),
                       other=float("-inf")).to(dtype)  # fmt: skip
        powers += tl.exp(some - tl.expand_dims(largest, -1))
    return largest, 1 / tl.sum(powers, 1)


@triton.jit
def point_of_queries(points, weights, references, query, point, in_range, sizes, level,
                     points_of_level, softmax, KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr,
                     NUM_REFERENCES: tl.constexpr, COORDINATES: tl.constexpr,
                     PADDING: tl.constexpr, INTERPOLATION: tl.constexpr, POINTS: tl.constexpr,
                     HEADS: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
                     dtype: tl.constexpr):  # fmt: skip
    """One point of each query of a block: its place among all points, what `cells_of_points` finds, and its
    weight. `softmax` is what `softmax_terms` gives, where logits stand for weights.
    """
    place = query * (HEADS * POINTS) + point
    reference = query * NUM_REFERENCES
    if NUM_REFERENCES > 1:
        reference += entry(REFERENCE_INDEX, point, POINTS)
    cells, sizes_of_level, steps = cells_of_points(
        points, place, references, reference, in_range, sizes, level, points_of_level, KIND,
        COORDINATES, PADDING, INTERPOLATION, AXES, LEVELS, dtype
    )  # fmt: skip
    weight = tl.load(weights + place, mask=in_range, other=0).to(dtype)
    if KIND != "given":
        weight = tl.exp(weight - softmax[0]) * softmax[1]
    return place, cells, sizes_of_level, steps, weight


@triton.jit
def points_of_queries(points, weights, references, query, in_block, sizes, KIND: tl.constexpr,
                      REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
                      LEVEL_OF_POINT: tl.constexpr, POINTS_OF_POINT: tl.constexpr,
                      COORDINATES: tl.constexpr, PADDING: tl.constexpr,
                      INTERPOLATION: tl.constexpr, POINTS: tl.constexpr, HEADS: tl.constexpr,
                      AXES: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
                      dtype: tl.constexpr):  # fmt: skip
    """All points of each query of a block, BLOCK of them: their levels, which of them there are, and what
    `point_of_queries` gives of one.
    """
    point = tl.arange(0, BLOCK)
    level = tl.zeros((BLOCK,), tl.int32) + entry(LEVEL_OF_POINT, point, POINTS)
    in_range = tl.expand_dims(in_block, 1) & (point < POINTS)
    column = tl.expand_dims(query, 1)
    place = column * (HEADS * POINTS) + point
    reference = column * NUM_REFERENCES + tl.zeros((BLOCK,), tl.int32)
    if NUM_REFERENCES > 1:
        reference += entry(REFERENCE_INDEX, point, POINTS)
    cells, sizes_of_level, steps = cells_of_points(
        points, place, references, reference, in_range, sizes, level,
        entry(POINTS_OF_POINT, point, POINTS), KIND, COORDINATES, PADDING, INTERPOLATION, AXES,
        LEVELS, dtype
    )  # fmt: skip
    if KIND == "given":
        weight = tl.load(weights + place, mask=in_range, other=0).to(dtype)
    else:
        logit = tl.load(weights + place, mask=in_range, other=float("-inf")).to(dtype)
        power = tl.exp(logit - tl.expand_dims(tl.max(logit, 1), 1))
        weight = power * tl.expand_dims(1 / tl.sum(power, 1), 1)
    return level, in_range, place, cells, sizes_of_level, steps, weight
