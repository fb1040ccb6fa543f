"""Makes the table of `saccade.backends.triton.tuning`: `python -m benchmarks.gpu.tune --write`.

On a card, candidates are timed in turns, by replayed graphs on inputs that do not fit its L2, and the
fastest is taken. With `--offline`, for which no card is needed, `attend_queries` is compiled for sm_90
and the candidate with the fewest warp instructions a sample is taken that spills nothing and leaves room
for other programs; `attend_points` waits for its loads, which no count shows, and stays as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import compile
from benchmarks.gpu.timing import Clock, card, replayed
from saccade.arguments import Call, understand
from saccade.backends.triton import launch, tuning
from saccade.benchmark.workloads import WORKLOADS, Workload, draw

WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"32 bits": torch.float32, "16 bits": torch.bfloat16}
WARPS = (2, 4, 8)
PARTS = (1, 2, 4, 8, 16)
# Of 64 warps on a multiprocessor, 20 at least have registers then.
MOST_REGISTERS = 96
# Queries of which both kernels are timed, to find where one takes over from the other.
FEW_QUERIES = (100, 200, 300, 600, 900, 1500, 2500, 5000)
SETS = 6
# What is counted: four and eight points a level, given and made from offsets.
COUNTED = (("detr-encoder", "given"), ("detr-encoder", "points"), ("bevformer-sca", "points"))
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
    if name == "attend_points":
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


def plan_of(name: str, candidate: Candidate, call: Call) -> launch.Plan:
    """The call as this candidate would compute it."""
    words, _ = launch.words_of(call.value)
    return launch.plan(call, tuning.form(name, words, *candidate))


def best_by_count(bits: str, width: int) -> Candidate:
    """Of `attend_queries`, whose instructions do not depend on the number of warps."""
    name, dtype, scores = "attend_queries", DTYPES[bits], {}
    calls = [
        compile.call_of(workload_of(case, width, dtype), dtype, kind) for case, kind in COUNTED
    ]
    for candidate in candidates(name, width, dtype, warps=(4,)):
        found = [
            compile.read(plan_of(name, candidate, call), dtype, torch.float32) for call in calls
        ]
        # One that has no room is better than one that spills.
        crowded = sum(max(0, reading.registers - MOST_REGISTERS) for reading in found)
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
    clock: Clock, workload: Workload, dtype: torch.dtype, tried: list[tuple[str, Candidate]]
) -> dict[tuple[str, Candidate], float]:
    """Microseconds of each, in turns; of those that run."""
    calls = runs_of(workload, dtype, clock)
    contenders: dict[str, list[Callable[[], object]]] = {}
    names = {}
    for name, candidate in tried:
        plan = plan_of(name, candidate, calls[0][0])
        label = f"{name} {tuple(candidate)}"
        names[label] = (name, candidate)
        contenders[label] = [
            lambda plan=plan, tensors=tensors: launch.run(plan, *tensors, tensors[2])
            for _, tensors in calls
        ]
    found, refused = replayed(clock, contenders, warm=False)
    for label, reason in refused.items():
        print(f"{label}: {reason}")
    return {names[label]: timing.median for label, timing in found.items()}


def best_by_time(clock: Clock, name: str, bits: str, width: int) -> Candidate:
    """The candidate with the least time."""
    dtype = DTYPES[bits]
    base = "detr-encoder" if name == "attend_queries" else "detr-decoder"
    tried = [(name, candidate) for candidate in candidates(name, width, dtype)]
    times = timed(clock, workload_of(base, width, dtype), dtype, tried)
    for (_, candidate), time in sorted(times.items(), key=lambda item: item[1]):
        print(f"{name}, {bits}, {width} bytes: {tuple(candidate)} {time:.2f} us", flush=True)
    return min(times, key=lambda one: times[one])[1]


def few_looks(clock: Clock, table: dict[str, Any]) -> int:
    """The number of looks up to which `attend_points` is the faster one, in both dtypes."""
    best = 0
    for queries in FEW_QUERIES:
        workload = WORKLOADS["detr-decoder"]._replace(num_queries=queries)
        for bits, dtype in DTYPES.items():
            width = str(workload.head_dim * dtype.itemsize)
            tried = [
                (name, Candidate(*table[name][bits][width]))
                for name in ("attend_points", "attend_queries")
            ]
            times = timed(clock, workload, dtype, tried)
            print(f"{queries} queries, {dtype}: " + ", ".join(
                f"{name} {time:.2f} us" for (name, _), time in times.items()), flush=True)  # fmt: skip
            if times[tried[0]] > times[tried[1]]:
                return best
        best = queries * workload.num_heads
    return best


def main() -> None:
    """Finds the entries, prints them, and writes them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offline", action="store_true", help="count instructions, no card needed")
    parser.add_argument("--width", type=int, action="append", choices=WIDTHS, help="bytes of a row")
    parser.add_argument("--write", action="store_true", help=f"write {tuning.TABLE.name}")
    arguments = parser.parse_args()
    table = json.loads(tuning.TABLE.read_text())
    widths = arguments.width or WIDTHS
    if arguments.offline:
        for bits, width in itertools.product(DTYPES, widths):
            table["attend_queries"][bits][str(width)] = list(best_by_count(bits, width))
        by = f"instructions counted, compiled for sm_{compile.TARGET.arch}; nothing measured"
    elif not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU; without one there is --offline")
    else:
        clock = Clock(torch.device("cuda"))
        names = ("attend_queries", "attend_points")
        for name, bits, width in itertools.product(names, DTYPES, widths):
            table[name][bits][str(width)] = list(best_by_time(clock, name, bits, width))
        table["few_looks"] = few_looks(clock, table)
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
