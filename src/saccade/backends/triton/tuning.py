"""Which kernel a call gets, and how it is divided: a small table, made by `benchmarks/gpu/tune.py`.

A choice goes by the bytes of a row of the value, the bits of its numbers, and whether there are few
looks (queries times heads). Sizes of maps are no part of it, so that a model of many resolutions
compiles one kernel. Nothing is tried out at a first call.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import triton

from saccade.backends.triton import kernels

TABLE = Path(__file__).with_name("tuning.json")

# Points that `attend_points` reads at once, at most; beyond, its registers do not do.
MOST_POINTS = 64
# Its entries are for so many; with fewer points a program takes more queries.
POINTS_OF_TABLE = 16


class Form(NamedTuple):
    """A kernel and how it divides the work."""

    kernel: Any
    queries: int
    """Of a program."""
    warps: int
    channels: int
    """Of a part of a row, in words."""
    parts: int
    """In which a row is read; 0 for `attend_points`, which knows none."""

    def constants(self, num_points: list[int], spatial_dims: int) -> dict[str, Any]:
        """The kernel's own constants."""
        common = {"QUERIES": self.queries, "CHANNELS": self.channels}
        if self.parts:
            return {**common, "PARTS": self.parts, "TOGETHER": together(num_points, spatial_dims)}
        levels = [level for level, count in enumerate(num_points) for _ in range(count)]
        return {
            **common,
            "LEVEL_OF_POINT": tuple(levels),
            "POINTS_OF_POINT": tuple(num_points[level] for level in levels),
            "BLOCK": triton.next_power_of_2(len(levels)),
        }


def choose(words: int, word_bytes: int, number_bytes: int, num_points: int, looks: int) -> Form:
    """The form for rows of so many words, so many points of a head, and so many looks."""
    table = _table()
    few = looks <= table["few_looks"] and num_points <= MOST_POINTS
    name = "attend_points" if few else "attend_queries"
    # A number of 16 bits takes as many registers as one of 32 once it is read.
    entries = table[name]["16 bits" if number_bytes == 2 else "32 bits"]
    widths = [int(width) for width in entries]
    row_bytes = triton.next_power_of_2(words) * word_bytes
    width = min(max(row_bytes, min(widths)), max(widths))
    queries, warps, parts = entries[str(width)]
    if row_bytes > width:
        # The sums of a query fill as many more registers.
        queries = max(1, queries * width // row_bytes)
    if few:
        queries = max(1, queries * POINTS_OF_TABLE // triton.next_power_of_2(num_points))
    return form(name, words, queries, warps, parts)


def form(name: str, words: int, queries: int, warps: int, parts: int) -> Form:
    """The form that an entry of the table means for rows of so many words."""
    channels = triton.next_power_of_2(words)
    parts = min(parts, channels)
    return Form(getattr(kernels, name), queries, warps, channels // max(parts, 1), parts)


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
