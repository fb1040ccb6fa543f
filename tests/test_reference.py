"""The reference against scalar float64 loops, and its derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Case, assert_same, loops, run

import saccade
from saccade import reference
from saccade.reference import operator

OPTIONS = list(
    itertools.product(
        ("linear", "nearest"),
        ("zeros", "border"),
        ("normalized", "normalized_corners", "pixel"),
    )
)


@pytest.mark.parametrize(("interpolation", "padding", "coordinates"), OPTIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"shapes": [(1, 1), (1, 5), (4, 1)], "num_points": [1, 2, 3]},
        {"shared_head": True, "num_heads": 2},
        {"shapes": [(7,), (1,), (4,)]},
        {"shapes": [(3, 4, 5), (1, 2, 3)], "num_queries": 3},
        {"shapes": [(1, 1, 4), (3, 1, 1), (1, 5, 1)], "num_queries": 3},
    ],
    ids=["two-levels", "thin-levels", "shared-head", "lines", "volumes", "thin-volumes"],
)
def test_reference_equals_scalar_loops(interpolation, padding, coordinates, sizes):
    case = Case(
        interpolation=interpolation,
        padding=padding,
        coordinates=coordinates,
        dtype=torch.float64,
        num_queries=5,
        batch_size=1,
        head_dim=2,
    ).with_(**sizes)
    inputs = case.draw()
    with saccade.use_backend("reference"):
        assert_same([case.call(*inputs)], [loops(case, *inputs)])


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
@pytest.mark.parametrize(
    "shapes",
    [[(3, 4), (1, 2)], [(5,), (1,)], [(2, 3, 2), (1, 2, 1)]],
    ids=["images", "lines", "volumes"],
)
def test_reference_derivatives_of_first_and_second_order(shapes, padding, coordinates):
    case = Case(
        shapes=shapes,
        num_points=[2, 1],
        batch_size=1,
        num_queries=2,
        num_heads=2,
        head_dim=2,
        padding=padding,
        coordinates=coordinates,
        dtype=torch.float64,
    )
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    with saccade.use_backend("reference"):
        assert torch.autograd.gradcheck(case.call, inputs)
        assert torch.autograd.gradgradcheck(case.call, inputs)


def test_written_out_gradient_equals_autograd():
    case = Case(dtype=torch.float64, padding="border", num_points=[2, 3])
    inputs = case.draw()
    grad_output = torch.randn(2, 11, 24, dtype=torch.float64)
    with saccade.use_backend("reference"):
        expected = run(case, inputs, grad_output)[1:]
    call = case.understood(*inputs)
    actual = reference.execute_backward(grad_output, call)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_intermediates_are_bounded(monkeypatch):
    case = Case(num_queries=100)
    inputs = case.draw()
    whole = case.call(*inputs)
    monkeypatch.setattr(operator, "MAX_INTERMEDIATE_ELEMENTS", 1000)
    seen = []
    gather = operator._gather
    monkeypatch.setattr(operator, "_gather", lambda *args: seen.append(gather(*args)) or seen[-1])
    with saccade.use_backend("reference"):
        torch.testing.assert_close(case.call(*inputs), whole)
    assert len(seen) > 100
    assert max(tensor.numel() for tensor in seen) <= 1000
