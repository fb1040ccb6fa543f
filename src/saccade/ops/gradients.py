"""Autograd of the operators: first derivatives by their backwards, higher ones by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from saccade.ops.contract import Operator


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


def autograd_kernel(operator: Operator) -> Callable[..., Tensor]:
    """What the dispatcher calls for a tensor that autograd knows.

    Written out, because what `torch.library.register_autograd` makes of the same two functions
    takes twice the time of a small call.
    """
    overload = getattr(torch.ops.saccade, operator.name).default
    backward_overload = getattr(torch.ops.saccade, operator.backward_name).default
    # Keyset, value, spatial_shapes, then the points: which of all inputs are the tensors.
    tensors_at = (1, *range(3, 2 + operator.num_tensors))

    class Attention(torch.autograd.Function):
        """The operator with its gradient. Kept for the backward: the inputs, nothing else."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Tensor:
            output = _below_autograd(overload, keyset, *inputs)
            ctx.save_for_backward(*operator.tensors(inputs))
            ctx.others = (inputs[1], *inputs[1 + operator.num_tensors :])
            return output

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            value, *points = ctx.saved_tensors
            spatial_shapes, *options = ctx.others
            output_mask = [ctx.needs_input_grad[index] for index in tensors_at]
            arguments = (grad_output, value, spatial_shapes, *points, *options, output_mask)
            if needs_autograd(grad_output, value, *points):
                gradients = backward_overload(*arguments)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    gradients = backward_overload(*arguments)
            found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            for index, gradient, wanted in zip(tensors_at, gradients, output_mask, strict=True):
                found[index] = gradient if wanted else None
            return tuple(found)

    def kernel(keyset: Any, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return cast(Tensor, Attention.apply(keyset, *inputs))  # type: ignore[no-untyped-call]
        return _below_autograd(overload, keyset, *inputs)

    return kernel


def _below_autograd(overload: Any, keyset: Any, *inputs: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs))


def save_for_second_order(operator: Operator) -> Callable[..., None]:
    """What the derivative of the backward needs."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, *arguments = inputs
        ctx.save_for_backward(grad_output, *operator.tensors(arguments))
        ctx.arguments = operator.replaced(arguments, (None,) * operator.num_tensors)  # type: ignore[arg-type]

    return save


def backward_of_backward(operator: Operator) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative of the backward.

    Second derivatives are rare (gradient penalties, Hessian products): the written-out gradient of
    the reference is differentiated by autograd, exact and slow, on every device.
    """
    tensors_at = (0, 1, *range(3, 2 + operator.num_tensors))

    def differentiate(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[index] for index in tensors_at]
        higher_order = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that differentiation stops at these tensors and does not walk on.
            inputs = [
                saved.view_as(saved) if higher_order else saved.detach()
                for saved in ctx.saved_tensors
            ]
            for tensor, wanted in zip(inputs, needed, strict=True):
                if wanted and not tensor.requires_grad:
                    tensor.requires_grad_()
            grad_output, *tensors = inputs
            *arguments, output_mask = operator.replaced(ctx.arguments, tensors)
            gradients = operator.execute_backward(
                grad_output, operator.understood(arguments), output_mask
            )
            pairs = [
                (gradient, grad_gradient)
                for gradient, grad_gradient in zip(gradients, grad_gradients, strict=True)
                if gradient is not None and gradient.requires_grad and grad_gradient is not None
            ]
            wanted_inputs = [
                tensor for tensor, wanted in zip(inputs, needed, strict=True) if wanted
            ]
            derivatives = iter(
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
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for index, wanted in zip(tensors_at, needed, strict=True):
            found[index] = next(derivatives) if wanted else None
        return tuple(found)

    return differentiate
