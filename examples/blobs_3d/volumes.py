"""The data: noisy volumes with balls among tubes, and a rule of thumb that finds the balls."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_laplace, maximum_filter

SHAPE = (24, 32, 32)  # depth, height, width
TRAIN, TEST = 0, 1

Volume = tuple[np.ndarray, np.ndarray, np.ndarray]


def blobs(seed: int, split: int, index: int, noise: float = 1.0) -> Volume:
    """Draws a volume [D, H, W], with the centres (x, y, z) and radii of its blobs in voxels.

    Coordinates are those of the array's indices: voxel 0 has its centre at 0.
    """
    rng = np.random.default_rng([seed, split, index])
    extent = np.array(SHAPE[::-1])
    z, y, x = np.meshgrid(
        *(np.arange(n, dtype=np.float32) for n in SHAPE), indexing="ij", sparse=True
    )
    volume, covered = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)

    def draw(away: np.ndarray, radius: float) -> None:
        edge = (1 - np.tanh((away - radius) / 0.8)) / 2  # about a voxel wide
        np.maximum(volume, np.float32(rng.uniform(0.7, 1.2)) * edge, out=volume)

    for _ in range(rng.integers(1, 4)):  # straight tubes from edge to edge
        (px, py, pz), direction = rng.uniform(0, extent - 1), rng.standard_normal(3)
        dx, dy, dz = direction / np.linalg.norm(direction)
        along = (x - px) * dx + (y - py) * dy + (z - pz) * dz
        squared = (x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2 - along**2
        away, radius = np.sqrt(np.maximum(squared, 0)), rng.uniform(1.0, 2.0)
        draw(away, radius)
        covered |= away < radius + 1
    centres, radii, num_blobs = [], [], rng.integers(1, 6)
    while len(centres) < num_blobs:
        centre, radius = rng.uniform(2, extent - 3), rng.uniform(2.0, 3.5)
        away = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
        if covered[away < radius + 1].any():  # they touch neither a tube nor one another
            continue
        draw(away, radius)
        covered |= away < radius + 1
        centres.append(centre)
        radii.append(radius)
    texture = gaussian_filter(rng.standard_normal(SHAPE, np.float32), 1.5)
    volume += noise * 0.15 * texture / texture.std()
    volume += noise * 0.25 * rng.standard_normal(SHAPE, np.float32)
    return volume.astype(np.float32), np.array(centres), np.array(radii)


def rule_of_thumb(
    volume: np.ndarray, sigma: float = 1.75, threshold: float = 0.6
) -> tuple[np.ndarray]:
    """Returns where the Laplacian of Gaussian, which responds to balls, is highest: (x, y, z)."""
    # The numbers are the best of a small search on training volumes.
    response = -(sigma**2) * gaussian_laplace(volume, sigma)
    spots = (response == maximum_filter(response, 5)) & (response > threshold)
    return (np.argwhere(spots)[:, ::-1].astype(float),)
