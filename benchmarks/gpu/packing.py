"""The layouts in which the peers take points, made from the registry's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.benchmark.workloads import Inputs, Workload


class Given(NamedTuple):
    """What most of the peers take: points by level, and tables of the levels on the device."""

    value: Tensor
    """[B, S, M, D], contiguous."""
    shapes: Tensor
    """[L, 2], int64."""
    starts: Tensor
    """[L], int64: the position at which each level begins."""
    locations: Tensor
    """[B, Q, M, L, K, 2], contiguous."""
    weights: Tensor
    """[B, Q, M, L, K], contiguous."""

    def with_levels(
        self, function: Callable[..., Tensor]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """A function of all five as one of value, locations and weights, and these three."""
        shapes, starts = self.shapes, self.starts
        return (
            lambda value, *points: function(value, shapes, starts, *points),
            (self.value, self.locations, self.weights),
        )


def by_level(
    workload: Workload, inputs: Inputs, dtype: torch.dtype, points: torch.dtype | None = None
) -> Given:
    """The inputs as the peers of the family take them, values in `dtype`, points in `points` or the same."""
    device = inputs.value.device
    shapes = torch.tensor([tuple(shape) for shape in workload.shapes], device=device)
    sizes = shapes.prod(1)
    levels = (len(workload.shapes), workload.points[0])
    value = inputs.value.expand(-1, -1, workload.num_heads, -1)
    return Given(
        value.to(dtype).contiguous(),
        shapes,
        sizes.cumsum(0) - sizes,
        inputs.sampling_locations.unflatten(3, levels).to(points or dtype).contiguous(),
        inputs.attention_weights.unflatten(3, levels).to(points or dtype).contiguous(),
    )


def halves_joined(module: Any, step: int) -> Callable[..., Tensor]:
    """Upstream's forward and backward as what autograd knows; its extension has the two halves only."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> Tensor:
            ctx.save_for_backward(*given)
            attended: Tensor = module.ms_deform_attn_forward(*given, step)
            return attended

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            found = module.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output.contiguous(), step
            )
            return found[0], None, None, *found[1:]

    apply: Callable[..., Tensor] = Attention.apply
    return apply


def packed_for_dcnv4(given: Given, dtype: torch.dtype) -> Tensor:
    """DCNv4's one tensor [B, Q, M, L·K·3]: of a head first all (x, y), then the logits of all points.

    Its kernel takes the softmax: the logits whose softmax the weights are, are their logarithms.
    """
    logits = given.weights.float().flatten(-2).clamp_min(1e-30).log()
    return torch.cat((given.locations.float().flatten(-3), logits), -1).to(dtype).contiguous()
