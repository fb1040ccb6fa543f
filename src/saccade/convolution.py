"""Deformable convolution (DCNv3, DCNv4): deformable attention from a dense grid of windows.

`docs/deformable_convolution.md` says what differs from the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checks import check_axes, compute_dtype, format_shape, has_queries, to_ints
from saccade.functional import deformable_attention, fused_deformable_attention


def deformable_convolution(
    value: Tensor,
    sampling_offsets: Tensor,
    modulation: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Deformable convolution in groups (DCNv3, DCNv4): a window whose points move.

    For each pixel of the output and each group, the map is read bilinearly at the points of a window
    plus their offsets, and what is read is summed with the modulation. There are no weights of a
    kernel: the modulation of each point takes their part.

    Args:
        value (Tensor[B, H, W, C]): the feature map, channels last. float32, float64, float16 or
            bfloat16.
        sampling_offsets (Tensor[B, H', W', G, K, 2]): how far each point moves, `(x, y)` in pixels
            before `offset_scale`. The K points of a window go column by column: point number
            column * kernel_height + row. Its dtype may differ from the value's.
        modulation (Tensor[B, H', W', G, K]): the weight of each point; with `softmax` the logits
            before it. Each of the G groups reads C / G channels. Its dtype may differ from the
            value's.
        kernel_size: size of the window, one int or (height, width), as are the next three arguments; K is
            height * width.
        stride: pixels from one window to the next.
        padding: zeros around the map: H' = (H + 2 * padding - dilation * (kernel_size - 1) - 1) //
            stride + 1, and W' alike.
        dilation: pixels from one point of a window to the next.
        offset_scale: factor of the whole pattern around a window's centre, the offsets included.
        remove_center: leaves out the point (kernel_height // 2, kernel_width // 2); K is one less.
        softmax: whether the modulation is a softmax over the K points of each group.

    Returns:
        Tensor[B, H', W', C]: in the value's dtype, contiguous.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype, device or number does not fit. The message names the argument,
            what was expected and what came.

    Precision:
        As `saccade.deformable_attention`: positions, the softmax and sums are float32 whatever the
        value's dtype (float64 for float64 values), gradients included.

    Source:
        Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable
        Convolutions", equation 2, https://arxiv.org/abs/2211.05778; Xiong et al., "Efficient
        Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications",
        https://arxiv.org/abs/2401.06197

    Example:
        >>> import torch, saccade
        >>> value = torch.randn(1, 14, 20, 64)
        >>> offsets, logits = torch.randn(1, 7, 10, 4, 9, 2), torch.randn(1, 7, 10, 4, 9)
        >>> saccade.deformable_convolution(
        ...     value, offsets, logits, kernel_size=3, stride=2, padding=1, softmax=True).shape
        torch.Size([1, 7, 10, 64])
    """
    window = parse_window(kernel_size, stride, padding, dilation, remove_center)
    if isinstance(offset_scale, bool) or not isinstance(offset_scale, float | int):
        raise TypeError(f"offset_scale: expected a number, got {offset_scale!r}")
    check_axes("value", value, None, batch=None, height=None, width=None, channels=None)
    batch_size, height, width, num_channels = value.shape
    rows, columns = window.output_size("value", value)
    check_axes(
        "sampling_offsets", sampling_offsets, value,
        batch=batch_size, height=rows, width=columns, groups=None, points=window.num_points,
        coordinates=2,
    )  # fmt: skip
    num_groups = sampling_offsets.shape[3]
    if num_channels % num_groups:
        raise ValueError(
            f"sampling_offsets: expected a number of groups that divides the {num_channels} "
            f"channels of value, got {num_groups} in {format_shape(sampling_offsets)}"
        )
    check_axes(
        "modulation", modulation, value,
        batch=batch_size, height=rows, width=columns, groups=num_groups, points=window.num_points,
    )  # fmt: skip

    # Groups are heads, windows are queries, on one level.
    heads = value.flatten(1, 2).unflatten(2, (num_groups, -1))
    offsets, weights = sampling_offsets.flatten(1, 2), modulation.flatten(1, 2)
    dtype = compute_dtype(value)
    if not has_queries((batch_size,)):
        # The points at rest are as many as the windows of one map: nothing reads them.
        points = offsets.new_zeros(1, dtype=dtype).expand(1, rows * columns, window.num_points, 2)
        softmax = False
    else:
        points = window.points(rows, columns, offset_scale, dtype, value.device)
    if softmax:
        # The points at rest are the reference points, so that the offsets can stay as they are.
        if offset_scale != 1:
            offsets = offsets.to(dtype) * offset_scale
        output = fused_deformable_attention(
            heads,
            [(height, width)],
            points.expand(batch_size, -1, -1, -1),
            offsets,
            weights,
            num_points=window.num_points,
            reference_index=range(window.num_points),
            coordinates="pixel",
        )
    else:
        output = deformable_attention(
            heads,
            [(height, width)],
            torch.add(points[:, :, None], offsets.to(dtype), alpha=offset_scale),
            weights,
            num_points=window.num_points,
            coordinates="pixel",
        )
    convolved: Tensor = output.unflatten(1, (rows, columns))
    return convolved


class Window(NamedTuple):
    """The window of a convolution and how it moves; each pair is (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    remove_center: bool

    @property
    def num_points(self) -> int:
        """Number of points K of the window."""
        return math.prod(self.kernel_size) - self.remove_center

    @property
    def reach(self) -> tuple[int, int]:
        """Distance from the first point of the window to its last, (height, width) in pixels."""
        (height, width), (down, right) = self.kernel_size, self.dilation
        return down * (height - 1), right * (width - 1)

    @property
    def centre(self) -> tuple[int, int]:
        """Distance from the first point of the window to its centre, rounded down."""
        return self.reach[0] // 2, self.reach[1] // 2

    def output_size(self, name: str, feature_map: Tensor) -> tuple[int, int]:
        """(H', W'): how many windows fit into the map [B, H, W, C] and its padding.

        Raises:
            ValueError: no window fits; the message calls the map `name`.
        """
        sizes = []
        for axis, size in enumerate(feature_map.shape[1:3]):
            min_size = self.reach[axis] + 1 - 2 * self.padding[axis]
            if size < max(1, min_size):
                raise ValueError(
                    f"{name}: expected a {('height', 'width')[axis]} of at least {max(1, min_size)} "
                    f"for kernel_size {self.kernel_size}, padding {self.padding} and dilation "
                    f"{self.dilation}, got {format_shape(feature_map)}"
                )
            sizes.append((size - min_size) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def points(
        self, rows: int, columns: int, scale: float, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The locations in pixels of all windows' points without offsets, [1, H' * W', K, 2]."""
        axes = []
        for axis, count in enumerate((rows, columns)):
            first = self.centre[axis] - self.padding[axis] - self.centre[axis] * scale
            windows = torch.arange(count, dtype=dtype, device=device) * self.stride[axis] + first
            steps = torch.arange(self.kernel_size[axis], dtype=dtype, device=device)
            axes.append(windows[:, None] + steps * (self.dilation[axis] * scale))
        size = (rows, columns, self.kernel_size[1], self.kernel_size[0])  # column by column
        y, x = axes[0][:, None, None, :].expand(size), axes[1][None, :, :, None].expand(size)
        points = torch.stack((x, y), -1).view(1, rows * columns, -1, 2)
        if not self.remove_center:
            return points
        removed = self.kernel_size[1] // 2 * self.kernel_size[0] + self.kernel_size[0] // 2
        return torch.cat((points[:, :, :removed], points[:, :, removed + 1 :]), 2)


def parse_window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | None,
    dilation: int | Sequence[int],
    remove_center: bool,
) -> Window:
    """The arguments of a convolution as pairs.

    With `padding` None, the map is padded so that the centre of the first window is the first pixel.

    Raises:
        TypeError: an argument is not an int or a pair of them; the message names it.
        ValueError: a number is too small; the message names the argument.
    """
    window = Window(
        parse_pair("kernel_size", kernel_size, 1),
        parse_pair("stride", stride, 1),
        (0, 0),
        parse_pair("dilation", dilation, 1),
        bool(remove_center),
    )
    if not window.num_points:
        raise ValueError(
            "kernel_size: expected more than one point with remove_center, "
            f"got {window.kernel_size}"
        )
    if padding is None:
        return window._replace(padding=window.centre)
    return window._replace(padding=parse_pair("padding", padding, 0))


def parse_pair(name: str, argument: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """(height, width) of an argument that is an int or a pair of them.

    Raises:
        TypeError: it is neither; the message calls it `name`.
        ValueError: there are not two numbers, or one is below `minimum`.
    """
    sides = argument if isinstance(argument, Sequence) else [argument, argument]
    pair = to_ints(name, sides, "an int or (height, width)")
    if len(pair) != 2 or any(side < minimum for side in pair):
        raise ValueError(
            f"{name}: expected (height, width) of at least {minimum}, got {argument!r}"
        )
    return pair[0], pair[1]
