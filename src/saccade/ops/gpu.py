"""The GPU kernels: found and imported at the first call that needs them, for that brings Triton along.

A GPU without them is no error: the reference does the work, and `saccade.which_backend` and
`saccade doctor` tell why.
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

from saccade.ops.contract import FUSED, Operator

# That of torch 2.10: older ones pass tuples and compile loops in other ways.
OLDEST_TRITON = (3, 6)
# The oldest cards that it compiles for.
OLDEST_CAPABILITY = (8, 0)


def refusal(device: torch.device) -> str | None:
    """Why calls with tensors on this device do not get the GPU kernels, or None."""
    if device.type != "cuda":
        return f"there is no kernel for {device.type} yet"
    return refusal_of_installation() or refusal_of_card(device)


def kernel(operator: Operator) -> Callable[..., Tensor]:
    """What the dispatcher calls for tensors on a GPU."""
    chosen: dict[torch.device, Callable[..., Tensor]] = {}

    def run(*arguments: Any) -> Tensor:
        device = arguments[0].device
        attend = chosen.get(device)
        if attend is None:
            refused = refusal(device) is not None
            attend = chosen[device] = operator.fallback if refused else implementation(operator)
        return attend(*arguments)

    return run


@functools.cache
def refusal_of_installation() -> str | None:
    """Why no card gets them here, or None."""
    if os.environ.get("SACCADE_DISABLE_TRITON", "0") not in ("", "0"):
        return "SACCADE_DISABLE_TRITON is set"
    if torch.version.hip is not None:
        return "the GPU kernels have not been tried on AMD cards"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch's builds for NVIDIA cards on Linux bring it along"
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
            return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
        implementation(FUSED)
    except Exception as error:  # whatever a broken Triton raises: the reference is there
        return f"Triton did not load: {error}"
    return None


@functools.cache
def refusal_of_card(device: torch.device) -> str | None:
    """Why this card does not get them, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} has compute capability {'.'.join(map(str, capability))}, "
            f"the GPU kernels need {'.'.join(map(str, OLDEST_CAPABILITY))}"
        )
    try:
        # Triton builds its own way to the driver with the C compiler of the machine, when first used.
        _ = importlib.import_module("triton").runtime.driver.active.utils
    except Exception as error:  # compilers fail in many ways
        return f"Triton cannot launch kernels here: {error}"
    return None


def implementation(operator: Operator) -> Callable[..., Tensor]:
    """The GPU kernels of an operator; imports Triton."""
    from saccade.backends import triton

    return triton.attend_fused if operator is FUSED else triton.attend
