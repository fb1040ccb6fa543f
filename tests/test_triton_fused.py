"""The fused operator's GPU kernels against the reference and the loops, as in test_triton.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import NO_TRITON, WITH_TRITON
from fused_helpers import FusedCase, fused_calls, fused_loops
from helpers import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton import CASES, Case, assert_equals_reference, reference

import saccade

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import launch


FUSED = {
    "standard": FusedCase(),
    "boxes": FusedCase(boxes=True, references="levels"),
    "lists": FusedCase(shapes=[(8, 8), (4, 4), (2, 2)], num_points=[3, 6, 3], references="levels"),
    "many-points": FusedCase(num_points=37, num_queries=2, num_heads=1, batch_size=1, references=5),
    "shared-head": FusedCase(shared_head=True, num_heads=4, head_dim=33, references=7),
    "single-cells": FusedCase(shapes=[(1, 1), (1, 4)], boxes=True),
    "lines": FusedCase(shapes=[(13,), (1,), (6,)], num_points=[3, 1, 5], boxes=True),
    "volumes": FusedCase(shapes=[(4, 5, 6), (2, 1, 3)], num_points=[4, 3], references="levels"),
    "boxes-in-volumes": FusedCase(shapes=[(4, 5, 6), (2, 1, 3)], references=4, boxes=True),
    "ragged": FusedCase(batch_size=4, queries_per_map=[3, 0, 70, 1], references="levels"),
    "ragged-boxes": FusedCase(batch_size=2, queries_per_map=[0, 17], boxes=True, num_points=8),
    "ragged-nobody": FusedCase(batch_size=2, queries_per_map=[0, 0]),
}


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_fused_sizes(kernel, case):
    assert_equals_reference(case, case.draw())


@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
@pytest.mark.parametrize("name", ["standard", "boxes", "lists", "lines", "volumes", "ragged-boxes"])
def test_fused_by_scalar_loops(kernel, name, coordinates):
    case = FUSED[name].with_(
        dtype=torch.float64, coordinates=coordinates, head_dim=2, num_heads=2, num_queries=3
    )
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), fused_loops(case, *inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["standard", "boxes", "volumes"])
def test_fused_16_bit_values(kernel, name, dtype):
    case = FUSED[name].with_(dtype=dtype)
    value, *points = case.draw()
    truth = reference(case, (value, *points), torch.float64)
    found = case.call(value, *points)
    assert ((found.double() - truth).abs() <= torch.finfo(dtype).eps * (truth.abs() + 1e-2)).all()


def test_fused_locations_are_those_of_the_operator_to_the_last_bit(kernel):
    # A map that holds its own coordinate, read by one point with weight 1: the position comes out.
    size, queries = 77, 4000
    value = torch.arange(float(size)).view(1, size, 1, 1)
    references, offsets = torch.rand(1, queries, 1, 1), torch.randn(1, queries, 1, 1, 1, 1)
    shapes, logits = [(size,)], torch.zeros(1, queries, 1, 1, 1)
    found = saccade.fused_deformable_attention(
        value, shapes, references, offsets, logits, interpolation="nearest", padding="border"
    )
    locations = references[:, :, None, None] + offsets * (1 / torch.tensor(float(size)))
    expected = saccade.deformable_attention(
        value, shapes, locations, torch.ones_like(logits), interpolation="nearest", padding="border"
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("points", [1, 5, 40])
def test_softmax_of_odd_logits_is_that_of_torch(kernel, points):
    logits = torch.randn(9, points) * 30
    inf, nan = math.inf, math.nan
    logits[0], logits[1, 0], logits[2, -1], logits[3, 0] = -inf, inf, nan, -inf
    logits[4], logits[5] = 1e30, -1e30
    value = torch.randn(1, 30, 1, 3)
    references, offsets = torch.rand(1, 9, 1, 2), torch.randn(1, 9, 1, 1, points, 2)
    arguments = (value, [(5, 6)], references, offsets, logits.view(1, 9, 1, 1, points))
    torch.testing.assert_close(
        saccade.fused_deformable_attention(*arguments),
        saccade.reference.fused_deformable_attention(*arguments),
        equal_nan=True,
    )


CALLS = fused_calls(most_queries=20, most_of_a_map=9, most_points=5, most_maps=2, most_heads=3)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=CALLS, seed=st.integers(0, 2**16))
def test_any_call_equals_the_reference(kernel, case, seed):
    torch.manual_seed(seed)
    inputs = case.draw()
    assert_same([case.call(*inputs)], [reference(case, inputs)], 2e-14)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["lines", "standard", "volumes"])
def test_places_counted_in_64_bits(kernel, name, fused, monkeypatch):
    case = FUSED[name] if fused else CASES.get(name, Case())
    inputs = case.draw()
    narrow = case.call(*inputs)
    launch._remembered.clear()
    monkeypatch.setattr(launch, "_MOST_NUMBERS_OF_32_BITS", 0)
    assert torch.equal(case.call(*inputs), narrow)
    assert all(plan.prepared.constants["WIDE"] for plan in launch._remembered.values())


def test_powers_do_not_overflow(kernel):
    value = torch.full((1, 30, 1, 4), 2e38)
    logits = torch.zeros(1, 3, 1, 1, 4)
    references, offsets = torch.full((1, 3, 1, 2), 0.5), torch.zeros(1, 3, 1, 1, 4, 2)
    found = saccade.fused_deformable_attention(value, [(5, 6)], references, offsets, logits)
    torch.testing.assert_close(found, torch.full_like(found, 2e38))
