"""What is asked of the kernels, and whether the figures meet it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.peers import SACCADE, UPSTREAM
from saccade.benchmark.workloads import WORKLOADS

COLD, WARM = "graph, cold L2", "graph, warm L2"
SINGLE, EAGER = "single, flushed L2", "eager, wall"
WAYS = (COLD, WARM, SINGLE, EAGER)
# Saccade's gradients with torch.use_deterministic_algorithms; and with new memory filled, as torch then does.
DETERMINISTIC, FILLING = f"{SACCADE} deterministic", f"{SACCADE} deterministic, filling"

# Many queries: what the gather floor is a goal for.
ENCODERS = (
    *("detr-encoder", "dino5-encoder", "mask2former-encoder", "bevformer-tsa", "bevformer-sca"),
    *("medical-3d", "tadtr-1d", "plain-single-map"),
)
SIXTEEN_BITS = ("bfloat16", "float16")
LEAST_OF_GATHER_FLOOR = 0.5
MOST_OF_FORWARD, MOST_OF_FAST_MODE = 3, 1.5
TRAINING_STEPS = 300

Row = dict[str, Any]


class Goal(NamedTuple):
    """One figure that is asked for, and what was found."""

    name: str
    wanted: str
    measured: str
    met: bool | None
    """None: there is no figure."""


def goals(
    figures: Sequence[Row],
    floors: Sequence[Row],
    backward: Sequence[Row] = (),
    training: Sequence[Row] = (),
) -> list[Goal]:
    """All goals with the figures of `time` (forward and backward), `floors` and training."""
    found = []
    for batch_size in (1, 8):
        for dtype, most, aim in (("bfloat16", 60, 45), ("float32", 70, 55)):
            found.append(_encoder_time(figures, dtype, batch_size, most, aim))
    found += [_times_upstream(figures, "", 3), _times_sixteen_bits(figures, "", 2)]
    for dtype in ("float32", "bfloat16"):
        found.append(_decoder_time(figures, dtype))
    for case in ENCODERS:
        for dtype in ("float32", "bfloat16"):
            found.append(_of_gather_floor(figures, floors, case, dtype))
    found += [_of_own_forward(backward, dtype) for dtype in ("float32", "bfloat16")]
    found.append(_times_upstream(backward, " backward", 4))
    found.append(_times_sixteen_bits(backward, " backward", 3))
    found += [_of_fast_mode(backward, dtype) for dtype in ("float32", "bfloat16")]
    return found + _of_training(training)


def setting(row: Row) -> tuple[Any, ...]:
    """What a figure holds for, but for the peer."""
    return (row["workload"], row["batch_size"], row["dtype"], row["locations"])


def of(
    figures: Iterable[Row],
    workload: str,
    batch_size: int,
    dtype: str,
    locations: str = "model-like",
) -> dict[str, Row]:
    """The figures of one setting, by peer."""
    wanted = (workload, batch_size, dtype, locations)
    return {row["peer"]: row for row in figures if setting(row) == wanted}


def time_of(row: Row | None, way: str) -> float:
    """Microseconds of a call, NaN where there is no figure."""
    if row is None:
        return math.nan
    timing = row["times"].get(way)
    return math.nan if timing is None else float(timing["median"])


def fastest_way(row: Row | None) -> str:
    """The way in which a peer is compared: in a graph, or single calls where it cannot be captured."""
    return COLD if row is not None and COLD in row["times"] else SINGLE


def _encoder_time(figures: Sequence[Row], dtype: str, batch_size: int, most: int, aim: int) -> Goal:
    row = of(figures, "detr-encoder", batch_size, dtype).get(SACCADE)
    cold, warm = (time_of(row, way) / batch_size for way in (COLD, WARM))
    maps = "" if batch_size == 1 else f", batch {batch_size}, a map"
    return Goal(
        f"detr-encoder forward, {dtype}{maps}",
        f"≤ {most} µs (aim {aim})",
        _missing(cold) or f"{cold:.1f} µs cold, {warm:.1f} µs warm",
        _met(cold, cold <= most),
    )


def _times_upstream(figures: Sequence[Row], direction: str, least: int) -> Goal:
    rows = of(figures, "detr-encoder", 1, "float32")
    ratio = _ratio(rows.get(UPSTREAM), rows.get(SACCADE))
    text = _missing(ratio, f"{UPSTREAM} is not here") or f"{ratio:.2f} ×"
    name = f"detr-encoder{direction} float32 against upstream's op"
    return Goal(name, f"≥ {least} ×", text, _met(ratio, ratio >= least))


def _times_sixteen_bits(figures: Sequence[Row], direction: str, least: int) -> Goal:
    rows = of(figures, "detr-encoder", 1, "bfloat16")
    ratios = {
        name: _ratio(row, rows.get(SACCADE))
        for name, row in rows.items()
        if row["computes_in"] in SIXTEEN_BITS and not name.startswith(SACCADE)
    }
    ratios = {name: ratio for name, ratio in ratios.items() if ratio == ratio}
    best = min(ratios, key=ratios.__getitem__, default="")
    ratio = ratios.get(best, math.nan)
    text = _missing(ratio, "no peer with 16 bits is here") or f"{ratio:.2f} × ({best})"
    name = f"detr-encoder{direction} bfloat16 against the best 16-bit peer"
    return Goal(name, f"≥ {least} ×", text, _met(ratio, ratio >= least))


def _of_own_forward(backward: Sequence[Row], dtype: str) -> Goal:
    case = ("detr-encoder", 1, dtype)
    row = of(backward, *case).get(SACCADE)
    cold, warm = (times_its_forward(backward, *case, way=way) for way in (COLD, WARM))
    return Goal(
        f"detr-encoder backward, {dtype}, of its own forward",
        f"≤ {MOST_OF_FORWARD} ×",
        _missing(cold) or f"{cold:.2f} × cold ({time_of(row, COLD):.4g} µs), {warm:.2f} × warm",
        _met(cold, cold <= MOST_OF_FORWARD),
    )


def _of_fast_mode(backward: Sequence[Row], dtype: str) -> Goal:
    rows = of(backward, "detr-encoder", 1, dtype)
    fast = rows.get(SACCADE)
    ratio, filling = (
        time_of(rows.get(name), COLD) / time_of(fast, COLD) for name in (DETERMINISTIC, FILLING)
    )
    return Goal(
        f"detr-encoder backward, {dtype}, deterministic of fast mode",
        f"≤ {MOST_OF_FAST_MODE} ×",
        _missing(ratio) or f"{ratio:.2f} ×; {filling:.2f} × where torch fills new memory",
        _met(ratio, ratio <= MOST_OF_FAST_MODE),
    )


def _of_training(training: Sequence[Row]) -> list[Goal]:
    row: Row = next((row for row in training if not row["reason"]), {})
    why = next((row["reason"] for row in training), "") or "not measured"
    ratio, other = row.get("ratio", math.nan), row.get("why", "")
    # Against the model as it comes a figure says nothing about the hub's kernel.
    against = f", against {row['against']}: {other}" if other else ""
    peaks = [row.get(key, {}).get("peak_bytes") for key in ("before", "after")]
    before, after = (math.nan if peak is None else peak / 2**30 for peak in peaks)
    steps, bad = row.get("steps", 0), row.get("not_finite_at")
    enough = False if bad is not None else True if steps >= TRAINING_STEPS else None
    text = f"{steps} steps, " + ("no NaN" if bad is None else f"not finite at step {bad}")
    name = "Deformable DETR, training step in bfloat16 autocast"
    return [
        Goal(
            f"{name}, against the hub kernel",
            "≥ 1.3 ×",
            _missing(ratio, why) or f"{ratio:.2f} ×{against}",
            None if other else _met(ratio, ratio >= 1.3),
        ),
        Goal(
            f"{name}, peak memory",
            "not above",
            _missing(after, why) or f"{after:.2f} GiB, before {before:.2f}{against}",
            None if other else _met(after, after <= before),
        ),
        Goal(f"{name}, without NaN", f"{TRAINING_STEPS} steps", text if steps else why, enough),
    ]


def _decoder_time(figures: Sequence[Row], dtype: str) -> Goal:
    row = of(figures, "detr-decoder", 1, dtype).get(SACCADE)
    cold, warm = (time_of(row, way) for way in (COLD, WARM))
    return Goal(
        f"detr-decoder forward in a CUDA graph, {dtype}",
        "≤ 6 µs",
        _missing(warm) or f"{warm:.2f} µs warm, {cold:.2f} µs cold",
        _met(warm, warm <= 6),
    )


def _of_gather_floor(figures: Sequence[Row], floors: Sequence[Row], case: str, dtype: str) -> Goal:
    share = share_of_floor(figures, floors, case, WORKLOADS[case].batch_size, dtype)
    text = _missing(share) or f"{share:.2f}"
    return Goal(
        f"{case}, {dtype}: share of the gather floor",
        f"≥ {LEAST_OF_GATHER_FLOOR}",
        text,
        _met(share, share >= LEAST_OF_GATHER_FLOOR),
    )


def share_of_floor(
    figures: Sequence[Row], floors: Sequence[Row], case: str, batch_size: int, dtype: str
) -> float:
    """The gather floor's time over Saccade's, both in a graph with a cold L2."""
    own = time_of(of(figures, case, batch_size, dtype).get(SACCADE), COLD)
    floor = time_of(of(floors, case, batch_size, dtype).get("gathers"), COLD)
    return floor / own


def times_its_forward(
    backward: Sequence[Row],
    case: str,
    batch_size: int,
    dtype: str,
    locations: str = "model-like",
    *,
    way: str = COLD,
) -> float:
    """Saccade's backward over the forward that took part in the same turns."""
    row = of(backward, case, batch_size, dtype, locations).get(SACCADE)
    forward = None if row is None else row | {"times": row.get("forward", {})}
    return time_of(row, way) / time_of(forward, way)


def _ratio(peer: Row | None, own: Row | None) -> float:
    way = fastest_way(peer)
    return time_of(peer, way) / time_of(own, way)


def _met(figure: float, met: bool) -> bool | None:
    return None if math.isnan(figure) else met


def _missing(figure: float, why: str = "not measured") -> str:
    return why if math.isnan(figure) else ""
