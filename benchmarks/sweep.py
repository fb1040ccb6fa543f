"""Shapes that nobody chose: where the kernel is slow for the work it does.

`python -m benchmarks.sweep --plot docs/images/sweep.png`

The work is the cache lines that the value rows lie in which the forward reads; work over time is an effective
bandwidth, the same measure for every shape. A row of 4 bytes takes a line of 64, as a row of 64 does; one of 44
bytes lies in 1.6 lines on average. The backward reads the rows again and adds as many to the gradient of the
value, which has to be written whole. Rows come mostly from caches, so that it may exceed the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.results_file import RESULTS, write_results
from saccade.bench.command import machine
from saccade.bench.operator import WORKLOADS, Truth, Workload, draw, saccade_function, timed_call
from saccade.timing import alternate

# Value rows of a random shape: at some 10 to 100 GB/s a forward takes 0.2 to 50 ms.
MIN_BYTES, MAX_BYTES = 4e6, 5e8
LINE_BYTES = 64
WORST = 5
"""How many of the slowest shapes are named."""
DIRECTIONS = ("forward", "forward + backward")
METHOD = (
    "float32, model-like locations, warm caches, memory kept by the process; medians. Bandwidth: the lines of "
    "64 bytes that the value rows read lie in over the time; with backward three times these and the value"
)


class ShapeMeasurement(NamedTuple):
    """One shape: times in milliseconds, bandwidths in GB/s."""

    name: str
    shape: str
    head_dim: int
    megabytes: float
    forward_ms: float
    both_ms: float
    forward_bandwidth: float
    both_bandwidth: float

    @property
    def fills_vectors(self) -> bool:
        """Whether head_dim is a multiple of the widest vector's 16 elements."""
        return self.head_dim % 16 == 0

    def bandwidth(self, direction: str) -> float:
        """The bandwidth in one of `DIRECTIONS`."""
        return self.forward_bandwidth if direction == DIRECTIONS[0] else self.both_bandwidth


def work(workload: Workload) -> int:
    """The bytes of the cache lines that the float32 value rows lie in which the forward reads."""
    sampled = workload.batch_size * workload.queries * workload.num_heads * sum(workload.points)
    rows = sampled * (1 << workload.spatial_dims)
    return round(rows * lines_per_row(workload.head_dim * 4) * LINE_BYTES)


def lines_per_row(row_bytes: int) -> float:
    """How many cache lines a row lies in, on average over rows one after the other from a line's begin."""
    rows = LINE_BYTES // math.gcd(row_bytes, LINE_BYTES)  # then they begin with a line again
    ends = ((row * row_bytes, (row + 1) * row_bytes - 1) for row in range(rows))
    return sum(last // LINE_BYTES - first // LINE_BYTES + 1 for first, last in ends) / rows


def total_work(workload: Workload) -> int:
    """The bytes of rows read, read again and added, and of the gradient of the value."""
    heads = 1 if workload.shared_head else workload.num_heads
    value = workload.batch_size * workload.num_positions * heads * workload.head_dim * 4
    return 3 * work(workload) + value


def describe(workload: Workload) -> str:
    """The sizes of a shape, short."""
    points = workload.num_points
    sizes = ", ".join("x".join(map(str, shape)) for shape in workload.shapes)
    return (
        f"B{workload.batch_size} Q{workload.queries} M{workload.num_heads} D{workload.head_dim} "
        f"K{points if isinstance(points, int) else list(points)}"
        f"{' shared' if workload.shared_head else ''} [{sizes}]"
    )


def random_workloads(count: int, seed: int = 0) -> list[Workload]:
    """Shapes that nobody chose: prime numbers of queries, odd head_dim, 1 to 9 levels, different points per level."""
    chosen = random.Random(seed)
    workloads = []
    for index in range(count):
        levels = chosen.randint(1, 9)
        shapes = [(chosen.randint(1, 120), chosen.randint(1, 120)) for _ in range(levels)]
        points: int | list[int] = chosen.randint(1, 8)
        if chosen.random() < 0.3:
            points = [chosen.randint(1, 8) for _ in shapes]
        usual = chosen.random() < 0.4
        workload = Workload(
            f"random-{index:03}",
            "drawn at random",
            shapes,
            1,
            num_heads=chosen.choice([1, 2, 3, 4, 6, 8, 12, 16]),
            head_dim=chosen.choice([16, 32, 64, 128]) if usual else chosen.randint(1, 49) * 2 - 1,
            num_points=points,
            batch_size=chosen.choice([1, 1, 2, 3]),
            shared_head=chosen.random() < 0.15,
        )
        target_bytes = math.exp(chosen.uniform(math.log(MIN_BYTES), math.log(MAX_BYTES)))
        queries = _prime_from(max(2, round(target_bytes / work(workload))))
        workloads.append(workload._replace(num_queries=queries))
    return workloads


def _prime_from(number: int) -> int:
    while any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def keep_memory() -> None:
    """Tells the C library, where it is glibc, to give no memory back to the system.

    For a process that measures only: it holds for the rest of its life.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, max_mappings = -1, -4  # of glibc's malloc.h
        mallopt(trim_threshold, -1)
        mallopt(max_mappings, 0)


def measure(workload: Workload, seconds: float) -> tuple[float, float]:
    """Milliseconds of the forward, and of forward and backward.

    Raises:
        ArithmeticError: the results differ from the definition.
    """
    inputs = draw(workload, dtype=torch.float32)
    function = saccade_function(workload)
    functions = {
        direction: timed_call(function, inputs, direction != DIRECTIONS[0])
        for direction in DIRECTIONS
    }
    Truth(workload, inputs, backward=True).check("saccade", functions[DIRECTIONS[1]]())
    timings = alternate(functions, seconds, min_rounds=3)
    forward, both = (float(f"{timings[name].milliseconds:.4g}") for name in DIRECTIONS)
    return forward, both


def measure_shape(workload: Workload, seconds: float) -> ShapeMeasurement:
    """The bandwidths of one shape."""
    forward, both = measure(workload, seconds)
    sizes = work(workload), total_work(workload)
    return ShapeMeasurement(
        workload.name,
        describe(workload),
        workload.head_dim,
        float(f"{sizes[0] / 1e6:.4g}"),
        forward,
        both,
        *(
            float(f"{size / 1e6 / time:.4g}")
            for size, time in zip(sizes, (forward, both), strict=True)
        ),
    )


def summarise(shapes: Sequence[ShapeMeasurement], direction: str) -> dict[str, object]:
    """The median bandwidth in GB/s, how far the worst is below it, and the slowest shapes by name."""
    ordered = sorted(shapes, key=lambda shape: shape.bandwidth(direction))
    every = [shape.bandwidth(direction) for shape in ordered]
    full = [shape.bandwidth(direction) for shape in ordered if shape.fills_vectors] or every
    return {
        "direction": direction,
        "median": float(f"{statistics.median(every):.3g}"),
        "worst_ratio": float(f"{statistics.median(every) / every[0]:.3g}"),
        "worst_ratio_of_full_vectors": float(f"{statistics.median(full) / full[0]:.3g}"),
        "worst": [f"{shape.name}: {shape.shape}" for shape in ordered[:WORST]],
    }


def save_plot(shapes: Sequence[ShapeMeasurement], path: Path) -> None:
    """Draws bandwidth against work; the worst shapes carry their rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for panel, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
        ordered = sorted(shapes, key=lambda one: one.bandwidth(direction))
        x, y = [one.megabytes for one in ordered], [one.bandwidth(direction) for one in ordered]
        fills = ["#0072b2" if one.fills_vectors else "#b0b0b0" for one in ordered]
        panel.scatter(x, y, s=16, color=fills)
        panel.axhline(statistics.median(y), color="black", linewidth=1)
        for rank in range(min(WORST, len(shapes))):
            panel.annotate(f" {rank + 1}", (x[rank], y[rank]), color="#d55e00")
        panel.set(title=direction, xscale="log", yscale="log", ylabel="effective bandwidth, GB/s")
        panel.set_xlabel("value rows read, MB; blue: head_dim a multiple of 16; line: median")
    figure.suptitle(f"{machine()['processor']}, {torch.get_num_threads()} threads", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--shapes", type=int, default=200, help="random ones, beside the workloads")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    parser.add_argument("--case", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep.json")
    parser.add_argument("--plot", type=Path, help="for example docs/images/sweep.png")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    workloads = [WORKLOADS[name] for name in arguments.case or WORKLOADS]
    workloads += random_workloads(arguments.shapes, arguments.seed)
    shapes = [measure_shape(workload, arguments.seconds) for workload in workloads]
    summaries = [summarise(shapes, direction) for direction in DIRECTIONS]
    print(json.dumps(summaries, indent=1))
    head = {"method": METHOD, "threads": torch.get_num_threads(), "summary": summaries}
    rows = {"shapes": [shape._asdict() for shape in shapes]}
    write_results(arguments.output, "python -m benchmarks.sweep", head | rows)
    if arguments.plot:
        save_plot(shapes, arguments.plot)


if __name__ == "__main__":
    main()
