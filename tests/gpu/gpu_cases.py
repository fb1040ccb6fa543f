"""Random calls for tests on a card, and the definition on the CPU as the truth."""

from __future__ import annotations

import itertools
import math
import random
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import saccade
from saccade import reference

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA card"),
]

AXES: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "form": ("plain", "fused"),
    "spatial_dims": (2, 1, 3),
    "sampling": (
        *("linear zeros", "linear border", "nearest zeros", "nearest border"),
        *("discrete border", "discrete zeros", "discrete border_height"),
    ),
    "coordinates": ("normalized", "pixel", "normalized_corners"),
    "head_dim": (32, 1, 5, 16, 33, 64, 256),
    "num_heads": (8, 1, 3),
    "shared_head": (False, True),
    "points": ("same", "list", "one"),
    "point_dtype": ("wide", "float16", "bfloat16"),
    "references": ("one", "levels", "index", "boxes", "boxes of levels"),
    "queries": ("prime", "one", "many", "ragged", "none", "no batch"),
    "layout": ("contiguous", "strided", "offset"),
    "positions": ("anywhere", "ties", "non-finite"),
    "mask": (False, True),
}
SHAPES = {1: [(13,), (7,)], 2: [(9, 13), (5, 7), (3, 4)], 3: [(4, 5, 6), (2, 3, 3)]}
NON_FINITE = (math.nan, math.inf, -math.inf, 1e30, -1e30)
# Relative to the largest element: sums of float32 (float64) in any order, then rounded once to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


class Variant(NamedTuple):
    """One combination; the fields are the axes."""

    dtype: str = "float32"
    form: str = "plain"
    spatial_dims: int = 2
    sampling: str = "linear zeros"
    coordinates: str = "normalized"
    head_dim: int = 32
    num_heads: int = 8
    shared_head: bool = False
    points: str = "same"
    point_dtype: str = "wide"
    references: str = "one"
    queries: str = "prime"
    layout: str = "contiguous"
    positions: str = "anywhere"
    mask: bool = False

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in self)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return SHAPES[self.spatial_dims]

    @property
    def num_points(self) -> list[int]:
        levels = len(self.shapes)
        return {"same": [4] * levels, "list": [3, 6, 3][:levels], "one": [1] * levels}[self.points]

    @property
    def leading_axes(self) -> tuple[int, ...]:
        """Those of the points before the heads."""
        if self.queries == "ragged":
            return (70,)
        batch_size = {"no batch": 0, "many": 1}.get(self.queries, 2)
        return (batch_size, {"one": 1, "many": 1009, "none": 0}.get(self.queries, 37))

    @property
    def options(self) -> dict[str, Any]:
        interpolation, padding = self.sampling.split()
        options = {
            "num_points": self.num_points,
            "interpolation": interpolation,
            "padding": padding,
            "coordinates": self.coordinates,
            "queries_per_map": [17, 0, 53] if self.queries == "ragged" else None,
        }
        if self.form == "fused" and self.references == "index":
            options["reference_index"] = [(7 * k + 1) % 3 for k in range(sum(self.num_points))]
        return options

    def is_valid(self) -> bool:
        """Plain calls have no reference points, and only an image has a height to clamp x to."""
        if self.form == "plain" and self.references != "one":
            return False
        return not (self.sampling.endswith("border_height") and self.spatial_dims != 2)


def pairwise_variants() -> list[Variant]:
    """Variants among which every valid pair of values of any two axes occurs, drawn with a fixed seed."""
    chance = random.Random(0)
    covered: set[Any] = set()
    variants = []
    for one, other in itertools.combinations(AXES, 2):
        for values in itertools.product(AXES[one], AXES[other]):
            if (one, other, *values) in covered:
                continue
            for _ in range(40):  # a pair that no valid variant has is given up
                drawn = {axis: chance.choice(choices) for axis, choices in AXES.items()}
                variant = Variant(**drawn | dict(zip((one, other), values, strict=True)))
                if variant.is_valid():
                    variants.append(variant)
                    fields = list(zip(Variant._fields, variant, strict=True))
                    covered |= {
                        (a, b, x, y) for (a, x), (b, y) in itertools.combinations(fields, 2)
                    }
                    break
    return variants


def draw(variant: Variant, seed: int) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Tensors of a call on the CPU (value and points), the mask, and the gradient of the output."""
    numbers = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64)

    batch_size = 3 if variant.queries == "ragged" else variant.leading_axes[0]
    value_heads = 1 if variant.shared_head else variant.num_heads
    num_positions = sum(math.prod(shape) for shape in variant.shapes)
    value = normal(batch_size, num_positions, value_heads, variant.head_dim)
    mask = torch.rand(value.shape[:2], generator=numbers) < 0.3 if variant.mask else None
    pairs = (*variant.leading_axes, variant.num_heads, sum(variant.num_points))
    dims = variant.spatial_dims
    levels = zip(variant.shapes, variant.num_points, strict=True)
    point_sizes = [shape for shape, count in levels for _ in range(count)]
    if variant.form == "plain":
        points = [_positions(variant, (*pairs, dims), point_sizes, numbers)]
        points.append(normal(*pairs).softmax(-1))
    else:
        count = {"levels": len(variant.shapes), "index": 3}.get(variant.references.split()[-1], 1)
        shape = (*variant.leading_axes, count, dims)
        references = _positions(variant, shape, variant.shapes[:1], numbers)
        if variant.references.startswith("boxes"):
            sizes = 2 * torch.rand(references.shape, generator=numbers, dtype=torch.float64)
            references = torch.cat((references, sizes), -1)
        points = [references, 2 * normal(*pairs, dims), 3 * normal(*pairs)]
    wide = torch.float64 if variant.dtype == "float64" else torch.float32
    point_dtype = wide if variant.point_dtype == "wide" else getattr(torch, variant.point_dtype)
    dtype = getattr(torch, variant.dtype)
    grad_output = normal(*variant.leading_axes, variant.num_heads * variant.head_dim).to(dtype)
    return [value.to(dtype), *(one.to(point_dtype) for one in points)], mask, grad_output


def _positions(
    variant: Variant, shape: tuple[int, ...], sizes: list[tuple[int, ...]], numbers: torch.Generator
) -> Tensor:
    """From outside the map on one side to outside on the other, in the unit of the coordinates."""
    size = torch.tensor([one[::-1] for one in sizes], dtype=torch.float64)
    unit = torch.rand(shape, generator=numbers, dtype=torch.float64)
    pixels = (1.6 * unit - 0.3) * size - 0.5
    if variant.positions == "ties":
        pixels = (4 * pixels).round() / 4
    positions = {
        "pixel": pixels,
        "normalized": (pixels + 0.5) / size,
        "normalized_corners": pixels / (size - 1),
    }[variant.coordinates]
    if variant.positions == "non-finite":
        which = torch.randint(len(NON_FINITE), positions.shape, generator=numbers)
        replaced = torch.rand(positions.shape, generator=numbers) < 0.1
        constants = torch.tensor(NON_FINITE, dtype=torch.float64)
        positions = torch.where(replaced, constants[which], positions)
    return positions


def lay_out(tensor: Tensor, layout: str, device: torch.device | str) -> Tensor:
    """The tensor on the device, in a layout in memory."""
    tensor = tensor.to(device)
    if layout == "strided":
        wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=device)
        wide[..., 0] = tensor
        return wide[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "offset":  # one element from where memory is aligned
        flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    return tensor.contiguous()


def run(
    variant: Variant, tensors: list[Tensor], mask: Tensor | None, library: Any = saccade
) -> Tensor:
    """The call, on saccade or its reference."""
    name = {"plain": "deformable_attention", "fused": "fused_deformable_attention"}[variant.form]
    value, *points = tensors
    options = variant.options | {"value_padding_mask": mask}
    output: Tensor = getattr(library, name)(value, variant.shapes, *points, **options)
    return output


def run_both_ways(
    variant: Variant,
    tensors: list[Tensor],
    mask: Tensor | None,
    grad_output: Tensor,
    library: Any = saccade,
) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = run(variant, leaves, mask, library)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.view(output.shape))]


def expected_results(
    tensors: list[Tensor], mask: Tensor | None, grad_output: Tensor, variant: Variant
) -> list[Tensor]:
    """By the reference on the CPU, in the dtype that a call computes in, so that positions round alike."""
    wide = torch.float64 if variant.dtype == "float64" else torch.float32
    tensors = [tensor.to(wide) for tensor in tensors]
    return run_both_ways(variant, tensors, mask, grad_output.to(wide), reference)


def assert_close(actual: list[Tensor], expected: list[Tensor], tensors: list[Tensor]) -> None:
    """The output has the value's dtype, a gradient that of its tensor."""
    for result, truth, source in zip(actual, expected, [tensors[0], *tensors], strict=True):
        assert result.shape == truth.shape
        assert result.dtype == source.dtype
        if not truth.numel():
            continue
        result, truth = result.cpu().double(), truth.double()
        scale = float(truth.nan_to_num(0, 0, 0).abs().max())
        rtol = torch.finfo(source.dtype).eps if source.dtype.itemsize == 2 else 0.0
        # Beside that, one step between two subnormal numbers of 16 bits.
        subnormal = torch.finfo(source.dtype).tiny * rtol
        atol = TOLERANCE[tensors[0].dtype] * max(scale, 1e-6) + subnormal
        torch.testing.assert_close(result, truth, rtol=rtol, atol=atol, equal_nan=True)


@contextmanager
def deterministic():
    """Deterministic algorithms inside the block; torch then fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
