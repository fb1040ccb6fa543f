"""Random fused and ragged calls, and their truth as loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from helpers import Case, loops
from hypothesis import strategies as st
from torch import Tensor

import saccade


@dataclass
class FusedCase(Case):
    """A random fused call. `references` of each query: 1, "levels", or any number by an index."""

    references: int | str = 1
    boxes: bool = False
    queries_per_map: list[int] | None = None  # in place of num_queries

    @property
    def reference_index(self) -> list[int] | None:
        if self.references in (1, "levels"):
            return None
        return [(7 * k + 1) % self.references for k in range(sum(self.points))]

    @property
    def num_references(self) -> int:
        return len(self.shapes) if self.references == "levels" else self.references

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {
            "reference_index": self.reference_index,
            "queries_per_map": self.queries_per_map,
        }

    @property
    def looks(self) -> tuple[int, ...]:
        """The axes before the heads."""
        if self.queries_per_map is None:
            return (self.batch_size, self.num_queries)
        return (sum(self.queries_per_map),)

    def draw(self) -> tuple[Tensor, ...]:
        """value, reference_points, flat sampling_offsets, attention_logits."""
        value, _, weights = super().draw()
        dtype = weights.dtype
        unit = torch.rand(*self.looks, self.num_references, self.spatial_dims, dtype=torch.float64)
        references = unit * (1 + 2 * self.spread) - self.spread
        if self.coordinates == "pixel":
            references = references * 6
        if self.boxes:
            references = torch.cat((references, 2 * torch.rand_like(references)), -1)
        points = (*self.looks, self.num_heads, sum(self.points))
        offsets = 2 * torch.randn(*points, self.spatial_dims, dtype=torch.float64)
        logits = 3 * torch.randn(points, dtype=torch.float64)
        return value, references.to(dtype), offsets.to(dtype), logits.to(dtype)

    def call(self, value: Tensor, *points: Tensor) -> Tensor:
        return saccade.fused_deformable_attention(value, self.shapes, *points, **self.options)


def unfused_by_loops(
    case: FusedCase, references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations and weights, number by number, in Python floats."""
    locations, weights = torch.zeros_like(offsets), torch.zeros_like(logits)
    level_of = [level for level, count in enumerate(case.points) for _ in range(count)]
    index = case.reference_index
    if index is None:
        index = level_of if case.references == "levels" else [0] * len(level_of)
    dims = case.spatial_dims
    for look in torch.cartesian_prod(*map(torch.arange, logits.shape[:-1])).tolist():
        *query, _ = look
        powers = [math.exp(float(logit)) for logit in logits[tuple(look)]]
        for k, level in enumerate(level_of):
            weights[(*look, k)] = powers[k] / sum(powers)
            reference = references[(*query, index[k])]
            for n, size in enumerate(reversed(case.shapes[level])):
                offset = float(offsets[(*look, k, n)])
                if case.boxes:
                    moved = offset * 0.5 / case.points[level] * float(reference[dims + n])
                elif case.coordinates == "pixel":
                    moved = offset
                elif case.coordinates == "normalized":
                    moved = offset / size
                else:
                    moved = offset / (size - 1) if size > 1 else 0.0
                locations[(*look, k, n)] = float(reference[n]) + moved
    return locations, weights


def fused_loops(case: FusedCase, value: Tensor, *points: Tensor) -> Tensor:
    """The fused operator as scalar loops. Shares no code with saccade."""
    locations, weights = unfused_by_loops(case, *points)
    if case.queries_per_map is None:
        return loops(case, value, locations, weights)
    outputs, begin = [], 0
    for number, count in enumerate(case.queries_per_map):
        queries = slice(begin, begin + count)
        begin += count
        of_map = (value[number : number + 1], locations[None, queries], weights[None, queries])
        outputs.append(loops(case, *of_map)[0])
    return torch.cat(outputs)


def run_fused(case: FusedCase, inputs: tuple[Tensor, ...], grad_output: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs, on the backend in force."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = case.call(*leaves)
    output.backward(grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@st.composite
def fused_calls(draw, *, most_queries, most_of_a_map, most_points, most_maps, most_heads):
    """Fused calls of any kind, in float64, up to so many queries, queries of a map, points, …"""
    spatial_dims = draw(st.integers(1, 3))
    shape = st.tuples(*[st.integers(1, (30, 9, 5)[spatial_dims - 1])] * spatial_dims)
    levels = draw(st.integers(1, 3))
    batch_size = draw(st.integers(0, most_maps))
    counts = st.lists(st.integers(0, most_of_a_map), min_size=batch_size, max_size=batch_size)
    points = st.integers(1, most_points)
    return FusedCase(
        shapes=draw(st.lists(shape, min_size=levels, max_size=levels)),
        num_points=draw(st.lists(points, min_size=levels, max_size=levels)),
        batch_size=batch_size,
        num_queries=draw(st.integers(0, most_queries)),
        queries_per_map=draw(st.none() | counts),
        num_heads=draw(st.integers(1, most_heads)),
        head_dim=draw(st.integers(1, 40)),
        shared_head=draw(st.booleans()),
        references=draw(st.sampled_from([1, "levels", 2, 9])),
        boxes=draw(st.booleans()),
        interpolation=draw(st.sampled_from(["linear", "nearest", "discrete"])),
        padding=draw(st.sampled_from(["zeros", "border"])),
        coordinates=draw(st.sampled_from(["normalized", "normalized_corners", "pixel"])),
        dtype=torch.float64,
    )
