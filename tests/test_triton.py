"""The GPU kernels against the reference and the loops: on a card, or in the interpreter of Triton."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import NO_TRITON, TRITON, WITH_TRITON, use
from fused_helpers import FusedCase, fused_loops
from helpers import (
    Case,
    assert_16_bit_is_as_good_as_naive,
    assert_same,
    grid_sample_path,
    loops,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saccade

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import launch, tuning

KERNELS = ("attend_queries", "attend_points")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each of the two kernels by turns, whatever the number of looks."""
    most = {"attend_queries": -1, "attend_points": 2**62}[request.param]
    table = {**tuning._table(), "few_looks": most}
    monkeypatch.setattr(tuning, "_table", lambda: table)
    launch._remembered.clear()
    with use(TRITON):
        yield request.param
    launch._remembered.clear()


def reference(case, inputs, dtype=None):
    with saccade.use_backend("reference"):
        return case.call(*(tensor.to(dtype or tensor.dtype) for tensor in inputs))


def assert_equals_reference(case, inputs):
    found, expected = case.call(*inputs), reference(case, inputs)
    assert_same([found], [expected])


CASES = {
    "one-level": Case(shapes=[(6, 7)], num_queries=37, head_dim=32, num_points=4),
    "odd-head-dim": Case(head_dim=7, num_points=[1, 5]),
    "one-channel": Case(head_dim=1, num_heads=5),
    "wide-rows": Case(head_dim=300, num_heads=1, num_queries=3),
    "very-wide-rows": Case(head_dim=2100, num_heads=1, num_queries=2, num_points=1, batch_size=1),
    "single-cells": Case(shapes=[(1, 1), (1, 6), (5, 1)]),
    "lists": Case(shapes=[(8, 8), (4, 4), (2, 2)], num_points=[3, 6, 3]),
    "nine-levels": Case(shapes=[(n, 10 - n) for n in range(1, 10)], num_points=1),
    "many-points": Case(num_points=[40, 9], num_queries=2, num_heads=1, batch_size=1),
    "all-outside": Case(spread=40.0),
    "shared-head": Case(shared_head=True, num_heads=4, head_dim=33),
    "more-blocks-than-one": Case(num_queries=263, num_heads=1, head_dim=8, num_points=1),
    "lines": Case(shapes=[(13,), (1,), (6,)], num_points=[3, 1, 5], head_dim=17),
    "volumes": Case(shapes=[(4, 5, 6), (2, 1, 3)], num_points=[4, 3], head_dim=19),
    "thin-volumes": Case(shapes=[(1, 1, 7), (6, 1, 1), (1, 5, 1), (1, 1, 1), (3, 1, 2)]),
    "no-queries": Case(num_queries=0),
    "no-batch": Case(batch_size=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes(kernel, case):
    assert_equals_reference(case, case.draw())


@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
@pytest.mark.parametrize("padding", ["zeros", "border", "border_height"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
@pytest.mark.parametrize("name", ["one-level", "lists", "lines", "volumes"])
def test_options_by_scalar_loops(kernel, name, interpolation, padding, coordinates):
    if padding == "border_height" and (interpolation != "discrete" or name in ("lines", "volumes")):
        return  # refused for every kernel
    case = CASES[name].with_(
        interpolation=interpolation, padding=padding, coordinates=coordinates,
        num_queries=3, num_heads=2, head_dim=2, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), loops(case, *inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
def test_exactly_on_edges_and_centres(kernel, interpolation, padding):
    case = Case(
        shapes=[(3, 4), (1, 2)], num_points=1, num_queries=81, num_heads=1, batch_size=1,
        interpolation=interpolation, padding=padding, coordinates="pixel",
    )  # fmt: skip
    value, _, weights = case.draw()
    steps = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    locations = torch.cartesian_prod(steps, steps).view(1, 81, 1, 1, 2).repeat(1, 1, 1, 2, 1)
    assert_equals_reference(case, (value, locations, weights))


def test_positions_are_rounded_twice(kernel):
    # On a map that holds its own coordinate, at and beside the edges and centres of cells: in some
    # places a product and a sum that are rounded at once come out otherwise.
    size = 77
    places = ((torch.arange(2 * size, dtype=torch.float64) / 2 + 0.5) / size).float()
    near = [places]
    for end in (-1.0, 2.0):
        moved = places
        for _ in range(3):
            moved = moved.nextafter(torch.tensor(end))
            near.append(moved)
    near = torch.cat(near)
    for shift in (-0.5, 0.5):
        once = (near.double() * size + shift).float()
        assert (near * size + shift != once).any()
        assert ((near * size + shift).floor() != once.floor()).any()
    value = torch.arange(float(size)).view(1, size, 1, 1)
    locations = near.view(1, -1, 1, 1, 1, 1)
    weights = torch.ones(locations.shape[:-1])
    for interpolation in ("nearest", "discrete", "linear"):
        arguments = (value, [(size,)], locations, weights)
        found = saccade.deformable_attention(*arguments, interpolation=interpolation)
        expected = saccade.reference.deformable_attention(*arguments, interpolation=interpolation)
        assert torch.equal(found, expected), interpolation


@pytest.mark.parametrize("location_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["one-level", "odd-head-dim", "shared-head", "lines", "volumes"])
def test_16_bit_values(kernel, name, dtype, location_dtype):
    case = CASES[name].with_(dtype=dtype, location_dtype=location_dtype, batch_size=1)
    inputs = case.draw()
    truth = reference(case, inputs, torch.float64)
    naive = grid_sample_path(case, inputs[0], inputs[1].float(), inputs[2].float())
    assert_16_bit_is_as_good_as_naive([case.call(*inputs)], [naive], [truth])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_written_as_it_is(kernel, dtype):
    bits = torch.arange(-(2**15), 2**15, 2, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[~values.isnan()][: 2**14].view(1, 1, 2, -1)
    found = saccade.deformable_attention(
        values, [(1, 1)], torch.zeros(1, 1, 2, 1, 1, 2), torch.ones(1, 1, 2, 1, 1),
        coordinates="pixel",
    )  # fmt: skip
    assert torch.equal(found.flatten(), values.flatten())


def test_words_of_two_numbers_that_do_not_begin_where_words_begin(kernel):
    case = Case(dtype=torch.bfloat16, head_dim=4)
    value, locations, weights = case.draw()
    moved = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    assert moved.data_ptr() % 4
    assert torch.equal(case.call(moved, locations, weights), case.call(value, locations, weights))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shapes", [[(7,), (2,)], [(6, 7), (3, 4)], [(2, 3, 4)]])
def test_what_is_not_finite_as_in_the_reference(kernel, shapes, padding):
    case = Case(shapes=shapes, num_queries=40, num_heads=1, padding=padding, dtype=torch.float64)
    value, locations, weights = case.draw()
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e300, 0.5])
    for tensor, share in ((value, 0.02), (locations, 0.1), (weights, 0.05)):
        chosen = torch.rand(tensor.shape) < share
        tensor[chosen] = odd[torch.randint(6, (int(chosen.sum()),))].double()
    inputs = (value, locations, weights)
    torch.testing.assert_close(
        case.call(*inputs), reference(case, inputs), rtol=1e-12, atol=1e-12, equal_nan=True
    )


def test_infinite_cells_that_nobody_reads_stay_where_they_are(kernel):
    # Five points: the kernels know powers of two, and what they fill up with must not read.
    case = Case(shapes=[(6, 7)], num_points=5, coordinates="pixel")
    value, locations, weights = case.draw()
    value[:, 0] = value[:, -1] = math.inf
    locations = locations.clamp(1.1, 4.0)
    assert case.call(value, locations, weights).isfinite().all()


def test_strides_do_not_matter(kernel):
    case = Case()
    value, locations, weights = case.draw()
    strided = (
        value.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        locations.flip(-1).contiguous().flip(-1).permute(4, 3, 2, 1, 0).contiguous().permute(
            4, 3, 2, 1, 0
        ),
        weights[:, :1].expand(-1, case.num_queries, -1, -1),
    )  # fmt: skip
    assert not any(tensor.is_contiguous() for tensor in strided)
    expected = case.call(*(tensor.contiguous() for tensor in strided))
    assert torch.equal(case.call(*strided), expected)


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


@st.composite
def calls(draw):
    spatial_dims = draw(st.integers(1, 3))
    shape = st.tuples(*[st.integers(1, (30, 9, 5)[spatial_dims - 1])] * spatial_dims)
    levels = draw(st.integers(1, 3))
    batch_size = draw(st.integers(0, 2))
    counts = st.lists(st.integers(0, 9), min_size=batch_size, max_size=batch_size)
    return FusedCase(
        shapes=draw(st.lists(shape, min_size=levels, max_size=levels)),
        num_points=draw(st.lists(st.integers(1, 5), min_size=levels, max_size=levels)),
        batch_size=batch_size,
        num_queries=draw(st.integers(0, 20)),
        queries_per_map=draw(st.none() | counts),
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 40)),
        shared_head=draw(st.booleans()),
        references=draw(st.sampled_from([1, "levels", 2, 9])),
        boxes=draw(st.booleans()),
        interpolation=draw(st.sampled_from(["linear", "nearest", "discrete"])),
        padding=draw(st.sampled_from(["zeros", "border"])),
        coordinates=draw(st.sampled_from(["normalized", "normalized_corners", "pixel"])),
        dtype=torch.float64,
    )


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=calls(), seed=st.integers(0, 2**16))
def test_any_call_equals_the_reference(kernel, case, seed):
    torch.manual_seed(seed)
    inputs = case.draw()
    assert_same([case.call(*inputs)], [reference(case, inputs)], 2e-14)


def test_gradients_are_those_of_the_reference(kernel):
    case = Case(dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    found = torch.autograd.grad(case.call(*leaves).square().sum(), leaves)
    expected = torch.autograd.grad(reference(case, leaves).square().sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


OPERATOR = torch.ops.saccade.deformable_attention


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (1, [6, 7, 3, 400000], "spatial_shapes: expected"),
        (1, [6, 7, 3], "spatial_shapes: expected"),
        (1, [-6, -7, 3, 4], "spatial_shapes: expected"),
        (2, torch.rand(2, 11, 3, 5, 2), "sampling_locations: expected"),
        (3, torch.rand(1, 11, 3, 6), "attention_weights: expected"),
        (4, [3, 300], "sampling_locations: expected"),
        (5, "cubic", "interpolation: expected"),
        (8, [11, 11], r"sampling_locations: expected \[1, "),
    ],
)
def test_the_operator_itself_checks_what_could_read_out_of_bounds(
    kernel, position, change, message
):
    case = Case()
    value, locations, weights = case.draw()
    arguments = [
        value,
        [6, 7, 3, 4],
        locations,
        weights,
        [3, 3],
        "linear",
        "zeros",
        "normalized",
        None,
    ]
    assert OPERATOR(*arguments).shape == (2, 11, 24)
    arguments[position] = change
    with pytest.raises((ValueError, RuntimeError), match=message):
        OPERATOR(*arguments)


def test_freed_storage_is_an_error_not_a_crash(kernel):
    inputs = Case().draw()
    inputs[0].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="value: .*storage"):
        Case().call(*inputs)
