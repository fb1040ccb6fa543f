"""Where benchmarks leave what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saccade.benchmark.report import record, write_text

RESULTS = Path(__file__).resolve().parent / "results"


def keep(path: Path, command: str, found: dict[str, Any]) -> None:
    """Writes a JSON file: the command, the date and the machine, and below them what was found."""
    write_text(path, json.dumps(record(command) | found, indent=2) + "\n")
    print(f"written: {path}")
