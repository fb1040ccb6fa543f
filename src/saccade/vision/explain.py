"""Takes one query of deformable attention apart into values that a person can follow.

Cells, weights and positions come from `saccade.sampling`, the rule that the reference uses. Each
explanation ends with checks that its parts, summed by hand, equal the output of the library. They
therefore check the backend that ran against the rule of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade import sampling
from saccade.call import Coordinates, Interpolation, Padding
from saccade.functional import deformable_attention


class Corner(NamedTuple):
    """One pixel that a point reads."""

    x: int
    y: int
    weight: float
    """Interpolation weight, 0 to 1."""
    value: float | None
    """The map's value there in the shown channel; None means outside the map, which counts as 0."""


class Point(NamedTuple):
    """One sampling point of one head."""

    number: int
    """1, 2, …, counted over all levels."""
    level: int
    offset: tuple[float, float]
    location: tuple[float, float]
    """(x, y) in the unit of `Explanation.coordinates`."""
    position: tuple[float, float]
    """(x, y) in pixels, 0 the centre of the first; clamped unless padding is "zeros"."""
    corners: list[Corner]
    """Four for linear interpolation, one for nearest and discrete, none for a location that is not finite."""
    read: float
    """The interpolated value, in the shown channel."""
    attention_weight: float


class Check(NamedTuple):
    """Compares sums made by hand with the same values from the library.

    Two NaNs are equal, and so are two infinities of the same sign.
    """

    name: str
    largest_difference: float
    """Not finite where one side is not a number or infinite and the other differs."""
    tolerance: float
    num_values: int
    num_not_finite: int
    """How many of the library's values are NaN or infinite."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (a NaN is not)."""
        return self.largest_difference <= self.tolerance


@dataclass(frozen=True)
class Explanation:
    """The explanation of one query and one head."""

    subject: str
    spatial_shapes: list[tuple[int, ...]]
    coordinates: Coordinates
    interpolation: Interpolation
    padding: Padding
    reference: list[tuple[float, ...]]
    """One (x, y) or (x, y, width, height) per level, or one for all, in the unit of `coordinates`."""
    points: list[Point]
    maps: list[Tensor]
    """The values of the shown channel, [H, W] for each level."""
    channel: int
    num_channels: int
    by_hand: float
    """The head's sum over its points in the shown channel."""
    library: float
    """The library's output for the same head and channel."""
    checks: list[Check]
    worked_example: bool = False

    @property
    def num_points(self) -> int:
        """Number of points of this head over all levels."""
        return len(self.points)


# Corners up to this many pixels outside a map are shown where they are.
_SHOWN_MARGIN = 1 << 20


class HeadParts(NamedTuple):
    """The points of one query and head as tensors; P points over all levels."""

    positions: Tensor
    """[P, 2], (x, y) in pixels, after clamping."""
    finite: Tensor
    """[P] bool, whether a location is finite; other points read nothing."""
    cells: Tensor
    """[P, 4 or 1, 2] int64, (x, y) of the corners; meaningless where a location is not finite."""
    weights: Tensor
    """[P, 4 or 1], interpolation weights; 0 where a location is not finite."""
    rows: Tensor
    """[P, 4 or 1, D], the value at each corner, 0 outside the map."""
    inside: Tensor
    """[P, 4 or 1] bool."""

    @property
    def read(self) -> Tensor:
        """[P, D], the interpolated value of each point."""
        return (self.weights[..., None] * self.rows).sum(1)


def take_apart(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, ...]],
    locations: Tensor,
    num_points: Sequence[int],
    *,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
) -> HeadParts:
    """Finds the corners that the points of one query and head read, and their weights.

    Args:
        value (Tensor[S, D]): the value map of one head, all levels.
        spatial_shapes: `(height, width)` of each level.
        locations (Tensor[P, 2]): (x, y) of each point, level after level.
        num_points: number of points of each level; their sum is P.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.
        coordinates: as in `saccade.deformable_attention`.

    Returns:
        HeadParts: in float32, for float64 values in float64.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    levels = zip(
        value.to(dtype).split([height * width for height, width in spatial_shapes]),
        spatial_shapes,
        locations.to(dtype).split(list(num_points)),
        strict=True,
    )
    parts = [
        _take_level_apart(level_value, shape, level_locations, interpolation, padding, coordinates)
        for level_value, shape, level_locations in levels
    ]
    return HeadParts(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _take_level_apart(
    value: Tensor,
    shape: tuple[int, ...],
    locations: Tensor,
    interpolation: Interpolation,
    padding: Padding,
    coordinates: Coordinates,
) -> HeadParts:
    finite = locations.isfinite().all(-1)  # [P]
    sizes = zip(reversed(shape), sampling.clamp_sizes(shape, padding), strict=True)
    positions, axes = [], []
    for axis, (size, clamp_size) in enumerate(sizes):  # a location is (x, y), a shape is (H, W)
        position = sampling.pixel_position(locations[:, axis], size, coordinates)  # [P]
        if clamp_size is not None:
            clamped = sampling.clamp_position(position, clamp_size)
            position = torch.where(finite, clamped, position)
        positions.append(position)
        location = torch.where(finite, locations[:, axis], 0)
        axes.append(
            sampling.axis_cells(
                location, size, interpolation, coordinates, clamp_size, _SHOWN_MARGIN
            )
        )
    # The corners of a point, the x axis fastest.
    corners = [(x, y) for y in axes[1] for x in axes[0]]
    cells = torch.stack([torch.stack((x.pixel, y.pixel), -1) for x, y in corners], 1)
    weights = torch.stack([x.weight * y.weight for x, y in corners], 1)
    x, y = cells.unbind(-1)  # [P, corners]
    height, width = shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & finite[:, None]
    rows = value[torch.where(inside, y * width + x, 0)].masked_fill(~inside[..., None], 0)
    weights = torch.where(finite[:, None], weights, 0)
    return HeadParts(torch.stack(positions, -1), finite, cells, weights, rows, inside)


def list_points(
    parts: HeadParts,
    offsets: Tensor,
    locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    channel: int,
) -> list[Point]:
    """Converts `parts` to plain numbers; offsets and locations [P, 2], attention_weights [P]."""
    levels = [level for level, count in enumerate(num_points) for _ in range(count)]
    values = parts.rows[..., channel].tolist()
    inside, finite = parts.inside.tolist(), parts.finite.tolist()
    cells, weights = parts.cells.tolist(), parts.weights.tolist()
    read, attention = parts.read[:, channel].tolist(), attention_weights.tolist()
    pairs = zip(offsets.tolist(), locations.tolist(), parts.positions.tolist(), strict=True)
    return [
        Point(
            index + 1,
            level,
            (offset[0], offset[1]),
            (location[0], location[1]),
            (position[0], position[1]),
            [
                Corner(x, y, weight, value if is_inside else None)
                for (x, y), weight, value, is_inside in zip(
                    cells[index], weights[index], values[index], inside[index], strict=True
                )
            ]
            if finite[index]
            else [],
            read[index],
            attention[index],
        )
        for index, (level, (offset, location, position)) in enumerate(
            zip(levels, pairs, strict=True)
        )
    ]


def check(name: str, by_hand: Tensor, library: Tensor) -> Check:
    """Compares sums made by hand with the library's; the tolerance depends on the dtype."""
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(library.dtype, 2e-2)
    # The library's result is rounded to its dtype, where a large sum is infinite.
    by_hand = by_hand.detach().to(library.dtype).double()
    library = library.detach().double()
    same = (by_hand == library) | (by_hand.isnan() & library.isnan())
    difference = (by_hand - library).abs().masked_fill(same, 0)
    finite = library.isfinite()
    largest = float(library.masked_fill(~finite, 0).abs().max())
    return Check(
        name,
        float(difference.max()),
        precision * max(1.0, largest),
        library.numel(),
        int((~finite).sum()),
    )


WORKED_SHAPE = (4, 4)
WORKED_OFFSETS = ((0.5, 0.5), (-0.5, 0.5), (0.5, -0.5), (-0.5, -0.5))


def worked_map() -> Tensor:
    """Returns the map [4, 4], indexed [y, x]: z(x, y) = 10 x + y, a value tells its own position."""
    height, width = WORKED_SHAPE
    return 10.0 * torch.arange(width)[None, :] + torch.arange(height)[:, None]


def explain_worked_example(
    reference: tuple[float, float] = (1.5, 1.5),
    *,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
) -> Explanation:
    """Explains the worked example: one query, one head, four points on a 4 x 4 map.

    Args:
        reference: the reference point (x, y) in pixels, 0 the centre of the first pixel.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Returns:
        Explanation: its checks compare the sum of the parts with the library's output and, for
        linear interpolation, that output with the output for normalized coordinates.

    Raises:
        ValueError: `reference` is not finite, or an option is not an allowed one.

    Example:
        >>> from saccade.vision.explain import explain_worked_example
        >>> explanation = explain_worked_example()
        >>> [point.position for point in explanation.points], explanation.library
        ([(2.0, 2.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0)], 16.5)
    """
    if not all(math.isfinite(coordinate) for coordinate in reference):
        raise ValueError(f"reference: expected two finite numbers, got {reference}")
    values = worked_map()
    value = values.reshape(1, 16, 1, 1)
    offsets = torch.tensor(WORKED_OFFSETS)
    locations = torch.tensor(reference) + offsets
    attention_weights = torch.full((4,), 0.25)

    def run(locations: Tensor, coordinates: Coordinates) -> Tensor:
        return deformable_attention(
            value,
            [WORKED_SHAPE],
            locations.view(1, 1, 1, 1, 4, 2),
            attention_weights.view(1, 1, 1, 1, 4),
            interpolation=interpolation,
            padding=padding,
            coordinates=coordinates,
        ).flatten()

    library = run(locations, "pixel")
    parts = take_apart(
        value[0, :, 0],
        [WORKED_SHAPE],
        locations,
        [4],
        interpolation=interpolation,
        padding=padding,
        coordinates="pixel",
    )
    by_hand = attention_weights @ parts.read
    checks = [check("the sum by hand, saccade.deformable_attention", by_hand, library)]
    # With the other rules, a position half way between pixels may round differently in other units.
    if interpolation == "linear":
        checks.append(
            check(
                'in pixels, with coordinates="normalized"',
                run((locations + 0.5) / 4, "normalized"),
                library,
            )
        )
    return Explanation(
        subject="The worked example: one query, one head, four points on a 4 x 4 map",
        spatial_shapes=[WORKED_SHAPE],
        coordinates="pixel",
        interpolation=interpolation,
        padding=padding,
        reference=[reference],
        points=list_points(parts, offsets, locations, attention_weights, [4], 0),
        maps=[values],
        channel=0,
        num_channels=1,
        by_hand=float(by_hand),
        library=float(library),
        checks=checks,
        worked_example=True,
    )
