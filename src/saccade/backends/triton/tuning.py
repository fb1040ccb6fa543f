"""Which kernel a call gets, and how the work is divided: a table, made by `benchmarks/gpu/tune.py`.

A choice goes by the bytes of a row of the value, the bits of its elements, and whether there are few (query,
head) pairs; how the gradient of the value is summed up goes by samples (points of all pairs) and cells. The
sizes of a map matter for nothing else, so that a model of many resolutions compiles one kernel. Nothing is tried
out at a first call.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.call import Call

TABLE = Path(__file__).with_name("tuning.json")

# Elements of the value that a thread of the kernels for few queries holds of one corner: more do not fit into
# registers.
MAX_THREAD_ELEMENTS = 32
# The table's entries for those kernels are for so many points.
TABLE_POINTS = 16
# The part of a row that one program of the kernels for many queries reads; wider rows have slices.
MAX_SLICE_BYTES = 4096
MAX_SLICE_WORDS = 1024


class Form(NamedTuple):
    """A kernel and how it divides the work."""

    kernel: str
    """"queries", for many queries, or "points", for few."""
    queries: int
    """Queries of a program."""
    warps: int
    channels: int
    """Words of a channel block."""
    channel_blocks: int
    """Blocks in which a program reads a row, or a slice of it; always 1 for "points"."""
    slices: int = 1
    """Slices of a row that is too wide for one program."""

    @staticmethod
    def make(kernel: str, words: int, queries: int, warps: int, channel_blocks: int) -> Form:
        """The form that an entry [queries, warps, channel_blocks] of the table means for such rows."""
        channels = triton.next_power_of_2(words)
        channel_blocks = max(1, min(channel_blocks, channels))
        return Form(kernel, queries, warps, channels // channel_blocks, channel_blocks)

    def points_per_step(self, num_points: Sequence[int], spatial_dims: int) -> int:
        """Points whose code is written out one after the other; they divide those of each level.

        In a volume they are fewer, for each has twice the corners.
        """
        common = math.gcd(*num_points)
        maximum = 4 if spatial_dims == 3 else 8
        return max(count for count in range(1, maximum + 1) if common % count == 0)


def row_words(value: Tensor) -> tuple[int, int]:
    """The words in which a head's row of the value is read, and the bytes of one."""
    if value.dtype == torch.bfloat16 and value.shape[3] % 2 == 0:
        # Words of two elements save an instruction for each.
        return value.shape[3] // 2, 4
    return value.shape[3], value.element_size()


def choose_for_call(direction: str, call: Call) -> Form:
    """The form of a call's kernel, for "forward" or "backward"."""
    words, word_bytes = row_words(call.value)
    *pairs, num_points, spatial_dims = call.points.shape
    element_bytes = call.value.element_size()
    return choose(
        direction, words, word_bytes, element_bytes, num_points, spatial_dims, math.prod(pairs)
    )


def choose(
    direction: str,
    words: int,
    word_bytes: int,
    element_bytes: int,
    num_points: int,
    spatial_dims: int,
    num_pairs: int,
) -> Form:
    """The form for rows of so many words, so many points of a (query, head) pair, and so many pairs."""
    table = _table()
    # An element of 16 bits takes as many registers as one of 32 once it is read.
    bits = "16 bits" if element_bytes == 2 else "32 bits"
    channels = triton.next_power_of_2(words)
    row_bytes = channels * word_bytes
    if num_pairs <= table["few_pairs"]:
        queries, warps, _ = _entry(table[f"{direction}_points"][bits], row_bytes)
        block_points = triton.next_power_of_2(num_points)
        # A word of two elements, and a float64, takes two registers.
        registers = max(word_bytes // element_bytes, element_bytes // 4, 1)
        max_elements = MAX_THREAD_ELEMENTS if spatial_dims < 3 else MAX_THREAD_ELEMENTS // 2
        if direction == "backward" and element_bytes == 8:
            max_elements //= 2
        max_queries = warps * 32 * max_elements // (block_points * channels * registers)
        queries = min(max(1, queries * TABLE_POINTS // block_points), max_queries)
        if queries:
            queries = 2 ** (queries.bit_length() - 1)
            return Form.make("points", words, queries, warps, 1)
    slice_words = min(words, MAX_SLICE_WORDS, MAX_SLICE_BYTES // word_bytes)
    slice_bytes = triton.next_power_of_2(slice_words) * word_bytes
    entry = _entry(table[f"{direction}_queries"][bits], slice_bytes)
    form = Form.make("queries", slice_words, *entry)
    return form._replace(slices=-(-words // slice_words))


def prefers_ordered_sum(num_samples: int, num_cells: int) -> bool:
    """Whether the gradient of the value is summed up in order also where that is not required: many points
    in few cells wait for each other where they are added up in memory.
    """
    table = _table()
    many_samples, per_cell = int(table["many_samples"]), int(table["many_samples_per_cell"])
    return num_samples >= max(many_samples, per_cell * num_cells)


def _entry(entries: dict[str, list[int]], row_bytes: int) -> tuple[int, int, int]:
    widths = [int(width) for width in entries]
    width = min(max(row_bytes, min(widths)), max(widths))
    queries, warps, channel_blocks = entries[str(width)]
    # In a row that is wider than any in the table, the sums of a query fill as many more registers.
    return max(1, queries * width // max(row_bytes, width)), warps, channel_blocks


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table
