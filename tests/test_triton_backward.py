"""The GPU kernels of the backward, and what training puts around them: on a card, or in the interpreter.

That gradients are those of the reference for calls of any kind is tested in test_triton.py.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from conftest import FEW_PAIRS, NO_TRITON, WITH_TRITON, gpu_plans, summing, table
from fused_helpers import FusedCase
from helpers import Case, assert_16_bit_is_as_good_as_naive, assert_same
from torch.utils.checkpoint import checkpoint
from triton_helpers import (
    assert_close,
    draw_call,
    draw_grad_output,
    run_backward_kernels,
    run_kernels,
    run_reference,
)

import saccade
from saccade import call as call_cache
from saccade.ops import schema

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import backward

WAYS = [("queries", "sorted"), ("points", "atomic")]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request, monkeypatch):
    """Both kernels of the backward, and both ways to sum up the gradient of the value."""
    kernel, summed = request.param
    with table(monkeypatch, few_pairs=FEW_PAIRS[kernel], **summing(summed)) as ran:
        yield request.param
    assert f"backward_{kernel}_kernel" in ran


SMALL = {
    "num_queries": 3, "num_heads": 1, "batch_size": 1, "queries_per_map": None, "num_points": 2,
    "interpolation": "linear", "dtype": torch.float64, "point_dtype": torch.float64, "head_dim": 4,
    "shapes": [(3, 4), (1, 2)],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes", [[(3,)], [(2, 3)], pytest.param([(2, 1, 2)], marks=pytest.mark.nightly)]
)
def test_gradcheck(summed, shapes):
    # Differences of the forward: nothing is taken from the reference.
    case = FusedCase(
        shapes=shapes, num_queries=1, num_heads=1, head_dim=1, batch_size=1, num_points=2,
        padding="border", boxes=True, dtype=torch.float64,
    )  # fmt: skip
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    assert torch.autograd.gradcheck(case.call, leaves, nondet_tol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [5, 8])
def test_precision(way, head_dim, dtype):
    # Many points in one cell: the sums have more addends than a 16-bit number has steps.
    call = draw_call(
        1, **SMALL | {"shapes": [(1, 2)], "head_dim": head_dim, "num_queries": 30, "dtype": dtype,
                      "point_dtype": torch.float32}, reference="points", softmax=True
    )  # fmt: skip
    grad_output = draw_grad_output(call)
    actual = run_kernels(call, grad_output)
    wide = [tensor.double() for tensor in call[:4]]
    truth = run_reference(
        call._replace(**dict(zip(call._fields, wide, strict=False))), grad_output.double()
    )
    if dtype == torch.float32:
        assert_same(actual, [one.float() for one in truth], 1e-5)
        return
    # As naive as can be: the truth rounded to 16 bits once.
    naive = [one.to(got.dtype) for one, got in zip(truth, actual, strict=True)]
    assert [one.dtype for one in actual[:2]] == [dtype, dtype]
    assert_16_bit_is_as_good_as_naive(actual[:2], naive[:2], truth[:2])
    assert_same(actual[2:], [one.float() for one in truth[2:]], 1e-5)


def test_points_that_take_no_part_get_no_gradient_whatever_their_box_is(way):
    call = draw_call(3, **SMALL | {"num_queries": 4}, reference="boxes", padding="zeros")
    call.reference_points[:, ::2, :, 2:] = math.inf
    call.points[:, 1] = math.nan
    grad_output = draw_grad_output(call)
    actual = run_kernels(call, grad_output)
    assert all(one.isfinite().all() for one in actual)
    assert (actual[4][:, 1] == 0).all()
    assert_close(actual, run_reference(call, grad_output))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["none", "boxes"])
def test_only_the_gradients_that_are_wanted(way, reference):
    call = draw_call(4, **SMALL, reference=reference, softmax=True)
    grad_output = draw_grad_output(call)
    expected = run_reference(call, grad_output)
    masks = itertools.product([False, True], repeat=4)
    for mask in masks:
        if not any(mask) or (mask[3] and reference == "none"):
            continue
        call_cache._cache.clear()
        gradients = run_backward_kernels(call, grad_output, list(mask))
        want = [
            one if kept else one.new_empty(0) for one, kept in zip(expected[1:], mask, strict=True)
        ]
        assert_close([expected[0], *gradients], [expected[0], *want])
        (plan,) = gpu_plans()
        constants = plan.kernel.constants
        computed = (
            constants.GRAD_VALUE != "none",
            constants.GRAD_POINTS,
            constants.GRAD_WEIGHTS,
            constants.GRAD_LOCATIONS,
        )
        assert computed == mask


@pytest.mark.slow
def test_gradients_of_the_output_with_any_strides_and_alignment(way):
    call = draw_call(5, **SMALL | {"dtype": torch.bfloat16})
    grad_output = draw_grad_output(call)
    shifted = grad_output.new_empty(grad_output.numel() + 1)[1:].view(grad_output.shape)
    for other in (
        grad_output[:1, :1, :1].expand_as(grad_output),
        grad_output.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        shifted.copy_(grad_output),
    ):
        assert not other.is_contiguous() or other.data_ptr() % 4
        actual = run_kernels(call, other)
        assert all(map(torch.equal, actual, run_kernels(call, other.contiguous().clone())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grad: grad[:, 1:], r"grad_output: expected \[2, 11, 24\], got \[2, 10, 24\]"),
        (lambda grad: grad[..., 1:], "grad_output: expected"),
        (lambda grad: grad.double(), "grad_output: expected the dtype of value"),
        (lambda grad: grad.bfloat16(), "grad_output: expected the dtype of value"),
        (lambda grad: grad.to("meta"), "grad_output: expected a tensor on"),
    ],
)
def test_the_operator_itself_checks_the_gradient_of_the_output(change, message):
    case = Case()
    call = case.parse(*case.draw())
    arguments = (*schema.to_arguments(call), [False, False, False, False])
    grad_output = draw_grad_output(call)
    # Whatever is known of the call, each gradient is checked.
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match=message):
            backward(change(grad_output), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [[True, True, True, True], [False, True, False, False]])
def test_opcheck(way, mask):
    call = draw_call(6, **SMALL | {"dtype": torch.bfloat16}, reference="points", softmax=True)
    leaves = {name: getattr(call, name).requires_grad_() for name in call._fields[:4]}
    torch.library.opcheck(
        torch.ops.saccade.deformable_attention_backward,
        (draw_grad_output(call), *schema.to_arguments(call._replace(**leaves)), mask),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_reference(summed):
    case = FusedCase(
        shapes=[(3, 4)], boxes=True, num_queries=2, num_heads=1, batch_size=1, head_dim=2,
        num_points=2, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()

    def second():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = case.call(*leaves)
        first = torch.autograd.grad(output, leaves, torch.ones_like(output), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(penalty, leaves)

    actual = second()
    with saccade.use_backend("reference"):
        expected = second()
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# --- a layer in training -----------------------------------------------------------------------------


LEVELS = [(4, 5), (2, 3)]


@pytest.fixture
def layer(way):
    """A layer and its inputs."""
    module = saccade.nn.MultiScaleDeformableAttention(8, num_heads=2, num_levels=2, num_points=2)
    with torch.no_grad():
        module.sampling_offsets.weight.normal_(std=0.1)
        module.attention_weights.weight.normal_()
    yield module, (torch.randn(1, 3, 8), torch.rand(1, 3, 2), torch.randn(1, 26, 8))
    # Each test leaves the gradients of a call to the GPU kernels.
    assert any("backward" in plan.kernel.name for plan in gpu_plans())


def train(module, inputs, call=None):
    """The output, and the gradients of parameters and inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    module.zero_grad()
    query, references, feature = leaves
    call = module if call is None else call
    output = call(query, references[:, :, None].expand(-1, -1, 2, -1), feature, LEVELS)
    output.square().sum().backward()
    parameters = [parameter.grad.clone() for parameter in module.parameters()]
    return [output.detach(), *parameters, *(leaf.grad for leaf in leaves)]


def assert_all_close(actual, expected, **tolerance):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.slow
def test_layer_as_on_the_cpu(layer):
    actual = train(*layer)
    with saccade.use_backend("reference"):
        expected = train(*layer)
    assert_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layer_with_checkpoints(layer):
    module, inputs = layer
    actual = train(module, inputs, lambda *a: checkpoint(module, *a, use_reentrant=False))
    assert_all_close(actual, train(module, inputs))


@pytest.mark.slow
def test_layer_compiled(layer):
    module, inputs = layer
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_all_close(train(module, inputs, compiled), train(module, inputs))


@pytest.mark.slow
def test_layer_under_autocast(layer):
    module, inputs = layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, *actual = train(module, inputs)
    assert output.dtype == torch.bfloat16
    expected = train(module, inputs)[1:]
    assert all(gradient.dtype == torch.float32 for gradient in actual)
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).abs().max() <= 0.1 * want.abs().max() + 1e-3


@pytest.mark.slow
def test_layer_with_distributed_data_parallel(layer, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    module, inputs = layer
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        actual = train(wrapped, inputs)
    finally:
        torch.distributed.destroy_process_group()
    assert_all_close(actual, train(module, inputs))
