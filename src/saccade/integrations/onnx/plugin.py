"""The operator as the node that TensorRT has a plugin for, `MultiscaleDeformableAttnPlugin_TRT`.

Its CUDA kernel reads as Saccade does: linear, each corner outside counts as 0, and a point whose
position is not finite contributes nothing.
"""

from __future__ import annotations

from saccade.integrations.onnx.problem import Problem, RefusedError, Value, positions

LOWERING = "plugin"
NAME = "MultiscaleDeformableAttnPlugin_TRT"
# TensorRT's parser looks at the name alone; ONNX Runtime's TensorRT provider has plugins in here.
DOMAIN = "trt.plugins"
ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}
_OTHERS = "'grid_sample', 'gather' or 'native'"


def lower(problem: Problem) -> Value:
    """The result [B, Q, M * D] by one node of the plugin."""
    _refuse(problem)
    graph, op = problem.graph, problem.graph.op
    heads, head_dim = problem.heads, problem.head_dim
    levels, points = len(problem.shapes), problem.num_points[0]
    batch, queries = problem.batch, problem.queries
    value = graph.compute(problem.value)
    if problem.value_heads != heads:
        # The plugin has no head that all of them read.
        cells = graph.size(problem.value, 1)
        value = op.Expand(value, graph.vector([batch, cells, heads, head_dim]))
    # A line is an image of one row.
    shapes = [shape if len(shape) == 2 else (1, *shape) for shape in problem.shapes]
    sizes = graph.vector([size for shape in shapes for size in shape])
    starts = graph.vector(graph.sums([graph.product(*shape) for shape in shapes])[:-1])
    int32 = graph.ir.DataType.INT32
    inputs = [
        value,
        op.Cast(graph.reshape(sizes, levels, 2), to=int32),
        op.Cast(starts, to=int32),
        graph.reshape(_locations(problem), batch, queries, heads, levels, points, 2),
        graph.reshape(problem.weights, batch, queries, heads, levels, points),
    ]
    output = graph.node(DOMAIN, NAME, inputs, ATTRIBUTES)  # [B, Q, M, D]
    return problem.result(graph.reshape(output, batch, queries, heads * head_dim))


def _refuse(problem: Problem) -> None:
    if problem.graph.double:
        raise RefusedError(LOWERING, "a float64 value", "the plugin is float32", "'gather'")
    if problem.queries_per_map is not None:
        reason = "the plugin reads equally many points of each map"
        raise RefusedError(LOWERING, "queries_per_map", reason, "'gather' or 'native'")
    if problem.spatial_dims == 3:
        reason = "the plugin reads images"
        raise RefusedError(LOWERING, "spatial_shapes of 3 dimensions", reason, _OTHERS)
    if len({*problem.num_points}) > 1:
        reason = "the plugin has as many points on each level"
        raise RefusedError(LOWERING, f"num_points={problem.num_points}", reason, _OTHERS)


def _locations(problem: Problem) -> Value:
    """Normalized (x, y) of the points, the padding settled, [B, Q, M, P, 2]."""
    graph, op = problem.graph, problem.graph.op
    locations = problem.locations
    options = (problem.coordinates, problem.padding, problem.interpolation)
    if options != ("normalized", "zeros", "linear"):
        # Without interpolation they are the centres of cells, where the plugin reads one cell.
        sizes = op.Cast(problem.sizes(), to=graph.dtype)
        locations = op.Div(op.Add(positions(problem), graph.number(0.5)), sizes)
    if problem.spatial_dims == 1:
        # The middle of the row, and no number where x is none.
        middle = op.Add(op.Mul(locations, graph.number(0.0)), graph.number(0.5))
        locations = op.Concat(locations, middle, axis=-1)
    return locations
