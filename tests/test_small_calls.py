"""What a call costs beside the kernel: no autograd without need, no memory wasted, few Python calls."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from fused_helpers import COMBINATIONS
from helpers import Case, calls_on_native_backends
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import saccade
from saccade import call as call_module
from saccade.ops import autograd, native


class Doubled(torch.Tensor):
    """A subclass whose operators compute with autograd on the way, whatever the caller's mode."""

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


def test_a_call_that_needs_no_gradient_leaves_out_autograd_alone():
    case = Case()
    inputs = case.draw()
    expected = case.call(*inputs)
    assert not expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = case.call(*(tensor.clone().requires_grad_() for tensor in inputs))
        assert torch.equal(output, expected)
        assert output.is_inference() == (mode is torch.inference_mode)

    value = inputs[0].as_subclass(Doubled)
    torch.testing.assert_close(case.call(value, *inputs[1:]), 2 * expected.sum())
    with torch.no_grad():
        traced = torch.jit.trace(case.call, inputs, check_trace=False)
        graph = make_fx(lambda *tensors: case.call(*tensors), tracing_mode="symbolic")(*inputs)
    other = case.draw()
    for program in (traced, graph):
        assert "saccade" in str(program.graph)
        assert torch.equal(program(*other), case.call(*other))
    with FakeTensorMode() as mode:
        fake = case.call(*(mode.from_tensor(tensor) for tensor in inputs))
    assert type(fake) is not torch.Tensor
    assert fake.shape == expected.shape


@pytest.mark.parametrize("name", COMBINATIONS)
def test_autograd_is_passed_only_where_a_gradient_is_needed(monkeypatch, name):
    case = COMBINATIONS[name]
    inputs = case.draw()
    passed = []
    below = autograd._below_autograd
    monkeypatch.setattr(
        autograd, "_below_autograd", lambda *arguments: passed.append(1) or below(*arguments)
    )
    case.call(*inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        case.call(*leaves)
    with torch.inference_mode():
        case.call(*leaves)
    assert not passed
    for index in range(len(leaves)):
        mixed = [leaf if index == i else leaf.detach() for i, leaf in enumerate(leaves)]
        assert case.call(*mixed).requires_grad
        assert len(passed) == index + 1


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_call_allocates_its_output_and_no_other_tensor(name):
    case = COMBINATIONS[name].with_(num_queries=300)
    inputs = case.draw()

    def allocate():
        with torch.no_grad():
            case.call(*inputs)  # the scratch memory of this thread
            with torch.profiler.profile(profile_memory=True) as profile:
                output = case.call(*inputs)
        sizes = [event.self_cpu_memory_usage for event in profile.events()]
        return sum(size for size in sizes if size > 0), output.nbytes

    for backend, (allocated, needed) in calls_on_native_backends(allocate):
        assert allocated == needed, backend


def count_python_calls(call):
    """The number of Python functions that a call enters, and the number of files that they are in."""
    files = []

    def record(frame, event, _):
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(files), len(set(files))


@pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}")
@pytest.mark.parametrize("name", ["plain", "fused"])
def test_a_call_enters_few_python_functions(name):
    value, locations, weights = torch.rand(1, 4, 1, 4), torch.rand(1, 1, 1, 1, 4, 2), torch.rand(4)
    shapes, weights = [(2, 2)], weights.view(1, 1, 1, 1, 4)
    call = functools.partial(saccade.deformable_attention, value, shapes, locations, weights)
    if name == "fused":
        references = torch.rand(1, 1, 1, 2)
        call = functools.partial(
            saccade.fused_deformable_attention, value, shapes, references, locations, weights
        )
    call()  # whatever only the first call of a process does
    call_module._cache.clear()
    first, num_files = count_python_calls(call)
    later, _ = count_python_calls(call)
    assert first <= 60
    assert later <= (15 if name == "plain" else 16)
    assert num_files <= 10
