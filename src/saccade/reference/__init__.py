"""The definition of deformable attention in plain PyTorch (`docs/definition.md`, executable).

Slow and readable on purpose: gathers, products and sums, no `grid_sample`. Runs wherever torch
runs, is differentiable to any order by autograd, and is what every faster kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from saccade.arguments import Options, of_queries, understand, understand_fused
from saccade.checks import Coordinates, Interpolation, Padding, SpatialShapes
from saccade.reference.fused import execute_fused as execute_fused
from saccade.reference.fused import execute_fused_backward as execute_fused_backward
from saccade.reference.operator import execute as execute
from saccade.reference.operator import execute_backward as execute_backward


def deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
    queries_per_map: Sequence[int] | Tensor | None = None,
    value_padding_mask: Tensor | None = None,
) -> Tensor:
    """Deformable attention, computed by plain PyTorch operations.

    The arguments, the result, the errors and the precision are those of
    `saccade.deformable_attention`, whose documentation holds here word for word.

    Example:
        >>> import torch, saccade
        >>> value = torch.arange(16.0).view(1, 16, 1, 1)        # a 4 x 4 map, z(x, y) = 4 y + x
        >>> locations = torch.tensor([[2.0, 2], [1, 2], [2, 1], [1, 1]]).view(1, 1, 1, 1, 4, 2)
        >>> weights = torch.full((1, 1, 1, 1, 4), 0.25)
        >>> saccade.reference.deformable_attention(
        ...     value, [(4, 4)], locations, weights, coordinates="pixel").item()
        7.5
    """
    options = Options(
        spatial_shapes, num_points, interpolation, padding, coordinates, queries_per_map
    )
    call = understand(value, sampling_locations, attention_weights, options, value_padding_mask)
    return of_queries(call, execute(call))


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    reference_index: Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
    queries_per_map: Sequence[int] | Tensor | None = None,
    value_padding_mask: Tensor | None = None,
) -> Tensor:
    """Fused deformable attention, computed by plain PyTorch operations.

    The arguments, the result, the errors and the precision are those of
    `saccade.fused_deformable_attention`, whose documentation holds here word for word.

    Example:
        >>> import torch, saccade
        >>> value = torch.arange(16.0).view(1, 16, 1, 1)        # a 4 x 4 map, z(x, y) = 4 y + x
        >>> reference = torch.tensor([1.5, 1.5]).view(1, 1, 1, 2)
        >>> offsets = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])
        >>> saccade.reference.fused_deformable_attention(
        ...     value, [(4, 4)], reference, offsets.view(1, 1, 1, 1, 4, 2),
        ...     torch.zeros(1, 1, 1, 1, 4), coordinates="pixel").item()
        7.5
    """
    options = Options(
        spatial_shapes, num_points, interpolation, padding, coordinates, queries_per_map
    )
    call = understand_fused(
        value,
        reference_points,
        sampling_offsets,
        attention_logits,
        options,
        reference_index,
        value_padding_mask,
    )
    return of_queries(call, execute_fused(call))
