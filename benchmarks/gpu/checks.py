"""Saccade against the definition in float64 on the CPU: fresh random inputs, poisoned outputs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import saccade
from benchmarks.gpu.results import (
    Deadline,
    OutOfTimeError,
    Results,
    ensure_device,
    reason_of,
)
from benchmarks.gpu.variants import (
    SHAPES,
    Inputs,
    Variant,
    call,
    draw,
    laid_out,
    planned,
    random_variants,
)
from saccade import reference

# Beyond the planned variants, as far as there is time.
MOST_RANDOM = 300
POISONED_BLOCKS = 8
QUICK_VARIANTS = 16
# Of what is allowed: units in the last place of the largest number, and of the largest position.
UNITS_OF_SUMS = 16
UNITS_OF_POSITIONS = 4


class Checked(NamedTuple):
    """One check and what came out."""

    name: str
    ok: bool
    error: float = 0.0
    allowed: float = 0.0
    reason: str = ""
    """Why it is not right, or why it was not done (then `ok` is True)."""
    seconds: float = 0.0
    note: str = ""
    """What else is worth knowing of a check that holds."""


def truth(variant: Variant, inputs: Inputs) -> Tensor:
    """What the call gives by the definition, on the CPU, in float64.

    Where the result jumps with the position, positions are those of the dtype that the call computes
    in: they are rounded in a way that the definition prescribes.
    """
    if variant.rounds_positions and variant.dtype != "float64":
        wide = inputs._replace(value=inputs.value.float())
    else:
        wide = inputs.map(Tensor.double)
    # The reference keeps an axis for the batch in ragged calls.
    output = (*variant.looks, variant.num_heads * variant.head_dim)
    return call(variant, wide, reference).double().reshape(output)


def allowed_error(variant: Variant, expected: Tensor) -> float:
    """How far from the truth a result in the variant's dtype may be.

    Sums and positions are float32 (float64 for float64 values); the result is rounded once. A 16-bit
    result may be twice as far off as the truth rounded to 16 bits, which is the least there is.
    """
    dtype = getattr(torch, variant.dtype)
    units = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = max(size for shape in SHAPES[variant.spatial_dims] for size in shape)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    allowed = (UNITS_OF_SUMS + UNITS_OF_POSITIONS * size) * units * max(1.0, largest)
    if dtype.itemsize == 2 and expected.numel():
        allowed += 2 * float((expected.to(dtype).double() - expected).abs().max())
    return allowed


def compare(found: Tensor, expected: Tensor, dtype: torch.dtype, allowed: float) -> float:
    """The largest error.

    Raises:
        ArithmeticError: shape, dtype or a number is not right.
    """
    if found.shape != expected.shape or found.dtype != dtype:
        raise ArithmeticError(
            f"got {list(found.shape)} in {found.dtype}, expected {list(expected.shape)} in {dtype}"
        )
    if not found.is_contiguous():
        raise ArithmeticError("the result is not contiguous")
    if not found.numel():
        return 0.0
    found = found.detach().cpu().double()
    unwritten = int((found.isnan() & ~expected.isnan()).sum())
    if unwritten:
        raise ArithmeticError(
            f"{unwritten} of {found.numel()} numbers are NaN: never written, or read from nowhere"
        )
    error = float((found - expected).abs().max())
    if not error <= allowed:
        raise ArithmeticError(f"off by {error:.3g}, allowed {allowed:.3g}")
    return error


def poison(numbers: int, dtype: torch.dtype, device: torch.device) -> None:
    """Leaves NaN in the memory that the allocator will hand out next: all bits set are NaN in all dtypes."""
    size = max(1, numbers) * dtype.itemsize
    # As many blocks as a call may need for more than its output, then one for the rest of a segment.
    sizes = [size] * POISONED_BLOCKS + ([1 << 21] if device.type == "cuda" else [])
    blocks = [torch.full((one,), 255, dtype=torch.uint8, device=device) for one in sizes]
    del blocks


@contextmanager
def deterministic(*, warn_only: bool = False, filling: bool = True) -> Iterator[None]:
    """Deterministic algorithms inside the block; `filling`: torch fills what `empty` gives with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before_filling
        torch.use_deterministic_algorithms(before, warn_only=before_warn_only)


def new_memory_is_nan() -> AbstractContextManager[None]:
    """torch fills what `empty` gives with NaN inside the block, which it does in that mode only."""
    return deterministic(warn_only=True)


def check_variant(
    variant: Variant, seed: int, device: torch.device, library: Any = saccade
) -> tuple[float, float]:
    """Error and allowance of one variant, called twice on poisoned memory.

    Raises:
        ArithmeticError: a result is wrong, or the two are not the same to the last bit.
    """
    drawn = draw(variant, seed)
    expected = truth(variant, drawn)
    allowed = allowed_error(variant, expected)
    inputs = laid_out(variant, drawn, device)
    dtype = drawn.value.dtype
    with torch.no_grad():
        poison(expected.numel(), dtype, device)
        found = call(variant, inputs, library)
        error = compare(found, expected, dtype, allowed)
        with new_memory_is_nan():
            again = call(variant, inputs, library)
        compare(again, expected, dtype, allowed)
        if not torch.equal(found, again):
            raise ArithmeticError(
                "two calls on the same inputs differ: a race, or memory nothing wrote"
            )
    return error, allowed


def check_variants(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    seed: int,
    *,
    quick: bool = False,
    check: Callable[..., Any] = check_variant,
    of: str = "",
) -> None:
    """Checks the planned variants, then random ones while there is time; each is a row of the results.

    Args:
        results: where the rows go.
        device: of the calls.
        deadline: when to stop; planned variants that are left then are counted.
        seed: of the random inputs and variants.
        quick: a part of the planned ones only.
        check: what is done with each: by default its forward.
        of: what the rows' names begin with, where it is something else.
    """
    plan = planned()[:QUICK_VARIANTS] if quick else planned()
    extra = () if quick else itertools.islice(random_variants(seed), MOST_RANDOM)
    done = {row["name"] for row in results.rows("checks")}
    longest = 0.0
    for number, variant in enumerate((*plan, *extra)):
        name = of + variant.name
        if name in done:
            continue
        done.add(name)
        if deadline.left < longest:
            if number >= len(plan):
                return
            left = f"{of}{len(plan) - number} of {len(plan)} planned variants"
            results.put("gradients_cut" if of else "checks_cut", left)
            raise OutOfTimeError
        begin = time.monotonic()
        results.put("doing", {"key": "checks", "name": name})
        results.add("checks", checked(name, device, check, variant, seed + number, device))
        longest = max(longest, time.monotonic() - begin)


def checked(name: str, device: torch.device, check: Any, *arguments: Any) -> dict[str, Any]:
    """The row of one check, also where it fails.

    Raises:
        DeviceLostError: after the failure the GPU does no more work; its row says which check it was.
    """
    begin = time.monotonic()
    error, allowed, reason, ok, note = 0.0, 0.0, "", True, ""
    try:
        found = check(*arguments)
        if isinstance(found, str):
            reason = found
        elif found is not None:
            error, allowed, *notes = found
            note = "".join(notes)
    except Exception as failure:
        ok, reason = False, reason_of(failure)
        ensure_device(device, failure)
    seconds = round(time.monotonic() - begin, 3)
    return Checked(name, ok, error, allowed, reason, seconds, note)._asdict()
