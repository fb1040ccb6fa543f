"""The attention module of a fork: the usual parameters, the usual arguments."""

import torch
from torch import nn

from ops.functions import MSDeformAttnFunction


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention; reference points [N, Q, L, 2]."""

    def __init__(self, d_model=256, n_levels=4, n_heads=8, n_points=4):
        super().__init__()
        self.im2col_step = 64
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        nn.init.normal_(self.sampling_offsets.bias, std=2.0)

    def forward(self, query, reference_points, flat, spatial_shapes, level_start_index):
        """From queries [N, Q, C] and the flattened levels [N, S, C] to [N, Q, C]."""
        looks = (self.n_heads, self.n_levels, self.n_points)
        value = self.value_proj(flat).unflatten(-1, (self.n_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (*looks, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.n_heads, -1)).softmax(-1)
        sizes = torch.stack([spatial_shapes[:, 1], spatial_shapes[:, 0]], -1)
        locations = reference_points[:, :, None, :, None] + offsets / sizes[:, None]
        output = MSDeformAttnFunction.apply(
            value,
            spatial_shapes,
            level_start_index,
            locations,
            weights.unflatten(-1, looks[1:]),
            self.im2col_step,
        )
        return self.output_proj(output)
