"""The operator as the node that TensorRT has a plugin for, `MultiscaleDeformableAttnPlugin_TRT`.

Its CUDA kernel reads as Saccade does: sampling is linear, each corner outside counts as 0, and a point
whose position is not finite contributes nothing.
"""

from __future__ import annotations

from saccade.integrations.onnx.call import CallInGraph
from saccade.integrations.onnx.graph import RefusedError, Value
from saccade.integrations.onnx.sampling import make_positions

LOWERING = "plugin"
NAME = "MultiscaleDeformableAttnPlugin_TRT"
# TensorRT's parser looks at the name alone; ONNX Runtime's TensorRT provider has plugins in this domain.
DOMAIN = "trt.plugins"
ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}
_OTHERS = "'grid_sample', 'gather' or 'native'"


def lower(call: CallInGraph) -> Value:
    """The result [B, Q, M * D] by one node of the plugin."""
    _refuse(call)
    graph, op = call.graph, call.graph.op
    heads, head_dim = call.heads, call.head_dim
    levels, points = len(call.levels.shapes), call.levels.num_points[0]
    batch, queries = call.batch, call.queries
    value = graph.to_compute_dtype(call.arguments.value)
    if call.value_heads != heads:
        # The plugin has a value per head; one that all heads read is repeated.
        positions = graph.size(call.arguments.value, 1)
        value = op.Expand(value, graph.vector([batch, positions, heads, head_dim]))
    # A line is an image of one row.
    shapes = [shape if len(shape) == 2 else (1, *shape) for shape in call.levels.shapes]
    sizes = graph.vector([size for shape in shapes for size in shape])
    starts = graph.vector(call.levels.offsets()[:-1])
    int32 = graph.ir.DataType.INT32
    inputs = [
        value,
        op.Cast(graph.reshape(sizes, levels, 2), to=int32),
        op.Cast(starts, to=int32),
        graph.reshape(_make_locations(call), batch, queries, heads, levels, points, 2),
        graph.reshape(call.weights, batch, queries, heads, levels, points),
    ]
    output = graph.node(DOMAIN, NAME, inputs, ATTRIBUTES)  # [B, Q, M, D]
    return call.to_value_dtype(graph.reshape(output, batch, queries, heads * head_dim))


def _refuse(call: CallInGraph) -> None:
    if call.graph.double:
        raise RefusedError(LOWERING, "a float64 value", "the plugin is float32", "'gather'")
    if call.arguments.queries_per_map is not None:
        reason = "the plugin reads equally many points of each map"
        raise RefusedError(LOWERING, "queries_per_map", reason, "'gather' or 'native'")
    if call.levels.spatial_dims == 3:
        reason = "the plugin reads images"
        raise RefusedError(LOWERING, "spatial_shapes of 3 dimensions", reason, _OTHERS)
    if len({*call.levels.num_points}) > 1:
        reason = "the plugin has as many points on each level"
        raise RefusedError(LOWERING, f"num_points={call.levels.num_points}", reason, _OTHERS)


def _make_locations(call: CallInGraph) -> Value:
    """Normalized (x, y) of the points, clamped as the padding says, [B, Q, M, P, 2]."""
    graph, op = call.graph, call.graph.op
    arguments, locations = call.arguments, call.locations
    options = (arguments.coordinates, arguments.padding, arguments.interpolation)
    if options != ("normalized", "zeros", "linear"):
        # Without interpolation they are the centres of pixels, where the plugin reads one pixel.
        sizes = call.levels.sizes()
        positions = make_positions(call.levels, arguments, locations)
        locations = op.Div(op.Add(positions, graph.floats(0.5)), sizes)
    if call.levels.spatial_dims == 1:
        # y is the middle of the row, and NaN where x is not finite.
        middle = op.Add(op.Mul(locations, graph.floats(0.0)), graph.floats(0.5))
        locations = op.Concat(locations, middle, axis=-1)
    return locations
