"""An ONNX graph under construction: what every lowering writes with."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

# A value of the graph. Its class is onnxscript's, which is imported during an export only.
Value: TypeAlias = Any
# A size is an int, or a value of the graph where it is dynamic.
Size: TypeAlias = Any

PACKAGES = ("onnx", "onnxscript")


def need_packages(*packages: str) -> None:
    """Raises a ModuleNotFoundError where a package is missing; the message says how to install it."""
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
    """The operators of ONNX in the opset of the export, and constants of the right type.

    Positions, weights and sums are float64 where the value is, and float32 otherwise.
    """

    def __init__(self, double: bool = False) -> None:
        # The evaluator in force during the export has the opset that the caller asked for.
        self.op: Any = importlib.import_module("onnxscript.evaluator").default().opset
        self.ir: Any = importlib.import_module("onnxscript").ir
        self.dtype = self.ir.DataType.DOUBLE if double else self.ir.DataType.FLOAT

    @property
    def double(self) -> bool:
        """Whether positions, weights and sums are float64."""
        return bool(self.dtype == self.ir.DataType.DOUBLE)

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""
        return int(self.op.version)

    def floats(self, constant: float | Sequence[Any]) -> Value:
        """A constant in the dtype of positions."""
        return self.op.Constant(value=self.ir.tensor(constant, dtype=self.dtype))

    def ints(self, constant: int | Sequence[Any]) -> Value:
        """A constant of 64-bit integers."""
        return self.op.Constant(value=self.ir.tensor(constant, dtype=self.ir.DataType.INT64))

    def to_compute_dtype(self, value: Value) -> Value:
        """The value in the dtype of positions, weights and sums."""
        return value if value.dtype == self.dtype else self.op.Cast(value, to=self.dtype)

    def to_dtype_like(self, output: Value, value: Value) -> Value:
        """The output, which is in the dtype of sums, in the dtype of the value."""
        return output if value.dtype == self.dtype else self.op.Cast(output, to=value.dtype)

    def node(
        self, domain: str, name: str, inputs: Sequence[Value], attributes: dict[str, str]
    ) -> Value:
        """The output of a node whose operator is not one of ONNX's."""
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
        """The size of an axis: an int where it is known, else a value of the graph [1]."""
        size = value.shape[axis]
        if isinstance(size, int):
            return size
        return self.op.Shape(value, start=axis, end=axis + 1)

    def vector(self, sizes: Sequence[Size]) -> Value:
        """Sizes, each an int or a value of the graph, as one vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(list(sizes))
        one = self.ints([-1])
        parts = [
            self.ints([size]) if isinstance(size, int) else self.op.Reshape(size, one)
            for size in sizes
        ]
        return self.op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]

    def product(self, *sizes: Size) -> Size:
        """The product of sizes: an int where all of them are ints."""
        known = math.prod(size for size in sizes if isinstance(size, int))
        unknown = [size for size in sizes if not isinstance(size, int)]
        if not unknown:
            return known
        total = self.vector([unknown[0]])
        for size in unknown[1:]:
            total = self.op.Mul(total, self.vector([size]))
        return total if known == 1 else self.op.Mul(total, self.ints([known]))

    def cumulative_sums(self, sizes: Sequence[Size]) -> list[Size]:
        """The offsets at which parts of these sizes begin, and at last the end of the last part."""
        offsets: list[Size] = [0]
        for size in sizes:
            before = offsets[-1]
            if isinstance(size, int) and isinstance(before, int):
                offsets.append(before + size)
            else:
                offsets.append(self.op.Add(self.vector([before]), self.vector([size])))
        return offsets

    def split(self, value: Value, sizes: Sequence[Size], axis: int) -> list[Value]:
        """Parts of these sizes along an axis."""
        # The exporter wants Split's number of outputs, which ONNX forbids beside sizes: hence Slice.
        if len(sizes) == 1:
            return [value]
        offsets = self.cumulative_sums(sizes)
        return [
            self.op.Slice(value, self.vector([begin]), self.vector([end]), self.ints([axis]))
            for begin, end in itertools.pairwise(offsets)
        ]

    def reshape(self, value: Value, *sizes: Size) -> Value:
        """The value in another shape."""
        return self.op.Reshape(value, self.vector(sizes))


def make_graph(value: Value) -> Graph:
    """The graph under construction, for a call with this value tensor."""
    for axis, name in ((2, "heads"), (3, "head_dim")):
        get_fixed_size(f"value ({name})", value, axis)
    return Graph(double=value.dtype.name == "DOUBLE")


def get_fixed_size(name: str, value: Value, axis: int) -> int:
    """The size of an axis that has to be the same in every call."""
    size = value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(
            f"{name}: expected a fixed size of axis {axis}, got the dynamic size {size}; batch, "
            "queries and the sizes of the maps may be dynamic"
        )
    return size
