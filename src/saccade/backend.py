"""Which kernel computes a call, why, and how to choose another one for a test or a comparison."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops import gpu, native, schema
from saccade.ops.autograd import transforms_are_active

# What `use_backend("reference")` registers in place of the kernels, while it is in force.
_reference_library: torch.library.Library | None = None


class Backend(NamedTuple):
    """The kernel that runs a call, and why."""

    name: str
    """"triton", "cpu-avx512", "cpu-avx2", "cpu-neon", "cpu-scalar" or "reference"."""
    reason: str
    """A sentence for people to read."""

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
    if _reference_library is not None:
        return Backend("reference", 'chosen by saccade.use_backend("reference")')
    if transforms_are_active():
        return Backend(
            "reference", "a transform of torch.func or forward-mode derivatives are active"
        )
    devices = sorted({tensor.device for tensor in tensors}, key=str)
    if len(devices) > 1:
        return Backend("reference", f"no kernel takes tensors on {' and '.join(map(str, devices))}")
    if devices and devices[0].type != "cpu":
        return _device_backend(devices[0])
    if native.failure is not None:
        return Backend("reference", native.failure)
    isa = native.isa()
    variable = os.environ.get("SACCADE_CPU_ISA")
    if variable and variable == isa:
        return Backend(f"cpu-{isa}", f"SACCADE_CPU_ISA={variable}")
    available = native.available_isas()
    best = "the best this processor runs" if isa == available[0] else "chosen by use_backend"
    return Backend(f"cpu-{isa}", f"native library, {best} of {', '.join(available)}")


def _device_backend(device: torch.device) -> Backend:
    refusal = gpu.refusal(device)
    if refusal is not None:
        return Backend("reference", refusal)
    return Backend("triton", f"on {torch.cuda.get_device_name(device)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the calls inside the `with` block on another kernel, for tests and comparisons.

    The choice is made in torch's dispatcher: direct calls of `torch.ops.saccade.*` follow it too, and a
    backward runs on the backend that is chosen when it runs.

    Args:
        name: "reference", or a native CPU kernel such as "cpu-avx2" or "cpu-scalar". The choice
            holds for the whole process, all its threads included.

    Raises:
        ValueError: there is no such kernel, or it cannot run here; the message says which can.

    Example:
        >>> import saccade
        >>> with saccade.use_backend("reference"):
        ...     pass
    """
    available = ["reference", *(f"cpu-{isa}" for isa in native.available_isas())]
    if name not in available:
        raise ValueError(
            f"name: expected one of {', '.join(available)} on this machine, got {name!r}"
        )
    choice = _Choice(name)
    _choices.append(choice)
    try:
        with _lock:
            _apply_choices()
        yield
    finally:
        # Not necessarily the last one: blocks of two threads may overlap.
        with _lock:
            _choices.remove(choice)
            _apply_choices()


class _Choice:
    """A block of `use_backend` that is in force."""

    def __init__(self, name: str) -> None:
        self.isa = None if name == "reference" else name.removeprefix("cpu-")


_lock = threading.Lock()
_choices: list[_Choice] = []
# The instruction set to go back to, while a choice replaces it.
_default_isa: str | None = None


def _apply_choices() -> None:
    """Puts the last choice into force, or the default where there is none."""
    global _default_isa
    isas = [choice.isa for choice in _choices if choice.isa is not None]
    # The reference alone does not read the instruction set: a wrong SACCADE_CPU_ISA must not prevent it.
    if isas and _default_isa is None:
        _default_isa = native.isa()
    if _default_isa is not None:
        native.set_isa(isas[-1] if isas else _default_isa)
    if not isas:
        _default_isa = None
    _override_kernels(bool(_choices) and _choices[-1].isa is None)


def _override_kernels(by_reference: bool) -> None:
    """Registers the reference as the kernel of every device that has another one, or unregisters it."""
    global _reference_library
    if by_reference == (_reference_library is not None):
        return
    if _reference_library is not None:
        _reference_library._destroy()
        _reference_library = None
        return
    library = torch.library.Library("saccade", "IMPL")
    with warnings.catch_warnings():
        # Replacing the native kernels is what is meant here.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for key in ("CPU", "CUDA"):
            library.impl(schema.FORWARD, schema.fallback, key, allow_override=True)
            library.impl(schema.BACKWARD, schema.backward_fallback, key, allow_override=True)
    _reference_library = library
