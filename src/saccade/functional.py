"""The public functions: arguments are parsed, then the registered operator is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.call import Call, Coordinates, Interpolation, Padding, drop_batch_axis, parse_call
from saccade.checks import SpatialShapes, check_tensor
from saccade.ops.autograd import compute_gradients, needs_autograd
from saccade.ops.registration import OPERATOR
from saccade.ops.schema import to_arguments


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
    queries_per_map: Sequence[int] | Tensor | None = None,
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
        num_points: number of points per level, one int or a list of L ints; required for flat
            locations, where P is the sum over the levels.
        interpolation: "linear", "nearest" (rounds half to even) or "discrete", the cell
            floor(location * size + 0.5) of RT-DETRv2 and D-FINE; the latter two have no gradient to
            the locations.
        padding: "zeros", a corner outside the map counts as 0, or "border", the position is clamped
            to the centres of the border pixels. "border_height", for "discrete" only, clamps x to
            the height as well, as the authors' code does; transformers' is "border".
        coordinates: "normalized", 0 and 1 are the outer edges of the map; "normalized_corners", the
            centres of its first and last pixel; "pixel", an integer is the centre of a pixel.
        queries_per_map: for queries without padding, B numbers that sum to T, or an integer tensor
            [B]: the first so many queries read the first map, the next the second. Locations and
            weights then are [T, M, L, K, N] and [T, M, L, K] (or flat).
        value_padding_mask (Tensor[B, S], bool): True marks positions of `value` that are padding
            and count as 0.

    Returns:
        Tensor[B, Q, M * D]: in the value's dtype, contiguous; [T, M * D] with `queries_per_map`.

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
        >>> locations = torch.rand(2, 100, 8, 2, 4, 2)            # 100 queries, 4 points per level
        >>> weights = torch.rand(2, 100, 8, 2, 4)
        >>> saccade.deformable_attention(value, [(8, 8), (4, 4)], locations, weights).shape
        torch.Size([2, 100, 256])
        >>> signal, locations = torch.arange(5.0).view(1, 5, 1, 1), torch.tensor([0.5, 2.25])
        >>> saccade.deformable_attention(                         # one dimension, two queries
        ...     signal, [(5,)], locations.view(1, 2, 1, 1, 1, 1), torch.ones(1, 2, 1, 1, 1),
        ...     coordinates="pixel").flatten().tolist()
        [0.5, 2.25]

        Three queries of the first map, one of the second:

        >>> locations, weights = torch.rand(4, 8, 2, 4, 2), torch.rand(4, 8, 2, 4)
        >>> saccade.deformable_attention(
        ...     value, [(8, 8), (4, 4)], locations, weights, queries_per_map=[3, 1]).shape
        torch.Size([4, 256])
    """
    return run(
        parse_call(
            value,
            spatial_shapes,
            sampling_locations,
            attention_weights,
            num_points=num_points,
            interpolation=interpolation,
            padding=padding,
            coordinates=coordinates,
            queries_per_map=queries_per_map,
            value_padding_mask=value_padding_mask,
        )
    )


def fused_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: int | Sequence[int] | None = None,
    reference_index: Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    padding: Padding = "zeros",
    coordinates: Coordinates = "normalized",
    queries_per_map: Sequence[int] | Tensor | None = None,
    value_padding_mask: Tensor | None = None,
) -> Tensor:
    """Deformable attention from what a query predicts: offsets, and logits before the softmax.

    The same as

        locations = reference_points + sampling_offsets * (1 / size)   # for points; for boxes see below
        weights = attention_logits.softmax over all points of a head
        deformable_attention(value, spatial_shapes, locations, weights)

    but neither locations nor weights are written to memory, and the backward keeps the inputs only.

    Args:
        value (Tensor[B, S, M or 1, D]): as in `saccade.deformable_attention`.
        spatial_shapes: as in `saccade.deformable_attention`.
        reference_points (Tensor[B, Q, R, N or 2 N]): where a query looks from: points (x), (x, y) or
            (x, y, z), in the unit that `coordinates` names, or boxes: the centre, then the size along
            the same axes. R is 1, or L for one per level, or any number with `reference_index`. Its
            dtype may differ from the value's.
        sampling_offsets (Tensor[B, Q, M, L, K, N] or, flat, Tensor[B, Q, M, P, N]): the distance of
            each point from its reference point. From points it counts pixels of the level, so that
            location = reference + offset / (W_l, H_l) in normalized coordinates; from boxes it counts
            parts of the box: location = centre + offset * (0.5 / K_l) * (w, h).
        attention_logits (Tensor[B, Q, M, L, K] or, flat, Tensor[B, Q, M, P]): the softmax goes over
            all points of a head.
        num_points: as in `saccade.deformable_attention`.
        reference_index: for each of the P points the number (below R) of the reference point it
            starts from, for instance `[0, 1, 0, 1]`; None: that of its level, or the only one.
        interpolation: as in `saccade.deformable_attention`.
        padding: as in `saccade.deformable_attention`.
        coordinates: of the reference points, as in `saccade.deformable_attention`.
        queries_per_map: as in `saccade.deformable_attention`: reference points, offsets and logits
            then are [T, R, N or 2 N], [T, M, L, K, N] and [T, M, L, K].
        value_padding_mask (Tensor[B, S], bool): True marks positions of `value` that are padding
            and count as 0.

    Returns:
        Tensor[B, Q, M * D]: in the value's dtype, contiguous; [T, M * D] with `queries_per_map`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, dtype, device or option does not fit. The message names the argument,
            what was expected and what came.

    Precision:
        As `saccade.deformable_attention`; locations and the softmax are float32 (float64 for float64
        values) too. Locations are rounded as the three operations above would, to the last bit;
        weights differ from torch's softmax by a few units in the last place.

    Source:
        Zhu et al., Deformable DETR, equation 3 and appendix A.3, https://arxiv.org/abs/2010.04159

    Example:
        >>> import torch, saccade
        >>> value = torch.randn(2, 8 * 8 + 4 * 4, 8, 32)          # two levels, 8 heads of 32
        >>> reference_points = torch.rand(2, 100, 1, 2)           # 100 queries, one point each
        >>> offsets, logits = torch.randn(2, 100, 8, 2, 4, 2), torch.randn(2, 100, 8, 2, 4)
        >>> saccade.fused_deformable_attention(
        ...     value, [(8, 8), (4, 4)], reference_points, offsets, logits).shape
        torch.Size([2, 100, 256])

        Queries without padding, 70 of the first map and 30 of the second:

        >>> saccade.fused_deformable_attention(
        ...     value, [(8, 8), (4, 4)], reference_points[0], offsets[0], logits[0],
        ...     queries_per_map=[70, 30]).shape
        torch.Size([100, 256])
    """
    check_tensor("reference_points", reference_points)
    return run(
        parse_call(
            value,
            spatial_shapes,
            sampling_offsets,
            attention_logits,
            reference_points=reference_points,
            softmax=True,
            num_points=num_points,
            reference_index=reference_index,
            interpolation=interpolation,
            padding=padding,
            coordinates=coordinates,
            queries_per_map=queries_per_map,
            value_padding_mask=value_padding_mask,
        )
    )


def run(call: Call) -> Tensor:
    """The output of a checked call: Tensor[B, Q, M * D], or [T, M * D] with `queries_per_map`."""
    arguments = to_arguments(call)
    # The compiler has to see the plain call.
    if torch.compiler.is_compiling() or needs_autograd(
        call.value, call.points, call.weights, call.reference_points
    ):
        output = OPERATOR(*arguments)
    else:
        # Passing through autograd takes as long as a small call, even where it has nothing to do.
        with torch._C._AutoDispatchBelowAutograd():
            output = OPERATOR(*arguments)
    return output if call.options.queries_per_map is None else drop_batch_axis(output, call)


def run_backward(
    grad_output: Tensor, call: Call, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of value, points, weights and reference points, as autograd computes them.

    Args:
        grad_output (Tensor[B, Q, M * D]): the gradient of the output, with the operator's batch axis.
        call: the checked call whose output that is.
        output_mask: which of the four gradients are computed; the others are None.
    """
    return compute_gradients(grad_output, to_arguments(call), output_mask)
