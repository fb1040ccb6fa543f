"""Calls without queries: sizes that overflow are refused, all others are answered at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WITH_TRITON
from torch._subclasses import FakeTensorMode

import saccade
from saccade.ops import gpu, native, schema


def operator_arguments(
    batch_size=1, num_queries=0, num_heads=1, num_points=1, head_dim=4, references=0, ragged=None
):
    """Arguments of the operator on a map of 2 x 3 pixels whose one head serves all."""
    leading = (batch_size, num_queries) if ragged is None else (1, num_queries)
    return schema.Arguments(
        value=torch.zeros(1).expand(batch_size, 6, 1, head_dim),
        spatial_shapes=[2, 3],
        points=torch.zeros(*leading, num_heads, num_points, 2),
        weights=torch.zeros(*leading, num_heads, num_points),
        reference_points=torch.zeros(*leading, references, 2) if references else None,
        reference_index=[0] * num_points if references else None,
        softmax=False,
        num_points=[num_points],
        interpolation="linear",
        padding="zeros",
        coordinates="normalized",
        queries_per_map=ragged,
    )


TOO_LARGE = {
    "2^64": {"num_heads": 2**32, "head_dim": 2**32},
    "2^63": {"num_heads": 2**32, "head_dim": 2**31},
    "no-batch": {"batch_size": 0, "num_heads": 2**32, "head_dim": 2**32},
    "with-the-batch": {"batch_size": 2**25, "num_heads": 2**20, "head_dim": 2**20},
    "ragged": {"batch_size": 2, "ragged": [0, 0], "num_heads": 2**32, "head_dim": 2**32},
}


@pytest.mark.parametrize("sizes", TOO_LARGE.values(), ids=TOO_LARGE)
def test_an_output_whose_elements_cannot_be_counted(cpu_backend, sizes):
    arguments = operator_arguments(**sizes)
    forward, backward = schema.get_operators()
    expected = rf"value: expected an output .* at most {2**60 - 1} elements, .* got \["
    with pytest.raises((ValueError, RuntimeError), match=expected):
        forward(*arguments)
    wide = torch.zeros(*arguments.points.shape[:2], 4)
    with pytest.raises((ValueError, RuntimeError), match=expected):
        backward(wide, *arguments, [True, True, True, False])
    if arguments.queries_per_map is None:
        with pytest.raises(ValueError, match=expected):
            saccade.deformable_attention(
                arguments.value, [(2, 3)], arguments.points[:, :, :, None], arguments.weights[:, :, :, None]
            )  # fmt: skip


def test_the_shapes_for_tracing_refuse_it_too():
    forward, _ = schema.get_operators()
    with FakeTensorMode():
        arguments = operator_arguments(num_heads=2**32, head_dim=2**32)
        with pytest.raises(ValueError, match="value: expected an output"):
            forward(*arguments)


def as_strided(*sizes):
    """A tensor of these sizes, one of which is 0, in no memory."""
    return torch.zeros(0).as_strided(sizes, (0,) * len(sizes))


@pytest.mark.parametrize("name", ["value", "sampling_locations", "reference_points"])
def test_an_argument_whose_elements_cannot_be_counted(cpu_backend, name):
    arguments = operator_arguments(batch_size=0)
    if name == "value":
        arguments = arguments._replace(value=as_strided(0, 6, 1, 2**60))
    else:
        arguments = arguments._replace(
            points=as_strided(0, 2**40, 2**30 if name == "sampling_locations" else 1, 1, 2),
            weights=as_strided(0, 2**40, 2**30 if name == "sampling_locations" else 1, 1),
        )
    if name == "reference_points":
        reference_points = as_strided(0, 2**40, 2**28, 2)
        arguments = arguments._replace(reference_points=reference_points, reference_index=[0])
    forward, _ = schema.get_operators()
    expected = (
        rf"{name}: expected at most {2**60 - 1} elements, a size of 0 counted as 1, got \[0, "
    )
    with pytest.raises((ValueError, RuntimeError), match=expected):
        forward(*arguments)


def test_more_points_than_can_be_counted():
    count = 2**31
    offsets, logits = torch.zeros(1, 0, 1, 1, count, 2), torch.zeros(1, 0, 1, 1, count)
    with pytest.raises(ValueError, match=rf"num_points: expected at most {count - 1} .* got \["):
        saccade.fused_deformable_attention(
            torch.zeros(1, 6, 1, 4), [(2, 3)], torch.zeros(1, 0, 1, 2), offsets, logits
        )


@pytest.mark.parametrize(
    ("value_sizes", "leading", "queries_per_map"),
    [
        ((2, 6, 1, 4), (2, 0), None),
        ((0, 6, 3, 4), (0, 5), None),
        ((2, 6, 3, 4), (0,), [0, 0]),
        ((0, 6, 1, 4), (0,), []),
    ],
)
def test_output_and_gradients_have_the_shapes_of_any_call(
    backend, value_sizes, leading, queries_per_map
):
    tensors = [
        torch.ones(value_sizes),
        torch.zeros(*leading, 1, 4, dtype=torch.float64),
        torch.zeros(*leading, 3, 1, 5, 2, dtype=torch.bfloat16),
        torch.zeros(*leading, 3, 1, 5, dtype=torch.float16),
    ]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = saccade.fused_deformable_attention(
        tensors[0], [(2, 3)], *tensors[1:], queries_per_map=queries_per_map
    )
    assert output.shape == (*leading, 12)
    assert output.stride() == torch.empty(output.shape).stride()
    gradients = torch.autograd.grad(output.sum(), tensors, create_graph=True)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
        assert gradient.stride() == tensor.stride()
        assert (gradient == 0).all()
    again = torch.autograd.grad(sum(gradient.sum().float() for gradient in gradients), tensors)
    assert [gradient.shape for gradient in again] == [tensor.shape for tensor in tensors]


def test_derivatives_by_transforms():
    value, locations = torch.ones(1, 6, 1, 4), torch.zeros(1, 0, 3, 1, 5, 2)
    weights = torch.zeros(1, 0, 3, 1, 5)

    def call(*tensors):
        return saccade.deformable_attention(tensors[0], [(2, 3)], *tensors[1:]).sum()

    gradients = torch.func.grad(call, (0, 1, 2))(value, locations, weights)
    assert [one.shape for one in gradients] == [value.shape, locations.shape, weights.shape]
    tangents = (value, locations, weights)
    _, tangent = torch.func.jvp(call, tangents, tangents)
    assert tangent == 0


# What made tables for minutes: maps, points, or both, by the thousand million.
MANY = """
import resource
import torch
import saccade
from saccade.ops import schema
from test_calls_without_queries import operator_arguments
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
forward, backward = schema.get_operators()
for name in BACKENDS:
    with saccade.use_backend(name):
        for sizes in (
            {"num_points": 2**31 - 1},
            {"batch_size": 2**28},
            {"batch_size": 0, "num_queries": 5, "num_points": 2**31 - 1},
            {"num_heads": 2**20, "num_points": 2**30, "head_dim": 2**30},
        ):
            arguments = operator_arguments(**sizes)
            output = forward(*arguments)
            assert output.numel() == 0
            gradients = backward(output, *arguments, [False, True, True, False])
            assert gradients[1].shape == arguments.points.shape
            assert gradients[2].shape == arguments.weights.shape
        points = 2**31 - 1
        offsets, logits = torch.zeros(1, 0, 1, 1, points, 2), torch.zeros(1, 0, 1, 1, points)
        tensors = (torch.zeros(1, 6, 1, 4), torch.zeros(1, 0, 1, 2), offsets, logits)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        output = saccade.fused_deformable_attention(tensors[0], [(2, 3)], *tensors[1:])
        gradients = torch.autograd.grad(output.sum(), tensors)
        assert [one.shape for one in gradients] == [tensor.shape for tensor in tensors]
offsets = torch.zeros(1, 0, 1, points, 2)
located = saccade.sampling.sampling_locations(torch.zeros(1, 0, 1, 2), offsets, [(2, 3)], [points])
assert located.shape == offsets.shape
size = 2**15
value, offsets = torch.zeros(0, size, size, 4), torch.zeros(0, size, size, 1, 9, 2)
for softmax in (False, True):
    convolved = saccade.deformable_convolution(
        value, offsets, offsets[..., 0], kernel_size=3, padding=1, softmax=softmax)
    assert convolved.shape == value.shape
depth = torch.zeros(1).expand(2**28, 6, 1, 64)
lifted = saccade.depth_weighted_deformable_attention(
    torch.zeros(1).expand(2**28, 6, 1, 1), depth, [(2, 3)], torch.zeros(2**28, 0, 1, 1, 4, 3),
    torch.zeros(2**28, 0, 1, 1, 4))
assert lifted.shape == (2**28, 0, 1)
"""


@pytest.mark.slow
def test_nothing_is_made_for_queries_that_are_not_there():
    """Where tables were made, it took minutes, or more memory than the process may have."""
    backends = ["reference", *(f"cpu-{isa}" for isa in native.available_isas()[:1])]
    done = subprocess.run(
        [sys.executable, "-c", f"BACKENDS = {backends!r}{MANY}"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"batch_size": 2**28}, marks=WITH_TRITON),
        pytest.param({"num_points": 2**31 - 1}, marks=WITH_TRITON),
    ],
    ids=str,
)
def test_gpu_kernels_plan_nothing_either(sizes):
    arguments = operator_arguments(**sizes)
    forward, backward = gpu.implementations()
    output = forward(*arguments)
    assert output.shape == (*arguments.points.shape[:2], 4)
    gradients = backward(output, *arguments, [False, True, True, False])
    assert [one.shape for one in gradients[1:3]] == [
        arguments.points.shape,
        arguments.weights.shape,
    ]
    assert gradients[0].numel() == 0
