"""The module of Deformable DETR and the detectors after it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from saccade.call import Interpolation, Padding
from saccade.checks import SpatialShapes, check_tensor, parse_num_points, to_positive_int
from saccade.nn.sampling_module import (
    MultiLevelModule,
    check_channels,
)
from saccade.sampling import Sampling


class MultiScaleDeformableAttention(MultiLevelModule):
    """Multi-scale deformable attention as in Deformable DETR and the detectors after it.

    Its state dict has the family's keys (`sampling_offsets`, `attention_weights`, `value_proj`,
    `output_proj`, each with `.weight` and `.bias`): checkpoints load as they are.

    Args:
        embed_dim: number of channels C of queries and values.
        num_heads: number of heads M; must divide `embed_dim`.
        num_levels: number of levels L of the value map.
        num_points: number of points per head and level, one int or a list of L.
        spatial_dims: number of dimensions N of the maps, 1, 2 or 3.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Precision:
        The linear layers follow autocast and the module's dtype. Reference points, locations and
        attention weights are float32 (float64 in float64 modules).

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

        Two signals, 7 queries of the first and 3 of the second:

        >>> attention(query[0], reference[0], value.repeat(2, 1, 1), [(128,), (64,)],
        ...           queries_per_map=[7, 3]).shape
        torch.Size([10, 64])
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
        points = parse_num_points(num_points, to_positive_int("num_levels", num_levels), 4)
        super().__init__(embed_dim, num_heads, points, spatial_dims, interpolation, padding)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        value_padding_mask: Tensor | None = None,
        *,
        queries_per_map: Sequence[int] | Tensor | None = None,
        return_sampling: bool = False,
    ) -> Tensor | tuple[Tensor, Sampling]:
        """Attends from each query to the points it chooses around its reference point.

        Args:
            query (Tensor[B, Q, C]): the queries, position embedding added.
            reference_points (Tensor[B, Q, 1 or L, N or 2 N]): normalized (x, y) points, or boxes
                (centre x, centre y, width, height); (x) or (x, width) in one dimension, (x, y, z)
                or (x, y, z, width, height, depth) in three. An axis of size 1 in place of L serves
                all levels.
            value (Tensor[B, S, C]): the feature maps of all levels, flattened and joined.
            spatial_shapes: `(height, width)` of each level, `(width,)` in one dimension, `(depth,
                height, width)` in three; the products sum to S.
            value_padding_mask (Tensor[B, S], bool): True marks padding, which counts as 0.
            queries_per_map: for queries without padding, B numbers that sum to T: the first so many
                queries read the first map, the next the second. Queries are then [T, C], and reference
                points [T, 1 or L, N or 2 N].
            return_sampling: whether to return also where the queries looked.

        Returns:
            Tensor[B, Q, C] ([T, C] with `queries_per_map`), or with `return_sampling` the pair of it
            and a Sampling.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        axes = ("batch", "queries") if queries_per_map is None else ("queries",)
        check_channels("query", query, axes, self.embed_dim)
        check_channels("value", value, ("batch", "positions"), self.embed_dim)
        check_tensor("reference_points", reference_points)
        if queries_per_map is None and value.shape[0] != query.shape[0]:
            raise ValueError(
                f"value: expected a batch of {query.shape[0]} as in query, got {list(value.shape)}"
            )
        shapes = self.parse_shapes(spatial_shapes)
        projected = self.project(value)
        return self.attend(
            query,
            reference_points,
            projected,
            shapes,
            value_padding_mask,
            return_sampling,
            queries_per_map,
        )
