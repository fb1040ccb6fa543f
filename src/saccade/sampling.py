"""Where queries look: from reference points and offsets to sampling locations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checks import Coordinates, parse_reference_index


class Sampling(NamedTuple):
    """Where each query looked and how much each point counted: `return_sampling=True` of a module.

    With `queries_per_map` the T queries of all maps take the place of batch and queries.

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
    *,
    reference_index: Sequence[int] | None = None,
    coordinates: Coordinates = "normalized",
) -> Tensor:
    """Sampling locations from reference points or boxes and predicted offsets.

    Args:
        reference_points (Tensor[B, Q, R, N or 2 N]): (x), (x, y) or (x, y, z), or boxes: the centre,
            then the size along the same axes; R is 1 or L, one for each level, or any number with
            `reference_index`. Other axes than B and Q may come before R, in both tensors alike.
        sampling_offsets (Tensor[B, Q, M, P, N]): (x), (x, y) or (x, y, z) of each point, all levels
            flat.
        spatial_shapes: `(width,)`, `(height, width)` or `(depth, height, width)` of each of the L
            levels.
        num_points: points of each level, L numbers with the sum P.
        reference_index: for each of the P points the number of the reference it starts from.
        coordinates: of reference points and locations, as in `saccade.deformable_attention`.

    Returns:
        Tensor[B, Q, M, P, N]. Points: reference + offset pixels, which in normalized coordinates is
        reference + offset / (W_l, H_l). Boxes: centre + offset * (0.5 / K_l) * (width, height).

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
    spatial_dims = sampling_offsets.shape[-1]
    if any(len(shape) != spatial_dims for shape in spatial_shapes):
        raise ValueError(
            f"spatial_shapes: expected {spatial_dims} sizes for each level, as many as the last axis "
            f"of sampling_offsets {list(sampling_offsets.shape)} has, got {list(spatial_shapes)}"
        )
    leading = sampling_offsets.shape[:-3]
    index = parse_reference_index(
        reference_points, leading, num_points, reference_index, spatial_dims
    )
    # With a head axis, and as many references as points or one for all.
    references = reference_points[..., index if any(index) else [0], :].unsqueeze(-3)
    step = offset_step(
        spatial_shapes,
        num_points,
        coordinates,
        boxes=reference_points.shape[-1] > spatial_dims,
        like=sampling_offsets,
    )
    moved = sampling_offsets * step
    if references.shape[-1] > spatial_dims:
        moved = moved * references[..., spatial_dims:]
    return references[..., :spatial_dims] + moved


def offset_step(
    spatial_shapes: Sequence[tuple[int, ...]],
    num_points: Sequence[int],
    coordinates: Coordinates,
    *,
    boxes: bool,
    like: Tensor,
) -> Tensor:
    """What an offset is multiplied by, [P, N]: for points a pixel of its level, for boxes half of
    the box (which it is multiplied by afterwards) divided by the points of the level.
    """

    def pixels(size: int) -> int:
        # From a reference point a pixel is a pixel, whatever 0 and 1 mean.
        return {"normalized": size, "normalized_corners": size - 1, "pixel": 1}[coordinates]

    if boxes:
        share = [0.5 / count for count in num_points for _ in range(count)]
        return torch.tensor(share, dtype=like.dtype, device=like.device)[:, None]
    sizes = [
        [pixels(size) for size in reversed(shape)]  # a location is (x, y), a shape is (H, W)
        for shape, count in zip(spatial_shapes, num_points, strict=True)
        for _ in range(count)
    ]
    step = 1 / torch.tensor(sizes, dtype=like.dtype, device=like.device)
    # Between the corners of a single pixel there is no way to go.
    return step.masked_fill(step.isinf(), 0) if coordinates == "normalized_corners" else step


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
