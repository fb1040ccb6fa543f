"""The GPU kernels, in Triton: the operator forward, with points given or made from offsets.

Two kernels compute the same. `attend_queries` walks over the points of a block of queries: for many
queries. `attend_points` reads all points of a few queries at once: where there are too few queries to
fill a card, more loads have to be under way for each.

Both are made of the house's two stages: *points* (`points.py`), then *blend* (`_sampled`), rows times
weights. Multiplications and additions are never fused by the compiler: `enable_fp_fusion` is off at each
launch, because the definition rounds a position twice. Where fusing is wanted it is written: `tl.fma`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.backends.triton.points import (
    cells_before,
    cells_of_level,
    corner_of_cells,
    entry,
    lower_row,
    point_of_queries,
    points_of_queries,
    softmax_terms,
)


@triton.jit
def read(address, mask, PAIRS: tl.constexpr, dtype: tl.constexpr):
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
def _sampled(rows, first_channel, channels, cells, sizes_of_level, words, ROW: tl.constexpr,
             MASKED: tl.constexpr, PAIRS: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
             dtype: tl.constexpr):  # fmt: skip
    """z(p): rows of the value around each point, blended. `rows` points to a level, for each point
    of the shape [...] of `cells`, or for all; of each row are read `channels` from `first_channel` on.
    The result is a tuple of [..., channels], as `read`.

    A corner outside the map is not read and counts as 0. The sum is complete before the attention
    weight comes in, as in the definition: an infinite weight is no matter of single corners.
    """
    first = rows + (lower_row(cells, sizes_of_level, WIDE) * ROW + first_channel)
    blended = ()
    for corner in tl.static_range(2 ** len(cells) if LINEAR else 1):
        inside, address, weight = corner_of_cells(first, cells, sizes_of_level, corner, ROW, WIDE)
        mask = tl.expand_dims(inside, -1)
        if MASKED:
            mask = mask & (tl.expand_dims(first_channel, -1) + channels < words)
        numbers = read(tl.expand_dims(address, -1) + channels, mask, PAIRS, dtype)
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
def begin(num_queries, num_blocks, first_query, HEADS: tl.constexpr, SLICES: tl.constexpr,
          QUERIES: tl.constexpr):  # fmt: skip
    """What this program works on: the batch item, the head, the slice of a row, the first query of all
    and how many of them.
    """
    program = tl.program_id(0)
    block = (program % num_blocks).to(tl.int64)
    slice_ = program // num_blocks % SLICES
    head = program // num_blocks // SLICES % HEADS
    item = (program // num_blocks // SLICES // HEADS).to(tl.int64)
    remaining = tl.minimum(num_queries - block * QUERIES, QUERIES).to(tl.int32)
    query = first_query + item * num_queries + block * QUERIES
    return item, head, slice_, query, remaining


@triton.jit
def rows_of_head(value, map_, head, num_positions, ROW: tl.constexpr, WORDS: tl.constexpr,
                 PAIRS: tl.constexpr):  # fmt: skip
    """Where the rows of a head begin in a map; one head of the value serves all."""
    if PAIRS:
        value = value.to(tl.pointer_type(tl.int32))
    rows = value + map_ * num_positions * ROW
    if ROW > WORDS:
        rows += head * WORDS
    return rows


@triton.jit
def references_of_query(references, query, KIND: tl.constexpr, NUM_REFERENCES: tl.constexpr,
                        AXES: tl.constexpr):  # fmt: skip
    """Where the reference points of a query begin."""
    if KIND != "given":
        references += query * NUM_REFERENCES * (2 * AXES if KIND == "boxes" else AXES)
    return references


@triton.jit(do_not_specialize=("num_queries", "num_blocks", "num_positions", "first_map",
                               "first_query"))  # fmt: skip
def attend_queries(
    output, value, points, weights, references, sizes, num_queries, num_blocks, num_positions,
    first_map, first_query,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    LEVEL_POINTS: tl.constexpr, POINTS: tl.constexpr, HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    INTERPOLATION: tl.constexpr, PADDING: tl.constexpr, COORDINATES: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
    PARTS: tl.constexpr, TOGETHER: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A block of QUERIES queries of one head, point after point; rows in PARTS of CHANNELS words.

    Of rows that are wider, in SLICES, a program takes one slice.
    """
    dtype: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    WORDS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    ROW: tl.constexpr = VALUE_HEADS * WORDS
    item, head, slice_, query, remaining = begin(
        num_queries, num_blocks, first_query, HEADS, SLICES, QUERIES
    )
    look = query * HEADS + head
    output += look * HEAD_DIM
    points += look * POINTS * AXES
    weights += look * POINTS
    references = references_of_query(references, query, KIND, NUM_REFERENCES, AXES)
    rows = rows_of_head(value, first_map + item, head, num_positions, ROW, WORDS, PAIRS)
    SLICE: tl.constexpr = PARTS * CHANNELS
    words = WORDS
    if SLICES > 1:
        rows += slice_ * SLICE
        output += slice_ * (SLICE * 2 if PAIRS else SLICE)
        words = WORDS - slice_ * SLICE

    local = tl.arange(0, QUERIES)
    in_range = local < remaining
    if WIDE:
        local = local.to(tl.int64)
    softmax = ()
    if KIND != "given":
        softmax = softmax_terms(weights, local * HEADS * POINTS, in_range, POINTS, QUERIES, dtype)
    channels = tl.arange(0, CHANNELS)
    sums = ()
    for _ in tl.static_range(PARTS * (2 if PAIRS else 1)):
        sums = sums + (tl.zeros((QUERIES, CHANNELS), dtype),)
    first_point = 0
    for level in range(LEVELS):
        points_of_level = entry(LEVEL_POINTS, level, LEVELS)
        for group in range(0, points_of_level, TOGETHER):
            for member in tl.static_range(TOGETHER):
                point = first_point + group + member
                _place, cells, sizes_of_level, _steps, weight = point_of_queries(
                    points, weights, references, local, point, in_range, sizes, level,
                    points_of_level, softmax, KIND, REFERENCE_INDEX, NUM_REFERENCES, COORDINATES,
                    PADDING, INTERPOLATION, POINTS, HEADS, AXES, LEVELS, dtype
                )  # fmt: skip
                sampled = ()
                for part in tl.static_range(PARTS):
                    sampled = sampled + _sampled(
                        rows, first_channel_of_part(local, part, CHANNELS, PARTS), channels, cells,
                        sizes_of_level, words, ROW, SLICES * SLICE > WORDS, PAIRS,
                        INTERPOLATION == "linear", WIDE, dtype
                    )  # fmt: skip
                sums = _added(sums, tl.expand_dims(weight, -1), sampled)
        first_point += points_of_level
        rows += cells_of_level(sizes, level, 0, AXES, LEVELS) * ROW

    _store(output, local, in_range, sums, words, HEADS * HEAD_DIM, CHANNELS, PARTS, PAIRS)


@triton.jit
def first_channel_of_part(query, part: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Where a part of a row begins: in another order for each query.

    Threads side by side read the rows of neighbouring queries, and the same place of two cache lines
    may not be had at once.
    """
    return ((query % PARTS) ^ part) * CHANNELS


@triton.jit
def _store(output, query, in_range, sums, words, ROW: tl.constexpr, CHANNELS: tl.constexpr,
           PARTS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """The sums of each query, in the dtype of the output; `words` of them, where there are so many."""
    row = tl.expand_dims(output + query * ROW, -1)
    numbers_of_row = 2 * words if PAIRS else words
    for part in tl.static_range(PARTS):
        first = tl.expand_dims(first_channel_of_part(query, part, CHANNELS, PARTS), -1)
        if PAIRS:
            numbers = tl.interleave(sums[2 * part], sums[2 * part + 1])
            channels = 2 * first + tl.arange(0, 2 * CHANNELS)
        else:
            numbers = sums[part]
            channels = first + tl.arange(0, CHANNELS)
        mask = tl.expand_dims(in_range, -1) & (channels < numbers_of_row)
        tl.store(row + channels, numbers.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("num_queries", "num_blocks", "num_positions", "first_map",
                               "first_query"))  # fmt: skip
def attend_points(
    output, value, points, weights, references, sizes, num_queries, num_blocks, num_positions,
    first_map, first_query,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    POINTS: tl.constexpr, HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    INTERPOLATION: tl.constexpr, PADDING: tl.constexpr, COORDINATES: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
    LEVEL_OF_POINT: tl.constexpr, POINTS_OF_POINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All points of QUERIES queries of one head at once; BLOCK is a power of two that holds them."""
    dtype: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    WORDS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    ROW: tl.constexpr = VALUE_HEADS * WORDS
    item, head, _slice, query, remaining = begin(
        num_queries, num_blocks, first_query, HEADS, 1, QUERIES
    )
    look = query * HEADS + head
    output += look * HEAD_DIM
    points += look * POINTS * AXES
    weights += look * POINTS
    references = references_of_query(references, query, KIND, NUM_REFERENCES, AXES)
    rows = rows_of_head(value, first_map + item, head, num_positions, ROW, WORDS, PAIRS)

    local = tl.arange(0, QUERIES)
    in_block = local < remaining
    if WIDE:
        local = local.to(tl.int64)
    level, _in_range, _place, cells, sizes_of_level, _steps, weight = points_of_queries(
        points, weights, references, local, in_block, sizes, KIND, REFERENCE_INDEX, NUM_REFERENCES,
        LEVEL_OF_POINT, POINTS_OF_POINT, COORDINATES, PADDING, INTERPOLATION, POINTS, HEADS, AXES,
        LEVELS, BLOCK, dtype
    )  # fmt: skip
    first_row = cells_before(sizes, level, 0, AXES, LEVELS)
    sampled = _sampled(
        rows + first_row * ROW, tl.zeros((BLOCK,), tl.int32), tl.arange(0, CHANNELS), cells,
        sizes_of_level, WORDS, ROW, CHANNELS > WORDS, PAIRS, INTERPOLATION == "linear", WIDE, dtype
    )  # fmt: skip
    sums = ()
    for part in tl.static_range(len(sampled)):
        sums = sums + (tl.sum(tl.expand_dims(weight, -1) * sampled[part], 1),)
    _store(output, local, in_block, sums, WORDS, HEADS * HEAD_DIM, CHANNELS, 1, PAIRS)
