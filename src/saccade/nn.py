"""The modules: deformable attention with its projections, ready to put into a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.checks import (
    SPATIAL_DIMS,
    Interpolation,
    Padding,
    SpatialShapes,
    check_option,
    positive_int,
    understand_num_points,
    understand_spatial_shapes,
)
from saccade.functional import deformable_attention
from saccade.sampling import Sampling, directions, sampling_locations


class _SamplingModule(nn.Module):
    """What both modules share: the layers that predict where to look, and the look itself."""

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
        if positive_int("spatial_dims", spatial_dims) not in SPATIAL_DIMS:
            raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims}")
        check_option("interpolation", interpolation, Interpolation)
        check_option("padding", padding, Padding)
        self.embed_dim = positive_int("embed_dim", embed_dim)
        self.num_heads = positive_int("num_heads", num_heads)
        self.num_points = num_points
        self.spatial_dims = spatial_dims
        self.interpolation: Interpolation = interpolation
        self.padding: Padding = padding
        total_points = num_heads * sum(num_points)
        self.sampling_offsets = nn.Linear(embed_dim, total_points * spatial_dims)
        self.attention_weights = nn.Linear(embed_dim, total_points)

    def reset_parameters(self) -> None:
        """The family's initialisation: head m looks along direction m, the points further out.

        The directions divide the circle, as everywhere; a line into left and right, by turns; the
        sphere evenly. The longest coordinate of each is 1: the k-th point is k pixels away.
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

    def _attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        shapes: list[tuple[int, ...]],
        value_padding_mask: Tensor | None,
        return_sampling: bool,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """From queries [B, Q, C] and the value [B, S, M or 1, D] to the result of `forward`."""
        # 16-bit locations would be off by whole pixels on a large map. The layers predict offsets in
        # 16 bits where autocast says so; reference and offset are never added in 16 bits.
        dtype = _location_dtype(query)
        total_points = sum(self.num_points)
        offsets = self.sampling_offsets(query).to(dtype)
        offsets = offsets.unflatten(-1, (self.num_heads, total_points, self.spatial_dims))
        logits = self.attention_weights(query).to(dtype)
        reference_points = reference_points.to(dtype)
        sampling = Sampling(
            reference_points,
            offsets,
            sampling_locations(reference_points, offsets, shapes, self.num_points),
            logits.unflatten(-1, (self.num_heads, total_points)).softmax(-1),
        )
        attended = deformable_attention(
            value,
            shapes,
            sampling.sampling_locations,
            sampling.attention_weights,
            num_points=self.num_points,
            interpolation=self.interpolation,
            padding=self.padding,
            value_padding_mask=value_padding_mask,
        )
        output: Tensor = self.output_proj(attended)
        return (output, sampling) if return_sampling else output


class MultiScaleDeformableAttention(_SamplingModule):
    """Multi-scale deformable attention as in Deformable DETR and the detectors after it.

    Its state dict has the family's keys (`sampling_offsets`, `attention_weights`, `value_proj`,
    `output_proj`, each with `.weight` and `.bias`): checkpoints load as they are.

    Args:
        embed_dim: channels C of queries and values.
        num_heads: heads M; must divide `embed_dim`.
        num_levels: levels L of the value map.
        num_points: points each head reads on each level, one number or a list of L numbers.
        spatial_dims: dimensions N of the maps, 1, 2 or 3.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Raises:
        ValueError: a number does not fit; the message names it.

    Precision:
        The linear layers follow autocast and the module's dtype; from what they predict on, reference
        points, locations and attention weights are float32 (float64 in float64 modules).

    Source:
        Zhu et al., Deformable DETR, equation 3, https://arxiv.org/abs/2010.04159

    Example:
        >>> import torch, saccade
        >>> attention = saccade.nn.MultiScaleDeformableAttention(64, num_heads=4, num_levels=2)
        >>> value = torch.randn(1, 8 * 8 + 4 * 4, 64)
        >>> query, reference = torch.randn(1, 10, 64), torch.rand(1, 10, 1, 2)
        >>> attention(query, reference, value, [(8, 8), (4, 4)]).shape
        torch.Size([1, 10, 64])

        One dimension, the signal at two rates:

        >>> attention = saccade.nn.MultiScaleDeformableAttention(
        ...     64, num_heads=4, num_levels=2, spatial_dims=1)
        >>> value, reference = torch.randn(1, 128 + 64, 64), torch.rand(1, 10, 1, 1)
        >>> attention(query, reference, value, [(128,), (64,)]).shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        *,
        spatial_dims: int = 2,
        interpolation: Interpolation = "linear",
        padding: Padding = "zeros",
    ) -> None:
        points = understand_num_points(num_points, positive_int("num_levels", num_levels), 4)
        super().__init__(embed_dim, num_heads, points, spatial_dims, interpolation, padding)
        _check_heads(embed_dim, num_heads)
        self.num_levels = num_levels
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        value_padding_mask: Tensor | None = None,
        *,
        return_sampling: bool = False,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """Attends from each query to the points it chooses around its reference point.

        Args:
            query (Tensor[B, Q, C]): the queries, position embedding added.
            reference_points (Tensor[B, Q, 1 or L, N or 2 N]): normalized (x, y) points, or boxes
                (centre x, centre y, width, height); (x) or (x, width) in one dimension, (x, y, z)
                or (x, y, z, width, height, depth) in three. With 1 in the third axis for all
                levels.
            value (Tensor[B, S, C]): the feature maps of all levels, flattened and joined.
            spatial_shapes: `(height, width)` of each level, `(width,)` in one dimension, `(depth,
                height, width)` in three; the products sum to S.
            value_padding_mask (Tensor[B, S], bool): True marks padding, which counts as 0.
            return_sampling: also return where the queries looked.

        Returns:
            Tensor[B, Q, C], or with `return_sampling` the pair (Tensor[B, Q, C], Sampling).

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        _check_channels("query", query, ("batch", "positions"), self.embed_dim)
        _check_channels("value", value, ("batch", "positions"), self.embed_dim)
        _check_tensor("reference_points", reference_points)
        if value.shape[0] != query.shape[0]:
            raise ValueError(
                f"value: expected a batch of {query.shape[0]} as in query, got {list(value.shape)}"
            )
        shapes = understand_spatial_shapes(spatial_shapes)
        if len(shapes) != self.num_levels or len(shapes[0]) != self.spatial_dims:
            raise ValueError(
                f"spatial_shapes: expected {self.num_levels} levels (num_levels) of "
                f"{self.spatial_dims} sizes (spatial_dims), got {shapes}"
            )
        projected = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        return self._attend(
            query, reference_points, projected, shapes, value_padding_mask, return_sampling
        )

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_levels={self.num_levels}, num_points={self.num_points}, "
            f"spatial_dims={self.spatial_dims}"
        )


class DeformableAttention(_SamplingModule):
    """Deformable attention over one feature map, everything predicted from the query.

    Args:
        embed_dim: channels C of queries and feature map.
        num_heads: heads M.
        num_points: points K that each head reads.
        spatial_dims: dimensions N of the map, 1, 2 or 3.
        value_projection: True, the Deformable-DETR form: the map is projected and split into heads
            of C / M channels. False, the plain form: every head reads all C channels of the same
            un-projected map, and the output projection takes M * C channels.
        predict_reference_points: False leaves the layer `reference_points` out, for use where the
            caller always gives them (no parameter then stays without a gradient).
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Raises:
        ValueError: a number does not fit; the message names it.

    Precision:
        As `MultiScaleDeformableAttention`.

    Source:
        Zhu et al., Deformable DETR, equation 2, https://arxiv.org/abs/2010.04159

    Example:
        >>> import torch, saccade
        >>> attention = saccade.nn.DeformableAttention(64, num_heads=4, num_points=4)
        >>> output, sampling = attention(
        ...     torch.randn(1, 10, 64), torch.randn(1, 16, 20, 64), return_sampling=True)
        >>> output.shape, sampling.sampling_locations.shape
        (torch.Size([1, 10, 64]), torch.Size([1, 10, 4, 4, 2]))

        A volume:

        >>> attention = saccade.nn.DeformableAttention(64, num_heads=4, spatial_dims=3)
        >>> attention(torch.randn(1, 10, 64), torch.randn(1, 6, 16, 20, 64)).shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        num_points: int = 4,
        *,
        spatial_dims: int = 2,
        value_projection: bool = True,
        predict_reference_points: bool = True,
        interpolation: Interpolation = "linear",
        padding: Padding = "zeros",
    ) -> None:
        points = [positive_int("num_points", num_points)]
        super().__init__(embed_dim, num_heads, points, spatial_dims, interpolation, padding)
        if value_projection:
            _check_heads(embed_dim, num_heads)
        self.reference_points = (
            nn.Linear(embed_dim, spatial_dims) if predict_reference_points else None
        )
        self.value_proj = nn.Linear(embed_dim, embed_dim) if value_projection else None
        attended_dim = embed_dim if value_projection else num_heads * embed_dim
        self.output_proj = nn.Linear(attended_dim, embed_dim)
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        feature_map: Tensor,
        reference_points: Tensor | None = None,
        value_padding_mask: Tensor | None = None,
        *,
        return_sampling: bool = False,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """Attends from each query to the points it chooses on the map.

        Args:
            query (Tensor[B, Q, C]): the queries.
            feature_map (Tensor[B, H, W, C]): the map, channels last; [B, W, C] in one dimension,
                [B, D, H, W, C] in three.
            reference_points (Tensor[B, Q, N or 2 N]): normalized (x, y) points or boxes, as in
                `MultiScaleDeformableAttention`; None: the sigmoid of a linear layer of the query.
            value_padding_mask (Tensor[B, H, W], bool): True marks padding, which counts as 0; as
                many axes as the map has.
            return_sampling: also return where the queries looked.

        Returns:
            Tensor[B, Q, C], or with `return_sampling` the pair (Tensor[B, Q, C], Sampling).

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        _check_channels("query", query, ("batch", "positions"), self.embed_dim)
        axes = ("depth", "height", "width")[-self.spatial_dims :]
        _check_channels("feature_map", feature_map, ("batch", *axes), self.embed_dim)
        batch_size, num_queries = query.shape[:2]
        shape = tuple(feature_map.shape[1:-1])
        _check_shape(
            "feature_map",
            feature_map,
            (batch_size, *(max(1, size) for size in shape), self.embed_dim),
        )
        if value_padding_mask is not None:
            _check_shape("value_padding_mask", value_padding_mask, (batch_size, *shape))
        shapes: list[tuple[int, ...]] = [shape]
        if reference_points is None:
            if self.reference_points is None:
                raise ValueError(
                    "reference_points: expected a tensor, because this module was made with "
                    "predict_reference_points=False, got None"
                )
            reference_points = self.reference_points(query).to(_location_dtype(query)).sigmoid()
        _check_shape(
            "reference_points",
            reference_points,
            (batch_size, num_queries, self.spatial_dims),
            (batch_size, num_queries, 2 * self.spatial_dims),
        )
        value = feature_map.flatten(1, -2)
        if self.value_proj is None:
            projected = value[:, :, None, :]  # one head that all of them read
        else:
            projected = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        return self._attend(
            query,
            reference_points[:, :, None],
            projected,
            shapes,
            None if value_padding_mask is None else value_padding_mask.flatten(1),
            return_sampling,
        )

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_points={self.num_points[0]}, spatial_dims={self.spatial_dims}, "
            f"value_projection={self.value_proj is not None}"
        )


def _location_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")


def _check_shape(name: str, tensor: object, *expected: Sequence[int]) -> None:
    _check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if list(tensor.shape) not in [list(shape) for shape in expected]:
        wanted = " or ".join(str(list(shape)) for shape in expected)
        raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)}")


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")


def _check_channels(name: str, tensor: object, axes: Sequence[str], embed_dim: int) -> None:
    _check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dim() != len(axes) + 1 or tensor.shape[-1] != embed_dim:
        raise ValueError(
            f"{name}: expected [{', '.join(axes)}, {embed_dim}], got {list(tensor.shape)}"
        )
