"""The way of a call that needs no gradient: below autograd, past nobody else, and no memory wasted."""

from __future__ import annotations

import torch
from helpers import Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from saccade.ops import gradients


class Doubled(torch.Tensor):
    """Its operators compute with autograd on the way, whatever the caller asked for."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [
            arg.as_subclass(torch.Tensor) if isinstance(arg, torch.Tensor) else arg for arg in args
        ]
        result = function(*plain, **(kwargs or {}))
        if getattr(function, "__name__", "") != "deformable_attention.default":
            return result
        leaf = torch.ones((), requires_grad=True)
        (twice,) = torch.autograd.grad((result * 2 * leaf).sum(), leaf)
        return twice


def test_a_call_that_needs_no_gradient_passes_everyone_but_autograd():
    case = Case()
    inputs = case.draw()
    expected = case.call(*inputs)
    assert not expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = case.call(*(tensor.clone().requires_grad_() for tensor in inputs))
        assert torch.equal(found, expected)
        assert found.is_inference() == (mode is torch.inference_mode)

    value = inputs[0].as_subclass(Doubled)
    torch.testing.assert_close(case.call(value, *inputs[1:]), 2 * expected.sum())
    with torch.no_grad():
        traced = torch.jit.trace(case.call, inputs, check_trace=False)
        graph = make_fx(lambda *given: case.call(*given), tracing_mode="symbolic")(*inputs)
    other = case.draw()
    for program in (traced, graph):
        assert "saccade" in str(program.graph)
        assert torch.equal(program(*other), case.call(*other))
    with FakeTensorMode() as mode:
        fake = case.call(*(mode.from_tensor(tensor) for tensor in inputs))
    assert type(fake) is not torch.Tensor
    assert fake.shape == expected.shape


def test_autograd_is_not_asked_where_no_gradient_is_needed(native_backend, monkeypatch):
    case = Case()
    inputs = case.draw()
    passed = []
    below = gradients._below_autograd
    monkeypatch.setattr(
        gradients, "_below_autograd", lambda *given: passed.append(1) or below(*given)
    )
    case.call(*inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        case.call(*leaves)
    with torch.inference_mode():
        case.call(*leaves)
    assert not passed
    for index in range(3):
        given = [leaf if index == i else leaf.detach() for i, leaf in enumerate(leaves)]
        assert case.call(*given).requires_grad
        assert len(passed) == index + 1


def test_a_call_allocates_its_output_and_no_other_tensor(native_backend):
    case = Case(num_queries=300)
    inputs = case.draw()
    with torch.no_grad():
        case.call(*inputs)  # the scratch memory of this thread
        with torch.profiler.profile(profile_memory=True) as profile:
            output = case.call(*inputs)
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(amount for amount in allocated if amount > 0) == output.nbytes
