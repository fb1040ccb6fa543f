"""torch.compile: one graph, and no second one for another batch, number of queries or resolution."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import RTDetrV2Config
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    RTDetrV2MultiscaleDeformableAttention,
)

import saccade

CHANNELS, HEADS = 32, 4


def make_shapes(scale):
    return [(8 * scale, 6 * scale), (4 * scale, 3 * scale)]


def num_positions(scale):
    return sum(height * width for height, width in make_shapes(scale))


def plain(batch, queries, scale):
    return (
        torch.randn(batch, num_positions(scale), HEADS, 8),
        make_shapes(scale),
        torch.rand(batch, queries, HEADS, 2, 4, 2),
        torch.rand(batch, queries, HEADS, 2, 4),
    )


def fused(batch, queries, scale):
    value, shapes, offsets, logits = plain(batch, queries, scale)
    return value, shapes, torch.rand(batch, queries, 1, 2), offsets, logits


def for_levels(batch, queries, scale):
    value = torch.randn(batch, num_positions(scale), CHANNELS)
    query = torch.randn(batch, queries, CHANNELS)
    return query, torch.rand(batch, queries, 1, 2), value, make_shapes(scale)


def for_map(batch, queries, scale):
    feature_map = torch.randn(batch, 7 * scale, 5 * scale, CHANNELS)
    return torch.randn(batch, queries, CHANNELS), feature_map


def for_views(batch, queries, scale):
    query = torch.randn(batch, queries, CHANNELS)
    visible = torch.rand(batch, 5, queries) < 0.4
    value = torch.randn(batch, 5, num_positions(scale), CHANNELS)
    return query, torch.rand(batch, 5, queries, 4, 2), visible, value, make_shapes(scale)


def for_convolution(batch, queries, scale):
    return (torch.randn(batch, 7 * scale, 5 * scale, CHANNELS),)


CASES = {
    "op": (lambda: saccade.deformable_attention, plain),
    "fused op": (lambda: saccade.fused_deformable_attention, fused),
    "MultiScaleDeformableAttention": (
        lambda: saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4), for_levels,
    ),
    "DeformableAttention": (
        lambda: saccade.nn.DeformableAttention(CHANNELS, HEADS, 4), for_map,
    ),
    "MultiViewDeformableAttention": (
        lambda: saccade.nn.MultiViewDeformableAttention(CHANNELS, HEADS, 2, 4), for_views,
    ),
    "DeformableConv": (lambda: saccade.nn.DeformableConv(CHANNELS, HEADS), for_convolution),
}  # fmt: skip
SIZES = [(3, 10, 1), (2, 11, 2), (5, 13, 3)]


def count_graphs(function, calls):
    """The number of graphs after each call; the results are compared with those of eager calls."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(compiled(*call), function(*call))
            counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_sizes(name):
    make, inputs = CASES[name]
    sizes = SIZES
    if name == "MultiViewDeformableAttention":
        # How many queries each view of each image has is a list: its length is that of the batch.
        sizes = [(3, *rest) for _, *rest in SIZES]
    assert count_graphs(make(), [inputs(*size) for size in sizes]) == [1] * len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["op", "MultiScaleDeformableAttention"])
def test_gradients_of_one_graph_for_all_sizes(name):
    torch.compiler.reset()
    make, inputs = CASES[name]
    function = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    parameters = [*function.parameters()] if isinstance(function, torch.nn.Module) else []

    def run(function, call):
        leaves = [
            each.clone().requires_grad_() if isinstance(each, torch.Tensor) else each
            for each in call
        ]
        output = function(*leaves)
        tensors = [*parameters, *(each for each in leaves if isinstance(each, torch.Tensor))]
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    # Not 2 first: torch would take that size and the two coordinates for one and the same number.
    for size in SIZES:
        call = inputs(*size)
        for result, want in zip(run(compiled, call), run(function, call), strict=True):
            torch.testing.assert_close(result, want)
    assert counter.frame_count == 1, "recompiled for another batch size or number of queries"


def test_a_first_batch_of_two():
    """The compiler takes sizes that are equal at first for one size: 2 images, 2 coordinates.

    It decides that before it runs a line of saccade, unless the batch is marked as dynamic.
    """
    calls = [plain(batch, 10, 1) for batch in (2, 3, 4)]
    assert count_graphs(saccade.deformable_attention, calls) == [1, 2, 2]
    for value, _, locations, weights in calls:
        for tensor in (value, locations, weights):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    assert count_graphs(saccade.deformable_attention, calls) == [1, 1, 1]
    # A module without coordinates among its inputs needs no mark.
    module = saccade.nn.DeformableAttention(CHANNELS, HEADS, 4)
    assert count_graphs(module, [for_map(batch, 10, 1) for batch in (2, 3, 4)]) == [1, 1, 1]


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_error_prints_the_sizes(dynamic):
    """Sizes may be symbols, which the compiler turns into text by a format only."""
    value, *rest = plain(2, 10, 1)
    torch.compiler.reset()
    compiled = torch.compile(saccade.deformable_attention, dynamic=dynamic, backend="eager")
    with pytest.raises(ValueError, match=r"value: expected .* heads.* got .*\[2, "):
        compiled(value[:, :, :-1], *rest)


@pytest.mark.slow
def test_a_patched_layer_whose_graph_breaks_and_its_unpatched_twin():
    """A graph that is compiled for a patched layer does not run in an unpatched one."""
    config = RTDetrV2Config(d_model=CHANNELS, decoder_attention_heads=HEADS)
    layers = torch.nn.ModuleList(RTDetrV2MultiscaleDeformableAttention(config) for _ in range(2))
    unpatched = copy.deepcopy(layers[0])
    saccade.patch(layers)
    shapes, width = [(6, 8), (3, 4), (2, 2)], CHANNELS
    arguments = {
        "hidden_states": torch.randn(3, 15, width),
        "encoder_hidden_states": torch.randn(3, sum(h * w for h, w in shapes), width),
        "reference_points": torch.rand(3, 15, 1, 4),
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": shapes,
    }
    torch.compiler.reset()
    with torch.no_grad():
        for layer in (*layers, unpatched):
            # transformers reads a number back in its check of the shapes: the graph breaks there.
            output = torch.compile(layer, backend="eager")(**arguments)
            torch.testing.assert_close(output[0], layer(**arguments)[0])
    assert layers[0].forward.__func__.__code__ is not type(unpatched).forward.__code__


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
def test_inductor_leaves_no_arithmetic_of_locations_beside_the_fused_operator():
    """Softmax and locations are inside the operator: the generated code has linear layers alone."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    module = saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4)
    inputs = for_levels(3, 10, 1)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        output, codes = run_and_get_code(compiled, *inputs)
        torch.testing.assert_close(output, module(*inputs))
    code = "\n".join(codes)
    assert "saccade.deformable_attention" in code
    assert "softmax" not in code
    assert "exp(" not in code
    assert "cpp_fused" not in code.replace("cpp_fused_addmm", ""), "a kernel beside the operator"
