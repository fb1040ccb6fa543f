"""The variants of a call that are checked: which there are, and random inputs for one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    "heads": ("own", "shared"),
    "points": ("same", "list", "one"),
    "point_dtype": ("wide", "float16", "bfloat16"),
    "references": ("one", "levels", "index", "boxes", "boxes of levels"),
    "queries": ("prime", "one", "many", "ragged", "none", "no batch"),
    "layout": ("contiguous", "strided", "offset"),
    "places": ("anywhere", "ties", "non-finite"),
    "mask": (False, True),
}
SHAPES: dict[int, list[tuple[int, ...]]] = {
    1: [(13,), (7,)],
    2: [(9, 13), (5, 7), (3, 4)],
    3: [(4, 5, 6), (2, 3, 3)],
}
NON_FINITE = (math.nan, math.inf, -math.inf, 1e30, -1e30)


class Variant(NamedTuple):
    """One combination; the fields are the axes."""

    dtype: str = "float32"
    form: str = "plain"
    spatial_dims: int = 2
    sampling: str = "linear zeros"
    coordinates: str = "normalized"
    head_dim: int = 32
    num_heads: int = 8
    heads: str = "own"
    points: str = "same"
    point_dtype: str = "wide"
    references: str = "one"
    queries: str = "prime"
    layout: str = "contiguous"
    places: str = "anywhere"
    mask: bool = False

    @property
    def name(self) -> str:
        """What a person reads, and what a row of the results is known by."""
        return (
            f"{self.form} {self.dtype}, {self.spatial_dims}-D, {self.sampling}, {self.coordinates}, "
            f"{self.num_heads} heads of {self.head_dim} ({self.heads}), points: {self.points} in "
            f"{self.point_dtype} {self.places}, references: {self.references}, queries: "
            f"{self.queries}, {self.layout}{', mask' if self.mask else ''}"
        )

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the levels."""
        return SHAPES[self.spatial_dims]

    @property
    def num_points(self) -> list[int]:
        """Of each level."""
        levels = len(self.shapes)
        return {"same": [4] * levels, "list": [3, 6, 3][:levels], "one": [1] * levels}[self.points]

    @property
    def rounds_positions(self) -> bool:
        """Whether the result jumps where a position does."""
        return not self.sampling.startswith("linear")

    @property
    def batch_size(self) -> int:
        """Number of maps."""
        return {"ragged": 3, "no batch": 0, "many": 1}.get(self.queries, 2)

    @property
    def queries_per_map(self) -> list[int] | None:
        """Of a ragged call."""
        return [17, 0, 53] if self.queries == "ragged" else None

    @property
    def looks(self) -> tuple[int, ...]:
        """The axes before the heads."""
        if self.queries_per_map is not None:
            return (sum(self.queries_per_map),)
        number = {"one": 1, "many": 1009, "none": 0}.get(self.queries, 37)
        return (self.batch_size, number)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the public function, but for the mask."""
        interpolation, padding = self.sampling.split()
        found = {
            "num_points": self.num_points,
            "interpolation": interpolation,
            "padding": padding,
            "coordinates": self.coordinates,
            "queries_per_map": self.queries_per_map,
        }
        if self.form == "fused" and self.references == "index":
            found["reference_index"] = [(7 * k + 1) % 3 for k in range(sum(self.num_points))]
        return found


def normal(variant: Variant) -> Variant:
    """The variant without what is no case for it: a plain call has no reference points, and only an
    image has a height that x could be clamped to.
    """
    if variant.form == "plain":
        variant = variant._replace(references="one")
    if variant.sampling.endswith("border_height") and variant.spatial_dims != 2:
        variant = variant._replace(sampling="discrete border")
    return variant


def _is_a_case(one: str, a: Any, other: str, b: Any) -> bool:
    """Whether two values of two axes go together."""
    pair = {one: a, other: b}
    if pair.get("form") == "plain" and pair.get("references", "one") != "one":
        return False
    return not (
        pair.get("sampling") == "discrete border_height" and pair.get("spatial_dims", 2) != 2
    )


def pairs_of(variant: Variant) -> set[tuple[str, Any, str, Any]]:
    """All pairs of values of two axes that a variant covers."""
    values = zip(Variant._fields, variant, strict=True)
    return {(*one, *other) for one, other in itertools.combinations(values, 2)}


def planned(seed: int = 0) -> list[Variant]:
    """Variants among which every pair of values of any two axes occurs, the simplest first."""
    chance = random.Random(seed)
    reachable = {
        pair
        for one, other in itertools.combinations(AXES, 2)
        for a, b in itertools.product(AXES[one], AXES[other])
        for pair in [(one, a, other, b)]
        if _is_a_case(*pair)
    }
    found = [Variant(), Variant(form="fused"), Variant("bfloat16"), Variant("bfloat16", "fused")]
    left = reachable.difference(*map(pairs_of, found))
    while left:
        one, a, other, b = min(left, key=repr)
        candidates = []
        for _ in range(60):
            drawn = {axis: chance.choice(values) for axis, values in AXES.items()}
            if "references" in (one, other):
                drawn["form"] = "fused"
            if "sampling" in (one, other):
                drawn["spatial_dims"] = 2
            candidates.append(normal(Variant(**drawn | {one: a, other: b})))
        best = max(candidates, key=lambda candidate: len(left & pairs_of(candidate)))
        left -= pairs_of(best)
        found.append(best)
    return found


def random_variants(seed: int) -> Iterator[Variant]:
    """Any variants, without end."""
    chance = random.Random(seed)
    while True:
        yield normal(Variant(**{axis: chance.choice(values) for axis, values in AXES.items()}))


class Inputs(NamedTuple):
    """Tensors of one call: of a plain one, two `points`, of a fused one, three."""

    value: Tensor
    points: tuple[Tensor, ...]
    mask: Tensor | None

    def map(self, change: Any) -> Inputs:
        """The same with every floating-point tensor changed."""
        return Inputs(change(self.value), tuple(map(change, self.points)), self.mask)


def draw(variant: Variant, seed: int) -> Inputs:
    """Random inputs on the CPU."""
    numbers = torch.Generator().manual_seed(seed)

    def normal_numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64)

    dims, points = variant.spatial_dims, sum(variant.num_points)
    positions = sum(math.prod(shape) for shape in variant.shapes)
    heads = 1 if variant.heads == "shared" else variant.num_heads
    value = normal_numbers(variant.batch_size, positions, heads, variant.head_dim)
    mask = torch.rand(value.shape[:2], generator=numbers) < 0.3 if variant.mask else None
    of_points = (*variant.looks, variant.num_heads, points)
    weights = normal_numbers(*of_points)
    if variant.form == "plain":
        locations = _places(variant, (*of_points, dims), variant.shapes, numbers)
        drawn = (locations, weights.softmax(-1))
    else:
        number = {"levels": len(variant.shapes), "index": 3}.get(variant.references.split()[-1], 1)
        # Boxes and references without a level of their own lie on the first level's grid.
        references = _places(variant, (*variant.looks, number, dims), variant.shapes[:1], numbers)
        offsets = 2 * normal_numbers(*of_points, dims)
        if variant.places == "ties":
            offsets = (2 * offsets).round() / 2
        if variant.references.startswith("boxes"):
            sizes = 2 * torch.rand(references.shape, generator=numbers, dtype=torch.float64)
            references = torch.cat((references, sizes), -1)
        drawn = (references, _spoiled(variant, offsets, numbers), 3 * weights)
    wide = torch.float64 if variant.dtype == "float64" else torch.float32
    dtype = wide if variant.point_dtype == "wide" else getattr(torch, variant.point_dtype)
    return Inputs(
        value.to(getattr(torch, variant.dtype)), tuple(one.to(dtype) for one in drawn), mask
    )


def _places(
    variant: Variant,
    shape: tuple[int, ...],
    levels: list[tuple[int, ...]],
    numbers: torch.Generator,
) -> Tensor:
    """Positions from well outside the map to well outside on the other side, in the right unit.

    `shape` ends in points (or references) and coordinates; with several levels the points are theirs.
    """
    if len(levels) > 1:
        of_point = [
            level for level, k in zip(levels, variant.num_points, strict=True) for _ in range(k)
        ]
    else:
        of_point = levels
    sizes = torch.tensor([level[::-1] for level in of_point], dtype=torch.float64)
    unit = torch.rand(shape, generator=numbers, dtype=torch.float64)
    pixels = (1.6 * unit - 0.3) * sizes - 0.5
    if variant.places == "ties":
        pixels = (4 * pixels).round() / 4
    places = {
        "pixel": pixels,
        "normalized": (pixels + 0.5) / sizes,
        "normalized_corners": pixels / (sizes - 1),
    }[variant.coordinates]
    return _spoiled(variant, places, numbers)


def _spoiled(variant: Variant, places: Tensor, numbers: torch.Generator) -> Tensor:
    """A tenth of the numbers non-finite or far beyond any map, where the variant asks for it."""
    if variant.places != "non-finite":
        return places
    which = torch.randint(len(NON_FINITE), places.shape, generator=numbers)
    spoiled = torch.rand(places.shape, generator=numbers) < 0.1
    return torch.where(spoiled, torch.tensor(NON_FINITE, dtype=places.dtype)[which], places)


def laid_out(variant: Variant, inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on the device in the variant's layout in memory."""

    def lay(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        if variant.layout == "strided":
            wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=device)
            wide[..., 0] = tensor
            return wide[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        if variant.layout == "offset":  # one element from where memory is aligned
            flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=device)
            flat[1:] = tensor.flatten()
            return flat[1:].view(tensor.shape)
        return tensor.contiguous()

    found = inputs.map(lay)
    return found._replace(mask=None if inputs.mask is None else inputs.mask.to(device))


def call(variant: Variant, inputs: Inputs, library: Any) -> Tensor:
    """The call on `library`: saccade, its reference, or anything with the same two functions."""
    functions = {
        "plain": library.deformable_attention,
        "fused": library.fused_deformable_attention,
    }
    found: Tensor = functions[variant.form](
        inputs.value,
        variant.shapes,
        *inputs.points,
        value_padding_mask=inputs.mask,
        **variant.options,
    )
    return found
