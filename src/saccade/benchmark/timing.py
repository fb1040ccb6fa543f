"""The clock: peers in one process, taking turns, and the machine they ran on."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import saccade


def alternate(
    functions: Mapping[str, Callable[[], object]], seconds: float, least_rounds: int = 5
) -> dict[str, float]:
    """Median time of each function in milliseconds, measured in turns.

    Each round times every function once, so that a machine that slows down slows all of them.
    A short function is called for some 10 ms a turn: its inputs are then in the caches as far as they
    fit, which is how a layer finds what the layer before has just written.

    Args:
        functions: what to time, by name.
        seconds: how long the rounds take in all, at least.
        least_rounds: rounds to do however long they take.
    """
    calls = {}
    for name, function in functions.items():
        function()  # first call: memory is allocated, caches are filled
        begin = time.perf_counter()
        function()
        calls[name] = max(1, round(10e-3 / max(1e-9, time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < least_rounds or time.perf_counter() < end:
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - begin) / calls[name] * 1e3)
    return {name: statistics.median(measured) for name, measured in times.items()}


def machine() -> dict[str, str]:
    """What a figure depends on: processor, versions, kernel. No name of the machine."""
    processor = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if description.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in description.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = f"{names[0]}, {len(names)} cores" if names else processor
    found = {
        "processor": processor,
        "saccade": saccade.__version__,
        "backend": saccade.which_backend().name,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "system": platform.system(),
    }
    try:
        import transformers
    except ImportError:
        return found
    return found | {"transformers": transformers.__version__}
