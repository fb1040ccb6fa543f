"""Keeps sizes symbolic while models of other packages are exported.

An exporter traces a size as a symbol. Two of torch's functions turn such a symbol into its number, which
fixes the resolution in the exported program: `torch.tensor` of sizes, and `torch.linspace` up to a size.
Deformable DETR and its family call both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

_TENSOR_FUNCTIONS = (torch.tensor, torch.as_tensor)
_LINSPACE_ARGUMENTS = ("start", "end", "steps", "out")
_NUMBER_TYPES = (int, float, torch.SymInt, torch.SymFloat)


class symbolic_sizes(TorchFunctionMode):  # noqa: N801
    """Keeps the resolution dynamic where a model makes tensors of its sizes.

    For `torch.export.export`, and what is built on it, of models whose own code calls `torch.tensor` or
    `torch.linspace` with sizes, such as Deformable DETR and Mask2Former. Saccade's own modules do not
    need it. Nothing changes for calls without symbols.

    Example:
        >>> import torch
        >>> from saccade.integrations.tracing import symbolic_sizes
        >>> class Sizes(torch.nn.Module):
        ...     def forward(self, feature_map):
        ...         return torch.tensor([feature_map.shape[2:]])
        >>> dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        >>> with symbolic_sizes():
        ...     program = torch.export.export(
        ...         Sizes(), (torch.zeros(1, 3, 8, 6),), dynamic_shapes=(dynamic,))
        >>> program.module()(torch.zeros(1, 3, 16, 12))
        tensor([[16, 12]])
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs in place of each function of torch."""
        kwargs = dict(kwargs or {})
        plain = kwargs.keys() <= {"dtype", "device"}
        if function in _TENSOR_FUNCTIONS and plain and len(args) == 1 and _has_symbol(args[0]):
            return _make_tensor(args[0], kwargs.get("dtype") or torch.int64, kwargs.get("device"))
        if function is torch.linspace and (symbolic := _parse_linspace(*args, **kwargs)):
            start, end, steps = symbolic
            # Steps of one pixel, as in all models of the family. Other calls stay as they are.
            if statically_known_true(end + (1 - start) == steps):
                options = {
                    key: value for key, value in kwargs.items() if key not in _LINSPACE_ARGUMENTS
                }
                # Without a dtype, arange with an integer start would give integers.
                dtype = options.pop("dtype", None) or torch.get_default_dtype()
                return torch.arange(steps, dtype=dtype, **options) + start
        return function(*args, **kwargs)


def _parse_linspace(
    start: Any = None,
    end: Any = None,
    steps: Any = None,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    **_: Any,
) -> tuple[Any, Any, Any] | None:
    """(start, end, steps) of a linspace between numbers whose number of steps is a symbol, else None."""
    bounds = (start, end, steps)
    if not isinstance(steps, torch.SymInt) or not all(isinstance(n, _NUMBER_TYPES) for n in bounds):
        return None
    return bounds if out is None and (dtype is None or dtype.is_floating_point) else None


def _flatten(nested: Any) -> Iterator[Any]:
    if isinstance(nested, (list, tuple)):
        for each in nested:
            yield from _flatten(each)
    else:
        yield nested


def _has_symbol(nested: Any) -> bool:
    sizes = list(_flatten(nested))
    return any(isinstance(size, torch.SymInt) for size in sizes) and all(
        isinstance(size, int | torch.SymInt) for size in sizes
    )


def _make_tensor(nested: Any, dtype: torch.dtype, device: Any) -> Tensor:
    if isinstance(nested, (list, tuple)):
        return torch.stack([_make_tensor(each, dtype, device) for each in nested])
    return torch.scalar_tensor(nested, dtype=dtype, device=device)
