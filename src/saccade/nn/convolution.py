"""The modules of InternImage (DCNv3) and FlashInternImage (DCNv4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.checks import check_option, to_positive_int
from saccade.convolution import deformable_convolution, parse_pair, parse_window
from saccade.nn.sampling_module import check_channels

Form: TypeAlias = Literal["dcnv3", "dcnv4"]


class DeformableConv(nn.Module):
    """Deformable convolution as in InternImage (DCNv3) or FlashInternImage (DCNv4).

    Offsets and modulation of each pixel of the output are predicted from the input pixel under it.
    Each form's state dict has the keys of its authors' module, so that checkpoints load as they are.

    - "dcnv3" predicts from a depthwise convolution, a norm and GELU; a softmax goes over the points.
      Its layers are `dw_conv`, `offset`, `mask`, `input_proj` and `output_proj`.
    - "dcnv4" predicts from the pixel itself, or from a depthwise convolution, and uses the modulation
      without a softmax. Its layers are `offset_mask_dw`, `offset_mask`, `value_proj` and `output_proj`.

    Args:
        embed_dim: number of channels C.
        num_groups: number of groups G, each with offsets of its own; must divide `embed_dim`.
        kernel_size: size of the window, one int or (height, width), as are `stride`, `padding`,
            `dilation` and `depthwise_kernel_size`.
        form: "dcnv3" or "dcnv4".
        stride: pixels from one window to the next.
        padding: zeros around the map, at most dilation * (kernel_size - 1) // 2. None means that
            maximum, which keeps the size of the map where the kernel is odd and the stride 1.
        dilation: pixels from one point of a window to the next.
        offset_scale: factor of the whole pattern, the offsets included.
        depthwise_kernel_size: size of the depthwise convolution in front of the prediction, odd. None
            means `kernel_size` with "dcnv3", and no such layer with "dcnv4".
        center_feature_scale: mixes each group with its projected input under the window's centre, by
            a predicted share.
        remove_center: leaves out the centre of the window; the kernel has to be odd.
        pointwise: whether there are projections before and after the convolution.
        output_bias: whether `output_proj` has a bias.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a number does not fit; the message names it.

    Precision:
        The layers follow autocast and the module's dtype; from what they predict on, positions and
        the softmax are float32 (float64 in float64 modules).

    Source:
        Wang et al., InternImage, section 3.1, https://arxiv.org/abs/2211.05778; Xiong et al., DCNv4,
        https://arxiv.org/abs/2401.06197

    Example:
        >>> import torch, saccade
        >>> convolution = saccade.nn.DeformableConv(64, num_groups=4)
        >>> convolution(torch.randn(1, 14, 20, 64)).shape
        torch.Size([1, 14, 20, 64])
        >>> convolution = saccade.nn.DeformableConv(64, num_groups=4, form="dcnv4", stride=2)
        >>> convolution(torch.randn(1, 14, 20, 64)).shape
        torch.Size([1, 7, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_groups: int = 4,
        kernel_size: int | Sequence[int] = 3,
        *,
        form: Form = "dcnv3",
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        offset_scale: float = 1.0,
        depthwise_kernel_size: int | Sequence[int] | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        pointwise: bool = True,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        check_option("form", form, Form)
        self.form: Form = form
        self.embed_dim = to_positive_int("embed_dim", embed_dim)
        self.num_groups = to_positive_int("num_groups", num_groups)
        if embed_dim % num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of embed_dim {embed_dim}, got {num_groups}"
            )
        window = parse_window(kernel_size, stride, padding, dilation, remove_center)
        if any(side > centre for side, centre in zip(window.padding, window.centre, strict=True)):
            raise ValueError(
                f"padding: expected at most {window.centre}, dilation * (kernel_size - 1) // 2, "
                f"because each output pixel is predicted from the pixel under it, got {padding}"
            )
        if remove_center and not _odd(window.kernel_size):
            raise ValueError(
                f"kernel_size: expected odd numbers with remove_center, got {kernel_size}"
            )
        self.window = window
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale

        num_points = num_groups * window.num_points
        projection = nn.Linear(embed_dim, embed_dim) if pointwise else None
        # The names of the layers, and their order in `dw_conv`, are those of the checkpoints.
        if form == "dcnv3":
            if depthwise_kernel_size is None:
                depthwise_kernel_size = kernel_size
            norm = nn.Sequential(_ChannelsLast(), nn.LayerNorm(embed_dim, eps=1e-6))
            self.dw_conv = nn.Sequential(
                _depthwise(embed_dim, depthwise_kernel_size), norm, nn.GELU()
            )
            self.offset = nn.Linear(embed_dim, num_points * 2)
            self.mask = nn.Linear(embed_dim, num_points)
            self.input_proj = projection
        else:
            self.offset_mask_dw = None
            if depthwise_kernel_size is not None:
                self.offset_mask_dw = _depthwise(embed_dim, depthwise_kernel_size)
            # A multiple of 8 columns, as in the checkpoints; those behind the last group are not used.
            self.offset_mask = nn.Linear(embed_dim, math.ceil(num_points * 3 / 8) * 8)
            self.value_proj = projection
        self.output_proj = nn.Linear(embed_dim, embed_dim, bias=output_bias) if pointwise else None
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(num_groups, embed_dim))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: no offsets, equal modulation, and a share of the centre of one half.

        The depthwise convolution and the norm keep torch's initialisation.
        """
        predictors = (self.offset, self.mask) if self.form == "dcnv3" else (self.offset_mask,)
        for layer in predictors:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for projection in (self._value_projection, self.output_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Convolves the map.

        Args:
            feature_map (Tensor[B, H, W, C]): channels last.

        Returns:
            Tensor[B, H', W', C]: H' = (H + 2 * padding - dilation * (kernel_size - 1) - 1) //
                stride + 1, and W' alike.

        Raises:
            ValueError: the shape does not fit; the message names the argument.
        """
        check_channels("feature_map", feature_map, ("batch", "height", "width"), self.embed_dim)
        self.window.output_size("feature_map", feature_map)  # an error under this name
        value = feature_map
        if self._value_projection is not None:
            value = self._value_projection(feature_map)
        features, offsets, modulation = self._predict(feature_map)
        output = deformable_convolution(
            value,
            offsets.unflatten(-1, (-1, 2)),
            modulation,
            kernel_size=self.window.kernel_size,
            stride=self.window.stride,
            padding=self.window.padding,
            dilation=self.window.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.window.remove_center,
            softmax=self.form == "dcnv3",
        )
        if self.center_feature_scale:
            # "dcnv3" predicts the share from the features that offsets come from, "dcnv4" from the output.
            share = F.linear(
                features if self.form == "dcnv3" else output,
                self.center_feature_scale_proj_weight,
                self.center_feature_scale_proj_bias,
            ).sigmoid()
            share = share.repeat_interleave(self.embed_dim // self.num_groups, -1)
            output = output * (1 - share) + self._under_windows(value) * share
        return output if self.output_proj is None else self.output_proj(output)

    def _predict(self, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, H', W', C], and the offsets [B, H', W', G, K * 2] and modulation predicted from them."""
        groups = (self.num_groups, -1)
        channels_first = feature_map.permute(0, 3, 1, 2)
        if self.form == "dcnv3":
            features = self._under_windows(self.dw_conv(channels_first))
            offsets, modulation = self.offset(features), self.mask(features)
            return features, offsets.unflatten(-1, groups), modulation.unflatten(-1, groups)
        features = feature_map
        if self.offset_mask_dw is not None:
            features = self.offset_mask_dw(channels_first).permute(0, 2, 3, 1)
        features = self._under_windows(features)
        # Each group has its offsets, then its modulation.
        num_points = self.window.num_points
        predicted = self.offset_mask(features)[..., : self.num_groups * num_points * 3]
        offsets, modulation = predicted.unflatten(-1, groups).split(
            [num_points * 2, num_points], -1
        )
        return features, offsets, modulation

    def _under_windows(self, feature_map: Tensor) -> Tensor:
        """The pixels [B, H', W', C] under the centres of the windows."""
        rows, columns = (
            slice(centre - padding, size - (reach - centre) + padding, stride)
            for size, reach, centre, padding, stride in zip(
                feature_map.shape[1:3],
                self.window.reach,
                self.window.centre,
                self.window.padding,
                self.window.stride,
                strict=True,
            )
        )
        return feature_map[:, rows, columns]

    @property
    def _value_projection(self) -> nn.Linear | None:
        return self.input_proj if self.form == "dcnv3" else self.value_proj

    def extra_repr(self) -> str:
        """The arguments of the module, for `print`."""
        return (
            f"embed_dim={self.embed_dim}, num_groups={self.num_groups}, form={self.form!r}, "
            f"kernel_size={self.window.kernel_size}, stride={self.window.stride}, "
            f"padding={self.window.padding}, dilation={self.window.dilation}, "
            f"offset_scale={self.offset_scale}, remove_center={self.window.remove_center}"
        )


class _ChannelsLast(nn.Module):
    def forward(self, feature_map: Tensor) -> Tensor:
        return feature_map.permute(0, 2, 3, 1)


def _depthwise(channels: int, kernel_size: int | Sequence[int]) -> nn.Conv2d:
    size = parse_pair("depthwise_kernel_size", kernel_size, 1)
    if not _odd(size):
        # An even kernel would not keep the size of the map.
        raise ValueError(f"depthwise_kernel_size: expected odd numbers, got {size}")
    padding = (size[0] // 2, size[1] // 2)
    return nn.Conv2d(channels, channels, size, padding=padding, groups=channels)


def _odd(sizes: Sequence[int]) -> bool:
    return all(size % 2 for size in sizes)
