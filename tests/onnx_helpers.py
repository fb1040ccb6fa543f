"""Models to export, sessions to run them in, and the node of TensorRT's plugin in numpy."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import saccade
from saccade.call import parse_call
from saccade.functional import run
from saccade.integrations import onnx as saccade_onnx

LOWERINGS = ("grid_sample", "gather", "plugin", "native")
HEADS, CHANNELS, POINTS = 2, 8, 3
SHAPES = {1: [(9,), (5,)], 2: [(6, 7), (3, 4)], 3: [(3, 4, 5), (2, 3, 2)]}
OTHER_SHAPES = {1: [(12,), (3,)], 2: [(5, 9), (4, 3)], 3: [(4, 3, 6), (3, 2, 4)]}


def get_shapes(maps):
    """The recipe of docs/onnx.md: ints from the maps' shapes, never from a tensor."""
    return [tuple(feature_map.shape[2:]) for feature_map in maps]


def flattened(maps):
    """[B, S, C] of maps [B, C, *shape]."""
    return torch.cat([feature_map.flatten(2) for feature_map in maps], 2).transpose(1, 2)


def split_query(query, shapes):
    """Points [B, Q, M, P, N], some of them a little outside as locations, and weights [B, Q, M, P]."""
    spatial_dims, points = len(shapes[0]), len(shapes) * POINTS
    count = HEADS * points * spatial_dims
    return (
        query[..., :count].unflatten(-1, (HEADS, points, spatial_dims)),
        query[..., count : count + HEADS * points].unflatten(-1, (HEADS, points)),
    )


class Operator(nn.Module):
    """Calls of the operator, one for each dict of options.

    Beside the operator's options there are `references`, the number of reference points (points are offsets
    then), `boxes`, `softmax`, `value_heads` and `masked`.
    """

    def __init__(self, *calls):
        super().__init__()
        self.calls = calls

    def forward(self, maps, query, mask):
        return tuple(self.run(dict(call), maps, query, mask) for call in self.calls)

    def run(self, options, maps, query, mask):
        shapes = get_shapes(maps)
        points, weights = split_query(query, shapes)
        value = flattened(maps).unflatten(-1, (options.pop("value_heads", HEADS), -1))
        if options.pop("masked", False):
            options["value_padding_mask"] = mask
        by_level = not options
        references, softmax = options.pop("references", 0), options.pop("softmax", False)
        coordinates = len(shapes[0]) * (2 if options.pop("boxes", False) else 1)
        unit = 6 if options.get("coordinates") == "pixel" else 1
        if references:
            reference_points = query[..., : references * coordinates] * unit
            reference_points = reference_points.unflatten(-1, (-1, coordinates))
            points = points * 3
        else:
            points = points * unit
        if "queries_per_map" in options:
            points, weights = points.flatten(0, 1), weights.flatten(0, 1)
        elif by_level:  # with an axis for the levels
            points, weights = (
                tensor.unflatten(3, (len(maps), POINTS)) for tensor in (points, weights)
            )
        if not by_level:
            options.setdefault("num_points", POINTS)
        if softmax != bool(references):
            # The public functions have no such call.
            if references:
                options["reference_points"] = reference_points
            return run(parse_call(value, shapes, points, weights, softmax=softmax, **options))
        if references:
            return saccade.fused_deformable_attention(
                value, shapes, reference_points, points, weights, **options
            )
        return saccade.deformable_attention(value, shapes, points, weights, **options)


class MultiScale(nn.Module):
    """The module of detectors, with another number of points on each level where a lowering can."""

    def __init__(self, num_points):
        super().__init__()
        self.attention = saccade.nn.MultiScaleDeformableAttention(
            CHANNELS, HEADS, num_levels=2, num_points=num_points
        )
        nn.init.normal_(self.attention.sampling_offsets.weight)

    def forward(self, maps, query, mask):
        reference = query[..., CHANNELS : CHANNELS + 4].unsqueeze(2).sigmoid()
        return (
            self.attention(
                query[..., :CHANNELS], reference, flattened(maps), get_shapes(maps), mask
            ),
        )


class SingleMap(nn.Module):
    """The module for one map, whose heads all read the map itself."""

    def __init__(self):
        super().__init__()
        self.attention = saccade.nn.DeformableAttention(CHANNELS, HEADS, value_projection=False)
        nn.init.normal_(self.attention.sampling_offsets.weight)

    def forward(self, maps, query, mask):
        return (self.attention(query[..., :CHANNELS], maps[0].permute(0, 2, 3, 1)),)


def draw(batch, queries, shapes, seed=0, dtype=torch.float32):
    """Maps, queries (some of whose locations are not finite) and a padding mask."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, CHANNELS, *shape, generator=generator) for shape in shapes]
    query = torch.rand(batch, queries, 64, generator=generator) * 1.6 - 0.3
    mask = torch.rand(batch, flattened(maps).shape[1], generator=generator) < 0.3
    return [feature_map.to(dtype) for feature_map in maps], query, mask


def export(model, example, lowering, dynamic=True, **options):
    """The model as an ONNX program."""
    maps, query, mask = example
    dim = torch.export.Dim
    batch = dim("batch")
    sizes = [
        {0: batch}
        | {axis: dim(f"size_{level}_{axis}", max=4096) for axis in range(2, feature_map.dim())}
        for level, feature_map in enumerate(maps)
    ]
    shapes = (sizes, {0: batch, 1: dim("queries")}, {0: batch, 1: dim.AUTO})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about names of axes
        return torch.onnx.export(
            model.eval(),
            (maps, query, mask),
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes if dynamic else None,
            custom_translation_table=saccade_onnx.translations(lowering),
            **options,
        )


class Runner:
    """A program in ONNX Runtime, or, with the plugin's node, in ONNX's own evaluator."""

    def __init__(self, program, lowering):
        model = program.model_proto
        if lowering == "plugin":
            import onnx

            onnx.checker.check_model(model)
            evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=[plugin_node()])
            self.names, self.run = evaluator.input_names, evaluator.run
            return
        import onnxruntime

        options = None
        if lowering == "native":
            need_extensions()
            options = saccade_onnx.session_options()
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.names = [node.name for node in session.get_inputs()]
        self.run = session.run

    def __call__(self, maps, query, mask):
        # An input that nothing reads stays an input.
        arrays = [tensor.numpy() for tensor in (*maps, query, mask)]
        assert len(arrays) == len(self.names)
        return self.run(None, dict(zip(self.names, arrays, strict=True)))


def need_extensions():
    pytest.importorskip("onnxruntime_extensions", reason="the native kernel comes in by them")


def plugin_node():
    """`MultiscaleDeformableAttnPlugin_TRT` as its CUDA kernel computes it."""
    from onnx.reference.op_run import OpRun

    class MultiscaleDeformableAttnPlugin_TRT(OpRun):  # noqa: N801
        op_domain = "trt.plugins"

        def _run(self, value, shapes, starts, locations, weights, **_):
            assert (value.dtype, shapes.dtype, starts.dtype) == (np.float32, np.int32, np.int32)
            assert (locations.dtype, weights.dtype) == (np.float32, np.float32)
            batch, _, heads, head_dim = value.shape
            output = np.zeros((batch, locations.shape[1], heads, head_dim), np.float32)
            spaces = map(range, weights.shape)
            for b, q, m, level, k in itertools.product(*spaces):
                height, width = map(int, shapes[level])
                x = locations[b, q, m, level, k, 0] * np.float32(width) - np.float32(0.5)
                y = locations[b, q, m, level, k, 1] * np.float32(height) - np.float32(0.5)
                if not (y > -1 and x > -1 and y < height and x < width):
                    continue
                left, top = int(np.floor(x)), int(np.floor(y))
                for row, column in itertools.product((top, top + 1), (left, left + 1)):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(x - column)) * (1 - abs(y - row))
                        cell = int(starts[level]) + row * width + column
                        output[b, q, m] += weights[b, q, m, level, k] * share * value[b, cell, m]
            return (output,)

    return MultiscaleDeformableAttnPlugin_TRT


def assert_equal(outputs, expected, tolerance=1e-4):
    assert len(outputs) == len(expected)
    for number, (output, tensor) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape == tuple(tensor.shape), number
        np.testing.assert_allclose(
            output, tensor.detach().numpy(), rtol=0, atol=tolerance, err_msg=f"output {number}"
        )
