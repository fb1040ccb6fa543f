"""Operators of the family that are one call of deformable attention, prepared by plain PyTorch.

`docs/compositions.md` says why each is the same, and what it costs against a kernel of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checks import (
    SpatialShapes,
    check_axes,
    check_positions,
    compute_dtype,
    has_queries,
    parse_spatial_shapes,
)
from saccade.functional import deformable_attention
from saccade.sampling import axis_cells


def depth_weighted_deformable_attention(
    value: Tensor,
    depth_distribution: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """3D deformable attention (DFA3D): an image lifted by a depth distribution, read as a volume.

    Each pixel's channels times its depth distribution make a volume, value(x, y) ·
    depth_distribution(x, y, z). It is read trilinearly at each sampling location and summed with
    the attention weights, as `deformable_attention` does with a volume; the volume is never made.

    Args:
        value (Tensor[B, S, M or 1, D]): the value maps of all levels, flattened row by row and
            joined level after level. float32, float64, float16 or bfloat16.
        depth_distribution (Tensor[B, S, M or 1, Z]): how much of each pixel lies in each of Z depth
            bins; not normalised here. With one head, all M heads read the same one. Its dtype may
            differ from the value's.
        spatial_shapes: `(height, width)` in pixels of each of the L levels, as a sequence of tuples
            of int or an integer tensor [L, 2]; the products sum to S.
        sampling_locations (Tensor[B, Q, M, L, K, 3]): `(x, y, z)`, normalized: 0 and 1 are the
            outer edges of the map and of the first and last depth bin. Any finite or non-finite
            number is allowed; what is outside counts as 0. Its dtype may differ from the value's.
        attention_weights (Tensor[B, Q, M, L, K]): the weight of each point; not normalised here.
            Its dtype may differ from the value's.

    Returns:
        Tensor[B, Q, M * D]: in the value's dtype, contiguous.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype or device does not fit. The message names the argument, what was
            expected and what came.

    Precision:
        Positions, interpolation weights, depths and sums are float32 whatever the value's dtype
        (float64 for float64 values), gradients included. A non-finite location contributes 0 and
        gets gradient 0.

    Source:
        Li et al., "DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting",
        https://arxiv.org/abs/2307.12972

    Example:
        >>> import torch, saccade
        >>> value = torch.randn(2, 8 * 8 + 4 * 4, 8, 32)             # two levels, 8 heads of 32
        >>> depth = torch.randn(2, 80, 1, 24).softmax(-1)            # 24 bins, for all heads
        >>> locations, weights = torch.rand(2, 100, 8, 2, 4, 3), torch.rand(2, 100, 8, 2, 4)
        >>> saccade.depth_weighted_deformable_attention(
        ...     value, depth, [(8, 8), (4, 4)], locations, weights).shape
        torch.Size([2, 100, 256])
    """
    shapes = _images(spatial_shapes)
    check_axes("value", value, None, batch=None, positions=None, heads=None, head_dim=None)
    check_positions(value, shapes)
    check_axes(
        "sampling_locations", sampling_locations, value,
        batch=value.shape[0], queries=None, heads=None, levels=len(shapes), points=None,
        coordinates=3,
    )  # fmt: skip
    _, num_queries, num_heads, num_levels, num_points, _ = sampling_locations.shape
    check_axes(
        "attention_weights", attention_weights, value,
        batch=value.shape[0], queries=num_queries, heads=num_heads, levels=num_levels,
        points=num_points,
    )  # fmt: skip
    check_axes(
        "depth_distribution", depth_distribution, value,
        batch=value.shape[0], positions=value.shape[1], heads=None, bins=None,
    )  # fmt: skip
    for name, tensor in (("value", value), ("depth_distribution", depth_distribution)):
        if tensor.shape[2] not in (1, num_heads):
            raise ValueError(
                f"{name}: expected {num_heads} heads as in sampling_locations "
                f"{list(sampling_locations.shape)} or 1 head that all of them share, "
                f"got {tensor.shape[2]} in {list(tensor.shape)}"
            )

    if not has_queries(sampling_locations.shape[:2]):
        # Nothing is read; the sum of no elements leaves the depths their gradient.
        attention_weights = attention_weights + depth_distribution[:, :0].sum()
        return deformable_attention(value, shapes, sampling_locations[..., :2], attention_weights)
    dtype = compute_dtype(value)
    # Converted before it is gathered from, so that its gradient sums up in the compute dtype.
    depths = depth_distribution.to(dtype).flatten(1)
    depth_heads, num_bins = depth_distribution.shape[2:]
    attention_weights = attention_weights.to(dtype)

    def per_level(sizes: list[int], dtype: torch.dtype) -> Tensor:
        # [L, 1]: broadcasts against [B, Q, M, L, K].
        return torch.tensor(sizes, dtype=dtype, device=value.device)[:, None]

    widths = [width for _, width in shapes]
    axis_sizes = [widths, [height for height, _ in shapes], [num_bins] * num_levels]
    columns, rows, bins = _cells(
        sampling_locations.to(dtype), [per_level(sizes, dtype) for sizes in axis_sizes]
    )

    width = per_level(widths, torch.int64)
    level_start = per_level(
        [sum(map(math.prod, shapes[:level])) for level in range(num_levels)], torch.int64
    )
    head = torch.arange(depth_heads, device=value.device)[:, None, None]
    corners, weights = [], []
    for row, column in itertools.product(rows, columns):
        position = (level_start + row.pixel * width + column.pixel) * depth_heads + head
        depth = torch.zeros_like(row.weight)  # [B, Q, M, L, K]
        for depth_bin in bins:
            index = position * num_bins + depth_bin.pixel
            bin_depth = depths.gather(1, index.flatten(1)).view(index.shape)
            # Masked, not multiplied by 0: an infinite depth must not leak from a bin that no point reads.
            inside = row.inside & column.inside & depth_bin.inside
            depth = depth + depth_bin.weight * torch.where(inside, bin_depth, 0)
        # Each corner becomes a point of its own, which reads this one cell.
        corners.append(torch.stack((column.coordinate, row.coordinate), -1))
        weights.append(attention_weights * (row.weight * column.weight * depth))
    return deformable_attention(
        value,
        shapes,
        torch.cat(corners, 4),
        torch.cat(weights, 4),
        interpolation="nearest",
        coordinates="pixel",
    )


class _Cell(NamedTuple):
    """One of the two cells of every point along one axis, [B, Q, M, L, K]."""

    coordinate: Tensor  # a whole number in floating point, NaN where the point reads nothing
    weight: Tensor  # of the interpolation
    inside: Tensor  # bool
    pixel: Tensor  # int64, 0 where not inside


def _cells(locations: Tensor, sizes: list[Tensor]) -> list[list[_Cell]]:
    """The cells of normalized locations [B, Q, M, L, K, 3] along each axis; `sizes` broadcast."""
    finite = locations.isfinite().all(-1)
    axes = [
        axis_cells(torch.where(finite, location, 0), size, "linear", "normalized")
        for location, size in zip(locations.unbind(-1), sizes, strict=True)
    ]
    reads = finite  # whether any of the eight corners lies inside
    for (lower, _), size in zip(axes, sizes, strict=True):
        reads = reads & (lower.pixel >= -1) & (lower.pixel < size)
    result: list[list[_Cell]] = []
    for cells, size in zip(axes, sizes, strict=True):
        result.append([])
        for cell in cells:
            inside = reads & (cell.pixel >= 0) & (cell.pixel < size)
            coordinate = torch.where(reads, cell.pixel.to(locations.dtype), math.nan)
            pixel = torch.where(inside, cell.pixel, 0)
            result[-1].append(_Cell(coordinate, cell.weight, inside, pixel))
    return result


def multi_camera_deformable_aggregation(
    value: Tensor,
    spatial_shapes: Sequence[SpatialShapes] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Deformable aggregation (Sparse4D): the features of an anchor's key points from all cameras.

    Every key point of an anchor, projected into each camera, is read bilinearly from each level of
    that camera's feature pyramid; what is read is summed over points, cameras and levels, each
    group of channels with its own weights. A point that is not strictly inside a camera's image
    contributes nothing from there.

    Args:
        value (Tensor[B, S, C]): the feature maps, flattened row by row and joined: the levels of
            the first camera, then those of the second and so on. float32, float64, float16 or
            bfloat16.
        spatial_shapes: `(height, width)` of each level of each camera: for every camera a sequence
            of L tuples, or an integer tensor [cameras, L, 2]; the products sum to S. Prefer Python
            ints: a tensor on a GPU has to be read back.
        sampling_locations (Tensor[B, A, K, cameras, 2]): where each of the K key points of the A
            anchors lies in each camera's image, `(x, y)`, normalized: 0 and 1 are the edges of the
            image. Any finite or non-finite number is allowed. Its dtype may differ from the
            value's.
        attention_weights (Tensor[B, A, K, cameras, L, G]): the weight of each point, camera, level
            and group of C / G channels; not normalised here. Its dtype may differ from the value's.

    Returns:
        Tensor[B, A, C]: in the value's dtype, contiguous.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype or device does not fit. The message names the argument, what was
            expected and what came.

    Precision:
        Positions, interpolation weights and sums are float32 whatever the value's dtype (float64
        for float64 values), gradients included. A non-finite location contributes 0 and gets
        gradient 0.

    Source:
        Lin et al., "Sparse4D v2: Recurrent Temporal Fusion with Sparse Model",
        https://arxiv.org/abs/2305.14018

    Example:
        >>> import torch, saccade
        >>> shapes = [[(8, 16), (4, 8)]] * 6                         # six cameras, two levels
        >>> value = torch.randn(1, 6 * (8 * 16 + 4 * 8), 256)
        >>> locations = torch.rand(1, 900, 13, 6, 2)                 # 900 anchors, 13 key points
        >>> weights = torch.rand(1, 900, 13, 6, 2, 8)                # 8 groups
        >>> saccade.multi_camera_deformable_aggregation(value, shapes, locations, weights).shape
        torch.Size([1, 900, 256])
    """
    cameras = _cameras(spatial_shapes)
    shapes = [shape for levels in cameras for shape in levels]
    check_axes("value", value, None, batch=None, positions=None, channels=None)
    batch_size, _, num_channels = value.shape
    check_positions(value, shapes)
    check_axes(
        "sampling_locations", sampling_locations, value,
        batch=batch_size, anchors=None, points=None, cameras=len(cameras), coordinates=2,
    )  # fmt: skip
    num_anchors, num_points = sampling_locations.shape[1:3]
    check_axes(
        "attention_weights", attention_weights, value,
        batch=batch_size, anchors=num_anchors, points=num_points, cameras=len(cameras),
        levels=len(cameras[0]), groups=None,
    )  # fmt: skip
    num_levels, num_groups = attention_weights.shape[4:]
    if num_channels % num_groups:
        raise ValueError(
            f"attention_weights: expected a number of groups that divides the {num_channels} "
            f"channels of value, got {num_groups} in {list(attention_weights.shape)}"
        )

    locations = sampling_locations.to(compute_dtype(value))
    inside = ((locations > 0) & (locations < 1)).all(-1, keepdim=True)
    # A location that is NaN contributes nothing and gets no gradient.
    locations = torch.where(inside, locations, math.nan).transpose(2, 3)[:, :, None, :, None]
    # Each level of each camera is a level of the value map, each group a head.
    locations = locations.expand(-1, -1, num_groups, -1, num_levels, -1, -1).flatten(3, 4)
    weights = attention_weights.permute(0, 1, 5, 3, 4, 2).flatten(3, 4)
    return deformable_attention(value.unflatten(2, (num_groups, -1)), shapes, locations, weights)


def _images(spatial_shapes: SpatialShapes) -> list[tuple[int, ...]]:
    """The (height, width) of each level."""
    shapes = parse_spatial_shapes(spatial_shapes)
    if len(shapes[0]) != 2:
        raise ValueError(f"spatial_shapes: expected (height, width) of each level, got {shapes}")
    return shapes


def _cameras(spatial_shapes: Sequence[SpatialShapes] | Tensor) -> list[list[tuple[int, ...]]]:
    """The shapes of each camera's levels, as many for every camera."""
    expected = "spatial_shapes: expected for each camera (height, width) of its levels"
    if isinstance(spatial_shapes, Tensor) and spatial_shapes.dim() != 3:
        raise ValueError(f"{expected}, [cameras, levels, 2], got {list(spatial_shapes.shape)}")
    if isinstance(spatial_shapes, Tensor) and not spatial_shapes.is_meta:
        spatial_shapes = spatial_shapes.tolist()  # read back once, not camera by camera
    try:
        cameras = [_images(levels) for levels in spatial_shapes]
    except TypeError as error:
        raise TypeError(f"{expected} in int, got {spatial_shapes!r}") from error
    if not cameras:
        raise ValueError(f"{expected}, got no camera")
    if len({len(levels) for levels in cameras}) > 1:
        raise ValueError(f"{expected}, the same number of levels for each, got {cameras}")
    return cameras
