"""The contract of the operators: schemas, shapes for tracing, and the fallback kernels.

`saccade::deformable_attention`, `saccade::fused_deformable_attention` and their backwards are
ordinary torch operators. The native library, where there is one, defines the same schemas and brings
the CPU kernels; the reference serves every other device, and the CPU where there is no library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from saccade import reference
from saccade.arguments import Call, FusedCall, flat, unflattened

_OPTIONS = (
    "int[] num_points, str interpolation, str padding, str coordinates, SymInt[]? queries_per_map"
)
_MAPS = "Tensor value, SymInt[] spatial_shapes"


class Operator(NamedTuple):
    """An operator and its backward.

    Both take value, spatial_shapes, the tensors `points` and the rest, in this order; the backward
    in front of them grad_output, and behind them output_mask, one entry for each tensor.
    """

    name: str
    points: tuple[str, ...]
    """The tensors that say where the queries look."""
    arguments: str
    """What the schema names between the brackets."""
    call: type[Call] | type[FusedCall]
    execute: Callable[[Any], Tensor]
    execute_backward: Callable[..., tuple[Tensor | None, ...]]

    @property
    def backward_name(self) -> str:
        """The backward is an operator of its own."""
        return f"{self.name}_backward"

    @property
    def num_tensors(self) -> int:
        """The value and the points."""
        return 1 + len(self.points)

    @property
    def schemas(self) -> dict[str, str]:
        """Arguments and results of both, by name."""
        results = ", ".join(["Tensor"] * self.num_tensors)
        return {
            self.name: f"({self.arguments}) -> Tensor",
            self.backward_name: (
                f"(Tensor grad_output, {self.arguments}, bool[] output_mask) -> ({results})"
            ),
        }

    def tensors(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """The value and the points of the operator's arguments."""
        return (arguments[0], *arguments[2 : 1 + self.num_tensors])

    def replaced(self, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments with other tensors."""
        return (tensors[0], arguments[1], *tensors[1:], *arguments[1 + self.num_tensors :])

    def interpolation(self, arguments: Sequence[Any]) -> str:
        """Of the operator's arguments, which end alike in both operators."""
        return str(arguments[-4])

    def understood(self, arguments: Sequence[Any]) -> Any:
        """The operator's arguments as a call for the reference."""
        spatial_dims = arguments[self._locations_at].shape[-1]
        shapes = unflattened(arguments[1], spatial_dims)
        return self.call(arguments[0], shapes, *arguments[2:])

    @property
    def _locations_at(self) -> int:
        # The last tensor but one.
        return self.num_tensors - 1

    # --- the reference as the kernel of every device that has no other --------------------------

    def fallback(self, *arguments: Any) -> Tensor:
        """The reference, forward."""
        return self.execute(self.understood(arguments))

    def backward_fallback(self, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The reference, backward."""
        *given, output_mask = arguments
        gradients = self.execute_backward(grad_output, self.understood(given), output_mask)
        return tuple(
            _unwanted(tensor) if gradient is None else gradient.contiguous()
            for tensor, gradient in zip(self.tensors(given), gradients, strict=True)
        )

    # --- shapes for tracing ----------------------------------------------------------------------

    def fake(self, *arguments: Any) -> Tensor:
        """What comes out of the operator, without numbers."""
        self._check_axes_and_devices(arguments)
        value, locations = arguments[0], arguments[self._locations_at]
        batch_size, num_queries, num_heads = locations.shape[:3]
        return cast(Tensor, value.new_empty((batch_size, num_queries, num_heads * value.shape[3])))

    def backward_fake(self, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """What comes out of its backward."""
        *given, output_mask = arguments
        self._check_axes_and_devices(given, grad_output=grad_output)
        return tuple(
            tensor.new_empty(tensor.shape) if wanted else _unwanted(tensor)
            for tensor, wanted in zip(self.tensors(given), output_mask, strict=True)
        )

    def _check_axes_and_devices(self, arguments: Sequence[Any], **others: Tensor) -> None:
        # No sizes are compared: a symbolic one would be fixed, or guarded, by that.
        value, *points = self.tensors(arguments)
        given = {"value": value, **others, **dict(zip(self.points, points, strict=True))}
        for name, tensor in given.items():
            if tensor.dim() != len(_AXES[name]):
                raise ValueError(
                    f"{name}: expected {len(_AXES[name])} axes [{', '.join(_AXES[name])}], "
                    f"got {tensor.dim()} axes {list(tensor.shape)}"
                )
            if tensor.device != value.device:
                raise ValueError(
                    f"{name}: expected a tensor on {value.device} like value, got {tensor.device}"
                )


_QUERIES = ("batch", "queries")
_AXES = {
    "grad_output": (*_QUERIES, "heads * head_dim"),
    "value": ("batch", "positions", "heads or 1", "head_dim"),
    "sampling_locations": (*_QUERIES, "heads", "points", "spatial_dims"),
    "attention_weights": (*_QUERIES, "heads", "points"),
    "reference_points": (*_QUERIES, "references", "spatial_dims or 2 * spatial_dims"),
    "sampling_offsets": (*_QUERIES, "heads", "points", "spatial_dims"),
    "attention_logits": (*_QUERIES, "heads", "points"),
}


def _unwanted(like: Tensor) -> Tensor:
    """What a backward operator returns in place of a gradient that nobody asked for."""
    return like.new_empty(0)


PLAIN = Operator(
    "deformable_attention",
    ("sampling_locations", "attention_weights"),
    f"{_MAPS}, Tensor sampling_locations, Tensor attention_weights, {_OPTIONS}",
    Call,
    reference.execute,
    reference.execute_backward,
)
FUSED = Operator(
    "fused_deformable_attention",
    ("reference_points", "sampling_offsets", "attention_logits"),
    f"{_MAPS}, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
    f"int[] reference_index, {_OPTIONS}",
    FusedCall,
    reference.execute_fused,
    reference.execute_fused_backward,
)
SCHEMAS = PLAIN.schemas | FUSED.schemas


def arguments_of(call: Call | FusedCall) -> tuple[Any, ...]:
    """An understood call as the arguments of its operator."""
    return (call.value, flat(call.spatial_shapes), *call[2:])
