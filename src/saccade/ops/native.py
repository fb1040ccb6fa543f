"""The native library: it is loaded here once, and `failure` says why where it could not be.

A missing library, or one that does not load, is not an error: the reference runs instead, and
`saccade.which_backend` and `saccade doctor` say why.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parent.parent / "_native.so"


def _load() -> str | None:
    """Loads the library; returns the reason why it is not loaded, or None."""
    if os.environ.get("SACCADE_DISABLE_NATIVE", "0") not in ("", "0"):
        return "SACCADE_DISABLE_NATIVE is set"
    if not LIBRARY.exists():
        return f"this installation has no native library ({LIBRARY.name} is missing)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} did not load into torch {torch.__version__}: {error}"
    return None


failure: str | None = _load()


def isa() -> str:
    """The instruction set the CPU kernels run with: "avx512", "avx2", "neon" or "scalar".

    Raises:
        RuntimeError: SACCADE_CPU_ISA names one that this processor or library does not have.
    """
    return str(torch.ops.saccade._cpu_isa())


def available_isas() -> list[str]:
    """The instruction sets that this library has and this processor runs, fastest first."""
    return [] if failure else str(torch.ops.saccade._cpu_isas()).split(",")


def set_isa(name: str) -> None:
    """Runs the CPU kernels of the whole process with another instruction set.

    Raises:
        RuntimeError: the processor or the library does not have it.
    """
    torch.ops.saccade._set_cpu_isa(name)
