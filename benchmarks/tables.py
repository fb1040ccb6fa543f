"""Writes the tables of the README and of the docs from the committed results.

`python -m benchmarks.tables` prints them, `--write` puts them between the marks `<!-- figures: NAME -->` and
`<!-- end of figures -->` of the pages, `--check` fails where a page differs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS
from saccade.bench.command import milliseconds, times

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(
    r"(<!-- figures: (?P<name>\w+) -->\n).*?(<!-- end of figures -->)", flags=re.DOTALL
)
# What the README shows, and what a reader calls it.
README_CASES = {
    "detr-encoder": "Deformable DETR encoder, 22,223 queries",
    "detr-decoder": "its decoder, 300 queries",
    "mask2former-encoder": "Mask2Former pixel decoder",
    "rtdetr-decoder": "RT-DETR decoder",
    "dfine-decoder": "D-FINE decoder",
    "rfdetr-large": "RF-DETR L",
    "bevformer-tsa": "BEVFormer temporal",
    "plain-single-map": "plain form, one shared map",
}
DIRECTIONS = ("forward", "forward + backward")
README_BASELINES = ("grid_sample", "torch-ms-deform-attn")
CPU_BASELINES = (*README_BASELINES, "onnxruntime")

Results = dict[str, Any]
Rows = dict[str, dict[str, Results]]
"""By workload and direction, then by baseline."""


def readme() -> list[str]:
    """The ratios, and beside the first baseline's the times."""
    results = _load("cpu.json")
    rows, threads = _common_rows(results)
    titles = [f"{way}: {name}" for way in DIRECTIONS for name in README_BASELINES]
    lines = [
        f"{_versions(results['machine'])}; {threads} threads, float32.\n",
        *_header("workload", *titles),
    ]
    for case, title in README_CASES.items():
        cells = [title]
        for way in DIRECTIONS:
            here = rows.get(f"{case} {way}", {})
            for index, name in enumerate(README_BASELINES):
                cells.append(_cell(here, name, with_times=index == 0))
        lines.append(_row(cells))
    return lines


def cpu() -> list[str]:
    """Every workload: Saccade's time, then the ratio of each baseline, in both directions."""
    results = _load("cpu.json")
    rows, threads = _common_rows(results)
    columns = [
        (way, name)
        for way in DIRECTIONS
        for name in CPU_BASELINES
        if any(name in here for key, here in rows.items() if key.endswith(f" {way}"))
    ]
    titles = ["workload"]
    for way in DIRECTIONS:
        titles += [f"{way}: Saccade", *(name for column, name in columns if column == way)]
    lines = [
        f"{_versions(results['machine'])}; {threads} threads, float32, model-like locations.\n",
        *_header(*titles),
    ]
    for case in dict.fromkeys(key.split()[0] for key in rows):
        cells = [case]
        for way in DIRECTIONS:
            here = rows[f"{case} {way}"]
            cells.append(milliseconds(here["saccade"]["milliseconds"]))
            cells += [_cell(here, name) for column, name in columns if column == way]
        lines.append(_row(cells))
    return lines


def drop_in() -> list[str]:
    """Whole models of every package: how many submodules were replaced, and how much faster that is."""
    results, packages = _load("models.json"), _load("packages.json")
    lines = [
        f"`{results['command']}` and `{packages['command']}`, {results['date']}: "
        f"{_versions(results['machine'])}; {results['threads']} threads.\n",
        *_header("from", "model", "replaced", "forward"),
    ]
    for source, rows in (("transformers", results["models"]), ("", packages["models"])):
        for row in rows:
            cells = [source or row["model"], row["input"]]
            if row.get("reason"):
                lines.append(_row([*cells, "–", row["reason"]]))
                continue
            spent = f"{row['patched_ms'] / 1e3:.3g} against {row['eager_ms'] / 1e3:.3g} s"
            replaced = f"{row['attention_modules']} submodules"
            lines.append(_row([*cells, replaced, f"**{times(row['ratio'])}** {spent}"]))
    return lines


def _load(name: str) -> Results:
    results: Results = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return results


def _common_rows(results: Results) -> tuple[Rows, int]:
    """What was measured in float32 with warm caches on all threads, and their number."""
    threads = max(row["threads"] for row in results["measurements"])
    common = {"dtype": "float32", "threads": threads, "caches": "warm"}
    rows: Rows = {}
    for row in results["measurements"]:
        # Earlier results have uniform locations too.
        if "ratio" in row and common.items() <= row.items() and row.get("locations") != "uniform":
            rows.setdefault(f"{row['workload']} {row['direction']}", {})[row["baseline"]] = row
    return rows, threads


def _cell(here: dict[str, Results], name: str, *, with_times: bool = False) -> str:
    if name not in here:
        return "–"
    ratio = times(here[name]["ratio"])
    if not with_times:
        return ratio
    own = milliseconds(here["saccade"]["milliseconds"]).removesuffix(" ms")
    return f"**{ratio}** {own} against {milliseconds(here[name]['milliseconds'])}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(*titles: str) -> list[str]:
    return [_row(titles), _row(["---"] * len(titles))]


def _versions(machine: dict[str, str]) -> str:
    return ", ".join(
        value if key in ("processor", "backend", "system") else f"{key} {value}"
        for key, value in machine.items()
    )


# By the name of a mark.
TABLES: dict[str, Callable[[], list[str]]] = {"readme": readme, "cpu": cpu, "drop_in": drop_in}


def fill(page: str) -> str:
    """The text of a page with the tables of the committed results."""
    return MARKED.sub(
        lambda mark: mark[1] + "\n".join(TABLES[mark["name"]]()) + "\n" + mark[3], page
    )


def main() -> int:
    """Prints the tables, writes them into the pages, or checks the pages; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        for make in TABLES.values():
            print("\n".join(make()), "\n")
    differing = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if text != fill(text):
            differing.append(path.name)
            if arguments.write:
                path.write_text(fill(text), encoding="utf-8")
    if arguments.write or arguments.check:
        done = "written" if arguments.write else "other tables than the results have"
        print(f"{done}: {', '.join(differing) or 'none'}")
    return 1 if arguments.check and differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
