"""The backward of Saccade, in both modes, and of its peers: compared with the truth, then timed in turns.

Backward alone is `torch.autograd.grad` by all inputs on a graph that is kept; the forward ran on the stream on
which it is captured, for that is where its backward runs. Beside it forward and backward together, the forward
by itself (in the same turns, for their ratio), and the peak of the memory that both take beyond the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.checks import deterministic
from benchmarks.gpu.goals import COLD, DETERMINISTIC, EAGER, FILLING, SINGLE, WARM
from benchmarks.gpu.gradient_truth import truth_of_gradients
from benchmarks.gpu.peers import SACCADE, GpuPeer
from benchmarks.gpu.race import of_workload
from benchmarks.gpu.results import Deadline, Results, ensure_device, reason_of
from benchmarks.gpu.speed import (
    Setting,
    add_rows,
    for_each_setting,
    input_sets,
    peers_here,
    settings,
)
from benchmarks.gpu.timing import Clock, Timing, called, flushed, replayed
from benchmarks.gpu.variants import Inputs as VariantInputs
from saccade.benchmark.operator import ALLOWED_ON_EDGES, TOLERANCES
from saccade.benchmark.workloads import Inputs

FORWARD = "forward"
Run = Callable[[], Any]
Modes = dict[str, Callable[[], AbstractContextManager[None]]]
# Of Saccade. torch fills new memory in deterministic mode unless it is told not to: both are timed.
OWN_MODES: Modes = {
    SACCADE: nullcontext,
    DETERMINISTIC: lambda: deterministic(filling=False),
    FILLING: deterministic,
}


class Contender(NamedTuple):
    """One peer on each of the sets of inputs."""

    computes_in: str
    forward: list[Run]
    backward: list[Run]
    both: list[Run]


def measure_backward(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    seed: int,
    *,
    cases: Sequence[str] = (),
    quick: bool = False,
) -> None:
    """Times what the results do not have yet; rows under `backward` and `left_out`."""
    clock, here = Clock(device), peers_here(results)

    def measure(one: Setting) -> None:
        with clock.on_its_stream():
            measure_setting(results, clock, one, here, seed)

    todo = settings(cases, quick=quick)
    for_each_setting(results, device, deadline, todo, measure, key="backward", of="backward: ")


def measure_setting(
    results: Results, clock: Clock, setting: Setting, peers: Sequence[GpuPeer], seed: int
) -> None:
    """One setting: gradients are compared with the truth once, then all are timed in turns."""
    device, workload = clock.device, setting.case()
    dtype = getattr(torch, setting.dtype)
    inputs = setting.draw(seed)
    truth = Truth(setting, inputs, device)
    sets, grad_output = input_sets(inputs, device), inputs.grad_output.to(device)
    contenders: dict[str, Contender] = {}
    errors, peaks, failed = {}, {}, {}

    def leave_out(name: str, reason: str) -> None:
        row = {"peer": name, "reason": f"backward: {reason}"}
        results.add("left_out", setting._asdict() | row)

    for peer in peers:
        modes: Modes = OWN_MODES if peer.name == SACCADE else {peer.name: nullcontext}
        for name, mode in modes.items():
            doing = {"key": "backward", "name": f"backward: {setting.name}", "peer": peer.name}
            results.put("doing", doing)
            reason = peer.refusal(workload, dtype)
            if reason is None:
                try:
                    runs = [runs_of(peer, setting, one, grad_output, mode) for one in sets]
                    computes_in = str(peer.computes_in(dtype))[6:]
                    contender = Contender(computes_in, *map(list, zip(*runs, strict=True)))
                    errors[name] = truth.error(contender.both[0]())
                    peaks[name] = peak_bytes(device, contender.both[0])
                    contenders[name] = contender
                except Exception as error:
                    reason = failed[name] = reason_of(error)
                    ensure_device(device, error)
            if reason is not None:
                leave_out(name, reason)
    results.put("doing", {"key": "backward", "name": f"backward: {setting.name}", "peer": None})
    truth.forget()
    backward, both, refused = _times(clock, contenders)
    for name, why in refused.items():
        leave_out(name, f"not in a graph: {why}")
    rows = []
    for name, contender in contenders.items():
        error = errors[name]
        row = setting._asdict() | {
            "peer": name,
            "computes_in": contender.computes_in,
            "error": float(f"{error:.2g}"),
            "exact": error <= truth.tolerance,
            "sets": len(sets),
            "times": _as_dicts(backward[name]),
            "both": _as_dicts(both[name]),
            "peak_bytes": peaks[name],
            "ratios": {},
        }
        if name == SACCADE:
            row[FORWARD] = _as_dicts(backward[FORWARD])
        rows.append(row)
    add_rows(results, "backward", rows, failed, f"backward, {setting.name}")


def runs_of(
    peer: GpuPeer,
    setting: Setting,
    inputs: Inputs,
    grad_output: Tensor,
    mode: Callable[[], AbstractContextManager[None]],
) -> tuple[Run, Run, Run]:
    """Forward, backward on a graph that is kept, and both, on leaves of the peer's own layout and dtype."""
    function, tensors = peer.parts(setting.case(), inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with mode():
        output = function(*leaves)
    grad_output = grad_output.to(output.dtype, copy=True).view(output.shape)

    def forward() -> Any:
        with torch.no_grad():
            return function(*leaves)

    def backward() -> Any:
        with mode():
            return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    def both() -> Any:
        with mode():
            return torch.autograd.grad(function(*leaves), leaves, grad_output)

    return forward, backward, both


class Truth:
    """The gradients by the definition, by the CPU's kernels in float64: of an encoder the reference takes minutes."""

    def __init__(self, setting: Setting, inputs: Inputs, device: torch.device) -> None:
        import saccade

        workload = setting.case()
        given = VariantInputs(inputs.value, tuple(inputs[1:3]), None)
        variant = of_workload(workload, setting.dtype)
        found = truth_of_gradients(variant, given, inputs.grad_output, saccade)
        self.gradients = [expected.gradient.to(device) for expected in found]
        self.tolerance = TOLERANCES[inputs.value.dtype]

    def error(self, found: Sequence[Tensor]) -> float:
        """Of the gradients of value and, where a peer has them, locations and weights.

        In parts of the largest number; NaN counts as infinite. A few locations may be at grid lines, where
        peers that round positions otherwise find the gradient of the other side.
        """
        worst = 0.0
        plain = len(found) == len(self.gradients)
        for number, (got, want) in enumerate(zip(found, self.gradients, strict=False)):
            if number and not plain:
                break
            if not number and got.shape[2] != want.shape[2]:  # a shared head, copied for all
                got = got.sum(2, keepdim=True)
            errors = (got.reshape(want.shape).double() - want).abs().flatten() / want.abs().max()
            beyond = int(ALLOWED_ON_EDGES * errors.numel()) if number == 1 else 0
            error = float(errors.nan_to_num(torch.inf).topk(beyond + 1).values[-1])
            worst = max(worst, error)
        return worst

    def forget(self) -> None:
        """Gives back its memory."""
        self.gradients = []


def peak_bytes(device: torch.device, both: Run) -> int | None:
    """What a forward and a backward take at most beyond what is there, their results included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    both()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


Times = dict[str, dict[str, Timing]]


def _times(clock: Clock, contenders: dict[str, Contender]) -> tuple[Times, Times, dict[str, str]]:
    """By contender and way: of the backward (and of Saccade's forward), then of both."""
    alone = {name: one.backward for name, one in contenders.items()}
    if SACCADE in contenders:
        alone[FORWARD] = contenders[SACCADE].forward
    together = {name: one.both for name, one in contenders.items()}
    if not contenders:
        return {}, {}, {}
    cold, refused = replayed(clock, alone, warm=False)
    in_graphs = {name: runs for name, runs in alone.items() if name not in refused}
    warm, _ = replayed(clock, in_graphs, warm=True) if in_graphs else ({}, {})
    both_cold, _ = replayed(clock, {n: r for n, r in together.items() if n in cold}, warm=False)
    backward = {COLD: cold, WARM: warm, SINGLE: flushed(clock, alone)}
    both = {COLD: both_cold, EAGER: called(clock, together)}
    return _by_name(alone, backward), _by_name(together, both), refused


def _by_name(names: Any, ways: dict[str, dict[str, Timing]]) -> Times:
    return {
        name: {way: found[name] for way, found in ways.items() if name in found} for name in names
    }


def _as_dicts(timings: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    return {way: timing._asdict() for way, timing in timings.items()}
