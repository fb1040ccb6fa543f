"""What the modules share: layers that predict offsets and logits, the call of the operator, and checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.call import Interpolation, Padding
from saccade.checks import (
    SPATIAL_DIMS,
    SpatialShapes,
    check_border_height,
    check_option,
    check_tensor,
    compute_dtype,
    parse_spatial_shapes,
    to_positive_int,
)
from saccade.functional import fused_deformable_attention
from saccade.sampling import Sampling, directions, sampling_locations


class SamplingModule(nn.Module):
    """The layers that predict offsets and logits, and the call of the operator."""

    output_proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_points: list[int],
        spatial_dims: int,
        interpolation: Interpolation,
        padding: Padding,
    ) -> None:
        super().__init__()
        if to_positive_int("spatial_dims", spatial_dims) not in SPATIAL_DIMS:
            raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims}")
        check_option("interpolation", interpolation, Interpolation)
        check_option("padding", padding, Padding)
        check_border_height(padding, interpolation, spatial_dims)
        self.embed_dim = to_positive_int("embed_dim", embed_dim)
        self.num_heads = to_positive_int("num_heads", num_heads)
        self.num_points = num_points
        self.spatial_dims = spatial_dims
        self.interpolation: Interpolation = interpolation
        self.padding: Padding = padding
        total_points = num_heads * sum(num_points)
        self.sampling_offsets = nn.Linear(embed_dim, total_points * spatial_dims)
        self.attention_weights = nn.Linear(embed_dim, total_points)

    def reset_parameters(self) -> None:
        """The family's initialisation: the points of head m lie along direction m, one pixel apart.

        The directions divide the circle evenly, as in Deformable DETR. On a line they alternate between
        right and left; in three dimensions they divide the sphere evenly. The longest coordinate of each
        is 1, so that the k-th point is k pixels away.
        """
        direction = directions(self.num_heads, self.spatial_dims)
        distance = torch.tensor(
            [point + 1.0 for count in self.num_points for point in range(count)]
        )
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * distance[:, None]).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for name in ("reference_points", "value_proj", "output_proj"):
            projection = getattr(self, name, None)
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        shapes: list[tuple[int, ...]],
        value_padding_mask: Tensor | None,
        return_sampling: bool,
        queries_per_map: Sequence[int] | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """The result of `forward`, from queries [B, Q, C] and the value [B, S, M or 1, D].

        With `queries_per_map` the queries are [T, C] and the reference points [T, R, N or 2 N].
        """
        offsets, logits = self.predict(query)
        reference_points = reference_points.to(offsets.dtype)
        attended = fused_deformable_attention(
            value,
            shapes,
            reference_points,
            offsets,
            logits,
            num_points=self.num_points,
            interpolation=self.interpolation,
            padding=self.padding,
            queries_per_map=queries_per_map,
            value_padding_mask=value_padding_mask,
        )
        output: Tensor = self.output_proj(attended)
        if not return_sampling:
            return output
        # The operator does not write locations and weights to memory, so they are computed again here.
        locations = sampling_locations(reference_points, offsets, shapes, self.num_points)
        return output, Sampling(reference_points, offsets, locations, logits.softmax(-1))

    def parse_shapes(self, spatial_shapes: SpatialShapes) -> list[tuple[int, ...]]:
        """The shapes of the module's levels.

        Raises:
            ValueError: there is another number of levels or of dimensions.
        """
        shapes = parse_spatial_shapes(spatial_shapes)
        num_levels = len(self.num_points)
        if len(shapes) != num_levels or len(shapes[0]) != self.spatial_dims:
            raise ValueError(
                f"spatial_shapes: expected {num_levels} levels (num_levels) of "
                f"{self.spatial_dims} sizes (spatial_dims), got {shapes}"
            )
        return shapes

    def predict(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling offsets [..., M, P, N] and attention logits [..., M, P] of queries [..., C]."""
        # 16-bit locations would be off by whole pixels on a large map. Under autocast the layers predict
        # offsets in 16 bits, but reference and offset are never added in 16 bits.
        dtype = compute_dtype(query)
        heads_and_points = (self.num_heads, sum(self.num_points))
        offsets: Tensor = self.sampling_offsets(query).to(dtype)
        logits: Tensor = self.attention_weights(query).to(dtype)
        return (
            offsets.unflatten(-1, (*heads_and_points, self.spatial_dims)),
            logits.unflatten(-1, heads_and_points),
        )


class MultiLevelModule(SamplingModule):
    """The projections of the value and of the result, which the modules on several levels share."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_points: list[int],
        spatial_dims: int,
        interpolation: Interpolation,
        padding: Padding,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_points, spatial_dims, interpolation, padding)
        check_heads(embed_dim, num_heads)
        self.num_levels = len(num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def project(self, value: Tensor) -> Tensor:
        """The value [..., S, C], projected and split into heads, [..., S, M, D]."""
        projected: Tensor = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        return projected

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_levels={self.num_levels}, num_points={self.num_points}, "
            f"spatial_dims={self.spatial_dims}"
        )


def check_shape(name: str, tensor: object, *expected: Sequence[int]) -> None:
    tensor = check_tensor(name, tensor)
    if list(tensor.shape) not in [list(shape) for shape in expected]:
        alternatives = " or ".join(str(list(shape)) for shape in expected)
        raise ValueError(f"{name}: expected {alternatives}, got {list(tensor.shape)}")


def check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")


def check_channels(name: str, tensor: object, axes: Sequence[str], embed_dim: int) -> None:
    tensor = check_tensor(name, tensor)
    if tensor.dim() != len(axes) + 1 or tensor.shape[-1] != embed_dim:
        raise ValueError(
            f"{name}: expected [{', '.join(axes)}, {embed_dim}], got {list(tensor.shape)}"
        )
