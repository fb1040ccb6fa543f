"""The independent truth, random calls, and the one tolerance table."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import saccade
from saccade.call import Call, parse_call
from saccade.ops import native

T = TypeVar("T")

# Whether everything runs (`make test-all`), or what a day's work needs (`make test`).
ALL = os.environ.get("SACCADE_TEST_ALL", "0") not in ("", "0")


def some(cases: Iterable[T], count: int) -> list[T]:
    """`count` of the cases, drawn with a fixed seed; all of them under `make test-all`.

    Of cases that are tuples of options, those are preferred that hold pairs of options which no case
    before holds, so that few cases hold every pair.
    """
    cases = list(cases)
    if ALL or len(cases) <= count:
        return cases
    chance = random.Random(0)
    chosen: list[int] = []
    covered: set[Any] = set()
    while len(chosen) < count:
        remaining = [index for index in range(len(cases)) if index not in chosen]
        drawn = chance.sample(remaining, min(len(remaining), 60))
        best = max(drawn, key=lambda index: len(_pairs(cases[index]) - covered))
        covered |= _pairs(cases[best])
        chosen.append(best)
    return [cases[index] for index in chosen]


def _pairs(case: Any) -> set[Any]:
    """The pairs of options of a case that is a tuple; else there are none."""
    case = getattr(case, "values", case)  # of pytest.param
    if not isinstance(case, tuple):
        return set()
    options = [(axis, repr(option)) for axis, option in enumerate(case)]
    return set(itertools.combinations(options, 2))


# Relative to the largest number of the expected tensor. float32: sums of some hundred products.
# 16-bit kernels are held by `assert_16_bit_is_as_good_as_naive` instead.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15}


@dataclass
class Case:
    """A random call of the operator: sizes and options, tensors drawn on demand."""

    shapes: list[tuple[int, ...]] = field(default_factory=lambda: [(6, 7), (3, 4)])
    num_points: int | list[int] = 3
    batch_size: int = 2
    num_queries: int = 11
    num_heads: int = 3
    head_dim: int = 8
    shared_head: bool = False
    interpolation: str = "linear"
    padding: str = "zeros"
    coordinates: str = "normalized"
    dtype: torch.dtype = torch.float32
    location_dtype: torch.dtype | None = None
    spread: float = 0.3  # how far locations reach outside the map, in parts of its size

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def spatial_dims(self) -> int:
        return len(self.shapes[0])

    @property
    def points(self) -> list[int]:
        return (
            [self.num_points] * len(self.shapes)
            if isinstance(self.num_points, int)
            else self.num_points
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_points": self.num_points,
            "interpolation": self.interpolation,
            "padding": self.padding,
            "coordinates": self.coordinates,
        }

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """value, flat sampling_locations, attention_weights."""
        positions = sum(math.prod(shape) for shape in self.shapes)
        default = torch.float64 if self.dtype == torch.float64 else torch.float32
        location_dtype = self.location_dtype or default
        value = torch.randn(
            self.batch_size,
            positions,
            1 if self.shared_head else self.num_heads,
            self.head_dim,
            dtype=torch.float64,
        )
        shape = (self.batch_size, self.num_queries, self.num_heads, sum(self.points))
        unit = torch.rand(*shape, self.spatial_dims, dtype=torch.float64)
        locations = unit * (1 + 2 * self.spread) - self.spread
        if self.coordinates == "pixel":
            sizes = [
                shape[::-1]
                for shape, count in zip(self.shapes, self.points, strict=True)
                for _ in range(count)
            ]
            locations = locations * torch.tensor(sizes, dtype=torch.float64) - 0.5
        weights = torch.rand(shape, dtype=torch.float64)
        return value.to(self.dtype), locations.to(location_dtype), weights.to(location_dtype)

    def parse(self, value: Tensor, locations: Tensor, weights: Tensor) -> Call:
        return parse_call(value, self.shapes, locations, weights, **self.options)

    def call(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return saccade.deformable_attention(value, self.shapes, locations, weights, **self.options)


def loops(case: Case, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator as scalar loops in Python floats, which are float64. Shares no code with saccade."""
    batch_size, num_queries, num_heads = locations.shape[:3]
    head_dim = value.shape[3]
    output = torch.zeros(batch_size, num_queries, num_heads * head_dim, dtype=torch.float64)
    for b in range(batch_size):
        for q in range(num_queries):
            for m in range(num_heads):
                for d in range(head_dim):
                    total, first_row, first_point = 0.0, 0, 0
                    head = m if value.shape[2] > 1 else 0
                    for shape, count in zip(case.shapes, case.points, strict=True):
                        positions = math.prod(shape)
                        level = value[b, first_row : first_row + positions, head, d].view(shape)
                        for k in range(first_point, first_point + count):
                            location = [float(number) for number in locations[b, q, m, k]]
                            total += float(weights[b, q, m, k]) * sample(case, level, location)
                        first_row += positions
                        first_point += count
                    output[b, q, m * head_dim + d] = total
    return output


def sample(case: Case, level: Tensor, location: list[float]) -> float:
    """The value at a location on one level and channel, a tensor of one to three axes."""
    corners = read_corners(case, tuple(level.shape), location)
    return sum((weight * float(level[index]) for index, weight, _ in corners), start=0.0)


# The index of a pixel, its weight, and the derivatives of the weight by the coordinates (x, y, z).
TrueCorner = tuple[tuple[int, ...], float, list[float]]


def read_corners(options: Any, shape: tuple[int, ...], location: list[float]) -> list[TrueCorner]:
    """The pixels inside a map of this shape that a point at this location reads, number by number.

    `options` has the attributes interpolation, padding and coordinates.
    """
    if not all(map(math.isfinite, location)):
        return []
    axes = []  # of x, y, z: the cells along each
    for number, size in zip(location, reversed(shape), strict=True):
        scale = {"normalized": size, "normalized_corners": size - 1, "pixel": 1}[
            options.coordinates
        ]
        shift = -0.5 if options.coordinates == "normalized" else 0.0
        position = number * scale + (shift + 1 if options.interpolation == "discrete" else shift)
        slope = float(scale)
        if options.padding != "zeros":
            clamped = min(size, shape[0]) if options.padding == "border_height" else size
            slope = slope if 0 < position < clamped - 1 else 0.0
            position = min(max(position, 0.0), clamped - 1.0)
        if math.isinf(position):
            return []  # the product overflowed: far outside
        if options.interpolation == "nearest":
            axes.append([(round(position), 1.0, 0.0)])
        elif options.interpolation == "discrete":
            axes.append([(math.floor(position), 1.0, 0.0)])
        else:
            lower = math.floor(position)
            fraction = position - lower
            axes.append([(lower, 1 - fraction, -slope), (lower + 1, fraction, slope)])
    corners = []
    for cells in itertools.product(*axes):
        index = tuple(cell for cell, _, _ in reversed(cells))
        if not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
            continue
        slopes = [
            math.prod(
                (weight for other, (_, weight, _) in enumerate(cells) if other != n), start=slope
            )
            for n, (_, _, slope) in enumerate(cells)
        ]
        corners.append((index, math.prod(weight for _, weight, _ in cells), slopes))
    return corners


def read_points(
    values: Any, shape: tuple[int, int], points: Any, weights: Any = None, **options: Any
) -> float:
    """The output of one query and one head that reads `points` of a map with one channel."""
    value = torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
    locations = torch.tensor(points, dtype=torch.float32).reshape(1, 1, 1, 1, -1, 2)
    if weights is None:
        weights = [1.0] * locations.shape[4]
    weights = torch.tensor(weights, dtype=torch.float32).reshape(1, 1, 1, 1, -1)
    return saccade.deformable_attention(value, [shape], locations, weights, **options).item()


def run(case: Case, inputs: Sequence[Tensor], grad_output: Tensor | None) -> list[Tensor]:
    """[output] or [output, grad_value, grad_locations, grad_weights] on the backend in force."""
    if grad_output is None:
        with torch.no_grad():
            return [case.call(*inputs)]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = case.call(*leaves)
    output.backward(grad_output)
    return [
        output.detach(),
        *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves),
    ]


def calls_on_native_backends(call: Callable[[], T]) -> Iterator[tuple[str, T]]:
    """What the call returns on each native backend, so that the expected result is computed once."""
    names = [f"cpu-{isa}" for isa in native.available_isas()]
    if not names:
        pytest.skip(f"no native library: {native.failure}")
    for name in names:
        with saccade.use_backend(name):
            yield name, call()


NAMES = ("output", "gradient 1", "gradient 2", "gradient 3", "gradient 4")


def assert_same(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float | None = None,
    backend: str = "",
) -> None:
    """Holds each tensor to the tolerance of its dtype, relative to the largest expected number."""
    for tensor_name, got, want in zip(NAMES, actual, expected, strict=False):
        name = f"{tensor_name} {backend}"
        assert got.dtype == want.dtype, name
        assert got.shape == want.shape, name
        assert not got.isnan().any(), f"{name} has NaN"
        if want.numel() == 0:
            continue
        error = (got.double() - want.double()).abs().max().item()
        allowed = (tolerance or TOLERANCE[want.dtype]) * max(1.0, want.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_16_bit_is_as_good_as_naive(
    actual: Sequence[Tensor], naive: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """The error of a 16-bit result is at most twice that of the naive 16-bit computation."""
    for name, got, simple, want in zip(NAMES, actual, naive, truth, strict=False):
        assert not got.isnan().any(), f"{name} has NaN"
        error = (got.double() - want).abs().max().item()
        naive_error = (simple.double() - want).abs().max().item()
        assert error <= 2 * naive_error + 1e-6, (
            f"{name}: error {error:.3g}, naive {naive_error:.3g}"
        )


def grid_sample_path(case: Case, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator by `torch.nn.functional.grid_sample`, as detectors do it.

    Positions are float32 whatever the value's dtype (else their error would hide every other one);
    what is read, the weights and the sums are in the dtype of `value`.
    """
    batch_size, num_queries, num_heads = locations.shape[:3]
    head_dim = value.shape[3]
    value = value.expand(-1, -1, num_heads, -1)
    output = torch.zeros(batch_size * num_heads, head_dim, num_queries, dtype=value.dtype)
    first_row = first_point = 0
    for shape, count in zip(case.shapes, case.points, strict=True):
        level = value[:, first_row : first_row + math.prod(shape)].permute(0, 2, 3, 1)
        points = slice(first_point, first_point + count)
        unit = locations[:, :, :, points]
        if case.coordinates == "pixel":
            unit = (unit + 0.5) / torch.tensor(shape[::-1])
        grid = (2 * unit - 1).transpose(1, 2).flatten(0, 1)
        # grid_sample knows images, whose points lie [queries, points], and volumes: [..., 1].
        first_row += math.prod(shape)
        if len(shape) == 1:
            shape, grid = (
                (1, *shape),
                torch.stack((grid[..., 0], torch.zeros_like(grid[..., 0])), -1),
            )
        if len(shape) == 3:
            grid = grid[:, :, :, None]
        sampled = torch.nn.functional.grid_sample(
            level.reshape(batch_size * num_heads, head_dim, *shape).float(),
            grid,
            mode={"linear": "bilinear", "nearest": "nearest"}[case.interpolation],
            padding_mode=case.padding,
            align_corners=case.coordinates == "normalized_corners",
        ).to(value.dtype)
        share = weights[:, :, :, points].transpose(1, 2).flatten(0, 1).to(value.dtype)
        sampled = sampled.reshape(*sampled.shape[:3], count)
        output = output + (sampled * share[:, None]).sum(-1)
        first_point += count
    return output.view(batch_size, num_heads * head_dim, num_queries).transpose(1, 2)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def default_signals() -> None:
    """To be called in a new process: one that was started in the background ignores signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
