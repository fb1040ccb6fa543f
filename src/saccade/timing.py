"""Times functions in turns, in one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

# How long a turn of a short function takes: long enough for the clock, and for its inputs to come
# into the caches as far as they fit, which is how a layer finds what the layer before has written.
TURN_SECONDS = 10e-3
MIN_ROUNDS = 5
# Functions slower than this take fewer rounds: the slowest baselines take some twenty seconds per call,
# and what a first call costs (threads that wake up, memory that is mapped) is lost in a second. The first
# call of such a function counts as its first round.
SLOW_SECONDS = 1.0
SLOW_ROUNDS = 3


class Timing(NamedTuple):
    """What one call of a function took, over its rounds, to five digits."""

    milliseconds: float
    """The median."""
    minimum: float
    upper_quartile: float
    rounds: int
    calls: int
    """Calls per round."""


def alternate(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    *,
    turn_seconds: float = TURN_SECONDS,
    contexts: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, Timing]:
    """Times each function in turns.

    Each round times every function once, so that a machine that slows down slows all of them; the order
    changes from round to round, so that no function always follows the same one. A turn takes about 10 ms,
    after one call that is not timed: the threads of the function before have come to rest then. A function
    slower than `SLOW_SECONDS` has no such call and takes part in fewer rounds.

    Args:
        functions: what to time, by name.
        seconds: how long all rounds take together, at least.
        min_rounds: rounds to do however long they take; slow functions do at most `SLOW_ROUNDS`.
        turn_seconds: how long a turn takes, about. With 0 a turn is one call, and none comes before it,
            so that each function finds the caches as the function before left them.
        contexts: context managers in which a function's turns run, by its name.
    """
    contexts = contexts or {}
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls, rounds, slow = {}, {}, {}
    for name, function in functions.items():
        with contexts.get(name, nullcontext)():
            first = _time(function)
            slow[name] = first > SLOW_SECONDS
            once = first if slow[name] else _time(function)
        if slow[name] and min_rounds:
            times[name].append(first)
        calls[name] = max(1, round(turn_seconds / max(1e-9, once)))
        rounds[name] = max(1, min(min_rounds, SLOW_ROUNDS) if slow[name] else min_rounds)
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while True:
        left = end - time.perf_counter()
        # After its least rounds a function goes on as long as its turn fits into the time that is left.
        turns = [
            name
            for name, taken in times.items()
            if len(taken) < rounds[name] or statistics.median(taken) * calls[name] < left
        ]
        if not turns:
            break
        order.shuffle(turns)
        for name in turns:
            with contexts.get(name, nullcontext)():
                if turn_seconds and not slow[name]:
                    functions[name]()
                times[name].append(_time(functions[name], calls[name]))
    return {name: _summarize(taken, calls[name]) for name, taken in times.items()}


def _summarize(times: list[float], calls: int) -> Timing:
    quartile = statistics.quantiles(times, n=4)[2] if len(times) > 1 else times[0]
    seconds = (statistics.median(times), min(times), quartile)
    median, minimum, quartile = (float(f"{1e3 * time:.5g}") for time in seconds)
    return Timing(median, minimum, quartile, len(times), calls)


def _time(function: Callable[[], object], calls: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls
