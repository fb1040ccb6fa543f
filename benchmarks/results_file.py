"""Where the studies leave their results."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from saccade.bench.report import machine

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(path: Path, command: str, results: dict[str, Any]) -> None:
    """Writes a JSON file: the command, the date and the machine, and below them the results."""
    head = {"command": command, "date": datetime.date.today().isoformat(), "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | results, indent=2) + "\n")
    print(f"written: {path}")
