"""The registered operator: its schema, its arguments by name, shapes for tracing, and the fallback kernels.

`saccade::deformable_attention` and its backward are ordinary torch operators. The native library, where
there is one, defines the same schemas and has the CPU kernels; the reference serves every other device,
and the CPU where there is no library.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade import reference
from saccade.call import Call, Coordinates, Interpolation, Options, Padding, parse_call
from saccade.checks import check_device, check_elements, check_shape, format_shape

FORWARD = "deformable_attention"
BACKWARD = "deformable_attention_backward"

# csrc/parse_call.h has the same; a test compares them, and the fields of `Arguments`.
_ARGUMENTS = (
    "Tensor value, SymInt[] spatial_shapes, Tensor points, Tensor weights, Tensor? reference_points, "
    "int[]? reference_index, bool softmax, int[] num_points, str interpolation, str padding, "
    "str coordinates, SymInt[]? queries_per_map"
)
SCHEMAS = {
    FORWARD: f"({_ARGUMENTS}) -> Tensor",
    BACKWARD: (
        f"(Tensor grad_output, {_ARGUMENTS}, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


class Arguments(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    value: Tensor  # [B, S, M or 1, D]
    spatial_shapes: Sequence[int]  # the sizes of all levels, one after the other
    points: Tensor  # [B, Q, M, P, N] sampling locations, or offsets from the reference points
    weights: Tensor  # [B, Q, M, P] attention weights, or logits with `softmax`
    reference_points: Tensor | None  # [B, Q, R, N or 2 N]
    reference_index: Sequence[int] | None
    softmax: bool
    num_points: Sequence[int]
    interpolation: Interpolation
    padding: Padding
    coordinates: Coordinates
    queries_per_map: Sequence[int] | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors in the order of `output_mask` and of the backward's results."""
        return self.value, self.points, self.weights, self.reference_points

    @property
    def points_name(self) -> str:
        """What error messages call `points`."""
        return "sampling_locations" if self.reference_points is None else "sampling_offsets"

    @property
    def weights_name(self) -> str:
        """What error messages call `weights`."""
        return "attention_logits" if self.softmax else "attention_weights"

    def call(self) -> Call:
        """The call that these arguments describe, without checks."""
        options = Options(
            spatial_shapes=self._levels(),
            num_points=tuple(self.num_points),
            interpolation=self.interpolation,
            padding=self.padding,
            coordinates=self.coordinates,
            softmax=self.softmax,
            reference_index=None if self.reference_index is None else tuple(self.reference_index),
            queries_per_map=None if self.queries_per_map is None else tuple(self.queries_per_map),
        )
        return Call(self.value, self.points, self.weights, self.reference_points, options, {})

    def checked_call(self) -> Call:
        """The call that these arguments describe, checked through the cache of `parse_call`.

        Raises:
            TypeError, ValueError: as `parse_call`, and for the forms that only the public functions take.
        """
        if self.points.dim() != 5:
            raise ValueError(
                f"{self.points_name}: expected 5 axes [batch, queries, heads, points, spatial_dims], "
                f"got {self.points.dim()} axes {format_shape(self.points)}"
            )
        if self.reference_points is not None and self.reference_index is None:
            raise ValueError(
                "reference_index: expected one number for each point with reference_points, got None"
            )
        return parse_call(
            self.value,
            self._levels(),
            self.points,
            self.weights,
            reference_points=self.reference_points,
            softmax=self.softmax,
            num_points=self.num_points,
            reference_index=self.reference_index,
            interpolation=self.interpolation,
            padding=self.padding,
            coordinates=self.coordinates,
            queries_per_map=self.queries_per_map,
            batch_axis=True,
        )

    def _levels(self) -> tuple[tuple[int, ...], ...]:
        # Locations without an axis of coordinates have no dimensions; the checks say so.
        spatial_dims = max(self.points.shape[-1], 1) if self.points.dim() else 1
        sizes = self.spatial_shapes
        return tuple(
            tuple(sizes[start : start + spatial_dims])
            for start in range(0, len(sizes), spatial_dims)
        )


def to_arguments(call: Call) -> Arguments:
    """A checked call as the arguments of the operator."""
    options = call.options
    return Arguments(
        value=call.value,
        spatial_shapes=[*itertools.chain.from_iterable(options.spatial_shapes)],
        points=call.points,
        weights=call.weights,
        reference_points=call.reference_points,
        reference_index=options.reference_index,
        softmax=options.softmax,
        num_points=options.num_points,
        interpolation=options.interpolation,
        padding=options.padding,
        coordinates=options.coordinates,
        queries_per_map=options.queries_per_map,
    )


@functools.cache
def get_operators() -> tuple[Any, Any]:
    """The overloads of the operator and of its backward; looking one up takes as long as a small kernel."""
    return tuple(getattr(torch.ops.saccade, name).default for name in SCHEMAS)


# --- the reference as the kernel of every device that has no other --------------------------------------


def fallback(*arguments: Any) -> Tensor:
    """The operator by the reference."""
    return reference.execute(Arguments(*arguments).checked_call())


def backward_fallback(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The backward operator by the reference."""
    arguments, output_mask = split_backward_inputs(inputs)
    call = arguments.checked_call()
    check_backward_inputs(grad_output, call, output_mask)
    if not call.has_queries:
        call = arguments.call()  # with all its points, whose gradients have their shape
    gradients = reference.execute_backward(grad_output, call, output_mask)
    return tuple(
        _empty(arguments.points if tensor is None else tensor)
        if gradient is None
        else gradient.contiguous()
        for tensor, gradient in zip(arguments.tensors, gradients, strict=True)
    )


def check_backward_inputs(grad_output: Tensor, call: Call, output_mask: Sequence[bool]) -> None:
    """Raises a ValueError unless these inputs of the backward operator fit the call."""
    value = call.value
    check_shape(
        "grad_output", grad_output, [*call.points.shape[:2], call.points.shape[2] * value.shape[3]]
    )
    if grad_output.dtype != value.dtype:
        raise ValueError(
            f"grad_output: expected the dtype of value, {value.dtype}, got {grad_output.dtype}"
        )
    check_device("grad_output", grad_output, value.device)
    if len(output_mask) != 4:
        raise ValueError(f"output_mask: expected 4 entries, got {len(output_mask)}")
    if output_mask[3] and call.reference_points is None:
        raise ValueError(
            "output_mask: expected no gradient of reference_points without reference_points"
        )


def split_backward_inputs(inputs: Sequence[Any]) -> tuple[Arguments, Sequence[bool]]:
    """The inputs of the backward operator behind `grad_output`: arguments and output mask."""
    *arguments, output_mask = inputs
    return Arguments(*arguments), output_mask


def _empty(like: Tensor) -> Tensor:
    """What the backward operator returns in place of a gradient that is not in the output mask."""
    return like.new_empty(0)


# --- shapes for tracing ----------------------------------------------------------------------------------


def fake(*inputs: Any) -> Tensor:
    """The operator's output without content."""
    arguments = Arguments(*inputs)
    _check_axes_and_devices(arguments)
    batch_size, num_queries, num_heads = arguments.points.shape[:3]
    sizes = (batch_size, num_queries, num_heads * arguments.value.shape[3])
    check_elements({}, sizes)
    return arguments.value.new_empty(sizes)


def backward_fake(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The backward operator's results without content."""
    arguments, output_mask = split_backward_inputs(inputs)
    _check_axes_and_devices(arguments, grad_output)
    return tuple(
        tensor.new_empty(tensor.shape)
        if included and tensor is not None
        else _empty(arguments.points if tensor is None else tensor)
        for tensor, included in zip(arguments.tensors, output_mask, strict=True)
    )


def _check_axes_and_devices(arguments: Arguments, grad_output: Tensor | None = None) -> None:
    # No sizes are compared: a symbolic one would be fixed, or guarded, by that.
    queries = ("batch", "queries")
    for name, tensor, axes in (
        ("value", arguments.value, ("batch", "positions", "heads or 1", "head_dim")),
        ("grad_output", grad_output, (*queries, "heads * head_dim")),
        (arguments.points_name, arguments.points, (*queries, "heads", "points", "spatial_dims")),
        (arguments.weights_name, arguments.weights, (*queries, "heads", "points")),
        (
            "reference_points",
            arguments.reference_points,
            (*queries, "references", "spatial_dims or 2 * spatial_dims"),
        ),
    ):
        if tensor is None:
            continue
        if tensor.dim() != len(axes):
            raise ValueError(
                f"{name}: expected {len(axes)} axes [{', '.join(axes)}], "
                f"got {tensor.dim()} axes {format_shape(tensor)}"
            )
        check_device(name, tensor, arguments.value.device)
