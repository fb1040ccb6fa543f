"""Fixtures shared by all test modules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Threads that wait for the next call take the processor from the other worker of pytest, and the tests twice
# the time. To be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# The GPU kernels under test: on a card where there is one, else in Triton's interpreter, which has to
# be said before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import helpers

import saccade
from saccade import call
from saccade.ops import gpu, native, schema

ON_A_CARD = torch.cuda.is_available()
TRITON = "triton" if ON_A_CARD else "triton-interpreter"
NO_TRITON = gpu.installation_refusal()
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
        names = (schema.FORWARD, schema.BACKWARD)
        for kernel_name, run in zip(names, gpu.implementations(), strict=True):
            library.impl(kernel_name, _on_the_card(run), "CPU", allow_override=True)
        yield name
    finally:
        library._destroy()


def _round_as_a_card_does() -> None:
    """The interpreter cuts float32 off where it makes bfloat16 of it, and takes a bfloat16 for an integer
    where the other dtype is float64; a card rounds half to even.
    """
    import numpy
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(numbers, from_, to, mode):
        if (from_, to) != (language.float32, language.bfloat16):
            return convert(numbers, from_, to, mode)
        flat = torch.from_numpy(numpy.ascontiguousarray(numbers)).bfloat16()
        return flat.view(torch.int16).numpy().view(numpy.uint16)

    cast = interpreter.InterpreterBuilder.cast_impl

    def by_float32(self, numbers, to):
        dtypes = {numbers.dtype.scalar, to.scalar}
        if dtypes == {language.float64, language.bfloat16}:
            numbers = cast(self, numbers, language.float32)
        return cast(self, numbers, to)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.cast_impl = by_float32


if not ON_A_CARD and NO_TRITON is None:
    _round_as_a_card_does()


def _on_the_card(kernel):
    def run(*arguments):
        if not ON_A_CARD:
            return kernel(*arguments)
        moved = (each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments)
        results = kernel(*moved)
        if isinstance(results, torch.Tensor):
            return results.cpu()
        return tuple(result.cpu() for result in results)

    return run


@pytest.fixture(params=[*BACKENDS, pytest.param(TRITON, marks=WITH_TRITON)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the reference and once on each kernel that can run here."""
    with use(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Without the GPU kernels: for tests that take too long in the interpreter."""
    with saccade.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NATIVE_BACKENDS)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each native kernel of this processor."""
    with saccade.use_backend(request.param):
        yield request.param


# Cases with rows of so many channels, or so many points, that they are not read at once.
TOO_WIDE = ("slices-of-rows", "wide-rows", "many-points")


def gpu_plans() -> list:
    """The plans of the GPU kernels that calls have made since the cache of calls was emptied."""
    plans = (plan for recipe in call._cache.values() for plan in recipe.plans.values())
    return [plan for plan in plans if hasattr(plan, "kernel")]


@contextmanager
def table(monkeypatch: pytest.MonkeyPatch, **entries: int) -> Iterator[list[str]]:
    """The GPU kernels, chosen by other entries of the table; gives the names of those that ran."""
    from saccade.backends.triton import tuning

    changed = {**tuning._table(), **entries}
    monkeypatch.setattr(tuning, "_table", lambda: changed)
    call._cache.clear()
    ran: list[str] = []
    with use(TRITON):
        yield ran
    ran += [plan.kernel.name for plan in gpu_plans()]
    call._cache.clear()


def summing(way: str) -> dict[str, int]:
    """The entries of the table for a way to sum up the gradient of the value."""
    return {"many_samples": MANY_SAMPLES[way], "many_samples_per_cell": 0}


FEW_PAIRS = {"queries": -1, "points": 2**62}
MANY_SAMPLES = {"atomic": 2**62, "sorted": 0}


@pytest.fixture(params=FEW_PAIRS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The GPU kernels: those for many queries and those for few by turns, whatever their number is."""
    with table(monkeypatch, few_pairs=FEW_PAIRS[request.param]) as ran:
        yield request.param
    # What does not fit into registers at once is left to the other one.
    assert f"forward_{request.param}_kernel" in ran or request.node.callspec.id.endswith(TOO_WIDE)


@pytest.fixture(params=MANY_SAMPLES)
def summed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to sum up the gradient of the value, by the GPU kernels for many queries."""
    with table(monkeypatch, few_pairs=-1, **summing(request.param)) as ran:
        yield request.param
        plans = [plan for plan in gpu_plans() if getattr(plan, "output_mask", [False])[0]]
        ways = {plan.kernel.constants.GRAD_VALUE for plan in plans}
    assert "backward_queries_kernel" in ran
    assert ways == {request.param}


# Modules that share what takes long to make (compiled objects, an exported detector): one worker runs all
# tests of a group. Marks of xdist_group are not enough: xdist 3.8 does not see them under pytest 9.2.
GROUPS = {
    "test_native_library": "native objects",
    "test_instruction_counts": "native objects",
    "test_triton_compiled": "compiled kernels",
    "test_export_detections": "exported detector",
    "test_export_cpp": "exported detector",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each worker one test after the other, but a whole group to the same worker."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return GROUPS.get(Path(nodeid.partition("::")[0]).stem, nodeid)

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `nightly` run under `make test-all` only."""
    if helpers.ALL:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def pytest_report_header() -> str:
    kernels = ", ".join([*BACKENDS, TRITON if NO_TRITON is None else f"no Triton ({NO_TRITON})"])
    nightly = "" if helpers.ALL else "; nightly tests run under make test-all"
    return f"saccade: {saccade.which_backend()}; kernels under test: {kernels}{nightly}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran the GPU kernels, and where."""
    location = (
        "on this card" if ON_A_CARD else "in the interpreter of Triton, or compiled for sm_90"
    )
    counted = {
        outcome: sum(
            "triton" in getattr(report, "keywords", ())
            for report in terminalreporter.getreports(outcome)
        )
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counted.values()):
        counts = ", ".join(f"{number} {outcome}" for outcome, number in counted.items() if number)
        terminalreporter.write_line(f"GPU kernels: {counts}, {location}")
