"""The clock: peers in one process, taking turns, and the machine they ran on."""

from __future__ import annotations

import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import saccade

# Packages whose versions a figure may depend on.
PEER_PACKAGES = ("transformers", "torch-ms-deform-attn", "onnxruntime")
# How long a turn of a short function takes: long enough for the clock, and for its inputs to come
# into the caches as far as they fit, which is how a layer finds what the layer before has written.
TURN_SECONDS = 10e-3
LEAST_ROUNDS = 5
# The one place where slow functions get fewer rounds: the slowest peers take some twenty seconds a
# call, and what a call costs to begin with (threads awake, memory at hand) is lost in a second. Such
# a function's first call counts as its first round, and it takes two more.
SLOW_SECONDS = 1.0
SLOW_ROUNDS = 3


class Timing(NamedTuple):
    """What one function took: the median of its rounds."""

    milliseconds: float
    rounds: int
    calls: int
    """Calls of each round."""


def alternate(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    least_rounds: int = LEAST_ROUNDS,
    *,
    turn_seconds: float = TURN_SECONDS,
    first_seconds: Mapping[str, float] | None = None,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Timing]:
    """Median time of each function, measured in turns.

    Each round times every function once, so that a machine that slows down slows all of them, in an
    order of its own, so that none always follows the same one. A function is called for some 10 ms a
    turn, at least once, after one call that is not timed: the threads of the function before have
    come to rest then. One slower than `SLOW_SECONDS` has no such call and takes part in fewer rounds.

    Args:
        functions: what to time, by name.
        seconds: how long the rounds take in all, at least.
        least_rounds: rounds to do however long they take; slow functions do at most `SLOW_ROUNDS`.
        turn_seconds: how long a turn takes, about. 0: one call, and none before it, so that each
            finds the caches as the function before left them.
        first_seconds: what a first call of each function took, where that has been done.
        within: contexts to take a function's turns in, by its name.
    """
    within = within or {}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    calls, least, slow = {}, {}, {}
    for name, function in functions.items():
        with within.get(name, nullcontext)():
            first = first_seconds[name] if first_seconds else _clock(function)
            slow[name] = first > SLOW_SECONDS
            once = first if slow[name] else _clock(function)
        if slow[name] and least_rounds:
            taken[name].append(first)
        calls[name] = max(1, round(turn_seconds / max(1e-9, once)))
        least[name] = min(least_rounds, SLOW_ROUNDS) if slow[name] else least_rounds
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while True:
        left = end - time.perf_counter()
        # Once the least is done, a function goes on as long as its turn fits into what is left.
        turns = [
            name
            for name, times in taken.items()
            if len(times) < max(1, least[name]) or statistics.median(times) * calls[name] < left
        ]
        if not turns:
            break
        order.shuffle(turns)
        for name in turns:
            with within.get(name, nullcontext)():
                if turn_seconds and not slow[name]:
                    functions[name]()
                taken[name].append(_clock(functions[name], calls[name]))
    return {
        name: Timing(statistics.median(times) * 1e3, len(times), calls[name])
        for name, times in taken.items()
    }


def _clock(function: Callable[[], object], calls: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


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
    for package in PEER_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
