"""torch.compile: one graph, and no second one for another batch, number of queries or resolution."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import saccade
from benchmarks.small_models import SMALL_MODELS

CHANNELS, HEADS = 32, 4


def shapes_of(scale):
    return [(8 * scale, 6 * scale), (4 * scale, 3 * scale)]


def positions(scale):
    return sum(height * width for height, width in shapes_of(scale))


def plain(batch, queries, scale):
    return (
        torch.randn(batch, positions(scale), HEADS, 8),
        shapes_of(scale),
        torch.rand(batch, queries, HEADS, 2, 4, 2),
        torch.rand(batch, queries, HEADS, 2, 4),
    )


def fused(batch, queries, scale):
    value, shapes, offsets, logits = plain(batch, queries, scale)
    return value, shapes, torch.rand(batch, queries, 1, 2), offsets, logits


def on_levels(batch, queries, scale):
    value = torch.randn(batch, positions(scale), CHANNELS)
    query = torch.randn(batch, queries, CHANNELS)
    return query, torch.rand(batch, queries, 1, 2), value, shapes_of(scale)


def on_a_map(batch, queries, scale):
    feature_map = torch.randn(batch, 7 * scale, 5 * scale, CHANNELS)
    return torch.randn(batch, queries, CHANNELS), feature_map


def on_views(batch, queries, scale):
    query = torch.randn(batch, queries, CHANNELS)
    visible = torch.rand(batch, 5, queries) < 0.4
    value = torch.randn(batch, 5, positions(scale), CHANNELS)
    return query, torch.rand(batch, 5, queries, 4, 2), visible, value, shapes_of(scale)


def of_a_convolution(batch, queries, scale):
    return (torch.randn(batch, 7 * scale, 5 * scale, CHANNELS),)


CASES = {
    "op": (lambda: saccade.deformable_attention, plain),
    "fused op": (lambda: saccade.fused_deformable_attention, fused),
    "MultiScaleDeformableAttention": (
        lambda: saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4), on_levels,
    ),
    "DeformableAttention": (
        lambda: saccade.nn.DeformableAttention(CHANNELS, HEADS, 4), on_a_map,
    ),
    "MultiViewDeformableAttention": (
        lambda: saccade.nn.MultiViewDeformableAttention(CHANNELS, HEADS, 2, 4), on_views,
    ),
    "DeformableConv": (lambda: saccade.nn.DeformableConv(CHANNELS, HEADS), of_a_convolution),
}  # fmt: skip
SIZES = [(3, 10, 1), (2, 10, 1), (3, 11, 2), (5, 13, 3)]


def graphs_for(function, calls):
    """How many graphs there are after each call; the results are compared on the way."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    found = []
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(compiled(*call), function(*call))
            found.append(counter.frame_count)
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_all_sizes(name):
    make, inputs = CASES[name]
    sizes = SIZES
    if name == "MultiViewDeformableAttention":
        # How many queries each view of each image has is a list: its length is that of the batch.
        sizes = [(3, *rest) for _, *rest in SIZES]
    assert graphs_for(make(), [inputs(*size) for size in sizes]) == [1] * len(sizes)


def test_a_first_batch_of_two():
    """The compiler takes sizes that are equal at first for one size: 2 images, 2 coordinates.

    It says so before it runs a line of saccade. Told that the batch is a size of its own, it does not.
    """
    calls = [plain(batch, 10, 1) for batch in (2, 3, 4)]
    assert graphs_for(saccade.deformable_attention, calls) == [1, 2, 2]
    for value, _, locations, weights in calls:
        for tensor in (value, locations, weights):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    assert graphs_for(saccade.deformable_attention, calls) == [1, 1, 1]
    # Where no two coordinates come in from outside, there is nothing to tell.
    module = saccade.nn.DeformableAttention(CHANNELS, HEADS, 4)
    assert graphs_for(module, [on_a_map(batch, 10, 1) for batch in (2, 3, 4)]) == [1, 1, 1]


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_error_says_what_came(dynamic):
    """Also where sizes are symbols, which the compiler makes no text of but by a format."""
    value, *rest = plain(2, 10, 1)
    torch.compiler.reset()
    compiled = torch.compile(saccade.deformable_attention, dynamic=dynamic, backend="eager")
    with pytest.raises(ValueError, match=r"value: expected .* heads.* got .*\[2, "):
        compiled(value[:, :, :-1], *rest)


def test_a_patched_layer_whose_graph_breaks_and_its_unpatched_twin():
    """What is compiled for one patched layer runs with that layer's names, in no other."""
    model = SMALL_MODELS["rt-detr-v2"].build()
    layers = [layer.encoder_attn for layer in model.model.decoder.layers[:2]]
    unpatched = copy.deepcopy(layers[0])
    saccade.patch(model)
    shapes = [(6, 8), (3, 4), (2, 2)]
    width = layers[0].value_proj.in_features
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
            found = torch.compile(layer, backend="eager")(**arguments)
            torch.testing.assert_close(found[0], layer(**arguments)[0])
    assert layers[0].forward.__func__.__code__ is not type(unpatched).forward.__code__


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
def test_inductor_leaves_no_arithmetic_of_locations_beside_the_fused_operator():
    """Softmax and locations are inside the operator: what is generated has linear layers alone."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    module = saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4)
    inputs = on_levels(3, 10, 1)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        found, codes = run_and_get_code(compiled, *inputs)
        torch.testing.assert_close(found, module(*inputs))
    code = "\n".join(codes)
    assert "saccade.fused_deformable_attention" in code
    assert "softmax" not in code
    assert "exp(" not in code
    assert "cpp_fused" not in code.replace("cpp_fused_addmm", ""), "a kernel beside the operator"
