"""One call of the operator in an ONNX graph under construction."""

from __future__ import annotations

from typing import NamedTuple

from saccade.integrations.onnx.graph import Graph, Size, Value, get_fixed_size, make_graph
from saccade.integrations.onnx.sampling import Levels, make_locations
from saccade.ops.schema import Arguments


class CallInGraph(NamedTuple):
    """A call whose tensors are values of a graph, with its locations and weights computed there."""

    graph: Graph
    arguments: Arguments
    """The operator's arguments as the exporter has them; sizes are known of these tensors only."""
    levels: Levels
    locations: Value  # [B, Q, M, P, N], in the dtype of positions
    weights: Value  # [B, Q, M, P], in the dtype of positions

    @property
    def batch(self) -> Size:
        """Number of maps; 1 with `queries_per_map`."""
        return self.graph.size(self.arguments.points, 0)

    @property
    def queries(self) -> Size:
        """Number of queries per map; of all maps with `queries_per_map`."""
        return self.graph.size(self.arguments.points, 1)

    @property
    def heads(self) -> int:
        """Number of heads M."""
        return self.arguments.points.shape[2]

    @property
    def value_heads(self) -> int:
        """Number of heads of the value: M, or one that all heads read."""
        return self.arguments.value.shape[2]

    @property
    def head_dim(self) -> int:
        """Number of channels of a head."""
        return self.arguments.value.shape[3]

    def to_value_dtype(self, output: Value) -> Value:
        """The output in the value's dtype."""
        return self.graph.to_dtype_like(output, self.arguments.value)


def make_call(arguments: Arguments) -> CallInGraph:
    """Writes what comes before the reading of the value: locations, and the softmax of logits."""
    graph = make_graph(arguments.value)
    get_fixed_size("heads", arguments.points, 2)
    spatial_dims = get_fixed_size(arguments.points_name, arguments.points, 4)
    sizes = arguments.spatial_shapes
    shapes = [
        tuple(sizes[start : start + spatial_dims]) for start in range(0, len(sizes), spatial_dims)
    ]
    levels = Levels(graph, shapes, list(arguments.num_points))
    locations = make_locations(levels, arguments)
    weights = graph.to_compute_dtype(arguments.weights)
    if arguments.softmax:
        weights = graph.op.Softmax(weights, axis=-1)
    return CallInGraph(graph, arguments, levels, locations, weights)
