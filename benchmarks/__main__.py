"""What `saccade bench` does not measure: `python -m benchmarks` (a minute).

Peak memory, the import, and whether gradients are bitwise equal; printed, and kept in
benchmarks/results/whole.json with the machine, the versions and the command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.keeping import RESULTS, keep
from benchmarks.whole import (
    gradients_are_bitwise_equal,
    import_time,
    peak_memory,
    small_calls,
)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "whole.json")
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    for name, measure in (
        ("import", import_time),
        ("peak_memory_detr_encoder_forward", peak_memory),
        ("gradients_bitwise_equal", gradients_are_bitwise_equal),
        ("small_call_microseconds", small_calls),
    ):
        results[name] = measure()
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    keep(arguments.output, "python -m benchmarks", results)


if __name__ == "__main__":
    main()
