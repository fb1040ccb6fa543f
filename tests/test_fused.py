"""Calls with reference points or logits: against loops, the reference, and the plain operator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fused_helpers import COMBINATIONS, FusedCase, fused_calls, fused_loops, run_fused
from helpers import ALL, assert_same, calls_on_native_backends, some
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import saccade

CASES = {
    "standard": FusedCase(),
    "boxes": FusedCase(boxes=True, references="levels"),
    "groups-of-points": FusedCase(num_points=8, num_heads=4, head_dim=32, references="levels"),
    "one-point": FusedCase(shapes=[(6, 7)], num_points=1, num_queries=300),
    "few-points": FusedCase(shapes=[(6, 7)], num_points=4, num_queries=300, boxes=True),
    "lists": FusedCase(shapes=[(8, 8), (4, 4), (2, 2)], num_points=[3, 6, 3], references="levels"),
    "many-points": FusedCase(num_points=37, num_queries=5, references=5),
    "whole-vectors": FusedCase(num_points=16, num_queries=70, references=3, boxes=True),
    "chunks": FusedCase(num_queries=700, head_dim=32, num_heads=2, num_points=[9, 2]),
    "shared-head": FusedCase(shared_head=True, num_heads=4, head_dim=33, references=7),
    "nine-levels": FusedCase(
        shapes=[(n, 10 - n) for n in range(1, 10)], num_points=1, references="levels", boxes=True
    ),
    "lines": FusedCase(shapes=[(13,), (1,), (6,)], num_points=[3, 1, 5], boxes=True),
    "volumes": FusedCase(shapes=[(4, 5, 6), (2, 1, 3)], num_points=[4, 3], references="levels"),
    "boxes-in-volumes": FusedCase(shapes=[(4, 5, 6), (2, 1, 3)], references=4, boxes=True),
    "ragged": FusedCase(batch_size=4, queries_per_map=[3, 0, 290, 1], references="levels"),
    "ragged-boxes": FusedCase(batch_size=2, queries_per_map=[0, 17], boxes=True, num_points=8),
    "ragged-volumes": FusedCase(shapes=[(2, 3, 4)], batch_size=3, queries_per_map=[5, 300, 2]),
}


def reference(case, inputs, grad_output):
    with saccade.use_backend("reference"):
        return run_fused(case, inputs, grad_output)


def check(case, tolerance):
    """Holds every native backend to the reference."""
    inputs = case.draw()
    grad_output = torch.randn(case.output_shape, dtype=case.dtype)
    expected = reference(case, inputs, grad_output)
    for backend, results in calls_on_native_backends(lambda: run_fused(case, inputs, grad_output)):
        assert_same(results, expected, tolerance, backend)


@pytest.mark.parametrize(
    ("name", "coordinates"),
    some(
        itertools.product(
            ("standard", "boxes", "lists", "lines", "volumes", "ragged-boxes"),
            ("normalized", "normalized_corners", "pixel"),
        ),
        6,
    ),
)
def test_loops_agree(backend, name, coordinates):
    case = CASES[name].with_(
        dtype=torch.float64, coordinates=coordinates, head_dim=2, num_queries=2, num_heads=2
    )
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), fused_loops(case, *inputs), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes(case, dtype):
    check(case.with_(dtype=dtype), 4e-6 if dtype == torch.float32 else 1e-14)


RULES = [
    *itertools.product(("linear", "nearest", "discrete"), ("zeros", "border")),
    ("discrete", "border_height"),
]


@pytest.mark.parametrize(
    ("name", "rule", "coordinates"),
    some(itertools.product(COMBINATIONS, RULES, ("normalized", "normalized_corners", "pixel")), 30),
)
def test_options(name, rule, coordinates):
    interpolation, padding = rule
    case = COMBINATIONS[name].with_(
        shapes=[(4, 6), (3, 3), (1, 5)], dtype=torch.float64, interpolation=interpolation,
        padding=padding, coordinates=coordinates,
    )  # fmt: skip
    check(case, 1e-14)


@pytest.mark.parametrize("boxes", [False, True])
def test_the_result_equals_the_plain_operator_after_softmax_and_locations(native_backend, boxes):
    """Also in float32 to 1e-6: locations to the last bit, weights to a few."""
    case = FusedCase(num_queries=500, num_points=4, head_dim=32, references="levels", boxes=boxes)
    value, references, offsets, logits = inputs = case.draw()
    locations = saccade.sampling.sampling_locations(references, offsets, case.shapes, case.points)
    unfused = saccade.deformable_attention(
        value, case.shapes, locations, logits.softmax(-1), num_points=case.points
    )
    output = case.call(*inputs)
    assert (output - unfused).abs().max() <= 1e-6 * unfused.abs().max()
    # Equal weights are not rounded, so that any difference comes from the locations.
    even = torch.zeros_like(logits)
    unfused = saccade.deformable_attention(
        value, case.shapes, locations, even.softmax(-1), num_points=case.points
    )
    assert torch.equal(case.call(value, references, offsets, even), unfused)


@pytest.mark.parametrize(
    ("points", "dtype"),
    some(itertools.product([1, 2, 3, 4, 7, 8, 12, 16, 17, 33], [torch.float32, torch.float64]), 12),
)
def test_the_softmax_is_right_to_the_last_digits(points, dtype):
    rows = 200
    scale = torch.logspace(-3, 2.5, rows)[:, None, None]
    logits = torch.randn(1, rows, 2, points, dtype=dtype) * scale
    # The value of point k is the unit vector k, read at its centre: the output is the weight.
    value = torch.eye(points, dtype=dtype).view(1, points, 1, points)
    offsets = torch.zeros(1, rows, 2, points, 1, dtype=dtype)
    references = torch.arange(points, dtype=dtype).view(1, 1, points, 1).expand(1, rows, -1, -1)
    expected = logits.double().softmax(-1)
    # The difference to the largest logit is rounded, which the power multiplies.
    below = (logits.amax(-1, keepdim=True) - logits).double()
    allowed = expected * torch.finfo(dtype).eps * (4 + points / 4 + below) + 1e-37
    if dtype == torch.float64:
        expected = torch.tensor(
            [[[exact_softmax(row) for row in heads] for heads in logits[0].tolist()]], dtype=dtype
        )
    for backend, weights in calls_on_native_backends(
        lambda: saccade.fused_deformable_attention(
            value, [(points,)], references, offsets, logits, num_points=points,
            reference_index=range(points), coordinates="pixel",
        )
    ):  # fmt: skip
        assert ((weights.view(logits.shape) - expected).abs() <= allowed).all(), backend


def exact_softmax(row):
    powers = [math.exp(number - max(row)) for number in row]
    return [power / math.fsum(powers) for power in powers]


@pytest.mark.parametrize("points", [3, 8, 20])
def test_logits_that_are_not_finite_are_those_of_torch(native_backend, points):
    logits = torch.randn(1, 6, 1, points)
    logits[0, 0, 0, 1] = -torch.inf  # masked
    logits[0, 1] = -torch.inf
    logits[0, 2, 0, 0] = torch.inf
    logits[0, 3, 0, 2] = torch.nan
    logits[0, 4] += 1e30
    value = torch.rand(1, 9, 1, 4)
    reference, offsets = torch.full((1, 6, 1, 1), 0.5), torch.zeros(1, 6, 1, points, 1)
    output = saccade.fused_deformable_attention(
        value, [(9,)], reference, offsets, logits, num_points=points
    )
    locations = torch.full_like(offsets, 0.5)
    expected = saccade.deformable_attention(
        value, [(9,)], locations, logits.softmax(-1), num_points=points
    )
    torch.testing.assert_close(output, expected, equal_nan=True)
    assert output.isnan().any(-1).tolist() == [[False, True, True, True, False, False]]


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("shapes", [[(6, 7), (3, 4)], [(9,), (1,)], [(2, 3, 4)]])
def test_non_finite_elements_as_in_the_reference(name, shapes):
    case = COMBINATIONS[name].with_(shapes=shapes, num_queries=100)
    inputs = case.draw()
    parts = (0.02, *([0.02] * (len(inputs) - 2)), 0.005)
    for tensor, part in zip(inputs, parts, strict=True):
        elements = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.randint(3, tensor.shape)]
        tensor[:] = torch.where(torch.rand_like(tensor) < part, elements, tensor)
    grad_output = torch.randn(case.output_shape)
    grad_output[torch.rand_like(grad_output) < 0.01] = torch.inf
    expected = reference(case, inputs, grad_output)
    assert expected[0].isfinite().any()
    for _, results in calls_on_native_backends(lambda: run_fused(case, inputs, grad_output)):
        for result, want in zip(results, expected, strict=True):
            torch.testing.assert_close(result, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("boxes", [False, True])
def test_a_point_without_a_finite_location_gets_gradient_0(backend, boxes, softmax):
    case = FusedCase(num_queries=3, num_heads=1, batch_size=1, boxes=boxes, softmax=softmax)
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    with torch.no_grad():
        inputs[1][0, 0, 0, -1] = torch.inf  # a box: its height
        inputs[2][0, 1, 0, 2, 0] = torch.inf
    gradients = torch.autograd.grad(case.call(*inputs).sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][0, 0] == 0).all()
    assert (gradients[2][0, 0] == 0).all()
    assert (gradients[2][0, 1, 0, 2] == 0).all()
    assert (gradients[2][0, 2] != 0).any()


@pytest.mark.parametrize(
    ("name", "dtype", "narrow"),
    some(
        itertools.product(
            (
                *("standard", "boxes", "groups-of-points", "ragged", "volumes"),
                *("locations-logits", "boxes-weights"),
            ),
            (torch.float16, torch.bfloat16),
            (False, True),
        ),
        12,
    ),
)
def test_16_bit_values(name, dtype, narrow):
    """Only the results are rounded to 16 bits, not positions, the softmax or sums."""
    case = (CASES | COMBINATIONS)[name].with_(dtype=dtype)
    value, *points = case.draw()
    if narrow:
        points = [tensor.to(dtype) for tensor in points]
    inputs = (value, *points)
    grad_output = torch.randn(case.output_shape).to(dtype)
    truth = reference(case, [tensor.double() for tensor in inputs], grad_output.double())
    for backend, results in calls_on_native_backends(lambda: run_fused(case, inputs, grad_output)):
        for index, (result, want) in enumerate(zip(results, truth, strict=True)):
            if narrow and index in range(2, len(results) - 1):
                continue  # 16-bit points often lie on grid lines, where the slope is that of either side
            rounding = torch.finfo(result.dtype).eps / 2
            allowed = 1.01 * rounding * want.abs() + 1e-5 * want.abs().max()
            assert ((result.double() - want).abs() <= allowed).all(), backend


@pytest.mark.parametrize("name", COMBINATIONS)
def test_strides_do_not_matter(name):
    case = COMBINATIONS[name]
    inputs = case.draw()
    swapped = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    grad_output = torch.randn(2, 24, 11).mT

    def run_both():
        return (
            run_fused(case, swapped, grad_output),
            run_fused(case, inputs, grad_output.contiguous()),
        )

    for backend, results in calls_on_native_backends(run_both):
        assert all(map(torch.equal, *results)), backend


CALLS = fused_calls(max_queries=90, max_ragged_queries=60, max_points=9, max_maps=3, max_heads=4)


SETTINGS = {
    "deadline": None,
    "derandomize": not ALL,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.slow
@settings(max_examples=600 if ALL else 80, **SETTINGS)
@given(
    case=CALLS,
    softmax=st.booleans(),
    has_references=st.sampled_from([True, True, False]),
    seed=st.integers(0, 2**16),
)
def test_any_call_equals_the_reference(case, softmax, has_references, seed):
    torch.manual_seed(seed)
    case = case.with_(softmax=softmax)
    if not has_references:
        case = case.with_(references=None, boxes=False)
    check(case, 2e-14)


@settings(max_examples=200 if ALL else 25, **SETTINGS)
@given(case=CALLS, rule=st.sampled_from(RULES), softmax=st.booleans(), seed=st.integers(0, 2**16))
def test_any_small_call_equals_the_loops(case, rule, softmax, seed):
    torch.manual_seed(seed)
    # Loops in Python are slow; other sizes are compared with the reference.
    small = {"num_queries": min(2, case.num_queries), "num_heads": 2, "head_dim": 2}
    counts = case.queries_per_map and [min(2, count) for count in case.queries_per_map]
    interpolation, padding = rule
    if len(case.shapes[0]) != 2 and padding == "border_height":
        padding = "border"
    case = case.with_(
        **small, queries_per_map=counts, interpolation=interpolation, padding=padding,
        softmax=softmax,
    )  # fmt: skip
    assume(math.prod(case.query_axes))
    inputs = case.draw()
    expected = fused_loops(case, *inputs)
    for _, output in calls_on_native_backends(lambda: case.call(*inputs)):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
