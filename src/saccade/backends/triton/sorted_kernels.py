"""The GPU kernels that sum up the gradient of the value in an order that is always the same.

The points come sorted by the cell that they lie in (`sorting.py`). The points of a cell, LENGTH at a time,
are a piece; `sum_pieces` sums for each piece what goes to each of the cell's corners, in registers and point
after point; `sum_rows` sums for each row of the value the pieces of the 2^N cells that it is a corner of. Every
row is written once, nothing is added up in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.backends.triton.points import cells_before, cells_of_level, level_size
from saccade.backends.triton.points_reversed import cells_of_all_levels, fields_of_record


@triton.jit(do_not_specialize=("num_pieces", "num_keys"))
def sum_pieces(
    sums, grad_output, records, order, first_points, first_pieces, cell_of_piece,
    num_pieces, num_keys,
    POINTS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, CORNERS: tl.constexpr,
    LENGTH: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """For PIECES pieces the sums [CORNERS, HEAD_DIM] of their points, in SLICES of CHANNELS numbers."""
    dtype: tl.constexpr = sums.dtype.element_ty
    FIELDS: tl.constexpr = fields_of_record(AXES)
    program = tl.program_id(0)
    piece = (program // SLICES).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    channel = (program % SLICES) * CHANNELS + tl.arange(0, CHANNELS)
    in_row = channel < HEAD_DIM
    cell = tl.load(cell_of_piece + piece, mask=piece < num_pieces, other=num_keys)
    there = cell < num_keys
    number = piece - tl.load(first_pieces + cell, mask=there, other=0)
    begin = tl.load(first_points + cell, mask=there, other=0) + number * LENGTH
    end = tl.load(first_points + cell + 1, mask=there, other=0)
    count = tl.where(there, tl.minimum(end - begin, LENGTH), 0).to(tl.int32)

    totals = ()
    for _corner in tl.static_range(CORNERS):
        totals = totals + (tl.zeros((PIECES, CHANNELS), dtype),)
    for step in range(0, tl.max(count, 0)):
        in_piece = step < count
        sample = tl.load(order + begin + step, mask=in_piece, other=0)
        mask = tl.expand_dims(in_piece, -1)
        record = tl.expand_dims(records + sample * FIELDS, -1) + tl.arange(0, 2)
        weight, x = tl.split(tl.load(record, mask=mask, other=0))
        upper = (x,)
        if AXES > 1:
            y, z = tl.split(tl.load(record + 2, mask=mask, other=0))
            upper = (x, y, z)
        row = tl.expand_dims(grad_output + sample // POINTS * HEAD_DIM, -1) + channel
        given = tl.load(row, mask=mask & in_row, other=0).to(dtype)
        added = ()
        for corner in tl.static_range(CORNERS):
            amount = weight
            if CORNERS > 1:
                share = upper[0] if corner % 2 == 1 else 1 - upper[0]
                for axis in tl.static_range(1, AXES):
                    share *= upper[axis] if (corner >> axis) % 2 == 1 else 1 - upper[axis]
                amount = share * weight
            added = added + (tl.fma(tl.expand_dims(amount, -1), given, totals[corner]),)
        totals = added
    for corner in tl.static_range(CORNERS):
        target = tl.expand_dims(sums + (piece * CORNERS + corner) * HEAD_DIM, -1) + channel
        tl.store(target, totals[corner], mask=tl.expand_dims(there, -1) & in_row)


@triton.jit(do_not_specialize=("num_rows", "num_positions"))
def sum_rows(
    grad_value, sums, first_pieces, sizes, num_rows, num_positions,
    VALUE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, LEVELS: tl.constexpr,
    CORNERS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the gradient of the value, [maps, positions, VALUE_HEADS], of the pieces around each."""
    dtype: tl.constexpr = sums.dtype.element_ty
    program = tl.program_id(0)
    row = (program // SLICES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = (program % SLICES) * CHANNELS + tl.arange(0, CHANNELS)
    in_row = channel < HEAD_DIM
    there = row < num_rows
    map_and_head = row // VALUE_HEADS // num_positions * VALUE_HEADS + row % VALUE_HEADS
    position = row // VALUE_HEADS % num_positions
    level = tl.zeros((ROWS,), tl.int32)
    end = tl.full((), 0, tl.int64)
    for other in tl.static_range(LEVELS - 1):
        end += cells_of_level(sizes, other, 0, AXES, LEVELS)
        level = tl.where(position >= end, other + 1, level)
    first_key = map_and_head * cells_of_all_levels(sizes, AXES, LEVELS)
    first_key += cells_before(sizes, level, 1, AXES, LEVELS)
    rest = position - cells_before(sizes, level, 0, AXES, LEVELS)
    # The cell of which this row is the lower corner, with a margin of one before each axis.
    key = tl.zeros((ROWS,), tl.int64)
    steps = ()
    step = tl.full((ROWS,), 1, tl.int64)
    for axis in tl.static_range(AXES):
        size = level_size(sizes, level, axis, AXES, LEVELS)
        key += (rest % size + 1) * step
        rest = rest // size
        steps = steps + (step,)
        step = step * (size + 1)

    total = tl.zeros((ROWS, CHANNELS), dtype)
    for corner in tl.static_range(CORNERS):
        cell = first_key + key
        for axis in tl.static_range(AXES):
            if (corner >> axis) % 2 == 1:
                cell -= steps[axis]
        begin = tl.load(first_pieces + cell, mask=there, other=0)
        count = (tl.load(first_pieces + cell + 1, mask=there, other=0) - begin).to(tl.int32)
        for number in range(0, tl.max(count, 0)):
            piece = tl.expand_dims(sums + ((begin + number) * CORNERS + corner) * HEAD_DIM, -1)
            mask = tl.expand_dims(number < count, -1) & in_row
            total += tl.load(piece + channel, mask=mask, other=0)
    target = tl.expand_dims(grad_value + row * HEAD_DIM, -1) + channel
    tl.store(target, total.to(grad_value.dtype.element_ty), mask=tl.expand_dims(there, -1) & in_row)
