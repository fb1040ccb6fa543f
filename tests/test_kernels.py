"""Every native kernel against the reference: dtypes, options, sizes, threads, and random calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from fused_helpers import FusedCase
from helpers import (
    ALL,
    Case,
    assert_16_bit_is_as_good_as_naive,
    assert_same,
    calls_on_native_backends,
    grid_sample_path,
    run,
    some,
)  # fmt: skip
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
OPTIONS = itertools.product(
    ("linear", "nearest", "discrete"),
    ("zeros", "border"),
    ("normalized", "normalized_corners", "pixel"),
    (
        *("standard", "single-cells", "packed", "few-points", "shared-head"),
        *("lines", "lines-few-points", "volumes", "volumes-packed", "thin-volumes"),
    ),
)


def reference(case, inputs, grad_output):
    with saccade.use_backend("reference"):
        return run(case, inputs, grad_output)


def check(case, inputs, grad_output, expected=None, tolerance=None):
    """Holds every native backend to the reference, or to what is expected."""
    if expected is None:
        expected = reference(case, inputs, grad_output)
    for backend, results in calls_on_native_backends(lambda: run(case, inputs, grad_output)):
        assert_same(results, expected, tolerance, backend)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes(case):
    case = case.with_(dtype=torch.float64)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape, dtype=torch.float64)
    expected = reference(case, inputs, grad_output)
    check(case, inputs, grad_output, expected)
    # Locations are not differentiable on the grid lines; random ones keep off them by 1e-7.
    # Rounding the position moves it by up to half a unit in the last place, times a slope.
    case, grad_output = case.with_(dtype=torch.float32), grad_output.float()
    inputs = [tensor.float() for tensor in inputs]
    exact = reference(case, [tensor.double() for tensor in inputs], grad_output.double())
    check(case, inputs, grad_output, [tensor.float() for tensor in exact], 3e-5)
    check(case, inputs, grad_output)


@pytest.mark.parametrize(("interpolation", "padding", "coordinates", "name"), some(OPTIONS, 40))
def test_options(name, interpolation, padding, coordinates):
    case = CASES[name].with_(interpolation=interpolation, padding=padding, coordinates=coordinates)
    inputs = case.draw()
    check(case, inputs, torch.randn(case.call(*inputs).shape))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
def test_exactly_on_edges_and_centres(interpolation, padding):
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
    check(case, (value, locations, weights), torch.randn(1, 81, 8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    some(
        itertools.product(
            (
                *("standard", "head-dim-32", "odd-head-dim", "packed", "few-points"),
                *("shared-head", "lines", "volumes", "volumes-packed"),
            ),
            (torch.float16, torch.bfloat16),
        ),
        9,
    ),
)
def test_16_bit_values(name, dtype):
    case = CASES[name].with_(dtype=dtype)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape).to(dtype)
    truth = reference(case, [tensor.double() for tensor in inputs], grad_output.double())
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    naive = grid_sample_path(case, *leaves)
    naive.backward(grad_output)
    naive = [naive.detach(), *(leaf.grad for leaf in leaves)]
    for _, results in calls_on_native_backends(lambda: run(case, inputs, grad_output)):
        assert_16_bit_is_as_good_as_naive(results, naive, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_conversion_is_exact_for_every_number(native_backend, dtype):
    # Every 16-bit pattern, read at a pixel's centre and written back.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).view(1, 1, 1, -1)
    values = values[..., ~values.isnan().flatten()]
    output = saccade.deformable_attention(
        values, [(1, 1)], torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1),
        coordinates="pixel",
    )  # fmt: skip
    # The missing neighbours change neither the sign of a zero nor an infinity.
    assert torch.equal(output.flatten(), values.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_round_half_to_even(native_backend, dtype):
    exact = torch.randn(4096) * torch.logspace(-8, 4, 4096)
    weights = exact.view(1, 4096, 1, 1, 1)
    output = saccade.deformable_attention(
        torch.ones(1, 1, 1, 1, dtype=dtype), [(1, 1)], torch.zeros(1, 4096, 1, 1, 1, 2), weights,
        coordinates="pixel",
    )  # fmt: skip
    assert torch.equal(output.flatten(), exact.to(dtype))


@pytest.mark.parametrize(
    "shapes",
    [[(6, 7), (3, 4)], [(40,), (1,)], [(3, 4, 5), (2, 2, 1)], [(1, 1, 7), (4, 1, 3)]],
    ids=["images", "lines", "volumes", "thin-volumes"],
)
def test_non_finite_elements_as_in_the_reference(shapes):
    case = Case(shapes=shapes, num_queries=100, num_heads=2, num_points=2)
    value, locations, weights = case.draw()
    value[torch.rand_like(value) < 0.02] = torch.inf
    weights[torch.rand_like(weights) < 0.02] = torch.nan
    locations[torch.rand_like(locations) < 0.02] = torch.inf
    grad_output = torch.randn(2, 100, 16)
    grad_output[torch.rand_like(grad_output) < 0.01] = -torch.inf
    inputs = (value, locations, weights)
    expected = reference(case, inputs, grad_output)
    assert expected[0].isfinite().any()
    for _, results in calls_on_native_backends(lambda: run(case, inputs, grad_output)):
        for result, want in zip(results, expected, strict=True):
            torch.testing.assert_close(result, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def run_with_threads(counts, call):
    """The results of a call with each number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


THREAD_CASES = {
    **{
        name: CASES[name].with_(num_queries=777, head_dim=32)
        for name in (
            *("packed", "few-points", "shared-head", "standard"),
            *("thin-volumes", "volumes-packed", "lines"),
        )
    },
    "chunks-fused": FusedCase(num_queries=700, head_dim=32, num_heads=2, num_points=[9, 2]),
    "few-points-fused": FusedCase(shapes=[(6, 7)], num_points=4, num_queries=300, boxes=True),
    "ragged-fused": FusedCase(
        batch_size=4, queries_per_map=[3, 0, 290, 1], references="levels", softmax=False
    ),
    "volumes-logits": FusedCase(
        shapes=[(4, 5, 6), (2, 1, 3)], num_points=[4, 3], references=None, shared_head=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "finite"),
    some(itertools.product(THREAD_CASES, (torch.float32, torch.bfloat16), (True, False)), 14),
)
def test_bitwise_equal_for_every_number_of_threads(name, dtype, finite):
    case = THREAD_CASES[name].with_(dtype=dtype)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape).to(dtype)
    if not finite:
        grad_output[..., 0, 0] = grad_output[..., -1, -1] = torch.inf
    for backend, (first, *others) in calls_on_native_backends(
        lambda: run_with_threads((1, 2, 3, 8, 1, 16), lambda: run(case, inputs, grad_output))
    ):
        for other in others:
            for result, want in zip(other, first, strict=True):
                assert torch.equal(result.nan_to_num(1e9), want.nan_to_num(1e9)), backend


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("spread", [0.3, 0.02], ids=["strewn", "crowded"])
def test_bands_that_few_points_reach_sum_in_the_same_order(shared_head, spread):
    """With few queries on a large map, points are not sorted, and most of the bands have none."""
    num_heads = 2
    shapes = [(64, 64), (9, 1), (1, 7)]
    value = torch.randn(1, 64 * 64 + 16, 1 if shared_head else num_heads, 24)
    locations = 0.5 + spread * torch.randn(1, 150, num_heads, 3, 2, 2)
    weights = torch.rand(1, 150, num_heads, 3, 2)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    grad_output = torch.randn(1, 150, num_heads * 24)

    def gradients():
        output = saccade.deformable_attention(value, shapes, locations, weights)
        return torch.autograd.grad(output, leaves, grad_output)

    for backend, (first, *others) in calls_on_native_backends(
        lambda: run_with_threads((1, 2, 3, 8, 24), gradients)
    ):
        for other in others:
            assert all(map(torch.equal, other, first)), backend


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


@pytest.mark.slow
@settings(
    max_examples=1000 if ALL else 100,
    deadline=None,
    derandomize=not ALL,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_any_call_equals_the_reference(case, seed):
    torch.manual_seed(seed)
    inputs = case.draw()
    grad_output = torch.randn(
        case.batch_size, case.num_queries, case.num_heads * case.head_dim, dtype=case.dtype
    )
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-14
    check(case, inputs, grad_output, tolerance=tolerance)


def test_no_memory_leaks(native_backend):
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
    assert calls(1000) - before < 1000 * 16


@pytest.mark.nightly
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(native_backend):
    height = width = 8192
    heads, head_dim = 8, 5  # 2.7e9 elements of 2 bytes
    value = torch.zeros(1, height * width, heads, head_dim, dtype=torch.bfloat16)
    value[0, -1] = torch.arange(1.0, 41).view(heads, head_dim)
    locations = torch.tensor([width - 1.0, height - 1.0]).expand(1, 1, heads, 1, 1, 2)
    weights = torch.ones(1, 1, heads, 1, 1)
    output = saccade.deformable_attention(
        value, [(height, width)], locations, weights, coordinates="pixel"
    )
    assert output.flatten().tolist() == list(range(1, 41))
