"""Tensors whose neighbouring axes may be joined or apart, as compiled functions take them that never look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from saccade.checks import VALUE_DTYPES, check_floating, format_shape


def split_axes(name: str, tensor: Tensor, value: Tensor, **axes: int) -> Tensor:
    """The tensor with these axes, from one that has them in their order, neighbours joined or apart."""
    check_floating(name, tensor, VALUE_DTYPES, value.device)
    if not joins(tensor.shape, [*axes.values()]):
        raise ValueError(
            f"{name}: expected [{format_axes(axes)}] with neighbouring axes joined or apart, got "
            f"{format_shape(tensor)}"
        )
    return tensor.reshape(tuple(axes.values()))


def joins(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether the sizes of `shape` are products of neighbouring axes, all of them in their order."""
    remaining = [size for size in axes if size != 1]
    for size in shape:
        product = 1
        while product != size and remaining:
            product *= remaining.pop(0)
        if product != size:
            return False
    return not remaining


def format_axes(axes: Mapping[str, int]) -> str:
    """The axes with their sizes, as error messages show them."""
    return ", ".join(f"{axis} {size}" for axis, size in axes.items())
