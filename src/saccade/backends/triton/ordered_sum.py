"""The gradient of the value, summed up in an order that is always the same.

    grad_value[row] = sum over the 2^N cells around the row, over the pieces of a cell, and over the
                      points of a piece, each in order, of weight[point] * weight[corner] * g[pair of the point]

The points are sorted by the cell that they lie in, stably, so that those of a cell keep the order that they come
in. Up to PIECE_POINTS points of a cell are a piece. `sum_pieces_kernel` sums for each piece what goes to each of
the cell's corners, in registers and point after point; `sum_rows_kernel` sums for each row of the value the
pieces of the cells that it is a corner of. Every row is written once, nothing is added up in memory.

Everything stays on the card: upper bounds that are known beforehand stand for counts that only the card knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.backends.triton.plan import Constants, Kernel, PieceConstants, RowConstants
from saccade.backends.triton.rule import level_size, level_start, num_cells
from saccade.backends.triton.rule_backward import num_level_cells, record_fields


@triton.jit(do_not_specialize=("num_pieces", "num_keys"))
def sum_pieces_kernel(
    sums,  # [pieces, NUM_CORNERS, HEAD_DIM], float32 or float64
    grad_output,  # [pairs, HEAD_DIM]
    records,  # [points, record_fields]
    order,  # [points], the indices of the points, sorted by cell
    first_points,  # [cells + 1], the index in `order` of each cell's first point
    first_pieces,  # [cells + 1], the index of each cell's first piece
    piece_cell,  # [pieces]
    num_pieces, num_keys,
    C: tl.constexpr,
):  # fmt: skip
    """BLOCK_PIECES pieces, and BLOCK_CHANNELS channels of their rows. `C` is `plan.PieceConstants`."""
    dtype: tl.constexpr = sums.dtype.element_ty
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    NUM_CORNERS: tl.constexpr = C.NUM_CORNERS
    BLOCK_PIECES: tl.constexpr = C.BLOCK_PIECES
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    FIELDS: tl.constexpr = record_fields(SPATIAL_DIMS)
    pid = tl.program_id(0)
    piece = (pid // C.NUM_SLICES).to(tl.int64) * BLOCK_PIECES + tl.arange(0, BLOCK_PIECES)
    channels = (pid % C.NUM_SLICES) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_row = channels < C.HEAD_DIM  # [BLOCK_CHANNELS]
    cell = tl.load(piece_cell + piece, mask=piece < num_pieces, other=num_keys)  # [BLOCK_PIECES]
    exists = cell < num_keys  # [BLOCK_PIECES]
    first_piece = tl.load(first_pieces + cell, mask=exists, other=0)  # [BLOCK_PIECES]
    index = piece - first_piece  # [BLOCK_PIECES], in the cell
    begin = tl.load(first_points + cell, mask=exists, other=0) + index * C.PIECE_POINTS
    end = tl.load(first_points + cell + 1, mask=exists, other=0)
    count = tl.where(exists, tl.minimum(end - begin, C.PIECE_POINTS), 0).to(tl.int32)

    totals = ()  # of [BLOCK_PIECES, BLOCK_CHANNELS]
    for _corner in tl.static_range(NUM_CORNERS):
        totals = totals + (tl.zeros((BLOCK_PIECES, BLOCK_CHANNELS), dtype),)
    for step in range(0, tl.max(count, 0)):
        in_piece = step < count  # [BLOCK_PIECES]
        point = tl.load(order + begin + step, mask=in_piece, other=0)  # [BLOCK_PIECES]
        mask = tl.expand_dims(in_piece, -1)  # [BLOCK_PIECES, 1]
        record = tl.expand_dims(records + point * FIELDS, -1) + tl.arange(0, 2)
        weight, x = tl.split(tl.load(record, mask=mask, other=0))  # [BLOCK_PIECES]
        fraction = (x,)
        if SPATIAL_DIMS > 1:
            y, z = tl.split(tl.load(record + 2, mask=mask, other=0))  # [BLOCK_PIECES]
            fraction = (x, y, z)
        row = tl.expand_dims(grad_output + point // C.NUM_POINTS * C.HEAD_DIM, -1) + channels
        grad = tl.load(row, mask=mask & in_row, other=0).to(dtype)  # [BLOCK_PIECES, BLOCK_CHANNELS]
        added = ()
        for corner in tl.static_range(NUM_CORNERS):
            amount = weight  # [BLOCK_PIECES]
            if NUM_CORNERS > 1:
                share = fraction[0] if corner % 2 == 1 else 1 - fraction[0]
                for axis in tl.static_range(1, SPATIAL_DIMS):
                    share *= fraction[axis] if (corner >> axis) % 2 == 1 else 1 - fraction[axis]
                amount = share * weight
            added = added + (tl.fma(tl.expand_dims(amount, -1), grad, totals[corner]),)
        totals = added
    for corner in tl.static_range(NUM_CORNERS):
        target = tl.expand_dims(sums + (piece * NUM_CORNERS + corner) * C.HEAD_DIM, -1) + channels
        tl.store(target, totals[corner], mask=tl.expand_dims(exists, -1) & in_row)


@triton.jit(do_not_specialize=("num_rows", "num_positions"))
def sum_rows_kernel(
    grad_value,  # [B, S, VALUE_HEADS, HEAD_DIM]
    sums,  # [pieces, NUM_CORNERS, HEAD_DIM]
    first_pieces,  # [cells + 1]
    sizes, num_rows, num_positions,
    C: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS rows, and BLOCK_CHANNELS of their channels. `C` is `plan.RowConstants`."""
    dtype: tl.constexpr = sums.dtype.element_ty
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    NUM_LEVELS: tl.constexpr = C.NUM_LEVELS
    NUM_CORNERS: tl.constexpr = C.NUM_CORNERS
    BLOCK_ROWS: tl.constexpr = C.BLOCK_ROWS
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    pid = tl.program_id(0)
    row = (pid // C.NUM_SLICES).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channels = (pid % C.NUM_SLICES) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_row = channels < C.HEAD_DIM  # [BLOCK_CHANNELS]
    exists = row < num_rows  # [BLOCK_ROWS]
    map_and_head = row // C.VALUE_HEADS // num_positions * C.VALUE_HEADS + row % C.VALUE_HEADS
    position = row // C.VALUE_HEADS % num_positions  # [BLOCK_ROWS]
    level = tl.zeros((BLOCK_ROWS,), tl.int32)  # [BLOCK_ROWS]
    end = tl.full((), 0, tl.int64)
    for other in tl.static_range(NUM_LEVELS - 1):
        end += num_cells(sizes, other, 0, C)
        level = tl.where(position >= end, other + 1, level)
    first_key = map_and_head * num_level_cells(sizes, C)  # [BLOCK_ROWS]
    first_key += level_start(sizes, level, 1, C)
    rest = position - level_start(sizes, level, 0, C)  # [BLOCK_ROWS]
    # The cell of which this row is the lower corner, with a margin of one before each axis.
    key = tl.zeros((BLOCK_ROWS,), tl.int64)  # [BLOCK_ROWS]
    steps = ()  # of [BLOCK_ROWS]
    step = tl.full((BLOCK_ROWS,), 1, tl.int64)
    for axis in tl.static_range(SPATIAL_DIMS):
        size = level_size(sizes, level, axis, C)  # [BLOCK_ROWS]
        key += (rest % size + 1) * step
        rest = rest // size
        steps = steps + (step,)
        step = step * (size + 1)

    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype)  # [BLOCK_ROWS, BLOCK_CHANNELS]
    for corner in tl.static_range(NUM_CORNERS):
        cell = first_key + key  # [BLOCK_ROWS]
        for axis in tl.static_range(SPATIAL_DIMS):
            if (corner >> axis) % 2 == 1:
                cell -= steps[axis]
        begin = tl.load(first_pieces + cell, mask=exists, other=0)  # [BLOCK_ROWS]
        count = (tl.load(first_pieces + cell + 1, mask=exists, other=0) - begin).to(tl.int32)
        for index in range(0, tl.max(count, 0)):
            piece = tl.expand_dims(
                sums + ((begin + index) * NUM_CORNERS + corner) * C.HEAD_DIM, -1
            )  # [BLOCK_ROWS, 1]
            mask = tl.expand_dims(index < count, -1) & in_row
            total += tl.load(piece + channels, mask=mask, other=0)
    target = tl.expand_dims(grad_value + row * C.HEAD_DIM, -1) + channels
    mask = tl.expand_dims(exists, -1) & in_row
    tl.store(target, total.to(grad_value.dtype.element_ty), mask=mask)


PIECE_POINTS = 32
# Channels of a row that a program takes, and elements that it holds for each corner.
MAX_BLOCK_CHANNELS = 256
BLOCK_ELEMENTS = 512
MAX_INT32_KEYS = 2**31 - 1


class OrderedSum(NamedTuple):
    """The sum as two kernels: everything that follows from sizes and options."""

    cells_per_head: int
    """Cells of a map for each head of the value, each level with a margin of one before each axis."""
    key_dtype: torch.dtype
    """The smallest dtype that holds the number of cells of all maps of a group."""
    pieces: Kernel
    rows: Kernel

    @staticmethod
    def make(
        constants: Constants, spatial_shapes: Sequence[tuple[int, ...]], max_maps: int
    ) -> OrderedSum:
        """The sum for a call; `constants` are those of the kernel that leaves the records."""
        cells = num_margin_cells(spatial_shapes)
        max_keys = max_maps * constants.VALUE_HEADS * cells
        block_channels = min(triton.next_power_of_2(constants.HEAD_DIM), MAX_BLOCK_CHANNELS)
        block = max(1, BLOCK_ELEMENTS // block_channels)
        num_slices = -(-constants.HEAD_DIM // block_channels)
        return OrderedSum(
            cells,
            # The number of keys itself stands for points that take no part.
            torch.int32 if max_keys <= MAX_INT32_KEYS else torch.int64,
            Kernel(
                sum_pieces_kernel,
                PieceConstants(
                    constants.SPATIAL_DIMS,
                    constants.NUM_CORNERS,
                    constants.HEAD_DIM,
                    constants.NUM_POINTS,
                    PIECE_POINTS,
                    block,
                    block_channels,
                    num_slices,
                ),
            ),
            Kernel(
                sum_rows_kernel,
                RowConstants(
                    constants.SPATIAL_DIMS,
                    constants.NUM_CORNERS,
                    constants.HEAD_DIM,
                    constants.VALUE_HEADS,
                    constants.NUM_LEVELS,
                    block,
                    block_channels,
                    num_slices,
                ),
            ),
        )

    def num_keys(self, grad_value: Tensor) -> int:
        """The number of cells of these maps, for all heads of the value."""
        return grad_value.shape[0] * grad_value.shape[2] * self.cells_per_head

    def run(
        self,
        grad_value: Tensor,
        grad_output: Tensor,
        keys: Tensor,
        records: Tensor,
        sizes: tuple[int, ...],
    ) -> None:
        """Fills `grad_value`, that of some maps, from the keys and records of all points in them."""
        if keys.numel() == 0:
            grad_value.zero_()
            return
        num_keys = self.num_keys(grad_value)
        sorted_keys, order = torch.sort(keys, stable=True)  # [points]
        every_key = torch.arange(num_keys + 1, dtype=keys.dtype, device=keys.device)
        first_points = torch.searchsorted(sorted_keys, every_key)  # [cells + 1]
        first_pieces = torch.zeros_like(first_points)  # [cells + 1]
        num_cell_pieces = (first_points.diff() + (PIECE_POINTS - 1)) // PIECE_POINTS
        torch.cumsum(num_cell_pieces, 0, out=first_pieces[1:])
        # A cell's last piece may be short; there are no more short ones than cells, or than points.
        num_pieces = keys.numel() // PIECE_POINTS + min(num_keys, keys.numel())
        every_piece = torch.arange(num_pieces, device=keys.device)
        piece_cell = torch.searchsorted(first_pieces[1:], every_piece, right=True)  # [pieces]
        constants = self.pieces.constants
        sums = records.new_empty((num_pieces, constants.NUM_CORNERS, constants.HEAD_DIM))
        self.pieces.start(
            -(-num_pieces // constants.BLOCK_PIECES) * constants.NUM_SLICES,
            (sums, grad_output, records, order, first_points, first_pieces, piece_cell),
            None,
            (num_pieces, num_keys),
        )
        constants = self.rows.constants
        num_rows = math.prod(grad_value.shape[:3])
        self.rows.start(
            -(-num_rows // constants.BLOCK_ROWS) * constants.NUM_SLICES,
            (grad_value, sums, first_pieces),
            sizes,
            (num_rows, grad_value.shape[1]),
        )


def workspace_bytes(
    num_points: int,
    num_cells: int,
    num_corners: int,
    head_dim: int,
    spatial_dims: int,
    element_bytes: int,
) -> int:
    """Bytes that the sum takes for so many points in so many cells, beside the gradient itself."""
    record_bytes = int(record_fields(spatial_dims)) * element_bytes
    # Keys, sorted keys, and the order in 64 bits.
    point_bytes = num_points * (record_bytes + 4 + 4 + 8)
    num_pieces = num_points // PIECE_POINTS + min(num_cells, num_points)
    piece_bytes = num_pieces * (num_corners * head_dim * element_bytes + 16)
    return point_bytes + piece_bytes + num_cells * 24


def num_margin_cells(spatial_shapes: Sequence[tuple[int, ...]]) -> int:
    """Cells of a map in which a point may lie: each level has one more before each axis."""
    return sum(math.prod(size + 1 for size in shape) for shape in spatial_shapes)
