"""Floors under a call, measured on this card: the bytes it must move, and the rows it must gather.

Bytes: every distinct row of the value that a point reads, locations, weights and output, once each, at the
rate of a copy. Gathers: the same rows as often as the points read them, by row numbers that are given, summed
in registers: no positions, no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.floors_backward import backward_floors_of
from benchmarks.gpu.goals import COLD, WARM
from benchmarks.gpu.results import (
    Deadline,
    Results,
    ensure_device,
    memory_given_back,
    reason_of,
)
from benchmarks.gpu.rows import LIMIT, ORDERS, Launch, corner_rows, ordered, seconds_of
from benchmarks.gpu.speed import Setting, input_sets, settings
from benchmarks.gpu.timing import Clock, Timing, replayed
from saccade.benchmark.workloads import Inputs

COPIED_BYTES = 1 << 30


LAUNCHES = (
    *(Launch(32, 4, 4), Launch(64, 4, 4), Launch(32, 4, 8)),
    *(Launch(16, 2, 4), Launch(64, 8, 4), Launch(16, 4, 8)),
)


def gather(value: Tensor, rows: Tensor, head_dim: int, launch: Launch) -> Callable[[], Tensor]:
    """The call of the gather kernel."""
    from benchmarks.gpu.kernels import gather_kernel

    num_rows, looks = rows.shape
    if max(value.numel(), rows.numel(), looks * head_dim) >= LIMIT or num_rows % launch.at_once:
        raise ValueError("expected tensors that 32 bits can count, and rows in whole groups")
    output = torch.empty(looks, head_dim, dtype=value.dtype, device=value.device)
    grid = (-(-looks // launch.block),)

    def call() -> Tensor:
        gather_kernel[grid](
            value,
            rows,
            output,
            looks,
            num_rows,
            HEAD_DIM=head_dim,
            BLOCK=launch.block,
            AT_ONCE=launch.at_once,
            num_warps=launch.num_warps,
        )
        return output

    return call


def checked_gather(found: Tensor, value: Tensor, rows: Tensor, head_dim: int) -> None:
    """Raises ArithmeticError when the sums of some looks are not those of their rows."""
    some = rows[:, :: max(1, rows.shape[1] // 64)]
    read = value.view(-1, head_dim)[some.clamp_min(0).long()].double()
    expected = read.masked_fill((some < 0)[..., None], 0).sum(0)
    error = (found[:: max(1, rows.shape[1] // 64)].double() - expected).abs().max()
    if not error <= 0.02 * expected.abs().max():
        raise ArithmeticError(f"the gather kernel is off by {float(error):.3g}")


def measure_floors(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    seed: int,
    *,
    cases: Sequence[str] = (),
    quick: bool = False,
) -> None:
    """Adds to the results what they do not have yet: the rate of a copy, then rows under `floors`."""
    clock = Clock(device)
    if "copy_bytes_per_second" not in results.found:
        with memory_given_back(device):
            results.put("copy_bytes_per_second", copy_rate(clock))
    rate = float(results.found["copy_bytes_per_second"])
    best: dict[tuple[str, int], list[tuple[str, Launch]]] = {}
    for one in settings(cases, quick=quick):
        done = {tuple(row[key] for key in Setting._fields) for row in results.rows("floors")}
        if tuple(one) in done or one.name in results.rows("skipped") or one.dtype == "float16":
            continue
        deadline.check(2.0)
        results.put("doing", {"key": "floors", "name": one.name})
        try:
            with memory_given_back(device):
                results.add("floors", *floors_of(clock, one, rate, seed, best))
            if one.dtype == "float32":  # rows are added in float32 whatever the values are
                with memory_given_back(device):
                    results.add("floors", *backward_floors_of(clock, one, seed))
        except Exception as error:
            left = one._asdict() | {"peer": "floors", "reason": reason_of(error)}
            results.add("left_out", left)
            ensure_device(device, error)


def copy_rate(clock: Clock) -> float:
    """Bytes read and written a second by the best of a few copies."""
    from benchmarks.gpu.kernels import copy_kernel

    count = (COPIED_BYTES if clock.is_gpu else 1 << 15) // 4
    source = torch.randn(count, device=clock.device)
    target = torch.empty_like(source)

    def copied(block: int, num_warps: int) -> Callable[[], object]:
        grid = (-(-count // block),)
        return lambda: copy_kernel[grid](source, target, count, BLOCK=block, num_warps=num_warps)

    ways = [copied(1024, 4), copied(4096, 8), copied(8192, 8), lambda: target.copy_(source)]
    least = math.inf
    for way in ways:
        way()
        least = min(least, sorted(clock.seconds(way) for _ in range(9))[4])
    return 2 * source.nbytes / least


def floors_of(
    clock: Clock,
    setting: Setting,
    rate: float,
    seed: int,
    best: dict[tuple[str, int], list[tuple[str, Launch]]],
) -> list[dict[str, Any]]:
    """The two rows of a setting. `best` remembers, by dtype and size of a head, which launches were good."""
    workload, dtype = setting.case(), getattr(torch, setting.dtype)
    inputs = setting.draw(seed)
    sets = input_sets(inputs, clock.device)
    rows = corner_rows(workload, sets[0].sampling_locations)
    key = (setting.dtype, workload.head_dim)
    # Every order on every case; launches that were far behind on an earlier case are not tried again.
    launches = list(dict.fromkeys(launch for _, launch in best.get(key, []))) or list(LAUNCHES)
    value = sets[0].value
    tried: dict[tuple[str, Launch], float] = {}
    for order in ORDERS:
        in_order = ordered(rows, order)
        for launch in launches:
            call = gather(value, in_order, workload.head_dim, launch)
            checked_gather(call(), value, in_order, workload.head_dim)
            tried[order, launch] = seconds_of(clock, call)
    order, launch = min(tried, key=tried.__getitem__)
    best[key] = sorted(tried, key=tried.__getitem__)[:6]
    in_order = ordered(rows, order)
    runs = list(_gathers(sets, in_order, workload.head_dim, launch))
    times = {}
    for way, warm in ((COLD, False), (WARM, True)):
        found, refused = replayed(clock, {"gathers": runs}, warm=warm)
        if refused:
            raise RuntimeError(refused["gathers"])
        times[way] = found["gathers"]._asdict()
    looks = setting.batch_size * workload.queries * workload.num_heads
    distinct = int(torch.unique(rows).numel() - bool((rows < 0).any()))
    moved = (distinct + looks) * workload.head_dim * dtype.itemsize
    moved += inputs.sampling_locations.nbytes + inputs.attention_weights.nbytes
    microseconds = float(f"{moved / rate * 1e6:.4g}")
    bytes_time = Timing(microseconds, microseconds, microseconds, 1, 1)._asdict()
    head = setting._asdict()
    return [
        head | {"peer": "bytes", "bytes": moved, "times": {COLD: bytes_time}},
        head
        | {"peer": "gathers", "rows": int((rows >= 0).sum()), "times": times, "order": order}
        | launch._asdict(),
    ]


def _gathers(
    sets: Sequence[Inputs], rows: Tensor, head_dim: int, launch: Launch
) -> Iterator[Callable[[], Tensor]]:
    """The same gather on values and row numbers in memory of their own."""
    for one in sets:
        yield gather(one.value, rows.clone(), head_dim, launch)
