"""One call of an operator in an ONNX graph under construction, and what the lowerings share of it."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from saccade.arguments import unflattened

# A value of the graph; nothing of onnxscript is imported before somebody exports.
Value: TypeAlias = Any
# A size is a number, or a value of the graph where it is dynamic.
Size: TypeAlias = Any

LARGEST_FLOAT = 3.4028234663852886e38  # of float32
PACKAGES = ("onnx", "onnxscript")


def need_packages(*packages: str) -> None:
    """Raises where a package is missing, and says how to get it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        raise ModuleNotFoundError(
            f"saccade.integrations.onnx needs {', '.join(missing)}, not installed here: "
            f"pip install {names}"
        )


class RefusedError(ValueError):
    """An option that a lowering cannot express; the message says why, and which lowering can."""

    def __init__(self, lowering: str, option: str, reason: str, others: str) -> None:
        super().__init__(
            f"{option}: the lowering {lowering!r} cannot express it, because {reason}; "
            f"the lowering {others} can"
        )


class Graph:
    """What a lowering writes with: the operators of ONNX, and constants of the right type."""

    def __init__(self, double: bool = False) -> None:
        # Found at the moment of the export: it has the opset that the caller asked for.
        self.op: Any = importlib.import_module("onnxscript.evaluator").default().opset
        self.ir: Any = importlib.import_module("onnxscript").ir
        self.dtype = self.ir.DataType.DOUBLE if double else self.ir.DataType.FLOAT

    @property
    def double(self) -> bool:
        """Whether positions and sums are float64."""
        return bool(self.dtype == self.ir.DataType.DOUBLE)

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""
        return int(self.op.version)

    def number(self, numbers: float | Sequence[Any]) -> Value:
        """A constant in the dtype of positions."""
        return self.op.Constant(value=self.ir.tensor(numbers, dtype=self.dtype))

    def whole(self, numbers: int | Sequence[Any]) -> Value:
        """A constant of 64-bit whole numbers."""
        return self.op.Constant(value=self.ir.tensor(numbers, dtype=self.ir.DataType.INT64))

    def compute(self, value: Value) -> Value:
        """The value in the dtype of positions, weights and sums."""
        return value if value.dtype == self.dtype else self.op.Cast(value, to=self.dtype)

    def result(self, output: Value, value: Value) -> Value:
        """The output in the value's dtype."""
        return output if value.dtype == self.dtype else self.op.Cast(output, to=value.dtype)

    def node(
        self, domain: str, name: str, inputs: Sequence[Value], attributes: dict[str, str]
    ) -> Value:
        """A node of an operator that is none of ONNX's, with one output."""
        defs: Any = importlib.import_module("onnx").defs
        values: Any = importlib.import_module("onnxscript.values")
        schema = defs.OpSchema(
            name,
            domain,
            1,
            inputs=[
                defs.OpSchema.FormalParameter(f"input_{number}", f"T{number}")
                for number in range(len(inputs))
            ],
            outputs=[defs.OpSchema.FormalParameter("output", "T0")],
            type_constraints=[
                (f"T{number}", ["tensor(float)", "tensor(int32)", "tensor(int64)"], "")
                for number in range(len(inputs))
            ],
            attributes=[
                defs.OpSchema.Attribute(key, defs.OpSchema.AttrType.STRING, "")
                for key in attributes
            ],
        )
        return values.Op(values.Opset(domain, 1), name, schema)(*inputs, **attributes)

    def size(self, value: Value, axis: int) -> Size:
        """The size of an axis: a number where it is known, else a value of the graph [1]."""
        size = value.shape[axis]
        if isinstance(size, int):
            return size
        return self.op.Shape(value, start=axis, end=axis + 1)

    def vector(self, sizes: Sequence[Size]) -> Value:
        """Sizes, each a number or a value of the graph, as one vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.whole(list(sizes))
        one = self.whole([-1])
        parts = [
            self.whole([size]) if isinstance(size, int) else self.op.Reshape(size, one)
            for size in sizes
        ]
        return self.op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]

    def product(self, *sizes: Size) -> Size:
        """The product of sizes, a number where all are."""
        known = math.prod(size for size in sizes if isinstance(size, int))
        unknown = [size for size in sizes if not isinstance(size, int)]
        if not unknown:
            return known
        total = self.vector([unknown[0]])
        for size in unknown[1:]:
            total = self.op.Mul(total, self.vector([size]))
        return total if known == 1 else self.op.Mul(total, self.whole([known]))

    def sums(self, sizes: Sequence[Size]) -> list[Size]:
        """Where parts of these sizes begin, and where the last ends."""
        found: list[Size] = [0]
        for size in sizes:
            before = found[-1]
            if isinstance(size, int) and isinstance(before, int):
                found.append(before + size)
            else:
                found.append(self.op.Add(self.vector([before]), self.vector([size])))
        return found

    def parts(self, value: Value, sizes: Sequence[Size], axis: int) -> list[Value]:
        """Parts of these sizes along an axis."""
        # Not Split: the exporter wants its number of outputs, which ONNX forbids beside sizes.
        if len(sizes) == 1:
            return [value]
        ends = self.sums(sizes)
        return [
            self.op.Slice(value, self.vector([begin]), self.vector([end]), self.whole([axis]))
            for begin, end in itertools.pairwise(ends)
        ]

    def reshape(self, value: Value, *sizes: Size) -> Value:
        """The value in another shape."""
        return self.op.Reshape(value, self.vector(sizes))


class Problem(NamedTuple):
    """A call with its tensors in the graph; positions and weights in the dtype of the sums."""

    graph: Graph
    value: Value
    """[B, S, M or 1, D], as it was given."""
    shapes: list[tuple[Size, ...]]
    locations: Value
    """[B, Q, M, P, N]"""
    weights: Value
    """[B, Q, M, P]"""
    like: Value
    """The locations or offsets as they were given: their sizes are known, those of results are not."""
    num_points: list[int]
    interpolation: str
    padding: str
    coordinates: str
    queries_per_map: list[Size] | None

    @property
    def spatial_dims(self) -> int:
        """Dimensions of a map."""
        return len(self.shapes[0])

    @property
    def batch(self) -> Size:
        """Maps."""
        return self.graph.size(self.like, 0)

    @property
    def queries(self) -> Size:
        """Queries of a map."""
        return self.graph.size(self.like, 1)

    @property
    def heads(self) -> int:
        """Heads of a query."""
        return cast(int, self.like.shape[2])

    @property
    def value_heads(self) -> int:
        """Heads of the value: as many, or one that all of them read."""
        return cast(int, self.value.shape[2])

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return cast(int, self.value.shape[3])

    @property
    def level_of_point(self) -> list[int]:
        """For each point the number of its level."""
        return [level for level, count in enumerate(self.num_points) for _ in range(count)]

    def sizes(self) -> Value:
        """Of each point's level the sizes along the axes of a location, [P, N], whole numbers."""
        return _sizes_of_points(self.graph, self.shapes, self.level_of_point)

    def result(self, output: Value) -> Value:
        """The output in the value's dtype."""
        return self.graph.result(output, self.value)


def plain(arguments: Sequence[Any]) -> Problem:
    """A call of `saccade::deformable_attention`, from the arguments of its schema."""
    value, sizes, locations, weights, *options = arguments
    graph = graph_of(value)
    shapes = unflattened(sizes, known_size("sampling_locations", locations, 4))
    return _problem(graph, value, shapes, graph.compute(locations), weights, locations, options)


def fused(arguments: Sequence[Any]) -> Problem:
    """A call of `saccade::fused_deformable_attention`: its locations and weights are made first."""
    value, sizes, references, offsets, logits, index, *options = arguments
    graph = graph_of(value)
    op = graph.op
    spatial_dims = known_size("sampling_offsets", offsets, 4)
    shapes = unflattened(sizes, spatial_dims)
    # References of the points, or one for all, with an axis for the heads: [B, Q, 1, P or 1, N or 2 N].
    of_points = graph.compute(references)
    if references.shape[2] != 1:
        # Not a Gather of the only one: OpenVINO 2026.4 takes that together with Unsqueeze, wrongly.
        of_points = op.Gather(of_points, graph.whole(index if any(index) else [0]), axis=2)
    of_points = op.Unsqueeze(of_points, graph.whole([2]))
    boxes = known_size("reference_points", references, 3) > spatial_dims
    moved = op.Mul(graph.compute(offsets), _offset_step(graph, shapes, options, boxes))
    if boxes:
        of_points, size = graph.parts(of_points, [spatial_dims, spatial_dims], 4)
        moved = op.Mul(moved, size)
    locations = op.Add(of_points, moved)
    weights = op.Softmax(graph.compute(logits), axis=-1)
    return _problem(graph, value, shapes, locations, weights, offsets, options)


def graph_of(value: Value) -> Graph:
    """The graph under construction, with the dtype that positions have beside this value."""
    for axis, name in ((2, "heads"), (3, "head_dim")):
        known_size(f"value ({name})", value, axis)
    return Graph(double=value.dtype.name == "DOUBLE")


def known_size(name: str, value: Value, axis: int) -> int:
    """The size of an axis that has to be the same in every call."""
    size = value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(
            f"{name}: expected a fixed size of axis {axis}, got the dynamic size {size}; batch, "
            "queries and the sizes of the maps may be dynamic"
        )
    return size


def _problem(
    graph: Graph,
    value: Value,
    shapes: list[tuple[Size, ...]],
    locations: Value,
    weights: Value,
    like: Value,
    options: Sequence[Any],
) -> Problem:
    known_size("heads", like, 2)
    return Problem(graph, value, shapes, locations, graph.compute(weights), like, *options)


def _sizes_of_points(
    graph: Graph, shapes: Sequence[Sequence[Size]], level_of_point: list[int]
) -> Value:
    # A location is (x, y), a shape is (H, W).
    sizes = [size for shape in shapes for size in reversed(shape)]
    table = graph.reshape(graph.vector(sizes), len(shapes), len(shapes[0]))
    return graph.op.Gather(table, graph.whole(level_of_point), axis=0)


def _offset_step(
    graph: Graph, shapes: Sequence[Sequence[Size]], options: Sequence[Any], boxes: bool
) -> Value:
    """What an offset is multiplied by, [P, N] or [P, 1]; as `saccade.sampling.offset_step`."""
    num_points, coordinates, op = options[0], options[3], graph.op
    if boxes:
        return graph.number([[0.5 / count] for count in num_points for _ in range(count)])
    if coordinates == "pixel":
        return graph.number(1.0)
    level_of_point = [level for level, count in enumerate(num_points) for _ in range(count)]
    sizes = op.Cast(_sizes_of_points(graph, shapes, level_of_point), to=graph.dtype)
    if coordinates == "normalized":
        return op.Div(graph.number(1.0), sizes)
    # Between the corners of a single pixel there is no way to go.
    one = graph.number(1.0)
    gaps = op.Sub(sizes, one)
    single = op.Less(gaps, one)
    return op.Where(single, graph.number(0.0), op.Div(one, op.Where(single, one, gaps)))


def positions(problem: Problem) -> Value:
    """Where each point reads, in pixels of its level, [B, Q, M, P, N].

    A clamp of the padding is done; without interpolation the position is the number of a cell.
    Whatever reads nothing (a coordinate that is not finite, one far out) is at least one cell outside.
    """
    graph, op = problem.graph, problem.graph.op
    sizes = op.Cast(problem.sizes(), to=graph.dtype)
    pixel = problem.locations
    if problem.coordinates == "normalized":
        pixel = op.Mul(pixel, sizes)
    elif problem.coordinates == "normalized_corners":
        pixel = op.Mul(pixel, op.Sub(sizes, graph.number(1.0)))
    shift = -0.5 if problem.coordinates == "normalized" else 0.0
    shift += 1.0 if problem.interpolation == "discrete" else 0.0
    if shift:
        pixel = op.Add(pixel, graph.number(shift))
    if problem.padding != "zeros":
        pixel = op.Max(op.Min(pixel, _last(problem, sizes)), graph.number(0.0))
    # Further out is as good as two cells out, and a whole number can hold it.
    outside = graph.number(-2.0)
    pixel = op.Max(op.Min(pixel, op.Add(sizes, graph.number(1.0))), outside)
    if problem.interpolation == "nearest":
        pixel = op.Round(pixel)  # half to even
    elif problem.interpolation == "discrete":
        pixel = op.Floor(pixel)
    return op.Where(is_finite(problem), pixel, outside)


def is_finite(problem: Problem) -> Value:
    """Of each coordinate of a location whether it is finite."""
    # Not IsInf and IsNaN, which fewer runtimes have: a comparison with NaN is false.
    op, graph = problem.graph.op, problem.graph
    largest = LARGEST_FLOAT if graph.dtype == graph.ir.DataType.FLOAT else math.ldexp(1, 1023)
    return op.LessOrEqual(op.Abs(problem.locations), graph.number(largest))


def _last(problem: Problem, sizes: Value) -> Value:
    """The pixel that positions are clamped to, [P, N]."""
    op, graph = problem.graph.op, problem.graph
    last = op.Sub(sizes, graph.number(1.0))
    if problem.padding == "border_height":
        # The authors' code clamps both coordinates to the height, the last of a location (x, y).
        last = op.Min(last, op.Gather(last, graph.whole([1]), axis=1))
    return last
