"""Where the studies leave their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saccade.bench.command import write

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(path: Path, command: str, results: dict[str, Any]) -> None:
    """Writes a JSON file: the command, the date and the machine, and below them the results."""
    write(path, command, results)
    print(f"written: {path}")
