"""The operator by GridSample, one for each level: the form that every runtime knows."""

from __future__ import annotations

from saccade.integrations.onnx.problem import Problem, RefusedError, Size, Value, positions

NAME = "grid_sample"
# From this version on GridSample takes volumes, and its modes have the names of today.
OPSET_OF_VOLUMES = 20
# Of a normalized location: whoever reads the map is nearer, on a map of one pixel too.
FAR = 8.0


def lower(problem: Problem) -> Value:
    """The result [B, Q, M * D] by one GridSample a level."""
    _refuse(problem)
    graph, op = problem.graph, problem.graph.op
    heads, head_dim = problem.heads, problem.head_dim
    batch, queries = problem.batch, problem.queries
    # One head that all of them read: the heads stand beside the queries, not beside the maps.
    shared = problem.value_heads == 1
    if shared:
        leading: tuple[Size, Size] = (batch, graph.product(queries, heads))
    else:
        leading = (graph.product(batch, heads), queries)

    def by_map(points: Value, *sizes: int) -> list[Value]:
        """From [B, Q, M, P, ...] to [maps, queries, K, *sizes] of each level."""
        if not shared:
            axes = list(range(4 + len(sizes)))
            points = op.Transpose(points, perm=[0, 2, 1, *axes[3:]])
        points = graph.reshape(points, *leading, sum(problem.num_points), *sizes)
        return graph.parts(points, problem.num_points, 2)

    grids = by_map(_grid(problem), problem.spatial_dims)
    weights = by_map(problem.weights)
    # [B, M, D, S]
    channels_first = op.Transpose(graph.compute(problem.value), perm=[0, 2, 3, 1])
    cells = [graph.product(*shape) for shape in problem.shapes]
    maps = graph.parts(channels_first, cells, 3)
    total = None
    for feature_map, shape, grid, weight in zip(maps, problem.shapes, grids, weights, strict=True):
        feature_map = graph.reshape(feature_map, leading[0], head_dim, *shape)
        sampled = _sample(problem, feature_map, grid)  # [maps, D, queries, K]
        sampled = op.Mul(sampled, op.Unsqueeze(weight, graph.whole([1])))
        attended = op.ReduceSum(sampled, graph.whole([3]), keepdims=0)
        total = attended if total is None else op.Add(total, attended)
    if shared:
        total = op.Transpose(total, perm=[0, 2, 1])
        total = graph.reshape(total, batch, queries, heads * head_dim)
    else:
        total = graph.reshape(total, batch, heads * head_dim, queries)
        total = op.Transpose(total, perm=[0, 2, 1])
    return problem.result(total)


def _refuse(problem: Problem) -> None:
    if problem.queries_per_map is not None:
        raise RefusedError(
            NAME,
            "queries_per_map",
            "GridSample reads equally many points of each map",
            "'gather' or 'native'",
        )
    if problem.spatial_dims == 3 and problem.graph.opset < OPSET_OF_VOLUMES:
        raise RefusedError(
            NAME,
            f"spatial_shapes of 3 dimensions with opset_version={problem.graph.opset}",
            f"GridSample takes volumes from opset_version={OPSET_OF_VOLUMES} on",
            "'gather' or 'native'",
        )


def _sample(problem: Problem, feature_map: Value, grid: Value) -> Value:
    """What each point reads, [maps, D, queries, K]."""
    graph, op = problem.graph, problem.graph.op
    if problem.spatial_dims == 1:
        # An image of one row, read in the middle of it.
        feature_map = op.Unsqueeze(feature_map, graph.whole([2]))
        grid = op.Concat(grid, op.Mul(grid, graph.number(0.0)), axis=-1)
    elif problem.spatial_dims == 3:
        grid = op.Unsqueeze(grid, graph.whole([3]))
    linear = "linear" if graph.opset >= OPSET_OF_VOLUMES else "bilinear"
    sampled = op.GridSample(
        feature_map,
        grid,
        mode=linear if problem.interpolation == "linear" else "nearest",
        padding_mode="zeros",
        align_corners=0,
    )
    return sampled if problem.spatial_dims < 3 else op.Squeeze(sampled, graph.whole([4]))


def _grid(problem: Problem) -> Value:
    """Where each point reads, -1 and 1 being the outer edges of its level: [B, Q, M, P, N].

    Padding and cells are settled by `positions`; GridSample only reads. Runtimes disagree about far
    and non-finite numbers, so that none comes to them.
    """
    graph, op = problem.graph, problem.graph.op
    one, two = graph.number(1.0), graph.number(2.0)
    options = (problem.coordinates, problem.padding, problem.interpolation)
    if options == ("normalized", "zeros", "linear"):
        near = op.LessOrEqual(op.Abs(problem.locations), graph.number(FAR))
        grid = op.Sub(op.Mul(problem.locations, two), one)
        return op.Where(near, grid, graph.number(-FAR))
    sizes = op.Cast(problem.sizes(), to=graph.dtype)
    return op.Sub(op.Div(op.Add(op.Mul(positions(problem), two), one), sizes), one)
