"""Where infinities and NaN stand in outputs and gradients: in every backend where the definition says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import BACKENDS, FEW_PAIRS, NATIVE_BACKENDS, WITH_TRITON, summing, table
from helpers import ALL
from non_finite_helpers import draw_odd_call, true_results
from torch import Tensor
from triton_helpers import output_mask, run_kernels, run_reference

import saccade
from saccade.call import Call
from saccade.ops import schema

NAMES = ("output", "grad_value", "grad_points", "grad_weights", "grad_reference_points")
SEEDS = range(4000 if ALL else 80)


def run_cpu(call: Call, grad_output: Tensor, backend: str) -> list[Tensor]:
    """The output and the four gradients by the registered operators."""
    forward, backward = schema.get_operators()
    arguments = schema.to_arguments(call)
    with saccade.use_backend(backend), torch.no_grad():
        return [forward(*arguments), *backward(grad_output, *arguments, output_mask(call))]


def assert_alike(actual: list[Tensor], expected: list[Tensor], finite: bool, where: str) -> None:
    """NaN and both infinities stand at the same places; with `finite`, other elements are close too."""
    for name, got, want in zip(NAMES, actual, expected, strict=True):
        if want.numel() == 0:
            continue
        got, want = got.double(), want.double()
        if not finite:
            # Sums that cancel a huge element depend on the order.
            got, want = (torch.where(tensor.isfinite(), 0, tensor) for tensor in (got, want))
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-9, equal_nan=True,
            msg=lambda text, name=name: f"{name}, {where}: {text}",
        )  # fmt: skip


def has_no_huge_element(call: Call, grad_output: Tensor) -> bool:
    tensors = (call.value, call.points, call.weights, call.reference_points, grad_output)
    sizes = [tensor[tensor.isfinite()].abs() for tensor in tensors if tensor is not None]
    return all((size < 1e6).all() for size in sizes)


@pytest.mark.slow
def test_every_cpu_backend_is_as_the_loops():
    counts = {"NaN": 0, "infinite": 0, "finite": 0}
    for seed in SEEDS:
        call, grad_output = draw_odd_call(seed)
        expected = true_results(call, grad_output)
        finite = has_no_huge_element(call, grad_output)
        for backend in BACKENDS:
            actual = run_cpu(call, grad_output, backend)
            expected = [one.view_as(got) if one.numel() else got for one, got in zip(
                expected, actual, strict=True)]  # fmt: skip
            assert_alike(actual, expected, finite, f"seed {seed} on {backend}")
        for tensor in expected:
            counts["NaN"] += int(tensor.isnan().sum())
            counts["infinite"] += int(tensor.isinf().sum())
            counts["finite"] += int(tensor.isfinite().sum())
    assert min(counts.values()) > 100, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "point_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_narrower_dtypes_as_the_reference(dtype, point_dtype):
    for seed in SEEDS[: len(SEEDS) // 2]:
        call, grad_output = draw_odd_call(seed)
        reference_points = call.reference_points
        call = call._replace(
            value=narrow(call.value, dtype, 1e4),
            points=narrow(call.points, point_dtype, math.inf),
            weights=narrow(call.weights, point_dtype, 1e4),
            reference_points=None
            if reference_points is None
            else narrow(reference_points, point_dtype, math.inf),
        )
        grad_output = narrow(grad_output, dtype, 1e4)
        expected = run_reference(call, grad_output)
        for backend in NATIVE_BACKENDS:
            actual = run_cpu(call, grad_output, backend)
            assert_alike(actual, expected, False, f"seed {seed} on {backend}")


def narrow(tensor: Tensor, dtype: torch.dtype, huge: float) -> Tensor:
    """The tensor in the dtype, with `huge`, or the dtype's largest number below, for huge elements."""
    is_huge = tensor.isfinite() & (tensor.abs() > 1e60)
    largest = tensor.sign() * min(huge, torch.finfo(dtype).max)
    return torch.where(is_huge, largest, tensor).to(dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, by which Triton interprets
@pytest.mark.parametrize(
    "kernel", [pytest.param(kernel, marks=WITH_TRITON) for kernel in FEW_PAIRS]
)
def test_gpu_kernels_are_as_the_loops(monkeypatch, kernel):
    for number in range(60 if ALL else 4):
        seed = 2 * number + (kernel == "points")
        call, grad_output = draw_odd_call(seed)
        way = ("atomic", "sorted")[number % 2]
        with chosen(monkeypatch, kernel, way):
            actual = run_kernels(call, grad_output)
        finite = has_no_huge_element(call, grad_output)
        expected = true_results(call, grad_output)
        assert_alike(actual, expected, finite, f"seed {seed}, {way}")


@contextmanager
def chosen(monkeypatch: pytest.MonkeyPatch, kernel: str, way: str) -> Iterator[None]:
    """The GPU kernels of this kind, and this way to sum up the gradient of the value."""
    with monkeypatch.context() as patch, table(patch, few_pairs=FEW_PAIRS[kernel], **summing(way)):
        yield


@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_an_infinite_weight_concerns_its_own_query(backend, num_queries):
    """The gradient of a location is a sum of products with the weight: infinity less infinity is NaN."""
    value = torch.tensor([1.0, 2, 4, 8]).view(1, 4, 1, 1).repeat(1, 1, 1, 5)
    locations = torch.full((1, num_queries, 1, 1, 1, 1), 1.25, requires_grad=True)
    weights = torch.ones(1, num_queries, 1, 1, 1)
    weights[0, 0] = math.inf
    weights.requires_grad_()
    output = saccade.deformable_attention(value, [(4,)], locations, weights, coordinates="pixel")
    output.sum().backward()
    assert output[0, :, 0].tolist() == [math.inf] + [2.5] * (num_queries - 1)
    assert weights.grad.flatten().tolist() == [5 * 2.5] * num_queries
    first, *others = locations.grad.flatten().tolist()
    assert math.isnan(first)
    assert others == [5 * 2.0] * (num_queries - 1)
