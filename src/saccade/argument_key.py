"""A key for everything about a call that its checks look at, so that they need not look twice."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saccade.arguments import Coordinates, Interpolation, Padding, SpatialShapes


def key_of(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: int | Sequence[int] | None,
    interpolation: Interpolation,
    padding: Padding,
    coordinates: Coordinates,
) -> Hashable:
    """Everything that `arguments` checks, or None: this call is to be checked whatever was before."""
    if (
        type(value) is not Tensor
        or type(sampling_locations) is not Tensor
        or type(attention_weights) is not Tensor
        or type(spatial_shapes) not in (list, tuple, Tensor)
        or not (isinstance(interpolation, str) and isinstance(padding, str))
        or not isinstance(coordinates, str)
        # A traced size is more than its number.
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
    ):
        return None
    try:
        key = (
            value.shape,
            value.dtype,
            value.layout,
            value.device,
            sampling_locations.shape,
            sampling_locations.dtype,
            sampling_locations.layout,
            sampling_locations.device,
            attention_weights.shape,
            attention_weights.dtype,
            attention_weights.layout,
            attention_weights.device,
            _plain_shapes(spatial_shapes),
            _plain_points(num_points),
            interpolation,
            padding,
            coordinates,
        )
        hash(key)
    except (RuntimeError, TypeError):
        # A nested tensor has no shape, a meta tensor no numbers, a symbolic size no hash; or the
        # sizes are not plain numbers.
        return None
    return key


# Only these are remembered: of anything else (1.0 and True are equal to 1; an object may change), the
# checks look again.
_INT, _ROWS = {int}, {tuple, list, torch.Size}


def _plain_shapes(spatial_shapes: SpatialShapes) -> tuple[tuple[int, ...], ...]:
    rows = spatial_shapes.tolist() if type(spatial_shapes) is Tensor else spatial_shapes
    if not {*map(type, rows)} <= _ROWS or not {*map(type, itertools.chain(*rows))} <= _INT:
        raise TypeError
    return tuple(map(tuple, rows))


def _plain_points(num_points: int | Sequence[int] | None) -> tuple[int, ...] | int | None:
    if num_points is None or type(num_points) is int:
        return num_points
    if not isinstance(num_points, (list, tuple)) or not {*map(type, num_points)} <= _INT:
        raise TypeError
    return tuple(num_points)
