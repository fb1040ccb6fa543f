"""The GPU kernels, in Triton: the operator forward, with points given or made from offsets.

Two kernels compute the same. `attend_queries` walks over the points of a block of queries: for many
queries. `attend_points` reads all points of a few queries at once: where there are too few queries to
fill a card, more loads have to be under way for each.

Both are made of the house's two stages. *Points*: along each axis the lower cell, the fraction and
which of the two cells lie inside the map (`_axis`); all coordinates, paddings and interpolations end
there. *Blend*: rows times weights (`_sampled`).

Multiplications and additions are never fused by the compiler: `enable_fp_fusion` is off at each
launch, because the definition rounds a position twice. Where fusing is wanted it is written: `tl.fma`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _size(sizes, level, AXIS: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr):
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
def _entry(numbers: tl.constexpr, index, COUNT: tl.constexpr):
    """The entry `index` of a tuple of constants; a constant if all are the same."""
    found = numbers[0]
    for other in tl.static_range(1, COUNT):
        if numbers[other] != numbers[other - 1]:
            found = tl.where(index >= other, numbers[other], found)
    return found


@triton.jit
def _axis(location, size, last, COORDINATES: tl.constexpr, PADDING: tl.constexpr,
          INTERPOLATION: tl.constexpr):  # fmt: skip
    """The lower cell that a point reads along an axis, the share of the upper one, and whether each
    lies inside the map. `last` is where `PADDING` clamps to.

    Far outside, or not finite: the cell is -2, so that neither is inside, and the share is finite.
    """
    position = location
    if COORDINATES == "normalized":
        # Of cells counted from the edge the discrete rule rounds up what linear takes off.
        position = location * size.to(location.dtype) + (0.5 if INTERPOLATION == "discrete" else -0.5)
    else:
        if COORDINATES == "normalized_corners":
            position = location * (size - 1).to(location.dtype)
        if INTERPOLATION == "discrete":
            position = position + 1
    if PADDING == "zeros":
        # Compared before anything is converted to an integer, which has no such numbers.
        near = (position > -1) & (position < size.to(location.dtype))
    else:
        near = location - location == 0
        position = tl.minimum(tl.maximum(position, 0), last.to(location.dtype))
    position = tl.where(near, position, -2)
    floor = tl.floor(position)
    fraction = position - floor
    cell = floor.to(tl.int32)
    if INTERPOLATION == "nearest":
        # Half to even.
        cell += ((fraction > 0.5) | ((fraction == 0.5) & (cell % 2 != 0))).to(tl.int32)
    # As unsigned numbers negative ones are large.
    inside = cell.to(tl.uint32, bitcast=True) < size.to(tl.uint32)
    above_inside = (cell + 1).to(tl.uint32, bitcast=True) < size.to(tl.uint32)
    return cell, fraction, inside, above_inside


@triton.jit
def _last(sizes, level, AXIS: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
          PADDING: tl.constexpr):  # fmt: skip
    """The last pixel that a position is clamped to."""
    last = _size(sizes, level, AXIS, AXES, LEVELS)
    if PADDING == "border_height":
        last = tl.minimum(last, _size(sizes, level, 1, AXES, LEVELS))
    return last - 1


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
def _offset_step(size, points_of_level, dtype: tl.constexpr, COORDINATES: tl.constexpr,
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
def _read(address, mask, PAIRS: tl.constexpr, dtype: tl.constexpr):
    """Numbers of the value; of `PAIRS`, words of two bfloat16, the first ones and the second ones."""
    loaded = tl.load(address, mask=mask, other=0)
    if PAIRS:
        # A bfloat16 is the upper half of a float32. Apart they take an instruction each.
        even = (loaded << 16).to(tl.float32, bitcast=True)
        odd = (loaded & -65536).to(tl.float32, bitcast=True)
        found = (even, odd)
    else:
        found = (loaded.to(dtype),)
    return found


@triton.jit
def _sampled(rows, channels, cells, sizes_of_level, ROW: tl.constexpr, WORDS: tl.constexpr,
             MASKED: tl.constexpr, PAIRS: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
             dtype: tl.constexpr):  # fmt: skip
    """z(p): rows of the value around each point, blended. `rows` points to a level, for each point
    of the shape [...] of `cells`, or for all; the result is a tuple of [..., channels], as `_read`.

    A corner outside the map is not read and counts as 0. The sum is complete before the attention
    weight comes in, as in the definition: an infinite weight is no matter of single corners.
    """
    AXES: tl.constexpr = len(cells)
    row = cells[AXES - 1][0]
    for axis in tl.static_range(AXES - 2, -1, -1):
        row = row * sizes_of_level[axis] + cells[axis][0]
    if WIDE:
        row = row.to(tl.int64)
    first = rows + row * ROW
    blended = ()
    for corner in tl.static_range(2**AXES if LINEAR else 1):
        inside = cells[0][2 + corner % 2]
        address = first + (corner % 2) * ROW
        weight = cells[0][1] if corner % 2 == 1 else 1 - cells[0][1]
        for axis in tl.static_range(1, AXES):
            inside = inside & cells[axis][2 + (corner >> axis) % 2]
            weight *= cells[axis][1] if (corner >> axis) % 2 == 1 else 1 - cells[axis][1]
            if (corner >> axis) % 2 == 1:
                step = sizes_of_level[0]
                if axis == 2:
                    step = step * sizes_of_level[1]
                if WIDE:
                    step = step.to(tl.int64)
                address += step * ROW
        mask = tl.expand_dims(inside, -1)
        if MASKED:
            mask = mask & (channels < WORDS)
        numbers = _read(tl.expand_dims(address, -1) + channels, mask, PAIRS, dtype)
        weight = tl.expand_dims(weight, -1)
        if not LINEAR:
            blended = numbers
        elif corner == 0:
            blended = _scaled(numbers, weight)
        else:
            blended = _added(blended, weight, numbers)
    return blended


@triton.jit
def _scaled(numbers, weight):
    products = ()
    for part in tl.static_range(len(numbers)):
        products = products + (weight * numbers[part],)
    return products


@triton.jit
def _added(sums, weight, numbers):
    """sums + weight * numbers, rounded once."""
    added = ()
    for part in tl.static_range(len(numbers)):
        added = added + (tl.fma(weight, numbers[part], sums[part]),)
    return added


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
    """A coordinate of the location of a point, of what is given or of an offset."""
    if KIND == "given":
        location = number
    else:
        step = _offset_step(size, points_of_level, dtype, COORDINATES, KIND == "boxes")
        moved = number * step
        if KIND == "boxes":
            moved = moved * box
        location = reference + moved
    return location


@triton.jit
def _cells(points, place, references, reference, in_range, sizes, level, points_of_level,
           KIND: tl.constexpr, COORDINATES: tl.constexpr, PADDING: tl.constexpr,
           INTERPOLATION: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
           dtype: tl.constexpr):  # fmt: skip
    """Stage one for the points whose number is `place`: along each axis what `_axis` finds, and the
    sizes of the level. `reference` is the number of their reference point.
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
    for axis in tl.static_range(AXES):
        size = _size(sizes, level, axis, AXES, LEVELS)
        location = _coordinate(numbers[axis], start[axis], box[axis], size, points_of_level, KIND,
                               COORDINATES, dtype)  # fmt: skip
        last = _last(sizes, level, axis, AXES, LEVELS, PADDING)
        cells = cells + (_axis(location, size, last, COORDINATES, PADDING, INTERPOLATION),)
        sizes_of_level = sizes_of_level + (size,)
    return cells, sizes_of_level


@triton.jit
def _place(first_query, num_queries, num_blocks, HEADS: tl.constexpr, QUERIES: tl.constexpr):
    """Of this program: the map, the head, the first query, and how many there are from it on."""
    program = tl.program_id(0)
    block = (program % num_blocks).to(tl.int64)
    head = program // num_blocks % HEADS
    item = (program // num_blocks // HEADS).to(tl.int64)
    remaining = tl.minimum(num_queries - block * QUERIES, QUERIES).to(tl.int32)
    return item, head, first_query + item * num_queries + block * QUERIES, remaining


@triton.jit
def _rows(value, item, head, num_positions, ROW: tl.constexpr, WORDS: tl.constexpr,
          PAIRS: tl.constexpr):  # fmt: skip
    """The first row of a map for a head; one head serves all."""
    if PAIRS:
        value = value.to(tl.pointer_type(tl.int32))
    rows = value + item * num_positions * ROW
    if ROW > WORDS:
        rows += head * WORDS
    return rows


@triton.jit(do_not_specialize=("sizes", "num_queries", "num_blocks", "num_positions", "first_map",
                               "first_query"))  # fmt: skip
def attend_queries(
    output, value, points, weights, references, sizes, num_queries, num_blocks, num_positions,
    first_map, first_query,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    LEVEL_POINTS: tl.constexpr, POINTS: tl.constexpr, HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    INTERPOLATION: tl.constexpr, PADDING: tl.constexpr, COORDINATES: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
    PARTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A block of QUERIES queries of one head, point after point; rows in PARTS of CHANNELS words."""
    dtype: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    WORDS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    ROW: tl.constexpr = VALUE_HEADS * WORDS
    item, head, query, remaining = _place(first_query, num_queries, num_blocks, HEADS, QUERIES)
    look = query * HEADS + head
    points += look * POINTS * AXES
    weights += look * POINTS
    output += look * HEAD_DIM
    if KIND != "given":
        references += query * NUM_REFERENCES * (2 * AXES if KIND == "boxes" else AXES)
    rows = _rows(value, first_map + item, head, num_positions, ROW, WORDS, PAIRS)

    local = tl.arange(0, QUERIES)
    in_range = local < remaining
    if WIDE:
        local = local.to(tl.int64)
    if KIND != "given":
        largest, total = _softmax(weights, local * HEADS * POINTS, in_range, POINTS, QUERIES, dtype)
    channels = tl.arange(0, CHANNELS)
    sums = ()
    for _ in tl.static_range(PARTS * (2 if PAIRS else 1)):
        sums = sums + (tl.zeros((QUERIES, CHANNELS), dtype),)
    first_point = 0
    for level in range(LEVELS):
        points_of_level = _entry(LEVEL_POINTS, level, LEVELS)
        for group in range(0, points_of_level, TOGETHER):
            for member in tl.static_range(TOGETHER):
                point = first_point + group + member
                place = local * (HEADS * POINTS) + point
                reference = local * NUM_REFERENCES
                if NUM_REFERENCES > 1:
                    reference += _entry(REFERENCE_INDEX, point, POINTS)
                cells, sizes_of_level = _cells(
                    points, place, references, reference, in_range, sizes, level,
                    points_of_level, KIND, COORDINATES, PADDING, INTERPOLATION, AXES, LEVELS, dtype
                )  # fmt: skip
                weight = tl.load(weights + place, mask=in_range, other=0).to(dtype)
                if KIND != "given":
                    weight = tl.exp(weight - largest)
                sampled = ()
                for part in tl.static_range(PARTS):
                    sampled = sampled + _sampled(
                        rows, part * CHANNELS + channels, cells, sizes_of_level, ROW, WORDS,
                        PARTS * CHANNELS > WORDS, PAIRS, INTERPOLATION == "linear", WIDE, dtype
                    )  # fmt: skip
                sums = _added(sums, tl.expand_dims(weight, -1), sampled)
        first_point += points_of_level
        positions = _size(sizes, level, 0, AXES, LEVELS).to(tl.int64)
        for axis in tl.static_range(1, AXES):
            positions *= _size(sizes, level, axis, AXES, LEVELS)
        rows += positions * ROW

    if KIND != "given":
        sums = _scaled(sums, tl.expand_dims(1 / total, -1))
    _store(output, local * (HEADS * HEAD_DIM), in_range, sums, HEAD_DIM, CHANNELS, PARTS, PAIRS)


@triton.jit
def _store(output, place, in_range, sums, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
           PARTS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """The sums of each query, in the dtype of the output."""
    for part in tl.static_range(PARTS):
        if PAIRS:
            row = tl.interleave(sums[2 * part], sums[2 * part + 1])
            channels = 2 * part * CHANNELS + tl.arange(0, 2 * CHANNELS)
        else:
            row = sums[part]
            channels = part * CHANNELS + tl.arange(0, CHANNELS)
        where = tl.expand_dims(output + place, -1) + channels
        mask = tl.expand_dims(in_range, -1) & (channels < HEAD_DIM)
        tl.store(where, row.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(logits, place, in_range, POINTS: tl.constexpr, QUERIES: tl.constexpr,
             dtype: tl.constexpr):  # fmt: skip
    """The largest logit of each look, and the sum of the powers: weight = exp(logit - largest) / sum."""
    MOST: tl.constexpr = 16
    BLOCK: tl.constexpr = triton.next_power_of_2(POINTS) if POINTS < MOST else MOST
    row = tl.expand_dims(logits + place, -1)
    point = tl.arange(0, BLOCK)
    in_row = tl.expand_dims(in_range, -1)
    largest = tl.full((QUERIES,), float("-inf"), dtype)
    for first in range(0, POINTS, BLOCK):
        some = tl.load(row + (first + point), mask=in_row & (first + point < POINTS),
                       other=float("-inf")).to(dtype)  # fmt: skip
        largest = tl.maximum(largest, tl.max(some, 1))
    total = tl.zeros((QUERIES,), dtype)
    for first in range(0, POINTS, BLOCK):
        some = tl.load(row + (first + point), mask=in_row & (first + point < POINTS),
                       other=float("-inf")).to(dtype)  # fmt: skip
        total += tl.sum(tl.exp(some - tl.expand_dims(largest, -1)), 1)
    return largest, total


@triton.jit(do_not_specialize=("sizes", "num_queries", "num_blocks", "num_positions", "first_map",
                               "first_query"))  # fmt: skip
def attend_points(
    output, value, points, weights, references, sizes, num_queries, num_blocks, num_positions,
    first_map, first_query,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    LEVEL_POINTS: tl.constexpr, POINTS: tl.constexpr, HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    INTERPOLATION: tl.constexpr, PADDING: tl.constexpr, COORDINATES: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
    LEVEL_OF_POINT: tl.constexpr, POINTS_OF_POINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All points of QUERIES queries of one head at once, BLOCK of them at least."""
    dtype: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    WORDS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    ROW: tl.constexpr = VALUE_HEADS * WORDS
    item, head, query, remaining = _place(first_query, num_queries, num_blocks, HEADS, QUERIES)
    look = query * HEADS + head
    points += look * POINTS * AXES
    weights += look * POINTS
    output += look * HEAD_DIM
    if KIND != "given":
        references += query * NUM_REFERENCES * (2 * AXES if KIND == "boxes" else AXES)
    rows = _rows(value, first_map + item, head, num_positions, ROW, WORDS, PAIRS)

    point = tl.arange(0, BLOCK)
    level = tl.zeros((BLOCK,), tl.int32) + _entry(LEVEL_OF_POINT, point, POINTS)
    first_row = tl.zeros((BLOCK,), tl.int64)
    end = tl.full((), 0, tl.int64)
    for before in tl.static_range(LEVELS - 1):
        positions = tl.full((), 1, tl.int64)
        for axis in tl.static_range(AXES):
            positions *= _size(sizes, before, axis, AXES, LEVELS)
        end += positions
        first_row = tl.where(level > before, end, first_row)

    local = tl.arange(0, QUERIES)
    in_block = local < remaining
    in_range = tl.expand_dims(in_block, 1) & (point < POINTS)
    if WIDE:
        local = local.to(tl.int64)
    column = tl.expand_dims(local, 1)
    place = column * (HEADS * POINTS) + point
    reference = column * NUM_REFERENCES + tl.zeros((BLOCK,), tl.int32)
    if NUM_REFERENCES > 1:
        reference += _entry(REFERENCE_INDEX, point, POINTS)
    cells, sizes_of_level = _cells(
        points, place, references, reference, in_range, sizes, level,
        _entry(POINTS_OF_POINT, point, POINTS), KIND, COORDINATES, PADDING, INTERPOLATION, AXES,
        LEVELS, dtype
    )  # fmt: skip
    if KIND == "given":
        weight = tl.load(weights + place, mask=in_range, other=0).to(dtype)
    else:
        logit = tl.load(weights + place, mask=in_range, other=float("-inf")).to(dtype)
        power = tl.exp(logit - tl.expand_dims(tl.max(logit, 1), 1))
        weight = power * tl.expand_dims(1 / tl.sum(power, 1), 1)
    sampled = _sampled(
        rows + first_row * ROW, tl.arange(0, CHANNELS), cells, sizes_of_level, ROW, WORDS,
        CHANNELS > WORDS, PAIRS, INTERPOLATION == "linear", WIDE, dtype
    )  # fmt: skip
    sums = ()
    for part in tl.static_range(len(sampled)):
        sums = sums + (tl.sum(tl.expand_dims(weight, -1) * sampled[part], 1),)
    _store(output, local * (HEADS * HEAD_DIM), in_block, sums, HEAD_DIM, CHANNELS, 1, PAIRS)
