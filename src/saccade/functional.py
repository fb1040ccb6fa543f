"""The public functions: arguments are understood, then the registered operator is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade import backend, reference
from saccade.arguments import Coordinates, Interpolation, Padding, SpatialShapes, understand
from saccade.ops import registration


def deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
    value_padding_mask: Tensor | None = None,
) -> Tensor:
    """Multi-scale deformable attention: weighted sums of the value map at learned points.

    For every query and head, the value map is read at each sampling location by linear (bilinear,
    trilinear) interpolation, and what is read is summed with the attention weights. The map has N =
    1, 2 or 3 dimensions: a signal, an image, a volume.

    Args:
        value (Tensor[B, S, M or 1, D]): the value maps of all levels, flattened (the last axis
            fastest) and joined level after level. float32, float64, float16 or bfloat16. With one
            head, all M heads read the same map, without a copy.
        spatial_shapes: `(width,)`, `(height, width)` or `(depth, height, width)` in pixels of each
            of the L levels, as a sequence of tuples of int or an integer tensor [L, N]; the
            products sum to S. Prefer Python ints: a tensor on a GPU has to be read back.
        sampling_locations (Tensor[B, Q, M, L, K, N] or, flat, Tensor[B, Q, M, P, N]): where each
            point reads, `(x)`, `(x, y)` or `(x, y, z)`, in the unit that `coordinates` names; any
            finite or non-finite number is allowed. Its dtype may differ from the value's.
        attention_weights (Tensor[B, Q, M, L, K] or, flat, Tensor[B, Q, M, P]): the weight of each
            point; not normalised here. Its dtype may differ from the value's.
        num_points: number of points of each level, one int or a list of L ints; needed for (and
            only for) flat locations, where P is the sum over the levels.
        interpolation: "linear", or "nearest" (rounds half to even; no gradient to the locations).
        padding: "zeros", a corner outside the map counts as 0, or "border", the position is clamped
            to the centres of the border pixels.
        coordinates: "normalized", 0 and 1 are the outer edges of the map; "normalized_corners", the
            centres of its first and last pixel; "pixel", an integer is the centre of a pixel.
        value_padding_mask (Tensor[B, S], bool): True marks positions of `value` that are padding
            and count as 0.

    Returns:
        Tensor[B, Q, M * D]: in the value's dtype, contiguous.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype, device or option does not fit. The message names the argument,
            what was expected and what came.

    Precision:
        Positions, interpolation weights and sums are float32 whatever the value's dtype (float64
        for float64 values). A non-finite location contributes 0 and gets gradient 0. On the CPU the
        result and the gradients are bitwise the same for every number of threads.

    Source:
        Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
        equations 2 and 3 without the projections, https://arxiv.org/abs/2010.04159

    Example:
        >>> import torch, saccade
        >>> value = torch.randn(2, 8 * 8 + 4 * 4, 8, 32)          # two levels, 8 heads of 32
        >>> locations = torch.rand(2, 100, 8, 2, 4, 2)            # 100 queries, 4 points a level
        >>> weights = torch.rand(2, 100, 8, 2, 4)
        >>> saccade.deformable_attention(value, [(8, 8), (4, 4)], locations, weights).shape
        torch.Size([2, 100, 256])
        >>> signal, locations = torch.arange(5.0).view(1, 5, 1, 1), torch.tensor([0.5, 2.25])
        >>> saccade.deformable_attention(                         # one dimension, two queries
        ...     signal, [(5,)], locations.view(1, 2, 1, 1, 1, 1), torch.ones(1, 2, 1, 1, 1),
        ...     coordinates="pixel").flatten().tolist()
        [0.5, 2.25]
    """
    call = understand(
        value,
        spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points,
        interpolation,
        padding,
        coordinates,
        value_padding_mask,
    )
    if backend.needs_reference():
        return reference.execute(call)
    arguments = (
        call.value,
        call.flat_spatial_shapes,
        call.sampling_locations,
        call.attention_weights,
        call.num_points,
        interpolation,
        padding,
        coordinates,
    )
    if registration.needs_autograd(call.value, call.sampling_locations, call.attention_weights):
        output: Tensor = registration.OPERATOR(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output = registration.OPERATOR(*arguments)
    return output
