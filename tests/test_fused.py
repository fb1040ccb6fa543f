"""The fused operator: against loops, the reference and the unfused path; what it keeps and allocates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fused_helpers import FusedCase, fused_calls, fused_loops, run_fused
from helpers import assert_same
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import saccade

OPERATOR = torch.ops.saccade.fused_deformable_attention
BACKWARD = torch.ops.saccade.fused_deformable_attention_backward

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


@pytest.mark.parametrize("name", ["standard", "boxes", "lists", "lines", "volumes", "ragged-boxes"])
@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
def test_loops_agree(backend, name, coordinates):
    case = CASES[name].with_(dtype=torch.float64, coordinates=coordinates, head_dim=2)
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), fused_loops(case, *inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes(native_backend, case, dtype):
    case = case.with_(dtype=dtype)
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape, dtype=dtype)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-14
    found = run_fused(case, inputs, grad_output)
    assert_same(found, reference(case, inputs, grad_output), tolerance)


RULES = [
    *itertools.product(("linear", "nearest", "discrete"), ("zeros", "border")),
    ("discrete", "border_height"),
]


@pytest.mark.parametrize(("interpolation", "padding"), RULES)
@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
@pytest.mark.parametrize("boxes", [False, True])
def test_options(native_backend, interpolation, padding, coordinates, boxes):
    case = FusedCase(
        shapes=[(4, 6), (3, 3), (1, 5)], boxes=boxes, references="levels", dtype=torch.float64,
        interpolation=interpolation, padding=padding, coordinates=coordinates,
    )  # fmt: skip
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape, dtype=torch.float64)
    found = run_fused(case, inputs, grad_output)
    assert_same(found, reference(case, inputs, grad_output), 1e-14)


@pytest.mark.parametrize("boxes", [False, True])
def test_the_same_numbers_as_softmax_locations_and_the_operator(native_backend, boxes):
    """Also in float32 to 1e-6: locations to the last bit, weights to a few."""
    case = FusedCase(num_queries=500, num_points=4, head_dim=32, references="levels", boxes=boxes)
    value, references, offsets, logits = inputs = case.draw()
    locations = saccade.sampling.sampling_locations(references, offsets, case.shapes, case.points)
    unfused = saccade.deformable_attention(
        value, case.shapes, locations, logits.softmax(-1), num_points=case.points
    )
    found = case.call(*inputs)
    assert (found - unfused).abs().max() <= 1e-6 * unfused.abs().max()
    # Equal weights have no rounding: what is left are the locations.
    even = torch.zeros_like(logits)
    unfused = saccade.deformable_attention(
        value, case.shapes, locations, even.softmax(-1), num_points=case.points
    )
    assert torch.equal(case.call(value, references, offsets, even), unfused)


@pytest.mark.parametrize("points", [1, 2, 3, 4, 7, 8, 12, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softmax_is_right_to_the_last_digits(native_backend, points, dtype):
    logits = (
        torch.randn(1, 400, 2, points, dtype=dtype) * torch.logspace(-3, 2.5, 400)[:, None, None]
    )
    # One row for each point, at its centre: the output is the weight.
    value = torch.eye(points, dtype=dtype).view(1, points, 1, points)
    offsets = torch.zeros(1, 400, 2, points, 1, dtype=dtype)
    references = torch.arange(points, dtype=dtype).view(1, 1, points, 1).expand(1, 400, -1, -1)
    found = saccade.fused_deformable_attention(
        value, [(points,)], references, offsets, logits, num_points=points,
        reference_index=range(points), coordinates="pixel",
    ).view(logits.shape)  # fmt: skip
    expected = logits.double().softmax(-1)
    epsilon = torch.finfo(dtype).eps
    # The difference to the largest is known to its own last place only, which the power multiplies.
    below = (logits.amax(-1, keepdim=True) - logits).double()
    allowed = expected * epsilon * (4 + points / 4 + below) + 1e-37
    if dtype == torch.float64:
        expected = torch.tensor(
            [[[exact(row) for row in heads] for heads in logits[0].tolist()]], dtype=dtype
        )
    assert ((found - expected).abs() <= allowed).all()


def exact(row):
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
    found = saccade.fused_deformable_attention(
        value, [(9,)], reference, offsets, logits, num_points=points
    )
    locations = torch.full_like(offsets, 0.5)
    expected = saccade.deformable_attention(
        value, [(9,)], locations, logits.softmax(-1), num_points=points
    )
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().any(-1).tolist() == [[False, True, True, True, False, False]]


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("shapes", [[(6, 7), (3, 4)], [(9,), (1,)], [(2, 3, 4)]])
def test_what_is_not_finite_as_in_the_reference(native_backend, boxes, shapes):
    case = FusedCase(shapes=shapes, num_queries=200, boxes=boxes, references="levels")
    inputs = case.draw()
    for tensor, part in zip(inputs, (0.02, 0.02, 0.02, 0.005), strict=True):
        numbers = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.randint(3, tensor.shape)]
        tensor[:] = torch.where(torch.rand_like(tensor) < part, numbers, tensor)
    grad_output = torch.randn(case.call(*inputs).shape)
    grad_output[torch.rand_like(grad_output) < 0.01] = torch.inf
    found = run_fused(case, inputs, grad_output)
    call = saccade.arguments.understand_fused(
        *inputs,
        saccade.arguments.Options(
            case.shapes, case.num_points, "linear", "zeros", "normalized", None
        ),
    )
    expected = [
        saccade.reference.execute_fused(call),
        *saccade.reference.execute_fused_backward(grad_output, call),
    ]
    assert found[0].isfinite().any()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("boxes", [False, True])
def test_a_point_without_a_finite_location_gets_gradient_0(backend, boxes):
    case = FusedCase(num_queries=3, num_heads=1, batch_size=1, boxes=boxes)
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


@pytest.mark.parametrize("name", ["standard", "boxes", "groups-of-points", "ragged", "volumes"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow", [False, True], ids=["wide-points", "narrow-points"])
def test_16_bit_values(native_backend, name, dtype, narrow):
    """Nothing but the results is rounded to 16 bits: positions, the softmax and sums are not."""
    case = CASES[name].with_(dtype=dtype)
    value, *points = case.draw()
    if narrow:
        points = [tensor.to(dtype) for tensor in points]
    inputs = (value, *points)
    grad_output = torch.randn(case.call(*inputs).shape).to(dtype)
    found = run_fused(case, inputs, grad_output)
    truth = reference(case, [tensor.double() for tensor in inputs], grad_output.double())
    for number, (got, want) in enumerate(zip(found, truth, strict=True)):
        if narrow and number in (2, 3):
            continue  # 16-bit points often lie on grid lines, where the slope is that of either side
        rounding = torch.finfo(got.dtype).eps / 2
        allowed = 1.01 * rounding * want.abs() + 1e-5 * want.abs().max()
        assert ((got.double() - want).abs() <= allowed).all()


SMALL = {"batch_size": 1, "num_queries": 2, "num_heads": 2, "head_dim": 2, "dtype": torch.float64}
IMAGES, LINES, VOLUMES = [(3, 4), (2, 2)], [(9,), (1,)], [(2, 3, 4), (1, 2, 1)]


@pytest.mark.parametrize("shapes", [IMAGES, LINES, VOLUMES], ids=["images", "lines", "volumes"])
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("queries_per_map", [None, [2]])
def test_gradcheck_and_gradgradcheck(native_backend, shapes, boxes, queries_per_map):
    case = FusedCase(shapes=shapes, num_points=[2, 1], boxes=boxes, references="levels",
                     queries_per_map=queries_per_map, **SMALL)  # fmt: skip
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, inputs)
    assert torch.autograd.gradgradcheck(case.call, inputs)


@pytest.mark.parametrize("shapes", [IMAGES, LINES, VOLUMES], ids=["images", "lines", "volumes"])
def test_forward_mode_and_torch_func_give_right_numbers(native_backend, shapes):
    case = FusedCase(shapes=shapes, references="levels", boxes=True, **SMALL)
    inputs = case.draw()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    _, found = torch.func.jvp(case.call, inputs, tangents)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((case.call(*leaves) * weights).sum(), leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((found * weights).sum(), expected)
    for number, want in enumerate(gradients):
        by_func = torch.func.grad(lambda *given: (case.call(*given) * weights).sum(), number)
        torch.testing.assert_close(by_func(*inputs), want)
    mapped = torch.func.vmap(case.call)(*(torch.stack((tensor, tensor)) for tensor in inputs))
    torch.testing.assert_close(mapped[1], case.call(*inputs))


def operator_arguments(case):
    value, references, *points = (tensor.requires_grad_() for tensor in case.draw())
    shapes = [size for shape in case.shapes for size in shape]
    index = case.reference_index or [0] * sum(case.points)
    if case.queries_per_map is not None:
        references, *points = (tensor[None] for tensor in (references, *points))
    return (
        value, shapes, references, *points, index, case.points,
        case.interpolation, case.padding, case.coordinates, case.queries_per_map,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["standard", "shared-head", "lines", "volumes", "ragged-boxes"])
def test_opcheck(name):
    case = CASES[name].with_(references=2)
    arguments = operator_arguments(case)
    torch.library.opcheck(OPERATOR, arguments)
    grad_output = torch.randn(OPERATOR(*arguments).shape, requires_grad=True)
    for mask in ([True] * 4, [False, True, False, False], [True, False, False, True]):
        torch.library.opcheck(
            BACKWARD,
            (grad_output, *arguments, mask),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("name", ["chunks", "few-points", "shared-head", "ragged", "volumes"])
def test_bitwise_equal_for_every_number_of_threads(native_backend, name):
    case = CASES[name]
    inputs = case.draw()
    grad_output = torch.randn(case.call(*inputs).shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 16):
            torch.set_num_threads(threads)
            results.append(run_fused(case, inputs, grad_output))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_only_the_gradients_that_are_needed(native_backend):
    case = CASES["boxes"]
    inputs = case.draw()
    whole = run_fused(case, inputs, torch.ones(2, 11, 24))[1:]
    for needed in itertools.product((False, True), repeat=4):
        if not any(needed):
            continue
        leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, needed, strict=True)]
        case.call(*leaves).sum().backward()
        for leaf, wanted, want in zip(leaves, needed, whole, strict=True):
            assert (leaf.grad is not None) == wanted
            assert not wanted or torch.equal(leaf.grad, want)


def test_the_backward_keeps_the_inputs_and_nothing_else(native_backend):
    leaves = [tensor.requires_grad_() for tensor in CASES["boxes"].draw()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CASES["boxes"].call(*leaves)
    assert {tensor.data_ptr() for tensor in kept} == {leaf.data_ptr() for leaf in leaves}


def test_a_call_allocates_its_output_and_no_other_tensor(native_backend):
    case = CASES["chunks"]
    inputs = case.draw()
    with torch.no_grad():
        case.call(*inputs)  # the scratch memory of this thread
        with torch.profiler.profile(profile_memory=True) as profile:
            output = case.call(*inputs)
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(amount for amount in allocated if amount > 0) == output.nbytes


def test_strides_do_not_matter(native_backend):
    case = CASES["boxes"]
    inputs = case.draw()
    swapped = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    grad_output = torch.randn(2, 24, 11).transpose(1, 2)
    found = run_fused(case, swapped, grad_output)
    for got, want in zip(found, run_fused(case, inputs, grad_output.contiguous()), strict=True):
        assert torch.equal(got, want)


CALLS = fused_calls(most_queries=90, most_of_a_map=60, most_points=9, most_maps=3, most_heads=4)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=CALLS, seed=st.integers(0, 2**16))
def test_any_call_equals_the_reference(native_backend, case, seed):
    torch.manual_seed(seed)
    inputs = case.draw()
    grad_output = torch.randn(*case.looks, case.num_heads * case.head_dim, dtype=case.dtype)
    found = run_fused(case, inputs, grad_output)
    assert_same(found, reference(case, inputs, grad_output), 2e-14)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=CALLS, rule=st.sampled_from(RULES), seed=st.integers(0, 2**16))
def test_any_small_call_equals_the_loops(native_backend, case, rule, seed):
    torch.manual_seed(seed)
    # Scalar loops in Python: what the kernel does at other sizes, it does as the reference.
    small = {"num_queries": min(2, case.num_queries), "num_heads": 2, "head_dim": 2}
    counts = case.queries_per_map and [min(2, count) for count in case.queries_per_map]
    interpolation, padding = rule
    if len(case.shapes[0]) != 2 and padding == "border_height":
        padding = "border"
    case = case.with_(**small, queries_per_map=counts, interpolation=interpolation, padding=padding)
    assume(math.prod(case.looks))
    inputs = case.draw()
    expected = fused_loops(case, *inputs)
    torch.testing.assert_close(case.call(*inputs), expected, rtol=0, atol=1e-12)
