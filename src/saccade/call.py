"""What a call of the operator means: its arguments, checked and brought into one form.

`parse_call` turns everything that a caller may write (spatial shapes as a sequence or a tensor, points per
level or flat, one number of points or a list) into one `Call`, which every backend executes. Each error
names the argument, what was expected and what came. The checks take longer than a small kernel, and a
model calls with few different sizes, so their results are kept in one cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from saccade.checks import (
    VALUE_DTYPES,
    SpatialShapes,
    apply_value_padding_mask,
    check_border_height,
    check_elements,
    check_floating,
    check_option,
    check_positions,
    check_shape,
    format_shape,
    has_queries,
    holds,
    parse_num_points,
    parse_reference_index,
    parse_spatial_shapes,
    to_ints,
)

Interpolation: TypeAlias = Literal["linear", "nearest", "discrete"]
Padding: TypeAlias = Literal["zeros", "border", "border_height"]
Coordinates: TypeAlias = Literal["normalized", "normalized_corners", "pixel"]


class Options(NamedTuple):
    """Everything about a call that is not a tensor, in one form. Hashable."""

    spatial_shapes: tuple[tuple[int, ...], ...]
    """(W,), (H, W) or (D, H, W) of each level."""
    num_points: tuple[int, ...]
    """Number of points per level."""
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates
    softmax: bool
    """Whether the weights are logits, whose softmax over all points of a head is the weight."""
    reference_index: tuple[int, ...] | None
    """For each point the number of its reference point; None without reference points."""
    queries_per_map: tuple[int, ...] | None
    """Number of queries of each map, where maps have different numbers of them."""

    @property
    def spatial_dims(self) -> int:
        """Number of dimensions N of a map."""
        return len(self.spatial_shapes[0])


class Call(NamedTuple):
    """One checked call: tensors in the operator's layout, everything else in `options`.

    B maps, Q queries per map, M heads, P points per head (all levels one after the other), N spatial
    dimensions. With `options.queries_per_map` the leading axes [B, Q] of all tensors but the value are
    [1, T], the queries of all maps one after the other.
    """

    value: Tensor  # [B, S, M or 1, D]
    points: Tensor  # [B, Q, M, P, N] sampling locations, or offsets from the reference points
    weights: Tensor  # [B, Q, M, P] attention weights, or logits where `options.softmax`
    reference_points: Tensor | None  # [B, Q, R, N], boxes [B, Q, R, 2 N]
    options: Options
    plans: dict[Hashable, Any]
    """What backends derived from sizes, dtypes, device and options; it lives as long as the cache entry."""

    @property
    def has_queries(self) -> bool:
        """Whether there is anything to compute."""
        return self.options.queries_per_map != () and has_queries(self.points.shape[:2])


class _Recipe(NamedTuple):
    """The result of the checks of calls with certain sizes."""

    options: Options
    level_axis: int | None  # of points and weights, where levels and points have an axis each
    adds_batch_axis: bool
    has_queries: (
        bool  # without, the options have one point per level, however many the tensors have
    )
    plans: dict[Hashable, Any]


# A model has few different sizes; a fuzzer has many: the cache is emptied when it holds so many.
MAX_CACHED = 512
_cache: dict[Hashable, _Recipe] = {}


def parse_call(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    points: Tensor,
    weights: Tensor,
    *,
    reference_points: Tensor | None = None,
    softmax: bool = False,
    num_points: int | Sequence[int] | None = None,
    reference_index: Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
    queries_per_map: Sequence[int] | Tensor | None = None,
    value_padding_mask: Tensor | None = None,
    batch_axis: bool = False,
) -> Call:
    """Checks the arguments of a call and brings them into one form.

    The arguments are those of `saccade.deformable_attention`; `points` are the sampling locations, or
    the offsets where there are `reference_points`; `weights` are attention weights, or logits with
    `softmax`. With `batch_axis`, the tensors of a call with `queries_per_map` have the operator's
    leading axis of size 1.

    Raises:
        TypeError: an argument is not of the kind that the signature names.
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    request = _Request(
        value=value,
        spatial_shapes=spatial_shapes,
        points=points,
        weights=weights,
        reference_points=reference_points,
        num_points=num_points,
        reference_index=reference_index,
        queries_per_map=queries_per_map,
        softmax=bool(softmax),
        batch_axis=batch_axis,
        interpolation=interpolation,
        padding=padding,
        coordinates=coordinates,
    )
    key = _cache_key(request)
    recipe = _cache.get(key) if key is not None else None
    if recipe is None:
        recipe = _check(request)
        if key is not None:
            if len(_cache) >= MAX_CACHED:
                _cache.clear()
            _cache[key] = recipe
    if value_padding_mask is not None:
        value = apply_value_padding_mask(value, value_padding_mask)
    axis = recipe.level_axis
    if axis is not None:
        points, weights = points.flatten(axis, axis + 1), weights.flatten(axis, axis + 1)
    if not recipe.has_queries:
        count = len(recipe.options.num_points)
        points, weights = points[..., :count, :], weights[..., :count]
    if recipe.adds_batch_axis:
        points, weights = points[None], weights[None]
        reference_points = None if reference_points is None else reference_points[None]
    return Call(value, points, weights, reference_points, recipe.options, recipe.plans)


def drop_batch_axis(output: Tensor, call: Call) -> Tensor:
    """The operator's output [B, Q, M * D] as callers get it: [T, M * D] with `queries_per_map`."""
    return output if call.options.queries_per_map is None else output[0]


class _Request(NamedTuple):
    """The arguments of `parse_call` as the caller wrote them."""

    value: Tensor
    spatial_shapes: SpatialShapes
    points: Tensor
    weights: Tensor
    reference_points: Tensor | None
    num_points: int | Sequence[int] | None
    reference_index: Sequence[int] | None
    queries_per_map: Sequence[int] | Tensor | None
    softmax: bool
    batch_axis: bool
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates


# Only arguments of exactly these types are part of a key: 1.0 and True equal 1 but are not sizes, and an
# instance of another subclass may change, or compare as it likes.
_INT, _STR, _ROWS = {int}, {str}, {tuple, list, torch.Size}
_TENSORS = {Tensor, torch.nn.Parameter}


def _cache_key(request: _Request) -> Hashable | None:
    """Everything that the checks look at; None where a call has to be checked every time."""
    value, points, weights = request.value, request.points, request.weights
    reference_points, num_points = request.reference_points, request.num_points
    interpolation, padding, coordinates = (
        request.interpolation, request.padding, request.coordinates
    )  # fmt: skip
    if (
        not {type(value), type(points), type(weights)} <= _TENSORS
        or {type(interpolation), type(padding), type(coordinates)} != _STR
        # A traced size is more than its number.
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
    ):
        return None
    try:
        rows = request.spatial_shapes
        if type(rows) is Tensor:
            rows = rows.tolist()
        if (
            type(rows) not in _ROWS
            or not {*map(type, rows)} <= _ROWS
            or not {*map(type, itertools.chain.from_iterable(rows))} <= _INT
        ):
            return None
        reference = None
        if reference_points is not None:
            if type(reference_points) not in _TENSORS:
                return None
            reference = (
                reference_points.shape, reference_points.dtype, reference_points.layout,
                reference_points.device,
            )  # fmt: skip
        key = (
            value.shape, value.dtype, value.layout, value.device,
            points.shape, points.dtype, points.layout, points.device,
            weights.shape, weights.dtype, weights.layout, weights.device,
            reference, tuple(map(tuple, rows)),
            num_points
            if num_points is None or type(num_points) is int
            else _plain_ints(num_points),
            None if request.reference_index is None else _plain_ints(request.reference_index),
            None if request.queries_per_map is None else _plain_ints(request.queries_per_map),
            request.softmax, request.batch_axis, interpolation, padding, coordinates,
        )  # fmt: skip
        hash(key)
    except (RuntimeError, TypeError):
        # A nested tensor has no shape, a meta tensor no numbers, a symbolic size no hash; or an argument
        # is not made of plain numbers.
        return None
    return key


def _plain_ints(numbers: Any) -> tuple[int, ...]:
    """The numbers as part of a key; a TypeError unless they are a list or a tuple of int."""
    if type(numbers) not in _ROWS or not {*map(type, numbers)} <= _INT:
        raise TypeError
    return tuple(numbers)


def _check(request: _Request) -> _Recipe:
    check_option("interpolation", request.interpolation, Interpolation)
    check_option("padding", request.padding, Padding)
    check_option("coordinates", request.coordinates, Coordinates)
    value, points, weights, reference_points = (
        request.value, request.points, request.weights, request.reference_points
    )  # fmt: skip
    # What the public functions call the tensors.
    points_name = "sampling_locations" if reference_points is None else "sampling_offsets"
    weights_name = "attention_logits" if request.softmax else "attention_weights"
    tensors = {"value": value, points_name: points, weights_name: weights}
    if reference_points is not None:
        tensors["reference_points"] = reference_points
    for name, tensor in tensors.items():
        check_floating(name, tensor, VALUE_DTYPES, None if tensor is value else value.device)

    if value.dim() != 4:
        raise ValueError(
            "value: expected 4 axes [batch, positions, heads or 1, head_dim], "
            f"got {value.dim()} axes {format_shape(value)}"
        )
    shapes = parse_spatial_shapes(request.spatial_shapes)
    spatial_dims = len(shapes[0])
    check_border_height(request.padding, request.interpolation, spatial_dims)
    check_positions(value, shapes)
    if value.shape[3] < 1:
        raise ValueError(f"value: expected a head_dim of at least 1, got {format_shape(value)}")

    ragged = request.queries_per_map is not None
    if ragged and request.batch_axis:
        for name, tensor in tensors.items():
            if name != "value" and (tensor.dim() < 1 or tensor.shape[0] != 1):
                raise ValueError(
                    f"{name}: expected [1, queries of all maps, ...] with queries_per_map, "
                    f"got {format_shape(tensor)}"
                )
        points, weights = points[0], weights[0]
        reference_points = None if reference_points is None else reference_points[0]
    num_points = _check_points(points_name, points, shapes, request)
    queries_per_map = _check_queries(points_name, points, value, request.queries_per_map)
    check_shape(weights_name, weights, points.shape[:-1])
    leading = 1 if ragged else 2
    if not torch.compiler.is_dynamo_compiling():  # it would guard the sizes
        sizes = (*points.shape[:leading], points.shape[leading] * value.shape[3])
        check_elements(tensors, sizes)
    some_queries = has_queries(points.shape[:leading])
    one_point_per_level = [1] * len(shapes)
    if not some_queries and request.reference_index is None:
        # An index of so few points says as much as one that is as long as all points.
        num_points = one_point_per_level
    index = None
    if reference_points is not None:
        index = tuple(
            parse_reference_index(
                reference_points,
                points.shape[:leading],
                num_points,
                request.reference_index,
                spatial_dims,
            )
        )
        if not some_queries:
            index = index[: len(shapes)]
    elif request.reference_index is not None:
        raise ValueError(
            "reference_index: expected None without reference_points, "
            f"got {request.reference_index!r}"
        )
    options = Options(
        spatial_shapes=tuple(shapes),
        num_points=tuple(num_points if some_queries else one_point_per_level),
        interpolation=request.interpolation,
        padding=request.padding,
        coordinates=request.coordinates,
        softmax=request.softmax,
        reference_index=index,
        queries_per_map=None if queries_per_map is None else tuple(queries_per_map),
    )
    level_axis = leading + 1 if points.dim() == leading + 4 else None
    adds_batch_axis = ragged and not request.batch_axis
    return _Recipe(options, level_axis, adds_batch_axis, some_queries, {})


def _check_queries(
    name: str, points: Tensor, value: Tensor, queries_per_map: Sequence[int] | Tensor | None
) -> list[int] | None:
    """The number of queries of each map, where maps have different numbers of them."""
    if queries_per_map is None:
        return None
    queries = to_ints("queries_per_map", queries_per_map)
    if len(queries) != value.shape[0]:
        raise ValueError(
            f"queries_per_map: expected {value.shape[0]} numbers, one for each map of value "
            f"{format_shape(value)}, got {len(queries)}"
        )
    total = points.shape[0]
    if not holds(*[count >= 0 for count in queries], sum(queries) == total):
        raise ValueError(
            f"queries_per_map: expected numbers of at least 0 that sum to {total}, the number of "
            f"queries of {name} {format_shape(points)}, got {queries}"
        )
    return queries


def _check_points(
    name: str, points: Tensor, shapes: list[tuple[int, ...]], request: _Request
) -> list[int]:
    """The number of points per level; raises unless locations or offsets have a shape that fits."""
    value = request.value
    ragged = request.queries_per_map is not None
    num_levels, spatial_dims = len(shapes), len(shapes[0])
    queries = [None] if ragged else [value.shape[0], None]
    axes = "queries" if ragged else "batch, queries"
    if points.dim() == len(queries) + 4:
        per_level = points.shape[-2]
        num_points = parse_num_points(request.num_points, num_levels, per_level)
        expected = [*queries, None, num_levels, per_level, spatial_dims]
        if num_points != [per_level] * num_levels:
            raise ValueError(
                f"num_points: expected {per_level} for each level, the last axis but one of {name} "
                f"{format_shape(points)}, got {num_points}; different numbers of points need flat "
                f"{name} [{axes}, heads, sum(num_points), spatial_dims]"
            )
    elif points.dim() == len(queries) + 3:
        num_points = parse_num_points(request.num_points, num_levels, flat_name=name)
        expected = [*queries, None, sum(num_points), spatial_dims]
    else:
        raise ValueError(
            f"{name}: expected {len(queries) + 4} axes [{axes}, heads, levels, points, "
            f"{spatial_dims}] or {len(queries) + 3} axes with the points flat, "
            f"got {format_shape(points)}"
        )
    hint = ""
    if points.shape[-1] != spatial_dims:
        hint = f" (last axis must be {spatial_dims} for {spatial_dims}-D spatial_shapes)"
    elif len(expected) == len(queries) + 4 and points.shape[-3] != num_levels:
        hint = f" (spatial_shapes has {num_levels} levels)"
    check_shape(name, points, expected, hint)
    num_heads, value_heads = points.shape[len(queries)], value.shape[2]
    if num_heads < 1:
        raise ValueError(f"{name}: expected at least 1 head, got {format_shape(points)}")
    if value_heads != num_heads and value_heads != 1:
        raise ValueError(
            f"value: expected {num_heads} heads as in {name} {format_shape(points)} "
            f"or 1 head that all of them share, got {value_heads} in {format_shape(value)}"
        )
    return num_points
