"""The functions of the compiled modules that have multi-scale deformable attention.

The names of the functions and of their arguments are those of the modules, which `extensions` makes
importable. The originals compute wrong numbers from wrong arguments; these functions refuse them. Of the
attention weights and of the gradient of the output, the originals read no axes: neighbouring ones may be
joined or apart here too.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from saccade.call import Call, parse_call
from saccade.checks import check_shape, check_tensor
from saccade.functional import deformable_attention, run_backward
from saccade.integrations.axes import split_axes
from saccade.integrations.levels import parse_levels


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The forward of all these modules; mmcv's takes its arguments by keyword too.

    Args:
        value (Tensor[B, S, M, D]): as in `saccade.deformable_attention`.
        value_spatial_shapes (Tensor[L, 2]): (height, width) of each level.
        value_level_start_index (Tensor[L]): the position in `value` where each level starts. Levels
            follow each other without gaps, which is checked.
        sampling_locations (Tensor[B, Q, M, L, K, 2]): as in `saccade.deformable_attention`.
        attention_weights (Tensor[B, Q, M, L, K]): as in `saccade.deformable_attention`; or with
            neighbouring axes joined, such as [B, Q, M, L * K].
        im2col_step: how many images a launch of the original takes. It is not used, and does not have
            to divide the batch.

    Returns:
        Tensor[B, Q, M * D]: as `saccade.deformable_attention`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit, or `value_level_start_index` does not agree
            with `value_spatial_shapes`.

    Example:
        >>> import torch
        >>> from saccade.integrations.ms_deform_extensions import ms_deform_attn_forward
        >>> shapes, starts = torch.tensor([[6, 4], [3, 2]]), torch.tensor([0, 24])
        >>> value, locations = torch.randn(3, 30, 2, 8), torch.rand(3, 5, 2, 2, 4, 2)
        >>> weights = torch.rand(3, 5, 2, 2, 4)
        >>> ms_deform_attn_forward(value, shapes, starts, locations, weights, 64).shape
        torch.Size([3, 5, 16])
    """
    shapes = parse_levels(
        value_spatial_shapes=value_spatial_shapes, value_level_start_index=value_level_start_index
    )
    weights = _split_weights(attention_weights, sampling_locations)
    return deformable_attention(value, shapes, sampling_locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of all these modules except mmcv's.

    Args:
        value (Tensor[B, S, M, D]): as in `ms_deform_attn_forward`.
        value_spatial_shapes (Tensor[L, 2]): as in `ms_deform_attn_forward`.
        value_level_start_index (Tensor[L]): as in `ms_deform_attn_forward`.
        sampling_locations (Tensor[B, Q, M, L, K, 2]): as in `ms_deform_attn_forward`.
        attention_weights (Tensor[B, Q, M, L, K]): as in `ms_deform_attn_forward`.
        grad_output (Tensor[B, Q, M * D]): in the value's dtype, with any strides; or with neighbouring
            axes joined or apart, such as [B, Q, M, D].
        im2col_step: unused.

    Returns:
        The gradients of `value`, `sampling_locations` and `attention_weights`, each with the shape and
        the dtype of its tensor.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: as `ms_deform_attn_forward`, or `grad_output` does not fit.
    """
    shapes = parse_levels(
        value_spatial_shapes=value_spatial_shapes, value_level_start_index=value_level_start_index
    )
    weights = _split_weights(attention_weights, sampling_locations)
    call = parse_call(value, shapes, sampling_locations, weights)
    grad_value, grad_locations, grad_weights, _ = run_backward(
        _parse_gradient(grad_output, call), call, [True, True, True, False]
    )
    return (
        cast(Tensor, grad_value),
        cast(Tensor, grad_locations).reshape(sampling_locations.shape),
        cast(Tensor, grad_weights).reshape(attention_weights.shape),
    )


def mmcv_ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """mmcv's `ms_deform_attn_backward`: it fills three tensors of the caller with the gradients.

    The tensors may have other dtypes than the gradients, but not other shapes.
    """
    targets = {
        "grad_value": grad_value,
        "grad_sampling_loc": grad_sampling_loc,
        "grad_attn_weight": grad_attn_weight,
    }
    for name, tensor in targets.items():
        check_tensor(name, tensor)
    gradients = ms_deform_attn_backward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        grad_output,
        im2col_step,
    )
    # All shapes are checked before the first tensor is changed.
    for (name, tensor), gradient in zip(targets.items(), gradients, strict=True):
        check_shape(name, tensor, list(gradient.shape))
    for tensor, gradient in zip(targets.values(), gradients, strict=True):
        tensor.copy_(gradient)


def get_compiler_version() -> str:
    """What mmcv prints as the compiler of its module, in a list about its environment."""
    return "none, Saccade takes the place of the compiled module"


def get_compiling_cuda_version() -> str:
    """What mmcv prints as the version of CUDA, in the words of its builds without CUDA."""
    return "not available"


def _split_weights(attention_weights: Tensor, sampling_locations: Tensor) -> Tensor:
    """Attention weights [B, Q, M, L, K], from those with neighbouring axes joined."""
    check_tensor("attention_weights", attention_weights)
    check_tensor("sampling_locations", sampling_locations)
    if attention_weights.dim() == 5 or sampling_locations.dim() != 6:
        return attention_weights  # the checks of the call name what is wrong
    names = ("batch", "queries", "heads", "levels", "points")
    axes = dict(zip(names, sampling_locations.shape[:5], strict=True))
    return split_axes("attention_weights", attention_weights, sampling_locations, **axes)


def _parse_gradient(grad_output: Tensor, call: Call) -> Tensor:
    """The gradient of the output as [B, Q, M * D]; raises unless it fits the call."""
    value = call.value
    check_tensor("grad_output", grad_output)
    if (grad_output.dtype, grad_output.device) != (value.dtype, value.device):
        raise ValueError(
            f"grad_output: expected {value.dtype} on {value.device} like value, "
            f"got {grad_output.dtype} on {grad_output.device}"
        )
    batch_size, num_queries, num_heads = call.points.shape[:3]
    if grad_output.dim() == 3:
        check_shape(
            "grad_output", grad_output, [batch_size, num_queries, num_heads * value.shape[3]]
        )
        return grad_output
    grad_output = split_axes(
        "grad_output", grad_output, value,
        batch=batch_size, queries=num_queries, heads=num_heads, head_dim=value.shape[3],
    )  # fmt: skip
    return grad_output.flatten(2)
