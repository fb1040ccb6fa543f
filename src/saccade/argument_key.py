"""A key for everything about a call that its checks look at, so that they need not look twice."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saccade.checks import SpatialShapes


def key_of(
    tensors: tuple[Tensor, ...],
    spatial_shapes: SpatialShapes,
    numbers: tuple[int | Sequence[int] | Tensor | None, ...],
    options: tuple[str, ...],
) -> Hashable:
    """Everything that `arguments` checks, or None: this call is to be checked whatever was before."""
    if (
        not {*map(type, tensors)} <= _TENSOR
        or type(spatial_shapes) not in (list, tuple, Tensor)
        or not all(isinstance(option, str) for option in options)
        # A traced size is more than its number.
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
    ):
        return None
    try:
        key = (
            *[(tensor.shape, tensor.dtype, tensor.layout, tensor.device) for tensor in tensors],
            _plain_shapes(spatial_shapes),
            *map(_plain_numbers, numbers),
            options,
        )
        hash(key)
    except (RuntimeError, TypeError):
        # A nested tensor has no shape, a meta tensor no numbers, a symbolic size no hash; or the
        # sizes are not plain numbers.
        return None
    return key


# Sizes of a model are few, those of a fuzzer are not: emptied when it holds so many.
MOST_REMEMBERED = 512

_Found = TypeVar("_Found")


def remember(known: dict[Hashable, _Found], key: Hashable, found: _Found) -> _Found:
    """Keeps what was found out for a key, and gives it back."""
    if len(known) >= MOST_REMEMBERED:
        known.clear()
    known[key] = found
    return found


# Only these are remembered: of anything else (1.0 and True are equal to 1; an object may change), the
# checks look again.
_INT, _ROWS, _TENSOR = {int}, {tuple, list, torch.Size}, {Tensor}


def _plain_shapes(spatial_shapes: SpatialShapes) -> tuple[tuple[int, ...], ...]:
    rows = spatial_shapes.tolist() if type(spatial_shapes) is Tensor else spatial_shapes
    if not {*map(type, rows)} <= _ROWS or not {*map(type, itertools.chain(*rows))} <= _INT:
        raise TypeError
    return tuple(map(tuple, rows))


def _plain_numbers(
    numbers: int | Sequence[int] | Tensor | None,
) -> tuple[int, ...] | int | None:
    if numbers is None or type(numbers) is int:
        return numbers
    if not isinstance(numbers, (list, tuple)) or not {*map(type, numbers)} <= _INT:
        raise TypeError
    return tuple(numbers)
