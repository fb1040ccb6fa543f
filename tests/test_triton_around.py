"""What training puts around the GPU kernels: checkpoints, compilation, autocast, DDP."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MANY_SAMPLES, NO_TRITON, WITH_TRITON, summing, table
from torch.utils.checkpoint import checkpoint

import saccade

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import backward

SHAPES = [(4, 5), (2, 3)]


@pytest.fixture(params=MANY_SAMPLES)
def layer(request, monkeypatch):
    """A layer, its inputs, and both ways to sum up the gradient of the value."""
    with table(monkeypatch, few_looks=2**62, **summing(request.param)):
        module = saccade.nn.MultiScaleDeformableAttention(16, num_heads=2, num_levels=2)
        with torch.no_grad():
            module.sampling_offsets.weight.normal_(std=0.1)
            module.attention_weights.weight.normal_()
        inputs = (torch.randn(2, 5, 16), torch.rand(2, 5, 2), torch.randn(2, 26, 16))
        yield module, inputs
        # Each test leaves the gradients of a call to the GPU kernels.
        assert backward._remembered


def gradients(module, inputs, call=None):
    """The output, and the gradients of parameters and inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    module.zero_grad()
    query, references, feature = leaves
    call = module if call is None else call
    output = call(query, references[:, :, None].expand(-1, -1, 2, -1), feature, SHAPES)
    output.square().sum().backward()
    parameters = [parameter.grad.clone() for parameter in module.parameters()]
    return [output.detach(), *parameters, *(leaf.grad for leaf in leaves)]


def assert_close(found, expected, **tolerance):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_as_on_the_cpu(layer):
    found = gradients(*layer)
    with saccade.use_backend("reference"):
        assert_close(found, gradients(*layer), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing(layer):
    module, inputs = layer
    found = gradients(module, inputs, lambda *a: checkpoint(module, *a, use_reentrant=False))
    assert_close(found, gradients(module, inputs))


def test_compiled(layer):
    module, inputs = layer
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(gradients(module, inputs, compiled), gradients(module, inputs))


def test_autocast(layer):
    module, inputs = layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, *found = gradients(module, inputs)
    assert output.dtype == torch.bfloat16
    expected = gradients(module, inputs)[1:]
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() <= 0.1 * want.abs().max() + 1e-3


def test_distributed_data_parallel(layer, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    module, inputs = layer
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        found = gradients(wrapped, inputs)
    finally:
        torch.distributed.destroy_process_group()
    assert_close(found, gradients(module, inputs))
