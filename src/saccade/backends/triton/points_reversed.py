"""Stage one in reverse: from dot products to the gradients of weights, locations, offsets and logits.

And what a point leaves for the kernels that sum up the gradient of the value in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade.backends.triton.points import cells_of_level, corner_of_cells, entry, offset_step


@triton.constexpr_function
def fields_of_record(spatial_dims):
    """Numbers that a point leaves: its weight, its share along each axis, and what fills up."""
    return 2 if spatial_dims == 1 else 4


@triton.jit
def gradients_of_points(dots, cells, sizes_of_level, weight, LINEAR: tl.constexpr):
    """The gradient of each point's attention weight, and those of its location, axis by axis, from the
    products of the output's gradient and the row at each corner.

    A corner outside takes no part, not even with infinite numbers.
    """
    AXES: tl.constexpr = len(cells)
    contributions = ()
    moved = ()
    for corner in tl.static_range(len(dots)):
        dot = dots[corner]
        inside, _place, share = corner_of_cells(
            cells[0][0], cells, sizes_of_level, corner, 0, False
        )
        contributions = contributions + (tl.where(inside, share * dot if LINEAR else dot, 0),)
        moved = moved + (tl.where(inside, weight * dot, 0),)
    grad_weight = contributions[0]
    for corner in tl.static_range(1, len(dots)):
        grad_weight += contributions[corner]
    grad_location = ()
    for axis in tl.static_range(AXES):
        slope = cells[axis][4]
        if not LINEAR:
            total = slope * moved[0]
        else:
            for corner in tl.static_range(2**AXES):
                # How the corner's weight grows along the axis, but for the sign.
                grows = slope
                for other in tl.static_range(AXES):
                    if other != axis:
                        upper = cells[other][1]
                        grows = grows * (upper if (corner >> other) % 2 == 1 else 1 - upper)
                term = grows * moved[corner]
                if corner == 0:
                    total = -term
                else:
                    total = total + term if (corner >> axis) % 2 == 1 else total - term
        grad_location = grad_location + (total,)
    return grad_weight, grad_location


@triton.jit
def store_points(start, place, numbers, in_range):
    """The numbers of each axis at `place`, side by side."""
    AXES: tl.constexpr = len(numbers)
    dtype: tl.constexpr = start.dtype.element_ty
    if AXES == 2:
        # One store for both.
        pairs = tl.expand_dims(start + place * 2, -1) + tl.arange(0, 2)
        both = tl.join(numbers[0], numbers[1]).to(dtype)
        tl.store(pairs, both, mask=tl.expand_dims(in_range, -1))
    else:
        for axis in tl.static_range(AXES):
            tl.store(start + (place * AXES + axis), numbers[axis].to(dtype), mask=in_range)


@triton.jit
def of_offset(grad_location, steps):
    """The gradient of an offset. A point that takes no part has none, even of an infinite box."""
    found = ()
    for axis in tl.static_range(len(grad_location)):
        product = grad_location[axis] * steps[axis]
        found = found + (tl.where(grad_location[axis] == 0, 0, product),)
    return found


@triton.jit
def store_record(keys, records, place, cells, sizes_of_level, weight, first_key, num_keys, in_range,
                  LINEAR: tl.constexpr):  # fmt: skip
    """For the sum in order: the number of the cell that a point lies in, counted with a margin of one
    cell before each axis, and its weight and shares. `num_keys` stands for cells without a corner inside.
    """
    AXES: tl.constexpr = len(cells)
    FIELDS: tl.constexpr = fields_of_record(AXES)
    cell = cells[AXES - 1][0].to(tl.int64) + 1
    taking_part = cells[AXES - 1][2]
    if LINEAR:
        taking_part = taking_part | cells[AXES - 1][3]
    for axis in tl.static_range(AXES - 2, -1, -1):
        cell = cell * (sizes_of_level[axis] + 1) + (cells[axis][0] + 1)
        part = cells[axis][2]
        if LINEAR:
            part = part | cells[axis][3]
        taking_part = taking_part & part
    key = tl.where(taking_part, first_key + cell, num_keys)
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=in_range)
    record = tl.expand_dims(records + place * FIELDS, -1) + tl.arange(0, 2)
    mask = tl.expand_dims(in_range, -1)
    tl.store(record, tl.join(weight, cells[0][1]), mask=mask)
    if AXES > 1:
        third = cells[2][1] if AXES == 3 else cells[1][1]
        tl.store(record + 2, tl.join(cells[1][1], third), mask=mask)


@triton.jit
def _weights_and_gradients(grad_weights, logits, places, mask, softmax, dtype: tl.constexpr):
    """The weights that the logits of some points stand for, and what was found as their gradients."""
    logit = tl.load(logits + places, mask=mask, other=float("-inf")).to(dtype)
    weight = tl.exp(logit - tl.expand_dims(softmax[0], -1)) * tl.expand_dims(softmax[1], -1)
    return weight, tl.load(grad_weights + places, mask=mask, other=0)


@triton.jit
def softmax_gradients(grad_logits, grad_weights, logits, place, in_range, softmax,
                      POINTS: tl.constexpr, QUERIES: tl.constexpr,
                      dtype: tl.constexpr):  # fmt: skip
    """From the gradients of the weights of whole looks to those of their logits."""
    MOST: tl.constexpr = 16
    BLOCK: tl.constexpr = triton.next_power_of_2(POINTS) if POINTS < MOST else MOST
    row = tl.expand_dims(place, -1)
    in_row = tl.expand_dims(in_range, -1)
    point = tl.arange(0, BLOCK)
    total = tl.zeros((QUERIES, BLOCK), dtype)
    for first in range(0, POINTS, BLOCK):
        mask = in_row & (first + point < POINTS)
        weight, grad = _weights_and_gradients(
            grad_weights, logits, row + (first + point), mask, softmax, dtype
        )
        total += weight * grad
    mean = tl.expand_dims(tl.sum(total, 1), -1)
    for first in range(0, POINTS, BLOCK):
        mask = in_row & (first + point < POINTS)
        places = row + (first + point)
        weight, grad = _weights_and_gradients(grad_weights, logits, places, mask, softmax, dtype)
        number = (weight * grad - weight * mean).to(grad_logits.dtype.element_ty)
        tl.store(grad_logits + places, number, mask=mask)


@triton.jit
def first_key_of_head(map_, head, sizes, VALUE_HEADS: tl.constexpr, AXES: tl.constexpr,
                      LEVELS: tl.constexpr):  # fmt: skip
    """The number of the first cell of a head of the value in a map; one head of the value serves all."""
    number = map_ * VALUE_HEADS
    if VALUE_HEADS > 1:
        number += head
    return number * cells_of_all_levels(sizes, AXES, LEVELS)


@triton.jit
def cells_of_all_levels(sizes, AXES: tl.constexpr, LEVELS: tl.constexpr):
    """How many cells, each level with a margin of one before each axis."""
    count = cells_of_level(sizes, 0, 1, AXES, LEVELS)
    for level in tl.static_range(1, LEVELS):
        count += cells_of_level(sizes, level, 1, AXES, LEVELS)
    return count


@triton.jit(do_not_specialize=("num_queries",))
def sum_references(
    grad_references, grad_locations, offsets, num_queries,
    KIND: tl.constexpr, REFERENCE_INDEX: tl.constexpr, NUM_REFERENCES: tl.constexpr,
    POINTS_OF_POINT: tl.constexpr, POINTS: tl.constexpr, HEADS: tl.constexpr,
    AXES: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For QUERIES queries the gradient of one reference point, from the locations of all heads that were
    made of it, BLOCK at a time.
    """
    dtype: tl.constexpr = grad_locations.dtype.element_ty
    NUMBERS: tl.constexpr = 2 * AXES if KIND == "boxes" else AXES
    program = tl.program_id(0)
    reference = program % NUM_REFERENCES
    query = (program // NUM_REFERENCES).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    in_range = tl.expand_dims(query < num_queries, -1)
    totals = ()
    for _axis in tl.static_range(NUMBERS):
        totals = totals + (tl.zeros((QUERIES, BLOCK), dtype),)
    for head in range(HEADS):
        look = tl.expand_dims(query * HEADS + head, -1)
        for first in range(0, POINTS, BLOCK):
            point = first + tl.arange(0, BLOCK)
            made_of = tl.zeros((BLOCK,), tl.int32) + entry(REFERENCE_INDEX, point, POINTS)
            mask = in_range & (point < POINTS) & (made_of == reference)
            added = ()
            for axis in tl.static_range(NUMBERS):
                place = (look * POINTS + point) * AXES + axis % AXES
                number = tl.load(grad_locations + place, mask=mask, other=0)
                if axis >= AXES:
                    # The size of a box; a point that takes no part is none of its, whatever its offset is.
                    step = offset_step(
                        point, entry(POINTS_OF_POINT, point, POINTS), dtype, "normalized", True
                    )
                    offset = tl.load(offsets + place, mask=mask, other=0).to(dtype)
                    number = tl.where(number == 0, 0, number * step * offset)
                added = added + (totals[axis] + number,)
            totals = added
    for axis in tl.static_range(NUMBERS):
        target = grad_references + (query * NUM_REFERENCES + reference) * NUMBERS + axis
        number = tl.sum(totals[axis], 1).to(grad_references.dtype.element_ty)
        tl.store(target, number, mask=query < num_queries)
