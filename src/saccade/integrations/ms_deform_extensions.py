"""The functions of the compiled modules that have multi-scale deformable attention.

The names of the functions and of their arguments are those of the modules, which `extensions` makes
importable. Of wrong arguments the originals make wrong numbers; these refuse them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from saccade import backend, reference
from saccade.arguments import Call, Options, understand
from saccade.checks import check_shape, check_tensor
from saccade.functional import deformable_attention
from saccade.integrations.levels import shapes_of_levels
from saccade.ops.contract import arguments_of
from saccade.ops.gradients import needs_autograd

_BACKWARD = torch.ops.saccade.deformable_attention_backward.default


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
        value_level_start_index (Tensor[L]): the position in `value` where each level starts. Nothing
            else than one level behind the other can be meant; it is checked.
        sampling_locations (Tensor[B, Q, M, L, K, 2]): as in `saccade.deformable_attention`.
        attention_weights (Tensor[B, Q, M, L, K]): as in `saccade.deformable_attention`.
        im2col_step: how many pictures a launch of the original takes. Not needed, and free to be a
            number that does not divide the batch.

    Returns:
        Tensor[B, Q, M * D]: as `saccade.deformable_attention`.

    Raises:
        TypeError: an argument is no tensor.
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
    shapes = shapes_of_levels(
        value_spatial_shapes=value_spatial_shapes, value_level_start_index=value_level_start_index
    )
    return deformable_attention(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of all these modules but mmcv's.

    Args:
        value (Tensor[B, S, M, D]): as in `ms_deform_attn_forward`.
        value_spatial_shapes (Tensor[L, 2]): as in `ms_deform_attn_forward`.
        value_level_start_index (Tensor[L]): as in `ms_deform_attn_forward`.
        sampling_locations (Tensor[B, Q, M, L, K, 2]): as in `ms_deform_attn_forward`.
        attention_weights (Tensor[B, Q, M, L, K]): as in `ms_deform_attn_forward`.
        grad_output (Tensor[B, Q, M * D]): in the value's dtype, with any strides.
        im2col_step: not needed.

    Returns:
        The gradients of `value`, `sampling_locations` and `attention_weights`, each with the shape and
        the dtype of what it is the gradient of.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: as `ms_deform_attn_forward`, or `grad_output` does not fit.
    """
    shapes = shapes_of_levels(
        value_spatial_shapes=value_spatial_shapes, value_level_start_index=value_level_start_index
    )
    options = Options(shapes, None, "linear", "zeros", "normalized", None)
    call = understand(value, sampling_locations, attention_weights, options)
    _check_gradient(grad_output, call)
    grad_value, grad_locations, grad_weights = _gradients(grad_output, call)
    return (
        grad_value,
        grad_locations.reshape(sampling_locations.shape),
        grad_weights.reshape(attention_weights.shape),
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
    """mmcv's `ms_deform_attn_backward`: as the others', but it fills the three tensors it is given.

    They may have other dtypes than the gradients, not other shapes.
    """
    given = {
        "grad_value": grad_value,
        "grad_sampling_loc": grad_sampling_loc,
        "grad_attn_weight": grad_attn_weight,
    }
    for name, tensor in given.items():
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
    # All are checked before the first is changed.
    for (name, tensor), gradient in zip(given.items(), gradients, strict=True):
        check_shape(name, tensor, list(gradient.shape))
    for tensor, gradient in zip(given.values(), gradients, strict=True):
        tensor.copy_(gradient)


def get_compiler_version() -> str:
    """Of mmcv, which prints it among what it knows of its environment."""
    return "none, Saccade takes the place of the compiled module"


def get_compiling_cuda_version() -> str:
    """As `get_compiler_version`; in the words of mmcv's builds without CUDA."""
    return "not available"


def _check_gradient(grad_output: Tensor, call: Call) -> None:
    value, locations = call.value, call.sampling_locations
    check_tensor("grad_output", grad_output)
    if (grad_output.dtype, grad_output.device) != (value.dtype, value.device):
        raise ValueError(
            f"grad_output: expected {value.dtype} on {value.device} like value, "
            f"got {grad_output.dtype} on {grad_output.device}"
        )
    batch_size, num_queries, num_heads = locations.shape[:3]
    check_shape("grad_output", grad_output, [batch_size, num_queries, num_heads * value.shape[3]])


def _gradients(grad_output: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """As autograd's backward of the operator computes them, without its forward."""
    wanted = [True, True, True]
    if backend.needs_reference():
        found = reference.execute_backward(grad_output, call, wanted)
        return cast("tuple[Tensor, Tensor, Tensor]", found)
    arguments = (grad_output, *arguments_of(call), wanted)
    if needs_autograd(grad_output, call.value, call.sampling_locations, call.attention_weights):
        gradients = _BACKWARD(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _BACKWARD(*arguments)
    return cast("tuple[Tensor, Tensor, Tensor]", gradients)
