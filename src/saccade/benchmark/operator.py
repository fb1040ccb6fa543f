"""Saccade's operator beside its peers on one workload: compared with the truth, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade import reference
from saccade.benchmark.peers import GridSample, Peer, Saccade
from saccade.benchmark.timing import TURN_SECONDS, alternate
from saccade.benchmark.workloads import Inputs, Workload, draw

# How many queries of a workload the truth is computed for, in float64; every query is alike.
TRUE_QUERIES = 64
# Largest difference allowed, in parts of the largest number of the truth.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# A location closer to a pixel's centre than float32 can tell has its gradient from either side.
ALLOWED_ON_EDGES = 2e-3

Results = Sequence[Tensor]


class Setting(NamedTuple):
    """What a figure holds for."""

    workload: str
    direction: str
    """"forward" or "forward + backward"."""
    locations: str
    """"model-like" or "uniform"."""
    dtype: str
    threads: int
    caches: str
    """"warm", or "as left": one call a turn, after the peers have used the caches."""


class Figure(NamedTuple):
    """One peer's time."""

    setting: Setting
    peer: str
    ratio: float
    """Its time divided by Saccade's."""
    milliseconds: float
    kernel: str
    computes_in: str
    rounds: int
    calls: int


class LeftOut(NamedTuple):
    """A peer without a figure, and why."""

    setting: Setting
    peer: str
    reason: str


def compare(
    workload: Workload,
    peers: Sequence[Peer],
    *,
    dtype: torch.dtype = torch.float32,
    uniform: bool = False,
    backward: bool = False,
    single_call: bool = False,
    seconds: float = 1.0,
) -> Iterator[Figure | LeftOut]:
    """Times one direction of a workload; results are compared with the truth first.

    Args:
        workload: the sizes.
        peers: what to time. The first is Saccade, which the others are divided by.
        dtype: of the values. A peer without 16-bit values computes in float32.
        uniform: locations anywhere on the map, else around the queries' places.
        backward: forward and backward together, else the forward alone.
        single_call: one call a turn, else some 10 ms of calls, which leaves the caches warm.
        seconds: how long the rounds take in all, at least.

    Raises:
        ArithmeticError: a peer's results differ from the truth, so that its time means nothing.
    """
    inputs = draw(workload, dtype=dtype, uniform=uniform)
    wide = Inputs(*(tensor.float() for tensor in inputs))
    setting = setting_of(
        workload, dtype=dtype, uniform=uniform, backward=backward, single_call=single_call
    )
    truth = Truth(workload, inputs, backward)
    functions: dict[str, Callable[[], Results]] = {}
    first_seconds = {}
    for peer in peers:
        given = inputs if peer.native_16_bit else wide
        reason = peer.missing() or peer.refusal(workload, backward=backward)
        if reason is None:
            try:
                with peer.within():
                    run = timed_call(peer.prepare(workload, given), given, backward)
                    if peer.first_call_prepares:
                        run()
                    begin = time.perf_counter()
                    found = run()
                    first_seconds[peer.name] = time.perf_counter() - begin
            except Exception as error:
                if isinstance(peer, Saccade):
                    raise
                first_line = next(iter(str(error).splitlines()), "")
                reason = f"{type(error).__name__}: {first_line}"
        if reason is not None:
            yield LeftOut(setting, peer.name, reason)
            continue
        truth.check(peer.name, found)
        functions[peer.name] = run
        del found  # the gradients of an encoder are large
    timings = alternate(
        functions,
        seconds,
        turn_seconds=0 if single_call else TURN_SECONDS,
        first_seconds=first_seconds,
        within={peer.name: peer.within for peer in peers},
    )
    ours = timings[peers[0].name].milliseconds
    for peer in peers:
        if peer.name in timings:
            timing = timings[peer.name]
            yield Figure(
                setting,
                peer.name,
                float(f"{timing.milliseconds / ours:.4g}"),
                float(f"{timing.milliseconds:.5g}"),
                peer.kernel(),
                _name(dtype if peer.native_16_bit else torch.float32),
                timing.rounds,
                timing.calls,
            )


def setting_of(
    workload: Workload, *, dtype: torch.dtype, uniform: bool, backward: bool, single_call: bool
) -> Setting:
    """What a figure measured now holds for."""
    return Setting(
        workload.name,
        "forward + backward" if backward else "forward",
        "uniform" if uniform else "model-like",
        _name(dtype),
        torch.get_num_threads(),
        "as left" if single_call else "warm",
    )


def saccade_call(workload: Workload) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The public function on this workload."""
    return Saccade().prepare(workload, draw_nothing())


def grid_sample_call(workload: Workload) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """transformers' own code on this workload."""
    return GridSample().prepare(workload, draw_nothing())


def draw_nothing() -> Inputs:
    """Inputs for peers that prepare nothing from them."""
    return Inputs(*(torch.empty(0) for _ in Inputs._fields))


def timed_call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, backward: bool
) -> Callable[[], Results]:
    """The call that is timed; it gives the output, or the output and the three gradients."""
    if not backward:

        def forward() -> Results:
            with torch.no_grad():
                return (attend(*inputs[:3]),)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]

    def both() -> Results:
        output = attend(*leaves)
        return (output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output))

    return both


class Truth:
    """The definition in float64 on some of the queries, and the first peer's gradient of the value."""

    def __init__(self, workload: Workload, inputs: Inputs, backward: bool) -> None:
        self.tolerance = TOLERANCES[inputs.value.dtype]
        random = torch.Generator().manual_seed(1)
        # The output and the gradients of locations and weights depend on their own query alone.
        self.queries = torch.randperm(workload.queries, generator=random)[:TRUE_QUERIES]
        value = inputs.value.double()
        leaves = [part[:, self.queries].double() for part in inputs[1:3]]
        for leaf in leaves:
            leaf.requires_grad_(backward)
        output = reference.deformable_attention(
            value, workload.shapes, *leaves, num_points=workload.points
        )
        self.expected = {"output": output.detach()}
        self.grad_value: Tensor | None = None
        self.first = ""
        if backward:
            grad_output = inputs.grad_output[:, self.queries].double()
            names = ("grad_sampling_locations", "grad_attention_weights")
            gradients = torch.autograd.grad(output, leaves, grad_output)
            self.expected |= dict(zip(names, gradients, strict=True))

    def check(self, peer: str, found: Results) -> None:
        output, *gradients = found
        self._same(peer, "output", output)
        if not gradients:
            return
        grad_value, grad_locations, grad_weights = gradients
        self._same(peer, "grad_sampling_locations", grad_locations, ALLOWED_ON_EDGES)
        self._same(peer, "grad_attention_weights", grad_weights)
        # That of the value depends on all queries: it is compared between the peers.
        if self.grad_value is None:
            self.grad_value, self.first = grad_value, peer
        else:
            _check(
                f"grad_value: {peer} and {self.first}",
                grad_value.float(),
                self.grad_value.float(),
                self.tolerance,
            )

    def _same(self, peer: str, name: str, found: Tensor, apart: float = 0.0) -> None:
        part = found[:, self.queries].double()
        _check(
            f"{name}: {peer} and the reference", part, self.expected[name], self.tolerance, apart
        )


def _check(
    what: str, found: Tensor, expected: Tensor, tolerance: float, apart: float = 0.0
) -> None:
    """At most a share `apart` of the numbers may differ."""
    allowed = tolerance * expected.abs().max()
    errors = (found - expected).abs()
    wrong = ~(errors <= allowed)  # a NaN is wrong
    if wrong.double().mean() > apart:
        raise ArithmeticError(f"{what} differ by {errors.max():.2g}, allowed {allowed:.2g}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
