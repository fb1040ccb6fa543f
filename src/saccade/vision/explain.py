"""One query of deformable attention, taken apart into numbers a person can follow.

Every number comes from the public functions of the library, and each explanation ends with checks
that its parts, summed by hand, give what the library gives for the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.call import Coordinates, Interpolation, Padding
from saccade.functional import deformable_attention


class Corner(NamedTuple):
    """One pixel that a point reads."""

    x: int
    y: int
    weight: float
    """Interpolation weight, 0 to 1."""
    value: float | None
    """What the map holds there in the shown channel; None: outside the map, counts as 0."""


class Point(NamedTuple):
    """One sampling point of one head."""

    number: int
    """1, 2, ... over all levels."""
    level: int
    offset: tuple[float, float]
    location: tuple[float, float]
    """(x, y) in the unit of `Explanation.coordinates`."""
    position: tuple[float, float]
    """(x, y) in pixels, 0 the centre of the first; after clamping where padding is "border"."""
    corners: list[Corner]
    """Four for linear interpolation, one for nearest and discrete, none for a location that is not finite."""
    read: float
    """The value read here by interpolation, in the shown channel."""
    attention_weight: float


class Check(NamedTuple):
    """A sum made by hand against the same number from the library."""

    name: str
    largest_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (a NaN is not)."""
        return self.largest_difference <= self.tolerance


@dataclass(frozen=True)
class Explanation:
    """Everything there is to show about one query and one head."""

    subject: str
    spatial_shapes: list[tuple[int, ...]]
    coordinates: Coordinates
    interpolation: Interpolation
    padding: Padding
    reference: list[tuple[float, ...]]
    """One (x, y) or (x, y, width, height) for each level, or one for all, as `coordinates`."""
    points: list[Point]
    maps: list[Tensor]
    """[H, W] of each level: the values of the shown channel."""
    channel: int
    num_channels: int
    by_hand: float
    """The head's sum over its points in the shown channel."""
    library: float
    """What the library gives for it."""
    checks: list[Check]
    worked_example: bool = False

    @property
    def num_points(self) -> int:
        """Points of this head over all levels."""
        return len(self.points)


class HeadParts(NamedTuple):
    """The points of one query and head, still as tensors; P points over all levels."""

    positions: Tensor
    """[P, 2], (x, y) in pixels."""
    cells: Tensor
    """[P, 4 or 1, 2] int64, (x, y) of the corners; any number where a position is not finite."""
    weights: Tensor
    """[P, 4 or 1], interpolation weights; 0 where a position is not finite."""
    rows: Tensor
    """[P, 4 or 1, D], the value at each corner, 0 outside the map."""
    inside: Tensor
    """[P, 4 or 1] bool."""

    @property
    def read(self) -> Tensor:
        """[P, D], what each point reads."""
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
    """The corners that the points of one query and head read, and with which weights.

    Args:
        value (Tensor[S, D]): the value map of one head, all levels.
        spatial_shapes: `(height, width)` of each level.
        locations (Tensor[P, 2]): (x, y) of each point, level after level.
        num_points: points of each level, with the sum P.
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
        _level_parts(level_value, shape, level_locations, interpolation, padding, coordinates)
        for level_value, shape, level_locations in levels
    ]
    return HeadParts(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _level_parts(
    value: Tensor,
    shape: tuple[int, ...],
    locations: Tensor,
    interpolation: Interpolation,
    padding: Padding,
    coordinates: Coordinates,
) -> HeadParts:
    height, width = shape
    size = torch.tensor([width, height], dtype=locations.dtype)
    scale = {"normalized": size, "normalized_corners": size - 1, "pixel": torch.ones(2)}[
        coordinates
    ]
    shift = -0.5 if coordinates == "normalized" else 0.0
    last = (size if padding != "border_height" else size.clamp(max=height)) - 1
    positions = locations * scale + shift
    finite = positions.isfinite().all(-1)
    # The discrete rule counts from the edge, and is clamped after that.
    discrete = (locations * scale + (shift + 1)).floor()
    if padding != "zeros":
        positions = torch.minimum(positions.clamp(min=0), last)
        discrete = torch.minimum(discrete.clamp(min=0), last)
    safe = torch.where(finite[:, None], positions, 0)
    if interpolation != "linear":
        chosen = torch.where(finite[:, None], discrete, 0)
        cells = (safe.round() if interpolation == "nearest" else chosen).to(torch.int64)[:, None]
        weights = torch.ones(len(safe), 1, dtype=safe.dtype)
    else:
        base = safe.floor()
        steps = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        cells = base.to(torch.int64)[:, None] + steps
        weights = _corner_weights(safe - base)
    weights = torch.where(finite[:, None], weights, 0)
    x, y = cells.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & finite[:, None]
    rows = value[torch.where(inside, y * width + x, 0)].masked_fill(~inside[..., None], 0)
    return HeadParts(positions, cells, weights, rows, inside)


def _corner_weights(fraction: Tensor) -> Tensor:
    """[K, 4] interpolation weights of positions [K, 2] between 0 and 1 within one cell.

    The library says them itself: on a 2 x 2 map whose four values are the four unit vectors, what
    it reads at a position is the list of the weights.
    """
    count = len(fraction)
    unit_vectors = torch.eye(4, dtype=fraction.dtype).view(1, 4, 1, 4)
    weights = deformable_attention(
        unit_vectors,
        [(2, 2)],
        fraction.view(1, count, 1, 1, 1, 2),
        torch.ones(1, count, 1, 1, 1, dtype=fraction.dtype),
        coordinates="pixel",
    )
    return weights[0]


def list_points(
    parts: HeadParts,
    offsets: Tensor,
    locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    channel: int,
) -> list[Point]:
    """`parts` in plain numbers; offsets and locations [P, 2], attention_weights [P]."""
    levels = [level for level, count in enumerate(num_points) for _ in range(count)]
    read = parts.read
    points = []
    for index, level in enumerate(levels):
        corners = []
        if bool(parts.positions[index].isfinite().all()):
            for corner in range(parts.cells.shape[1]):
                x, y = parts.cells[index, corner].tolist()
                inside = bool(parts.inside[index, corner])
                value = float(parts.rows[index, corner, channel]) if inside else None
                corners.append(Corner(x, y, float(parts.weights[index, corner]), value))
        points.append(
            Point(
                index + 1,
                level,
                _pair(offsets[index]),
                _pair(locations[index]),
                _pair(parts.positions[index]),
                corners,
                float(read[index, channel]),
                float(attention_weights[index]),
            )
        )
    return points


def _pair(tensor: Tensor) -> tuple[float, float]:
    x, y = tensor.tolist()
    return float(x), float(y)


def check(name: str, by_hand: Tensor, library: Tensor) -> Check:
    """Compares a sum made by hand with the library's; the tolerance is that of the dtype."""
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(library.dtype, 2e-2)
    by_hand, library = by_hand.detach().double(), library.detach().double()
    largest = float((by_hand - library).abs().max())
    return Check(name, largest, precision * max(1.0, float(library.abs().max())))


WORKED_SHAPE = (4, 4)
WORKED_OFFSETS = ((0.5, 0.5), (-0.5, 0.5), (0.5, -0.5), (-0.5, -0.5))


def worked_map() -> Tensor:
    """[4, 4], indexed [y, x]: z(x, y) = 10 x + y, so that a value spells its own address."""
    height, width = WORKED_SHAPE
    return 10.0 * torch.arange(width)[None, :] + torch.arange(height)[:, None]


def explain_worked_example(
    reference: tuple[float, float] = (1.5, 1.5),
    *,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
) -> Explanation:
    """The worked example: one query, a 4 x 4 map, one head, four points around a reference point.

    Args:
        reference: the reference point (x, y) in pixels, 0 the centre of the first pixel.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Returns:
        Explanation: with the checks that the parts sum to the library's output, and that the same
        positions in the two normalized coordinate systems give it as well.

    Raises:
        ValueError: `reference` is not finite, or an option is none of the allowed ones.

    Example:
        >>> from saccade.vision.explain import explain_worked_example
        >>> explanation = explain_worked_example()
        >>> [point.position for point in explanation.points], explanation.library
        ([(2.0, 2.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0)], 16.5)
    """
    if not all(math.isfinite(number) for number in reference):
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
    if interpolation == "linear":  # a position half way may round either way in other units
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
