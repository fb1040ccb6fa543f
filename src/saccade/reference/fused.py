"""The fused operator: locations and attention weights are made here, then it is the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.arguments import Call, FusedCall
from saccade.reference.operator import compute_dtype_of, execute, execute_backward
from saccade.sampling import offset_step, sampling_locations


def execute_fused(call: FusedCall) -> Tensor:
    """The operator on an understood fused call: [B, Q, M * D] in the value's dtype."""
    return execute(_unfused(call))


def execute_fused_backward(
    grad_output: Tensor, call: FusedCall, output_mask: Sequence[bool] = (True,) * 4
) -> tuple[Tensor | None, ...]:
    """The gradients (value, reference_points, sampling_offsets, attention_logits), written out.

    A gradient whose entry of `output_mask` is False is None. Made of differentiable operations, so
    second derivatives are derivatives of this function.
    """
    unfused = _unfused(call)
    points_wanted = any(output_mask[1:])
    grad_value, grad_locations, grad_weights = execute_backward(
        grad_output, unfused, (output_mask[0], points_wanted, points_wanted)
    )
    found: list[Tensor | None] = [grad_value, None, None, None]
    if grad_locations is not None and grad_weights is not None:
        weights = unfused.attention_weights
        share = weights * grad_weights
        found[3] = share - weights * share.sum(-1, keepdim=True)
        found[1], found[2] = _grad_references_and_offsets(grad_locations, call)
    given = (call.value, call.reference_points, call.sampling_offsets, call.attention_logits)
    return tuple(
        gradient.to(like.dtype) if gradient is not None and wanted else None
        for gradient, like, wanted in zip(found, given, output_mask, strict=True)
    )


def _unfused(call: FusedCall) -> Call:
    references, offsets, finite = _finite_points(call)
    locations = sampling_locations(
        references,
        offsets,
        call.spatial_shapes,
        call.num_points,
        reference_index=call.reference_index,
        coordinates=call.coordinates,
    )
    logits = call.attention_logits.to(compute_dtype_of(call.value))
    return Call(
        call.value,
        call.spatial_shapes,
        torch.where(finite, locations, torch.nan),
        logits.softmax(-1),
        *call[6:],
    )


def _finite_points(call: FusedCall) -> tuple[Tensor, Tensor, Tensor]:
    """References and offsets with zeros for what is not finite, and where a point has neither.

    A point without a finite location takes no part, and gets gradients of 0: an infinite box times
    that 0 would be none.
    """
    dtype = compute_dtype_of(call.value)
    references, offsets = call.reference_points.to(dtype), call.sampling_offsets.to(dtype)
    finite_references = references.isfinite().all(-1, keepdim=True)
    finite_offsets = offsets.isfinite().all(-1, keepdim=True)
    finite = finite_offsets & finite_references[:, :, call.reference_index][:, :, None]
    references = torch.where(finite_references, references, 0)
    return references, torch.where(finite_offsets, offsets, 0), finite


def _grad_references_and_offsets(grad_locations: Tensor, call: FusedCall) -> tuple[Tensor, Tensor]:
    references, offsets, _ = _finite_points(call)
    spatial_dims = offsets.shape[-1]
    boxes = references.shape[-1] > spatial_dims
    step = offset_step(
        call.spatial_shapes, call.num_points, call.coordinates, boxes=boxes, like=offsets
    )
    grad_offsets = grad_locations * step
    grad_of_points = grad_locations.sum(2)  # over the heads: [B, Q, P, N]
    if boxes:
        of_point = references[:, :, call.reference_index][:, :, None]
        grad_sizes = (grad_offsets * offsets).sum(2)
        grad_offsets = grad_offsets * of_point[..., spatial_dims:]
        grad_of_points = torch.cat((grad_of_points, grad_sizes), -1)
    index = torch.tensor(call.reference_index, device=references.device)
    return torch.zeros_like(references).index_add(2, index, grad_of_points), grad_offsets
