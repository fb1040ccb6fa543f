"""The registered operator: opcheck, tracing, gradients of every order, schemas, FLOPs, threads."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from fused_helpers import COMBINATIONS, FusedCase, fused_loops, run_fused
from helpers import ALL, Case, assert_same, calls_on_native_backends, python, run, some
from torch.utils.flop_counter import FlopCounterMode

import saccade
from saccade.ops import native
from saccade.ops.registration import BACKWARD_OPERATOR, OPERATOR
from saccade.ops.schema import BACKWARD, FORWARD, SCHEMAS, Arguments, to_arguments

SMALL = {"batch_size": 1, "num_queries": 2, "num_heads": 2, "head_dim": 2, "dtype": torch.float64}
SHAPES = {
    "images": [(3, 4), (2, 2)],
    "lines": [(9,), (1,)],
    "volumes": [(2, 3, 4), (1, 2, 1)],
}


def draw_arguments(case, *, requires_grad=True):
    inputs = [tensor.requires_grad_(requires_grad) for tensor in case.draw()]
    return to_arguments(case.parse(*inputs))


def permute(arguments):
    """The same arguments with other strides."""
    tensors = (
        tensor if tensor is None else
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for tensor in arguments.tensors
    )  # fmt: skip
    names = ("value", "points", "weights", "reference_points")
    return arguments._replace(**dict(zip(names, tensors, strict=True)))


# --- schemas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_of_the_binary_equals_that_of_python(name):
    if native.failure:
        pytest.skip(f"no native library: {native.failure}")
    operator = getattr(torch.ops.saccade, name).default
    assert str(operator._schema) == f"saccade::{name}{SCHEMAS[name]}"


def test_arguments_are_those_of_the_schema_in_order():
    forward, backward = (
        [argument.name for argument in operator._schema.arguments]
        for operator in (OPERATOR, BACKWARD_OPERATOR)
    )
    assert forward == list(Arguments._fields)
    assert backward == ["grad_output", *Arguments._fields, "output_mask"]


OPCHECK_CASES = {
    **COMBINATIONS,
    "bfloat16": Case(dtype=torch.bfloat16, coordinates="pixel"),
    "no-batch": Case(batch_size=0),
    "shared-head-lines": FusedCase(
        shared_head=True, shapes=[(9,), (4,)], num_points=[1, 2], padding="border"
    ),
    "volumes": Case(shapes=[(2, 3, 4), (1, 2, 2)]),
    "ragged": FusedCase(batch_size=2, queries_per_map=[0, 7], boxes=True),
}


OPCHECK_TESTS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck(name):
    arguments = draw_arguments(OPCHECK_CASES[name].with_(num_queries=3))
    torch.library.opcheck(OPERATOR, arguments)
    if name == "boxes-logits":
        torch.library.opcheck(OPERATOR, permute(arguments))
    if name not in COMBINATIONS and not ALL:
        return
    output = OPERATOR(*arguments)
    grad_output = torch.randn(output.mT.shape, dtype=output.dtype).mT.requires_grad_()
    has_references = arguments.reference_points is not None
    for mask in ([True, True, True, has_references], [False, True, False, False]):
        # The AOT test differentiates the backward, by the reference: long graphs, slow to trace.
        traced = ALL or (name == "boxes-logits" and all(mask))
        torch.library.opcheck(
            BACKWARD_OPERATOR,
            (grad_output, *arguments, mask),
            test_utils=OPCHECK_TESTS if traced else OPCHECK_TESTS[:-1],
        )


# --- the four combinations of points and weights ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination_equals_the_loops(backend, name, ragged):
    """The output, and every gradient by a difference of the loops in a random direction."""
    case = COMBINATIONS[name].with_(
        **(SMALL | {"batch_size": 2, "num_queries": 1}),
        shapes=SHAPES["images"], num_points=[2, 1], queries_per_map=[2, 1] if ragged else None,
    )  # fmt: skip
    inputs = case.draw()
    grad_output = torch.randn(case.output_shape, dtype=torch.float64)
    output, *gradients = run_fused(case, inputs, grad_output)
    torch.testing.assert_close(output, fused_loops(case, *inputs), rtol=0, atol=1e-12)
    step = 1e-6
    for index, gradient in enumerate(gradients):
        direction = torch.randn_like(inputs[index])
        ends = []
        for sign in (step, -step):
            moved = [*inputs]
            moved[index] = inputs[index] + sign * direction
            ends.append((fused_loops(case, *moved) * grad_output).sum())
        expected = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-6)


# --- derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [1, 30, 32, 71])
def test_gradcheck_of_wide_rows(cpu_backend, head_dim):
    case = Case(**(SMALL | {"head_dim": head_dim}), shapes=SHAPES["images"], num_points=[1, 2])
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, inputs, fast_mode=head_dim > 1)


RULES = [("linear", "zeros"), ("linear", "border"), ("nearest", "border"), ("discrete", "border")]


@pytest.mark.parametrize(
    ("name", "shapes", "rule", "coordinates", "ragged"),
    some(
        itertools.product(
            COMBINATIONS,
            SHAPES,
            RULES,
            ("normalized", "normalized_corners", "pixel"),
            (False, True),
        ),
        16,
    ),
)
def test_gradcheck_and_gradgradcheck(name, shapes, rule, coordinates, ragged):
    interpolation, padding = rule
    case = COMBINATIONS[name].with_(
        **SMALL, shapes=SHAPES[shapes], num_points=[2, 1], interpolation=interpolation,
        padding=padding, coordinates=coordinates, queries_per_map=[2] if ragged else None,
    )  # fmt: skip
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    for _, passes in calls_on_native_backends(
        lambda: torch.autograd.gradcheck(case.call, inputs, fast_mode=not ALL)
    ):
        assert passes
    # Second derivatives are those of the reference on every backend.
    assert torch.autograd.gradgradcheck(case.call, inputs, fast_mode=not ALL)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_third_derivatives_equal_those_of_the_reference(name):
    case = COMBINATIONS[name].with_(num_queries=2, head_dim=2, dtype=torch.float64)
    inputs = case.draw()

    def third():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = case.call(*leaves).pow(2).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(result, leaves, create_graph=True)
            result = sum(gradient.pow(2).sum() for gradient in gradients)
        return result.detach()

    with saccade.use_backend("reference"):
        expected = third()
    torch.testing.assert_close(third(), expected)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_only_the_gradients_that_are_needed(name):
    case = COMBINATIONS[name]
    inputs = case.draw()
    grad_output = torch.ones(case.output_shape)
    needs = [mask for mask in itertools.product((False, True), repeat=len(inputs)) if any(mask)]

    def run_all():
        results = [run_fused(case, inputs, grad_output)[1:]]
        for needed in needs:
            leaves = [t.clone().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
            case.call(*leaves).sum().backward()
            results.append([leaf.grad for leaf in leaves])
        return results

    for backend, (complete, *partial) in calls_on_native_backends(run_all):
        for needed, gradients in zip(needs, partial, strict=True):
            for is_needed, gradient, want in zip(needed, gradients, complete, strict=True):
                assert (gradient is not None) == is_needed, backend
                assert not is_needed or torch.equal(gradient, want), backend


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_backward_keeps_the_inputs_and_nothing_else(name):
    case = COMBINATIONS[name]
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.call(*leaves)
    assert {tensor.data_ptr() for tensor in kept} == {leaf.data_ptr() for leaf in leaves}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", some(COMBINATIONS, 2))
def test_forward_mode_and_torch_func_give_right_numbers(name, shapes):
    case = COMBINATIONS[name].with_(**SMALL, shapes=SHAPES[shapes], num_points=2)
    inputs = case.draw()
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    _, derivative = torch.func.jvp(case.call, inputs, tangents)
    weights = torch.randn_like(derivative)
    gradients = torch.autograd.grad((case.call(*leaves) * weights).sum(), leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((derivative * weights).sum(), expected)
    for index, want in enumerate(gradients):
        gradient = torch.func.grad(lambda *tensors: (case.call(*tensors) * weights).sum(), index)
        torch.testing.assert_close(gradient(*inputs), want)
    mapped = torch.func.vmap(case.call)(*(torch.stack((tensor, tensor)) for tensor in inputs))
    torch.testing.assert_close(mapped[1], case.call(*inputs))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[1], tangents[1])
        output = case.call(inputs[0], dual, *inputs[2:])
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None


@pytest.mark.parametrize("name", ["locations-weights", "boxes-logits"])
def test_activation_checkpointing_and_a_value_used_twice(name):
    from torch.utils.checkpoint import checkpoint

    case = COMBINATIONS[name]
    inputs = case.draw()

    def twice(value, *points):
        first = case.call(value, *points)
        second = case.call(value * 2, points[0].flip(1), *points[1:])
        return (first * second).sum()

    plain = [tensor.clone().requires_grad_() for tensor in inputs]
    twice(*plain).backward()
    saved = [tensor.clone().requires_grad_() for tensor in inputs]
    checkpoint(twice, *saved, use_reentrant=False).backward()
    for leaf, want in zip(saved, plain, strict=True):
        assert torch.equal(leaf.grad, want.grad)


# --- tracing and autocast -----------------------------------------------------------------------------


@pytest.mark.slow
def test_export_of_the_function():
    class Attend(torch.nn.Module):
        def forward(self, value, locations, weights):
            return saccade.deformable_attention(
                value, [(6, 7), (3, 4)], locations, weights, num_points=3
            )

    inputs = Case().draw()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attend(), inputs, dynamic_shapes=[{0: batch}] * 3)
    other = Case(batch_size=5).draw()
    assert torch.equal(program.module()(*other), Attend()(*other))


def test_under_autocast_values_may_be_16_bit_and_locations_stay_float32(cpu_backend):
    case = Case()
    value, locations, weights = case.draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.call(value, locations, weights).dtype == torch.float32
        low = case.call(value.bfloat16(), locations, weights)
    assert low.dtype == torch.bfloat16


# --- FLOPs ----------------------------------------------------------------------------------------------


@pytest.fixture
def _flop_formulas():
    saccade.register_flop_formulas()


@pytest.mark.usefixtures("_flop_formulas")
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ["locations-weights", "offsets-logits"])
def test_flops_are_counted(name, shapes):
    case = COMBINATIONS[name].with_(shapes=SHAPES[shapes], num_points=[1, 4])
    inputs = case.draw()
    # Batch, queries, heads, points, corners, channels; a multiplication and an addition.
    corners = 2**case.spatial_dims
    once = 2 * 11 * 3 * 5 * corners * 8 * 2
    with FlopCounterMode(display=False) as counter:
        case.call(*inputs)
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        case.with_(interpolation="nearest").call(*inputs)
    assert counter.get_total_flops() == once // corners
    for needed, times in (((0,), 2), ((1,), 2), ((2,), 2), ((1, 2), 2), ((0, 1, 2), 3)):
        leaves = [tensor.clone().requires_grad_(i in needed) for i, tensor in enumerate(inputs)]
        with FlopCounterMode(display=False) as counter:
            case.call(*leaves).sum().backward()
        assert counter.get_total_flops() == times * once


@pytest.mark.usefixtures("_flop_formulas")
def test_flops_of_a_module():
    module = saccade.nn.MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=3)
    inputs = torch.randn(2, 11, 32), torch.rand(2, 11, 1, 2), torch.randn(2, 54, 32)
    with FlopCounterMode(display=False) as counter:
        module(*inputs, [(6, 7), (3, 4)]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    once = 2 * 11 * 4 * 6 * 4 * 8 * 2
    assert counts[getattr(torch.ops.saccade, FORWARD)] == once
    assert counts[getattr(torch.ops.saccade, BACKWARD)] == 2 * once


@pytest.mark.slow
def test_import_leaves_the_flop_counter_and_the_import_system_alone():
    code = """
import sys
before = [*sys.meta_path]
import torch
loaded = "torch.utils.flop_counter" in sys.modules
import saccade
assert sys.meta_path == before, sys.meta_path
assert ("torch.utils.flop_counter" in sys.modules) == loaded
from torch.utils.flop_counter import flop_registry
assert not any("saccade" in str(operator) for operator in flop_registry)
saccade.register_flop_formulas()
saccade.register_flop_formulas()
print(sum("saccade" in str(operator) for operator in flop_registry))
"""
    process = python(code)
    assert process.stdout == "2\n", process.stderr


# --- memory and threads ---------------------------------------------------------------------------------


def test_freed_storage_is_an_error_not_a_crash():
    if native.failure:
        pytest.skip(f"no native library: {native.failure}")
    case = Case()
    inputs = case.draw()
    inputs[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="value: expected a tensor with memory"):
        case.call(*inputs)


def test_calls_from_many_threads_at_once():
    cases = [Case(num_queries=300 + 50 * i, head_dim=8 * (i + 1)) for i in range(4)]
    inputs = [case.draw() for case in cases]

    def call_from_threads():
        expected = [run(*each, None) for each in zip(cases, inputs, strict=True)]
        failures = []

        def work(index):
            for _ in range(20):
                try:
                    assert_same(run(cases[index], inputs[index], None), expected[index], 1e-9)
                except AssertionError as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failures

    for backend, failures in calls_on_native_backends(call_from_threads):
        assert not failures, backend
