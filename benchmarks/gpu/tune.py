"""Makes the table of `saccade.backends.triton.tuning`: `python -m benchmarks.gpu.tune --write`.

On a card, candidates are timed by CUDA graphs on inputs that do not fit its L2, and the fastest is taken.
With `--offline`, which needs no card, the kernels for many queries are compiled for sm_90, and the candidate
with the fewest warp instructions per sample is taken that spills nothing and leaves room for other programs.
The kernels for few queries wait for their loads, which no count shows: they stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.gpu import compile  # first: it turns Triton's interpreter off

import torch  # isort: skip
from triton.testing import do_bench_cudagraph

from saccade.backends.triton import backward_plan, forward_plan, tuning
from saccade.bench.operator import WORKLOADS, Workload, draw
from saccade.call import Call, parse_call

WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = {"32 bits": torch.float32, "16 bits": torch.bfloat16}
DIRECTIONS = ("forward", "backward")
GRADIENTS = (True, True, True, False)
# Of 64 warps on a multiprocessor, 20 at least have registers then; 16 for the backward, which holds more.
MAX_REGISTERS = {"forward": 96, "backward": 128}
# Of a row that a thread holds: with four corners of a few points under way, more do not fit.
MAX_ELEMENTS = 16
# Queries of which both kernels are timed, to find where one takes over from the other.
FEW_QUERIES = (100, 200, 300, 600, 900, 1500, 2500, 5000)
# Queries of an encoder with which both ways to sum up the gradient of the value are timed.
MANY_QUERIES = (22223, 10000, 3000, 1000, 300, 100)
NUM_INPUTS = 6
# What is counted: four and eight points per level, locations, and offsets from reference points.
COUNTED = (("detr-encoder", "none"), ("detr-encoder", "points"), ("bevformer-sca", "points"))


class Candidate(NamedTuple):
    """An entry of the table."""

    queries: int
    warps: int
    channel_blocks: int

    def form(self, kernel: str, call: Call) -> tuning.Form:
        """The form that it means for a call; `kernel` is "queries" or "points"."""
        return tuning.Form.make(kernel, tuning.row_words(call.value)[0], *self)


def candidates(
    kernel: str, width: int, dtype: torch.dtype, warps: Sequence[int] = (2, 4, 8)
) -> list[Candidate]:
    """What is tried for rows of `width` bytes."""
    if kernel == "points":
        return [Candidate(q, w, 1) for q, w in itertools.product((1, 2, 4, 8), (1, 2, 4))]
    tried = []
    for count, blocks, loads in itertools.product(warps, (1, 2, 4, 8, 16), (1, 2)):
        # A thread loads 16 bytes of a block at once, from one row or two.
        queries = loads * count * 32 * 16 * blocks // width
        # Two threads at least for a block: below a sector, 32 bytes, nothing is read.
        fits = queries * width // dtype.itemsize // (count * 32) <= MAX_ELEMENTS
        if fits and (blocks == 1 or width // blocks >= 32) and 1 <= queries <= 128:
            tried.append(Candidate(queries, count, blocks))
    return tried


def resize(name: str, width: int, dtype: torch.dtype) -> Workload:
    """A workload with rows of `width` bytes, and as many channels in all as the original has."""
    workload = WORKLOADS[name]
    channels, head_dim = workload.num_heads * workload.head_dim, width // dtype.itemsize
    return workload._replace(head_dim=head_dim, num_heads=max(1, channels // head_dim))


def best_by_count(direction: str, bits: str, width: int) -> Candidate:
    """The best kernel for many queries: the number of warps does not change its instructions."""
    dtype, scores = DTYPES[bits], {}
    calls = [
        compile.make_call(resize(case, width, dtype), dtype, reference)
        for case, reference in COUNTED
    ]
    for candidate in candidates("queries", width, dtype, warps=(4,)):
        readings = []
        for call in calls:
            form = candidate.form("queries", call)
            if direction == "forward":
                plan = forward_plan(call, form)
                readings.append(compile.read(compile.forward_source(plan, dtype, torch.float32)))
                continue
            for ordered in (True, False):
                gradients = backward_plan(call, GRADIENTS, form, ordered=ordered)
                source = compile.backward_sources(gradients, dtype, torch.float32)[0]
                readings.append(compile.read(source))
        # One that leaves no room for other programs is better than one that spills.
        excess = sum(max(0, one.registers - MAX_REGISTERS[direction]) for one in readings)
        per_sample = sum(one.per_sample for one in readings) / len(readings)
        spills = sum(one.spills for one in readings)
        scores[candidate] = (spills, excess, per_sample, candidate.queries)
        registers = [one.registers for one in readings]
        print(f"{direction}, {bits}, {width} bytes: {tuple(candidate)} {per_sample:.2f} instructions "
              f"per sample, registers {registers}, spills {spills}", flush=True)  # fmt: skip
    return min(scores, key=lambda candidate: scores[candidate])


def time_plan(
    direction: str, workload: Workload, dtype: torch.dtype, kernel: str, candidate: Candidate,
    *, ordered: bool | None = None,
) -> float:  # fmt: skip
    """Microseconds of one call, on inputs that together do not fit the L2; infinite where it fails."""
    runs = []
    for seed in range(NUM_INPUTS):
        inputs = [one.cuda() for one in draw(workload, dtype=dtype, seed=seed)]
        call = parse_call(inputs[0], workload.shapes, *inputs[1:3], num_points=workload.points)
        form = candidate.form(kernel, call)
        if direction == "forward":
            plan = forward_plan(call, form)
            runs.append(lambda plan=plan, call=call: plan.run(call))
        else:
            gradients = backward_plan(call, GRADIENTS, form, ordered=ordered)
            runs.append(lambda plan=gradients, call=call, grad=inputs[3]: plan.run(grad, call))
    try:
        total = do_bench_cudagraph(lambda: [run() for run in runs], return_mode="median")
    except Exception as error:
        print(f"{direction} {kernel} {tuple(candidate)}: {type(error).__name__}: {error}")
        return math.inf
    microseconds = 1e3 * float(total) / NUM_INPUTS
    print(f"{direction} {kernel} {tuple(candidate)}, {dtype}, {workload.queries} queries of "
          f"{workload.head_dim} channels: {microseconds:.2f} us", flush=True)  # fmt: skip
    return microseconds


def best_by_time(direction: str, kernel: str, bits: str, width: int) -> Candidate:
    """The candidate that takes the least time."""
    dtype = DTYPES[bits]
    workload = resize("detr-encoder" if kernel == "queries" else "detr-decoder", width, dtype)
    # Few queries are too few points to be summed up in order.
    ordered = kernel == "queries"
    return min(
        candidates(kernel, width, dtype),
        key=lambda one: time_plan(direction, workload, dtype, kernel, one, ordered=ordered),
    )


def find_few_pairs(table: dict[str, Any]) -> int:
    """The number of (query, head) pairs up to which the kernel for few queries is the faster one."""
    best = 0
    for queries in FEW_QUERIES:
        workload = WORKLOADS["detr-decoder"]._replace(num_queries=queries)
        for bits, dtype in DTYPES.items():
            width = str(workload.head_dim * dtype.itemsize)
            few, many = (
                time_plan(
                    *("forward", workload, dtype, kernel),
                    Candidate(*table[f"forward_{kernel}"][bits][width]),
                )
                for kernel in ("points", "queries")
            )
            if few > many:
                return best
        best = queries * workload.num_heads
    return best


def find_many_samples(table: dict[str, Any]) -> int:
    """The number of samples from which on the gradient of the value is faster summed up in order."""
    best = 2**62
    for queries in MANY_QUERIES:
        workload = WORKLOADS["detr-encoder"]._replace(num_queries=queries)
        for bits, dtype in DTYPES.items():
            entry = Candidate(*table["backward_queries"][bits][str(32 * dtype.itemsize)])
            ordered, atomic = (
                time_plan("backward", workload, dtype, "queries", entry, ordered=ordered)
                for ordered in (True, False)
            )
            if ordered > atomic:
                return best
        best = queries * workload.num_heads * sum(workload.points)
    return best


def main() -> None:
    """Finds the entries, prints them, and writes them if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="count instructions, without a card")
    parser.add_argument("--width", type=int, action="append", choices=WIDTHS, help="bytes of a row")
    parser.add_argument("--direction", choices=DIRECTIONS, help="default: both")
    parser.add_argument("--write", action="store_true", help=f"write {tuning.TABLE.name}")
    arguments = parser.parse_args()
    table = json.loads(tuning.TABLE.read_text())
    widths = arguments.width or WIDTHS
    directions = [arguments.direction] if arguments.direction else DIRECTIONS
    if arguments.offline:
        for direction, bits, width in itertools.product(directions, DTYPES, widths):
            entry = best_by_count(direction, bits, width)
            table[f"{direction}_queries"][bits][str(width)] = list(entry)
        by = f"instructions counted, compiled for sm_{compile.TARGET.arch}; nothing measured"
    elif not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU; without one there is --offline")
    else:
        for direction, kernel in itertools.product(directions, ("queries", "points")):
            for bits, width in itertools.product(DTYPES, widths):
                entry = best_by_time(direction, kernel, bits, width)
                table[f"{direction}_{kernel}"][bits][str(width)] = list(entry)
        if "forward" in directions:
            table["few_pairs"] = find_few_pairs(table)
        if "backward" in directions:
            table["many_samples"] = find_many_samples(table)
        card = torch.cuda.get_device_name()
        by = f"measured on {card}, widths {', '.join(map(str, widths))}"
    table["made_by"] = f"python -m benchmarks.gpu.tune: {by}"
    text = json.dumps(table, indent=2)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n"
    print(text)
    if arguments.write:
        tuning.TABLE.write_text(text)


if __name__ == "__main__":
    main()
