"""Models of transformers with random weights, eager against patched: `python -m benchmarks.models`.

It has all families, writes benchmarks/results/models.json, and takes some fifteen minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, write_results
from benchmarks.small_models import ALL_MODELS
from saccade.bench.command import print_table
from saccade.bench.models import measure_all


def write_models(study: str, description: str | None, models: Iterable[tuple[str, Any]]) -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{study}", description=description)
    parser.add_argument("--seconds", type=float, default=20, help="of taking turns, for each model")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{study}.json")
    arguments = parser.parse_args()
    results = measure_all(models, arguments.seconds)
    print_table(results["models"], "input", ("eager_ms", "patched_ms"))
    write_results(arguments.output, f"python -m benchmarks.{study}", results)


if __name__ == "__main__":
    write_models("models", __doc__, ALL_MODELS.items())
