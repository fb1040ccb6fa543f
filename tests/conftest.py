"""Fixtures shared by all test modules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# The GPU kernels under test: on a card where there is one, else in Triton's interpreter, which has to
# be said before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import saccade
from saccade.ops import contract, gpu, native

ON_A_CARD = torch.cuda.is_available()
TRITON = "triton" if ON_A_CARD else "triton-interpreter"
NO_TRITON = gpu.refusal_of_installation()
NATIVE_BACKENDS = [f"cpu-{isa}" for isa in native.available_isas()]
BACKENDS = ["reference", *NATIVE_BACKENDS]


WITH_TRITON = [
    pytest.mark.triton,
    pytest.mark.skipif(NO_TRITON is not None, reason=f"no GPU kernels: {NO_TRITON}"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextmanager
def use(name: str) -> Iterator[str]:
    """`saccade.use_backend`, and the GPU kernels for tensors on the CPU."""
    if name != TRITON:
        with saccade.use_backend(name):
            yield name
        return
    library = torch.library.Library("saccade", "IMPL")
    try:
        for operator in (contract.PLAIN, contract.FUSED):
            library.impl(operator.name, _through_triton(operator), "CPU", allow_override=True)
            library.impl(
                operator.backward_name, operator.backward_fallback, "CPU", allow_override=True
            )
        yield name
    finally:
        library._destroy()


def _round_as_a_card_does() -> None:
    """The interpreter cuts float32 off where it makes bfloat16 of it; a card rounds half to even."""
    import numpy
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(numbers, from_, to, mode):
        if (from_, to) != (language.float32, language.bfloat16):
            return convert(numbers, from_, to, mode)
        flat = torch.from_numpy(numpy.ascontiguousarray(numbers)).bfloat16()
        return flat.view(torch.int16).numpy().view(numpy.uint16)

    interpreter._convert_float = rounded


if not ON_A_CARD and NO_TRITON is None:
    _round_as_a_card_does()


def _through_triton(operator):
    attend = gpu.implementation(operator)

    def run(*arguments):
        if not ON_A_CARD:
            return attend(*arguments)
        moved = (each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments)
        return attend(*moved).cpu()

    return run


@pytest.fixture(params=[*BACKENDS, pytest.param(TRITON, marks=WITH_TRITON)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the reference and once on each kernel that can run here."""
    with use(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Without the GPU kernels: for gradients, which are the reference's there, and for long tests."""
    with saccade.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NATIVE_BACKENDS)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each native kernel of this processor."""
    with saccade.use_backend(request.param):
        yield request.param


# Rows of so many channels, or so many points, are not read at once.
TOO_WIDE = ("slices-of-rows", "wide-rows", "many-points")


@pytest.fixture(params=("attend_queries", "attend_points"))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each GPU kernel: each of the two kernels by turns, whatever the number of looks."""
    from saccade.backends.triton import launch, tuning

    most = {"attend_queries": -1, "attend_points": 2**62}[request.param]
    table = {**tuning._table(), "few_looks": most}
    monkeypatch.setattr(tuning, "_table", lambda: table)
    launch._remembered.clear()
    with use(TRITON):
        yield request.param
    ran = {plan.kernel.__name__ for plan in launch._remembered.values()}
    launch._remembered.clear()
    # What does not fit into registers at once is left to the other one.
    assert request.param in ran or request.node.callspec.id.endswith(TOO_WIDE)


def pytest_report_header() -> str:
    kernels = ", ".join([*BACKENDS, TRITON if NO_TRITON is None else f"no Triton ({NO_TRITON})"])
    return f"saccade: {saccade.which_backend()}; kernels under test: {kernels}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran the GPU kernels, and where."""
    place = "on this card" if ON_A_CARD else "in the interpreter of Triton, or compiled for sm_90"
    counted = {
        outcome: sum("triton" in report.keywords for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counted.values()):
        found = ", ".join(f"{number} {outcome}" for outcome, number in counted.items() if number)
        terminalreporter.write_line(f"GPU kernels: {found}, {place}")
