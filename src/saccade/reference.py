"""The definition of deformable attention in plain PyTorch (`docs/definition.md`, executable).

    output[q, m] = sum over points p of  weight[q, m, p] * value[m] at location[q, m, p]

Slow and readable on purpose: gathers, products and sums, no `grid_sample`. It runs wherever torch runs,
is differentiable to any order by autograd, and every faster kernel is tested against it.

Shapes: B maps, Q queries per map, q queries of a slice, M heads, L levels, K points of a level, P points
of all levels, N spatial dimensions, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.call import Call, Options, drop_batch_axis, parse_call
from saccade.checks import SpatialShapes, check_tensor, compute_dtype, has_queries
from saccade.sampling import Corner, corners, offset_step, sampling_locations

# Queries are worked on in slices so that no intermediate tensor has more elements than this
# (a single query of a very large batch excepted).
MAX_INTERMEDIATE_ELEMENTS = 1 << 22

# Of value, points, weights and reference points.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
ALL_GRADIENTS = (True, True, True, True)


def deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    **options: Any,
) -> Tensor:
    """Deformable attention, computed by plain PyTorch operations.

    The arguments, the result, the errors and the precision are those of
    `saccade.deformable_attention`, whose documentation holds here word for word.

    Example:
        >>> import torch, saccade
        >>> y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        >>> value = (10 * x + y).view(1, 16, 1, 1)              # a 4 x 4 map, z(x, y) = 10 x + y
        >>> locations = torch.tensor([[2.0, 2], [1, 2], [2, 1], [1, 1]]).view(1, 1, 1, 1, 4, 2)
        >>> weights = torch.full((1, 1, 1, 1, 4), 0.25)
        >>> saccade.reference.deformable_attention(
        ...     value, [(4, 4)], locations, weights, coordinates="pixel").item()
        16.5
    """
    call = parse_call(value, spatial_shapes, sampling_locations, attention_weights, **options)
    return drop_batch_axis(execute(call), call)


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    **options: Any,
) -> Tensor:
    """Fused deformable attention, computed by plain PyTorch operations.

    The arguments, the result, the errors and the precision are those of
    `saccade.fused_deformable_attention`, whose documentation holds here word for word.

    Example:
        >>> import torch, saccade
        >>> y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        >>> value = (10 * x + y).view(1, 16, 1, 1)              # a 4 x 4 map, z(x, y) = 10 x + y
        >>> reference = torch.tensor([1.5, 1.5]).view(1, 1, 1, 2)
        >>> offsets = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])
        >>> saccade.reference.fused_deformable_attention(
        ...     value, [(4, 4)], reference, offsets.view(1, 1, 1, 1, 4, 2),
        ...     torch.zeros(1, 1, 1, 1, 4), coordinates="pixel").item()
        16.5
    """
    check_tensor("reference_points", reference_points)
    call = parse_call(
        value,
        spatial_shapes,
        sampling_offsets,
        attention_logits,
        reference_points=reference_points,
        softmax=True,
        **options,
    )
    return drop_batch_axis(execute(call), call)


def execute(call: Call) -> Tensor:
    """The operator on a checked call: [B, Q, M * D] in the value's dtype."""
    if not call.has_queries:
        batch_size, num_queries, num_heads = call.points.shape[:3]
        return _zeros((batch_size, num_queries, num_heads * call.value.shape[3]), call.value, call)
    locations, weights = _locations_and_weights(call)
    outputs = [
        _execute_maps(maps, call.options)
        for maps, _ in _maps(call.value, locations, weights, call)
        if has_queries(maps.locations.shape[:2])
    ]
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def execute_backward(
    grad_output: Tensor, call: Call, output_mask: Sequence[bool] = ALL_GRADIENTS
) -> Gradients:
    """The gradients of value, points, weights and reference points, written out.

    A gradient whose entry of `output_mask` is False is None, and so is that of reference points which a
    call does not have. All operations are differentiable, so that second derivatives are derivatives of
    this function.

    Args:
        grad_output (Tensor[B, Q, M * D]): the gradient of the output.
        call: the call whose output that is.
        output_mask: which of the four gradients are computed.
    """
    value_mask, points_mask, weights_mask, reference_mask = output_mask
    if not call.has_queries:
        value, points, weights, references = (
            _zeros(tensor.shape, tensor, call, grad_output)
            if included and tensor is not None
            else None
            for tensor, included in zip(
                (call.value, call.points, call.weights, call.reference_points),
                output_mask,
                strict=True,
            )
        )
        return value, points, weights, references
    locations, weights = _locations_and_weights(call)  # [B, Q, M, P, N], [B, Q, M, P]
    grads_value, grads_locations, grads_weights = [], [], []
    for maps, queries in _maps(call.value, locations, weights, call):
        if not has_queries(maps.locations.shape[:2]):
            grads_value.append(torch.zeros_like(maps.value))
            continue
        grad_value, grad_locations, grad_weights = _execute_backward_maps(
            grad_output[:, queries],
            maps,
            call.options,
            value_mask,
            points_mask or weights_mask or reference_mask,
        )
        grads_value.append(grad_value)
        grads_locations.append(grad_locations)
        grads_weights.append(grad_weights)
    grad_locations, grad_weights = torch.cat(grads_locations, 1), torch.cat(grads_weights, 1)
    if call.options.softmax and weights_mask:
        share = weights * grad_weights  # [B, Q, M, P]
        grad_weights = share - weights * share.sum(-1, keepdim=True)
    grad_points = grad_locations
    grad_reference_points: Tensor | None = None
    if call.reference_points is not None and (points_mask or reference_mask):
        grad_points, grad_reference_points = _grad_offsets_and_reference_points(
            grad_locations, call
        )
    return (
        torch.cat(grads_value) if value_mask else None,
        grad_points.to(call.points.dtype) if points_mask else None,
        grad_weights.to(call.weights.dtype) if weights_mask else None,
        grad_reference_points if reference_mask else None,
    )


def _zeros(shape: Sequence[int], like: Tensor, call: Call, *others: Tensor) -> Tensor:
    """Zeros in the dtype of `like` for a call without queries; they depend on all its tensors, so that
    each has a gradient, without work on any.
    """
    tensors = (call.value, call.points, call.weights, call.reference_points, *others)
    parts = [tensor[:, :0].sum().to(like.dtype) for tensor in tensors if tensor is not None]
    total = torch.stack(parts).sum().expand(shape)
    # contiguous() would keep the strides of 0 of a tensor without elements.
    return total.clone(memory_format=torch.contiguous_format)


# --- from what a call predicts to locations and weights, and back ------------------------------------


def _locations_and_weights(call: Call) -> tuple[Tensor, Tensor]:
    """Sampling locations [B, Q, M, P, N] and attention weights [B, Q, M, P].

    They keep the caller's dtype where the caller gave them, and are in the compute dtype where they are
    made here.
    """
    locations, weights = call.points, call.weights
    if call.reference_points is not None:
        references, offsets, finite = _finite_references_and_offsets(call)
        locations = sampling_locations(
            references,
            offsets,
            call.options.spatial_shapes,
            call.options.num_points,
            reference_index=call.options.reference_index,
            coordinates=call.options.coordinates,
        )
        locations = torch.where(finite, locations, torch.nan)
    if call.options.softmax:
        weights = weights.to(compute_dtype(call.value)).softmax(-1)
    return locations, weights


def _finite_references_and_offsets(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Reference points and offsets with zeros in place of what is not finite, and which points are finite.

    A point without a finite location takes no part and gets gradients of 0: an infinite box times that 0
    would not be a number.

    Returns:
        Tensor[B, Q, R, N or 2 N], Tensor[B, Q, M, P, N], Tensor[B, Q, M, P, 1] (bool).
    """
    assert call.reference_points is not None
    dtype = compute_dtype(call.value)
    references, offsets = call.reference_points.to(dtype), call.points.to(dtype)
    finite_references = references.isfinite().all(-1, keepdim=True)  # [B, Q, R, 1]
    finite_offsets = offsets.isfinite().all(-1, keepdim=True)  # [B, Q, M, P, 1]
    finite = finite_offsets & finite_references[:, :, call.options.reference_index][:, :, None]
    references = torch.where(finite_references, references, 0)
    return references, torch.where(finite_offsets, offsets, 0), finite


def _grad_offsets_and_reference_points(grad_locations: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The chain rule of `location = reference + offset * step (* size of the box)`."""
    references, offsets, _ = _finite_references_and_offsets(call)
    options = call.options
    index = list(options.reference_index or ())
    spatial_dims = offsets.shape[-1]
    boxes = references.shape[-1] > spatial_dims
    step = offset_step(
        options.spatial_shapes, options.num_points, options.coordinates, boxes=boxes, like=offsets
    )  # [P, N or 1]
    grad_offsets = grad_locations * step  # [B, Q, M, P, N]
    grad_starts = grad_locations.sum(2)  # [B, Q, P, N], summed over the heads
    if boxes:
        point_references = references[:, :, index][:, :, None]  # [B, Q, 1, P, 2 N]
        grad_sizes = (grad_offsets * offsets).sum(2)  # [B, Q, P, N]
        grad_offsets = grad_offsets * point_references[..., spatial_dims:]
        grad_starts = torch.cat((grad_starts, grad_sizes), -1)  # [B, Q, P, 2 N]
    index_tensor = torch.tensor(index, device=references.device)[:, None].expand_as(grad_starts)
    # Not by index_add: see _row_index.
    grad_references = torch.zeros_like(references).scatter_add(2, index_tensor, grad_starts)
    assert call.reference_points is not None
    return grad_offsets, grad_references.to(call.reference_points.dtype)


# --- the operator on locations and weights --------------------------------------------------------------


class _Maps(NamedTuple):
    """Maps that all have the same number of queries."""

    value: Tensor  # [B, S, M or 1, D]
    locations: Tensor  # [B, Q, M, P, N]
    weights: Tensor  # [B, Q, M, P]


def _maps(
    value: Tensor, locations: Tensor, weights: Tensor, call: Call
) -> Iterator[tuple[_Maps, slice]]:
    """All maps at once with all queries; with `queries_per_map`, map after map with its own queries."""
    if call.options.queries_per_map is None:
        yield _Maps(value, locations, weights), slice(None)
        return
    begin = 0
    for batch_index, count in enumerate(call.options.queries_per_map):
        queries = slice(begin, begin + count)
        begin += count
        yield (
            _Maps(value[batch_index : batch_index + 1], locations[:, queries], weights[:, queries]),
            queries,
        )


def _execute_maps(maps: _Maps, options: Options) -> Tensor:
    slices = []
    for queries in _query_slices(maps, options):
        total = None
        for level in _levels(maps, options, queries):
            # z(p), what each point reads: [B, q, M, K, D]
            sampled = sum(
                corner.weight[..., None] * _gather(level.value, corner)
                for corner in corners(level.locations, level.shape, options)
            )
            # Summed over the points of this level: [B, q, M, D]
            attended = (level.weights[..., None] * sampled).sum(3)
            total = attended if total is None else total + attended
        assert total is not None
        slices.append(total.flatten(2))
    # [B, Q, M * D]; not a view, which autograd would not let the caller edit in place.
    return torch.cat(slices, 1).to(maps.value.dtype)


def _execute_backward_maps(
    grad_output: Tensor, maps: _Maps, options: Options, value_mask: bool, points_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights; the content of one that is not computed is undefined."""
    dtype = compute_dtype(maps.value)
    batch_size, num_queries, num_heads = maps.locations.shape[:3]
    head_dim = maps.value.shape[3]
    grad_output = grad_output.reshape(batch_size, num_queries, num_heads, head_dim).to(dtype)
    grad_levels = [
        torch.zeros_like(level_value, dtype=dtype)
        for level_value in maps.value.split(_level_sizes(options), 1)
    ]
    grad_locations, grad_weights = [], []
    for queries in _query_slices(maps, options):
        grad = grad_output[:, queries, :, None, :]  # [B, q, M, 1, D]
        for index, level in enumerate(_levels(maps, options, queries)):
            grad_weight = torch.zeros_like(level.weights)  # [B, q, M, K]
            grad_location = torch.zeros_like(level.locations)  # [B, q, M, K, N]
            for corner in corners(level.locations, level.shape, options):
                if value_mask:
                    scattered = (corner.weight * level.weights)[..., None] * grad
                    grad_levels[index] = _scatter(grad_levels[index], corner, scattered)
                if not points_mask:
                    continue
                # <gradient of the output, value at this corner>: [B, q, M, K]
                dot = (grad * _gather(level.value, corner)).sum(-1)
                moved = corner.weight_gradient * (level.weights * dot)[..., None]
                # A corner outside takes no part, not even with infinite numbers.
                grad_weight = grad_weight + torch.where(corner.inside, corner.weight * dot, 0)
                grad_location = grad_location + torch.where(corner.inside[..., None], moved, 0)
            grad_locations.append(grad_location)
            grad_weights.append(grad_weight)
    num_levels = len(grad_levels)

    def join(parts: list[Tensor]) -> Tensor:
        # Slices of queries (axis 1), each with all its levels (axis 3).
        slices = [
            torch.cat(parts[first : first + num_levels], 3)
            for first in range(0, len(parts), num_levels)
        ]
        return torch.cat(slices, 1)

    return (
        torch.cat(grad_levels, 1).to(maps.value.dtype),
        join(grad_locations).to(maps.locations.dtype),
        join(grad_weights).to(maps.weights.dtype),
    )


class _Level(NamedTuple):
    """One level of the maps and the points of a slice of queries that read it; in the compute dtype."""

    value: Tensor  # [B, H*W, M or 1, D]
    shape: tuple[int, ...]  # (H, W)
    locations: Tensor  # [B, q, M, K, N], (x, y)
    weights: Tensor  # [B, q, M, K]


def _level_sizes(options: Options) -> list[int]:
    return [math.prod(shape) for shape in options.spatial_shapes]


def _query_slices(maps: _Maps, options: Options) -> Iterator[slice]:
    batch_size, num_queries, num_heads = maps.locations.shape[:3]
    elements_per_query = batch_size * num_heads * max(options.num_points) * maps.value.shape[3]
    step = max(1, MAX_INTERMEDIATE_ELEMENTS // max(1, elements_per_query))
    # At least one slice, so that a traced call without queries still yields its empty output.
    for begin in range(0, max(1, num_queries), step):
        yield slice(begin, begin + step)


def _levels(maps: _Maps, options: Options, queries: slice) -> Iterator[_Level]:
    dtype = compute_dtype(maps.value)
    levels = zip(
        maps.value.split(_level_sizes(options), 1),
        options.spatial_shapes,
        maps.locations[:, queries].to(dtype).split(list(options.num_points), 3),
        maps.weights[:, queries].to(dtype).split(list(options.num_points), 3),
        strict=True,
    )
    for value, shape, locations, weights in levels:
        # Converted before it is gathered from, so that its gradient is summed in the compute dtype.
        yield _Level(value.to(dtype).contiguous(), shape, locations, weights)


def _gather(value: Tensor, corner: Corner) -> Tensor:
    """The value rows at a corner, 0 outside the map: [B, q, M, K, D]."""
    rows = value.flatten(0, 2).gather(0, _row_index(value, corner.row))
    # Masked, not multiplied by 0: an infinite value must not leak from a row that no point reads.
    rows = rows.view(*corner.row.shape, value.shape[3])
    return rows.masked_fill(~corner.inside[..., None], 0)


def _scatter(grad_value: Tensor, corner: Corner, rows: Tensor) -> Tensor:
    """`grad_value` with `rows` added at a corner: the transpose of `_gather`."""
    rows = rows.masked_fill(~corner.inside[..., None], 0)
    index = _row_index(grad_value, corner.row)
    return grad_value.flatten(0, 2).scatter_add(0, index, rows.flatten(0, 3)).view(grad_value.shape)


def _row_index(value: Tensor, row: Tensor) -> Tensor:
    """Where each point reads in `value.flatten(0, 2)`: [B * q * M * K, D].

    For gather and scatter_add, because Inductor computes wrong forward-mode derivatives of `value[index]`,
    `index_add` and `index_put`.
    """
    batch_size, num_positions, num_heads, head_dim = value.shape
    batch = torch.arange(batch_size, device=row.device).view(-1, 1, 1, 1)
    head = torch.arange(row.shape[2], device=row.device).view(1, 1, -1, 1)
    # A single head serves all heads.
    index = (batch * num_positions + row) * num_heads + (head if num_heads > 1 else 0)
    return index.view(-1, 1).expand(-1, head_dim)
