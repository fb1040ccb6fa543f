"""The GPU kernels of the backward against the reference: on a card, or in the interpreter of Triton."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import (
    FEW_LOOKS,
    MANY_SAMPLES,
    NO_TRITON,
    TOO_WIDE,
    TRITON,
    WITH_TRITON,
    summing,
    table,
    use,
)
from fused_helpers import FusedCase, fused_calls, run_fused
from helpers import Case, assert_16_bit_is_as_good_as_naive, assert_same, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_triton import CASES
from test_triton_fused import FUSED

import saccade
from saccade.arguments import Options, understand, understand_fused
from saccade.ops import contract

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import backward


@pytest.fixture
def gradients(request, monkeypatch):
    """A GPU kernel of the backward, and a way to sum up the gradient of the value."""
    kernel, summed = request.param
    with table(monkeypatch, few_looks=FEW_LOOKS[kernel], **summing(summed)) as ran:
        yield request.param
    # What does not fit into registers at once is left to the other one: in float64 also these.
    names = (*TOO_WIDE, "lines", "volumes")
    too_wide = any(name in request.node.callspec.id for name in names)
    assert f"differentiate_{kernel}" in ran or too_wide


def by(*pairs):
    """The test with each of these pairs; the interpreter is slow, and not every test needs all."""
    return pytest.mark.parametrize("gradients", pairs, indirect=True, ids="-".join)


ONE_WAY = by(("queries", "in-order"), ("points", "added"))
OTHER_WAY = by(("queries", "added"), ("points", "in-order"))
EVERY_WAY = by(*itertools.product(FEW_LOOKS, MANY_SAMPLES))


def everything(case, inputs, grad_output):
    """The output and all gradients."""
    return (run_fused if isinstance(case, FusedCase) else run)(case, inputs, grad_output)


def draw(case):
    """Inputs and a gradient of the output."""
    inputs = case.draw()
    looks = inputs[1].shape[: 1 if getattr(case, "queries_per_map", None) is not None else 2]
    grad_output = torch.randn(*looks, case.num_heads * case.head_dim, dtype=torch.float64)
    return inputs, grad_output.to(case.dtype)


def understood(case, inputs):
    """The call, checked."""
    options = Options(
        case.shapes, case.num_points, case.interpolation, case.padding, case.coordinates, None
    )
    if len(inputs) == 3:
        return understand(*inputs, options)
    return understand_fused(*inputs, options, case.reference_index)


def expected(case, inputs, grad_output):
    with use("reference"):
        return everything(case, inputs, grad_output)


def assert_equals_reference(case, tolerance=None):
    inputs, grad_output = draw(case)
    found = everything(case, inputs, grad_output)
    assert_same(found, expected(case, inputs, grad_output), tolerance)


# The interpreter takes its time for each program: no more of them than a case is about.
ALL = {
    name: case.with_(
        num_queries=min(case.num_queries, 7), num_heads=min(case.num_heads, 2), batch_size=1
    )
    for name, case in (CASES | {f"fused-{name}": case for name, case in FUSED.items()}).items()
    if "ragged" not in name and name not in ("more-blocks-than-one", "no-batch")
}
ALL |= {name: CASES[name] for name in ("more-blocks-than-one", "no-batch")}
ALL |= {f"fused-{name}": FUSED[name] for name in FUSED if "ragged" in name}
SMALL = Case(num_queries=3, num_heads=1, batch_size=1)
SMALL_FUSED = FusedCase(num_queries=3, num_heads=1, batch_size=1, references="levels")
ALL["two-maps"] = Case(num_queries=3, num_heads=2)


@ONE_WAY
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_sizes(gradients, case):
    assert_equals_reference(case.with_(dtype=torch.float64), 1e-13)


@OTHER_WAY
@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
@pytest.mark.parametrize(
    ("name", "interpolation", "padding"),
    [
        *itertools.product(
            ("one-level", "lines", "volumes", "fused-boxes"),
            ("linear", "nearest", "discrete"),
            ("zeros", "border"),
        ),
        ("one-level", "discrete", "border_height"),
    ],
)
def test_options(gradients, name, interpolation, padding, coordinates):
    case = ALL[name].with_(
        interpolation=interpolation, padding=padding, coordinates=coordinates,
        num_queries=5, num_heads=2, head_dim=4, dtype=torch.float64,
    )  # fmt: skip
    assert_equals_reference(case, 1e-13)


@pytest.mark.parametrize("shapes", [[(3,)], [(2, 3)], [(2, 1, 2)]])
def test_gradcheck(summed, shapes):
    # Differences of the forward: nothing is taken from the reference.
    case = FusedCase(
        shapes=shapes, num_queries=1, num_heads=1, head_dim=2, batch_size=1, num_points=2,
        padding="border", boxes=True, dtype=torch.float64,
    )  # fmt: skip
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, leaves, nondet_tol=1e-12)


@OTHER_WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lists", "odd-head-dim", "volumes", "fused-boxes"])
def test_precision(gradients, name, dtype):
    # Many points of one cell: what is added up has more addends than a 16-bit number has steps.
    case = ALL[name].with_(dtype=dtype, batch_size=1, num_queries=20)
    inputs, grad_output = draw(case)
    found = everything(case, inputs, grad_output)
    wide = [tensor.double() for tensor in (*inputs, grad_output)]
    truth = expected(case.with_(dtype=torch.float64), wide[:-1], wide[-1])
    if dtype == torch.float32:
        assert_same(found, [one.float() for one in truth], 1e-5)
        return
    # As naive as can be: the truth rounded to 16 bits once.
    naive = [one.to(got.dtype) for one, got in zip(truth, found, strict=True)]
    assert [one.dtype for one in found[:2]] == [dtype, dtype]
    assert_16_bit_is_as_good_as_naive(found[:2], naive[:2], truth[:2])
    assert_same(found[2:], [one.float() for one in truth[2:]], 1e-5)


@ONE_WAY
@pytest.mark.parametrize("point_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_points_and_weights_of_other_dtypes(gradients, point_dtype):
    for case in (
        Case(location_dtype=point_dtype),
        FusedCase(location_dtype=point_dtype),
        Case(location_dtype=point_dtype, dtype=torch.float64),
    ):
        inputs, grad_output = draw(case)
        found = everything(case, inputs, grad_output)
        want = expected(case, inputs, grad_output)
        assert [one.dtype for one in found] == [one.dtype for one in want]
        # Both are rounded once, from numbers that differ in the last place of float32.
        step = torch.finfo(point_dtype).eps + torch.finfo(torch.float32).eps
        for got, one in zip(found, want, strict=True):
            torch.testing.assert_close(got, one, rtol=2 * step, atol=1e-5)


@ONE_WAY
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("name", ["lines", "one-level", "volumes", "fused-boxes"])
def test_what_is_not_finite_as_in_the_reference(gradients, name, padding):
    case = ALL[name].with_(num_queries=16, num_heads=1, padding=padding, dtype=torch.float64)
    case = case.with_(num_points=2, batch_size=1)
    inputs, grad_output = draw(case)
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1e38, 0.5])
    shares = (0.01, *[0.1] * (len(inputs) - 2), 0.03, 0.02)
    for tensor, share in zip((*inputs, grad_output), shares, strict=True):
        chosen = torch.rand(tensor.shape) < share
        tensor[chosen] = odd[torch.randint(len(odd), (int(chosen.sum()),))].double()
    _, *found = everything(case, inputs, grad_output)
    # By the formula: autograd of the forward finds more that is not a number.
    operator = contract.PLAIN if len(inputs) == 3 else contract.FUSED
    arguments = contract.arguments_of(understood(case, inputs))
    want = operator.backward_fallback(grad_output, *arguments, [True] * len(inputs))
    for got, one in zip(found, want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-10, equal_nan=True)


@OTHER_WAY
def test_points_that_take_no_part_get_no_gradient_whatever_their_box_is(gradients):
    case = FusedCase(boxes=True, dtype=torch.float64)
    inputs, grad_output = draw(case)
    inputs[1][:, ::2, :, 2:] = math.inf
    inputs[2][:, 1] = math.nan
    found = everything(case, inputs, grad_output)
    assert all(one.isfinite().all() for one in found)
    assert (found[2][:, ::2] == 0).all()
    assert_same(found, expected(case, inputs, grad_output), 1e-13)


@ONE_WAY
@pytest.mark.parametrize("case", [SMALL, SMALL_FUSED], ids=["plain", "fused"])
def test_only_the_gradients_that_are_wanted(gradients, case):
    inputs, grad_output = draw(case)
    want = expected(case, inputs, grad_output)[1:]
    for wanted in itertools.product([False, True], repeat=len(inputs)):
        if not any(wanted):
            continue
        backward._remembered.clear()
        leaves = [x.clone().requires_grad_(one) for x, one in zip(inputs, wanted, strict=True)]
        case.call(*leaves).backward(grad_output)
        for leaf, one, gradient in zip(leaves, wanted, want, strict=True):
            assert (leaf.grad is not None) == one
            if one:
                assert_same([leaf.grad], [gradient], 1e-5)
        (plan,) = backward._remembered.values()
        constants = plan.prepared.constants
        assert (constants["VALUE_GRADIENT"] != "no") == wanted[0]
        assert (constants["GRAD_POINTS"], constants["GRAD_WEIGHTS"]) == wanted[-2:]
        assert constants["GRAD_LOCATIONS"] == (len(inputs) == 4 and wanted[1])


CALLS = fused_calls(most_queries=9, most_of_a_map=5, most_points=4, most_maps=2, most_heads=2)


@EVERY_WAY
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=CALLS, seed=st.integers(0, 2**16))
def test_any_call_equals_the_reference(gradients, case, seed):
    torch.manual_seed(seed)
    assert_equals_reference(case, 1e-12)


@OTHER_WAY
def test_gradients_of_the_output_with_any_strides(gradients):
    case = Case(dtype=torch.float64)
    inputs, grad_output = draw(case)
    for strided in (
        grad_output[:1, :1, :1].expand_as(grad_output),
        grad_output.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        assert not strided.is_contiguous()
        found = everything(case, inputs, strided)
        assert_same(found, everything(case, inputs, strided.contiguous()))


@ONE_WAY
@pytest.mark.parametrize("name", ["lines", "fused-standard", "volumes", "fused-ragged-boxes"])
def test_places_counted_in_64_bits(gradients, name, monkeypatch):
    from saccade.backends.triton import launch, sorting

    inputs, grad_output = draw(ALL[name])
    narrow = everything(ALL[name], inputs, grad_output)
    backward._remembered.clear()
    monkeypatch.setattr(launch, "_MOST_NUMBERS_OF_32_BITS", 0)
    monkeypatch.setattr(sorting, "MOST_SMALL_KEYS", 0)
    wide = everything(ALL[name], inputs, grad_output)
    assert all(map(torch.equal, wide, narrow))
    assert all(plan.prepared.constants["WIDE"] for plan in backward._remembered.values())


@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_words_of_two_numbers_begin_where_words_begin(gradients, dtype):
    case = Case(dtype=dtype, head_dim=4)
    inputs, grad_output = draw(case)
    moved = [x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (*inputs, grad_output)]
    arguments = contract.arguments_of(case.understood(*inputs))
    with use(TRITON):
        of_moved, of_inputs = (
            backward.differentiate(
                given[-1], *contract.PLAIN.replaced(arguments, given[:-1]), [True] * 3
            )
            for given in (moved, [*inputs, grad_output])
        )
    assert all(map(torch.equal, of_moved, of_inputs))


@ONE_WAY
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grad: grad[:, 1:], r"grad_output: expected \[2, 11, 24\], got \[2, 10, 24\]"),
        (lambda grad: grad[..., 1:], "grad_output: expected"),
        (lambda grad: grad.double(), "grad_output: expected the dtype of value"),
        (lambda grad: grad.bfloat16(), "grad_output: expected the dtype of value"),
    ],
)
def test_the_operator_itself_checks_the_gradient_of_the_output(gradients, change, message):
    case = Case()
    inputs, grad_output = draw(case)
    arguments = contract.arguments_of(case.understood(*inputs))
    operator = torch.ops.saccade.deformable_attention_backward
    assert len(operator(grad_output, *arguments, [True] * 3)) == 3
    with pytest.raises((ValueError, RuntimeError), match=message):
        operator(change(grad_output), *arguments, [True] * 3)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False]])
def test_opcheck(summed, mask):
    case = Case(num_queries=2, batch_size=1, dtype=torch.bfloat16)
    inputs, grad_output = draw(case)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    arguments = contract.arguments_of(case.understood(*leaves))
    torch.library.opcheck(
        torch.ops.saccade.deformable_attention_backward,
        (grad_output, *arguments, mask),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    # With one mask no gradient of the value is asked for, which `summed` wants to see.
    case.call(*leaves).sum().backward()


def test_second_derivatives_are_those_of_the_reference(summed):
    for case in (Case(), FusedCase(boxes=True)):
        case = case.with_(num_queries=3, head_dim=2, dtype=torch.float64)
        inputs, grad_output = draw(case)

        def second(case=case, inputs=inputs, grad_output=grad_output):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            first = torch.autograd.grad(case.call(*leaves), leaves, grad_output, create_graph=True)
            penalty = sum(gradient.square().sum() for gradient in first)
            return torch.autograd.grad(penalty, leaves)

        found = second()
        with saccade.use_backend("reference"):
            want = second()
        for got, one in zip(found, want, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-9, atol=1e-9)
