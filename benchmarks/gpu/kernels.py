"""The floors' kernels: a copy, rows gathered and rows added by numbers that are given. A few lines each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):
    """One block of a copy."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    tl.store(target + index, tl.load(source + index, mask=inside), mask=inside)


@triton.jit
def gather_kernel(
    value,
    rows,
    output,
    num_looks,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """For each look the sum of the rows that it names, in registers; -1 names none.

    `value` is [rows of HEAD_DIM numbers], `rows` [num_rows, num_looks] int32, `output` [num_looks, HEAD_DIM];
    all are counted in 32 bits. `AT_ONCE` loads are in flight together; it divides `num_rows`.
    """
    look = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, HEAD_DIM)
    inside = look < num_looks
    total = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    for first in range(0, num_rows, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            row = tl.load(rows + (first + step) * num_looks + look, mask=inside, other=-1)
            at = row[:, None] * HEAD_DIM + channel[None, :]
            found = tl.load(value + at, mask=(row >= 0)[:, None], other=0.0)
            total += found.to(tl.float32)
    at = look[:, None] * HEAD_DIM + channel[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside[:, None])


@triton.jit
def scatter_kernel(
    source,
    rows,
    target,
    num_looks,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Adds the row of each look to all rows that it names; -1 names none.

    `source` is [num_looks, HEAD_DIM], `target` float32 [rows of HEAD_DIM numbers]; the rest as in the gather.
    """
    look = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, HEAD_DIM)
    inside = look < num_looks
    at = look[:, None] * HEAD_DIM + channel[None, :]
    added = tl.load(source + at, mask=inside[:, None], other=0.0).to(tl.float32)
    for first in range(0, num_rows, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            row = tl.load(rows + (first + step) * num_looks + look, mask=inside, other=-1)
            to = row[:, None] * HEAD_DIM + channel[None, :]
            tl.atomic_add(target + to, added, mask=(row >= 0)[:, None], sem="relaxed")
