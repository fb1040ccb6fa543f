"""Gradients by the definition, in float64 on the CPU, and how far off each number of one may be.

A gradient is a sum of products. Each addend is some roundings of float32 away from the truth, and a sum of n
addends in any order about √n more, in parts of the sum of the addends' sizes: (UNITS_OF_ADDENDS + 2 √n) units of
that, and a few of the largest such sum in the tensor, because weights that come from a softmax are as exact as
the largest one. Rounded to 16 bits once, a gradient may be twice as far off as the rounding of the truth can be; a
sum in 16 bits would be off by √n of it.

The gradient of a location jumps where its position crosses a grid line, and that of a value where a rounded
position does. The definition says how positions are rounded, to the last bit: the truth is taken at those
positions, as pixels, and everything else in it is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.variants import Inputs, Variant
from saccade import reference
from saccade.sampling import sampling_locations

UNITS_OF_ADDENDS = 16
UNITS_OF_THE_LARGEST = 4
# Beyond any map, and far from where the numbers of float32 end.
FAR = 1e30
NAMES = {
    "plain": ("value", "sampling_locations", "attention_weights"),
    "fused": ("value", "reference_points", "sampling_offsets", "attention_logits"),
}


class Expected(NamedTuple):
    """A gradient by the definition."""

    name: str
    gradient: Tensor
    allowed: Tensor
    """How far off each number may be."""
    dtype: torch.dtype
    """In which it has to come."""


def truth_of_gradients(
    variant: Variant,
    inputs: Inputs,
    grad_output: Tensor,
    library: Any = reference,
    *,
    of_a_cell: int | None = None,
) -> list[Expected]:
    """The gradients of all inputs.

    Args:
        variant: the call.
        inputs: its tensors.
        grad_output: the gradient of its output.
        library: what computes the plain operator's gradients, in float64.
        of_a_cell: how many points read a cell at most, where that has been counted.
    """
    pixels = positions(variant, inputs)
    fused = variant.form == "fused"
    points = [tensor.double() for tensor in inputs.points]
    weights = points[-1].softmax(-1) if fused else points[-1]
    value, grad_output = inputs.value.double(), grad_output.double()
    grad_value, *grad_points = _plain_gradients(
        variant, value, pixels, weights, inputs.mask, grad_output, library
    )
    # The same of the sizes of all factors: for each number the sum of its addends' sizes.
    sum_value, _, sum_weights = _plain_gradients(
        variant, value.abs(), pixels, weights.abs(), inputs.mask, grad_output.abs(), library
    )
    # By a location: two slopes, each times at most the length of both vectors.
    of_heads = grad_output.unflatten(-1, (variant.num_heads, variant.head_dim))
    lengths = of_heads.norm(dim=-1, keepdim=True) * largest(value.norm(dim=-1))
    moves = pixels.isfinite() & (not variant.rounds_positions)
    sum_pixels = torch.where(moves, (2 * weights.abs() * lengths)[..., None], 0)
    exact = [grad_value, *_of_points(variant, points, *grad_points)]
    sums = [sum_value, *_of_points(variant, points, sum_pixels, sum_weights, sizes=True)]
    found = []
    for name, gradient, sizes, given in zip(
        NAMES[variant.form], exact, sums, (inputs.value, *inputs.points), strict=True
    ):
        number = of_a_cell if name == "value" and of_a_cell else addends(variant, name)
        allowed = allowed_errors(number, gradient, sizes, variant, given.dtype)
        found.append(Expected(name, gradient, allowed, given.dtype))
    return found


def positions(variant: Variant, inputs: Inputs) -> Tensor:
    """Where the points are, in pixels as the definition rounds them, then in float64.

    A point without a finite location is NaN.
    """
    dtype = torch.float64 if variant.dtype == "float64" else torch.float32
    points = [tensor.to(dtype) for tensor in inputs.points]
    if variant.form == "plain":
        locations = points[0]
    else:
        reference_points, offsets = (_finite(tensor) for tensor in points[:2])
        locations = _locations(variant, reference_points, offsets)
        # By arithmetic: whatever is not finite makes 0 · it NaN, and NaN spreads to its points.
        spoiled = _locations(
            variant,
            (0 * points[0]).sum(-1, keepdim=True).expand(reference_points.shape),
            (0 * points[1]).sum(-1, keepdim=True).expand(offsets.shape),
        )
        locations = torch.where(spoiled.isnan(), torch.nan, locations)
    finite = locations.isfinite().all(-1, keepdim=True)
    scale, shift = _scale_and_shift(variant, dtype)
    pixels = (locations * scale + shift).clamp(-FAR, FAR).double()  # rounded twice
    if variant.sampling.startswith("discrete"):
        pixels = pixels - 1  # which the definition adds again
    return torch.where(finite, pixels, torch.nan)


def addends(variant: Variant, name: str) -> int:
    """Of how many products a number of a gradient is the sum, at most."""
    if name == "value":
        of_all_heads = variant.num_heads if variant.heads == "shared" else 1
        return math.prod(variant.looks) * max(variant.num_points) * of_all_heads
    of_a_dot = variant.head_dim * 2**variant.spatial_dims
    others = {"attention_logits": 1, "reference_points": variant.num_heads}.get(name, 0)
    return of_a_dot + others * sum(variant.num_points)


def allowed_errors(
    number: int, gradient: Tensor, sizes: Tensor, variant: Variant, dtype: torch.dtype
) -> Tensor:
    """How far off each number of a gradient may be; `sizes` are the sums of the addends' sizes."""
    unit = torch.finfo(torch.float64 if variant.dtype == "float64" else torch.float32).eps
    allowed = unit * (UNITS_OF_ADDENDS + 2 * math.sqrt(number)) * sizes
    allowed = allowed + unit * UNITS_OF_THE_LARGEST * largest(sizes)
    if dtype.itemsize == 2:
        kind = torch.finfo(dtype)
        allowed = allowed + kind.eps * gradient.abs().clamp_min(kind.smallest_normal)
    return allowed


def largest(tensor: Tensor) -> float:
    """The largest number, 0 where there are none."""
    return float(tensor.max()) if tensor.numel() else 0.0


def _plain_gradients(
    variant: Variant,
    value: Tensor,
    pixels: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    grad_output: Tensor,
    library: Any,
) -> tuple[Tensor, ...]:
    """Of value, positions in pixels, and attention weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in (value, pixels, weights)]
    options = variant.options | {"coordinates": "pixel"}
    options.pop("reference_index", None)
    output = library.deformable_attention(
        leaves[0], variant.shapes, *leaves[1:], value_padding_mask=mask, **options
    )
    return torch.autograd.grad(output, leaves, grad_output.reshape(output.shape))


def _of_points(
    variant: Variant,
    points: Sequence[Tensor],
    grad_pixels: Tensor,
    grad_weights: Tensor,
    *,
    sizes: bool = False,
) -> list[Tensor]:
    """Gradients of the call's points from those of positions and weights; or sums of addends' sizes."""
    scale, _ = _scale_and_shift(variant, torch.float64)
    grad_locations = grad_pixels * scale
    if variant.form == "plain":
        return [grad_locations, grad_weights]
    *places, logits = points
    weights = logits.softmax(-1)
    share = weights * grad_weights
    of_all = weights * share.sum(-1, keepdim=True)
    leaves = [
        (_finite(tensor).abs() if sizes else _finite(tensor)).requires_grad_() for tensor in places
    ]
    found = torch.autograd.grad(_locations(variant, *leaves), leaves, grad_locations)
    return [*found, share + of_all if sizes else share - of_all]


def _locations(variant: Variant, reference_points: Tensor, offsets: Tensor) -> Tensor:
    options = variant.options
    return sampling_locations(
        reference_points,
        offsets,
        variant.shapes,
        variant.num_points,
        reference_index=options.get("reference_index"),
        coordinates=options["coordinates"],
    )


def _finite(tensor: Tensor) -> Tensor:
    """Zeros in the place of a reference or an offset of which any coordinate is not finite."""
    return torch.where(tensor.isfinite().all(-1, keepdim=True), tensor, 0)


def _scale_and_shift(variant: Variant, dtype: torch.dtype) -> tuple[Tensor, float]:
    """From a location to a position in pixels: times [P, N], plus."""
    of_a_pixel = {"normalized": 0, "normalized_corners": 1}.get(variant.coordinates)
    sizes = [
        [1 if of_a_pixel is None else size - of_a_pixel for size in reversed(shape)]
        for shape, count in zip(variant.shapes, variant.num_points, strict=True)
        for _ in range(count)
    ]
    shift = -0.5 if variant.coordinates == "normalized" else 0.0
    shift += 1.0 if variant.sampling.startswith("discrete") else 0.0
    return torch.tensor(sizes, dtype=dtype), shift
