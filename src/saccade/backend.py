"""Which kernel computes a call, why, and how to choose another one for a test or a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from saccade.ops import gpu, native

_forced_reference = False


class Backend(NamedTuple):
    """What runs a call and why."""

    name: str
    """"triton", "cpu-avx512", "cpu-avx2", "cpu-neon", "cpu-scalar" or "reference"."""
    reason: str
    """One sentence for a person."""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def which_backend(*tensors: Tensor) -> Backend:
    """Names the kernel that a call with these tensors gets, and the reason.

    Args:
        *tensors: the tensors of the call (only their devices count); none means CPU tensors.

    Returns:
        Backend: `name` and `reason`.

    Raises:
        RuntimeError: the environment variable SACCADE_CPU_ISA names an instruction set that this
            processor or this build does not have.

    Example:
        >>> import torch, saccade
        >>> with saccade.use_backend("reference"):
        ...     saccade.which_backend(torch.zeros(1)).name
        'reference'
    """
    if _forced_reference:
        return Backend("reference", 'chosen by saccade.use_backend("reference")')
    if needs_reference():
        return Backend(
            "reference", "a transform of torch.func or forward-mode derivatives are active"
        )
    devices = sorted({tensor.device for tensor in tensors}, key=str)
    if len(devices) > 1:
        return Backend("reference", f"no kernel takes tensors on {' and '.join(map(str, devices))}")
    if devices and devices[0].type != "cpu":
        return _of_device(devices[0])
    if native.failure is not None:
        return Backend("reference", native.failure)
    isa = native.isa()
    asked = os.environ.get("SACCADE_CPU_ISA")
    if asked and asked == isa:
        return Backend(f"cpu-{isa}", f"SACCADE_CPU_ISA={asked}")
    available = native.available_isas()
    best = "the best this processor runs" if isa == available[0] else "chosen by use_backend"
    return Backend(f"cpu-{isa}", f"native library, {best} of {', '.join(available)}")


def _of_device(device: torch.device) -> Backend:
    refusal = gpu.refusal(device)
    if refusal is not None:
        return Backend("reference", refusal)
    return Backend("triton", f"on {torch.cuda.get_device_name(device)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the calls inside the `with` block on another kernel, for tests and comparisons.

    Args:
        name: "reference", or a native CPU kernel such as "cpu-avx2" or "cpu-scalar". The choice
            holds for the whole process, all its threads included.

    Raises:
        ValueError: no such kernel, or it cannot run here; the message says which can.

    Example:
        >>> import saccade
        >>> with saccade.use_backend("reference"):
        ...     pass
    """
    global _forced_reference
    available = ["reference", *(f"cpu-{isa}" for isa in native.available_isas())]
    if name not in available:
        raise ValueError(
            f"name: expected one of {', '.join(available)} on this machine, got {name!r}"
        )
    previous_forced = _forced_reference
    # The reference asks for no instruction set: a wrong SACCADE_CPU_ISA must not stand in its way.
    previous_isa = None if name == "reference" else native.isa()
    try:
        _forced_reference = name == "reference"
        if name != "reference":
            native.set_isa(name.removeprefix("cpu-"))
        yield
    finally:
        _forced_reference = previous_forced
        if previous_isa is not None:
            native.set_isa(previous_isa)


def needs_reference() -> bool:
    """Whether `use_backend("reference")` is in force, or a transform that only the reference knows.

    Those are forward-mode derivatives and the transforms of `torch.func`: the registered operator has
    an ordinary backward only, and would drop a tangent in silence.
    """
    if _forced_reference or torch.compiler.is_compiling():
        return _forced_reference
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
