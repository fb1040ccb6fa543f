"""Where queries look: from reference points and offsets to sampling locations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """Where each query looked and how much each point counted: `return_sampling=True` of a module.

    The points of all levels lie flat, level after level (P in all).
    `saccade.deformable_attention` on the module's value with these locations and weights gives the
    module's result before its output projection.
    """

    reference_points: Tensor
    """[B, Q, 1 or L, N or 2 N]: (x, y) or (x, y, width, height), normalized to the map; in one
    dimension (x) or (x, width), in three (x, y, z) or (x, y, z, width, height, depth)."""
    sampling_offsets: Tensor
    """[B, Q, M, P, N]: (x, y), in pixels of their level (points) or in parts of the box (boxes)."""
    sampling_locations: Tensor
    """[B, Q, M, P, N]: (x, y), normalized: 0 and 1 are the outer edges of the map."""
    attention_weights: Tensor
    """[B, Q, M, P]: positive, sum to 1 over the points of a head."""


def sampling_locations(
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Sequence[tuple[int, ...]],
    num_points: Sequence[int],
) -> Tensor:
    """Sampling locations from reference points or boxes and predicted offsets.

    Args:
        reference_points (Tensor[B, Q, 1 or L, N or 2 N]): normalized (x), (x, y) or (x, y, z), or
            boxes: the centre, then the size along the same axes.
        sampling_offsets (Tensor[B, Q, M, P, N]): (x), (x, y) or (x, y, z) of each point, all levels
            flat.
        spatial_shapes: `(width,)`, `(height, width)` or `(depth, height, width)` of each of the L
            levels.
        num_points: points of each level, L numbers with the sum P.

    Returns:
        Tensor[B, Q, M, P, N], normalized. Points: reference + offset / (W_l, H_l). Boxes:
        centre + offset * (0.5 / K_l) * (width, height).

    Raises:
        ValueError: `reference_points` or `spatial_shapes` does not fit the offsets.

    Source:
        Zhu et al., Deformable DETR, section 4.1 and appendix A.3, https://arxiv.org/abs/2010.04159

    Example:
        >>> import torch
        >>> from saccade.sampling import sampling_locations
        >>> reference = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)
        >>> offset = torch.tensor([1.0, -1.0]).view(1, 1, 1, 1, 2)      # one pixel right, one up
        >>> sampling_locations(reference, offset, [(4, 8)], [1]).flatten().tolist()
        [0.625, 0.25]
    """
    batch_size, num_queries = sampling_offsets.shape[:2]
    num_levels, spatial_dims = len(spatial_shapes), sampling_offsets.shape[-1]
    if any(len(shape) != spatial_dims for shape in spatial_shapes):
        raise ValueError(
            f"spatial_shapes: expected {spatial_dims} sizes for each level, as many as the last axis "
            f"of sampling_offsets {list(sampling_offsets.shape)} has, got {list(spatial_shapes)}"
        )
    coordinates = reference_points.shape[-1] if reference_points.dim() == 4 else 0
    if (
        coordinates not in (spatial_dims, 2 * spatial_dims)
        or reference_points.shape[:2] != sampling_offsets.shape[:2]
        or reference_points.shape[2] not in (1, num_levels)
    ):
        raise ValueError(
            f"reference_points: expected [{batch_size}, {num_queries}, 1 or {num_levels}, "
            f"{spatial_dims} or {2 * spatial_dims}], got {list(reference_points.shape)}"
        )
    if reference_points.shape[2] > 1:
        level_of_point = [level for level, count in enumerate(num_points) for _ in range(count)]
        reference_points = reference_points[:, :, level_of_point]
    reference_points = reference_points[:, :, None]  # a head axis: [B, Q, 1, 1 or P, N or 2 N]
    if coordinates == spatial_dims:
        step = 1 / torch.tensor(
            [
                shape[::-1]  # a location is (x, y), a shape is (H, W)
                for shape, count in zip(spatial_shapes, num_points, strict=True)
                for _ in range(count)
            ],
            dtype=sampling_offsets.dtype,
            device=sampling_offsets.device,
        )
        return reference_points + sampling_offsets * step
    share = torch.tensor(
        [0.5 / count for count in num_points for _ in range(count)],
        dtype=sampling_offsets.dtype,
        device=sampling_offsets.device,
    )
    centre, extent = reference_points[..., :spatial_dims], reference_points[..., spatial_dims:]
    return centre + sampling_offsets * share[:, None] * extent


def directions(count: int, spatial_dims: int) -> Tensor:
    """Where the heads of a module look before it has learned anything, spread evenly.

    Returns:
        Tensor[count, N], the longest coordinate of each 1 or -1. In two dimensions they divide the
        circle, as in the Deformable-DETR family; on a line they go right and left by turns; in
        three they lie evenly on a sphere (a Fibonacci lattice).

    Example:
        >>> from saccade.sampling import directions
        >>> directions(4, 1).flatten().tolist()
        [1.0, -1.0, 1.0, -1.0]
    """
    number = torch.arange(count, dtype=torch.float32)
    if spatial_dims == 1:
        return (1 - 2 * (number % 2))[:, None]
    if spatial_dims == 2:
        angle = number * (2 * math.pi / count)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
    else:
        # Heights at equal distances, each a golden angle on from the last.
        height = 1 - (2 * number + 1) / count
        angle = number * (math.pi * (3 - math.sqrt(5)))
        radius = (1 - height**2).sqrt()
        direction = torch.stack((radius * angle.cos(), radius * angle.sin(), height), -1)
    return direction / direction.abs().amax(-1, keepdim=True)
