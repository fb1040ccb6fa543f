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


def kernels(operator: Operator) -> dict[str, Callable[..., Any]]:
    """What the dispatcher calls for tensors on a GPU: for the operator and for its backward."""

    def chosen_at_first_call(fallback: Callable[..., Any], place: int) -> Callable[..., Any]:
        chosen: dict[torch.device, Callable[..., Any]] = {}

        def run(*arguments: Any) -> Any:
            device = arguments[0].device
            found = chosen.get(device)
            if found is None:
                refused = refusal(device) is not None
                found = fallback if refused else implementations(operator)[place]
                chosen[device] = found
            return found(*arguments)

        return run

    return {
        operator.name: chosen_at_first_call(operator.fallback, 0),
        operator.backward_name: chosen_at_first_call(operator.backward_fallback, 1),
    }


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
        implementations(FUSED)
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


def implementations(
    operator: Operator,
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The GPU kernels of an operator, forward and backward; imports Triton."""
    from saccade.backends import triton

    if operator is FUSED:
        return triton.attend_fused, triton.differentiate_fused
    return triton.attend, triton.differentiate
