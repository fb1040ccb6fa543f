"""The sampling rule's derivative in Triton: from dot products to gradients of the inputs.

With d[c] the dot product of the output's gradient and the value's row at corner c of a point, and w the
point's attention weight:

    grad_weight        = sum over c inside the map of weight[c] * d[c]
    grad_location[n]   = sum over c inside the map of (d weight[c] / d location[n]) * (w * d[c])
    grad_offset[n]     = grad_location[n] * step[n]
    grad_logit[k]      = w[k] * (grad_weight[k] - sum over j of w[j] * grad_weight[j])       with softmax
    grad_reference[n]  = sum of grad_location[n] over the points that start from it
    grad_box[n]        = sum of grad_location[n] * offset[n] * 0.5 / points of the level

And the records that a point leaves for the ordered sum of the value's gradient (`ordered_sum.py`).
`C` is `plan.Constants`; `[...]` is the shape of a block of points, as in `rule.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.backends.triton.rule import (
    MAX_SOFTMAX_BLOCK,
    find_corner,
    num_cells,
    offset_step,
    select_constant,
)


@triton.constexpr_function
def record_fields(spatial_dims):
    """Fields of the record that a point leaves: its weight, its fraction along each axis, and padding."""
    return 2 if spatial_dims == 1 else 4


@triton.jit
def point_gradients(dots, samples, C: tl.constexpr):
    """The gradients of each point's attention weight [...] and location, per axis [...], from the dot
    products, one [...] per corner.

    A corner outside takes no part, not even with infinite numbers.
    """
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    NUM_CORNERS: tl.constexpr = C.NUM_CORNERS
    LINEAR: tl.constexpr = C.INTERPOLATION == "linear"
    cells, weight = samples.cells, samples.weight
    contributions = ()  # of [...], to the gradient of the weight
    weighted = ()  # of [...], dot products times the attention weight
    for index in tl.static_range(NUM_CORNERS):
        dot = dots[index]
        corner = find_corner(cells.lower[0], cells, index, 0, C)
        contribution = corner.weight * dot if LINEAR else dot
        contributions = contributions + (tl.where(corner.inside, contribution, 0),)
        weighted = weighted + (tl.where(corner.inside, weight * dot, 0),)
    grad_weight = contributions[0]  # [...]
    for index in tl.static_range(1, NUM_CORNERS):
        grad_weight += contributions[index]
    grad_location = ()  # of [...]
    for axis in tl.static_range(SPATIAL_DIMS):
        slope = cells.slope[axis]
        if not LINEAR:
            total = slope * weighted[0]
        else:
            for index in tl.static_range(NUM_CORNERS):
                # How the corner's weight grows along the axis, but for the sign.
                growth = slope
                for other in tl.static_range(SPATIAL_DIMS):
                    if other != axis:
                        upper = cells.fraction[other]
                        growth = growth * (upper if (index >> other) % 2 == 1 else 1 - upper)
                term = growth * weighted[index]
                if index == 0:
                    total = -term
                else:
                    total = total + term if (index >> axis) % 2 == 1 else total - term
        grad_location = grad_location + (total,)
    return grad_weight, grad_location


@triton.jit
def store_coordinates(pointer, coordinates, samples, C: tl.constexpr):
    """Stores the coordinates of each point, per axis [...], side by side."""
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    dtype: tl.constexpr = pointer.dtype.element_ty
    if SPATIAL_DIMS == 2:
        # One store for both.
        pairs = tl.expand_dims(pointer + samples.offset * 2, -1) + tl.arange(0, 2)  # [..., 2]
        both = tl.join(coordinates[0], coordinates[1]).to(dtype)  # [..., 2]
        tl.store(pairs, both, mask=tl.expand_dims(samples.in_range, -1))
    else:
        for axis in tl.static_range(SPATIAL_DIMS):
            address = pointer + (samples.offset * SPATIAL_DIMS + axis)  # [...]
            tl.store(address, coordinates[axis].to(dtype), mask=samples.in_range)


@triton.jit
def offset_gradients(grad_location, steps):
    """The gradients of the offsets, per axis [...]; 0 for a point that takes no part, even with an
    infinite box.
    """
    result = ()
    for axis in tl.static_range(len(grad_location)):
        product = grad_location[axis] * steps[axis]  # [...]
        result = result + (tl.where(grad_location[axis] == 0, 0, product),)
    return result


@triton.jit
def store_record(keys, records, samples, first_key, num_keys, C: tl.constexpr):
    """Stores for the ordered sum the key of each point, which is the index of its cell counted with a
    margin of one cell before each axis, and its weight and fractions.

    `num_keys` stands for a cell without a corner inside the map.
    """
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    FIELDS: tl.constexpr = record_fields(SPATIAL_DIMS)
    LINEAR: tl.constexpr = C.INTERPOLATION == "linear"
    cells = samples.cells
    cell = cells.lower[SPATIAL_DIMS - 1].to(tl.int64) + 1  # [...]
    takes_part = cells.lower_inside[SPATIAL_DIMS - 1]  # [...]
    if LINEAR:
        takes_part = takes_part | cells.upper_inside[SPATIAL_DIMS - 1]
    for axis in tl.static_range(SPATIAL_DIMS - 2, -1, -1):
        cell = cell * (cells.size[axis] + 1) + (cells.lower[axis] + 1)
        axis_takes_part = cells.lower_inside[axis]
        if LINEAR:
            axis_takes_part = axis_takes_part | cells.upper_inside[axis]
        takes_part = takes_part & axis_takes_part
    key = tl.where(takes_part, first_key + cell, num_keys)  # [...]
    tl.store(keys + samples.offset, key.to(keys.dtype.element_ty), mask=samples.in_range)
    record = tl.expand_dims(records + samples.offset * FIELDS, -1) + tl.arange(0, 2)  # [..., 2]
    mask = tl.expand_dims(samples.in_range, -1)
    tl.store(record, tl.join(samples.weight, cells.fraction[0]), mask=mask)
    if SPATIAL_DIMS > 1:
        last = cells.fraction[2] if SPATIAL_DIMS == 3 else cells.fraction[1]
        tl.store(record + 2, tl.join(cells.fraction[1], last), mask=mask)


@triton.jit
def _load_weights(grad_attention_weights, logits, offsets, mask, softmax, dtype: tl.constexpr):
    """The softmax of some logits and its gradients as stored before, each [BLOCK_QUERIES, BLOCK]."""
    logit = tl.load(logits + offsets, mask=mask, other=float("-inf")).to(dtype)
    power = tl.exp(logit - tl.expand_dims(softmax.max_logit, -1))
    weight = power * tl.expand_dims(softmax.scale, -1)
    return weight, tl.load(grad_attention_weights + offsets, mask=mask, other=0)


@triton.jit
def softmax_backward(grad_logits, grad_attention_weights, logits, offset, in_range, softmax,
                     C: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """From the gradients of each query's attention weights, which begin at `offset` [BLOCK_QUERIES], to
    those of its logits.
    """
    NUM_POINTS: tl.constexpr = C.NUM_POINTS
    BLOCK_QUERIES: tl.constexpr = C.BLOCK_QUERIES
    BLOCK: tl.constexpr = (
        triton.next_power_of_2(NUM_POINTS) if NUM_POINTS < MAX_SOFTMAX_BLOCK else MAX_SOFTMAX_BLOCK
    )
    row = tl.expand_dims(offset, -1)  # [BLOCK_QUERIES, 1]
    in_row = tl.expand_dims(in_range, -1)  # [BLOCK_QUERIES, 1]
    point = tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK_QUERIES, BLOCK), dtype)  # [BLOCK_QUERIES, BLOCK]
    for first in range(0, NUM_POINTS, BLOCK):
        mask = in_row & (first + point < NUM_POINTS)
        weight, grad = _load_weights(
            grad_attention_weights, logits, row + (first + point), mask, softmax, dtype
        )
        total += weight * grad
    mean = tl.expand_dims(tl.sum(total, 1), -1)  # [BLOCK_QUERIES, 1]
    for first in range(0, NUM_POINTS, BLOCK):
        mask = in_row & (first + point < NUM_POINTS)
        offsets = row + (first + point)
        weight, grad = _load_weights(grad_attention_weights, logits, offsets, mask, softmax, dtype)
        grad_logit = (weight * grad - weight * mean).to(grad_logits.dtype.element_ty)
        tl.store(grad_logits + offsets, grad_logit, mask=mask)


@triton.jit
def num_level_cells(sizes, C: tl.constexpr):
    """The number of cells of all levels, each with a margin of one before each axis."""
    NUM_LEVELS: tl.constexpr = C.NUM_LEVELS
    count = num_cells(sizes, 0, 1, C)
    for level in tl.static_range(1, NUM_LEVELS):
        count += num_cells(sizes, level, 1, C)
    return count


@triton.jit
def first_key_of_head(map_index, head, sizes, C: tl.constexpr):
    """The key of the first cell of a head of the value in a map; a single head serves all."""
    index = map_index * C.VALUE_HEADS
    if C.VALUE_HEADS > 1:
        index += head
    return index * num_level_cells(sizes, C)


@triton.jit(do_not_specialize=("num_queries",))
def sum_references_kernel(
    grad_reference_points,  # [B, Q, NUM_REFERENCES, SPATIAL_DIMS or 2 * SPATIAL_DIMS]
    grad_locations,  # [B, Q, NUM_HEADS, NUM_POINTS, SPATIAL_DIMS]
    offsets,  # as grad_locations
    num_queries,
    C: tl.constexpr,
):
    """For BLOCK_QUERIES queries the gradient of one reference point, from the locations of all heads that
    start from it, BLOCK_POINTS at a time. `C` is `plan.ReferenceConstants`.
    """
    BLOCK_QUERIES: tl.constexpr = C.BLOCK_QUERIES
    BLOCK_POINTS: tl.constexpr = C.BLOCK_POINTS
    dtype: tl.constexpr = grad_locations.dtype.element_ty
    SPATIAL_DIMS: tl.constexpr = C.SPATIAL_DIMS
    NUM_COORDINATES: tl.constexpr = 2 * SPATIAL_DIMS if C.REFERENCE == "boxes" else SPATIAL_DIMS
    REFERENCE_INDEX: tl.constexpr = C.REFERENCE_INDEX
    POINTS_OF_LEVEL: tl.constexpr = C.POINTS_OF_LEVEL
    pid = tl.program_id(0)
    reference = pid % C.NUM_REFERENCES
    query = (pid // C.NUM_REFERENCES).to(tl.int64) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    in_range = tl.expand_dims(query < num_queries, -1)  # [BLOCK_QUERIES, 1]
    totals = ()  # of [BLOCK_QUERIES, BLOCK_POINTS]
    for _axis in tl.static_range(NUM_COORDINATES):
        totals = totals + (tl.zeros((BLOCK_QUERIES, BLOCK_POINTS), dtype),)
    for head in range(C.NUM_HEADS):
        pair = tl.expand_dims(query * C.NUM_HEADS + head, -1)  # [BLOCK_QUERIES, 1]
        for first in range(0, C.NUM_POINTS, BLOCK_POINTS):
            point = first + tl.arange(0, BLOCK_POINTS)  # [BLOCK_POINTS]
            start = tl.zeros((BLOCK_POINTS,), tl.int32) + select_constant(REFERENCE_INDEX, point)
            mask = in_range & (point < C.NUM_POINTS) & (start == reference)
            added = ()
            for axis in tl.static_range(NUM_COORDINATES):
                # [BLOCK_QUERIES, BLOCK_POINTS]
                address = (pair * C.NUM_POINTS + point) * SPATIAL_DIMS + axis % SPATIAL_DIMS
                grad = tl.load(grad_locations + address, mask=mask, other=0)
                if axis >= SPATIAL_DIMS:
                    # The size of a box. A point that takes no part adds nothing, whatever its offset is.
                    step = offset_step(
                        point, select_constant(POINTS_OF_LEVEL, point), dtype, True, "normalized"
                    )
                    offset = tl.load(offsets + address, mask=mask, other=0).to(dtype)
                    grad = tl.where(grad == 0, 0, grad * step * offset)
                added = added + (totals[axis] + grad,)
            totals = added
    for axis in tl.static_range(NUM_COORDINATES):
        target = grad_reference_points + (
            (query * C.NUM_REFERENCES + reference) * NUM_COORDINATES + axis
        )  # [BLOCK_QUERIES]
        grad = tl.sum(totals[axis], 1).to(grad_reference_points.dtype.element_ty)
        tl.store(target, grad, mask=query < num_queries)
