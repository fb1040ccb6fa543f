"""The module for several views of one scene: cameras around a car, as in BEVFormer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from saccade.call import Interpolation, Padding
from saccade.checks import (
    SpatialShapes,
    check_option,
    check_tensor,
    parse_num_points,
    to_positive_int,
)
from saccade.functional import fused_deformable_attention
from saccade.nn.sampling_module import (
    MultiLevelModule,
    check_channels,
    check_shape,
)

Reduction: TypeAlias = Literal["mean", "sum"]


class MultiViewDeformableAttention(MultiLevelModule):
    """Deformable attention over several views: a query attends in every view that sees it.

    This is BEVFormer's spatial cross attention. The results of the views that see a query are averaged
    (or summed). Views that do not see it cost nothing, and nothing is padded.

    Its state dict has the family's keys (`sampling_offsets`, `attention_weights`, `value_proj`,
    `output_proj`, each with `.weight` and `.bias`).

    Args:
        embed_dim: number of channels C of queries and values.
        num_heads: number of heads M; must divide `embed_dim`.
        num_levels: number of levels L of each view's value map.
        num_points: number of points per head and level, one int or a list of L.
        spatial_dims: number of dimensions N of the maps, 1, 2 or 3.
        reduction: "mean" over the views that see a query, as in BEVFormer, or "sum".
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Precision:
        As `MultiScaleDeformableAttention`; the views are added in the queries' dtype, always in the
        same order.

    Source:
        Li et al., BEVFormer, section 3.3, https://arxiv.org/abs/2203.17270

    Example:
        >>> import torch, saccade
        >>> attention = saccade.nn.MultiViewDeformableAttention(64, num_heads=4, num_levels=1)
        >>> query = torch.randn(1, 100, 64)                     # 100 cells of a map from above
        >>> value = torch.randn(1, 6, 12 * 20, 64)              # six cameras
        >>> reference = torch.rand(1, 6, 100, 4, 2)             # four heights over each cell, projected
        >>> visible = torch.rand(1, 6, 100) < 0.2               # which cameras see it
        >>> attention(query, reference, visible, value, [(12, 20)]).shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 8,
        *,
        spatial_dims: int = 2,
        reduction: Reduction = "mean",
        interpolation: Interpolation = "linear",
        padding: Padding = "zeros",
    ) -> None:
        points = parse_num_points(num_points, to_positive_int("num_levels", num_levels), 8)
        super().__init__(embed_dim, num_heads, points, spatial_dims, interpolation, padding)
        check_option("reduction", reduction, Reduction)
        self.reduction: Reduction = reduction

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        visible: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        value_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends from each query to the points it chooses in every view that sees it.

        Args:
            query (Tensor[B, Q, C]): the queries, position embedding added.
            reference_points (Tensor[B, V, Q, Z, N]): where a query lies in each of the V views,
                normalized, as Z points such as the heights of a pillar. Z divides the number of points of
                each level; point k starts from reference point k mod Z. Values are ignored where a
                view does not see the query.
            visible (Tensor[B, V, Q], bool): True where the view sees the query. It is read back to the
                host, because the number of queries of each view is a size.
            value (Tensor[B, V, S, C]): the feature maps of all levels of each view, flattened and
                joined.
            spatial_shapes: as in `MultiScaleDeformableAttention`; the same for all views.
            value_padding_mask (Tensor[B, V, S], bool): True marks padding, which counts as 0.

        Returns:
            Tensor[B, Q, C]: a query that no view sees gets the output projection of 0.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: a shape or dtype does not fit; the message names the argument.
        """
        check_channels("query", query, ("batch", "queries"), self.embed_dim)
        check_channels("value", value, ("batch", "views", "positions"), self.embed_dim)
        batch_size, num_queries, _ = query.shape
        num_views, num_positions = value.shape[1:3]
        check_shape("value", value, (batch_size, num_views, num_positions, self.embed_dim))
        check_tensor("visible", visible)
        if visible.dtype != torch.bool:
            raise ValueError(f"visible: expected torch.bool, got {visible.dtype}")
        check_shape("visible", visible, (batch_size, num_views, num_queries))
        check_tensor("reference_points", reference_points)
        num_references = reference_points.shape[3] if reference_points.dim() == 5 else 1
        check_shape(
            "reference_points",
            reference_points,
            (batch_size, num_views, num_queries, max(1, num_references), self.spatial_dims),
        )
        if any(count % num_references for count in self.num_points):
            raise ValueError(
                f"reference_points: expected a number of points that divides those of each level, "
                f"{self.num_points}, got {num_references} in {list(reference_points.shape)}"
            )
        if value_padding_mask is not None:
            check_shape(
                "value_padding_mask", value_padding_mask, (batch_size, num_views, num_positions)
            )
            value_padding_mask = value_padding_mask.flatten(0, 1)
        shapes = self.parse_shapes(spatial_shapes)
        # The (view, query) pairs in which the view sees the query, view after view: [pairs].
        batch_index, _, query_index = visible.nonzero(as_tuple=True)
        row = batch_index * num_queries + query_index  # [pairs], of the flattened queries
        offsets, logits = self.predict(query.flatten(0, 1).index_select(0, row))
        attended = fused_deformable_attention(
            self.project(value).flatten(0, 1),
            shapes,
            reference_points[visible].to(offsets.dtype),
            offsets,
            logits,
            num_points=self.num_points,
            reference_index=[k % num_references for count in self.num_points for k in range(count)],
            interpolation=self.interpolation,
            padding=self.padding,
            queries_per_map=visible.sum(-1).flatten().tolist(),
            value_padding_mask=value_padding_mask,
        )
        # Summed in the queries' dtype, which autocast does not narrow.
        total = query.new_zeros(batch_size * num_queries, self.embed_dim)
        total = total.index_add_(0, row, attended.to(total.dtype))
        total = total.unflatten(0, (batch_size, num_queries))  # [B, Q, C]
        if self.reduction == "mean":
            total /= visible.sum(1).clamp(min=1)[..., None]
        output: Tensor = self.output_proj(total)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"
