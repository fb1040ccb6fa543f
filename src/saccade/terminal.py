"""Shared by the commands: their consoles, and how they end when something is wrong or missing."""

from __future__ import annotations

import os
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from saccade import doctor

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# More threads than processors are slower, and a process with very many of them crashes.
MAX_THREADS = 4 * (os.cpu_count() or 1)
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_THREADS,
        help="CPU threads, up to four per processor.",
        show_default=False,
    ),
]
MaxMegapixels = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="MEGAPIXELS",
        help="Larger images (width times height, in millions) are refused.",
    ),
]


def fail(message: object) -> NoReturn:
    """Ends the command with exit code 2, for wrong usage or if nothing could be done."""
    err.print(f"error: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def need(command: str, extra: str, *modules: str) -> None:
    """Ends the command if modules of an extra are missing: those named, or by default any of them."""
    missing = [name for name in doctor.missing_modules(extra) if not modules or name in modules]
    if missing:
        fail(
            f"saccade {command} needs {', '.join(missing)}, not installed here: "
            f"pip install 'saccade[{extra}]'"
        )
