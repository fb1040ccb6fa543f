"""The registered operator: opcheck, tracing, gradients of both orders, schemas, autocast, backends."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import Case, assert_same, python, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import saccade
from saccade.ops import contract, native

OPERATOR = torch.ops.saccade.deformable_attention
BACKWARD = torch.ops.saccade.deformable_attention_backward


def operator_arguments(case, *, requires_grad=True):
    value, locations, weights = case.draw()
    if requires_grad:
        value, locations, weights = (t.requires_grad_() for t in (value, locations, weights))
    shapes = [size for shape in case.shapes for size in shape]
    return (
        value, shapes, locations, weights, case.points,
        case.interpolation, case.padding, case.coordinates, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(shared_head=True, num_points=[1, 2], padding="border"),
        Case(dtype=torch.bfloat16, coordinates="pixel"),
        Case(batch_size=0),
        Case(shapes=[(9,), (4,)]),
        Case(shapes=[(2, 3, 4), (1, 2, 2)]),
    ],
    ids=["plain", "shared-head", "bfloat16", "no-batch", "lines", "volumes"],
)
def test_opcheck(case):
    arguments = operator_arguments(case)
    torch.library.opcheck(OPERATOR, arguments)
    permuted = tuple(
        a.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    )
    torch.library.opcheck(OPERATOR, permuted)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False]])
def test_opcheck_of_the_backward(mask):
    case = Case(dtype=torch.float64)
    arguments = operator_arguments(case)
    grad_output = torch.randn(2, 24, 11, dtype=torch.float64).transpose(1, 2).requires_grad_()
    # Not the AOT test: it would differentiate the backward, whose formula runs autograd itself.
    torch.library.opcheck(
        BACKWARD,
        (grad_output, *arguments, mask),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


IMAGES, LINES, VOLUMES = [(3, 4), (2, 2)], [(9,), (1,)], [(2, 3, 4), (1, 2, 1)]


@pytest.mark.parametrize(
    ("head_dim", "shapes"),
    [
        *((1, IMAGES), (30, IMAGES), (32, IMAGES), (71, IMAGES)),
        *((1, LINES), (32, LINES), (1, VOLUMES), (32, VOLUMES)),
    ],
)
def test_gradcheck(cpu_backend, head_dim, shapes):
    case = Case(
        shapes=shapes,
        num_points=[1, 2],
        batch_size=1,
        num_queries=2,
        num_heads=2,
        head_dim=head_dim,
        dtype=torch.float64,
    )
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, inputs, fast_mode=head_dim > 1)


@pytest.mark.parametrize("interpolation", ["nearest", "discrete"])
@pytest.mark.parametrize("shapes", [IMAGES, LINES, VOLUMES], ids=["images", "lines", "volumes"])
def test_gradcheck_and_gradgradcheck_without_interpolation(native_backend, interpolation, shapes):
    case = Case(
        shapes=shapes, num_points=[1, 2], batch_size=1, num_queries=2, num_heads=2, head_dim=2,
        interpolation=interpolation, padding="border", dtype=torch.float64,
    )  # fmt: skip
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, inputs)
    assert torch.autograd.gradgradcheck(case.call, inputs)


@pytest.mark.parametrize("coordinates", ["normalized", "pixel"])
@pytest.mark.parametrize("shapes", [IMAGES, LINES, VOLUMES], ids=["images", "lines", "volumes"])
def test_second_derivatives(native_backend, coordinates, shapes):
    case = Case(
        shapes=shapes,
        num_points=[2, 1],
        batch_size=1,
        num_queries=2,
        num_heads=2,
        head_dim=2,
        dtype=torch.float64,
        coordinates=coordinates,
    )
    inputs = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradgradcheck(case.call, inputs)


def test_third_derivatives_equal_those_of_the_reference(native_backend):
    case = Case(num_queries=2, head_dim=2, dtype=torch.float64)
    inputs = case.draw()

    def third(backend):
        with saccade.use_backend(backend):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            result = case.call(*leaves).pow(2).sum()
            for _ in range(3):
                gradients = torch.autograd.grad(result, leaves, create_graph=True)
                result = sum(gradient.pow(2).sum() for gradient in gradients)
            return result.detach()

    torch.testing.assert_close(third(native_backend), third("reference"))


@pytest.mark.parametrize("name", list(contract.SCHEMAS))
def test_schema_of_the_binary_equals_that_of_python(name):
    if native.failure:
        pytest.skip(f"no native library: {native.failure}")
    operator = getattr(torch.ops.saccade, name).default
    assert str(operator._schema) == f"saccade::{name}{contract.SCHEMAS[name]}"


def test_compile_whole_graph_with_dynamic_sizes():
    torch.compiler.reset()
    module = saccade.nn.MultiScaleDeformableAttention(32, num_heads=4, num_levels=2)

    def attend(query, reference, value):
        return module(query, reference, value, [(6, 7), (3, 4)]).square()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    # Not 2 first: torch would take that size and the two coordinates for one and the same number.
    for batch_size, num_queries in ((3, 5), (2, 5), (4, 9)):
        inputs = (
            torch.randn(batch_size, num_queries, 32),
            torch.rand(batch_size, num_queries, 1, 2),
            torch.randn(batch_size, 54, 32),
        )
        module.zero_grad()
        expected = attend(*inputs)
        expected.sum().backward()
        gradients = [parameter.grad.clone() for parameter in module.parameters()]
        module.zero_grad()
        found = compiled(*inputs)
        found.sum().backward()
        torch.testing.assert_close(found, expected)
        for parameter, want in zip(module.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, want)
    assert counter.frame_count == 1, "recompiled for another batch size or number of queries"


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


def test_under_autocast_values_may_be_16_bit_and_locations_stay_float32(native_backend):
    case = Case()
    value, locations, weights = case.draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.call(value, locations, weights).dtype == torch.float32
        low = case.call(value.bfloat16(), locations, weights)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("shapes", [[(6, 7)], [(9,)], [(2, 3, 4)]])
def test_activation_checkpointing_and_a_value_used_twice(shapes):
    from torch.utils.checkpoint import checkpoint

    case = Case(num_heads=8, shapes=shapes, num_points=2)
    inputs = case.draw()

    def twice(value, locations, weights):
        first = case.call(value, locations, weights)
        second = case.call(value * 2, locations.flip(1), weights)
        return (first * second).sum()

    plain = [tensor.clone().requires_grad_() for tensor in inputs]
    twice(*plain).backward()
    saved = [tensor.clone().requires_grad_() for tensor in inputs]
    checkpoint(twice, *saved, use_reentrant=False).backward()
    for got, want in zip(saved, plain, strict=True):
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("shapes", [IMAGES, LINES, VOLUMES], ids=["images", "lines", "volumes"])
def test_forward_mode_and_torch_func_give_right_numbers(native_backend, shapes):
    case = Case(shapes=shapes, dtype=torch.float64, num_queries=3, batch_size=1)
    inputs = case.draw()
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    _, found = torch.func.jvp(case.call, inputs, tangents)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((case.call(*leaves) * weights).sum(), leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((found * weights).sum(), expected)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[1], tangents[1])
        output = case.call(inputs[0], dual, inputs[2])
        assert torch.autograd.forward_ad.unpack_dual(output).tangent is not None

    by_func = torch.func.grad(lambda value: (case.call(value, *inputs[1:]) * weights).sum())
    torch.testing.assert_close(by_func(inputs[0]), gradients[0])
    batched = torch.stack((inputs[0], 2 * inputs[0]))
    mapped = torch.func.vmap(lambda value: case.call(value, *inputs[1:]))(batched)
    torch.testing.assert_close(mapped[1], 2 * case.call(*inputs))


@pytest.mark.parametrize("shapes", [IMAGES, LINES, VOLUMES], ids=["images", "lines", "volumes"])
def test_flops_are_counted(native_backend, shapes):
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(shapes=shapes, num_points=[1, 4])
    inputs = case.draw()
    # Batch, queries, heads, points, corners, channels; a multiplication and an addition.
    once = 2 * 11 * 3 * 5 * 2 ** len(shapes[0]) * 8 * 2
    with FlopCounterMode(display=False) as counter:
        case.call(*inputs)
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        case.with_(interpolation="nearest").call(*inputs)
    assert counter.get_total_flops() == once // 2 ** len(shapes[0])
    for wanted, times in (((0,), 2), ((1,), 2), ((2,), 2), ((1, 2), 2), ((0, 1, 2), 3)):
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(inputs)]
        with FlopCounterMode(display=False) as counter:
            case.call(*leaves).sum().backward()
        assert counter.get_total_flops() == times * once


def test_flops_of_a_module():
    from torch.utils.flop_counter import FlopCounterMode

    module = saccade.nn.MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=3)
    inputs = torch.randn(2, 11, 32), torch.rand(2, 11, 1, 2), torch.randn(2, 54, 32)
    with FlopCounterMode(display=False) as counter:
        module(*inputs, [(6, 7), (3, 4)]).sum().backward()
    found = counter.get_flop_counts()["Global"]
    once = 2 * 11 * 4 * 6 * 4 * 8 * 2
    assert found[torch.ops.saccade.fused_deformable_attention] == once
    assert found[torch.ops.saccade.fused_deformable_attention_backward] == 2 * once


@pytest.mark.parametrize("first", ["saccade", "torch.utils.flop_counter"])
def test_flops_are_registered_whichever_is_imported_first(first):
    second = {"saccade", "torch.utils.flop_counter"} - {first}
    code = f"""
import importlib.util, sys, torch
import {first}
if "torch.utils.flop_counter" not in sys.modules:
    assert importlib.util.find_spec("torch.utils.flop_counter")  # asking is not importing

import {second.pop()}, saccade
assert not any("saccade" in type(finder).__module__ for finder in sys.meta_path), sys.meta_path
registry = sys.modules["torch.utils.flop_counter"].flop_registry
print(sum("saccade" in str(operator) for operator in registry))
"""
    done = python(code)
    assert done.stdout == "4\n", done.stderr


def test_freed_storage_is_an_error_not_a_crash(native_backend):
    case = Case()
    inputs = case.draw()
    inputs[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="value: expected a tensor with memory"):
        case.call(*inputs)


def test_fake_tensors_on_different_devices_are_refused():
    arguments = list(operator_arguments(Case(), requires_grad=False))
    arguments[2] = arguments[2].to("meta")
    with pytest.raises(ValueError, match="sampling_locations: expected a tensor on cpu like value"):
        OPERATOR(*arguments)


def test_fake_tensors_with_other_axes_are_refused():
    arguments = operator_arguments(Case(), requires_grad=False)
    with FakeTensorMode() as mode:
        for position, message in (
            (0, r"value: expected 4 axes \[batch, positions, .*got 3 axes \[54, 3, 8\]"),
            (2, r"sampling_locations: expected 5 axes .*got 4 axes \[11, 3, 6, 2\]"),
            (3, "attention_weights: expected 4 axes"),
        ):
            given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            given[position] = given[position][0]
            with pytest.raises(ValueError, match=message):
                OPERATOR(*given)
            with pytest.raises(ValueError, match=message):
                BACKWARD(given[0].new_empty(2, 11, 24), *given, [True] * 3)


def test_calls_from_many_threads_at_once(native_backend):
    cases = [Case(num_queries=300 + 50 * i, head_dim=8 * (i + 1)) for i in range(4)]
    inputs = [case.draw() for case in cases]
    expected = [run(case, given, None) for case, given in zip(cases, inputs, strict=True)]
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
    assert not failures
