"""The operator by Gather and arithmetic: for runtimes without GridSample, or with a wrong one.

No tensor has more than five axes, and nothing is scattered.
"""

from __future__ import annotations

import itertools

from saccade.integrations.onnx.problem import Problem, Value, positions


def lower(problem: Problem) -> Value:
    """The result [B, Q, M * D] by one Gather a corner."""
    graph, op = problem.graph, problem.graph.op
    value = graph.compute(problem.value)
    maps, cells = graph.size(problem.value, 0), graph.size(problem.value, 1)
    value_heads, head_dim = problem.value_heads, problem.head_dim
    num_rows = graph.product(maps, cells, value_heads)
    # One row of zeros more: what a corner outside reads, whatever the map holds.
    rows = op.Concat(
        graph.reshape(value, num_rows, head_dim), graph.number([[0.0] * head_dim]), axis=0
    )
    first_row = _first_rows(problem, cells, value_heads)
    total = None
    for cell, inside, weight in _corners(problem):
        row = op.Add(op.Mul(cell, graph.whole(value_heads)), first_row)
        row = op.Where(inside, row, graph.vector([num_rows]))
        weight = problem.weights if weight is None else op.Mul(weight, problem.weights)
        # [B, Q, M, 1, P] times [B, Q, M, P, D]
        sampled = op.MatMul(op.Unsqueeze(weight, graph.whole([3])), op.Gather(rows, row, axis=0))
        total = sampled if total is None else op.Add(total, sampled)
    total = graph.reshape(total, problem.batch, problem.queries, problem.heads * head_dim)
    return problem.result(total)


def _corners(problem: Problem) -> list[tuple[Value, Value, Value | None]]:
    """For each corner of the points its cell in the value map, whether it is inside, its weight.

    Each is [B, Q, M, P]; the weight is None where there is one corner, with the weight 1.
    """
    graph, op = problem.graph, problem.graph.op
    pixel, sizes = positions(problem), problem.sizes()
    one, zero = graph.whole(1), graph.whole(0)
    axes = []
    stride: Value = None
    # From x on: the last axis of a map is the fastest.
    for axis in range(problem.spatial_dims):
        position = op.Gather(pixel, graph.whole(axis), axis=4)
        size = op.Gather(sizes, graph.whole(axis), axis=1)
        lower_cell = op.Floor(position)
        number = op.Cast(lower_cell, to=graph.ir.DataType.INT64)
        found: list[tuple[Value, Value | None]] = [(number, None)]
        if problem.interpolation == "linear":
            upper = op.Sub(position, lower_cell)
            found = [(number, op.Sub(graph.number(1.0), upper)), (op.Add(number, one), upper)]
        axes.append(
            [
                (
                    cell if stride is None else op.Mul(cell, stride),
                    op.And(op.GreaterOrEqual(cell, zero), op.Less(cell, size)),
                    weight,
                )
                for cell, weight in found
            ]
        )
        stride = size if stride is None else op.Mul(stride, size)
    starts = _level_starts(problem)
    corners = []
    for cells in itertools.product(*axes):
        (cell, inside, weight), *others = cells
        for other_cell, other_inside, other_weight in others:
            cell = op.Add(cell, other_cell)
            inside = op.And(inside, other_inside)
            weight = None if weight is None else op.Mul(weight, other_weight)
        corners.append((op.Add(cell, starts), inside, weight))
    return corners


def _level_starts(problem: Problem) -> Value:
    """Of each point the first cell of its level, [P]."""
    graph = problem.graph
    starts = graph.sums([graph.product(*shape) for shape in problem.shapes])[:-1]
    return graph.op.Gather(graph.vector(starts), graph.whole(problem.level_of_point), axis=0)


def _first_rows(problem: Problem, cells: Value, value_heads: int) -> Value:
    """The row of a map's first cell for each head, [B, 1, M, 1], or [1, T, M, 1] of ragged queries."""
    graph, op = problem.graph, problem.graph.op
    rows_of_map = graph.vector([graph.product(cells, value_heads)])
    if problem.queries_per_map is None:
        maps = graph.reshape(_count(problem, 0), -1, 1, 1, 1)
    else:
        # A query belongs to the map before which so many maps have ended.
        ends = graph.vector(graph.sums(problem.queries_per_map)[1:])
        queries = graph.reshape(_count(problem, 1), -1, 1)
        ended = op.GreaterOrEqual(queries, ends)
        ended = op.Cast(ended, to=graph.ir.DataType.INT64)
        maps = graph.reshape(op.ReduceSum(ended, graph.whole([1]), keepdims=0), 1, -1, 1, 1)
    first = op.Mul(maps, rows_of_map)
    if value_heads == 1:
        return first  # one head, which all of them read
    heads = graph.whole(list(range(problem.heads)))
    return op.Add(first, graph.reshape(heads, 1, 1, problem.heads, 1))


def _count(problem: Problem, axis: int) -> Value:
    """0, 1, 2, … up to the size of an axis of the locations."""
    graph = problem.graph
    size = graph.vector([graph.size(problem.like, axis)])
    return graph.op.Range(graph.whole(0), graph.op.Squeeze(size, graph.whole([0])), graph.whole(1))
