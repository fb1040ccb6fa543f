"""The module over one feature map."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.call import Interpolation, Padding
from saccade.checks import compute_dtype, to_positive_int
from saccade.nn.sampling_module import (
    SamplingModule,
    check_channels,
    check_heads,
    check_shape,
)
from saccade.sampling import Sampling


class DeformableAttention(SamplingModule):
    """Deformable attention over one feature map, everything predicted from the query.

    Args:
        embed_dim: number of channels C of queries and feature map.
        num_heads: number of heads M.
        num_points: number of points K per head.
        spatial_dims: number of dimensions N of the map, 1, 2 or 3.
        value_projection: True is the Deformable-DETR form: the map is projected and split into heads
            of C / M channels. False is the plain form: every head reads all C channels of the same
            un-projected map, and the output projection has M * C input channels.
        predict_reference_points: whether there is a layer `reference_points`. Without it, every call
            must pass reference points, and no parameter stays without a gradient.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Raises:
        ValueError: an argument does not fit; the message names it.

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
        points = [to_positive_int("num_points", num_points)]
        super().__init__(embed_dim, num_heads, points, spatial_dims, interpolation, padding)
        if value_projection:
            check_heads(embed_dim, num_heads)
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
                `MultiScaleDeformableAttention`; None means the sigmoid of a linear layer of the query.
            value_padding_mask (Tensor[B, H, W], bool): True marks padding, which counts as 0. It has
                as many spatial axes as the map.
            return_sampling: whether to return also where the queries looked.

        Returns:
            Tensor[B, Q, C], or with `return_sampling` the pair (Tensor[B, Q, C], Sampling).

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        check_channels("query", query, ("batch", "queries"), self.embed_dim)
        axes = ("depth", "height", "width")[-self.spatial_dims :]
        check_channels("feature_map", feature_map, ("batch", *axes), self.embed_dim)
        batch_size, num_queries = query.shape[:2]
        shape = tuple(feature_map.shape[1:-1])
        check_shape(
            "feature_map",
            feature_map,
            (batch_size, *(max(1, size) for size in shape), self.embed_dim),
        )
        if value_padding_mask is not None:
            check_shape("value_padding_mask", value_padding_mask, (batch_size, *shape))
        shapes: list[tuple[int, ...]] = [shape]
        if reference_points is None:
            if self.reference_points is None:
                raise ValueError(
                    "reference_points: expected a tensor, because this module was made with "
                    "predict_reference_points=False, got None"
                )
            reference_points = self.reference_points(query).to(compute_dtype(query)).sigmoid()
        check_shape(
            "reference_points",
            reference_points,
            (batch_size, num_queries, self.spatial_dims),
            (batch_size, num_queries, 2 * self.spatial_dims),
        )
        value = feature_map.flatten(1, -2)
        if self.value_proj is None:
            projected = value[:, :, None, :]  # one head, which all heads share
        else:
            projected = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        return self.attend(
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
