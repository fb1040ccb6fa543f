"""Two floors under a backward: the rows it must add, and the sort that makes an order of them.

Scatter: for each point and each corner one float32 row is added to the gradient of the value, with relaxed
atomics, by row numbers that are given; no weights, and the zeros before it are not counted. Sort: a stable sort of
as many int32 keys as there are points, by the cell of each; what an ordered sum begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.goals import COLD, SINGLE, WARM
from benchmarks.gpu.rows import LIMIT, ORDERS, Launch, corner_rows, ordered, seconds_of
from benchmarks.gpu.speed import Setting, input_sets
from benchmarks.gpu.timing import Clock, flushed, replayed
from saccade.benchmark.workloads import Workload

LAUNCHES = (Launch(32, 4, 1), Launch(64, 4, 1), Launch(32, 4, 4), Launch(16, 2, 1))
SOME = 64


def scatter(source: Tensor, rows: Tensor, target: Tensor, launch: Launch) -> Callable[[], Tensor]:
    """The call of the scatter kernel: `source` [looks, head_dim], `target` [rows, head_dim]."""
    from benchmarks.gpu.kernels import scatter_kernel

    num_rows, looks = rows.shape
    if max(target.numel(), rows.numel(), source.numel()) >= LIMIT or num_rows % launch.at_once:
        raise ValueError("expected tensors that 32 bits can count, and rows in whole groups")
    grid = (-(-looks // launch.block),)

    def call() -> Tensor:
        scatter_kernel[grid](
            source,
            rows,
            target,
            looks,
            num_rows,
            HEAD_DIM=source.shape[1],
            BLOCK=launch.block,
            AT_ONCE=launch.at_once,
            num_warps=launch.num_warps,
        )
        return target

    return call


def checked_scatter(found: Tensor, source: Tensor, rows: Tensor) -> None:
    """Raises ArithmeticError when the sum of all rows, or some of the rows, are not what was added."""
    times = (rows >= 0).sum(0, dtype=torch.float64)[:, None]
    pairs = [(found.double().sum(0), (times * source.double()).sum(0))]
    sizes = (times * source.double().abs()).sum()
    for row in range(0, len(found), max(1, len(found) // SOME)):
        added = (rows == row).sum(0, dtype=torch.float64)[:, None]
        pairs.append((found[row].double(), (added * source.double()).sum(0)))
    for number, (got, want) in enumerate(pairs):
        allowed = 1e-6 * float(sizes) if number == 0 else 1e-3 * (1 + float(want.abs().max()))
        error = float((got - want).abs().max())
        if not error <= allowed:
            raise ArithmeticError(f"the scatter kernel is off by {error:.3g}")


def cells(workload: Workload, rows: Tensor) -> Tensor:
    """The first of each point's rows, as keys: [points of all looks] int32."""
    first, found = 0, []
    for count in workload.points:
        found.append(rows[first : first + count])
        first += count * 2**workload.spatial_dims
    return torch.cat(found).permute(1, 2, 3, 0).flatten().contiguous()


def backward_floors_of(clock: Clock, setting: Setting, seed: int) -> list[dict[str, Any]]:
    """The two rows of a setting."""
    workload = setting.case()
    inputs = setting.draw(seed)
    sets = input_sets(inputs, clock.device)
    rows = corner_rows(workload, sets[0].sampling_locations)
    numbers = torch.Generator(clock.device).manual_seed(seed)
    dtype = getattr(torch, setting.dtype)
    of_value = sets[0].value.shape[:3].numel()

    def tensors(in_order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (in_order.shape[1], workload.head_dim)
        source = torch.randn(shape, generator=numbers, device=clock.device).to(dtype)
        target = torch.zeros(of_value, workload.head_dim, device=clock.device)
        return source, in_order.clone(), target

    tried: dict[tuple[str, Launch], float] = {}
    for order in ORDERS:
        given = tensors(ordered(rows, order))
        for launch in LAUNCHES:
            given[2].zero_()
            checked_scatter(scatter(*given, launch)(), *given[:2])
            tried[order, launch] = seconds_of(clock, scatter(*given, launch))
    order, launch = min(tried, key=tried.__getitem__)
    in_order = ordered(rows, order)
    scatters = [scatter(*tensors(in_order), launch) for _ in sets]
    keys = [cells(workload, rows) for _ in sets]
    sorts = [lambda one=one: torch.sort(one, stable=True) for one in keys]
    head = setting._asdict()
    found = []
    for name, runs, more in (
        ("scatter", scatters, {"rows": int((rows >= 0).sum()), "order": order} | launch._asdict()),
        ("sort", sorts, {"keys": keys[0].numel()}),
    ):
        times: dict[str, Any] = {}
        for way, warm in ((COLD, False), (WARM, True)):
            timing, _ = replayed(clock, {name: runs}, warm=warm)
            times |= {way: timing[name]._asdict()} if name in timing else {}
        if not times:  # not in a graph
            times[SINGLE] = flushed(clock, {name: runs})[name]._asdict()
        found.append(head | {"peer": name, "times": times} | more)
    return found
