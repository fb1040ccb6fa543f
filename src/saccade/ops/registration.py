"""The contract of the operators: schemas, shapes for tracing, gradients, the fallback kernel.

`saccade::deformable_attention` and its backward are ordinary torch operators. The native library,
where there is one, defines the same two schemas and brings the CPU kernels; the reference serves
every other device, and the CPU where there is no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from saccade import reference
from saccade.arguments import Call, Coordinates, Interpolation, Padding
from saccade.ops import native

_ATTRIBUTES = "SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, int[] num_points, str interpolation, str padding, str coordinates"  # noqa: E501
SCHEMAS = {
    "deformable_attention": f"(Tensor value, {_ATTRIBUTES}) -> Tensor",
    "deformable_attention_backward": (
        f"(Tensor grad_output, Tensor value, {_ATTRIBUTES}, bool[] output_mask)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}

Gradients = tuple[Tensor, Tensor, Tensor]


def _call(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    interpolation: str,
    padding: str,
    coordinates: str,
) -> Call:
    spatial_dims = sampling_locations.shape[-1]
    shapes = [
        tuple(spatial_shapes[start : start + spatial_dims])
        for start in range(0, len(spatial_shapes), spatial_dims)
    ]
    return Call(
        value,
        shapes,
        sampling_locations,
        attention_weights,
        list(num_points),
        cast(Interpolation, interpolation),
        cast(Padding, padding),
        cast(Coordinates, coordinates),
    )


# --- the reference as the kernel of every device that has no other -----------------------------


def _reference_forward(*arguments: Any) -> Tensor:
    return reference.execute(_call(*arguments))


def _reference_backward(grad_output: Tensor, *arguments: Any) -> Gradients:
    *call_arguments, output_mask = arguments
    call = _call(*call_arguments)
    gradients = reference.execute_backward(grad_output, call, output_mask)
    inputs = (call.value, call.sampling_locations, call.attention_weights)
    return cast(
        Gradients,
        tuple(
            _unwanted(given) if gradient is None else gradient.contiguous()
            for given, gradient in zip(inputs, gradients, strict=True)
        ),
    )


def _unwanted(like: Tensor) -> Tensor:
    """What the backward operator returns in place of a gradient that nobody asked for."""
    return like.new_empty(0)


# --- shapes for tracing -------------------------------------------------------------------------


# No sizes are compared: a symbolic one would be fixed, or guarded, by that.
_AXES = {
    "grad_output": ("batch", "queries", "heads * head_dim"),
    "value": ("batch", "positions", "heads or 1", "head_dim"),
    "sampling_locations": ("batch", "queries", "heads", "points", "spatial_dims"),
    "attention_weights": ("batch", "queries", "heads", "points"),
}


def _check_axes_and_devices(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != len(_AXES[name]):
            raise ValueError(
                f"{name}: expected {len(_AXES[name])} axes [{', '.join(_AXES[name])}], "
                f"got {tensor.dim()} axes {list(tensor.shape)}"
            )
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, got {tensor.device}"
            )


def _fake_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    interpolation: str,
    padding: str,
    coordinates: str,
) -> Tensor:
    _check_axes_and_devices(
        value=value, sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    batch_size, num_queries, num_heads = sampling_locations.shape[:3]
    return value.new_empty((batch_size, num_queries, num_heads * value.shape[3]))


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    interpolation: str,
    padding: str,
    coordinates: str,
    output_mask: Sequence[bool],
) -> Gradients:
    _check_axes_and_devices(
        value=value,
        grad_output=grad_output,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    inputs = (value, sampling_locations, attention_weights)
    return cast(
        Gradients,
        tuple(
            given.new_empty(given.shape) if wanted else _unwanted(given)
            for given, wanted in zip(inputs, output_mask, strict=True)
        ),
    )


# --- gradients ----------------------------------------------------------------------------------


def needs_autograd(*tensors: Tensor) -> bool:
    """Whether a call has to pass through autograd, which even to do nothing costs as much as a call.

    That is where a gradient is wanted, where a compiler traces (it shall see the plain call), and
    where someone's `__torch_function__` runs on the way.
    """
    return (
        torch.compiler.is_compiling()
        or has_torch_function_variadic(*tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


class _DeformableAttention(torch.autograd.Function):
    """The operator with its gradient.

    Written out, because what `torch.library.register_autograd` makes of the same two functions
    takes twice the time of a small call.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> Tensor:
        output = _below_autograd(keyset, *inputs)
        value, ctx.spatial_shapes, sampling_locations, attention_weights, *ctx.options = inputs
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, sampling_locations, attention_weights = ctx.saved_tensors
        _, *needed = ctx.needs_input_grad
        output_mask = [needed[0], needed[2], needed[3]]
        arguments = (
            grad_output,
            value,
            ctx.spatial_shapes,
            sampling_locations,
            attention_weights,
            *ctx.options,
            output_mask,
        )
        if needs_autograd(grad_output, value, sampling_locations, attention_weights):
            gradients = BACKWARD_OPERATOR(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                gradients = BACKWARD_OPERATOR(*arguments)
        grad_value, grad_locations, grad_weights = (
            gradient if wanted else None
            for gradient, wanted in zip(gradients, output_mask, strict=True)
        )
        return None, grad_value, None, grad_locations, grad_weights, None, None, None, None


def _below_autograd(keyset: Any, *inputs: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, OPERATOR.redispatch(keyset & torch._C._after_autograd_keyset, *inputs))


def _autograd(keyset: Any, *inputs: Any) -> Tensor:
    """What the dispatcher calls for a tensor that autograd knows."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return cast(Tensor, _DeformableAttention.apply(keyset, *inputs))  # type: ignore[no-untyped-call]
    return _below_autograd(keyset, *inputs)


def _save_for_second_order(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, value, spatial_shapes, sampling_locations, attention_weights, *options = inputs
    ctx.save_for_backward(grad_output, value, sampling_locations, attention_weights)
    ctx.spatial_shapes, ctx.options = spatial_shapes, options


def _backward_of_backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    # Second derivatives are rare (gradient penalties, Hessian products): the written-out gradient
    # of the reference is differentiated by autograd, exact and slow, on every device.
    *options, output_mask = ctx.options
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4)]
    higher_order = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that differentiation stops at these four tensors and does not walk on.
        inputs = [
            saved.view_as(saved) if higher_order else saved.detach() for saved in ctx.saved_tensors
        ]
        for tensor, wanted in zip(inputs, needed, strict=True):
            if wanted and not tensor.requires_grad:
                tensor.requires_grad_()
        grad_output, value, sampling_locations, attention_weights = inputs
        call = _call(value, ctx.spatial_shapes, sampling_locations, attention_weights, *options)
        gradients = reference.execute_backward(grad_output, call, output_mask)
        pairs = [
            (gradient, grad_gradient)
            for gradient, grad_gradient in zip(gradients, grad_gradients, strict=True)
            if gradient is not None and gradient.requires_grad and grad_gradient is not None
        ]
        wanted_inputs = [tensor for tensor, wanted in zip(inputs, needed, strict=True) if wanted]
        found = iter(
            torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                wanted_inputs,
                [grad_gradient for _, grad_gradient in pairs],
                allow_unused=True,
                create_graph=higher_order,
            )
            if pairs
            else [None] * len(wanted_inputs)
        )
    first, second, third, fourth = (next(found) if wanted else None for wanted in needed)
    return first, second, None, third, fourth, None, None, None, None, None


def _register() -> torch.library.Library:
    library = torch.library.Library("saccade", "FRAGMENT")
    if native.failure is not None:
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
    for name, fallback, fake in (
        ("deformable_attention", _reference_forward, _fake_forward),
        ("deformable_attention_backward", _reference_backward, _fake_backward),
    ):
        library.impl(name, fallback, "CompositeExplicitAutograd")
        torch.library.register_fake(f"saccade::{name}", fake, lib=library)
    library.impl("deformable_attention", _autograd, "Autograd", with_keyset=True)
    torch.library.register_autograd(
        "saccade::deformable_attention_backward",
        _backward_of_backward,
        setup_context=_save_for_second_order,
        lib=library,
    )
    return library


# Registrations live as long as this object does.
_library = _register()

# The overloads themselves: looking one up costs as much as a small kernel.
OPERATOR = torch.ops.saccade.deformable_attention.default
BACKWARD_OPERATOR = torch.ops.saccade.deformable_attention_backward.default
