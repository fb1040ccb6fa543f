"""Which kernel a call gets, and how it is divided: a small table, made by `benchmarks/gpu/tune.py`.

A choice goes by the bytes of a row of the value, the bits of its numbers, and whether there are few
looks (queries times heads); how the gradient of the value is summed up, by samples and cells. The sizes of
a map are no part of it else, so that a model of many resolutions compiles one kernel. Nothing is tried out
at a first call.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import triton

from saccade.backends.triton import gradient_kernels, kernels

KERNELS = {
    "attend_queries": kernels.attend_queries,
    "attend_points": kernels.attend_points,
    "differentiate_queries": gradient_kernels.differentiate_queries,
    "differentiate_points": gradient_kernels.differentiate_points,
}
TABLE = Path(__file__).with_name("tuning.json")

# Numbers of the value that a thread of the kernels for few queries holds of one corner: with more, registers
# do not do.
MOST_NUMBERS = 32
# Its entries in the table are for so many points.
POINTS_OF_TABLE = 16
# Of a row that a program of `attend_queries` reads; of wider ones each program takes a slice.
MOST_BYTES = 4096
MOST_WORDS = 1024
# Times that the reference point changes from one point to the next, for code that is written out.
MOST_CHANGES = 8


class Form(NamedTuple):
    """A kernel and how it divides the work."""

    kernel: Any
    queries: int
    """Of a program."""
    warps: int
    channels: int
    """Of a part of a row, in words."""
    parts: int
    """In which a row is read; 0 for the kernels for few queries, which know none."""

    slices: int = 1
    """Of a wide row, each read by a program of its own."""

    def constants(self, num_points: list[int], changes: int, spatial_dims: int) -> dict[str, Any]:
        """The kernel's own constants; `changes` says how often the reference point changes."""
        common = {"QUERIES": self.queries, "CHANNELS": self.channels}
        if self.parts:
            written_out = 1 if changes > MOST_CHANGES else together(num_points, spatial_dims)
            return {
                **common,
                "PARTS": self.parts,
                "TOGETHER": written_out,
                "SLICES": self.slices,
                "LEVEL_POINTS": tuple(num_points),
            }
        levels = [level for level, count in enumerate(num_points) for _ in range(count)]
        return {
            **common,
            "LEVEL_OF_POINT": tuple(levels),
            "POINTS_OF_POINT": tuple(num_points[level] for level in levels),
            "BLOCK": triton.next_power_of_2(len(levels)),
        }


def choose(
    work: str,
    words: int,
    word_bytes: int,
    number_bytes: int,
    num_points: int,
    spatial_dims: int,
    looks: int,
) -> Form:
    """The form for "attend" or "differentiate", rows of so many words, so many points of a head, and so
    many looks.
    """
    table = _table()
    # A number of 16 bits takes as many registers as one of 32 once it is read.
    bits = "16 bits" if number_bytes == 2 else "32 bits"
    channels = triton.next_power_of_2(words)
    row_bytes = channels * word_bytes
    if looks <= table["few_looks"]:
        queries, warps, _ = _entry(table[f"{work}_points"][bits], row_bytes)
        points = triton.next_power_of_2(num_points)
        # A pair of numbers, and a float64, takes two registers.
        registers = max(word_bytes // number_bytes, number_bytes // 4, 1)
        most = MOST_NUMBERS if spatial_dims < 3 else MOST_NUMBERS // 2
        if work == "differentiate" and number_bytes == 8:
            most //= 2
        fitting = warps * 32 * most // (points * channels * registers)
        queries = min(max(1, queries * POINTS_OF_TABLE // points), fitting)
        if queries:
            queries = 2 ** (queries.bit_length() - 1)
            return form(f"{work}_points", words, queries, warps, 0)
    slice_words = min(words, MOST_WORDS, MOST_BYTES // word_bytes)
    slice_bytes = triton.next_power_of_2(slice_words) * word_bytes
    entry = _entry(table[f"{work}_queries"][bits], slice_bytes)
    whole = form(f"{work}_queries", slice_words, *entry)
    return whole._replace(slices=-(-words // slice_words))


def sums_in_order(samples: int, cells: int) -> bool:
    """Whether the gradient of the value is summed up in order also where nobody asks for it: many points
    in few cells get into each other's way where they are added up in memory.
    """
    table = _table()
    many, of_a_cell = int(table["many_samples"]), int(table["many_samples_of_a_cell"])
    return samples >= max(many, of_a_cell * cells)


def _entry(entries: dict[str, list[int]], row_bytes: int) -> tuple[int, int, int]:
    widths = [int(width) for width in entries]
    width = min(max(row_bytes, min(widths)), max(widths))
    queries, warps, parts = entries[str(width)]
    # Of a row that is wider than any in the table the sums of a query fill as many more registers.
    return max(1, queries * width // max(row_bytes, width)), warps, parts


def form(name: str, words: int, queries: int, warps: int, parts: int) -> Form:
    """The form that an entry of the table means for rows of so many words."""
    channels = triton.next_power_of_2(words)
    parts = min(parts, channels)
    return Form(KERNELS[name], queries, warps, channels // max(parts, 1), parts)


def together(num_points: list[int], spatial_dims: int) -> int:
    """Points whose code is written out one after the other: so many divide those of each level.

    Of a volume fewer, for each has twice the corners.
    """
    common = math.gcd(*num_points)
    most = 4 if spatial_dims == 3 else 8
    return max(count for count in range(1, most + 1) if common % count == 0)


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table
