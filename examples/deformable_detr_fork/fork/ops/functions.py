"""The call of the compiled module, as the forks make it."""

import MultiScaleDeformableAttention as MSDA  # noqa: N817 - the name they all use
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class MSDeformAttnFunction(Function):
    """Forward and backward, both from the compiled module."""

    @staticmethod
    def forward(ctx, value, spatial_shapes, level_start_index, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, spatial_shapes, level_start_index, locations, weights)
        return MSDA.ms_deform_attn_forward(
            value, spatial_shapes, level_start_index, locations, weights, im2col_step
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grad_value, grad_locations, grad_weights = MSDA.ms_deform_attn_backward(
            *ctx.saved_tensors, grad_output, ctx.im2col_step
        )
        return grad_value, None, None, grad_locations, grad_weights, None
