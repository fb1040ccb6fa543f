"""The levels of a map as compiled modules take them: shapes and start indices, tensors on the device."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from saccade.checks import check_shape, check_tensor, holds

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def parse_levels(**tensors: Tensor) -> list[tuple[int, int]]:
    """The shapes of levels as ints, after a check that the start indices agree with them.

    Args:
        tensors: shapes (Tensor[L, 2]) and start indices (Tensor[L]) of the levels, in this order, each
            under the name that error messages use.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape or dtype does not fit, or the levels do not follow each other.
    """
    axes: tuple[list[int | None], ...] = ([None, 2], [None])
    for (name, tensor), expected in zip(tensors.items(), axes, strict=True):
        check_tensor(name, tensor)
        if tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name}: expected a tensor of integers, got {tensor.dtype}")
        check_shape(name, tensor, expected)
    (shapes_name, spatial_shapes), (starts_name, level_start_index) = tensors.items()
    if level_start_index.device != spatial_shapes.device:
        raise ValueError(
            f"{starts_name}: expected a tensor on {spatial_shapes.device} like {shapes_name}, got "
            f"{level_start_index.device}"
        )
    # Read together, because on a GPU each read is a synchronisation.
    values = torch.cat([spatial_shapes.flatten(), level_start_index]).tolist()
    levels = len(spatial_shapes)
    shapes = list(zip(values[: 2 * levels : 2], values[1 : 2 * levels : 2], strict=True))
    *expected_starts, _ = itertools.accumulate(map(math.prod, shapes), initial=0)
    starts = values[2 * levels :]
    if len(starts) != levels or not holds(
        *[start == expected for start, expected in zip(starts, expected_starts, strict=True)]
    ):
        raise ValueError(
            f"{starts_name}: expected {expected_starts}, where the levels {shapes} of "
            f"{shapes_name} start, got {starts}"
        )
    return shapes
