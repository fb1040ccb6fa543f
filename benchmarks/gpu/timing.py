"""The clock of a GPU: events around replayed graphs, eager calls, and calls after a flush of the L2."""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

import torch

import saccade
from benchmarks.gpu.results import ensure_device

Run = Callable[[], object]

# A turn of a function in a graph: long enough for the clock, and for the gap before a graph's first kernel.
TURN_SECONDS = 2e-3
MOST_CALLS = 256
ROUNDS = 15
LEAST_ROUNDS = 5
# Clocks of a card that has been idle rise within this.
WARM_SECONDS = 0.2
# Written before a single call: beyond any L2, and long enough to hide what the host does meanwhile.
FLUSH_BYTES = 256 << 20
EAGER_SECONDS = 4e-3


class Timing(NamedTuple):
    """Of one call, in microseconds: the median of the rounds, and the quarters below and above."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int
    """Of one round."""


class Clock:
    """Times what functions do on one device, on its current stream; on a CPU, for tests, by the wall."""

    def __init__(self, device: torch.device) -> None:
        """`device` is a GPU, or the CPU in tests."""
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._flushed: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """On which graphs are captured; a backward runs on the stream of its forward, so that has to be it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """The stream of captures is the current one inside the block."""
        if not self.is_gpu:
            yield
            return
        self.synchronize()
        with torch.cuda.stream(self.stream):
            yield
        self.synchronize()

    def seconds(self, run: Run) -> float:
        """How long the device works on what `run` asks of it."""
        if not self.is_gpu:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def single(self, run: Run) -> float:
        """One eager call, the caches full of something else, the host's part hidden."""
        self.flush()
        return self.seconds(run)

    def flush(self) -> None:
        """Fills the L2 with what no call reads."""
        if self.is_gpu:
            if self._flushed is None:
                self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
            self._flushed.fill_(random.randrange(256))

    def forget(self) -> None:
        """Gives back the memory that `flush` writes."""
        self._flushed = None

    def eager(self, run: Run, calls: int) -> float:
        """Seconds of one call among several back to back, by the wall, as a user makes them."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return (time.perf_counter() - begin) / calls

    def synchronize(self) -> None:
        """Waits until the device has nothing left to do."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def graph(self, calls: Sequence[Run], *, keep: bool = False) -> Run:
        """One CUDA graph of several calls.

        Args:
            calls: what to capture, in this order.
            keep: whether each call's result has memory of its own.

        Raises:
            Exception: something in a call cannot be captured.
        """
        if not self.is_gpu:
            return lambda: [call() for call in calls]
        current, stream = torch.cuda.current_stream(self.device), self.stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        current.wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept = []
        try:
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    result = call()
                    if keep:
                        kept.append(result)
        finally:  # a capture that fails leaves its own stream behind as the current one
            torch.cuda.set_stream(current)
        return graph.replay


def in_turns(
    samples: Mapping[str, Callable[[], float]],
    rounds: int = ROUNDS,
    *,
    calls: Mapping[str, int] | None = None,
    most_seconds: float = 3.0,
) -> dict[str, Timing]:
    """Medians of samples that are taken in turns, each round in an order of its own.

    Args:
        samples: by name, what takes one sample and gives seconds of one call.
        rounds: how many samples of each; fewer, but no fewer than five, when they take too long.
        calls: how many calls a sample is made of, for the record.
        most_seconds: when to stop early.
    """
    order, taken = random.Random(0), {name: [] for name in samples}
    warm = time.perf_counter() + WARM_SECONDS
    names = list(samples)
    once = False
    while not once or time.perf_counter() < warm:
        for name in names:
            samples[name]()
        once = True
    end = time.perf_counter() + most_seconds
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        order.shuffle(names)
        for name in names:
            taken[name].append(samples[name]())
    return {name: summary(times, (calls or {}).get(name, 1)) for name, times in taken.items()}


def summary(seconds: Sequence[float], calls: int = 1) -> Timing:
    """Median and quarters, in microseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    rounded = (float(f"{one * 1e6:.4g}") for one in (middle, low, high))
    return Timing(*rounded, len(seconds), calls)


def replayed(
    clock: Clock, contenders: Mapping[str, Sequence[Run]], *, warm: bool
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of one call in a graph, and why some cannot be captured.

    Args:
        clock: of the device.
        contenders: by name, the same call on each of several sets of inputs, which together are
            larger than the L2.
        warm: the first set over and over; else all sets by turns, so that each finds the caches cold.
    """
    samples, calls, refused = {}, {}, {}
    for name, runs in contenders.items():
        used = runs[:1] if warm else runs
        once = min(clock.seconds(used[0]) for _ in range(2))
        number = max(1, min(MOST_CALLS, round(TURN_SECONDS / max(once, 2e-6))))
        number = -(-number // len(used)) * len(used)
        try:
            replay = clock.graph([used[k % len(used)] for k in range(number)], keep=not warm)
            replay()
            clock.synchronize()
        except Exception as error:
            ensure_device(clock.device, error)
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        calls[name] = number
        samples[name] = lambda replay=replay, number=number: clock.seconds(replay) / number
    return in_turns(samples, calls=calls), refused


def called(clock: Clock, contenders: Mapping[str, Sequence[Run]]) -> dict[str, Timing]:
    """Wall time of one eager call among many, on the first set of inputs."""
    samples, calls = {}, {}
    for name, runs in contenders.items():
        once = min(clock.eager(runs[0], 2) for _ in range(2))
        calls[name] = max(2, min(1000, round(EAGER_SECONDS / once)))
        samples[name] = lambda run=runs[0], number=calls[name]: clock.eager(run, number)
    return in_turns(samples, calls=calls)


def flushed(clock: Clock, contenders: Mapping[str, Sequence[Run]]) -> dict[str, Timing]:
    """Device time of one eager call after the L2 has been filled with something else."""
    found = in_turns({name: lambda r=runs[0]: clock.single(r) for name, runs in contenders.items()})
    clock.forget()
    return found


def l2_bytes(device: torch.device) -> int:
    """Of the card; of a CPU, as much as nothing, so that tests stay small."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def card(device: torch.device) -> dict[str, str]:
    """The card, its driver, its clocks as they are, and the versions that figures depend on."""
    found = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "saccade": saccade.__version__,
    }
    for package in ("triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device.type != "cuda":
        return {"gpu": "none, a CPU for tests"} | found
    properties = torch.cuda.get_device_properties(device)
    found = {
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "l2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
    } | found
    for name in ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit"):
        # Reads only. One field a call: a driver that does not know one gives the others.
        command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
        try:
            printed = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            break
        if printed.returncode == 0 and printed.stdout.strip():
            found[name] = printed.stdout.strip().splitlines()[0]
    return found
