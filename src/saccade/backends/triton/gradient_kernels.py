"""The GPU kernels of the backward, in Triton: gradients of points and weights, and of the value.

As in the forward (`kernels.py`) there are two that compute the same: `differentiate_queries` walks over
the points of a block of queries, `differentiate_points` takes all points of a few queries at once. Both
read the rows that a point reads, once: their dot products with the gradient of the output are all that
the gradients of location and weight are made of.

The gradient of the value is either added up by atomic operations (`VALUE_GRADIENT="add"`), or each
point leaves its cell, as a key, and its weight and shares, as a record, for the kernels that add up in order
(`"sort"`, `sorted_kernels.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.backends.triton.kernels import (
    begin,
    first_channel_of_part,
    read,
    references_of_query,
    rows_of_head,
)
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
from saccade.backends.triton.points_reversed import (
    fields_of_record,
    first_key_of_head,
    gradients_of_points,
    of_offset,
    softmax_gradients,
    store_points,
    store_record,
)


@triton.jit
def _corner_products(sums, rows, grad_rows, given, first_channel, channels, cells, sizes_of_level,
                     weight, words, ROW: tl.constexpr, GRAD_ROW: tl.constexpr,
                     MASKED: tl.constexpr, PAIRS: tl.constexpr, LINEAR: tl.constexpr,
                     WIDE: tl.constexpr, DOTS: tl.constexpr, ADD: tl.constexpr,
                     WHOLE: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """`sums` and, for each corner, the products of `given` and the row there, channel by channel; of a
    WHOLE row, their sum at once, which leaves registers to the next corner.

    `given` are the numbers of the gradient of the output that belong to `channels`, as `read`. With ADD
    they are also added, weighted, to the rows of `grad_rows`. A corner outside is neither read nor written.
    """
    row = lower_row(cells, sizes_of_level, WIDE)
    first = rows + (row * ROW + first_channel)
    first_number = 2 * first_channel if PAIRS else first_channel
    grad_first = grad_rows + (row * GRAD_ROW + first_number)
    products = ()
    for corner in tl.static_range(2 ** len(cells) if LINEAR else 1):
        inside, address, share = corner_of_cells(first, cells, sizes_of_level, corner, ROW, WIDE)
        in_map = tl.expand_dims(inside, -1)
        if DOTS:
            mask = in_map
            if MASKED:
                mask = mask & (tl.expand_dims(first_channel, -1) + channels < words)
            numbers = read(tl.expand_dims(address, -1) + channels, mask, PAIRS, dtype)
            if WHOLE:
                product = given[0] * numbers[0]
            else:
                product = tl.fma(given[0], numbers[0], sums[corner])
            if PAIRS:
                product = tl.fma(given[1], numbers[1], product)
            if WHOLE:
                product = tl.sum(product, len(product.shape) - 1)
            products = products + (product,)
        if ADD:
            inside, address, share = corner_of_cells(
                grad_first, cells, sizes_of_level, corner, GRAD_ROW, WIDE
            )
            amount = tl.expand_dims(share * weight if LINEAR else weight, -1)
            if PAIRS:
                numbers_of_row = 2 * words
                amounts = tl.interleave(amount * given[0], amount * given[1])
                places = tl.arange(0, 2 * channels.shape[0])
            else:
                numbers_of_row = words
                amounts = amount * given[0]
                places = channels
            mask = in_map
            if MASKED:
                mask = mask & (tl.expand_dims(first_number, -1) + places < numbers_of_row)
            tl.atomic_add(tl.expand_dims(address, -1) + places, amounts, mask=mask, sem="relaxed")
    return products


@triton.jit
def _rows_of_program(value, grad_value, grad_output, map_, query, head, num_positions,
                     VALUE_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                     WORDS: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Where a program's rows begin: of the value, of its gradient, of the output's gradient."""
    rows = rows_of_head(value, map_, head, num_positions, VALUE_HEADS * WORDS, WORDS, PAIRS)
    grad_rows = rows_of_head(
        grad_value, map_, head, num_positions, VALUE_HEADS * HEAD_DIM, HEAD_DIM, False
    )
    given_rows = rows_of_head(grad_output, query, head, 1, HEADS * WORDS, WORDS, PAIRS)
    return rows, grad_rows, given_rows


@triton.jit(do_not_specialize=("num_queries", "num_blocks", "num_positions", "first_map",
                               "first_query", "num_keys"))  # fmt: skip
def differentiate_queries(
    grad_value, grad_points, grad_weights, grad_logits, grad_locations, keys, records,
    grad_output, value, points, weights, references, sizes,
    num_queries, num_blocks, num_positions, first_map, first_query, num_keys,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    LEVEL_POINTS: tl.constexpr, POINTS: tl.constexpr, HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    INTERPOLATION: tl.constexpr, PADDING: tl.constexpr, COORDINATES: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
    PARTS: tl.constexpr, TOGETHER: tl.constexpr, SLICES: tl.constexpr,
    VALUE_GRADIENT: tl.constexpr, GRAD_POINTS: tl.constexpr, GRAD_WEIGHTS: tl.constexpr,
    GRAD_LOCATIONS: tl.constexpr,
):  # fmt: skip
    """A block of QUERIES queries of one head, point after point; rows in PARTS of CHANNELS words, of
    wider ones slice after slice.
    """
    dtype: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    LINEAR: tl.constexpr = INTERPOLATION == "linear"
    CORNERS: tl.constexpr = 2**AXES if LINEAR else 1
    DOTS: tl.constexpr = GRAD_POINTS or GRAD_WEIGHTS or GRAD_LOCATIONS
    WORDS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    SLICE: tl.constexpr = PARTS * CHANNELS
    item, head, _slice, query, remaining = begin(
        num_queries, num_blocks, first_query, HEADS, 1, QUERIES
    )
    look = query * HEADS + head
    points += look * POINTS * AXES
    weights += look * POINTS
    grad_points += look * POINTS * AXES
    grad_weights += look * POINTS
    grad_logits += look * POINTS
    grad_locations += look * POINTS * AXES
    keys += look * POINTS
    records += look * POINTS * fields_of_record(AXES)
    references = references_of_query(references, query, KIND, NUM_REFERENCES, AXES)
    map_ = first_map + item
    rows, grad_rows, given_rows = _rows_of_program(
        value, grad_value, grad_output, map_, query, head, num_positions, VALUE_HEADS, HEADS,
        HEAD_DIM, WORDS, PAIRS
    )  # fmt: skip
    first_key = tl.full((), 0, tl.int64)
    if VALUE_GRADIENT == "sort":
        first_key = first_key_of_head(map_, head, sizes, VALUE_HEADS, AXES, LEVELS)

    local = tl.arange(0, QUERIES)
    in_range = local < remaining
    if WIDE:
        local = local.to(tl.int64)
    softmax = ()
    if KIND != "given":
        softmax = softmax_terms(weights, local * HEADS * POINTS, in_range, POINTS, QUERIES, dtype)
    channels = tl.arange(0, CHANNELS)
    in_block = tl.expand_dims(in_range, -1)
    given_of_query = given_rows + local * (HEADS * WORDS)
    given_parts = ()
    if SLICES == 1:
        for part in tl.static_range(PARTS):
            first = first_channel_of_part(local, part, CHANNELS, PARTS)
            given_mask = in_block & (tl.expand_dims(first, -1) + channels < WORDS)
            given_parts = given_parts + (
                read(
                    tl.expand_dims(given_of_query + first, -1) + channels, given_mask, PAIRS, dtype
                ),
            )
    first_point = 0
    for level in range(LEVELS):
        points_of_level = entry(LEVEL_POINTS, level, LEVELS)
        for group in range(0, points_of_level, TOGETHER):
            for member in tl.static_range(TOGETHER):
                point = first_point + group + member
                place, cells, sizes_of_level, steps, weight = point_of_queries(
                    points, weights, references, local, point, in_range, sizes, level,
                    points_of_level, softmax, KIND, REFERENCE_INDEX, NUM_REFERENCES, COORDINATES,
                    PADDING, INTERPOLATION, POINTS, HEADS, AXES, LEVELS, dtype
                )  # fmt: skip
                products = ()
                for _corner in tl.static_range(CORNERS):
                    products = products + (tl.zeros((QUERIES, CHANNELS), dtype),)
                for slice_ in range(SLICES):
                    for part in tl.static_range(PARTS):
                        first = first_channel_of_part(local, part, CHANNELS, PARTS)
                        if SLICES == 1:
                            given = given_parts[part]
                        else:
                            first += slice_ * SLICE
                            given_mask = in_block & (tl.expand_dims(first, -1) + channels < WORDS)
                            given = read(
                                tl.expand_dims(given_of_query + first, -1) + channels,
                                given_mask, PAIRS, dtype
                            )  # fmt: skip
                        if DOTS or VALUE_GRADIENT == "add":
                            added = _corner_products(
                                products, rows, grad_rows, given, first, channels, cells,
                                sizes_of_level, weight, WORDS, VALUE_HEADS * WORDS,
                                VALUE_HEADS * HEAD_DIM, SLICES * SLICE > WORDS, PAIRS, LINEAR,
                                WIDE, DOTS, VALUE_GRADIENT == "add", False, dtype
                            )  # fmt: skip
                            if DOTS:
                                products = added
                if DOTS:
                    dots = ()
                    for corner in tl.static_range(CORNERS):
                        dots = dots + (tl.sum(products[corner], 1),)
                    grad_weight, grad_location = gradients_of_points(
                        dots, cells, sizes_of_level, weight, LINEAR
                    )
                    if GRAD_WEIGHTS:
                        number = grad_weight.to(grad_weights.dtype.element_ty)
                        tl.store(grad_weights + place, number, mask=in_range)
                    if GRAD_LOCATIONS:
                        store_points(grad_locations, place, grad_location, in_range)
                    if GRAD_POINTS:
                        if KIND != "given":
                            grad_location = of_offset(grad_location, steps)
                        store_points(grad_points, place, grad_location, in_range)
                if VALUE_GRADIENT == "sort":
                    store_record(
                        keys, records, place, cells, sizes_of_level, weight, first_key, num_keys,
                        in_range, LINEAR
                    )  # fmt: skip
        first_point += points_of_level
        positions = cells_of_level(sizes, level, 0, AXES, LEVELS)
        rows += positions * VALUE_HEADS * WORDS
        grad_rows += positions * VALUE_HEADS * HEAD_DIM
        first_key += cells_of_level(sizes, level, 1, AXES, LEVELS)

    if KIND != "given" and GRAD_WEIGHTS:
        # What threads of this program have stored, others of it read.
        tl.debug_barrier()
        softmax_gradients(
            grad_logits, grad_weights, weights, local * HEADS * POINTS, in_range, softmax, POINTS,
            QUERIES, dtype
        )  # fmt: skip


@triton.jit(do_not_specialize=("num_queries", "num_blocks", "num_positions", "first_map",
                               "first_query", "num_keys"))  # fmt: skip
def differentiate_points(
    grad_value, grad_points, grad_weights, grad_logits, grad_locations, keys, records,
    grad_output, value, points, weights, references, sizes,
    num_queries, num_blocks, num_positions, first_map, first_query, num_keys,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    POINTS: tl.constexpr, HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    INTERPOLATION: tl.constexpr, PADDING: tl.constexpr, COORDINATES: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
    LEVEL_OF_POINT: tl.constexpr, POINTS_OF_POINT: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_GRADIENT: tl.constexpr, GRAD_POINTS: tl.constexpr, GRAD_WEIGHTS: tl.constexpr,
    GRAD_LOCATIONS: tl.constexpr,
):  # fmt: skip
    """All points of QUERIES queries of one head at once; BLOCK is a power of two that holds them."""
    dtype: tl.constexpr = tl.float64 if value.dtype.element_ty == tl.float64 else tl.float32
    LINEAR: tl.constexpr = INTERPOLATION == "linear"
    DOTS: tl.constexpr = GRAD_POINTS or GRAD_WEIGHTS or GRAD_LOCATIONS
    WORDS: tl.constexpr = HEAD_DIM // 2 if PAIRS else HEAD_DIM
    item, head, _slice, query, remaining = begin(
        num_queries, num_blocks, first_query, HEADS, 1, QUERIES
    )
    look = query * HEADS + head
    points += look * POINTS * AXES
    weights += look * POINTS
    grad_points += look * POINTS * AXES
    grad_weights += look * POINTS
    grad_logits += look * POINTS
    grad_locations += look * POINTS * AXES
    keys += look * POINTS
    records += look * POINTS * fields_of_record(AXES)
    references = references_of_query(references, query, KIND, NUM_REFERENCES, AXES)
    map_ = first_map + item
    rows, grad_rows, given_rows = _rows_of_program(
        value, grad_value, grad_output, map_, query, head, num_positions, VALUE_HEADS, HEADS,
        HEAD_DIM, WORDS, PAIRS
    )  # fmt: skip

    local = tl.arange(0, QUERIES)
    in_block = local < remaining
    if WIDE:
        local = local.to(tl.int64)
    level, in_range, place, cells, sizes_of_level, steps, weight = points_of_queries(
        points, weights, references, local, in_block, sizes, KIND, REFERENCE_INDEX, NUM_REFERENCES,
        LEVEL_OF_POINT, POINTS_OF_POINT, COORDINATES, PADDING, INTERPOLATION, POINTS, HEADS, AXES,
        LEVELS, BLOCK, dtype
    )  # fmt: skip

    if DOTS or VALUE_GRADIENT == "add":
        channels = tl.arange(0, CHANNELS)
        given_of_query = tl.expand_dims(
            tl.expand_dims(given_rows + local * (HEADS * WORDS), -1), -1
        )
        given_mask = tl.expand_dims(tl.expand_dims(in_block, -1), -1) & (channels < WORDS)
        given = read(given_of_query + channels, given_mask, PAIRS, dtype)
        first_row = cells_before(sizes, level, 0, AXES, LEVELS)
        dots = _corner_products(
            (), rows + first_row * (VALUE_HEADS * WORDS),
            grad_rows + first_row * (VALUE_HEADS * HEAD_DIM), given,
            tl.zeros((BLOCK,), tl.int32), channels, cells, sizes_of_level, weight, WORDS,
            VALUE_HEADS * WORDS, VALUE_HEADS * HEAD_DIM, CHANNELS > WORDS, PAIRS, LINEAR, WIDE,
            DOTS, VALUE_GRADIENT == "add", True, dtype
        )  # fmt: skip
    if DOTS:
        grad_weight, grad_location = gradients_of_points(
            dots, cells, sizes_of_level, weight, LINEAR
        )
        if GRAD_LOCATIONS:
            store_points(grad_locations, place, grad_location, in_range)
        if GRAD_POINTS:
            if KIND != "given":
                grad_location = of_offset(grad_location, steps)
            store_points(grad_points, place, grad_location, in_range)
        if GRAD_WEIGHTS:
            if KIND == "given":
                target = grad_weights
            else:
                target = grad_logits
                contribution = weight * grad_weight
                grad_weight = contribution - weight * tl.expand_dims(tl.sum(contribution, 1), 1)
            number = grad_weight.to(target.dtype.element_ty)
            tl.store(target + place, number, mask=in_range)
    if VALUE_GRADIENT == "sort":
        first_key = first_key_of_head(map_, head, sizes, VALUE_HEADS, AXES, LEVELS)
        store_record(
            keys, records, place, cells, sizes_of_level, weight, first_key + cells_before(
                sizes, level, 1, AXES, LEVELS
            ), num_keys, in_range, LINEAR
        )  # fmt: skip
