"""Where levels lie, as the compiled modules are told: on the device, and twice."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from saccade.checks import check_shape, check_tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shapes_of_levels(**given: Tensor) -> list[tuple[int, int]]:
    """The shapes as numbers, once it is sure that the levels lie where the caller says.

    Args:
        given: shapes (Tensor[L, 2]) and starts (Tensor[L]) of the levels, in this order, under the
            names that errors call them by.

    Raises:
        TypeError: one is no tensor.
        ValueError: one has another shape or dtype, or levels do not follow each other.
    """
    axes: tuple[list[int | None], ...] = ([None, 2], [None])
    for (name, tensor), expected in zip(given.items(), axes, strict=True):
        check_tensor(name, tensor)
        if tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name}: expected a tensor of integers, got {tensor.dtype}")
        check_shape(name, tensor, expected)
    (shapes_name, spatial_shapes), (starts_name, level_start_index) = given.items()
    if level_start_index.device != spatial_shapes.device:
        raise ValueError(
            f"{starts_name}: expected a tensor on {spatial_shapes.device} like {shapes_name}, got "
            f"{level_start_index.device}"
        )
    # Together: on a GPU each reading back is a synchronisation.
    numbers = torch.cat([spatial_shapes.flatten(), level_start_index]).tolist()
    levels = len(spatial_shapes)
    shapes = list(zip(numbers[: 2 * levels : 2], numbers[1 : 2 * levels : 2], strict=True))
    *expected_starts, _ = itertools.accumulate(map(math.prod, shapes), initial=0)
    if numbers[2 * levels :] != expected_starts:
        raise ValueError(
            f"{starts_name}: expected {expected_starts}, where the levels {shapes} of "
            f"{shapes_name} start, got {numbers[2 * levels :]}"
        )
    return shapes
