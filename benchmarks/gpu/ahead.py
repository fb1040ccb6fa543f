"""Kernels compiled ahead: other processes make the same calls, so that they are on disk when the checks come there.

Each variant has kernels of its own, a compiler takes seconds for one, and a machine with a card has many cores.
What these processes find is not looked at: whatever is wrong is found again by the checks themselves.

    python -m benchmarks.gpu.ahead gradients 0 8     # every eighth variant from the first, forward and backward
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.checks import check_variant
from benchmarks.gpu.gradients import check_gradients
from benchmarks.gpu.variants import planned

ROOT = Path(__file__).resolve().parents[2]
CHECKS = {"variants": check_variant, "gradients": check_gradients}
MOST_PROCESSES = 8


@contextmanager
def compiling_ahead(step: str, device: torch.device) -> Iterator[int]:
    """Processes for the variants of a step, ended with the block; gives how many there are."""
    number = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2) if device.type == "cuda" else 0
    command = [sys.executable, "-m", "benchmarks.gpu.ahead", step]
    processes = [
        subprocess.Popen(
            [*command, str(first), str(number)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for first in range(number)
    ]
    try:
        yield number
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(arguments: Sequence[str], device: str = "cuda") -> None:
    """Calls every so manieth planned variant, the first ones first."""
    step, first, every = arguments
    torch.set_num_threads(1)
    parent = os.getppid()
    for number, variant in enumerate(planned()[int(first) :: int(every)]):
        if os.getppid() != parent:  # the checks have ended, by a crash say
            return
        with contextlib.suppress(Exception):
            CHECKS[step](variant, number, torch.device(device))


if __name__ == "__main__":
    main(sys.argv[1:])
