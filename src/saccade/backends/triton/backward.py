"""The operator backward, in Triton.

With g the gradient of the output, for each query and head m and its points k (`rule_backward.py` has the rest):

    d[k, c]                  = g[m] . value[row of corner c of k, m]
    grad_value[row of c, m] += weight[k] * weight[c] * g[m]         for each corner inside the map

As in the forward there are two kernels that compute the same: `backward_queries_kernel` walks over the points
of a block of queries, `backward_points_kernel` takes all points of a few queries at once. Both read the rows of
each point once.

The gradient of the value is either added up by atomic operations (GRAD_VALUE = "atomic"), or each point leaves
a key, which stands for its cell, and a record with its weight and fractions, for the kernels that add up in an
order that is always the same ("sorted", `ordered_sum.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.backends.triton import plan, tuning
from saccade.backends.triton.forward import (
    SCALARS,
    compute_dtype,
    find_block,
    find_inputs,
    first_channel,
    head_rows,
    load_words,
)
from saccade.backends.triton.ordered_sum import OrderedSum, num_margin_cells, workspace_bytes
from saccade.backends.triton.plan import (
    Kernel,
    MapGroup,
    ReferenceConstants,
    align_to_words,
    as_current_device,
    call_tensors,
    encode_sizes,
    group_maps,
    make_constants,
    make_readable,
    map_num_queries,
)
from saccade.backends.triton.rule import (
    find_corner,
    find_point,
    find_points,
    find_softmax_terms,
    level_start,
    lower_row,
    num_cells,
    select_constant,
)
from saccade.backends.triton.rule_backward import (
    first_key_of_head,
    offset_gradients,
    point_gradients,
    record_fields,
    softmax_backward,
    store_coordinates,
    store_record,
    sum_references_kernel,
)
from saccade.backends.triton.tuning import Form
from saccade.call import Call
from saccade.ops.schema import check_backward_inputs, split_backward_inputs, zero_gradients


class Gradients(NamedTuple):
    """Where the results of a program's queries begin."""

    points: Any
    weights: Any
    attention_weights: Any
    locations: Any
    keys: Any
    records: Any


class Rows(NamedTuple):
    """Where the rows of a program's head begin; those of `grad_output` are one per query."""

    value: Any
    grad_value: Any
    grad_output: Any


@triton.jit
def _find_gradients(grad_points, grad_weights, grad_attention_weights, grad_locations, keys,
                    records, block, C: tl.constexpr):  # fmt: skip
    """The `Gradients` of the block's queries."""
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    first_point = block.pair * C.NUM_POINTS
    return Gradients(
        grad_points + first_point * SPATIAL_DIMS,
        grad_weights + first_point,
        grad_attention_weights + first_point,
        grad_locations + first_point * SPATIAL_DIMS,
        keys + first_point,
        records + first_point * record_fields(SPATIAL_DIMS),
    )


@triton.jit
def _find_rows(value, grad_value, grad_output, block, num_positions, C: tl.constexpr):
    """The `Rows` of the block's head."""
    WORDS: tl.constexpr = C.HEAD_WORDS
    HEAD_DIM: tl.constexpr = C.HEAD_DIM
    VALUE_HEADS: tl.constexpr = C.VALUE_HEADS
    NUM_HEADS: tl.constexpr = C.NUM_HEADS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    return Rows(
        head_rows(value, block.map_index, block.head, num_positions, VALUE_HEADS * WORDS, WORDS,
                  PACKED_BF16),
        head_rows(grad_value, block.map_index, block.head, num_positions, VALUE_HEADS * HEAD_DIM,
                  HEAD_DIM, False),
        head_rows(grad_output, block.query, block.head, 1, NUM_HEADS * WORDS, WORDS, PACKED_BF16),
    )  # fmt: skip


@triton.jit
def _corner_products(sums, rows, grad_rows, grad, first_word, channels, samples, MASKED: tl.constexpr,
                     WHOLE: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The products of `grad` and the row at each corner, added to `sums`, a tuple of [..., BLOCK_CHANNELS]
    per corner; with WHOLE rows instead their sums over the channels, a tuple of [...], which leaves registers
    to the next corner.

    `grad` is the gradient of the output at `channels`, as `load_words`. Where GRAD_VALUE is "atomic" it is
    also added, weighted, to the rows of `grad_rows`. A corner outside is neither read nor written.
    """
    NUM_CORNERS: tl.constexpr = C.NUM_CORNERS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    HEAD_WORDS: tl.constexpr = C.HEAD_WORDS
    ROW: tl.constexpr = C.VALUE_HEADS * C.HEAD_WORDS
    GRAD_ROW: tl.constexpr = C.VALUE_HEADS * C.HEAD_DIM
    row = lower_row(samples.cells, C)  # [...]
    first = rows + (row * ROW + first_word)  # [...]
    first_element = 2 * first_word if PACKED_BF16 else first_word
    grad_first = grad_rows + (row * GRAD_ROW + first_element)  # [...]
    products = ()
    for index in tl.static_range(NUM_CORNERS):
        corner = find_corner(first, samples.cells, index, ROW, C)
        inside = tl.expand_dims(corner.inside, -1)  # [..., 1]
        if C.GRAD_POINTS or C.GRAD_WEIGHTS or C.GRAD_LOCATIONS:
            mask = inside
            if MASKED:
                mask = mask & (tl.expand_dims(first_word, -1) + channels < HEAD_WORDS)
            elements = load_words(
                tl.expand_dims(corner.address, -1) + channels, mask, PACKED_BF16, dtype
            )  # of [..., BLOCK_CHANNELS]
            if WHOLE:
                product = grad[0] * elements[0]
            else:
                product = tl.fma(grad[0], elements[0], sums[index])
            if PACKED_BF16:
                product = tl.fma(grad[1], elements[1], product)
            if WHOLE:
                product = tl.sum(product, len(product.shape) - 1)  # [...]
            products = products + (product,)
        if C.GRAD_VALUE == "atomic":
            corner = find_corner(grad_first, samples.cells, index, GRAD_ROW, C)
            amount = samples.weight  # [...]
            if NUM_CORNERS > 1:
                amount = corner.weight * amount
            amount = tl.expand_dims(amount, -1)
            if PACKED_BF16:
                amounts = tl.interleave(amount * grad[0], amount * grad[1])
                row_elements = tl.arange(0, 2 * channels.shape[0])
            else:
                amounts = amount * grad[0]  # [..., BLOCK_CHANNELS]
                row_elements = channels
            mask = inside
            if MASKED:
                mask = mask & (tl.expand_dims(first_element, -1) + row_elements < C.HEAD_DIM)
            address = tl.expand_dims(corner.address, -1) + row_elements
            tl.atomic_add(address, amounts, mask=mask, sem="relaxed")
    return products


@triton.jit(do_not_specialize=(*SCALARS, "num_keys"))
def backward_queries_kernel(
    grad_value,  # as value, or float32 or float64 for atomic additions
    grad_points,  # as points
    grad_weights,  # as weights
    grad_attention_weights,  # as weights; with softmax, the gradient of its output
    grad_locations,  # as points, float32 or float64
    keys,  # [B, Q, NUM_HEADS, NUM_POINTS]
    records,  # [B, Q, NUM_HEADS, NUM_POINTS, record_fields]
    grad_output,  # [B, Q, NUM_HEADS * HEAD_DIM]
    value, points, weights, reference_points,  # as of `forward_queries_kernel`
    sizes, num_queries, num_blocks, num_positions, first_map, first_query, num_keys,
    C: tl.constexpr,
):  # fmt: skip
    """A program walks over the points of BLOCK_QUERIES queries of one head.

    It reads rows in NUM_CHANNEL_BLOCKS blocks of BLOCK_CHANNELS words, and wider rows slice after slice.
    """
    dtype: tl.constexpr = compute_dtype(value.dtype.element_ty)
    DOTS: tl.constexpr = C.GRAD_POINTS or C.GRAD_WEIGHTS or C.GRAD_LOCATIONS
    NUM_CORNERS: tl.constexpr = C.NUM_CORNERS
    HEAD_WORDS: tl.constexpr = C.HEAD_WORDS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    BLOCK_QUERIES: tl.constexpr = C.BLOCK_QUERIES
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    NUM_CHANNEL_BLOCKS: tl.constexpr = C.NUM_CHANNEL_BLOCKS
    NUM_SLICES: tl.constexpr = C.NUM_SLICES
    POINTS_PER_STEP: tl.constexpr = C.POINTS_PER_STEP
    LEVEL_POINTS: tl.constexpr = C.LEVEL_POINTS
    SLICE: tl.constexpr = NUM_CHANNEL_BLOCKS * BLOCK_CHANNELS
    block = find_block(num_queries, num_blocks, first_map, first_query, 1, C)
    inputs = find_inputs(points, weights, reference_points, sizes, block, C)
    gradients = _find_gradients(
        grad_points, grad_weights, grad_attention_weights, grad_locations, keys, records, block, C
    )
    all_rows = _find_rows(value, grad_value, grad_output, block, num_positions, C)
    rows, grad_rows = all_rows.value, all_rows.grad_value
    first_key = tl.full((), 0, tl.int64)
    if C.GRAD_VALUE == "sorted":
        first_key = first_key_of_head(block.map_index, block.head, sizes, C)

    softmax = ()
    if C.SOFTMAX:
        softmax = find_softmax_terms(
            inputs.weights, block.queries * C.NUM_HEADS * C.NUM_POINTS, block.in_range, C, dtype
        )
    channels = tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
    in_range = tl.expand_dims(block.in_range, -1)  # [BLOCK_QUERIES, 1]
    output_row = all_rows.grad_output + block.queries * (C.NUM_HEADS * C.HEAD_WORDS)
    grad_blocks = ()  # as `load_words`, of [BLOCK_QUERIES, BLOCK_CHANNELS]
    if NUM_SLICES == 1:
        for channel_block in tl.static_range(NUM_CHANNEL_BLOCKS):
            first = first_channel(block.queries, channel_block, C)  # [BLOCK_QUERIES]
            mask = in_range & (tl.expand_dims(first, -1) + channels < HEAD_WORDS)
            address = tl.expand_dims(output_row + first, -1) + channels
            grad_blocks = grad_blocks + (load_words(address, mask, PACKED_BF16, dtype),)
    first_point = 0
    for level in range(C.NUM_LEVELS):
        points_of_level = select_constant(LEVEL_POINTS, level)
        for step in range(0, points_of_level, POINTS_PER_STEP):
            for point in tl.static_range(POINTS_PER_STEP):
                samples = find_point(
                    inputs, block.queries, block.in_range, first_point + step + point, level,
                    points_of_level, softmax, C, dtype
                )  # fmt: skip
                products = ()  # of [BLOCK_QUERIES, BLOCK_CHANNELS]
                for _corner in tl.static_range(NUM_CORNERS):
                    products = products + (tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), dtype),)
                for channel_slice in range(NUM_SLICES):
                    for channel_block in tl.static_range(NUM_CHANNEL_BLOCKS):
                        first = first_channel(block.queries, channel_block, C)
                        if NUM_SLICES == 1:
                            grad = grad_blocks[channel_block]
                        else:
                            first += channel_slice * SLICE
                            mask = in_range & (tl.expand_dims(first, -1) + channels < HEAD_WORDS)
                            address = tl.expand_dims(output_row + first, -1) + channels
                            grad = load_words(address, mask, PACKED_BF16, dtype)
                        if DOTS or C.GRAD_VALUE == "atomic":
                            added = _corner_products(
                                products, rows, grad_rows, grad, first, channels, samples,
                                NUM_SLICES * SLICE > HEAD_WORDS, False, C, dtype
                            )  # fmt: skip
                            if DOTS:
                                products = added
                if DOTS:
                    dots = ()  # of [BLOCK_QUERIES]
                    for corner in tl.static_range(NUM_CORNERS):
                        dots = dots + (tl.sum(products[corner], 1),)
                    grad_weight, grad_location = point_gradients(dots, samples, C)
                    if C.GRAD_WEIGHTS:
                        target = gradients.attention_weights + samples.offset
                        grad_weight = grad_weight.to(grad_attention_weights.dtype.element_ty)
                        tl.store(target, grad_weight, mask=samples.in_range)
                    if C.GRAD_LOCATIONS:
                        store_coordinates(gradients.locations, grad_location, samples, C)
                    if C.GRAD_POINTS:
                        if C.REFERENCE != "none":
                            grad_location = offset_gradients(grad_location, samples.steps)
                        store_coordinates(gradients.points, grad_location, samples, C)
                if C.GRAD_VALUE == "sorted":
                    store_record(gradients.keys, gradients.records, samples, first_key, num_keys, C)
        first_point += points_of_level
        positions = num_cells(sizes, level, 0, C)
        rows += positions * C.VALUE_HEADS * C.HEAD_WORDS
        grad_rows += positions * C.VALUE_HEADS * C.HEAD_DIM
        first_key += num_cells(sizes, level, 1, C)

    if C.SOFTMAX and C.GRAD_WEIGHTS:
        # Threads read here what other threads of this program have stored.
        tl.debug_barrier()
        softmax_backward(
            gradients.weights, gradients.attention_weights, inputs.weights,
            block.queries * C.NUM_HEADS * C.NUM_POINTS, block.in_range, softmax, C, dtype
        )  # fmt: skip


@triton.jit(do_not_specialize=(*SCALARS, "num_keys"))
def backward_points_kernel(
    # as of `backward_queries_kernel`
    grad_value, grad_points, grad_weights, grad_attention_weights, grad_locations, keys, records,
    grad_output, value, points, weights, reference_points,
    sizes, num_queries, num_blocks, num_positions, first_map, first_query, num_keys,
    C: tl.constexpr,
):  # fmt: skip
    """A program takes all points of BLOCK_QUERIES queries of one head at once.

    BLOCK_POINTS is the power of two that holds the points of a query.
    """
    dtype: tl.constexpr = compute_dtype(value.dtype.element_ty)
    DOTS: tl.constexpr = C.GRAD_POINTS or C.GRAD_WEIGHTS or C.GRAD_LOCATIONS
    HEAD_WORDS: tl.constexpr = C.HEAD_WORDS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    BLOCK_POINTS: tl.constexpr = C.BLOCK_POINTS
    block = find_block(num_queries, num_blocks, first_map, first_query, 1, C)
    inputs = find_inputs(points, weights, reference_points, sizes, block, C)
    gradients = _find_gradients(
        grad_points, grad_weights, grad_attention_weights, grad_locations, keys, records, block, C
    )
    rows = _find_rows(value, grad_value, grad_output, block, num_positions, C)
    samples = find_points(inputs, block.queries, block.in_range, C, dtype)

    if DOTS or C.GRAD_VALUE == "atomic":
        channels = tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
        output_row = tl.expand_dims(
            tl.expand_dims(rows.grad_output + block.queries * (C.NUM_HEADS * C.HEAD_WORDS), -1), -1
        )  # [BLOCK_QUERIES, 1, 1]
        mask = tl.expand_dims(tl.expand_dims(block.in_range, -1), -1) & (channels < HEAD_WORDS)
        grad = load_words(output_row + channels, mask, PACKED_BF16, dtype)
        first_row = level_start(sizes, samples.level, 0, C)  # [BLOCK_POINTS]
        dots = _corner_products(
            (), rows.value + first_row * (C.VALUE_HEADS * C.HEAD_WORDS),
            rows.grad_value + first_row * (C.VALUE_HEADS * C.HEAD_DIM), grad,
            tl.zeros((BLOCK_POINTS,), tl.int32), channels, samples, BLOCK_CHANNELS > HEAD_WORDS,
            True, C, dtype
        )  # of [BLOCK_QUERIES, BLOCK_POINTS]  # fmt: skip
    if DOTS:
        grad_weight, grad_location = point_gradients(dots, samples, C)
        if C.GRAD_LOCATIONS:
            store_coordinates(gradients.locations, grad_location, samples, C)
        if C.GRAD_POINTS:
            if C.REFERENCE != "none":
                grad_location = offset_gradients(grad_location, samples.steps)
            store_coordinates(gradients.points, grad_location, samples, C)
        if C.GRAD_WEIGHTS:
            if C.SOFTMAX:
                contribution = samples.weight * grad_weight  # [BLOCK_QUERIES, BLOCK_POINTS]
                total = tl.expand_dims(tl.sum(contribution, 1), 1)  # [BLOCK_QUERIES, 1]
                grad_weight = contribution - samples.weight * total
            grad_weight = grad_weight.to(grad_weights.dtype.element_ty)
            tl.store(gradients.weights + samples.offset, grad_weight, mask=samples.in_range)
    if C.GRAD_VALUE == "sorted":
        first_key = first_key_of_head(block.map_index, block.head, sizes, C)
        first_key = first_key + level_start(sizes, samples.level, 1, C)  # [BLOCK_POINTS]
        store_record(gradients.keys, gradients.records, samples, first_key, num_keys, C)


KERNELS = {"queries": backward_queries_kernel, "points": backward_points_kernel}

# Of the kernel that sums up the gradients of reference points.
REFERENCE_BLOCK_QUERIES = 32
REFERENCE_MAX_BLOCK_POINTS = 16


class OutputMask(NamedTuple):
    """The operator's `output_mask`: whether each gradient is computed."""

    value: bool
    points: bool
    weights: bool
    reference_points: bool


class BackwardPlan(NamedTuple):
    """How gradients are computed: everything that follows from sizes, dtypes, device and options."""

    kernel: Kernel
    groups: list[MapGroup]
    sizes: tuple[int, ...]
    num_positions: int
    output_mask: OutputMask
    compute_dtype: torch.dtype
    has_attention_weight_buffer: bool
    """Whether the gradient of the softmax's output is stored before that of the logits."""
    ordered_sum: OrderedSum | None
    """How the gradient of the value is summed up, unless by atomic additions."""
    sum_references: Kernel | None

    def run(self, grad_output: Tensor, call: Call) -> tuple[Tensor, ...]:
        """The gradients of value, points, weights and reference_points; empty where the mask is False."""
        value, points, weights, reference_points = call_tensors(call)
        (grad_output,) = make_readable((grad_output,))
        if self.kernel.constants.PACKED_BF16:
            grad_output, value = align_to_words(grad_output), align_to_words(value)
        mask, dtype = self.output_mask, self.compute_dtype
        unused = grad_output  # in the place of what a kernel does not touch
        grad_value = grad_points = grad_weights = grad_attention_weights = grad_locations = unused
        if mask.value and self.ordered_sum is None:
            # Summed up in 32 bits at least, whatever the value's dtype.
            grad_value = torch.zeros_like(value, dtype=dtype)
        elif mask.value:
            grad_value = torch.empty_like(value)
        if mask.points:
            grad_points = torch.empty_like(points)
        if mask.weights:
            grad_weights = grad_attention_weights = torch.empty_like(weights)
            if self.has_attention_weight_buffer:
                grad_attention_weights = torch.empty_like(weights, dtype=dtype)
        if mask.reference_points:
            grad_locations = torch.empty_like(points, dtype=dtype)
        tensors = (
            *(grad_points, grad_weights, grad_attention_weights, grad_locations, grad_output),
            *(points, weights, reference_points),
        )
        with as_current_device(value):
            for group in self.groups:
                if len(self.groups) == 1:
                    self._run_group(group, grad_value, value, tensors)
                    break
                self._run_group(
                    group,
                    grad_value[group.maps] if mask.value else unused,
                    value[group.maps],
                    [tensor.flatten(0, 1)[group.queries] for tensor in tensors],
                )
            grad_references = points.new_empty(0)
            if self.sum_references is not None:
                grad_references = torch.empty_like(reference_points)
                num_queries = math.prod(points.shape[:2])
                constants = self.sum_references.constants
                num_blocks = -(-num_queries // constants.BLOCK_QUERIES)
                self.sum_references.start(
                    num_blocks * constants.NUM_REFERENCES,
                    (grad_references, grad_locations, points),
                    None,
                    (num_queries,),
                )
        return (
            grad_value.to(value.dtype) if mask.value else value.new_empty(0),
            grad_points if mask.points else points.new_empty(0),
            grad_weights if mask.weights else weights.new_empty(0),
            grad_references,
        )

    def _run_group(
        self, group: MapGroup, grad_value: Tensor, value: Tensor, tensors: Sequence[Tensor]
    ) -> None:
        *gradients, grad_output, points, weights, reference_points = tensors
        keys = records = grad_output
        num_keys = 0
        if self.ordered_sum is not None:
            num_keys = self.ordered_sum.num_keys(grad_value)
            keys = grad_output.new_empty(weights.numel(), dtype=self.ordered_sum.key_dtype)
            fields = record_fields(points.shape[-1])
            records = grad_output.new_empty((weights.numel(), fields), dtype=self.compute_dtype)
        for launch in group.launches:
            self.kernel.start(
                launch.num_programs,
                (
                    *(grad_value, *gradients, keys, records),
                    *(grad_output, value, points, weights, reference_points),
                ),
                self.sizes,
                (*launch.scalars(self.num_positions), num_keys),
            )
        if self.ordered_sum is not None:
            self.ordered_sum.run(grad_value, grad_output, keys, records, self.sizes)


def backward_plan(
    call: Call,
    output_mask: Sequence[bool],
    form: Form | None = None,
    *,
    ordered: bool | None = None,
) -> BackwardPlan:
    """The plan of a call's gradients; by the tuning table, unless a form is given.

    `ordered` says whether the gradient of the value is summed up in a fixed order; None, by the table.
    Under `torch.use_deterministic_algorithms` it always is.
    """
    value, options = call.value, call.options
    *pairs, num_points, spatial_dims = call.points.shape
    if form is None:
        form = tuning.choose_for_call("backward", call)
    constants = make_constants(call, form)
    num_queries = map_num_queries(call)
    map_cells = value.shape[2] * num_margin_cells(options.spatial_shapes)
    workspaces = [
        workspace_bytes(
            count * pairs[2] * num_points,
            map_cells,
            constants.NUM_CORNERS,
            value.shape[3],
            spatial_dims,
            max(value.element_size(), 4),
        )
        for count in num_queries
    ]
    if ordered is None:
        ordered = (
            tuning.prefers_ordered_sum(math.prod(pairs) * num_points, value.shape[0] * map_cells)
            and max(workspaces, default=0) <= plan.MAX_WORKSPACE_BYTES
        )
    mask = OutputMask(*output_mask)
    ordered = mask.value and (ordered or torch.are_deterministic_algorithms_enabled())
    constants = constants._replace(
        GRAD_VALUE="sorted" if ordered else "atomic" if mask.value else "none",
        GRAD_POINTS=mask.points,
        GRAD_WEIGHTS=mask.weights,
        GRAD_LOCATIONS=mask.reference_points,
    )
    groups = group_maps(call, form.queries, workspaces if ordered else [0] * len(workspaces))
    ordered_sum = None
    if ordered:
        max_maps = max((group.maps.stop - group.maps.start for group in groups), default=0)
        ordered_sum = OrderedSum.make(constants, options.spatial_shapes, max_maps)
    sum_references = None
    if mask.reference_points:
        sum_references = Kernel(
            sum_references_kernel,
            ReferenceConstants(
                constants.REFERENCE,
                constants.REFERENCE_INDEX,
                constants.NUM_REFERENCES,
                constants.SPATIAL_DIMS,
                constants.NUM_HEADS,
                constants.NUM_POINTS,
                constants.POINTS_OF_LEVEL,
                REFERENCE_BLOCK_QUERIES,
                min(triton.next_power_of_2(num_points), REFERENCE_MAX_BLOCK_POINTS),
            ),
        )
    return BackwardPlan(
        Kernel(KERNELS[form.kernel], constants, form.warps),
        groups,
        encode_sizes(options.spatial_shapes),
        value.shape[1],
        mask,
        torch.float64 if value.dtype == torch.float64 else torch.float32,
        options.softmax and form.kernel == "queries",
        ordered_sum,
        sum_references,
    )


def backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`saccade::deformable_attention_backward` on a GPU; the arguments are those of the operator."""
    call_arguments, output_mask = split_backward_inputs(arguments)
    call = call_arguments.checked_call()
    check_backward_inputs(grad_output, call, output_mask)
    if not call.has_queries:
        return zero_gradients(call_arguments, output_mask)
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = ("triton backward", *output_mask, deterministic)
    planned: BackwardPlan | None = call.plans.get(key)
    if planned is None:
        planned = call.plans[key] = backward_plan(call, output_mask)
    return planned.run(grad_output, call)
