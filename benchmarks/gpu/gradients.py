"""Gradients of every variant, all of them and some, in fast and in deterministic mode."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import saccade
from benchmarks.gpu.checks import deterministic, poison
from benchmarks.gpu.gradient_truth import NAMES, Expected, truth_of_gradients
from benchmarks.gpu.variants import Inputs, Variant, call, draw, laid_out

KINDS_OF_GRAD_OUTPUT = ("contiguous", "expanded", "transposed")
MODES = {"fast": nullcontext, "deterministic": deterministic}


def check_gradients(
    variant: Variant, seed: int, device: torch.device, library: Any = saccade
) -> tuple[float, float]:
    """The worst error and what was allowed there.

    Raises:
        ArithmeticError: a gradient is wrong, or deterministic mode does not give the same each time.
    """
    drawn, grad_output = draw(variant, seed), draw_grad_output(variant, seed)
    expected = truth_of_gradients(variant, drawn, grad_output)
    inputs, grad_output = laid_out(variant, drawn, device), on_device(grad_output, device)
    names, chance = NAMES[variant.form], random.Random(seed)
    some = chance.sample(names, chance.randrange(1, len(names)))
    worst = (0.0, 0.0)
    for name, mode in MODES.items():
        with mode():
            for wanted in (names, some):
                poison(drawn.value.numel(), torch.float32, device)
                found = gradients(variant, inputs, grad_output, library, wanted)
                worst = worse(worst, compare_gradients(found, expected))
            if name == "deterministic":
                check_repeated(variant, inputs, grad_output, library, device)
    return worst


def gradients(
    variant: Variant,
    inputs: Inputs,
    grad_output: Tensor,
    library: Any,
    wanted: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The gradients of some inputs (all) by name; the others do not require any."""
    names = NAMES[variant.form]
    wanted = names if wanted is None else wanted
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted)
        for name, tensor in zip(names, (inputs.value, *inputs.points), strict=True)
    }
    value, *points = leaves.values()
    output = call(variant, Inputs(value, tuple(points), inputs.mask), library)
    found = torch.autograd.grad(output, [leaves[name] for name in wanted], grad_output)
    return dict(zip(wanted, found, strict=True))


def draw_grad_output(variant: Variant, seed: int) -> Tensor:
    """A random gradient of the output; by the seed contiguous, one row for all queries, or transposed."""
    numbers = torch.Generator().manual_seed(seed + 1)
    kind = random.Random(seed).choice(KINDS_OF_GRAD_OUTPUT)
    shape = (*variant.looks, variant.num_heads * variant.head_dim)
    row = shape[-1:] if kind == "expanded" else shape
    drawn = torch.randn(row, generator=numbers, dtype=torch.float64)
    drawn = drawn.to(getattr(torch, variant.dtype)).expand(shape)
    return drawn.mT.contiguous().mT if kind == "transposed" else drawn


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device with the strides that it has: one row for all queries stays one row."""
    if tensor.numel() and not any(tensor.stride()[:-1]):
        return tensor[(0,) * (tensor.dim() - 1)].to(device).expand(tensor.shape)
    return tensor.to(device)


def compare_gradients(
    found: dict[str, Tensor], expected: Sequence[Expected]
) -> tuple[float, float]:
    """The worst error of the gradients that were found, and what was allowed there.

    Raises:
        ArithmeticError: shape, dtype or a number is not right.
    """
    worst = (0.0, 0.0)
    for name, gradient, allowed, dtype in expected:
        if name not in found:
            continue
        got = found[name].detach()
        if got.shape != gradient.shape or got.dtype != dtype:
            raise ArithmeticError(
                f"grad_{name}: got {list(got.shape)} in {got.dtype}, "
                f"expected {list(gradient.shape)} in {dtype}"
            )
        if not got.numel():
            continue
        errors = (got.to(gradient.device).double() - gradient).abs()
        unwritten = int(errors.isnan().sum())
        if unwritten:
            raise ArithmeticError(
                f"grad_{name}: {unwritten} of {got.numel()} numbers are NaN: never written, "
                "or read from nowhere"
            )
        at = int((errors / allowed.clamp_min(1e-300)).argmax())
        error, most = float(errors.flatten()[at]), float(allowed.flatten()[at])
        if not error <= most:
            wrong = int((errors > allowed).sum())
            raise ArithmeticError(
                f"grad_{name} is off by {error:.3g}, allowed {most:.3g}, at {wrong} of "
                f"{got.numel()} numbers; the largest is {float(gradient.abs().max()):.3g}"
            )
        worst = worse(worst, (error, most))
    return worst


def worse(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Of two errors with what is allowed, the one that is nearer to it."""
    return max(one, other, key=lambda found: found[0] / max(found[1], 1e-300))


def check_repeated(
    variant: Variant, inputs: Inputs, grad_output: Tensor, library: Any, device: torch.device
) -> None:
    """Raises ArithmeticError unless gradients are bitwise equal again, and on another stream."""
    first = gradients(variant, inputs, grad_output, library)
    again = {"again": gradients(variant, inputs, grad_output, library)}
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            again["on another stream"] = gradients(variant, inputs, grad_output, library)
        stream.synchronize()
    for when, found in again.items():
        for name, gradient in first.items():
            if not torch.equal(gradient, found[name]):
                raise ArithmeticError(f"grad_{name} in deterministic mode is another one {when}")
