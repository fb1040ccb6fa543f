"""What `torch.utils.flop_counter` counts for the operators.

Its formulas are registered when that module is imported, by whoever wants to count: importing it here
would bring Triton along where that is installed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch

from saccade.ops.contract import FUSED, PLAIN, Operator

COUNTER = "torch.utils.flop_counter"


def register_with_counter() -> None:
    """Registers the formulas, now or when the counter is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def _register(counter: ModuleType) -> None:
    for operator in (PLAIN, FUSED):
        for name, formula in (
            (operator.name, _forward_flops(operator)),
            (operator.backward_name, _backward_flops(operator)),
        ):
            counter.register_flop_formula([getattr(torch.ops.saccade, name)])(formula)


def _forward_flops(operator: Operator) -> Callable[..., int]:
    def flops(*arguments: Any, **_: Any) -> int:
        """A multiplication and an addition for each number of each row that a point reads.

        As for torch's own operators, what finds the rows does not count.
        """
        # The counter hands over shapes in place of tensors.
        value_shape, *_points, locations_shape, _weights = operator.tensors(arguments)
        *looks, spatial_dims = (int(size) for size in cast(Sequence[int], locations_shape))
        rows = 1 << spatial_dims if operator.interpolation(arguments) == "linear" else 1
        return 2 * math.prod(looks) * rows * int(cast(Sequence[int], value_shape)[3])

    return flops


def _backward_flops(operator: Operator) -> Callable[..., int]:
    forward_flops = _forward_flops(operator)

    def flops(_grad: Sequence[int], *arguments: Any, **_: Any) -> int:
        """As much for the gradient of the value, and for the dot products behind all others."""
        *given, (value, *points) = arguments
        return (int(value) + int(any(points))) * forward_flops(*given)

    return flops


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find the counter, and registers the formulas once it has run."""

    _asks_the_others = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER or self._asks_the_others:
            return None
        self._asks_the_others = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asks_the_others = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(module)
                # Not before: who only asks where the module is has not imported it.
                sys.meta_path.remove(self)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
