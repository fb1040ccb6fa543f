"""The gradient of the value, summed up in an order that is always the same.

The points are sorted by the cell that they lie in, stably, so that those of a cell keep the order that
they come in. Everything stays on the card: bounds that are known beforehand stand for numbers that only it
knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.backends.triton.launch import Prepared, options_of_launch
from saccade.backends.triton.points_reversed import fields_of_record
from saccade.backends.triton.sorted_kernels import sum_pieces, sum_rows

# Points of a cell that are summed up one after the other; of more, in pieces of so many.
LENGTH = 32
# Of a row that a program takes, and numbers that it holds for each corner.
MOST_CHANNELS = 256
NUMBERS = 512
MOST_SMALL_KEYS = 2**31 - 1


class SumInOrder(NamedTuple):
    """The sum as two kernels: what is found out from sizes and options."""

    cells: int
    """Of a map, each level with a margin of one before each axis."""
    dtype_of_keys: torch.dtype
    """The smallest that counts the cells of as many maps as are worked on together."""
    pieces: Prepared
    rows: Prepared

    @staticmethod
    def of(
        constants: dict[str, Any], spatial_shapes: Sequence[tuple[int, ...]], most_maps: int
    ) -> SumInOrder:
        """For a call; `constants` are those of the kernel that leaves the records."""
        cells = cells_with_margins(spatial_shapes)
        most_keys = most_maps * constants["VALUE_HEADS"] * cells
        channels = min(triton.next_power_of_2(constants["HEAD_DIM"]), MOST_CHANNELS)
        block = max(1, NUMBERS // channels)
        linear = constants["INTERPOLATION"] == "linear"
        common = {
            "HEAD_DIM": constants["HEAD_DIM"],
            "AXES": constants["AXES"],
            "CORNERS": 2 ** constants["AXES"] if linear else 1,
            "CHANNELS": channels,
            "SLICES": -(-constants["HEAD_DIM"] // channels),
            **options_of_launch(4),
        }
        of_pieces = {"POINTS": constants["POINTS"], "LENGTH": LENGTH, "PIECES": block}
        of_rows = {**{name: constants[name] for name in ("VALUE_HEADS", "LEVELS")}, "ROWS": block}
        return SumInOrder(
            cells,
            # Their number itself stands for points that take no part.
            torch.int32 if most_keys <= MOST_SMALL_KEYS else torch.int64,
            Prepared(sum_pieces, common | of_pieces, {}),
            Prepared(sum_rows, common | of_rows, {}),
        )

    def num_keys(self, grad_value: Tensor) -> int:
        """How many cells the maps have, for each head of the value."""
        return grad_value.shape[0] * grad_value.shape[2] * self.cells

    def run(
        self,
        grad_value: Tensor,
        grad_output: Tensor,
        keys: Tensor,
        records: Tensor,
        sizes: tuple[int, ...],
    ) -> None:
        """Fills `grad_value`, a part of the maps, from the keys and records of all points in it."""
        if keys.numel() == 0:
            grad_value.zero_()
            return
        num_keys = self.num_keys(grad_value)
        sorted_keys, order = torch.sort(keys, stable=True)
        every_key = torch.arange(num_keys + 1, dtype=keys.dtype, device=keys.device)
        first_points = torch.searchsorted(sorted_keys, every_key)
        # Of each cell and all before it.
        first_pieces = torch.zeros_like(first_points)
        torch.cumsum((first_points.diff() + (LENGTH - 1)) // LENGTH, 0, out=first_pieces[1:])
        # A cell's last piece may be short; no more can be, than there are cells or points.
        num_pieces = keys.numel() // LENGTH + min(num_keys, keys.numel())
        every_piece = torch.arange(num_pieces, device=keys.device)
        cell_of_piece = torch.searchsorted(first_pieces[1:], every_piece, right=True)
        corners, head_dim = (self.pieces.constants[name] for name in ("CORNERS", "HEAD_DIM"))
        sums = records.new_empty((num_pieces, corners, head_dim))
        self.pieces.start(
            -(-num_pieces // self.pieces.constants["PIECES"]) * self.pieces.constants["SLICES"],
            (sums, grad_output, records, order, first_points, first_pieces, cell_of_piece),
            (),
            (num_pieces, num_keys),
        )
        num_rows = math.prod(grad_value.shape[:3])
        self.rows.start(
            -(-num_rows // self.rows.constants["ROWS"]) * self.rows.constants["SLICES"],
            (grad_value, sums, first_pieces),
            (sizes,),
            (num_rows, grad_value.shape[1]),
        )


def workspace(
    points: int, cells: int, corners: int, head_dim: int, spatial_dims: int, number_bytes: int
) -> int:
    """Bytes that the sum takes for so many points in so many cells, next to the gradient itself."""
    record = int(fields_of_record(spatial_dims)) * number_bytes
    # Keys, the same sorted, places in 64 bits.
    of_points = points * (record + 4 + 4 + 8)
    of_pieces = (points // LENGTH + min(cells, points)) * (corners * head_dim * number_bytes + 16)
    return of_points + of_pieces + cells * 24


def cells_with_margins(spatial_shapes: Sequence[tuple[int, ...]]) -> int:
    """Cells of a map in which a point may lie: each level has one more before each axis."""
    return sum(math.prod(size + 1 for size in shape) for shape in spatial_shapes)
