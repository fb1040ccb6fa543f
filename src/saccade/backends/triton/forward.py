"""The operator forward, in Triton.

For each query and head m, with the points k that the sampling rule (`rule.py`) finds:

    output[m] = sum over k of weight[k] * z[k]
    z[k]      = sum over the corners c of k of weight[c] * value[row of c, m]        0 outside the map
    weight    = the attention weights, or the softmax of the attention logits over the points

Two kernels compute the same. `forward_queries_kernel` walks over the points of a block of queries: for many
queries. `forward_points_kernel` reads all points of a few queries at once: with few queries, more loads have
to be under way for each to keep a card busy.

Multiplications and additions are never fused by the compiler: `enable_fp_fusion` is off at each launch,
because the definition rounds a position twice. Where fusing is wanted it is written: `tl.fma`.

A row of the value is read in words: elements, or two bfloat16 in 32 bits (`C.PACKED_BF16`). `C` is
`plan.Constants`; shapes are given in the comments, `[...]` as in `rule.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from saccade.backends.triton import tuning
from saccade.backends.triton.plan import (
    Kernel,
    Launch,
    align_to_words,
    as_current_device,
    call_tensors,
    encode_sizes,
    make_constants,
    make_launches,
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
from saccade.backends.triton.tuning import Form
from saccade.call import Call
from saccade.ops.schema import Arguments

# Arguments of both directions' kernels that change from call to call, and compile no kernel of their own.
SCALARS = ("num_queries", "num_blocks", "num_positions", "first_map", "first_query")


class Block(NamedTuple):
    """The queries of one head that a program works on."""

    map_index: Any
    """The index of their map in the value."""
    head: Any
    channel_slice: Any
    """The index of the slice of wide rows that the program takes."""
    query: Any
    """The index of the first query among those of all maps."""
    pair: Any
    """The index of the first (query, head) pair."""
    queries: Any
    """[BLOCK_QUERIES], counted from the first."""
    in_range: Any
    """[BLOCK_QUERIES], whether there is such a query."""


class Inputs(NamedTuple):
    """Where the inputs of a program's queries begin, and the sizes of the levels."""

    points: Any
    weights: Any
    reference_points: Any
    sizes: Any


@triton.constexpr_function
def compute_dtype(pointer_dtype):
    """The dtype of positions and sums; in 16 bits positions would be off by whole pixels."""
    return tl.float64 if pointer_dtype == tl.float64 else tl.float32


@triton.jit
def find_block(num_queries, num_blocks, first_map, first_query, NUM_SLICES: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """The `Block` of this program; a block of queries is shared by NUM_SLICES programs for each head."""
    BLOCK_QUERIES: tl.constexpr = C.BLOCK_QUERIES
    pid = tl.program_id(0)
    block = (pid % num_blocks).to(tl.int64)
    channel_slice = pid // num_blocks % NUM_SLICES
    head = pid // num_blocks // NUM_SLICES % C.NUM_HEADS
    batch_index = (pid // num_blocks // NUM_SLICES // C.NUM_HEADS).to(tl.int64)
    remaining = tl.minimum(num_queries - block * BLOCK_QUERIES, BLOCK_QUERIES).to(tl.int32)
    query = first_query + batch_index * num_queries + block * BLOCK_QUERIES
    queries = tl.arange(0, BLOCK_QUERIES)  # [BLOCK_QUERIES]
    in_range = queries < remaining  # [BLOCK_QUERIES]
    if C.USE_INT64_OFFSETS:
        queries = queries.to(tl.int64)
    pair = query * C.NUM_HEADS + head
    return Block(
        first_map + batch_index, head, channel_slice, query, pair, queries, in_range
    )  # fmt: skip


@triton.jit
def find_inputs(points, weights, reference_points, sizes, block, C: tl.constexpr):
    """The `Inputs` of the block's queries."""
    points += block.pair * C.NUM_POINTS * C.SPATIAL_DIMS
    weights += block.pair * C.NUM_POINTS
    if C.REFERENCE != "none":
        num_coordinates = 2 * C.SPATIAL_DIMS if C.REFERENCE == "boxes" else C.SPATIAL_DIMS
        reference_points += block.query * C.NUM_REFERENCES * num_coordinates
    return Inputs(points, weights, reference_points, sizes)


@triton.jit
def head_rows(rows, index, head, rows_per_index, ROW: tl.constexpr, WORDS: tl.constexpr,
              PACKED_BF16: tl.constexpr):  # fmt: skip
    """Where the rows of a head begin in one of the maps that `rows` points to; a single head serves all.

    A row has ROW words, WORDS of them for each head.
    """
    if PACKED_BF16:
        rows = rows.to(tl.pointer_type(tl.int32))
    rows = rows + index * rows_per_index * ROW
    if ROW > WORDS:
        rows += head * WORDS
    return rows


@triton.jit
def load_words(address, mask, PACKED_BF16: tl.constexpr, dtype: tl.constexpr):
    """The elements of the words at `address`, as a tuple of one block of that shape; with PACKED_BF16 of
    two, the first and the second elements of the words.
    """
    words = tl.load(address, mask=mask, other=0)
    if PACKED_BF16:
        # A bfloat16 is the upper half of a float32. Apart they take an instruction each.
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
        result = (even, odd)
    else:
        result = (words.to(dtype),)
    return result


@triton.jit
def first_channel(queries, channel_block: tl.constexpr, C: tl.constexpr):
    """Where a channel block begins [BLOCK_QUERIES], in another order for each query.

    Neighbouring threads read the rows of neighbouring queries, and the same offset in two cache lines
    cannot be read at the same time.
    """
    return ((queries % C.NUM_CHANNEL_BLOCKS) ^ channel_block) * C.BLOCK_CHANNELS


@triton.jit
def _sample(rows, first_word, channels, cells, num_words, MASKED: tl.constexpr, C: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """z of each point: a tuple of [..., BLOCK_CHANNELS], as `load_words`.

    `rows` points to the point's level, `channels` [BLOCK_CHANNELS] are read from `first_word` on. A corner
    outside the map is not read and counts as 0. The sum is complete before the attention weight is
    applied, as in the definition: an infinite weight multiplies the whole sum, not single corners.
    """
    NUM_CORNERS: tl.constexpr = C.NUM_CORNERS
    ROW: tl.constexpr = C.VALUE_HEADS * C.HEAD_WORDS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    first = rows + (lower_row(cells, C) * ROW + first_word)  # [...]
    result = ()
    for index in tl.static_range(NUM_CORNERS):
        corner = find_corner(first, cells, index, ROW, C)
        mask = tl.expand_dims(corner.inside, -1)  # [..., 1]
        if MASKED:
            mask = mask & (tl.expand_dims(first_word, -1) + channels < num_words)
        elements = load_words(
            tl.expand_dims(corner.address, -1) + channels, mask, PACKED_BF16, dtype
        )  # of [..., BLOCK_CHANNELS]
        weight = tl.expand_dims(corner.weight, -1)  # [..., 1]
        if NUM_CORNERS == 1:
            result = elements
        elif index == 0:
            result = _scale(elements, weight)
        else:
            result = _add_scaled(result, weight, elements)
    return result


@triton.jit
def _scale(elements, weight):
    result = ()
    for part in tl.static_range(len(elements)):
        result = result + (weight * elements[part],)
    return result


@triton.jit
def _add_scaled(sums, weight, elements):
    """sums + weight * elements, rounded once."""
    result = ()
    for part in tl.static_range(len(elements)):
        result = result + (tl.fma(weight, elements[part], sums[part]),)
    return result


@triton.jit
def _store_output(output, block, sums, num_words, C: tl.constexpr):
    """Stores the sums, a tuple of [BLOCK_QUERIES, BLOCK_CHANNELS], in the dtype of the output."""
    NUM_CHANNEL_BLOCKS: tl.constexpr = C.NUM_CHANNEL_BLOCKS
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    row = tl.expand_dims(output + block.queries * (C.NUM_HEADS * C.HEAD_DIM), -1)
    num_elements = 2 * num_words if C.PACKED_BF16 else num_words
    for channel_block in tl.static_range(NUM_CHANNEL_BLOCKS):
        first = tl.expand_dims(first_channel(block.queries, channel_block, C), -1)
        if C.PACKED_BF16:
            elements = tl.interleave(sums[2 * channel_block], sums[2 * channel_block + 1])
            channels = 2 * first + tl.arange(0, 2 * BLOCK_CHANNELS)
        else:
            elements = sums[channel_block]
            channels = first + tl.arange(0, BLOCK_CHANNELS)
        mask = tl.expand_dims(block.in_range, -1) & (channels < num_elements)
        tl.store(row + channels, elements.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SCALARS)
def forward_queries_kernel(
    output,  # [B, Q, NUM_HEADS * HEAD_DIM]
    value,  # [B, S, VALUE_HEADS, HEAD_DIM]
    points,  # [B, Q, NUM_HEADS, NUM_POINTS, SPATIAL_DIMS], locations or offsets
    weights,  # [B, Q, NUM_HEADS, NUM_POINTS], attention weights or logits
    reference_points,  # [B, Q, NUM_REFERENCES, SPATIAL_DIMS or 2 * SPATIAL_DIMS], or any tensor
    sizes, num_queries, num_blocks, num_positions, first_map, first_query,
    C: tl.constexpr,
):  # fmt: skip
    """A program walks over the points of BLOCK_QUERIES queries of one head.

    It reads rows in NUM_CHANNEL_BLOCKS blocks of BLOCK_CHANNELS words, and one of NUM_SLICES slices of wider rows.
    """
    dtype: tl.constexpr = compute_dtype(value.dtype.element_ty)
    ROW: tl.constexpr = C.VALUE_HEADS * C.HEAD_WORDS
    BLOCK_QUERIES: tl.constexpr = C.BLOCK_QUERIES
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    NUM_CHANNEL_BLOCKS: tl.constexpr = C.NUM_CHANNEL_BLOCKS
    NUM_SLICES: tl.constexpr = C.NUM_SLICES
    POINTS_PER_STEP: tl.constexpr = C.POINTS_PER_STEP
    LEVEL_POINTS: tl.constexpr = C.LEVEL_POINTS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    HEAD_WORDS: tl.constexpr = C.HEAD_WORDS
    SLICE: tl.constexpr = NUM_CHANNEL_BLOCKS * BLOCK_CHANNELS
    block = find_block(num_queries, num_blocks, first_map, first_query, NUM_SLICES, C)
    inputs = find_inputs(points, weights, reference_points, sizes, block, C)
    output += block.pair * C.HEAD_DIM
    rows = head_rows(
        value, block.map_index, block.head, num_positions, ROW, HEAD_WORDS, PACKED_BF16
    )
    num_words = C.HEAD_WORDS
    if NUM_SLICES > 1:
        rows += block.channel_slice * SLICE
        output += block.channel_slice * (SLICE * 2 if C.PACKED_BF16 else SLICE)
        num_words = C.HEAD_WORDS - block.channel_slice * SLICE

    softmax = ()
    if C.SOFTMAX:
        softmax = find_softmax_terms(
            inputs.weights, block.queries * C.NUM_HEADS * C.NUM_POINTS, block.in_range, C, dtype
        )
    channels = tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
    sums = ()  # of [BLOCK_QUERIES, BLOCK_CHANNELS]
    for _ in tl.static_range(NUM_CHANNEL_BLOCKS * (2 if PACKED_BF16 else 1)):
        sums = sums + (tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), dtype),)
    first_point = 0
    for level in range(C.NUM_LEVELS):
        points_of_level = select_constant(LEVEL_POINTS, level)
        for step in range(0, points_of_level, POINTS_PER_STEP):
            for point in tl.static_range(POINTS_PER_STEP):
                samples = find_point(
                    inputs, block.queries, block.in_range, first_point + step + point, level,
                    points_of_level, softmax, C, dtype
                )  # fmt: skip
                sampled = ()  # of [BLOCK_QUERIES, BLOCK_CHANNELS]
                for channel_block in tl.static_range(NUM_CHANNEL_BLOCKS):
                    sampled = sampled + _sample(
                        rows, first_channel(block.queries, channel_block, C), channels,
                        samples.cells, num_words, NUM_SLICES * SLICE > HEAD_WORDS, C, dtype
                    )  # fmt: skip
                sums = _add_scaled(sums, tl.expand_dims(samples.weight, -1), sampled)
        first_point += points_of_level
        rows += num_cells(sizes, level, 0, C) * ROW

    _store_output(output, block, sums, num_words, C)


@triton.jit(do_not_specialize=SCALARS)
def forward_points_kernel(
    output, value, points, weights, reference_points,  # as of `forward_queries_kernel`
    sizes, num_queries, num_blocks, num_positions, first_map, first_query,
    C: tl.constexpr,
):  # fmt: skip
    """A program takes all points of BLOCK_QUERIES queries of one head at once.

    BLOCK_POINTS is the power of two that holds the points of a query.
    """
    dtype: tl.constexpr = compute_dtype(value.dtype.element_ty)
    ROW: tl.constexpr = C.VALUE_HEADS * C.HEAD_WORDS
    BLOCK_CHANNELS: tl.constexpr = C.BLOCK_CHANNELS
    BLOCK_POINTS: tl.constexpr = C.BLOCK_POINTS
    HEAD_WORDS: tl.constexpr = C.HEAD_WORDS
    PACKED_BF16: tl.constexpr = C.PACKED_BF16
    block = find_block(num_queries, num_blocks, first_map, first_query, 1, C)
    inputs = find_inputs(points, weights, reference_points, sizes, block, C)
    output += block.pair * C.HEAD_DIM
    rows = head_rows(
        value, block.map_index, block.head, num_positions, ROW, HEAD_WORDS, PACKED_BF16
    )

    samples = find_points(inputs, block.queries, block.in_range, C, dtype)
    first_row = level_start(sizes, samples.level, 0, C)  # [BLOCK_POINTS]
    sampled = _sample(
        rows + first_row * ROW, tl.zeros((BLOCK_POINTS,), tl.int32), tl.arange(0, BLOCK_CHANNELS),
        samples.cells, HEAD_WORDS, BLOCK_CHANNELS > HEAD_WORDS, C, dtype
    )  # of [BLOCK_QUERIES, BLOCK_POINTS, BLOCK_CHANNELS]  # fmt: skip
    sums = ()  # of [BLOCK_QUERIES, BLOCK_CHANNELS]
    for part in tl.static_range(len(sampled)):
        sums = sums + (tl.sum(tl.expand_dims(samples.weight, -1) * sampled[part], 1),)
    _store_output(output, block, sums, HEAD_WORDS, C)


KERNELS = {"queries": forward_queries_kernel, "points": forward_points_kernel}


class ForwardPlan(NamedTuple):
    """How a call is computed: everything that follows from its sizes, dtypes, device and options."""

    output_shape: tuple[int, int, int]
    kernel: Kernel
    launches: list[Launch]
    sizes: tuple[int, ...]
    num_positions: int

    def run(self, call: Call) -> Tensor:
        """The output of a call with these sizes, dtypes and options."""
        value, points, weights, reference_points = call_tensors(call)
        if self.kernel.constants.PACKED_BF16:
            value = align_to_words(value)
        output = value.new_empty(self.output_shape)
        tensors = (output, value, points, weights, reference_points)
        with as_current_device(value):
            for launch in self.launches:
                scalars = launch.scalars(self.num_positions)
                self.kernel.start(launch.num_programs, tensors, self.sizes, scalars)
        return output


def forward_plan(call: Call, form: Form | None = None) -> ForwardPlan:
    """The plan of a call; by the tuning table, unless a form is given."""
    batch_size, num_positions, _, head_dim = call.value.shape
    _, num_queries, num_heads, _, _ = call.points.shape
    if form is None:
        form = tuning.choose_for_call("forward", call)
    return ForwardPlan(
        (*call.points.shape[:2], num_heads * head_dim),
        Kernel(KERNELS[form.kernel], make_constants(call, form), form.warps),
        make_launches(
            batch_size,
            num_queries,
            num_heads * form.slices,
            form.queries,
            call.options.queries_per_map,
        ),
        encode_sizes(call.options.spatial_shapes),
        num_positions,
    )


def forward(*arguments: Any) -> Tensor:
    """`saccade::deformable_attention` on a GPU; the arguments are those of the operator."""
    call = Arguments(*arguments).checked_call()
    if not call.has_queries:
        batch_size, num_queries, num_heads = call.points.shape[:3]
        return call.value.new_empty((batch_size, num_queries, num_heads * call.value.shape[3]))
    planned: ForwardPlan | None = call.plans.get("triton forward")
    if planned is None:
        planned = call.plans["triton forward"] = forward_plan(call)
    return planned.run(call)
