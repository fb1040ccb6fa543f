"""The sampling rule of `saccade.sampling` in ONNX's operators, which all lowerings share."""

from __future__ import annotations

import math
from typing import NamedTuple

from saccade.integrations.onnx.graph import Graph, Size, Value, get_fixed_size
from saccade.ops.schema import Arguments

LARGEST_FLOAT = 3.4028234663852886e38  # of float32


class Levels(NamedTuple):
    """The levels of a map and the points on each, in a graph."""

    graph: Graph
    shapes: list[tuple[Size, ...]]
    num_points: list[int]

    @property
    def spatial_dims(self) -> int:
        """Number of dimensions N of a map."""
        return len(self.shapes[0])

    @property
    def level_per_point(self) -> list[int]:
        """For each point the index of its level."""
        return [level for level, count in enumerate(self.num_points) for _ in range(count)]

    def integer_sizes(self) -> Value:
        """For each point the sizes of its level along the axes of a location, [P, N] int64."""
        graph = self.graph
        sizes = [size for shape in self.shapes for size in reversed(shape)]  # (x, y) of (H, W)
        table = graph.reshape(graph.vector(sizes), len(self.shapes), self.spatial_dims)
        return graph.op.Gather(table, graph.ints(self.level_per_point), axis=0)

    def sizes(self) -> Value:
        """`integer_sizes` in the dtype of positions, [P, N]."""
        return self.graph.op.Cast(self.integer_sizes(), to=self.graph.dtype)

    def offsets(self) -> list[Size]:
        """The offset of each level's first position among those of all levels, and the total."""
        return self.graph.cumulative_sums([self.graph.product(*shape) for shape in self.shapes])


def make_locations(levels: Levels, arguments: Arguments) -> Value:
    """The sampling locations, [B, Q, M, P, N]; as `saccade.sampling.sampling_locations`."""
    graph, op = levels.graph, levels.graph.op
    points = graph.to_compute_dtype(arguments.points)
    if arguments.reference_points is None:
        return points
    references = graph.to_compute_dtype(arguments.reference_points)  # [B, Q, R, N or 2 N]
    reference_points: Value = arguments.reference_points
    if reference_points.shape[2] != 1:
        # A Gather of the only reference point is avoided: OpenVINO 2026.4 fuses it with Unsqueeze, wrongly.
        index = list(arguments.reference_index or [])
        references = op.Gather(references, graph.ints(index if any(index) else [0]), axis=2)
    references = op.Unsqueeze(references, graph.ints([2]))  # [B, Q, 1, P or 1, N or 2 N]
    spatial_dims = levels.spatial_dims
    boxes = get_fixed_size("reference_points", reference_points, 3) > spatial_dims
    moved = op.Mul(points, _offset_step(levels, arguments.coordinates, boxes))  # [B, Q, M, P, N]
    if boxes:
        references, box_sizes = graph.split(references, [spatial_dims, spatial_dims], 4)
        moved = op.Mul(moved, box_sizes)
    return op.Add(references, moved)


def _offset_step(levels: Levels, coordinates: str, boxes: bool) -> Value:
    """The factor of an offset, [P, N] or [P, 1]; as `saccade.sampling.offset_step`."""
    graph, op = levels.graph, levels.graph.op
    if boxes:
        return graph.floats([[0.5 / count] for count in levels.num_points for _ in range(count)])
    one = graph.floats(1.0)
    if coordinates == "pixel":
        return one
    scale = _scale(graph, levels.sizes(), coordinates)
    if coordinates == "normalized":
        return op.Div(one, scale)
    # With one pixel all locations coincide in this unit: the step is 0.
    single = op.Less(scale, one)
    return op.Where(single, graph.floats(0.0), op.Div(one, op.Where(single, one, scale)))


def _scale(graph: Graph, sizes: Value, coordinates: str) -> Value:
    """The pixels per unit of normalized coordinates, [P, N]; as in `saccade.sampling`."""
    return sizes if coordinates == "normalized" else graph.op.Sub(sizes, graph.floats(1.0))


def make_positions(levels: Levels, arguments: Arguments, locations: Value) -> Value:
    """The positions of points in pixels of their level, [B, Q, M, P, N].

    Positions are clamped as the padding says; without interpolation they are whole numbers. A point that
    reads nothing (because a coordinate is not finite, or far away) is at least one pixel outside.
    """
    graph, op = levels.graph, levels.graph.op
    sizes = levels.sizes()
    positions = locations
    if arguments.coordinates != "pixel":
        positions = op.Mul(positions, _scale(graph, sizes, arguments.coordinates))
    shift = -0.5 if arguments.coordinates == "normalized" else 0.0
    shift += 1.0 if arguments.interpolation == "discrete" else 0.0
    if shift:
        positions = op.Add(positions, graph.floats(shift))
    if arguments.padding != "zeros":
        last = op.Sub(sizes, graph.floats(1.0))
        if arguments.padding == "border_height":
            # Both coordinates are clamped to the height, the last of a location (x, y).
            last = op.Min(last, op.Gather(last, graph.ints([1]), axis=1))
        positions = op.Max(op.Min(positions, last), graph.floats(0.0))
    # Two pixels outside stands for any distance, and fits into an integer.
    outside = graph.floats(-2.0)
    positions = op.Max(op.Min(positions, op.Add(sizes, graph.floats(1.0))), outside)
    if arguments.interpolation == "nearest":
        positions = op.Round(positions)  # half to even
    elif arguments.interpolation == "discrete":
        positions = op.Floor(positions)
    return op.Where(_is_finite(graph, locations), positions, outside)


def _is_finite(graph: Graph, locations: Value) -> Value:
    """For each coordinate of a location whether it is finite."""
    # Fewer runtimes have IsInf and IsNaN than comparisons; a comparison with NaN is false.
    largest = math.ldexp(1, 1023) if graph.double else LARGEST_FLOAT
    return graph.op.LessOrEqual(graph.op.Abs(locations), graph.floats(largest))
