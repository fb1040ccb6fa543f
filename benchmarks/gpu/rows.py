"""Which rows of the value a workload's points read, and in which order programs take them: for the floors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.timing import Clock
from saccade.benchmark.workloads import Workload

QUERIES_OF_A_BLOCK = 32
ORDERS = ("heads fastest", "head after head", "32 queries of a head")
LIMIT = 2**31


class Launch(NamedTuple):
    """How a gather is cut into programs."""

    block: int
    num_warps: int
    at_once: int


def corner_rows(workload: Workload, sampling_locations: Tensor) -> Tensor:
    """Which rows of the value the points read: [rows of a look, B, Q, M] int32, -1 outside the map.

    A look is a query of a head; its rows are the corners of its points, point after point. The value is
    rows of `head_dim` numbers, [B, S, M or 1].
    """
    device = sampling_locations.device
    batch_size, _, heads = sampling_locations.shape[:3]
    value_heads = 1 if workload.shared_head else heads
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1, 1) * workload.num_positions
    head = torch.arange(heads, device=device).view(1, 1, -1, 1) * (value_heads > 1)
    found, first, begin = [], 0, 0
    for shape, count in zip(workload.shapes, workload.points, strict=True):
        locations = sampling_locations[:, :, :, first : first + count]
        sizes = torch.tensor(shape[::-1], device=device)
        lower = (locations * sizes - 0.5).floor().clamp(-2, max(shape) + 1).long()
        for corner in itertools.product((0, 1), repeat=len(shape)):
            cell = lower + torch.tensor(corner, device=device)
            inside = ((cell >= 0) & (cell < sizes)).all(-1)
            position = torch.zeros_like(cell[..., 0])
            for axis in reversed(range(len(shape))):  # a location is (x, y), y counts most
                position = position * sizes[axis] + cell[..., axis]
            row = (batch + begin + position) * value_heads + head
            found.append(torch.where(inside, row, -1).int().permute(3, 0, 1, 2))
        first, begin = first + count, begin + math.prod(shape)
    return torch.cat(found)


def ordered(rows: Tensor, order: str) -> Tensor:
    """The looks in the order in which programs take them: [rows of a look, looks], contiguous."""
    if order == "head after head":
        rows = rows.transpose(2, 3)
    elif order == "32 queries of a head":
        beyond = -rows.shape[2] % QUERIES_OF_A_BLOCK
        rows = torch.nn.functional.pad(rows, (0, 0, 0, beyond), value=-1)
        rows = rows.unflatten(2, (-1, QUERIES_OF_A_BLOCK)).transpose(3, 4)
    return rows.flatten(1).contiguous()


def seconds_of(clock: Clock, call: Callable[[], object]) -> float:
    """Of one call among several in a graph."""
    number = 10 if clock.is_gpu else 1
    replay = clock.graph([call] * number)
    replay()
    return sorted(clock.seconds(replay) for _ in range(5))[2] / number
