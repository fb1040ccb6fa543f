"""A sweep over shapes: where the kernel is slow for the work it does, and how its time grows.

The work is the cache lines that the value rows lie in which the forward reads: B · Q · M · P · 4 corners
(on a line 2, in a volume 8), each a row of D · itemsize bytes. A row of 4 bytes takes a line of 64, and
an instruction, as a row of 64 does; one of 44 bytes lies in 1.6 lines on average. The backward reads
them again and adds as many to the gradient of the value, which has to be written whole even where few
queries look at a large map: forward and backward count three times the rows and once the value. Work
over time is an effective bandwidth, the same measure for every shape. Rows come mostly from caches, so
it may exceed the memory's. Memory stays with the process: what the system takes to clear pages that were
given back to it, on a virtual machine up to ten times the kernel's work, is not the kernel's. Nothing is
left out, and the worst are named.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saccade.benchmark.operator import Truth, timed_call
from saccade.benchmark.peers import Saccade
from saccade.benchmark.plan import ENCODERS
from saccade.benchmark.report import record, write_text
from saccade.benchmark.timing import alternate
from saccade.benchmark.workloads import WORKLOADS, Workload, draw

# Value rows of a random shape: at some 10 to 100 GB/s a forward takes 0.2 to 50 ms.
LEAST_BYTES, MOST_BYTES = 4e6, 5e8
LINE_BYTES = 64
WORST = 5
"""How many of the slowest shapes are named."""
DIRECTIONS = ("forward", "forward + backward")
METHOD = (
    "float32, model-like locations; every shape by itself, its output and the gradients of locations "
    "and weights compared with the definition, then forward and forward + backward in turns, medians "
    "of rounds of some 10 ms of calls: warm caches, memory kept by the process. Bandwidth: the lines of "
    "64 bytes that the value rows read lie in, B Q M P 4 rows of D itemsize bytes, over the time; "
    "forward + backward: three times these and once the value"
)


class ShapeFigure(NamedTuple):
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
        """Whether head_dim is a multiple of the widest vector's 16 numbers."""
        return self.head_dim % 16 == 0

    def bandwidth(self, direction: str) -> float:
        """Of one of `DIRECTIONS`."""
        return self.forward_bandwidth if direction == DIRECTIONS[0] else self.both_bandwidth


class ScalingFigure(NamedTuple):
    """One point of a curve."""

    curve: str
    """"queries", "levels x points" or "threads"."""
    of: str
    x: int
    forward_ms: float
    both_ms: float


def work(workload: Workload) -> int:
    """The bytes of the cache lines that the float32 value rows lie in which the forward reads."""
    sampled = workload.batch_size * workload.queries * workload.num_heads * sum(workload.points)
    rows = sampled * (1 << workload.spatial_dims)
    return round(rows * lines_of_a_row(workload.head_dim * 4) * LINE_BYTES)


def lines_of_a_row(row_bytes: int) -> float:
    """How many cache lines a row lies in, on average over rows one after the other from a line's begin."""
    rows = LINE_BYTES // math.gcd(row_bytes, LINE_BYTES)  # then they begin with a line again
    ends = ((row * row_bytes, (row + 1) * row_bytes - 1) for row in range(rows))
    return sum(last // LINE_BYTES - first // LINE_BYTES + 1 for first, last in ends) / rows


def work_of_both(workload: Workload) -> int:
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
    """Shapes that nobody chose: prime numbers of queries, odd head_dim, 1 to 9 levels, lists of points."""
    chosen = random.Random(seed)
    found = []
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
        wanted = math.exp(chosen.uniform(math.log(LEAST_BYTES), math.log(MOST_BYTES)))
        queries = _prime_from(max(2, round(wanted / work(workload))))
        found.append(workload._replace(num_queries=queries))
    return found


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
        trim_threshold, most_mappings = -1, -4  # of glibc's malloc.h
        mallopt(trim_threshold, -1)
        mallopt(most_mappings, 0)


def measure(workload: Workload, seconds: float) -> tuple[float, float]:
    """Milliseconds of the forward, and of forward and backward.

    Raises:
        ArithmeticError: the results differ from the definition.
    """
    inputs = draw(workload, dtype=torch.float32, uniform=False)
    attend = Saccade().prepare(workload, inputs)
    functions = {
        direction: timed_call(attend, inputs, direction != DIRECTIONS[0])
        for direction in DIRECTIONS
    }
    Truth(workload, inputs, backward=True).check("saccade", functions[DIRECTIONS[1]]())
    timings = alternate(functions, seconds, least_rounds=3)
    forward, both = (float(f"{timings[name].milliseconds:.4g}") for name in DIRECTIONS)
    return forward, both


def shape_figure(workload: Workload, seconds: float) -> ShapeFigure:
    """The bandwidths of one shape."""
    forward, both = measure(workload, seconds)
    sizes = work(workload), work_of_both(workload)
    return ShapeFigure(
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


def scaling_steps() -> list[tuple[str, str, int, Workload]]:
    """(curve, of, x, workload); the threads of the last curve are x."""
    steps = []
    for queries in (1, 10, 100, 300, 1000, 3000, 10000, 30000):
        workload = WORKLOADS["detr-decoder"]._replace(num_queries=queries)
        steps.append(("queries", "maps of detr-decoder", queries, workload))
    for levels in (1, 2, 4, 8):
        for points in (1, 2, 4, 8):
            workload = Workload("curve", "", [(48, 48)] * levels, 2000, num_points=points)
            steps.append(
                ("levels x points", f"{levels} level{'s'[: levels - 1]}", levels * points, workload)
            )
    many = torch.get_num_threads()
    for name in ENCODERS:
        for threads in sorted({1, many}):
            steps.append(("threads", name, threads, WORKLOADS[name]))
    return steps


def scaling_figures(
    steps: Sequence[tuple[str, str, int, Workload]], seconds: float
) -> Iterator[ScalingFigure]:
    """The points of the curves."""
    many = torch.get_num_threads()
    for curve, of, x, workload in steps:
        torch.set_num_threads(x if curve == "threads" else many)
        try:
            yield ScalingFigure(curve, of, x, *measure(workload, seconds))
        finally:
            torch.set_num_threads(many)


class Summary(NamedTuple):
    """One direction of all shapes."""

    direction: str
    median: float
    """GB/s."""
    worst_ratio: float
    """How far the worst is below the median: median / worst."""
    worst_ratio_of_full_vectors: float
    """The same among the shapes whose head_dim fills vectors: their median / their worst."""
    worst: list[str]
    """The slowest shapes, the worst first."""


def summarise(figures: Sequence[ShapeFigure]) -> list[Summary]:
    """For each direction the median, and the worst by name."""
    found = []
    for direction in DIRECTIONS:
        ordered = sorted(figures, key=lambda figure: figure.bandwidth(direction))
        every = [figure.bandwidth(direction) for figure in figures]
        full = [figure.bandwidth(direction) for figure in figures if figure.fills_vectors]
        found.append(
            Summary(
                direction,
                float(f"{statistics.median(every):.3g}"),
                float(f"{statistics.median(every) / min(every):.3g}"),
                float(f"{statistics.median(full or every) / min(full or every):.3g}"),
                [f"{figure.name}: {figure.shape}" for figure in ordered[:WORST]],
            )
        )
    return found


def write(
    command: str,
    shapes: Sequence[ShapeFigure],
    scaling: Sequence[ScalingFigure],
    path: Path,
) -> None:
    """Writes a JSON file, one figure a line."""
    head: dict[str, Any] = record(command) | {
        "method": METHOD,
        "threads": torch.get_num_threads(),
        "summary": [summary._asdict() for summary in summarise(shapes)],
    }
    parts = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for key, rows in (("shapes", shapes), ("scaling", scaling)):
        lines = ",\n".join(json.dumps(row._asdict()) for row in rows)
        parts.append(f'"{key}": [\n{lines}\n]')
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def described(summaries: Sequence[Summary], curves: Sequence[ScalingFigure]) -> Iterator[str]:
    """For the terminal, line by line."""
    for summary in summaries:
        yield (
            f"{summary.direction}: the worst shape is {summary.worst_ratio:.1f} × below the median "
            f"of {summary.median:.3g} GB/s ({summary.worst_ratio_of_full_vectors:.1f} × among those "
            f"whose head_dim is a multiple of 16); the slowest:"
        )
        yield from (f"  {name}" for name in summary.worst)
    for curve in dict.fromkeys(figure.curve for figure in curves):
        yield f"\n{curve:>16}    forward  forward + backward"
        for figure in curves:
            if figure.curve == curve:
                yield (
                    f"{figure.x:16} {figure.forward_ms:7.3g} ms {figure.both_ms:16.3g} ms  {figure.of}"
                )
