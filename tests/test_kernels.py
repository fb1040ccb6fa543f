"""Every native kernel against the reference: dtypes, options, sizes, and hypothesis' own ideas."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    Case,
    assert_16_bit_is_as_good_as_naive,
    assert_same,
    grid_sample_path,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saccade

CASES = {
    "standard": Case(),
    "head-dim-32": Case(head_dim=32, num_points=4, num_heads=4),
    "odd-head-dim": Case(head_dim=71, num_points=[1, 5]),
    "tiny-head-dim": Case(head_dim=1, num_heads=5),
    "wide-head-dim": Case(head_dim=300, num_heads=1, num_queries=3),
    "single-cells": Case(shapes=[(1, 1), (1, 6), (5, 1)]),
    "lists": Case(shapes=[(8, 8), (4, 4), (2, 2)], num_points=[3, 6, 3]),
    "nine-levels": Case(shapes=[(n, 10 - n) for n in range(1, 10)], num_points=1),
    "many-points": Case(num_points=40, num_queries=5),
    "all-outside": Case(spread=40.0),
    "shared-head": Case(shared_head=True, num_heads=4, head_dim=33),
    "packed": Case(num_queries=403, head_dim=20, num_points=5),
    "packed-chunks": Case(num_queries=700, head_dim=32, num_heads=2, shapes=[(9, 5)], num_points=9),
    "lines": Case(shapes=[(13,), (1,), (6,)], num_points=[3, 1, 5], head_dim=17),
    "lines-few-points": Case(
        shapes=[(40,)], num_queries=403, head_dim=32, num_heads=8, num_points=4
    ),
    "lines-packed": Case(shapes=[(40,), (9,)], num_queries=403, head_dim=20, num_points=8),
    "volumes": Case(shapes=[(4, 5, 6), (2, 1, 3)], num_points=[4, 3], head_dim=19),
    "volumes-few-points": Case(shapes=[(3, 4, 5)], num_queries=150, head_dim=16, num_points=2),
    "volumes-packed": Case(shapes=[(3, 4, 5), (5, 2, 1)], num_queries=403, num_points=[3, 7]),
    "thin-volumes": Case(shapes=[(1, 1, 7), (6, 1, 1), (1, 5, 1), (1, 1, 1), (3, 1, 2)]),
    "few-points": Case(num_queries=403, head_dim=16, num_heads=4, num_points=2),
    "few-points-shared": Case(shared_head=True, num_queries=150, num_heads=5, num_points=[1, 2]),
}
OPTIONS = list(
    itertools.product(
        ("linear", "nearest", "discrete"),
        ("zeros", "border"),
        ("normalized", "normalized_corners", "pixel"),
    )
)


def reference(case, inputs, grad_output):
    with saccade.use_backend("reference"):
        return run(case, inputs, grad_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes(native_backend, case, dtype):
    case = case.with_(dtype=dtype)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape, dtype=dtype)
    # Locations are not differentiable on the grid lines; random ones keep off them by 1e-7.
    truth = [tensor.double() for tensor in inputs]
    expected = reference(case, truth, grad_output.double())
    if dtype == torch.float32:
        # Rounding the position moves it by up to half a unit in the last place, times a slope.
        expected = [tensor.float() for tensor in expected]
        assert_same(run(case, inputs, grad_output), expected, 3e-5)
        expected = reference(case, inputs, grad_output)
    assert_same(run(case, inputs, grad_output), expected)


@pytest.mark.parametrize(("interpolation", "padding", "coordinates"), OPTIONS)
@pytest.mark.parametrize(
    "name",
    [
        *("standard", "single-cells", "packed", "few-points", "shared-head"),
        *("lines", "lines-few-points", "volumes", "volumes-packed", "thin-volumes"),
    ],
)
def test_options(native_backend, name, interpolation, padding, coordinates):
    case = CASES[name].with_(interpolation=interpolation, padding=padding, coordinates=coordinates)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape)
    assert_same(run(case, inputs, grad_output), reference(case, inputs, grad_output))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
def test_exactly_on_edges_and_centres(native_backend, interpolation, padding):
    case = Case(
        shapes=[(3, 4), (1, 2)],
        num_points=1,
        num_queries=81,
        num_heads=1,
        batch_size=1,
        interpolation=interpolation,
        padding=padding,
        coordinates="pixel",
    )
    value, _, weights = case.draw()
    steps = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    locations = torch.cartesian_prod(steps, steps).view(1, 81, 1, 1, 2).repeat(1, 1, 1, 2, 1)
    grad_output = torch.randn(1, 81, 8)
    inputs = (value, locations, weights)
    assert_same(run(case, inputs, grad_output), reference(case, inputs, grad_output))


@pytest.mark.parametrize(
    "name",
    [
        *("standard", "head-dim-32", "odd-head-dim", "packed", "few-points", "shared-head"),
        *("lines", "volumes", "volumes-packed"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values(native_backend, name, dtype):
    case = CASES[name].with_(dtype=dtype)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape).to(dtype)
    truth = reference(case, [tensor.double() for tensor in inputs], grad_output.double())
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    naive = grid_sample_path(case, *leaves)
    naive.backward(grad_output)
    assert_16_bit_is_as_good_as_naive(
        run(case, inputs, grad_output),
        [naive.detach(), *(leaf.grad for leaf in leaves)],
        truth,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_conversion_is_exact_for_every_number(native_backend, dtype):
    # Every 16-bit pattern, read at a pixel's centre and written back.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).view(1, 1, 1, -1)
    values = values[..., ~values.isnan().flatten()]
    found = saccade.deformable_attention(
        values, [(1, 1)], torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1),
        coordinates="pixel",
    )  # fmt: skip
    # 0 * weight of the missing neighbours leaves signs of zero alone, and infinities as they are.
    assert torch.equal(found.flatten(), values.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_round_half_to_even(native_backend, dtype):
    exact = torch.randn(4096) * torch.logspace(-8, 4, 4096)
    weights = exact.view(1, 4096, 1, 1, 1)
    found = saccade.deformable_attention(
        torch.ones(1, 1, 1, 1, dtype=dtype), [(1, 1)], torch.zeros(1, 4096, 1, 1, 1, 2), weights,
        coordinates="pixel",
    )  # fmt: skip
    assert torch.equal(found.flatten(), exact.to(dtype))


@pytest.mark.parametrize(
    "shapes",
    [[(6, 7), (3, 4)], [(40,), (1,)], [(3, 4, 5), (2, 2, 1)], [(1, 1, 7), (4, 1, 3)]],
    ids=["images", "lines", "volumes", "thin-volumes"],
)
def test_non_finite_numbers_as_in_the_reference(native_backend, shapes):
    case = Case(shapes=shapes, num_queries=200, num_heads=2, num_points=2)
    value, locations, weights = case.draw()
    value[torch.rand_like(value) < 0.02] = torch.inf
    weights[torch.rand_like(weights) < 0.02] = torch.nan
    locations[torch.rand_like(locations) < 0.02] = torch.inf
    grad_output = torch.randn(2, 200, 16)
    grad_output[torch.rand_like(grad_output) < 0.01] = -torch.inf
    inputs = (value, locations, weights)
    call = case.understood(value, locations, weights)
    expected = [
        saccade.reference.execute(call),
        *saccade.reference.execute_backward(grad_output, call),
    ]
    assert expected[0].isfinite().any()
    for got, want in zip(run(case, inputs, grad_output), expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("packed", "few-points", "shared-head", "standard"),
        *("thin-volumes", "volumes-packed", "lines"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("finite", [True, False])
def test_bitwise_equal_for_every_number_of_threads(native_backend, name, dtype, finite):
    case = CASES[name].with_(dtype=dtype, num_queries=777, head_dim=32)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape).to(dtype)
    if not finite:
        grad_output[0, 0, 0] = grad_output[-1, 500, 70] = torch.inf
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 1, 16):
            torch.set_num_threads(threads)
            results.append(run(case, inputs, grad_output))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got.nan_to_num(nan=1e9), want.nan_to_num(nan=1e9))


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("spread", [0.3, 0.02], ids=["strewn", "crowded"])
def test_bands_that_few_points_reach_sum_in_the_same_order(native_backend, shared_head, spread):
    """Few queries on a large map: its points are not sorted, and neighbours in a band are none in all."""
    num_heads = 2
    shapes = [(64, 64), (9, 1), (1, 7)]
    value = torch.randn(1, 64 * 64 + 16, 1 if shared_head else num_heads, 24)
    locations = 0.5 + spread * torch.randn(1, 150, num_heads, 3, 2, 2)
    weights = torch.rand(1, 150, num_heads, 3, 2)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    grad_output = torch.randn(1, 150, num_heads * 24)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 24):
            torch.set_num_threads(threads)
            output = saccade.deformable_attention(value, shapes, locations, weights)
            results.append(torch.autograd.grad(output, leaves, grad_output))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_only_the_gradients_that_are_needed(native_backend):
    case = Case()
    inputs = case.draw()
    whole = run(case, inputs, torch.ones(2, 11, 24))[1:]
    for needed in itertools.product((False, True), repeat=3):
        if not any(needed):
            continue
        leaves = [
            tensor.clone().requires_grad_(wanted)
            for tensor, wanted in zip(inputs, needed, strict=True)
        ]
        case.call(*leaves).sum().backward()
        for leaf, wanted, want in zip(leaves, needed, whole, strict=True):
            assert (leaf.grad is not None) == wanted
            if wanted:
                assert torch.equal(leaf.grad, want)


@st.composite
def cases(draw):
    levels = draw(st.integers(1, 4))
    spatial_dims = draw(st.integers(1, 3))
    shape = st.tuples(*[st.integers(1, (30, 9, 5)[spatial_dims - 1])] * spatial_dims)
    return Case(
        shapes=draw(st.lists(shape, min_size=levels, max_size=levels)),
        num_points=draw(st.lists(st.integers(1, 5), min_size=levels, max_size=levels)),
        batch_size=draw(st.integers(0, 3)),
        num_queries=draw(st.integers(0, 150)),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 70)),
        shared_head=draw(st.booleans()),
        interpolation=draw(st.sampled_from(["linear", "nearest", "discrete"])),
        padding=draw(st.sampled_from(["zeros", "border"])),
        coordinates=draw(st.sampled_from(["normalized", "normalized_corners", "pixel"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        spread=draw(st.sampled_from([0.0, 0.3, 5.0])),
    )


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_any_call_equals_the_reference(native_backend, case, seed):
    torch.manual_seed(seed)
    inputs = case.draw()
    grad_output = torch.randn(
        case.batch_size, case.num_queries, case.num_heads * case.head_dim, dtype=case.dtype
    )
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-14
    assert_same(run(case, inputs, grad_output), reference(case, inputs, grad_output), tolerance)


def test_no_memory_is_left_behind(native_backend):
    import ctypes

    class Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )]  # fmt: skip

    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("counts memory by glibc's mallinfo2")
    library.mallinfo2.restype = Memory
    case = Case(num_queries=2, batch_size=1)
    leaves = [tensor.requires_grad_() for tensor in case.draw()]

    def calls(number):
        for _ in range(number):
            torch.autograd.grad(case.call(*leaves).sum(), leaves)
        return library.mallinfo2().uordblks

    before = calls(300)
    assert calls(2000) - before < 2000 * 16


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(native_backend):
    height = width = 8192
    heads, head_dim = 8, 5  # 2.7e9 elements of 2 bytes
    value = torch.zeros(1, height * width, heads, head_dim, dtype=torch.bfloat16)
    value[0, -1] = torch.arange(1.0, 41).view(heads, head_dim)
    locations = torch.tensor([width - 1.0, height - 1.0]).expand(1, 1, heads, 1, 1, 2)
    weights = torch.ones(1, 1, heads, 1, 1)
    found = saccade.deformable_attention(
        value, [(height, width)], locations, weights, coordinates="pixel"
    )
    assert found.flatten().tolist() == list(range(1, 41))
