"""Makes the table of `saccade.backends.triton.tuning`: `python -m benchmarks.gpu.tune --write`.

On a card, candidates are timed in turns, by replayed graphs on inputs that do not fit its L2, and the
fastest is taken. With `--offline`, for which no card is needed, the kernels for many queries are compiled
for sm_90 and the candidate with the fewest warp instructions a sample is taken that spills nothing and
leaves room for other programs; those for few wait for their loads, which no count shows, and stay as they
are.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import compile
from benchmarks.gpu.timing import Clock, card, replayed
from saccade.arguments import Call, FusedCall, understand
from saccade.backends.triton import backward, launch, tuning
from saccade.backends.triton.backward import GradientPlan, Wanted
from saccade.backends.triton.launch import Plan
from saccade.benchmark.workloads import WORKLOADS, Workload, draw

WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"32 bits": torch.float32, "16 bits": torch.bfloat16}
WARPS = (2, 4, 8)
PARTS = (1, 2, 4, 8, 16)
# Of 64 warps on a multiprocessor, 20 at least have registers then; 16 for the backward, which holds more.
MOST_REGISTERS = {"attend": 96, "differentiate": 128}
# Queries of which both kernels are timed, to find where one takes over from the other.
FEW_QUERIES = (100, 200, 300, 600, 900, 1500, 2500, 5000)
SETS = 6
# What is counted: four and eight points a level, given and made from offsets.
COUNTED = (("detr-encoder", "given"), ("detr-encoder", "points"), ("bevformer-sca", "points"))
# Queries of an encoder with which both ways to sum up the gradient of the value are timed.
MANY_QUERIES = (100, 300, 1000, 3000, 10000, 22223)
FORWARD, BACKWARD = "attend", "differentiate"
# Of a row that a thread holds: with four corners of a few points under way, more do not fit.
MOST_NUMBERS = 16


class Candidate(NamedTuple):
    """An entry of the table."""

    queries: int
    warps: int
    parts: int


def candidates(
    name: str, width: int, dtype: torch.dtype, *, warps: Iterable[int] = WARPS
) -> list[Candidate]:
    """What is tried for rows of `width` bytes."""
    if name.endswith("points"):
        return [Candidate(q, w, 0) for q, w in itertools.product((1, 2, 4, 8), (1, 2, 4))]
    found = []
    for count, parts, loads in itertools.product(warps, PARTS, (1, 2)):
        # A thread loads 16 bytes of a part at once, from one row or two.
        queries = loads * count * 32 * 16 * parts // width
        # Two threads at least for a part: below a sector, 32 bytes, nothing is read.
        fits = queries * width // dtype.itemsize // (count * 32) <= MOST_NUMBERS
        if fits and (parts == 1 or width // parts >= 32) and 1 <= queries <= 128:
            found.append(Candidate(queries, count, parts))
    return found


def workload_of(base: str, width: int, dtype: torch.dtype) -> Workload:
    """A workload with rows of `width` bytes, and as many channels in all as the original has."""
    workload = WORKLOADS[base]
    channels, size = workload.num_heads * workload.head_dim, width // dtype.itemsize
    return workload._replace(head_dim=size, num_heads=max(1, channels // size))


def plan_of(
    name: str, candidate: Candidate, call: Call | FusedCall, *, in_order: bool = True
) -> Plan | GradientPlan:
    """The call, or its backward, as this candidate would compute it."""
    words, _ = launch.words_of(call.value)
    form = tuning.form(name, words, *candidate)
    if name.startswith(FORWARD):
        return launch.plan(call, form)
    *looks, _, _ = launch.points_of(call).shape
    grad_output = call.value.new_empty(*looks[:2], looks[2] * call.value.shape[3])
    wanted = Wanted(True, False, True, True)
    return backward.gradient_plan(call, wanted, grad_output, form, in_order=in_order)


def kernels_of(
    name: str, candidate: Candidate, call: Call | FusedCall, dtype: torch.dtype
) -> list[compile.Kernel]:
    """The kernel that the candidates are of, backward with both ways to sum up the value's gradient."""
    plans = [plan_of(name, candidate, call, in_order=in_order) for in_order in (True, False)]
    if name.startswith(FORWARD):
        return [compile.forward_kernel(plans[0], dtype, torch.float32)]
    return [compile.backward_kernels(plan, dtype, torch.float32)[0] for plan in plans]


def best_by_count(name: str, bits: str, width: int) -> Candidate:
    """Of a kernel for many queries, whose instructions do not depend on the number of warps."""
    dtype, scores = DTYPES[bits], {}
    calls = [
        compile.call_of(workload_of(case, width, dtype), dtype, kind) for case, kind in COUNTED
    ]
    for candidate in candidates(name, width, dtype, warps=(4,)):
        found = [
            compile.read(kernel)
            for call in calls
            for kernel in kernels_of(name, candidate, call, dtype)
        ]
        # One that has no room is better than one that spills.
        most = MOST_REGISTERS[name.split("_")[0]]
        crowded = sum(max(0, reading.registers - most) for reading in found)
        per_sample = sum(reading.per_sample for reading in found) / len(found)
        spills = sum(reading.spills for reading in found)
        scores[candidate] = (spills, crowded, per_sample, candidate.queries)
        print(f"{name}, {bits}, {width} bytes: {tuple(candidate)} {per_sample:.2f} instructions a "
              f"sample, registers {[one.registers for one in found]}, spills {spills}", flush=True)  # fmt: skip
    return min(scores, key=lambda candidate: scores[candidate])


def runs_of(workload: Workload, dtype: torch.dtype, clock: Clock) -> list[tuple[Call, list[Any]]]:
    """A call and its tensors on the device, several times over."""
    found = []
    for seed in range(SETS):
        inputs = draw(workload, dtype=dtype, uniform=False, seed=seed)
        tensors = [tensor.to(clock.device) for tensor in inputs[:3]]
        call = understand(*tensors, compile.options_of(workload))
        found.append((call, tensors))
    return found


def timed(
    clock: Clock, workload: Workload, dtype: torch.dtype, plans: dict[str, Callable[[Call], Any]]
) -> dict[str, float]:
    """Microseconds of each plan, in turns; of those that run."""
    calls = runs_of(workload, dtype, clock)
    contenders: dict[str, list[Callable[[], object]]] = {}
    for label, plan_for in plans.items():
        plan = plan_for(calls[0][0])
        contenders[label] = [_run_of(plan, tensors) for _, tensors in calls]
    found, refused = replayed(clock, contenders, warm=False)
    for label, reason in refused.items():
        print(f"{label}: {reason}")
    return {label: timing.median for label, timing in found.items()}


def _run_of(plan: Plan | GradientPlan, tensors: list[Any]) -> Callable[[], object]:
    value, points, weights = tensors
    if isinstance(plan, Plan):
        return lambda: launch.run(plan, value, points, weights, weights)
    *queries, _, _, _ = points.shape
    grad_output = torch.randn(*queries, points.shape[2] * value.shape[3], device=value.device)
    grad_output = grad_output.to(value.dtype)
    return lambda: backward.run(plan, grad_output, value, points, weights, weights)


def _entries(name: str, entries: list[Candidate]) -> dict[str, Callable[[Call], Any]]:
    """What the table's choice is between; few queries are too few points to be summed up in order."""
    in_order = name.endswith("queries")
    return {
        f"{name} {tuple(one)}": functools.partial(plan_of, name, one, in_order=in_order)
        for one in entries
    }


def best_by_time(clock: Clock, name: str, bits: str, width: int) -> Candidate:
    """The candidate with the least time."""
    dtype = DTYPES[bits]
    base = "detr-encoder" if name.endswith("queries") else "detr-decoder"
    tried = candidates(name, width, dtype)
    times = timed(clock, workload_of(base, width, dtype), dtype, _entries(name, tried))
    for label, time in sorted(times.items(), key=lambda item: item[1]):
        print(f"{label}, {bits}, {width} bytes: {time:.2f} us", flush=True)
    best = min(times, key=lambda label: times[label])
    return next(one for one in tried if f"{name} {tuple(one)}" == best)


def few_looks(clock: Clock, table: dict[str, Any]) -> int:
    """The number of looks up to which `attend_points` is the faster one, in both dtypes."""
    best = 0
    for queries in FEW_QUERIES:
        workload = WORKLOADS["detr-decoder"]._replace(num_queries=queries)
        for bits, dtype in DTYPES.items():
            width = str(workload.head_dim * dtype.itemsize)
            plans: dict[str, Callable[[Call], Any]] = {}
            for name in ("attend_points", "attend_queries"):
                plans |= _entries(name, [Candidate(*table[name][bits][width])])
            times = list(timed(clock, workload, dtype, plans).values())
            print(f"{queries} queries, {dtype}: {plans.keys()} {times} us", flush=True)
            if times[0] > times[1]:
                return best
        best = queries * workload.num_heads
    return best


def many_samples(clock: Clock, table: dict[str, Any]) -> int:
    """The number of samples from which on the gradient of the value is faster summed up in order."""
    found = 2**62
    for queries in reversed(MANY_QUERIES):
        workload = WORKLOADS["detr-encoder"]._replace(num_queries=queries)
        for bits, dtype in DTYPES.items():
            entry = Candidate(*table["differentiate_queries"][bits][str(32 * dtype.itemsize)])
            times = timed(
                clock,
                workload,
                dtype,
                {
                    str(in_order): functools.partial(
                        plan_of, "differentiate_queries", entry, in_order=in_order
                    )
                    for in_order in (False, True)
                },
            )
            print(f"{queries} queries, {dtype}, in order or not: {times} us", flush=True)
            if times.get("True", math.inf) > times.get("False", 0):
                return found
        found = queries * workload.num_heads * sum(workload.points)
    return found


def main() -> None:
    """Finds the entries, prints them, and writes them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offline", action="store_true", help="count instructions, no card needed")
    parser.add_argument("--width", type=int, action="append", choices=WIDTHS, help="bytes of a row")
    parser.add_argument("--work", choices=(FORWARD, BACKWARD), help="only forward or backward")
    parser.add_argument("--write", action="store_true", help=f"write {tuning.TABLE.name}")
    arguments = parser.parse_args()
    table = json.loads(tuning.TABLE.read_text())
    widths = arguments.width or WIDTHS
    works = [arguments.work] if arguments.work else [FORWARD, BACKWARD]
    if arguments.offline:
        for work, bits, width in itertools.product(works, DTYPES, widths):
            name = f"{work}_queries"
            table[name][bits][str(width)] = list(best_by_count(name, bits, width))
        by = f"instructions counted, compiled for sm_{compile.TARGET.arch}; nothing measured"
    elif not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU; without one there is --offline")
    else:
        clock = Clock(torch.device("cuda"))
        for work, of, bits, width in itertools.product(
            works, ("queries", "points"), DTYPES, widths
        ):
            name = f"{work}_{of}"
            table[name][bits][str(width)] = list(best_by_time(clock, name, bits, width))
        if FORWARD in works:
            table["few_looks"] = few_looks(clock, table)
        if BACKWARD in works:
            table["many_samples"] = many_samples(clock, table)
        by = f"measured on {card(clock.device)['gpu']}, widths {', '.join(map(str, widths))}"
    table["made_by"] = f"python -m benchmarks.gpu.tune: {by}"
    text = printed(table)
    print(text)
    if arguments.write:
        tuning.TABLE.write_text(text)


def printed(table: dict[str, Any]) -> str:
    """The table as JSON, an entry a line."""
    text = json.dumps(table, indent=2)
    on_one_line = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text)
    return on_one_line + "\n"


if __name__ == "__main__":
    main()
