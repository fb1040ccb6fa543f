"""Prints committed results as the Markdown tables that the README and the docs quote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def rows(results: dict, threads: int) -> list[str]:
    """One line a workload, locations and dtype: ratios first, then times."""
    figures: dict[tuple[str, str, str], dict[str, dict]] = {}
    for figure in results["operator"]:
        if figure["threads"] == threads:
            key = (figure["workload"], figure["dtype"], figure["locations"])
            figures.setdefault(key, {})[figure["direction"]] = figure
    lines = [
        "| workload | values | locations | forward | | forward + backward | |",
        "|---|---|---|---|---|---|---|",
    ]
    for (workload, dtype, locations), directions in figures.items():
        cells = []
        for direction in ("forward", "forward + backward"):
            figure = directions[direction]
            cells.append(f"**{figure['ratio']:.1f} ×**")
            cells.append(f"{_ms(figure['saccade_ms'])} against {_ms(figure['grid_sample_ms'])} ms")
        lines.append(f"| {workload} | {dtype} | {locations} | {' | '.join(cells)} |")
    return lines


def _ms(time: float) -> str:
    return f"{time:.0f}" if time >= 100 else f"{time:.3g}"


def main() -> None:
    """Prints the tables of each result file named, default: all."""
    names = sys.argv[1:] or sorted(path.name for path in RESULTS.glob("foundation*.json"))
    for name in names:
        results = json.loads((RESULTS / name).read_text())
        threads = results["operator"][0]["threads"]
        machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
        print(f"`{results['command']}`, {results['date']}: {machine}; {threads} threads\n")
        print("\n".join(rows(results, threads)), "\n")


if __name__ == "__main__":
    main()
