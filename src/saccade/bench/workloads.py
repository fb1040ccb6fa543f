"""The shapes in which models use the operator, and random inputs like theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The spread of model-like locations around their reference point.
OFFSET_PIXELS = 4.0


class Workload(NamedTuple):
    """One use of the operator."""

    name: str
    source: str
    shapes: Sequence[tuple[int, ...]]
    num_queries: int | None = None
    """None: every position of the feature maps is a query."""
    num_heads: int = 8
    head_dim: int = 32
    num_points: int | Sequence[int] = 4
    batch_size: int = 1
    shared_head: bool = False

    @property
    def num_positions(self) -> int:
        """Positions of all levels."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def spatial_dims(self) -> int:
        """1 for signals, 2 for images, 3 for volumes."""
        return len(self.shapes[0])

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.num_positions if self.num_queries is None else self.num_queries

    @property
    def points(self) -> list[int]:
        """Points per level."""
        number = self.num_points
        return [number] * len(self.shapes) if isinstance(number, int) else list(number)


_DETR = [(100, 167), (50, 84), (25, 42), (13, 21)]
_REAL_TIME = [(80, 80), (40, 40), (20, 20)]

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("detr-encoder", "Deformable DETR R50, 800 x 1333", _DETR),
        Workload("detr-decoder", "Deformable DETR R50, 800 x 1333", _DETR, 300),
        Workload("dino-decoder", "DINO and Grounding DINO, 4 scales", _DETR, 900),
        Workload("dino5-encoder", "DINO, 5 scales", [(200, 334), *_DETR]),
        Workload("mask2former-encoder", "Mask2Former, 1024²", [(32, 32), (64, 64), (128, 128)]),
        Workload("rtdetr-decoder", "RT-DETR R50, 640²", _REAL_TIME, 300),
        Workload("dfine-decoder", "D-FINE, DEIMv2", _REAL_TIME, 300, num_points=[3, 6, 3]),
        Workload("rfdetr-nano", "RF-DETR N", [(24, 24)], 300, 16, 16, 2),
        Workload("rfdetr-large", "RF-DETR L", [(44, 44)], 300, 16, 16, 2),
        Workload("rfdetr-issue-1385", "roboflow/rf-detr #1385", [(48, 48)], 1300, 16, 16, 2),
        Workload("bevformer-tsa", "BEVFormer base, temporal", [(200, 200)], batch_size=2),
        Workload(
            "bevformer-sca",
            "BEVFormer base, spatial, 6 cameras",
            [(116, 200), (58, 100), (29, 50), (15, 25)],
            9675,
            num_points=8,
            batch_size=6,
        ),
        Workload("tadtr-1d", "TadTR, temporal", [(128,)]),
        Workload(
            "medical-3d", "transoar, large", [(16, 15, 39), (8, 8, 20), (4, 4, 10)], num_heads=36
        ),
        Workload("plain-single-map", "the plain form", [(64, 64)], head_dim=256, shared_head=True),
    )
}


class Inputs(NamedTuple):
    """Tensors of one call."""

    value: Tensor  # [B, S, M or 1, D]
    sampling_locations: Tensor  # [B, Q, M, P, N]
    attention_weights: Tensor  # [B, Q, M, P]
    grad_output: Tensor  # [B, Q, M * D]


def draw(workload: Workload, *, dtype: torch.dtype, uniform: bool = False, seed: int = 0) -> Inputs:
    """Random inputs of a workload.

    Args:
        workload: the sizes.
        dtype: of the value and of the gradient of the output; locations and weights are float32.
        uniform: whether locations lie anywhere on the map. Otherwise they are model-like: near the
            query's own position (in decoders near a random position).
        seed: of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)
    batch_size, queries, heads = workload.batch_size, workload.queries, workload.num_heads
    value_heads = 1 if workload.shared_head else heads
    value = torch.randn(
        batch_size, workload.num_positions, value_heads, workload.head_dim, generator=random
    )
    levels = zip(workload.shapes, workload.points, strict=True)
    sizes = torch.tensor([shape[::-1] for shape, count in levels for _ in range(count)]).float()
    shape = (batch_size, queries, heads, len(sizes), workload.spatial_dims)
    if uniform:
        locations = torch.rand(shape, generator=random)
    else:
        offsets = torch.randn(shape, generator=random) * (OFFSET_PIXELS / sizes)
        locations = reference_points(workload, random)[:, None, None] + offsets
    logits = torch.randn(shape[:-1], generator=random)
    grad_output = torch.randn(batch_size, queries, heads * workload.head_dim, generator=random)
    return Inputs(value.to(dtype), locations, logits.softmax(-1), grad_output.to(dtype))


def reference_points(workload: Workload, random: torch.Generator) -> Tensor:
    """[Q, N], normalized: cell centres where each position is a query, else random positions."""
    if workload.num_queries is not None:
        return torch.rand(workload.queries, workload.spatial_dims, generator=random)
    centres = []
    for shape in workload.shapes:
        axes = torch.meshgrid(*((torch.arange(size) + 0.5) / size for size in shape), indexing="ij")
        # A location is (x, y), a shape is (H, W).
        centres.append(torch.stack(axes[::-1], -1).flatten(0, -2))
    return torch.cat(centres)
