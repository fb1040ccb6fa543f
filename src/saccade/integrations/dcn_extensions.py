"""The functions of the compiled modules of DCNv3 and DCNv4, with the modules' own arguments.

`DCNv3Function`, `DCNv4Function` and `FlashDeformAttnFunction` can call them, on every device. Arguments
that divide work among the threads of a card (`im2col_step`, `d_stride`, `block_thread`) are not used. The
backwards return gradients in the shapes and dtypes of the inputs.

The compiled originals read most tensors as numbers in a row and never look at their axes. Here too, neighbouring
axes of such a tensor may be joined or apart. Other axes are refused, which the originals misread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checks import (
    VALUE_DTYPES,
    SpatialShapes,
    check_axes,
    check_floating,
    compute_dtype,
    format_shape,
    to_positive_int,
)
from saccade.convolution import Window, deformable_convolution, parse_window
from saccade.functional import deformable_attention
from saccade.integrations.axes import format_axes, joins, split_axes
from saccade.integrations.levels import parse_levels


def dcnv3_forward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    im2col_step: int,
    remove_center: int = 0,
) -> Tensor:
    """DCNv3: a convolution of input [N, H, W, C] with offset [N, H', W', G, K, 2] and mask.

    mask [N, H', W', G, K] has weights and not logits. Both are usually passed with the axes after W' joined.
    Versions before 1.1 do not pass `remove_center`.

    Returns:
        Tensor[N, H', W', C].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape or number does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from saccade.integrations.dcn_extensions import dcnv3_forward
        >>> input, numbers = torch.randn(1, 5, 6, 8), (3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0, 256, 0)
        >>> joined = torch.zeros(1, 5, 6, 2 * 9 * 2), torch.full((1, 5, 6, 2 * 9), 1 / 9)
        >>> apart = torch.zeros(1, 5, 6, 2, 9, 2), torch.full((1, 5, 6, 2, 9), 1 / 9)
        >>> torch.equal(dcnv3_forward(input, *joined, *numbers), dcnv3_forward(input, *apart, *numbers))
        True
    """
    call = _Convolution(
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        group, group_channels, offset_scale, remove_center,
    )  # fmt: skip
    return call.v3(input, offset, mask)


def dcnv3_backward(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    grad_output: Tensor,
    im2col_step: int,
    remove_center: int = 0,
) -> tuple[Tensor, ...]:
    """The gradients of `dcnv3_forward`: grad_input, grad_offset, grad_mask.

    grad_output is [N, H', W', G, C / G], with neighbouring axes joined or apart.
    """
    call = _Convolution(
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        group, group_channels, offset_scale, remove_center,
    )  # fmt: skip
    return _gradients(call.v3, (input, offset, mask), grad_output, heads=group)


def dcnv4_forward(
    value: Tensor,
    offset_mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    im2col_step: int,
    remove_center: int,
    d_stride: int,
    block_thread: int,
    softmax: bool,
) -> Tensor:
    """DCNv4: a convolution of value [N, H, W, C] with offset_mask [N, H', W', at least G * 3 K].

    Each group has 2 K offsets, then K modulations; columns after those of the last group are not
    read. offset_mask has four axes; N, H' and W' may be joined beside axes of size 1. With `softmax` the
    modulations are logits.

    Returns:
        Tensor[N, H', W', C].

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape or number does not fit; the message names the argument.
    """
    call = _Convolution(
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        group, group_channels, offset_scale, remove_center,
    )  # fmt: skip
    return call.v4(value, offset_mask, softmax)


def dcnv4_backward(
    value: Tensor,
    offset_mask: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    group_channels: int,
    offset_scale: float,
    im2col_step: int,
    grad_output: Tensor,
    remove_center: int,
    d_stride: int,
    block_thread: int,
    softmax: bool,
) -> tuple[Tensor, ...]:
    """The gradients of `dcnv4_forward`: grad_value, grad_offset_mask; 0 in columns that are not read.

    grad_output is [N, H', W', G, C / G], with neighbouring axes joined or apart.
    """
    call = _Convolution(
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        group, group_channels, offset_scale, remove_center,
    )  # fmt: skip
    function = partial(call.v4, softmax=softmax)
    return _gradients(function, (value, offset_mask), grad_output, heads=group)


def flash_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    im2col_step: int,
    num_points: int,
    d_stride: int,
    block_thread: int,
) -> Tensor:
    """Deformable attention of value [N, S, M, D] with locations and logits in one tensor.

    sampling_loc_attn [N, Q, M, L * K * 3] holds for each head 2 L K coordinates of normalized
    locations, then L K logits, to which a softmax is applied; K is num_points. The axes after Q may be
    joined.

    Returns:
        Tensor[N, Q, M * D].

    Raises:
        ValueError: a shape does not fit, or level_start_index does not agree with spatial_shapes; the
            message names the argument.
    """
    shapes = parse_levels(spatial_shapes=spatial_shapes, level_start_index=level_start_index)
    return _flash(value, sampling_loc_attn, shapes=shapes, num_points=num_points)


def flash_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc_attn: Tensor,
    grad_output: Tensor,
    im2col_step: int,
    num_points: int,
    d_stride: int,
    block_thread: int,
) -> tuple[Tensor, ...]:
    """The gradients of `flash_deform_attn_forward`: grad_value, grad_sampling_loc_attn.

    grad_output is [N, Q, M, D], with neighbouring axes joined or apart.
    """
    shapes = parse_levels(spatial_shapes=spatial_shapes, level_start_index=level_start_index)
    function = partial(_flash, shapes=shapes, num_points=num_points)
    return _gradients(function, (value, sampling_loc_attn), grad_output, heads=value.shape[2])


class _Convolution(NamedTuple):
    """The sizes and options that both convolutions take, in the order of their arguments."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    group: int
    group_channels: int
    offset_scale: float
    remove_center: int

    def v3(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        sizes = self._output_sizes("input", input)
        window = self.window
        # Without its centre, a window does not consist of whole columns.
        points = (
            {"points": window.num_points}
            if window.remove_center
            else {"kernel_w": self.kernel_w, "kernel_h": self.kernel_h}
        )
        axes = {**sizes, "group": self.group, **points}
        offset = split_axes("offset", offset, input, **axes, coordinates=2)
        mask = split_axes("mask", mask, input, **axes)
        return self._convolve(input, offset, mask, softmax=False)

    def v4(self, value: Tensor, offset_mask: Tensor, softmax: bool) -> Tensor:
        softmax = _to_flag("softmax", softmax)
        sizes = self._output_sizes("value", value)
        check_floating("offset_mask", offset_mask, VALUE_DTYPES, value.device)
        num_points = self.window.num_points
        columns = self.group * num_points * 3
        if offset_mask.dim() != 4 or not joins(offset_mask.shape[:3], [*sizes.values()]):
            raise ValueError(
                f"offset_mask: expected [{format_axes(sizes)}, columns], got "
                f"{format_shape(offset_mask)}"
            )
        if offset_mask.shape[3] < columns:
            raise ValueError(
                f"offset_mask: expected at least {columns} columns, group {self.group} * 3 * "
                f"{num_points} points, got {format_shape(offset_mask)}"
            )
        # Columns after the last group pad the tensor to a multiple of 8.
        groups = offset_mask[..., :columns].reshape(*sizes.values(), self.group, num_points * 3)
        offset, mask = groups.split([num_points * 2, num_points], -1)
        return self._convolve(value, offset, mask, softmax=softmax)

    @property
    def window(self) -> Window:
        return parse_window(
            (self.kernel_h, self.kernel_w),
            (self.stride_h, self.stride_w),
            (self.pad_h, self.pad_w),
            (self.dilation_h, self.dilation_w),
            _to_flag("remove_center", self.remove_center),
        )

    def _output_sizes(self, name: str, value: Tensor) -> dict[str, int]:
        """The sizes of the output without its channels, after a check of the value."""
        channels = to_positive_int("group", self.group) * to_positive_int(
            "group_channels", self.group_channels
        )
        check_axes(name, value, None, batch=None, height=None, width=None, channels=channels)
        height, width = self.window.output_size(name, value)
        return {"batch": value.shape[0], "height": height, "width": width}

    def _convolve(self, value: Tensor, offset: Tensor, mask: Tensor, softmax: bool) -> Tensor:
        window = self.window
        size = (*mask.shape[:4], window.num_points)  # [N, H', W', G, K]
        return deformable_convolution(
            value,
            offset.reshape(*size, 2),
            mask.reshape(size),
            kernel_size=window.kernel_size,
            stride=window.stride,
            padding=window.padding,
            dilation=window.dilation,
            offset_scale=self.offset_scale,
            remove_center=window.remove_center,
            softmax=softmax,
        )


def _flash(
    value: Tensor, sampling_loc_attn: Tensor, *, shapes: SpatialShapes, num_points: int
) -> Tensor:
    check_axes("value", value, None, batch=None, positions=None, heads=None, head_dim=None)
    count = len(shapes) * to_positive_int("num_points", num_points)
    check_floating("sampling_loc_attn", sampling_loc_attn, VALUE_DTYPES, value.device)
    # The original reads the number of queries from the second axis.
    num_queries = sampling_loc_attn.shape[1] if sampling_loc_attn.dim() > 1 else 1
    sampling_loc_attn = split_axes(
        "sampling_loc_attn", sampling_loc_attn, value,
        batch=value.shape[0], queries=num_queries, heads=value.shape[2], columns=count * 3,
    )  # fmt: skip
    locations, logits = sampling_loc_attn.split([count * 2, count], -1)
    return deformable_attention(
        value,
        shapes,
        locations.unflatten(-1, (count, 2)),
        logits.to(compute_dtype(value)).softmax(-1),
        num_points=num_points,
    )


def _gradients(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    grad_output: Tensor,
    *,
    heads: int,
) -> tuple[Tensor, ...]:
    """The gradients of a function by its tensors; the channels of its output are those of `heads`.

    A caller's backward passes the inputs alone, so that the forward runs once more.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves)
    check_floating("grad_output", grad_output, VALUE_DTYPES, output.device)
    if not joins(grad_output.shape, [*output.shape[:-1], heads, output.shape[-1] // heads]):
        raise ValueError(
            f"grad_output: expected {format_shape(output)}, the shape of the output, "
            f"got {format_shape(grad_output)}"
        )
    return torch.autograd.grad(output, leaves, grad_output.reshape(output.shape).to(output.dtype))


def _to_flag(name: str, flag: object) -> bool:
    """The argument as a bool; a ValueError that names it unless it is 0 or 1.

    The kernel of DCNv3 subtracts `remove_center` from the number of points, so that 2 is not True.
    """
    if flag not in (0, 1):
        raise ValueError(f"{name}: expected 0 or 1, got {flag!r}")
    return bool(flag)
