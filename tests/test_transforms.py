"""Forward mode, torch.func and modes around the operator: eager, compiled, exported, called directly."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from fused_helpers import FusedCase
from helpers import some
from torch._functorch.aot_autograd import aot_export_module
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import saccade
from saccade import reference
from saccade.functional import run_backward
from saccade.ops.registration import BACKWARD_OPERATOR, OPERATOR
from saccade.ops.schema import Arguments, to_arguments

SMALL = {
    "batch_size": 1, "num_queries": 2, "num_heads": 2, "head_dim": 2, "shapes": [(3, 4)],
    "num_points": 2, "dtype": torch.float64,
}  # fmt: skip
CASES = {
    "plain": FusedCase(**SMALL, references=None, softmax=False),
    "boxes": FusedCase(**SMALL, boxes=True),
    "ragged": FusedCase(**(SMALL | {"batch_size": 2}), queries_per_map=[1, 2]),
}


class Function:
    """A scalar function of one tensor of a call, computed in one of three ways, and its truth.

    It is nonlinear, so that no derivative of first or second order is 0.
    """

    def __init__(self, name, argument, kind):
        case, self.kind = CASES[name], kind
        self.tensors = [*case.draw()]
        arguments = to_arguments(case.parse(*self.tensors))
        if kind == "public":
            self.options = {"num_points": case.num_points, "queries_per_map": case.queries_per_map}
            self.name = "deformable_attention" if name == "plain" else "fused_deformable_attention"
            self.position = {"value": 0, "weights": -1}[argument]
            self.inputs = [self.tensors[0], case.shapes, *self.tensors[1:]]
        else:
            self.position = Arguments._fields.index(argument)
            self.inputs = [*arguments]
        batch_size, num_queries, num_heads = arguments.points.shape[:3]
        self.grad_output = torch.randn(
            batch_size, num_queries, num_heads * case.head_dim, dtype=torch.float64
        )
        self.mask = [True, True, True, arguments.reference_points is not None]
        self.input = self.inputs[self.position]

    def replace(self, tensor):
        inputs = [*self.inputs]
        inputs[self.position] = tensor
        return inputs

    def expected(self, tensor):
        inputs = self.replace(tensor)
        if self.kind == "public":
            return self.sum([getattr(reference, self.name)(*inputs, **self.options)])
        call = Arguments(*inputs).call()
        if self.kind == "operator":
            return self.sum([reference.execute(call)])
        return self.sum(reference.execute_backward(self.grad_output, call, self.mask))

    def __call__(self, tensor):
        inputs = self.replace(tensor)
        if self.kind == "public":
            return self.sum([getattr(saccade, self.name)(*inputs, **self.options)])
        if self.kind == "operator":
            return self.sum([OPERATOR(*inputs)])
        return self.sum(BACKWARD_OPERATOR(self.grad_output, *inputs, self.mask))

    @staticmethod
    def sum(tensors):
        return sum(each.pow(3).sum() for each in tensors if each is not None)


def with_dual_level(function):
    def run(tensor):
        with forward_ad.dual_level():
            output = function(forward_ad.make_dual(tensor, tensor.cos()))
            return forward_ad.unpack_dual(output).tangent

    return run


def pull_back(function, tensor):
    output, pullback = vjp(function, tensor)
    return pullback(torch.ones_like(output))[0]


TRANSFORMS = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "dual_level": with_dual_level,
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "grad": grad,
    "vjp": lambda f: lambda x: pull_back(f, x),
    "hessian": hessian,
    "vmap": lambda f: lambda x: vmap(f)(torch.stack((x, x.cos()))),
    "vmap-grad": lambda f: lambda x: vmap(grad(f))(torch.stack((x, x.cos()))),
    "jvp-vmap": lambda f: lambda x: jvp(vmap(f), (x[None],), (x[None].cos(),))[1],
    "grad-vmap": lambda f: grad(lambda x: vmap(f)(x[None]).sum()),
}
KINDS = ["public", "operator", "backward"]


def compare(function, transform, change=lambda changed: changed, *, around=False):
    """A transform inside or around a changed function (compiled, exported), against the reference."""
    expected = TRANSFORMS[transform](function.expected)(function.input)
    assert expected.abs().max() > 1e-3
    if around:
        result = TRANSFORMS[transform](change(function))(function.input)
    else:
        result = change(TRANSFORMS[transform](function))(function.input)
    assert isinstance(result, torch.Tensor), "the tangent was dropped"
    torch.testing.assert_close(result, expected)


def compile_with(backend):
    torch.compiler.reset()

    def change(changed):
        return torch.compile(lambda tensor: changed(tensor), backend=backend, fullgraph=True)

    return change


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_in_eager_mode(transform, kind, name):
    compare(Function(name, "value" if kind == "operator" else "weights", kind), transform)


COMPILED = [*itertools.product(TRANSFORMS, KINDS, CASES, ("eager", "aot_eager"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "kind", "name", "backend"),
    [
        ("jvp", "public", "plain", "aot_eager"),
        ("dual_level", "public", "plain", "eager"),
        *some(COMPILED, 5),
    ],
)
def test_transforms_inside_a_compiled_function(transform, kind, name, backend):
    compare(Function(name, "weights", kind), transform, compile_with(backend))


@pytest.mark.nightly
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize("name", ["plain", "boxes"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["jvp", "dual_level", "hessian", "vmap-grad"])
def test_transforms_inside_a_function_compiled_by_inductor(transform, kind, name):
    """`value[index]`, `index_add` and `index_put` would get wrong numbers here: the reference avoids them."""
    compare(Function(name, "value", kind), transform, compile_with("inductor"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_around_an_exported_program(kind):
    function = Function("boxes", "weights", kind)

    class Module(torch.nn.Module):
        def forward(self, tensor):
            return function(tensor)

    program = torch.export.export(Module(), (function.input,)).module()
    assert "saccade" in program.code
    for transform in TRANSFORMS:
        compare(function, transform, lambda _: program, around=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_with_forward_mode_inside(kind):
    """The program opens a level of its own, of which `torch.autograd.forward_ad` does not know."""

    def export(changed):
        class Module(torch.nn.Module):
            def forward(self, tensor):
                return changed(tensor)

        return torch.export.export(Module(), (function.input,)).module()

    function = Function("plain", "weights", kind)
    for transform in ("jvp", "dual_level"):
        compare(function, transform, export)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"), [("public", "eager"), ("public", "aot_eager"), ("backward", "eager")]
)
def test_forward_mode_in_a_compiled_function_whose_tensors_require_a_gradient(kind, backend):
    function = Function("plain", "weights", kind)
    function.input.requires_grad_()
    for transform in ("jvp", "dual_level"):
        compare(function, transform, compile_with(backend))


def test_a_tangent_of_the_gradient_of_the_output_is_kept():
    """The forward ran without forward mode; the backward is linear in the gradient it gets."""
    case = CASES["boxes"]
    leaves = [each.requires_grad_() for each in case.draw()]
    output = case.call(*leaves)
    gradient, tangent = torch.randn_like(output), torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(gradient, tangent)
        results = torch.autograd.grad(output, leaves, dual)
        value, points, weights, references = run_backward(dual, case.parse(*leaves), [True] * 4)
        for gradients in (results, (value, references, points, weights)):
            for each, want in zip(gradients, expected, strict=True):
                torch.testing.assert_close(forward_ad.unpack_dual(each).tangent, want)


# --- modes, subclasses and tracers: each passes through the operator or keeps it ---------------------------


def test_functionalize():
    function = Function("boxes", "value", "public")
    result = functionalize(function)(function.input)
    torch.testing.assert_close(result, function.expected(function.input))


def test_a_dispatch_mode_sees_the_operator_and_its_backward():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    function = Function("plain", "value", "public")
    function.input.requires_grad_()
    (expected,) = torch.autograd.grad(function(function.input), function.input)
    with Record():
        (gradient,) = torch.autograd.grad(function(function.input), function.input)
    assert torch.equal(gradient, expected)
    assert seen.count(OPERATOR) == seen.count(BACKWARD_OPERATOR) == 1


def test_a_wrapper_subclass():
    case = CASES["plain"]
    value, *points = case.draw()
    leaf = value.clone().requires_grad_()
    (expected,) = torch.autograd.grad(case.call(leaf, *points).pow(2).sum(), leaf)
    wrapped = TwoTensor(value, 2 * value).requires_grad_()
    output = case.call(wrapped, *points)
    torch.testing.assert_close(output.b, 2 * output.a)
    (gradient,) = torch.autograd.grad(output.pow(2).sum(), wrapped)
    assert torch.equal(gradient.a, expected)
    torch.testing.assert_close(gradient.b, 2 * expected)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_batched_gradients(name):
    inputs = [each.requires_grad_() for each in CASES[name].draw()]
    assert torch.autograd.gradcheck(
        CASES[name].call, inputs, fast_mode=True, check_batched_grad=True
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compiled_autograd():
    function = Function("boxes", "value", "public")
    leaf = function.input.requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        function(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.slow
def test_aot_export():
    case = CASES["plain"]
    inputs = case.draw()

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(inputs[0])

        def forward(self, *points):
            return (case.call(self.value, *points).pow(2).sum(),)

    module, points = Module(), inputs[1:]
    graph, _ = aot_export_module(module, points, trace_joint=True, output_loss_index=0)
    assert "saccade.deformable_attention_backward" in graph.code
    loss, gradient = graph(module.value, *points)
    (expected,) = module(*points)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, module.value))


@pytest.mark.slow
def test_draft_export():
    """With reference points: torch's check takes an optional tensor that is None for a changed one."""
    case = CASES["boxes"]

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return case.call(*inputs)

    program = torch.export.draft_export(Module(), case.draw())
    assert not program._report.failures
    inputs = case.draw()
    torch.testing.assert_close(program.module()(*inputs), case.call(*inputs))
