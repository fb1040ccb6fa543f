"""Autograd of the operator: first derivatives by its backward, higher ones and forward mode by the reference."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from saccade import reference
from saccade.ops import schema
from saccade.ops.schema import Arguments, get_operators, split_backward_inputs


def transforms_are_active() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode derivatives is active.

    Only the reference supports them: the operator has a backward only, and would drop a tangent without
    an error.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call has to pass through autograd, which takes as long as a small kernel.

    That is where a derivative is asked for, and where a `__torch_function__` of a subclass or a mode has
    to run.
    """
    return (
        transforms_are_active()
        or has_torch_function_variadic(*tensors)
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
    )


_NO_GRADIENTS = Arguments(*[None] * len(Arguments._fields))  # type: ignore[arg-type]


def compute_gradients(
    grad_output: Tensor, arguments: Arguments, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of value, points, weights and reference points that `output_mask` names, else None."""
    # Not by the cached `get_operators`, of which torch.compile warns.
    operator = torch.ops.saccade.deformable_attention_backward.default
    if torch.compiler.is_compiling() or needs_autograd(grad_output, *arguments.tensors):
        results = operator(grad_output, *arguments, output_mask)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            results = operator(grad_output, *arguments, output_mask)
    return tuple(
        result if included else None for result, included in zip(results, output_mask, strict=True)
    )


_unpack_dual = torch._VF._unpack_dual  # looking it up takes as long as the call


class _TangentError(Exception):
    """A tensor that autograd records carries a tangent."""


class _FunctionWithoutTangents(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # torch calls this after `forward` where an input has a tangent.
        raise _TangentError


class DeformableAttention(_FunctionWithoutTangents):
    """The operator with its gradient. The inputs are kept for the backward, nothing else.

    Written out, because what `torch.library.register_autograd` makes of the same two functions takes
    twice the time of a small call, and drops tangents without an error.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> Tensor:
        operator, _ = get_operators()
        output = _below_autograd(operator, keyset, *inputs)
        arguments = Arguments(*inputs)
        ctx.save_for_backward(*arguments.tensors)
        ctx.arguments = _without_tensors(arguments)
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        needed = Arguments(*ctx.needs_input_grad[1:])  # the first input is the keyset
        output_mask = [bool(tensor) for tensor in needed.tensors]
        arguments = _with_tensors(ctx.arguments, ctx.saved_tensors)
        gradients = compute_gradients(grad_output, arguments, output_mask)
        return (None, *_with_tensors(_NO_GRADIENTS, gradients))


class DeformableAttentionBackward(_FunctionWithoutTangents):
    """The backward operator with its gradient, for second and higher derivatives.

    They are rare (gradient penalties, Hessian products): the written-out gradient of the reference is
    differentiated by autograd, exact and slow, on every device.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _, operator = get_operators()
        results = _below_autograd(operator, keyset, *inputs)
        grad_output, *rest = inputs
        arguments, ctx.output_mask = split_backward_inputs(rest)
        ctx.save_for_backward(grad_output, *arguments.tensors)
        ctx.arguments = _without_tensors(arguments)
        ctx.set_materialize_grads(False)
        return cast("tuple[Tensor, ...]", results)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor | None) -> tuple[Any, ...]:
        _, needs_grad_output, *needs_arguments, _ = ctx.needs_input_grad
        needed = [needs_grad_output, *Arguments(*needs_arguments).tensors]
        higher_order = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that differentiation stops at these tensors and does not walk on.
            inputs: list[Any] = [
                saved if saved is None else saved.view_as(saved) if higher_order else saved.detach()
                for saved in ctx.saved_tensors
            ]
            for tensor, is_needed in zip(inputs, needed, strict=True):
                if is_needed and not tensor.requires_grad:
                    tensor.requires_grad_()
            grad_output, *tensors = inputs
            call = _with_tensors(ctx.arguments, tensors).call()
            gradients = reference.execute_backward(grad_output, call, ctx.output_mask)
            pairs = [
                (gradient, grad_gradient)
                for gradient, grad_gradient in zip(gradients, grad_gradients, strict=True)
                if gradient is not None and gradient.requires_grad and grad_gradient is not None
            ]
            needed_inputs = [
                tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed
            ]
            results = iter(
                torch.autograd.grad(
                    [gradient for gradient, _ in pairs],
                    needed_inputs,
                    [grad_gradient for _, grad_gradient in pairs],
                    allow_unused=True,
                    create_graph=higher_order,
                )
                if pairs
                else [None] * len(needed_inputs)
            )
        derivatives = [next(results) if is_needed else None for is_needed in needed]
        arguments = _with_tensors(_NO_GRADIENTS, derivatives[1:])
        return (None, derivatives[0], *arguments, None)


# --- what the dispatcher calls on its Autograd key --------------------------------------------------------


def autograd_kernel(keyset: Any, *inputs: Any) -> Tensor:
    """The operator on tensors that may need a derivative."""
    operator, _ = get_operators()
    return cast(
        Tensor, _choose_kernel(operator, DeformableAttention, schema.fallback, keyset, inputs)
    )


def backward_autograd_kernel(keyset: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """The backward operator on tensors that may need a derivative."""
    _, operator = get_operators()
    return cast(
        "tuple[Tensor, ...]",
        _choose_kernel(
            operator, DeformableAttentionBackward, schema.backward_fallback, keyset, inputs
        ),
    )


def _choose_kernel(
    operator: Any, function: Any, fallback: Any, keyset: Any, inputs: tuple[Any, ...]
) -> Any:
    if transforms_are_active():
        return _outside_dynamo(fallback)(*inputs)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        try:
            return function.apply(keyset, *inputs)
        except _TangentError:
            return _outside_dynamo(fallback)(*inputs)
    if _have_tangents(inputs):
        return _outside_dynamo(fallback)(*inputs)
    return _below_autograd(operator, keyset, *inputs)


def _outside_dynamo(function: Any) -> Any:
    # The compiler looks at every frame while it runs a function, and cannot read these: functorch holds
    # their tensors. Nothing is compiled before torch._dynamo is imported, which takes seconds.
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _have_tangents(inputs: tuple[Any, ...]) -> bool:
    # A traced or exported program opens a level of which `torch.autograd.forward_ad` does not know.
    for each in inputs:  # noqa: SIM110, a generator takes twice the time
        if isinstance(each, Tensor) and _unpack_dual(each, 0)[1] is not None:
            return True
    return False


def _below_autograd(operator: Any, keyset: Any, *inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _with_tensors(arguments: Arguments, tensors: Any) -> Arguments:
    value, points, weights, reference_points = tensors
    return arguments._replace(
        value=value, points=points, weights=weights, reference_points=reference_points
    )


def _without_tensors(arguments: Arguments) -> Arguments:
    return _with_tensors(arguments, (None, None, None, None))
