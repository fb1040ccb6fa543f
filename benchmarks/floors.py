"""Floors under the kernel's time on detr-encoder: `python -m benchmarks.floors` (seconds, needs g++).

Builds floors.cpp for this machine, times each unavoidable part of the work alone, derives floors for the
forward and for forward with backward, and keeps all in benchmarks/results/floors.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.keeping import RESULTS, keep

SOURCE = Path(__file__).resolve().parent / "floors.cpp"
# Arithmetic on rows at hand, and traffic with memory, that no kernel can do without. Forward: four rows
# a point; locations, weights and value read once, the output written. Backward: the rows for the dot
# products, the sums of the cells; all that and grad_output read once, three gradients written.
COMPUTE = {"forward": ["row_loads"], "backward": ["row_loads", "cell_sums"]}
# The same where the rows are read as a model's queries ask for them, most from beyond the first-level
# cache: a floor for kernels that go by queries.
BY_QUERIES = {"forward": ["neighbourhoods"], "backward": ["neighbourhoods", "cell_sums"]}
TRAFFIC = {
    "forward": ["read_points", "read_value", "write_output"],
    "backward": [
        *("read_points", "read_value", "read_grad_output"),
        *("write_grad_points", "write_output"),
    ],
}


def measure(threads: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each part."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "floors")
        subprocess.run(
            [
                "g++",
                "-std=c++17",
                "-O3",
                "-ffp-contract=fast",
                "-march=native",
                "-pthread",
                str(SOURCE),
                "-o",
                program,
            ],
            check=True,
        )
        printed = subprocess.run(
            [program, str(threads), str(repeats)], check=True, capture_output=True, text=True
        ).stdout
    return {name: float(number) for name, number in map(str.split, printed.splitlines())}


def floors(parts: dict[str, float]) -> dict[str, float]:
    """Arithmetic and traffic side by side at best, and one after the other as far as they hinder each other.

    Results may come in memory that is there already: the system's part stands by itself.
    """
    compute, by_queries, traffic = (
        {way: sum(parts[name] for name in names) for way, names in kind.items()}
        for kind in (COMPUTE, BY_QUERIES, TRAFFIC)
    )
    kinds = {
        "": {way: max(compute[way], traffic[way]) for way in compute},
        ", one after the other": {way: compute[way] + traffic[way] for way in compute},
        ", one after the other, by queries": {
            way: by_queries[way] + traffic[way] for way in compute
        },
    }
    found = {}
    for kind, ways in kinds.items():
        found["forward" + kind] = round(ways["forward"], 2)
        found["forward + backward" + kind] = round(sum(ways.values()), 2)
    return found


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "floors.json")
    arguments = parser.parse_args()
    results: dict[str, object] = {"unit": "milliseconds, the least of the repeats"}
    for threads in arguments.threads:
        parts = measure(threads, arguments.repeats)
        found = {"parts": parts, "floors": floors(parts)}
        results[f"threads {threads}"] = found
        print(threads, "threads:", json.dumps(found, indent=1))
    keep(arguments.output, "python -m benchmarks.floors", results)


if __name__ == "__main__":
    main()
