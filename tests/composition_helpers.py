"""The truth for the compositions: loops in float64, and the same by other calls of the operator."""

from __future__ import annotations

import itertools
import math

import torch

import saccade

SHAPES = [(3, 4), (1, 5)]
CAMERAS = [[(3, 4), (2, 2)], [(2, 5), (1, 3)], [(3, 4), (2, 2)]]  # cameras differ in size


def draw_depth_weighted(
    dtype=torch.float64, *, shapes=SHAPES, bins=3, batch=2, queries=4, heads=2, points=3, head_dim=3,
    value_heads=2, depth_heads=2, spread=0.4,
):  # fmt: skip
    """value, depth_distribution, sampling_locations, attention_weights; some points are outside."""
    positions = sum(map(math.prod, shapes))
    unit = torch.rand(batch, queries, heads, len(shapes), points, 3, dtype=torch.float64)
    location_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(batch, positions, value_heads, head_dim, dtype=torch.float64).to(dtype),
        torch.randn(batch, positions, depth_heads, bins, dtype=torch.float64).to(dtype),
        (unit * (1 + 2 * spread) - spread).to(location_dtype),
        torch.randn(unit.shape[:-1], dtype=torch.float64).to(location_dtype),
    )


def draw_multi_camera(
    dtype=torch.float64, *, cameras=CAMERAS, batch=2, anchors=3, points=4, groups=2, channels=6,
):  # fmt: skip
    """value, sampling_locations, attention_weights; some points are outside."""
    positions = sum(math.prod(shape) for levels in cameras for shape in levels)
    unit = torch.rand(batch, anchors, points, len(cameras), 2, dtype=torch.float64)
    location_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(*unit.shape[:-1], len(cameras[0]), groups, dtype=torch.float64)
    return (
        torch.randn(batch, positions, channels, dtype=torch.float64).to(dtype),
        (unit * 1.6 - 0.3).to(location_dtype),
        weights.to(location_dtype),
    )


def cells(location, size):
    """The cells of one axis that a point reads: (number, weight)."""
    pixel = location * size - 0.5
    lower = math.floor(pixel)
    pair = (lower, 1 - (pixel - lower)), (lower + 1, pixel - lower)
    return [(number, weight) for number, weight in pair if 0 <= number < size]


def depth_weighted_loops(value, depth, shapes, locations, weights):
    """The definition as loops over points and corners, in float64. Makes no volume."""
    value, depth = value.double(), depth.double()
    batch, queries, heads, _, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b, q, m in itertools.product(range(batch), range(queries), range(heads)):
        first_row = 0
        for level, (height, width) in enumerate(shapes):
            for k in range(points):
                location = [float(number) for number in locations[b, q, m, level, k]]
                if not all(map(math.isfinite, location)):
                    continue
                sizes = (width, height, depth.shape[3])
                along = [cells(number, size) for number, size in zip(location, sizes, strict=True)]
                for (x, wx), (y, wy), (z, wz) in itertools.product(*along):
                    row = first_row + y * width + x
                    score = depth[b, row, m % depth.shape[2], z]
                    share = float(weights[b, q, m, level, k]) * wx * wy * wz * score
                    output[b, q, m] += share * value[b, row, m % value.shape[2]]
            first_row += height * width
    return output.flatten(2)


def multi_camera_loops(value, cameras, locations, weights):
    """The definition as loops over points, cameras and levels, in float64."""
    value = value.double()
    batch, anchors, points, num_cameras, levels, groups = weights.shape
    output = torch.zeros(batch, anchors, value.shape[2], dtype=torch.float64)
    group_index = torch.arange(value.shape[2]) // (value.shape[2] // groups)
    for b, a, k in itertools.product(range(batch), range(anchors), range(points)):
        first_row = 0
        for camera, level in itertools.product(range(num_cameras), range(levels)):
            height, width = cameras[camera][level]
            x, y = (float(number) for number in locations[b, a, k, camera])
            if 0 < x < 1 and 0 < y < 1:
                share = weights[b, a, k, camera, level].double()[group_index]
                for (column, wx), (row, wy) in itertools.product(cells(x, width), cells(y, height)):
                    output[b, a] += wx * wy * share * value[b, first_row + row * width + column]
            first_row += height * width
    return output


def on_the_volume(value, depth, shapes, locations, weights):
    """The same by the three-dimensional operator on the volume, made in memory."""
    volumes = []
    sizes = [math.prod(shape) for shape in shapes]
    for pixels, depths in zip(value.split(sizes, 1), depth.split(sizes, 1), strict=True):
        volume = depths.permute(0, 3, 1, 2)[..., None] * pixels[:, None]  # [B, Z, H * W, M, D]
        volumes.append(volume.flatten(1, 2))
    shapes = [(depth.shape[3], *shape) for shape in shapes]
    return saccade.deformable_attention(torch.cat(volumes, 1), shapes, locations, weights)


def camera_by_camera(value, cameras, locations, weights):
    """The same as one call for each camera and level, with weights masked by the inside test."""
    total, first_row = 0, 0
    groups = weights.shape[-1]
    inside = ((locations > 0) & (locations < 1)).all(-1)
    for camera, levels in enumerate(cameras):
        for level, shape in enumerate(levels):
            part = value[:, first_row : first_row + math.prod(shape)].unflatten(2, (groups, -1))
            points = locations[:, :, None, None, :, camera].expand(-1, -1, groups, -1, -1, -1)
            share = weights[:, :, :, camera, level] * inside[:, :, :, camera, None]
            share = share.transpose(2, 3)[:, :, :, None]
            total = total + saccade.deformable_attention(part, [shape], points, share)
            first_row += math.prod(shape)
    return total


def with_gradients(function, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return output, *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def assert_all_close(actual, expected, tolerance):
    for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert got.shape == want.shape, number
        assert got.isfinite().all(), number
        error = (got.double() - want.double()).abs().max().item()
        assert error <= tolerance * max(1.0, want.abs().max().item()), (number, error)
