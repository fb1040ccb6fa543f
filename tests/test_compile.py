"""torch.compile and torch.export: one graph for every batch, number of queries and resolution."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.fx.experimental._config
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import RTDetrV2Config
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    RTDetrV2MultiscaleDeformableAttention,
)
from vision_helpers import random_rt_detr

import saccade
from saccade.integrations.dcn_extensions import flash_deform_attn_forward
from saccade.integrations.ms_deform_extensions import ms_deform_attn_forward
from saccade.ops.registration import BACKWARD_OPERATOR, OPERATOR
from saccade.ops.schema import Arguments

pytestmark = pytest.mark.slow

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


def with_boxes(batch, queries, scale):
    value, shapes, _, *rest = fused(batch, queries, scale)
    return value, shapes, torch.rand(batch, queries, 2, 4), *rest


CASES = {
    "op": (lambda: saccade.deformable_attention, plain),
    "fused op": (lambda: saccade.fused_deformable_attention, fused),
    "op with boxes": (lambda: saccade.fused_deformable_attention, with_boxes),
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


def count_graphs(function, calls, backend="eager"):
    """The number of graphs after each call; the results are compared with those of eager calls."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
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

    # Not 2 first: torch would take that size and the two coordinates for one and the same size.
    for size in SIZES:
        call = inputs(*size)
        for result, want in zip(run(compiled, call), run(function, call), strict=True):
            torch.testing.assert_close(result, want)
    assert counter.frame_count == 1, "recompiled for another batch size or number of queries"


# (batch, queries, scale) of the first call, in which the batch is as large as another size: the coordinates,
# heads and points, and queries and head_dim.
COINCIDENCES = [(2, 10, 1), (4, 10, 1), (8, 8, 1)]


@pytest.mark.parametrize("first", COINCIDENCES)
@pytest.mark.parametrize("name", ["op", "op with boxes", "MultiScaleDeformableAttention"])
def test_a_first_batch_as_large_as_another_size(name, first):
    """One graph, where the compiler does not take sizes that are equal at first for one size."""
    make, inputs = CASES[name]
    calls = [inputs(*size) for size in (first, *SIZES)]
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        assert count_graphs(make(), calls) == [1] * len(calls)


def test_a_first_batch_of_two():
    """The compiler takes a batch of 2 and two coordinates for one size before it runs a line of saccade."""
    calls = [plain(batch, 10, 1) for batch in (2, 3, 4)]
    assert count_graphs(saccade.deformable_attention, calls) == [1, 2, 2]
    # A function that looks at no size has the same two graphs, because its inputs share a symbol.
    tensors = [(value, locations) for value, _, locations, _ in calls]
    assert count_graphs(lambda value, locations: value.sum() + locations.sum(), tensors) == [
        1,
        2,
        2,
    ]
    for value, _, locations, weights in calls:
        for tensor in (value, locations, weights):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    assert count_graphs(saccade.deformable_attention, calls) == [1, 1, 1]


@pytest.mark.parametrize("name", ["DeformableAttention", "DeformableConv"])
def test_modules_without_coordinates_among_their_inputs_need_nothing(name):
    make, inputs = CASES[name]
    assert count_graphs(make(), [inputs(batch, 10, 1) for batch in (2, 3, 4)]) == [1, 1, 1]


@pytest.mark.nightly
def test_one_graph_of_a_patched_detector():
    detector = random_rt_detr()
    saccade.patch(detector)
    calls = [(torch.randn(batch, 3, 64, 64),) for batch in (2, 4)]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        counts = count_graphs(lambda pixels: detector(pixel_values=pixels).pred_boxes, calls)
    assert counts == [1, 1]


def direct(value, shapes, locations, weights):
    """The operator and its backward without the public function and its checks."""
    arguments = Arguments(
        value, [size for shape in shapes for size in shape], locations.flatten(3, 4),
        weights.flatten(3, 4), None, None, False, [4, 4], "linear", "zeros", "normalized", None,
    )  # fmt: skip
    output = OPERATOR(*arguments)
    return output, BACKWARD_OPERATOR(output, *arguments, [True, True, True, False])[:3]


def test_the_fake_kernels_fix_no_size():
    calls = [plain(*size) for size in SIZES]
    assert count_graphs(direct, calls, "aot_eager") == [1] * len(calls)


# --- spatial_shapes as a tensor -------------------------------------------------------------------------


class Function(torch.nn.Module):
    """A function as a module, which torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, value, shapes, *tensors):
        return self.function(value, shapes, *tensors)


def extension(value, shapes, locations, weights, starts):
    return ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)


def for_extension(batch, queries, scale):
    return *plain(batch, queries, scale), torch.tensor([0, 48 * scale**2])


class LevelsSecond(torch.nn.Module):
    """The module with its arguments in the order of the operator's."""

    def __init__(self):
        super().__init__()
        self.attention = saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4)

    def forward(self, value, shapes, *tensors):
        query, reference_points = tensors
        return self.attention(query, reference_points, value, shapes)


def for_module(batch, queries, scale):
    query, reference_points, value, shapes = for_levels(batch, queries, scale)
    return value, shapes, query, reference_points


WITH_TENSOR = {
    "op": (lambda: Function(saccade.deformable_attention), plain),
    "fused op": (lambda: Function(saccade.fused_deformable_attention), fused),
    "extension": (lambda: Function(extension), for_extension),
    "module": (LevelsSecond, for_module),
}


def check_shapes_of_a_tensor(program, module, make_inputs, sizes):
    """The program is right for these sizes and for shapes turned round, and refuses others."""
    with torch.no_grad():
        for size in sizes:
            value, shapes, *tensors = make_inputs(*size)
            shapes = torch.tensor(shapes)
            for each in (shapes, shapes.flip(1)):
                expected = module(value, each, *tensors)
                torch.testing.assert_close(program(value, each, *tensors), expected)
            for wrong in (shapes + 1, -shapes, shapes * 0, shapes * 2**16):
                with pytest.raises(RuntimeError, match="Runtime assertion failed for expression"):
                    program(value, wrong, *tensors)
            if module.__dict__.get("function") is extension:
                with pytest.raises(RuntimeError, match="Runtime assertion failed for expression"):
                    program(value, shapes, *tensors[:-1], tensors[-1] + 1)


@pytest.mark.parametrize("name", WITH_TENSOR)
def test_compile_with_shapes_as_a_tensor(name):
    torch.compiler.reset()
    make, inputs = WITH_TENSOR[name]
    module, counter = make(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    check_shapes_of_a_tensor(compiled, module, inputs, SIZES)
    assert counter.frame_count == 1


def depth_weighted():
    value, _, locations, weights = plain(3, 10, 1)
    depth, locations = torch.rand(3, 60, 1, 5), torch.cat([locations, locations[..., :1]], -1)
    return lambda shapes: saccade.depth_weighted_deformable_attention(
        value, depth, shapes, locations, weights
    )


def multi_camera():
    tensors = torch.rand(1, 120, 8), torch.rand(1, 10, 5, 2, 2), torch.rand(1, 10, 5, 2, 2, 2)
    value, *rest = tensors
    return lambda shapes: saccade.multi_camera_deformable_aggregation(
        value, torch.stack([shapes, shapes]), *rest
    )


def multi_view():
    module = saccade.nn.MultiViewDeformableAttention(CHANNELS, HEADS, 2, 4)
    *tensors, _ = for_views(3, 10, 1)
    return lambda shapes: module(*tensors, shapes)


def dcnv4_attention():
    value, samples = torch.rand(3, 60, 4, 8), torch.rand(3, 10, 4, 24)
    starts = torch.tensor([0, 48])
    return lambda shapes: flash_deform_attn_forward(value, shapes, starts, samples, 64, 4, 2, 64)


@pytest.mark.parametrize("make", [depth_weighted, multi_camera, multi_view, dcnv4_attention])
def test_what_stands_on_the_operator_takes_shapes_as_a_tensor(make):
    torch.compiler.reset()
    shapes = torch.tensor(make_shapes(1))
    function = make()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for each in (shapes, shapes.flip(1)):
            torch.testing.assert_close(compiled(each), function(each))
        with pytest.raises(RuntimeError, match="Runtime assertion failed for expression"):
            compiled(shapes + 1)


def test_numbers_of_queries_as_a_tensor():
    def attend(value, locations, weights, counts):
        return saccade.deformable_attention(
            value, make_shapes(1), locations, weights, queries_per_map=counts
        )

    value, _, locations, weights = plain(3, 10, 1)
    locations, weights = locations.flatten(0, 1), weights.flatten(0, 1)
    calls = [
        (value, locations[: sum(counts)], weights[: sum(counts)], torch.tensor(counts))
        for counts in ([10, 10, 10], [0, 12, 17], [5, 5, 7])
    ]
    assert count_graphs(attend, calls) == [1, 1, 1]
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for counts in ([10, 10, 11], [-1, 11, 20]):
        with pytest.raises(RuntimeError, match="Runtime assertion failed for expression"):
            compiled(value, locations, weights, torch.tensor(counts))


def test_a_batch_that_the_compiler_does_not_know():
    """The checks of the sizes that have to be equal leave them open, 0 and 1 as well."""
    calls = [plain(batch, 10, 1) for batch in (3, 1, 0, 2)]
    for tensor in calls[0]:
        if isinstance(tensor, torch.Tensor):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
    assert count_graphs(saccade.deformable_attention, calls) == [1, 1, 1, 1]


def test_gradients_with_shapes_as_a_tensor():
    torch.compiler.reset()
    compiled = torch.compile(saccade.deformable_attention, fullgraph=True, backend="aot_eager")
    value, shapes, locations, weights = plain(3, 10, 1)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    for each in (torch.tensor(shapes), torch.tensor(shapes).flip(1)):
        call = value, each, locations, weights
        expected = saccade.deformable_attention(*call)
        output = compiled(*call)
        torch.testing.assert_close(
            torch.autograd.grad(output.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", WITH_TENSOR)
def test_export_with_shapes_as_a_tensor(name, strict):
    make, inputs = WITH_TENSOR[name]
    module = make().eval()
    batch, queries, positions = map(torch.export.Dim, ("batch", "queries", "positions"))
    value, shapes, *tensors = inputs(3, 10, 1)
    # Start indices have no batch.
    dynamic = tuple(
        {0: batch, 1: queries} if tensor.is_floating_point() else {} for tensor in tensors
    )
    program = torch.export.export(
        module,
        (value, torch.tensor(shapes), *tensors),
        dynamic_shapes=({0: batch, 1: positions}, {}, dynamic),
        strict=strict,
    )
    check_shapes_of_a_tensor(program.module(), module, inputs, SIZES)


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_error_prints_the_sizes(dynamic):
    """Sizes may be symbols, which the compiler turns into text by a format only."""
    value, *rest = plain(2, 10, 1)
    torch.compiler.reset()
    compiled = torch.compile(saccade.deformable_attention, dynamic=dynamic, backend="eager")
    with pytest.raises(ValueError, match=r"value: expected .* heads.* got .*\[2, "):
        compiled(value[:, :, :-1], *rest)


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
