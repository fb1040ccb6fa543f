"""The operator by Gather and arithmetic: for runtimes without GridSample, or with a wrong one.

No tensor has more than five axes, and nothing is scattered.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from saccade.integrations.onnx.call import CallInGraph
from saccade.integrations.onnx.graph import Value
from saccade.integrations.onnx.sampling import make_positions


def lower(call: CallInGraph) -> Value:
    """The result [B, Q, M * D] by one Gather per corner."""
    graph, op = call.graph, call.graph.op
    value = graph.to_compute_dtype(call.arguments.value)
    maps, positions = graph.size(call.arguments.value, 0), graph.size(call.arguments.value, 1)
    value_heads, head_dim = call.value_heads, call.head_dim
    num_rows = graph.product(maps, positions, value_heads)
    # The row of zeros at the end is what a corner outside reads, whatever the map holds.
    rows = op.Concat(
        graph.reshape(value, num_rows, head_dim), graph.floats([[0.0] * head_dim]), axis=0
    )
    first_row = _make_first_rows(call, positions)
    total = None
    for corner in _make_corners(call):
        row = op.Add(op.Mul(corner.index, graph.ints(value_heads)), first_row)
        row = op.Where(corner.inside, row, graph.vector([num_rows]))
        weight = call.weights if corner.weight is None else op.Mul(corner.weight, call.weights)
        # [B, Q, M, 1, P] times [B, Q, M, P, D]
        sampled = op.MatMul(op.Unsqueeze(weight, graph.ints([3])), op.Gather(rows, row, axis=0))
        total = sampled if total is None else op.Add(total, sampled)
    total = graph.reshape(total, call.batch, call.queries, call.heads * head_dim)
    return call.to_value_dtype(total)


class _Corner(NamedTuple):
    """One of the cells that points read, along one axis or on the whole level."""

    index: Value  # [B, Q, M, P] int64, of a position along the axis, on the level or in the map
    inside: Value  # [B, Q, M, P] bool
    weight: Value | None  # [B, Q, M, P]; None where the interpolation has one corner, of weight 1


def _make_corners(call: CallInGraph) -> list[_Corner]:
    """The corners of the points; their indices count the positions of all levels."""
    graph, op = call.graph, call.graph.op
    positions = make_positions(call.levels, call.arguments, call.locations)
    sizes = call.levels.integer_sizes()
    one, zero = graph.ints(1), graph.ints(0)
    axes = []
    stride: Value = None
    # From x on: the last axis of a map is the fastest.
    for axis in range(call.levels.spatial_dims):
        position = op.Gather(positions, graph.ints(axis), axis=4)
        size = op.Gather(sizes, graph.ints(axis), axis=1)
        lower_cell = op.Floor(position)
        index = op.Cast(lower_cell, to=graph.ir.DataType.INT64)
        cells: list[tuple[Value, Value | None]] = [(index, None)]
        if call.arguments.interpolation == "linear":
            fraction = op.Sub(position, lower_cell)
            cells = [
                (index, op.Sub(graph.floats(1.0), fraction)),
                (op.Add(index, one), fraction),
            ]
        axes.append(
            [
                _Corner(
                    cell if stride is None else op.Mul(cell, stride),
                    op.And(op.GreaterOrEqual(cell, zero), op.Less(cell, size)),
                    weight,
                )
                for cell, weight in cells
            ]
        )
        stride = size if stride is None else op.Mul(stride, size)
    starts = _make_level_starts(call)
    corners = []
    for (index, inside, weight), *others in itertools.product(*axes):
        for other in others:
            index = op.Add(index, other.index)
            inside = op.And(inside, other.inside)
            weight = None if weight is None else op.Mul(weight, other.weight)
        corners.append(_Corner(op.Add(index, starts), inside, weight))
    return corners


def _make_level_starts(call: CallInGraph) -> Value:
    """For each point the index of the first position of its level, [P]."""
    graph, levels = call.graph, call.levels
    starts = levels.offsets()[:-1]
    return graph.op.Gather(graph.vector(starts), graph.ints(levels.level_per_point), axis=0)


def _make_first_rows(call: CallInGraph, positions: Value) -> Value:
    """The row of a map's first position for each head.

    The shape is [B, 1, M, 1], or [1, T, M, 1] with `queries_per_map`; M is 1 for a shared value head.
    """
    graph, op = call.graph, call.graph.op
    rows_per_map = graph.vector([graph.product(positions, call.value_heads)])
    queries_per_map = call.arguments.queries_per_map
    if queries_per_map is None:
        maps = graph.reshape(_make_range(call, 0), -1, 1, 1, 1)
    else:
        # The number of maps whose queries have all come before is the index of the query's map.
        ends = graph.vector(graph.cumulative_sums(queries_per_map)[1:])
        queries = graph.reshape(_make_range(call, 1), -1, 1)
        ended = op.GreaterOrEqual(queries, ends)
        ended = op.Cast(ended, to=graph.ir.DataType.INT64)
        maps = graph.reshape(op.ReduceSum(ended, graph.ints([1]), keepdims=0), 1, -1, 1, 1)
    first = op.Mul(maps, rows_per_map)
    if call.value_heads == 1:
        return first
    heads = graph.ints(list(range(call.heads)))
    return op.Add(first, graph.reshape(heads, 1, 1, call.heads, 1))


def _make_range(call: CallInGraph, axis: int) -> Value:
    """0, 1, 2, … below the size of an axis of the points."""
    graph = call.graph
    size = graph.vector([graph.size(call.arguments.points, axis)])
    return graph.op.Range(graph.ints(0), graph.op.Squeeze(size, graph.ints([0])), graph.ints(1))
