"""Where queries look: from reference points and offsets to sampling locations."""

from __future__ import annotations

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
    """[B, Q, 1 or L, 2 or 4]: (x, y) or (x, y, width, height), normalized to the map."""
    sampling_offsets: Tensor
    """[B, Q, M, P, 2]: (x, y), in pixels of their level (points) or in parts of the box (boxes)."""
    sampling_locations: Tensor
    """[B, Q, M, P, 2]: (x, y), normalized: 0 and 1 are the outer edges of the map."""
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
        reference_points (Tensor[B, Q, 1 or L, 2 or 4]): normalized (x, y), or boxes
            (centre x, centre y, width, height).
        sampling_offsets (Tensor[B, Q, M, P, 2]): (x, y) of each point, all levels flat.
        spatial_shapes: `(height, width)` of each of the L levels.
        num_points: points of each level, L numbers with the sum P.

    Returns:
        Tensor[B, Q, M, P, 2], normalized. Points: reference + offset / (W_l, H_l). Boxes:
        centre + offset * (0.5 / K_l) * (width, height).

    Raises:
        ValueError: `reference_points` does not fit the offsets.

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
    num_levels = len(spatial_shapes)
    coordinates = reference_points.shape[-1] if reference_points.dim() == 4 else 0
    if (
        coordinates not in (2, 4)
        or reference_points.shape[:2] != sampling_offsets.shape[:2]
        or reference_points.shape[2] not in (1, num_levels)
    ):
        raise ValueError(
            f"reference_points: expected [{batch_size}, {num_queries}, 1 or {num_levels}, 2 or 4], "
            f"got {list(reference_points.shape)}"
        )
    if reference_points.shape[2] > 1:
        level_of_point = [level for level, count in enumerate(num_points) for _ in range(count)]
        reference_points = reference_points[:, :, level_of_point]
    reference_points = reference_points[:, :, None]  # a head axis: [B, Q, 1, 1 or P, 2 or 4]
    if coordinates == 2:
        step = 1 / torch.tensor(
            [
                (width, height)
                for (height, width), count in zip(spatial_shapes, num_points, strict=True)
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
    centre, extent = reference_points[..., :2], reference_points[..., 2:]
    return centre + sampling_offsets * share[:, None] * extent
