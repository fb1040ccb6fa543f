"""What a call means: the arguments of the operator, checked and understood once.

`understand` turns everything a caller may write (sequences or a tensor of shapes, points per level
or flat points, one number or a list of points) into one plain `Call`, which the operator and the
reference both execute; `understand_fused` does so for a fused call. Each error names the argument,
what was expected and what came.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.argument_key import key_of, remember
from saccade.checks import (
    VALUE_DTYPES,
    Coordinates,
    Interpolation,
    Padding,
    SpatialShapes,
    apply_value_padding_mask,
    to_ints,
    check_border_height,
    check_floating,
    check_option,
    check_shape,
    format_shape,
    parse_num_points,
    parse_reference_index,
    parse_spatial_shapes,
)


class Call(NamedTuple):
    """One understood call: tensors in the operator's own layout, everything else in plain Python.

    Shapes: value [B, S, M or 1, D] · sampling_locations [B, Q, M, P, N] · attention_weights
    [B, Q, M, P], with the points of all levels flat, level after level (P = sum(num_points)). With
    queries_per_map, B numbers that sum to T, the latter two are [1, T, M, P, N] and [1, T, M, P].
    """

    value: Tensor
    spatial_shapes: list[tuple[int, ...]]
    sampling_locations: Tensor
    attention_weights: Tensor
    num_points: list[int]
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates
    queries_per_map: list[int] | None = None


class FusedCall(NamedTuple):
    """One understood fused call, as `Call`.

    Shapes: reference_points [B, Q, R, N or 2 N] · sampling_offsets [B, Q, M, P, N] ·
    attention_logits [B, Q, M, P] · reference_index, P numbers below R.
    """

    value: Tensor
    spatial_shapes: list[tuple[int, ...]]
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor
    reference_index: list[int]
    num_points: list[int]
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates
    queries_per_map: list[int] | None = None


def of_queries(call: Call | FusedCall, output: Tensor) -> Tensor:
    """The operator's result as the caller gets it: of queries that belong to maps by themselves
    without the operator's axis for the batch.
    """
    return output if call.queries_per_map is None else output[0]


def flat(spatial_shapes: Sequence[Sequence[int]]) -> list[int]:
    """The spatial shapes one after the other, as the registered operators take them."""
    return list(itertools.chain.from_iterable(spatial_shapes))


def unflattened(shapes: Sequence[int], spatial_dims: int) -> list[tuple[int, ...]]:
    """The sizes one after the other as spatial shapes again."""
    # Without an axis for coordinates there are none; that is for the checks to say.
    step = max(spatial_dims, 1)
    return [tuple(shapes[start : start + step]) for start in range(0, len(shapes), step)]


class Options(NamedTuple):
    """What both kinds of calls can be told, as it was written."""

    spatial_shapes: SpatialShapes
    num_points: int | Sequence[int] | None
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates
    queries_per_map: Sequence[int] | Tensor | None


class Sizes(NamedTuple):
    """What is found out from sizes and options alone, without looking into a tensor."""

    spatial_shapes: tuple[tuple[int, ...], ...]
    num_points: tuple[int, ...]
    queries_per_map: tuple[int, ...] | None
    reference_index: tuple[int, ...] = ()


# The checks take longer than a small kernel, and a model calls with few different sizes: what was
# found good is remembered by everything that was looked at.
_remembered: dict[Hashable, Sizes] = {}


def understand(
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    options: Options,
    value_padding_mask: Tensor | None = None,
) -> Call:
    """Checks the arguments of `saccade.deformable_attention` and brings them into one form.

    Raises:
        TypeError: an argument is not of the kind the signature names.
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    tensors = {
        "value": value,
        "sampling_locations": sampling_locations,
        "attention_weights": attention_weights,
    }
    sizes = _sizes(tensors, options, None)
    return Call(
        _masked(value, value_padding_mask),
        list(sizes.spatial_shapes),
        *_in_layout(sampling_locations, attention_weights, sizes),
        list(sizes.num_points),
        options.interpolation,
        options.padding,
        options.coordinates,
        _listed(sizes.queries_per_map),
    )


def understand_fused(
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    options: Options,
    reference_index: Sequence[int] | None = None,
    value_padding_mask: Tensor | None = None,
) -> FusedCall:
    """Checks the arguments of `saccade.fused_deformable_attention`, as `understand`."""
    tensors = {
        "value": value,
        "sampling_offsets": sampling_offsets,
        "attention_logits": attention_logits,
        "reference_points": reference_points,
    }
    sizes = _sizes(tensors, options, reference_index)
    return FusedCall(
        _masked(value, value_padding_mask),
        list(sizes.spatial_shapes),
        reference_points if sizes.queries_per_map is None else reference_points[None],
        *_in_layout(sampling_offsets, attention_logits, sizes),
        list(sizes.reference_index),
        list(sizes.num_points),
        options.interpolation,
        options.padding,
        options.coordinates,
        _listed(sizes.queries_per_map),
    )


def _masked(value: Tensor, value_padding_mask: Tensor | None) -> Tensor:
    if value_padding_mask is None:
        return value
    return apply_value_padding_mask(value, value_padding_mask)


def _listed(numbers: tuple[int, ...] | None) -> list[int] | None:
    return None if numbers is None else list(numbers)


def _in_layout(locations: Tensor, weights: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Both with the points of all levels flat, and with an axis for the batch."""
    heads_axis = 2 if sizes.queries_per_map is None else 1
    if locations.dim() == heads_axis + 4:
        locations = locations.flatten(heads_axis + 1, heads_axis + 2)
        weights = weights.flatten(heads_axis + 1, heads_axis + 2)
    if sizes.queries_per_map is not None:
        locations, weights = locations[None], weights[None]
    return locations, weights


def _sizes(
    tensors: dict[str, Tensor], options: Options, reference_index: Sequence[int] | None
) -> Sizes:
    numbers = (options.num_points, options.queries_per_map, reference_index)
    key = key_of((*tensors.values(),), options.spatial_shapes, numbers, options[2:5])
    sizes = _remembered.get(key) if key else None
    if sizes is None:
        sizes = _check(tensors, options, reference_index)
        if key:
            remember(_remembered, key, sizes)
    return sizes


def _check(
    tensors: dict[str, Tensor], options: Options, reference_index: Sequence[int] | None
) -> Sizes:
    check_option("interpolation", options.interpolation, Interpolation)
    check_option("padding", options.padding, Padding)
    check_option("coordinates", options.coordinates, Coordinates)
    for name, tensor in tensors.items():
        check_floating(name, tensor, VALUE_DTYPES)
    value = tensors["value"]
    for name, tensor in tensors.items():
        if tensor.device != value.device:
            raise ValueError(
                f"{name}: expected a tensor on {value.device} like value, got {tensor.device}"
            )

    if value.dim() != 4:
        raise ValueError(
            "value: expected 4 axes [batch, positions, heads or 1, head_dim], "
            f"got {value.dim()} axes {format_shape(value)}"
        )
    shapes = parse_spatial_shapes(options.spatial_shapes)
    check_border_height(options.padding, options.interpolation, len(shapes[0]))
    num_positions, head_dim = value.shape[1], value.shape[3]
    expected_positions = sum(math.prod(shape) for shape in shapes)
    if num_positions != expected_positions:
        raise ValueError(
            f"spatial_shapes: expected shapes whose products sum to {num_positions}, the number of "
            f"positions of value {format_shape(value)}, got {shapes} which sum to {expected_positions}"
        )
    if head_dim < 1:
        raise ValueError(f"value: expected a head_dim of at least 1, got {format_shape(value)}")
    (name, locations), weights = list(tensors.items())[1:3]
    levels = _check_points(name, locations, value, shapes, options)
    queries = _check_queries(name, locations, value, options.queries_per_map)
    check_shape(weights[0], weights[1], list(locations.shape[:-1]))
    index: list[int] = []
    if "reference_points" in tensors:
        leading = locations.shape[: 2 if queries is None else 1]
        index = parse_reference_index(
            tensors["reference_points"], leading, levels, reference_index, len(shapes[0])
        )
    return Sizes(
        tuple(shapes), tuple(levels), None if queries is None else tuple(queries), tuple(index)
    )


def _check_queries(
    name: str, locations: Tensor, value: Tensor, queries_per_map: Sequence[int] | Tensor | None
) -> list[int] | None:
    """The number of queries of each map, where each has its own."""
    if queries_per_map is None:
        return None
    queries = to_ints("queries_per_map", queries_per_map)
    if len(queries) != value.shape[0]:
        raise ValueError(
            f"queries_per_map: expected {value.shape[0]} numbers, one for each map of value "
            f"{format_shape(value)}, got {len(queries)}"
        )
    total = locations.shape[0]
    if torch.compiler.is_compiling():
        # Numbers read from a tensor are not known yet: the program checks them when it runs. What torch
        # prints then can hold no numbers.
        for number in queries:
            torch._check(number >= 0, lambda: "queries_per_map: expected at least 0, got less")
        torch._check(
            sum(queries) == total,
            lambda: "queries_per_map: expected the number of all queries as their sum, got another",
        )
    elif any(number < 0 for number in queries) or sum(queries) != total:
        raise ValueError(
            f"queries_per_map: expected numbers of at least 0 that sum to {total}, the number of "
            f"queries of {name} {format_shape(locations)}, got {queries}"
        )
    return queries


def _check_points(
    name: str,
    locations: Tensor,
    value: Tensor,
    shapes: list[tuple[int, ...]],
    options: Options,
) -> list[int]:
    """The number of points of each level; `locations` (or offsets) are good then."""
    ragged = options.queries_per_map is not None
    num_levels, spatial_dims = len(shapes), len(shapes[0])
    queries = [None] if ragged else [value.shape[0], None]
    axes = "queries" if ragged else "batch, queries"
    if locations.dim() == len(queries) + 4:
        points = locations.shape[-2]
        levels = parse_num_points(options.num_points, num_levels, points)
        expected = [*queries, None, num_levels, points, spatial_dims]
        if levels != [points] * num_levels:
            raise ValueError(
                f"num_points: expected {points} for each level, the last axis but one of {name} "
                f"{format_shape(locations)}, got {levels}; different numbers of points need flat "
                f"{name} [{axes}, heads, sum(num_points), spatial_dims]"
            )
    elif locations.dim() == len(queries) + 3:
        levels = parse_num_points(options.num_points, num_levels, flat_name=name)
        expected = [*queries, None, sum(levels), spatial_dims]
    else:
        raise ValueError(
            f"{name}: expected {len(queries) + 4} axes [{axes}, heads, levels, points, "
            f"{spatial_dims}] or {len(queries) + 3} axes with the points flat, "
            f"got {format_shape(locations)}"
        )
    hint = ""
    if locations.shape[-1] != spatial_dims:
        hint = f" (last axis must be {spatial_dims} for {spatial_dims}-D spatial_shapes)"
    elif len(expected) == len(queries) + 4 and locations.shape[-3] != num_levels:
        hint = f" (spatial_shapes has {num_levels} levels)"
    check_shape(name, locations, expected, hint)
    num_heads, value_heads = locations.shape[len(queries)], value.shape[2]
    if num_heads < 1:
        raise ValueError(f"{name}: expected at least 1 head, got {format_shape(locations)}")
    if value_heads != num_heads and value_heads != 1:
        raise ValueError(
            f"value: expected {num_heads} heads as in {name} {format_shape(locations)} "
            f"or 1 head that all of them share, got {value_heads} in {format_shape(value)}"
        )
    return levels
