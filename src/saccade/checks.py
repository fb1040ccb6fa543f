"""Checks of single arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

SpatialShapes: TypeAlias = Sequence[Sequence[int]] | Tensor

VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# A map is a signal, an image or a volume.
SPATIAL_DIMS = (1, 2, 3)

# Positions of one level: the kernels keep the index of a position within its level in 32 bits.
MAX_POSITIONS = 2**31 - 1

# Points of a query and head: the kernels keep the index of a point in 32 bits.
MAX_POINTS = 2**31 - 1

# Elements of a tensor: the kernels count its bytes, and small multiples of its elements, in 64 bits.
MAX_ELEMENTS = 2**60 - 1

# Reference points of a query: the kernels keep the index of a coordinate among all of them in 32 bits.
MAX_REFERENCES = (2**31 - 1) // 6


def holds(*conditions: bool | torch.SymBool) -> bool:
    """Whether conditions on sizes or numbers hold; where they do not, the caller raises its error.

    Numbers that are read from a tensor while a compiler traces are unknown. Conditions on those count as
    true, and the compiled program raises a RuntimeError where they do not hold.
    """
    if torch.SymBool not in {*map(type, conditions)} and not torch.compiler.is_dynamo_compiling():
        return all(conditions)
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # it imports sympy

    for condition in conditions:
        if not guard_or_true(condition):
            return False
        # Without a message, which strict export cannot hold, and which torch replaces by the condition.
        torch._check(condition)
    return True


def parse_spatial_shapes(spatial_shapes: SpatialShapes) -> list[tuple[int, ...]]:
    """One tuple of positive ints per level, from a sequence of them or an integer tensor [L, N].

    All tuples have the same length, the number of dimensions N: `(width,)`, `(height, width)` or
    `(depth, height, width)`.
    """
    if isinstance(spatial_shapes, Tensor) and spatial_shapes.is_meta:
        raise ValueError("spatial_shapes: expected numbers, got a meta tensor, which has none")
    # A tensor is read back to the host here: on a GPU that is a synchronisation, a sequence is not.
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    try:
        shapes = [*map(_to_shape, rows)]
    except TypeError as error:
        raise TypeError(
            "spatial_shapes: expected a sequence of tuples of int, (width,), (height, width) or "
            "(depth, height, width), or an integer tensor [levels, 1, 2 or 3], "
            f"got {spatial_shapes!r}"
        ) from error
    if not shapes:
        raise ValueError("spatial_shapes: expected at least one level, got none")
    for shape in shapes:
        if len(shape) not in SPATIAL_DIMS or len(shape) != len(shapes[0]):
            raise ValueError(
                "spatial_shapes: expected (width,), (height, width) or (depth, height, width), the "
                f"same for each level, got {shape} in {shapes}"
            )
        if not holds(*[size >= 1 for size in shape]):
            raise ValueError(f"spatial_shapes: expected positive sizes, got {shape} in {shapes}")
        if not holds(math.prod(shape) <= MAX_POSITIONS):
            raise ValueError(
                f"spatial_shapes: expected at most {MAX_POSITIONS} positions per level, got {shape}"
            )
    return shapes


def check_positions(value: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises a ValueError unless these levels have as many positions as `value` [B, S, ...]."""
    expected = sum(map(math.prod, shapes))
    if not holds(value.shape[1] == expected):
        raise ValueError(
            f"spatial_shapes: expected shapes whose products sum to {value.shape[1]}, the number of "
            f"positions of value {format_shape(value)}, got {shapes} which sum to {expected}"
        )


def _to_shape(row: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(row)
    return shape if {*map(type, shape)} <= {int} else tuple(map(to_int, shape))


def apply_value_padding_mask(value: Tensor, value_padding_mask: Tensor) -> Tensor:
    """`value` [B, S, ...] with the positions where the mask [B, S] is True (padding) set to 0."""
    check_tensor("value_padding_mask", value_padding_mask)
    if value_padding_mask.dtype != torch.bool:
        raise ValueError(
            f"value_padding_mask: expected torch.bool (True = padding), got {value_padding_mask.dtype}"
        )
    if value_padding_mask.device != value.device or value_padding_mask.layout != torch.strided:
        raise ValueError(
            f"value_padding_mask: expected a dense tensor on {value.device} like value, "
            f"got {value_padding_mask.layout} on {value_padding_mask.device}"
        )
    if value_padding_mask.shape != value.shape[:2]:
        raise ValueError(
            f"value_padding_mask: expected {list(value.shape[:2])} (batch, positions), "
            f"got {format_shape(value_padding_mask)}"
        )
    return value.masked_fill(
        value_padding_mask.reshape(value_padding_mask.shape + (1,) * (value.dim() - 2)), 0
    )


def check_option(name: str, option: object, literal: Any) -> None:
    """Raises a ValueError unless `option` is one of the strings of a Literal type."""
    # typing.get_args would take as long as all other checks of an option.
    choices = literal.__args__
    if not isinstance(option, str) or option not in choices:
        got = repr(option) if isinstance(option, str | int | None) else type(option).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {got}")


def check_border_height(padding: str, interpolation: str, spatial_dims: int) -> None:
    """Raises a ValueError for "border_height" with options for which it has no meaning."""
    if padding != "border_height":
        return
    if interpolation != "discrete":
        raise ValueError(
            "padding: expected 'zeros' or 'border' with interpolation "
            f"{interpolation!r}, got 'border_height', which goes with 'discrete'"
        )
    if spatial_dims != 2:
        raise ValueError(
            f"padding: expected 'zeros' or 'border' in {spatial_dims} dimensions, "
            "got 'border_height', which needs (height, width)"
        )


def parse_num_points(
    num_points: int | Sequence[int] | None,
    num_levels: int,
    per_level: int | None = None,
    *,
    flat_name: str = "sampling_locations",
) -> list[int]:
    """One positive number of points per level, from one number for all levels or one for each.

    None stands for `per_level`. Where that is None too, the tensor called `flat_name` has its points flat
    and the numbers are required.
    """
    if num_points is None:
        if per_level is None:
            raise ValueError(
                f"num_points: expected a number of points per level, because {flat_name} has "
                "its points flat, got None"
            )
        num_points = per_level
    expected = "an int or a sequence of int"
    if type(num_points) is int:
        counts = [num_points] * num_levels
    elif isinstance(num_points, Sequence):
        counts = to_ints("num_points", num_points, expected)
    else:
        counts = [_to_named_int("num_points", num_points, expected)] * num_levels
    if len(counts) != num_levels:
        raise ValueError(
            f"num_points: expected {num_levels} numbers, one for each level, got {counts}"
        )
    if min(counts) < 1:
        raise ValueError(f"num_points: expected at least 1 point for each level, got {counts}")
    if sum(counts) > MAX_POINTS:
        raise ValueError(f"num_points: expected at most {MAX_POINTS} points in all, got {counts}")
    return counts


def parse_reference_index(
    reference_points: Tensor,
    leading: Sequence[int],
    num_points: Sequence[int],
    reference_index: Sequence[int] | None,
    spatial_dims: int,
) -> list[int]:
    """For each point the number of the reference point that it starts from.

    Args:
        reference_points (Tensor[*leading, R, N or 2 N]): R is 1 or the number of levels, or any
            number with `reference_index`.
        leading: the sizes before its last two axes.
        num_points: points of each level.
        reference_index: for each point a number below R; None: the reference point of the point's
            level, or the only one.
        spatial_dims: N.
    """
    sizes = list(reference_points.shape)
    count = sizes[-2] if len(sizes) == len(leading) + 2 else 0
    counts_without_index = (1, len(num_points))
    if (
        count < 1
        or not holds(*[size == expected for size, expected in zip(sizes, leading, strict=False)])
        or sizes[-1] not in (spatial_dims, 2 * spatial_dims)
        or (reference_index is None and count not in counts_without_index)
    ):
        has_index = reference_index is not None
        counts = (
            "at least 1" if has_index else " or ".join(map(str, sorted({*counts_without_index})))
        )
        hint = "" if has_index else " (other numbers of them need reference_index)"
        raise ValueError(
            f"reference_points: expected [{''.join(f'{size}, ' for size in leading)}{counts}, "
            f"{spatial_dims} or {2 * spatial_dims}], got {sizes}{hint}"
        )
    if count > MAX_REFERENCES:
        raise ValueError(
            f"reference_points: expected at most {MAX_REFERENCES} for each query, got {sizes}"
        )
    if reference_index is None:
        levels = [level for level, points in enumerate(num_points) for _ in range(points)]
        return levels if count > 1 else [0] * len(levels)
    index = to_ints("reference_index", reference_index)
    if len(index) != sum(num_points) or not all(0 <= number < count for number in index):
        raise ValueError(
            f"reference_index: expected {sum(num_points)} numbers, one for each point, from 0 to "
            f"{count - 1} (reference_points is {sizes}), got {index}"
        )
    return index


def to_ints(
    name: str, numbers: Sequence[int] | Tensor, expected: str = "a sequence of int"
) -> list[int]:
    """The numbers as ints; a TypeError that names them unless all are whole. A tensor is read back."""
    if isinstance(numbers, Tensor):
        if numbers.is_meta or numbers.dim() != 1 or numbers.is_floating_point():
            raise TypeError(
                f"{name}: expected a sequence of int or an integer tensor with one axis, "
                f"got {numbers.dtype} {list(numbers.shape)} on {numbers.device}"
            )
        numbers = numbers.tolist()
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise TypeError(f"{name}: expected {expected}, got {numbers!r}")
    return [_to_named_int(name, number, expected, numbers) for number in numbers]


def _to_named_int(name: str, number: object, expected: str, argument: object = None) -> int:
    """The number as an int; the TypeError shows `argument`, or the number where that is None."""
    try:
        return to_int(number)  # type: ignore[arg-type]
    except TypeError as error:
        got = number if argument is None else argument
        raise TypeError(f"{name}: expected {expected}, got {got!r}") from error


def to_positive_int(name: str, number: object) -> int:
    """The number as an int; a TypeError or ValueError that names it unless it is at least 1."""
    result = _to_named_int(name, number, "an int")
    if result < 1:
        raise ValueError(f"{name}: expected at least 1, got {result}")
    return result


def to_int(number: int) -> int:
    """The number as an int; a TypeError unless it is whole, and for a bool."""
    if isinstance(number, bool):
        raise TypeError("a bool is not a size")
    # A torch.SymInt stays symbolic: operator.index would fix it to the value of this trace.
    return number if isinstance(number, int | torch.SymInt) else operator.index(number)


def check_tensor(name: str, tensor: object) -> Tensor:
    """Returns the argument; raises a TypeError unless it is a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    return tensor


def check_floating(
    name: str,
    tensor: object,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raises unless the argument is a dense tensor of one of these dtypes, on the device if one is given."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
        return
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, dtypes))}, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name}: expected a dense (strided) tensor, got {kind}")
    if device is not None and tensor.device != device:
        check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises a ValueError unless the tensor is on the device, which is that of `value`."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like value, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None], hint: str = "") -> None:
    """Raises a ValueError unless the tensor has these sizes; None stands for any size."""
    if tensor.dim() != len(expected) or not holds(
        *[
            size == expected_size
            for size, expected_size in zip(tensor.shape, expected, strict=True)
            if expected_size is not None
        ]
    ):
        sizes = ", ".join("any" if size is None else f"{size}" for size in expected)
        raise ValueError(f"{name}: expected [{sizes}], got {format_shape(tensor)}{hint}")


def check_elements(tensors: Mapping[str, Tensor], output_sizes: Sequence[int]) -> None:
    """Raises a ValueError if one of the tensors, or the output, has too many elements.

    A size of 0 counts as 1: the strides of a tensor without elements are products of its other sizes,
    which have to fit as well.
    """
    parts = [*zip(tensors, map(operator.attrgetter("shape"), tensors.values()), strict=True)]
    for name, sizes in (*parts, ("value", output_sizes)):
        # A symbolic size would be guarded by the comparison.
        if {*map(type, sizes)} <= {int} and math.prod(filter(None, sizes)) > MAX_ELEMENTS:
            output = "an output of " if sizes is output_sizes else ""
            raise ValueError(
                f"{name}: expected {output}at most {MAX_ELEMENTS} elements, a size of 0 counted as 1, "
                f"got {list(sizes)}"
            )


def check_axes(name: str, tensor: Tensor, value: Tensor | None, **axes: int | None) -> None:
    """Raises unless a floating tensor has these axes and is on the device of `value`.

    The size None stands for any size above 0, and for any at all of a batch, its queries or anchors.
    """
    check_floating(name, tensor, VALUE_DTYPES, None if value is None else value.device)
    may_be_empty = ("batch", "queries", "anchors")
    if tensor.dim() != len(axes) or not all(
        (size >= 1 or axis in may_be_empty) if expected is None else size == expected
        for size, (axis, expected) in zip(tensor.shape, axes.items(), strict=True)
    ):
        names = ", ".join(
            axis if expected is None else f"{axis} {expected}" for axis, expected in axes.items()
        )
        raise ValueError(f"{name}: expected [{names}], got {format_shape(tensor)}")


def has_queries(leading: Sequence[int]) -> bool:
    """Whether the axes of batch and queries have elements: without, there is nothing to compute.

    The result is True for symbolic sizes, because a comparison with 0 would fix them.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return 0 not in [size for size in leading if type(size) is int]


def compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype of positions, weights and sums; positions in 16 bits would be off by whole pixels."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def format_shape(tensor: Tensor) -> str:
    """The shape as error messages show it."""
    # torch.compile traces the formatting of a symbolic size, but not its str().
    return f"[{', '.join([f'{size}' for size in tensor.shape])}]"
