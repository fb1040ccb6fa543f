"""The GPU kernels: imported at the first call that needs them, because that imports Triton.

A GPU for which there are no kernels is not an error: the reference runs instead, and
`saccade.which_backend` and `saccade doctor` say why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.ops import schema

# The version that torch 2.10 comes with: older ones pass tuples and compile loops in other ways.
MIN_TRITON = (3, 6)
# The oldest cards that this Triton compiles for.
MIN_CAPABILITY = (8, 0)

Forward = Callable[..., Tensor]
Backward = Callable[..., tuple[Tensor, ...]]


def refusal(device: torch.device) -> str | None:
    """Why calls with tensors on this device do not get the GPU kernels, or None."""
    if device.type != "cuda":
        return f"there is no kernel for {device.type} yet"
    return installation_refusal() or card_refusal(device)


def forward(value: Tensor, *arguments: Any) -> Tensor:
    """The operator for tensors on a GPU; the arguments are those of its schema."""
    kernel, _ = _kernels(value.device)
    return kernel(value, *arguments)


def backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The backward operator for tensors on a GPU; the inputs are those of its schema."""
    _, kernel = _kernels(grad_output.device)
    return kernel(grad_output, *inputs)


@functools.cache
def _kernels(device: torch.device) -> tuple[Forward, Backward]:
    if refusal(device) is not None:
        return schema.fallback, schema.backward_fallback
    return implementations()


@functools.cache
def installation_refusal() -> str | None:
    """Why no card gets the GPU kernels with what is installed here, or None."""
    if os.environ.get("SACCADE_DISABLE_TRITON", "0") not in ("", "0"):
        return "SACCADE_DISABLE_TRITON is set"
    if torch.version.hip is not None:
        return "the GPU kernels have not been tried on AMD cards"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch's builds for NVIDIA cards on Linux install it"
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
            return f"Triton {version} is older than {'.'.join(map(str, MIN_TRITON))}"
        implementations()
    except Exception as error:  # whatever a broken Triton raises, the reference can run
        return f"Triton did not load: {error}"
    return None


@functools.cache
def card_refusal(device: torch.device) -> str | None:
    """Why this card does not get the GPU kernels, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} has compute capability {'.'.join(map(str, capability))}, "
            f"the GPU kernels need {'.'.join(map(str, MIN_CAPABILITY))}"
        )
    try:
        # When first used, Triton builds its interface to the driver with the machine's C compiler.
        _ = importlib.import_module("triton").runtime.driver.active.utils
    except Exception as error:  # compilers fail in many ways
        return f"Triton cannot launch kernels here: {error}"
    return None


def implementations() -> tuple[Forward, Backward]:
    """The GPU kernels of the operator and of its backward; imports Triton."""
    from saccade.backends import triton

    return triton.forward, triton.backward
