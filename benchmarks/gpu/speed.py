"""Saccade and its peers on the registry's workloads: compared with the truth, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import saccade
from benchmarks.gpu.goals import COLD, EAGER, SINGLE, WARM, fastest_way
from benchmarks.gpu.peers import SACCADE, GpuPeer, all_peers
from benchmarks.gpu.results import (
    Deadline,
    OutOfTimeError,
    Results,
    ensure_device,
    memory_given_back,
    reason_of,
)
from benchmarks.gpu.timing import Clock, Timing, called, flushed, in_turns, l2_bytes, replayed
from saccade.benchmark.operator import TOLERANCES, Truth
from saccade.benchmark.workloads import WORKLOADS, Inputs, Workload, draw

# Sets of inputs are as many as fill the L2 this often over, within these bounds.
TIMES_L2 = 2.2
MOST_SETS = 64
MOST_BYTES_OF_SETS = 3 << 30


class Setting(NamedTuple):
    """What a table of figures holds for."""

    workload: str
    batch_size: int
    dtype: str
    locations: str = "model-like"

    @property
    def name(self) -> str:
        """For a person."""
        batch = f", batch {self.batch_size}" if self.batch_size > 1 else ""
        return f"{self.workload}{batch}, {self.dtype}, {self.locations}"

    def case(self) -> Workload:
        """The workload with this batch."""
        return WORKLOADS[self.workload]._replace(batch_size=self.batch_size)

    def draw(self, seed: int) -> Inputs:
        """Its inputs on the CPU."""
        return draw(
            self.case(),
            dtype=getattr(torch, self.dtype),
            uniform=self.locations == "uniform",
            seed=seed,
        )


def settings(cases: Sequence[str] = (), *, quick: bool = False) -> list[Setting]:
    """What is timed, what the goals ask for first."""
    both = ("float32", "bfloat16")
    first = [Setting("detr-encoder", 1, dtype) for dtype in both]
    first += [Setting("detr-decoder", 1, dtype) for dtype in both]
    first += [Setting("detr-encoder", 8, dtype) for dtype in both]
    rest = [
        Setting(name, workload.batch_size, dtype)
        for name, workload in WORKLOADS.items()
        for dtype in both
    ]
    rest += [Setting("detr-encoder", 1, dtype, "uniform") for dtype in both]
    rest += [
        Setting("detr-decoder", 1, "float32", "uniform"),
        Setting("detr-encoder", 1, "float16"),
    ]
    found = list(dict.fromkeys(first if quick else first + rest))
    return [one for one in found if not cases or one.workload in cases]


def input_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs in memory of their own, together larger than the L2."""
    on_device = Inputs(*(tensor.to(device) for tensor in inputs[:3]), torch.empty(0))
    size = sum(tensor.nbytes for tensor in on_device)
    number = int(TIMES_L2 * l2_bytes(device) / size) + 1
    number = max(2, min(number, MOST_SETS, MOST_BYTES_OF_SETS // size))
    return [on_device, *(Inputs(*(one.clone() for one in on_device)) for _ in range(number - 1))]


class Expected:
    """The truth on some queries, and how far a peer is from it."""

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        truth = Truth(setting.case(), inputs, False)
        self.queries, self.output = truth.queries, truth.expected["output"]
        self.tolerance = TOLERANCES[inputs.value.dtype]

    def error(self, found: Tensor) -> float:
        """Of the output, in parts of the largest number; NaN counts as infinite.

        Raises:
            ArithmeticError: the output has another shape.
        """
        part = found[:, self.queries.to(found.device)].cpu().double()
        if part.shape != self.output.shape:
            raise ArithmeticError(f"got {list(found.shape)} for the output")
        error = float((part - self.output).abs().max() / self.output.abs().max())
        return error if error == error else float("inf")


def measure_speed(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    seed: int,
    *,
    cases: Sequence[str] = (),
    quick: bool = False,
) -> None:
    """Times what the results do not have yet; rows under `figures`, `left_out` and `host`."""
    clock, here = Clock(device), peers_here(results)
    if "host" not in results.found:
        try:
            results.put("host", host_times(clock, device))
        except Exception as error:
            results.put("host", {})
            row = {"name": "a small eager call", "ok": False, "reason": reason_of(error)}
            results.add("checks", row)
            ensure_device(device, error)

    def measure(one: Setting) -> None:
        measure_setting(results, clock, one, here, seed)

    for_each_setting(results, device, deadline, settings(cases, quick=quick), measure)


def peers_here(results: Results) -> list[GpuPeer]:
    """Those that are importable and have not crashed; the results say it of all."""
    crashed = {row["peer"]: row["reason"] for row in results.rows("crashed")}
    peers = {name: peer for name, peer in all_peers().items() if name not in crashed}
    missing = {}
    for name, peer in peers.items():  # an extension of another torch may end the process
        results.put("doing", {"key": "figures", "name": "its import", "peer": name})
        missing[name] = peer.missing()
    results.put("doing", None)
    results.put(
        "peers",
        {
            name: missing.get(name) or crashed.get(name) or f"here {peers[name].version()}".strip()
            for name in all_peers()
        },
    )
    return [peer for name, peer in peers.items() if missing[name] is None]


def for_each_setting(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    todo: Sequence[Setting],
    measure: Callable[[Setting], None],
    *,
    key: str = "figures",
    of: str = "",
) -> None:
    """Measures the settings that have no rows under `key` yet, as far as the time goes.

    `of` stands before the names of those that are skipped, so that forward and backward are told apart.
    """
    timed = {Setting(*(row[name] for name in Setting._fields)) for row in results.rows(key)}
    longest = 0.0
    for one in todo:
        if one in timed or of + one.name in results.rows("skipped"):
            continue
        if deadline.left < longest:
            cut = "backward_cut" if of else "time_cut"
            results.put(cut, f"not timed from here on: {of}{one.name}")
            raise OutOfTimeError
        begin = time.monotonic()
        try:
            with memory_given_back(device):
                measure(one)
        except Exception as error:  # no memory for the inputs, say
            ensure_device(device, error)
            results.rows("skipped").append(of + one.name)
            reason = of + reason_of(error)
            results.add("left_out", one._asdict() | {"peer": "everyone", "reason": reason})
        longest = max(longest, time.monotonic() - begin)


def measure_setting(
    results: Results, clock: Clock, setting: Setting, peers: Sequence[GpuPeer], seed: int
) -> None:
    """One setting: each peer is compared with the truth once, then all are timed in turns."""
    device, workload = clock.device, setting.case()
    dtype = getattr(torch, setting.dtype)
    inputs = setting.draw(seed)
    expected = Expected(setting, inputs)
    sets = input_sets(inputs, device)
    contenders: dict[str, list[Callable[[], Tensor]]] = {}
    errors, computes_in, failed = {}, {}, {}
    with torch.no_grad():
        for peer in peers:
            results.put("doing", {"key": "figures", "name": setting.name, "peer": peer.name})
            reason = peer.refusal(workload, dtype)
            if reason is None:
                try:
                    runs = [peer.prepare(workload, sets[0])]
                    errors[peer.name] = expected.error(runs[0]())
                    computes_in[peer.name] = str(peer.computes_in(dtype))[6:]
                    contenders[peer.name] = runs + [peer.prepare(workload, s) for s in sets[1:]]
                except Exception as error:
                    reason = failed[peer.name] = reason_of(error)
                    ensure_device(device, error)
            if reason is not None:
                results.add("left_out", setting._asdict() | {"peer": peer.name, "reason": reason})
        results.put("doing", {"key": "figures", "name": setting.name, "peer": None})
        times, refused = _times(clock, contenders)
    for name, why in refused.items():
        reason = f"not in a graph: {why}"
        results.add("left_out", setting._asdict() | {"peer": name, "reason": reason})
    rows = []
    for name in contenders:
        error = errors[name]
        rows.append(
            setting._asdict()
            | {
                "peer": name,
                "computes_in": computes_in[name],
                "error": float(f"{error:.2g}"),
                "exact": error <= expected.tolerance,
                "sets": len(sets),
                "times": {way: timing._asdict() for way, timing in times[name].items()},
                "ratios": {},
            }
        )
    add_rows(results, "figures", rows, failed, setting.name)


def add_rows(
    results: Results, key: str, rows: list[dict[str, Any]], failed: dict[str, str], name: str
) -> None:
    """Adds one setting's rows with their ratios; what is wrong with Saccade itself is a failed check."""
    own = next((row for row in rows if row["peer"] == SACCADE), None)
    for row in rows:
        for way, timing in row["times"].items():
            if own is not None and way in own["times"]:
                ratio = timing["median"] / own["times"][way]["median"]
                row["ratios"][way] = float(f"{ratio:.4g}")
        row["compared_by"] = fastest_way(row)
    results.add(key, *rows)
    wrong = {
        row["peer"]: f"off by {row['error']:.2g} of the largest number"
        for row in rows
        if not row["exact"]
    }
    for peer, reason in (failed | wrong).items():
        if peer.startswith(SACCADE):
            checked = f"timed: {peer}, {name}"
            results.add("checks", {"name": checked, "ok": False, "reason": reason})


def _times(
    clock: Clock, contenders: dict[str, list[Callable[[], Tensor]]]
) -> tuple[dict[str, dict[str, Timing]], dict[str, str]]:
    times: dict[str, dict[str, Timing]] = {name: {} for name in contenders}
    if not contenders:
        return times, {}
    cold, refused = replayed(clock, contenders, warm=False)
    capturable = {name: runs for name, runs in contenders.items() if name not in refused}
    warm, _ = replayed(clock, capturable, warm=True) if capturable else ({}, {})
    ways = {
        COLD: cold,
        WARM: warm,
        SINGLE: flushed(clock, contenders),
        EAGER: called(clock, contenders),
    }
    for way, found in ways.items():
        for name, timing in found.items():
            times[name][way] = timing
    return times, refused


def host_times(clock: Clock, device: torch.device) -> dict[str, Any]:
    """Microseconds of the host for one eager call with hardly any work, beside one multiplication."""
    shapes = [(2, 2)]
    value = torch.randn(1, 4, 1, 16, device=device)
    locations, weights = (
        torch.rand(1, 2, 1, 1, 1, 2, device=device),
        torch.rand(1, 2, 1, 1, 1, device=device),
    )
    references, logits = torch.rand(1, 2, 1, 2, device=device), torch.randn_like(weights)
    sixteen = torch.rand(16, device=device)
    calls: dict[str, Callable[[], object]] = {
        "a multiplication": lambda: sixteen * sixteen,
        "plain": lambda: saccade.deformable_attention(value, shapes, locations, weights),
        "fused": lambda: saccade.fused_deformable_attention(
            value, shapes, references, locations, logits
        ),
    }
    found: dict[str, Any] = {}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            samples = {name: lambda run=run: clock.eager(run, 500) for name, run in calls.items()}
            timings = in_turns(samples, most_seconds=2.0)
        found[mode.__name__] = {name: timing.median for name, timing in timings.items()}
    return found
