"""Fixtures shared by all test modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import saccade
from saccade.ops import native

BACKENDS = ["reference", *(f"cpu-{isa}" for isa in native.available_isas())]
NATIVE_BACKENDS = BACKENDS[1:]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the reference and once on each kernel of this processor."""
    with saccade.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NATIVE_BACKENDS)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each native kernel of this processor."""
    with saccade.use_backend(request.param):
        yield request.param


def pytest_report_header() -> str:
    return f"saccade: {saccade.which_backend()}; kernels under test: {', '.join(BACKENDS)}"
