"""The reference against scalar float64 loops, and its derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from fused_helpers import COMBINATIONS, run_fused
from helpers import Case, assert_same, loops, some

import saccade
from saccade import reference

SHAPES = {
    "two-levels": {},
    "thin-levels": {"shapes": [(1, 1), (1, 5), (4, 1)], "num_points": [1, 2, 3]},
    "shared-head": {"shared_head": True, "num_heads": 2},
    "lines": {"shapes": [(7,), (1,), (4,)]},
    "volumes": {"shapes": [(3, 4, 5), (1, 2, 3)]},
    "thin-volumes": {"shapes": [(1, 1, 4), (3, 1, 1), (1, 5, 1)]},
}
RULES = [
    *itertools.product(
        ("linear", "nearest", "discrete"),
        ("zeros", "border"),
        ("normalized", "normalized_corners", "pixel"),
    ),
]


@pytest.fixture(autouse=True)
def _on_the_reference():
    with saccade.use_backend("reference"):
        yield


@pytest.mark.parametrize(
    ("interpolation", "padding", "coordinates", "sizes"),
    some([(*rule, sizes) for rule in RULES for sizes in SHAPES], 36),
)
def test_reference_equals_scalar_loops(interpolation, padding, coordinates, sizes):
    case = Case(
        interpolation=interpolation,
        padding=padding,
        coordinates=coordinates,
        dtype=torch.float64,
        num_queries=3,
        batch_size=1,
        head_dim=2,
    ).with_(**SHAPES[sizes])
    inputs = case.draw()
    assert_same([case.call(*inputs)], [loops(case, *inputs)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "padding", "coordinates"),
    some(
        itertools.product(
            ([(3, 4), (1, 2)], [(5,), (1,)], [(2, 3, 2), (1, 2, 1)]),
            ("zeros", "border"),
            ("normalized", "normalized_corners", "pixel"),
        ),
        6,
    ),
)
@pytest.mark.parametrize("name", some(COMBINATIONS, 2))
def test_reference_derivatives_of_first_and_second_order(name, shapes, padding, coordinates):
    case = COMBINATIONS[name].with_(
        shapes=shapes,
        num_points=[2, 1],
        batch_size=1,
        num_queries=1,
        num_heads=2,
        head_dim=2,
        padding=padding,
        coordinates=coordinates,
        dtype=torch.float64,
    )
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, inputs)
    assert torch.autograd.gradgradcheck(case.call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_written_out_gradient_equals_autograd(name):
    case = COMBINATIONS[name].with_(dtype=torch.float64, padding="border", num_points=[2, 3])
    inputs = case.draw()
    grad_output = torch.randn(case.output_shape, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = reference.execute(case.parse(*leaves))  # plain PyTorch, which autograd differentiates
    expected = torch.autograd.grad(output, leaves, grad_output)
    for actual, want in zip(run_fused(case, inputs, grad_output)[1:], expected, strict=True):
        torch.testing.assert_close(actual, want)


def test_intermediates_are_bounded(monkeypatch):
    case = Case(num_queries=100)
    inputs = case.draw()
    whole = case.call(*inputs)
    monkeypatch.setattr(reference, "MAX_INTERMEDIATE_ELEMENTS", 1000)
    gathered = []
    gather = reference._gather
    monkeypatch.setattr(
        reference, "_gather", lambda *args: gathered.append(gather(*args)) or gathered[-1]
    )
    torch.testing.assert_close(case.call(*inputs), whole)
    assert len(gathered) > 100
    assert max(tensor.numel() for tensor in gathered) <= 1000
