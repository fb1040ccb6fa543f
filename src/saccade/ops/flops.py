"""What `torch.utils.flop_counter` counts for the operator."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from saccade.ops.schema import BACKWARD, FORWARD, Arguments, split_backward_inputs


@functools.cache
def register_flop_formulas() -> None:
    """Lets `torch.utils.flop_counter.FlopCounterMode` count the operator and its backward.

    To be called once, before a counter is made. It is not done at import, because importing
    `torch.utils.flop_counter` imports Triton where that is installed.

    A linear point counts a multiplication and an addition for each channel of each of the 2^N rows that
    it reads, a nearest or discrete point for one row. As for torch's own operators, the work that finds
    the rows does not count. The backward counts as much for the gradient of the value, and as much again
    for all other gradients together.

    Example:
        >>> import torch, saccade
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> saccade.register_flop_formulas()
        >>> value, locations = torch.rand(1, 16, 1, 8), torch.rand(1, 5, 1, 1, 4, 2)
        >>> with FlopCounterMode(display=False) as counter:
        ...     _ = saccade.deformable_attention(value, [(4, 4)], locations, torch.rand(1, 5, 1, 1, 4))
        >>> counter.get_total_flops()                        # 2 · 5 queries · 4 points · 4 rows · 8
        1280
    """
    register = importlib.import_module("torch.utils.flop_counter").register_flop_formula
    register([getattr(torch.ops.saccade, FORWARD)])(_forward_flops)
    register([getattr(torch.ops.saccade, BACKWARD)])(_backward_flops)


def _forward_flops(*inputs: Any, **_: Any) -> int:
    # The counter passes shapes in place of tensors.
    arguments = Arguments(*inputs)
    *points, spatial_dims = (int(size) for size in cast(Sequence[int], arguments.points))
    rows = 1 << spatial_dims if arguments.interpolation == "linear" else 1
    head_dim = int(cast(Sequence[int], arguments.value)[3])
    return 2 * math.prod(points) * rows * head_dim


def _backward_flops(_grad_output: Sequence[int], *inputs: Any, **_: Any) -> int:
    arguments, (value, *others) = split_backward_inputs(inputs)
    return (int(value) + int(any(others))) * _forward_flops(*arguments)
