"""Saccade's operator beside its baselines on one workload: compared with the definition, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade import reference
from saccade.bench.baselines import Baseline, Function, Saccade
from saccade.bench.workloads import Inputs, Workload, draw
from saccade.call import parse_call
from saccade.timing import TURN_SECONDS, alternate

# The truth is computed in float64 for so many queries of a workload; all queries are alike.
NUM_TRUE_QUERIES = 64
# The largest difference allowed, relative to the largest element of the truth.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# A location closer to a pixel's centre than float32 can tell has its gradient from either side.
MAX_SHARE_ON_EDGES = 2e-3


class Setting(NamedTuple):
    """What a measurement holds for."""

    workload: str
    direction: str
    """"forward" or "forward + backward"."""
    locations: str
    """"model-like" or "uniform"."""
    dtype: str
    threads: int
    caches: str
    """"warm", or "as left": one call per turn, after the baselines have used the caches."""


class Measurement(NamedTuple):
    """The time of one baseline."""

    setting: Setting
    baseline: str
    ratio: float
    """Its time divided by Saccade's."""
    milliseconds: float
    """The median of the rounds."""
    kernel: str
    computes_in: str
    rounds: int
    calls: int
    minimum: float | None = None
    """Milliseconds of the fastest round."""
    upper_quartile: float | None = None


class Skipped(NamedTuple):
    """A baseline that was not measured, and why."""

    setting: Setting
    baseline: str
    reason: str


def compare(
    workload: Workload,
    baselines: Sequence[Baseline],
    *,
    dtype: torch.dtype = torch.float32,
    uniform: bool = False,
    backward: bool = False,
    single_call: bool = False,
    seconds: float = 1.0,
) -> Iterator[Measurement | Skipped]:
    """Times one direction of a workload; results are compared with the truth first.

    Args:
        workload: the sizes.
        baselines: what to time. The first is Saccade, whose time the others are divided by.
        dtype: of the values. A baseline without 16-bit values computes in float32.
        uniform: whether locations lie anywhere on the map, or near the queries' positions.
        backward: whether to time forward and backward together, or the forward alone.
        single_call: whether a turn is one call, or 10 ms of calls, which leave the caches warm.
        seconds: how long the rounds take in all, at least.

    Raises:
        ArithmeticError: a baseline's results differ from the truth, so that its time means nothing.
    """
    inputs = draw(workload, dtype=dtype, uniform=uniform)
    float32 = Inputs(*(tensor.float() for tensor in inputs))
    setting = Setting(
        workload.name,
        "forward + backward" if backward else "forward",
        "uniform" if uniform else "model-like",
        _name(dtype),
        torch.get_num_threads(),
        "as left" if single_call else "warm",
    )
    truth = Truth(workload, inputs, backward)
    runs: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for baseline in baselines:
        own_inputs = inputs if baseline.takes_16_bits else float32
        reason = baseline.missing() or baseline.refusal(workload, backward=backward)
        if reason is None:
            try:
                with baseline.context():
                    run = timed_call(baseline.prepare(workload, own_inputs), own_inputs, backward)
                    results = run()
            except Exception as error:
                if isinstance(baseline, Saccade):
                    raise
                reason = describe_error(error)
        if reason is not None:
            yield Skipped(setting, baseline.name, reason)
            continue
        truth.check(baseline.name, results)
        runs[baseline.name] = run
        del results  # the gradients of an encoder are large
    timings = alternate(
        runs,
        seconds,
        turn_seconds=0 if single_call else TURN_SECONDS,
        contexts={baseline.name: baseline.context for baseline in baselines},
    )
    own_time = timings[baselines[0].name].milliseconds
    for baseline in baselines:
        if baseline.name in timings:
            timing = timings[baseline.name]
            yield Measurement(
                setting,
                baseline.name,
                float(f"{timing.milliseconds / own_time:.4g}"),
                float(f"{timing.milliseconds:.5g}"),
                baseline.kernel(),
                _name(dtype if baseline.takes_16_bits else torch.float32),
                timing.rounds,
                timing.calls,
                float(f"{timing.minimum:.5g}"),
                float(f"{timing.upper_quartile:.5g}"),
            )


def describe_error(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def timed_call(
    function: Function, inputs: Inputs, backward: bool
) -> Callable[[], Sequence[Tensor]]:
    """The call that is timed; it returns the output, or the output and the three gradients."""
    if not backward:

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return (function(*inputs[:3]),)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]

    def both() -> Sequence[Tensor]:
        output = function(*leaves)
        return (output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output))

    return both


class Truth:
    """The definition in float64 on some of the queries, and the first baseline's gradient of the value."""

    def __init__(self, workload: Workload, inputs: Inputs, backward: bool) -> None:
        self.tolerance = TOLERANCES[inputs.value.dtype]
        random = torch.Generator().manual_seed(1)
        # The output and the gradients of locations and weights depend on their own query alone.
        self.queries = torch.randperm(workload.queries, generator=random)[:NUM_TRUE_QUERIES]
        value, locations, weights, grad_output = (tensor.double() for tensor in inputs)
        call = parse_call(
            value,
            workload.shapes,
            locations[:, self.queries],
            weights[:, self.queries],
            num_points=workload.points,
        )
        self.expected = {"output": reference.execute(call)}
        if backward:
            mask = (False, True, True, False)
            grads = reference.execute_backward(grad_output[:, self.queries], call, mask)
            for name, grad in zip(("grad_locations", "grad_weights"), grads[1:3], strict=True):
                assert grad is not None
                self.expected[name] = grad
        # That of the value depends on all queries: it is compared between the baselines.
        self.grad_value: Tensor | None = None

    def check(self, baseline: str, results: Sequence[Tensor]) -> None:
        """Compares the output, and the gradients where there are some, with the truth.

        Raises:
            ArithmeticError: they differ.
        """
        output, *gradients = results
        parts = dict(zip(self.expected, (output, *gradients[1:]), strict=True))
        for name, tensor in parts.items():
            share = MAX_SHARE_ON_EDGES if name == "grad_locations" else 0.0
            part = tensor[:, self.queries].double()
            self._compare(f"{name}: {baseline}", part, self.expected[name], share)
        if gradients:
            if self.grad_value is None:
                self.grad_value = gradients[0].float()
            self._compare(f"grad_value: {baseline}", gradients[0].float(), self.grad_value, 0.0)

    def _compare(self, what: str, result: Tensor, expected: Tensor, share: float) -> None:
        allowed = self.tolerance * expected.abs().max()
        errors = (result - expected).abs()
        wrong = ~(errors <= allowed)  # a NaN is wrong
        if wrong.double().mean() > share:
            raise ArithmeticError(f"{what} is off by {errors.max():.2g}, allowed {allowed:.2g}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
