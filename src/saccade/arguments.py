"""What a call means: the arguments of the operator, checked and understood once.

`understand` turns everything a caller may write (sequences or a tensor of shapes, points per level
or flat points, one number or a list of points) into one plain `Call`, which the operator and the
reference both execute. Each error names the argument, what was expected and what came.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from saccade.argument_key import key_of

Interpolation: TypeAlias = Literal["linear", "nearest"]
Padding: TypeAlias = Literal["zeros", "border"]
Coordinates: TypeAlias = Literal["normalized", "normalized_corners", "pixel"]
SpatialShapes: TypeAlias = Sequence[Sequence[int]] | Tensor

VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# A map is a line, an image or a volume.
SPATIAL_DIMS = (1, 2, 3)

# Of one level: the kernels keep a position's number within its level in 32 bits.
MOST_POSITIONS = 2**31 - 1


class Call(NamedTuple):
    """One understood call: tensors in the operator's own layout, everything else in plain Python.

    Shapes: value [B, S, M or 1, D] · sampling_locations [B, Q, M, P, N] · attention_weights
    [B, Q, M, P], with the points of all levels flat, level after level (P = sum(num_points)).
    """

    value: Tensor
    spatial_shapes: list[tuple[int, ...]]
    sampling_locations: Tensor
    attention_weights: Tensor
    num_points: list[int]
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates

    @property
    def flat_spatial_shapes(self) -> list[int]:
        """The spatial shapes one after the other, as the registered operator takes them."""
        return list(itertools.chain.from_iterable(self.spatial_shapes))


class Sizes(NamedTuple):
    """What `understand` finds out from sizes and options alone, without looking into a tensor."""

    spatial_shapes: tuple[tuple[int, ...], ...]
    num_points: tuple[int, ...]


# The checks take longer than a small kernel, and a model calls with few different sizes: what was
# found good is remembered by everything that was looked at. Emptied when it holds this many.
MOST_REMEMBERED = 512
_remembered: dict[Hashable, Sizes] = {}


def understand(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: int | Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
    value_padding_mask: Tensor | None = None,
) -> Call:
    """Checks the arguments of `saccade.deformable_attention` and brings them into one form.

    Raises:
        TypeError: an argument is not of the kind the signature names.
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    tensors = (value, sampling_locations, attention_weights)
    options = (interpolation, padding, coordinates)
    key = key_of(tensors, spatial_shapes, num_points, options)
    sizes = _remembered.get(key) if key else None
    if sizes is None:
        sizes = _check(*tensors, spatial_shapes, num_points, *options)
        if key:
            if len(_remembered) >= MOST_REMEMBERED:
                _remembered.clear()
            _remembered[key] = sizes
    if value_padding_mask is not None:
        value = apply_value_padding_mask(value, value_padding_mask)
    if sampling_locations.dim() == 6:
        sampling_locations = sampling_locations.flatten(3, 4)
        attention_weights = attention_weights.flatten(3, 4)
    return Call(
        value,
        list(sizes.spatial_shapes),
        sampling_locations,
        attention_weights,
        list(sizes.num_points),
        interpolation,
        padding,
        coordinates,
    )


def _check(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    spatial_shapes: SpatialShapes,
    num_points: int | Sequence[int] | None,
    interpolation: Interpolation,
    padding: Padding,
    coordinates: Coordinates,
) -> Sizes:
    check_option("interpolation", interpolation, Interpolation)
    check_option("padding", padding, Padding)
    check_option("coordinates", coordinates, Coordinates)
    _check_floating("value", value, VALUE_DTYPES)
    _check_floating("sampling_locations", sampling_locations, VALUE_DTYPES)
    _check_floating("attention_weights", attention_weights, VALUE_DTYPES)
    for name, tensor in (
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if tensor.device != value.device:
            raise ValueError(
                f"{name}: expected a tensor on {value.device} like value, got {tensor.device}"
            )

    if value.dim() != 4:
        raise ValueError(
            "value: expected 4 axes [batch, positions, heads or 1, head_dim], "
            f"got {value.dim()} axes {_shape(value)}"
        )
    shapes = understand_spatial_shapes(spatial_shapes)
    num_levels = len(shapes)
    spatial_dims = len(shapes[0])
    batch_size, num_positions, value_heads, head_dim = value.shape
    expected_positions = sum(math.prod(shape) for shape in shapes)
    if num_positions != expected_positions:
        raise ValueError(
            f"spatial_shapes: expected shapes whose products sum to {num_positions}, the number of "
            f"positions of value {_shape(value)}, got {shapes} which sum to {expected_positions}"
        )
    if head_dim < 1:
        raise ValueError(f"value: expected a head_dim of at least 1, got {_shape(value)}")

    if sampling_locations.dim() == 6:
        points = sampling_locations.shape[4]
        levels = understand_num_points(num_points, num_levels, points)
        expected = [batch_size, None, None, num_levels, points, spatial_dims]
        if levels != [points] * num_levels:
            raise ValueError(
                f"num_points: expected {points} for each level, the fifth axis of sampling_locations "
                f"{_shape(sampling_locations)}, got {levels}; different numbers of points need flat "
                "sampling_locations [batch, queries, heads, sum(num_points), spatial_dims]"
            )
    elif sampling_locations.dim() == 5:
        levels = understand_num_points(num_points, num_levels)
        expected = [batch_size, None, None, sum(levels), spatial_dims]
    else:
        raise ValueError(
            "sampling_locations: expected 6 axes [batch, queries, heads, levels, points, "
            f"{spatial_dims}] or 5 axes with the points flat, got {_shape(sampling_locations)}"
        )
    _check_shape("sampling_locations", sampling_locations, expected, shapes)
    num_heads = sampling_locations.shape[2]
    if num_heads < 1:
        raise ValueError(
            f"sampling_locations: expected at least 1 head, got {_shape(sampling_locations)}"
        )
    if value_heads != num_heads and value_heads != 1:
        raise ValueError(
            f"value: expected {num_heads} heads as in sampling_locations {_shape(sampling_locations)} "
            f"or 1 head that all of them share, got {value_heads} in {_shape(value)}"
        )
    _check_shape(
        "attention_weights", attention_weights, list(sampling_locations.shape[:-1]), shapes
    )
    return Sizes(tuple(shapes), tuple(levels))


def understand_spatial_shapes(spatial_shapes: SpatialShapes) -> list[tuple[int, ...]]:
    """One tuple of positive ints a level, from a sequence of them or an integer tensor [L, N].

    All have the same length, the number of dimensions N: `(width,)`, `(height, width)` or
    `(depth, height, width)`.
    """
    if isinstance(spatial_shapes, Tensor) and spatial_shapes.is_meta:
        raise ValueError("spatial_shapes: expected numbers, got a meta tensor, which has none")
    # A tensor is read back to the host here: on a GPU that is a synchronisation, a sequence is not.
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    try:
        shapes = [tuple(_as_int(size) for size in row) for row in rows]
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
        if any(size < 1 for size in shape):
            raise ValueError(f"spatial_shapes: expected positive sizes, got {shape} in {shapes}")
        if math.prod(shape) > MOST_POSITIONS:
            raise ValueError(
                f"spatial_shapes: expected at most {MOST_POSITIONS} positions a level, got {shape}"
            )
    return shapes


def apply_value_padding_mask(value: Tensor, value_padding_mask: Tensor) -> Tensor:
    """`value` [B, S, ...] with the positions where the mask [B, S] is True (padding) set to 0."""
    if not isinstance(value_padding_mask, Tensor):
        raise TypeError(
            f"value_padding_mask: expected a Tensor, got {type(value_padding_mask).__name__}"
        )
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
            f"got {_shape(value_padding_mask)}"
        )
    return value.masked_fill(
        value_padding_mask.reshape(value_padding_mask.shape + (1,) * (value.dim() - 2)), 0
    )


def check_option(name: str, given: object, kind: object) -> None:
    """Raises a ValueError unless `given` is one of the strings of the Literal `kind`."""
    choices = get_args(kind)
    if not isinstance(given, str) or given not in choices:
        got = repr(given) if isinstance(given, str | int | None) else type(given).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {got}")


def understand_num_points(
    num_points: int | Sequence[int] | None, num_levels: int, per_level: int | None = None
) -> list[int]:
    """One positive number of points a level; `per_level` is what None stands for."""
    if num_points is None:
        if per_level is None:
            raise ValueError(
                "num_points: expected a number of points per level, because sampling_locations has "
                "its points flat, got None"
            )
        num_points = per_level
    try:
        levels = (
            [_as_int(points) for points in num_points]
            if isinstance(num_points, Sequence)
            else [_as_int(num_points)] * num_levels
        )
    except TypeError as error:
        raise TypeError(
            f"num_points: expected an int or a sequence of int, got {num_points!r}"
        ) from error
    if len(levels) != num_levels:
        raise ValueError(
            f"num_points: expected {num_levels} numbers, one for each level, got {levels}"
        )
    if any(points < 1 for points in levels):
        raise ValueError(f"num_points: expected at least 1 point for each level, got {levels}")
    return levels


def positive_int(name: str, number: object) -> int:
    """The number as an int; a TypeError or ValueError that names it unless it is at least 1."""
    try:
        found = _as_int(number)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name}: expected an int, got {number!r}") from error
    if found < 1:
        raise ValueError(f"{name}: expected at least 1, got {found}")
    return found


def _as_int(number: int) -> int:
    if isinstance(number, bool):
        raise TypeError("a bool is not a size")
    # A torch.SymInt stays symbolic: operator.index would fix it to the value of this trace.
    return number if isinstance(number, int | torch.SymInt) else operator.index(number)


def _check_floating(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, dtypes))}, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name}: expected a dense (strided) tensor, got {kind}")


def _check_shape(
    name: str, tensor: Tensor, expected: Sequence[int | None], shapes: list[tuple[int, ...]]
) -> None:
    matches = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if matches:
        return
    wanted = ", ".join("any" if want is None else str(want) for want in expected)
    hint = ""
    if tensor.dim() == len(expected) and name == "sampling_locations":
        if tensor.shape[-1] != expected[-1]:
            hint = f" (last axis must be {expected[-1]} for {expected[-1]}-D spatial_shapes)"
        elif len(expected) == 6 and tensor.shape[3] != expected[3]:
            hint = f" (spatial_shapes has {len(shapes)} levels)"
    raise ValueError(f"{name}: expected [{wanted}], got {_shape(tensor)}{hint}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
