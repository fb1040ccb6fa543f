"""The operator by GridSample, one per level: the form that every runtime knows."""

from __future__ import annotations

from saccade.integrations.onnx.call import CallInGraph
from saccade.integrations.onnx.graph import RefusedError, Size, Value
from saccade.integrations.onnx.sampling import make_positions

NAME = "grid_sample"
# From this version on GridSample takes volumes, and its linear mode is called "linear".
VOLUME_OPSET = 20
# Normalized locations beyond this distance read nothing, on a map of one pixel too.
FAR = 8.0


def lower(call: CallInGraph) -> Value:
    """The result [B, Q, M * D] by one GridSample per level."""
    _refuse(call)
    graph, op = call.graph, call.graph.op
    heads, head_dim = call.heads, call.head_dim
    batch, queries = call.batch, call.queries
    # Where all heads read one value head, the heads are an axis of the queries and not of the maps.
    shared = call.value_heads == 1
    if shared:
        leading: tuple[Size, Size] = (batch, graph.product(queries, heads))
    else:
        leading = (graph.product(batch, heads), queries)
    num_points = call.levels.num_points

    def split_by_level(points: Value, *sizes: int) -> list[Value]:
        """From [B, Q, M, P, ...] to [maps, queries, K, *sizes] of each level."""
        if not shared:
            axes = list(range(4 + len(sizes)))
            points = op.Transpose(points, perm=[0, 2, 1, *axes[3:]])
        points = graph.reshape(points, *leading, sum(num_points), *sizes)
        return graph.split(points, num_points, 2)

    grids = split_by_level(_make_grid(call), call.levels.spatial_dims)
    weights = split_by_level(call.weights)
    shapes = call.levels.shapes
    channels_first = op.Transpose(
        graph.to_compute_dtype(call.arguments.value), perm=[0, 2, 3, 1]
    )  # [B, M, D, S]
    maps = graph.split(channels_first, [graph.product(*shape) for shape in shapes], 3)
    total = None
    for feature_map, shape, grid, weight in zip(maps, shapes, grids, weights, strict=True):
        feature_map = graph.reshape(feature_map, leading[0], head_dim, *shape)
        sampled = _sample(call, feature_map, grid)  # [maps, D, queries, K]
        sampled = op.Mul(sampled, op.Unsqueeze(weight, graph.ints([1])))
        level_sum = op.ReduceSum(sampled, graph.ints([3]), keepdims=0)  # [maps, D, queries]
        total = level_sum if total is None else op.Add(total, level_sum)
    if shared:
        total = op.Transpose(total, perm=[0, 2, 1])
        total = graph.reshape(total, batch, queries, heads * head_dim)
    else:
        total = graph.reshape(total, batch, heads * head_dim, queries)
        total = op.Transpose(total, perm=[0, 2, 1])
    return call.to_value_dtype(total)


def _refuse(call: CallInGraph) -> None:
    if call.arguments.queries_per_map is not None:
        raise RefusedError(
            NAME,
            "queries_per_map",
            "GridSample reads equally many points of each map",
            "'gather' or 'native'",
        )
    if call.levels.spatial_dims == 3 and call.graph.opset < VOLUME_OPSET:
        raise RefusedError(
            NAME,
            f"spatial_shapes of 3 dimensions with opset_version={call.graph.opset}",
            f"GridSample takes volumes from opset_version={VOLUME_OPSET} on",
            "'gather' or 'native'",
        )


def _sample(call: CallInGraph, feature_map: Value, grid: Value) -> Value:
    """What each point reads, [maps, D, queries, K]."""
    graph, op = call.graph, call.graph.op
    spatial_dims = call.levels.spatial_dims
    if spatial_dims == 1:
        # A line is an image of one row, read in the middle of the row.
        feature_map = op.Unsqueeze(feature_map, graph.ints([2]))
        grid = op.Concat(grid, op.Mul(grid, graph.floats(0.0)), axis=-1)
    elif spatial_dims == 3:
        grid = op.Unsqueeze(grid, graph.ints([3]))
    linear = "linear" if graph.opset >= VOLUME_OPSET else "bilinear"
    sampled = op.GridSample(
        feature_map,
        grid,
        mode=linear if call.arguments.interpolation == "linear" else "nearest",
        padding_mode="zeros",
        align_corners=0,
    )
    return sampled if spatial_dims < 3 else op.Squeeze(sampled, graph.ints([4]))


def _make_grid(call: CallInGraph) -> Value:
    """The locations with -1 and 1 for the outer edges of the level: [B, Q, M, P, N].

    Padding and rounding are done by `make_positions`; GridSample only reads. Runtimes disagree about far
    and non-finite locations, so that none is left in the grid.
    """
    graph, op = call.graph, call.graph.op
    arguments, locations = call.arguments, call.locations
    one, two = graph.floats(1.0), graph.floats(2.0)
    options = (arguments.coordinates, arguments.padding, arguments.interpolation)
    if options == ("normalized", "zeros", "linear"):
        near = op.LessOrEqual(op.Abs(locations), graph.floats(FAR))
        grid = op.Sub(op.Mul(locations, two), one)
        return op.Where(near, grid, graph.floats(-FAR))
    sizes = call.levels.sizes()
    positions = make_positions(call.levels, arguments, locations)
    return op.Sub(op.Div(op.Add(op.Mul(positions, two), one), sizes), one)
