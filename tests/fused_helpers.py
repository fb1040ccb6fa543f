"""Random calls with reference points, logits and queries of several maps, and their truth as loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from helpers import Case, loops
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade import functional
from saccade.call import Call, parse_call


@dataclass
class FusedCase(Case):
    """A random call, fused by default.

    `references` is the number of reference points of each query: 1, "levels", or any number by an
    index; None: the points are sampling locations.
    """

    references: int | str | None = 1
    softmax: bool = True  # the weights are logits
    boxes: bool = False
    queries_per_map: list[int] | None = None  # in place of num_queries

    @property
    def reference_index(self) -> list[int] | None:
        if self.references in (None, 1, "levels"):
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
            "softmax": self.softmax,
        }

    @property
    def query_axes(self) -> tuple[int, ...]:
        """The axes before the heads."""
        if self.queries_per_map is None:
            return (self.batch_size, self.num_queries)
        return (sum(self.queries_per_map),)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.query_axes, self.num_heads * self.head_dim)

    def draw(self) -> tuple[Tensor, ...]:
        """value, reference_points, flat sampling_offsets, attention_logits; or without references."""
        value, _, weights = super().draw()
        dtype = weights.dtype
        points_shape = (*self.query_axes, self.num_heads, sum(self.points))
        if self.references is None:
            positions = [self._draw_positions(*points_shape)]
        else:
            references = self._draw_positions(*self.query_axes, self.num_references)
            if self.boxes:
                references = torch.cat((references, 2 * torch.rand_like(references)), -1)
            offsets = 2 * torch.randn(*points_shape, self.spatial_dims, dtype=torch.float64)
            positions = [references, offsets]
        weights = torch.randn(points_shape, dtype=torch.float64)
        weights = 3 * weights if self.softmax else weights
        return value, *(tensor.to(dtype) for tensor in (*positions, weights))

    def _draw_positions(self, *axes: int) -> Tensor:
        unit = torch.rand(*axes, self.spatial_dims, dtype=torch.float64)
        positions = unit * (1 + 2 * self.spread) - self.spread
        return positions * 6 if self.coordinates == "pixel" else positions

    def parse(self, value: Tensor, *points: Tensor) -> Call:
        *references, positions, weights = points
        return parse_call(
            value,
            self.shapes,
            positions,
            weights,
            reference_points=references[0] if references else None,
            **self.options,
        )

    def call(self, value: Tensor, *points: Tensor) -> Tensor:
        options = {name: value for name, value in self.options.items() if name != "softmax"}
        if self.softmax and self.references is not None:
            return saccade.fused_deformable_attention(value, self.shapes, *points, **options)
        if not self.softmax and self.references is None:
            del options["reference_index"]
            return saccade.deformable_attention(value, self.shapes, *points, **options)
        # The other two combinations have no public function.
        return functional.run(self.parse(value, *points))


# The four combinations of points and weights, and two shapes of reference points.
COMBINATIONS = {
    "locations-weights": FusedCase(references=None, softmax=False),
    "locations-logits": FusedCase(references=None),
    "offsets-weights": FusedCase(references="levels", softmax=False),
    "boxes-weights": FusedCase(references=2, boxes=True, softmax=False),
    "offsets-logits": FusedCase(),
    "boxes-logits": FusedCase(references="levels", boxes=True),
}


def locations_and_weights_by_loops(case: FusedCase, *points: Tensor) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights, element by element, in Python floats."""
    *references, positions, scores = points
    weights = torch.zeros_like(scores) if case.softmax else scores
    locations = torch.zeros_like(positions) if references else positions
    level_of_point = [level for level, count in enumerate(case.points) for _ in range(count)]
    index = case.reference_index
    if index is None:
        index = level_of_point if case.references == "levels" else [0] * len(level_of_point)
    for pair in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).tolist():
        *query, _ = pair
        if case.softmax:
            powers = [math.exp(float(logit)) for logit in scores[tuple(pair)]]
            for k, power in enumerate(powers):
                weights[(*pair, k)] = power / sum(powers)
        for k, level in enumerate(level_of_point if references else []):
            reference = references[0][(*query, index[k])]
            for n, size in enumerate(reversed(case.shapes[level])):
                offset = float(positions[(*pair, k, n)])
                if case.boxes:
                    size_of_box = float(reference[case.spatial_dims + n])
                    distance = offset * 0.5 / case.points[level] * size_of_box
                elif case.coordinates == "pixel":
                    distance = offset
                elif case.coordinates == "normalized":
                    distance = offset / size
                else:
                    distance = offset / (size - 1) if size > 1 else 0.0
                locations[(*pair, k, n)] = float(reference[n]) + distance
    return locations, weights


def fused_loops(case: FusedCase, value: Tensor, *points: Tensor) -> Tensor:
    """The operator as scalar loops. Shares no code with saccade."""
    locations, weights = locations_and_weights_by_loops(case, *points)
    if case.queries_per_map is None:
        return loops(case, value, locations, weights)
    outputs, begin = [], 0
    for batch_index, count in enumerate(case.queries_per_map):
        queries = slice(begin, begin + count)
        begin += count
        value_map = value[batch_index : batch_index + 1]
        outputs.append(loops(case, value_map, locations[None, queries], weights[None, queries])[0])
    return torch.cat(outputs)


def run_fused(case: FusedCase, inputs: tuple[Tensor, ...], grad_output: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs, on the backend in force."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = case.call(*leaves)
    output.backward(grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@st.composite
def fused_calls(draw, *, max_queries, max_ragged_queries, max_points, max_maps, max_heads):
    """Fused calls of any kind, in float64, up to the sizes named."""
    spatial_dims = draw(st.integers(1, 3))
    shape = st.tuples(*[st.integers(1, (30, 9, 5)[spatial_dims - 1])] * spatial_dims)
    levels = draw(st.integers(1, 3))
    batch_size = draw(st.integers(0, max_maps))
    counts = st.lists(st.integers(0, max_ragged_queries), min_size=batch_size, max_size=batch_size)
    points = st.integers(1, max_points)
    return FusedCase(
        shapes=draw(st.lists(shape, min_size=levels, max_size=levels)),
        num_points=draw(st.lists(points, min_size=levels, max_size=levels)),
        batch_size=batch_size,
        num_queries=draw(st.integers(0, max_queries)),
        queries_per_map=draw(st.none() | counts),
        num_heads=draw(st.integers(1, max_heads)),
        head_dim=draw(st.integers(1, 40)),
        shared_head=draw(st.booleans()),
        references=draw(st.sampled_from([1, "levels", 2, 9])),
        boxes=draw(st.booleans()),
        interpolation=draw(st.sampled_from(["linear", "nearest", "discrete"])),
        padding=draw(st.sampled_from(["zeros", "border"])),
        coordinates=draw(st.sampled_from(["normalized", "normalized_corners", "pixel"])),
        dtype=torch.float64,
    )
