"""Measurements as a table in the terminal, as a JSON file and as a plot."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import saccade
from saccade.bench.operator import Measurement, Setting, Skipped

METHOD = (
    "all in one process, taking turns, on the same random tensors; medians of the rounds, after the "
    "results were compared with the definition in float64; ratio = the baseline's time / Saccade's"
)
# Packages whose versions a measurement may depend on.
PACKAGES = ("transformers", "torch-ms-deform-attn", "onnxruntime")
# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#56b4e9", "#999999", "#cc79a7")


def machine() -> dict[str, str]:
    """What a measurement depends on: processor, versions, kernel. The machine's name is left out."""
    processor = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if description.exists():
        lines = description.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = f"{names[0]}, {len(names)} cores" if names else processor
    versions = {
        "processor": processor,
        "saccade": saccade.__version__,
        "backend": saccade.which_backend().name,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "system": platform.system(),
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine_line() -> str:
    """What the measurements depend on, for a person."""
    return ", ".join(f"{key} {value}" for key, value in machine().items())


def write(
    path: Path, command: str, head: dict[str, Any], rows: Mapping[str, Sequence[dict[str, Any]]]
) -> None:
    """Writes a JSON file: command, date, machine and `head`; then the rows, one per line, for `diff`."""
    head = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        **head,
    }
    parts = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for key, some in rows.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in some)
        parts.append(f'"{key}": [\n{lines}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def write_measurements(path: Path, command: str, results: Sequence[Measurement | Skipped]) -> None:
    """Writes what `saccade bench` measured and what it skipped."""
    rows: dict[str, list[dict[str, Any]]] = {"measurements": [], "skipped": []}
    for result in results:
        key = "measurements" if isinstance(result, Measurement) else "skipped"
        fields = result._asdict()
        rows[key].append(fields.pop("setting")._asdict() | fields)
    write(path, command, {"method": METHOD}, rows)


def title(setting: Setting) -> str:
    """What a table holds for."""
    caches = "" if setting.caches == "warm" else " · single calls"
    threads = f"{setting.threads} thread{'' if setting.threads == 1 else 's'}"
    return " · ".join((*setting[:2], setting.dtype, setting.locations, threads)) + caches


def table(rows: Sequence[Measurement | Skipped]) -> Table:
    """One setting: Saccade first, then the baselines."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("ratio", "baseline", "median", "minimum", "upper quartile"):
        is_name = heading == "baseline"
        shown.add_column(heading, justify="left" if is_name else "right", no_wrap=True)
    shown.add_column("", style="dim", no_wrap=True)
    measured = [row for row in rows if isinstance(row, Measurement)]
    for row in measured:
        is_first = row is measured[0]
        note = f"computes in {row.computes_in}" if row.computes_in != row.setting.dtype else ""
        shown.add_row(
            "" if is_first else times(row.ratio),
            row.baseline,
            *(milliseconds(ms) for ms in (row.milliseconds, row.minimum, row.upper_quartile)),
            row.kernel if is_first else note,
        )
    return shown


def skipped_lines(rows: Sequence[Measurement | Skipped]) -> list[str]:
    """The baselines that were skipped, and why."""
    return [f"–  {row.baseline}: {row.reason}" for row in rows if isinstance(row, Skipped)]


def times(ratio: float) -> str:
    """A ratio as a person reads it: three digits, two where the third is noise."""
    return f"{ratio:.{0 if ratio >= 100 else 1 if ratio >= 2 else 2}f} ×"


def milliseconds(time: float | None) -> str:
    """A time in milliseconds, three digits."""
    if time is None:
        return "–"
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"


def save_plot(results: Sequence[Measurement | Skipped], path: Path) -> None:
    """Draws the ratios of the first dtype, locations and threads: a row per workload, a mark per baseline.

    Raises:
        ValueError: there is nothing to draw, or matplotlib does not know the format of the file.
    """
    measured = [result for result in results if isinstance(result, Measurement)]
    if not measured:
        raise ValueError("measurements: expected at least one, got none")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    first = measured[0].setting
    measured = [one for one in measured if one.setting[2:] == first[2:]]
    workloads = list(dict.fromkeys(one.setting.workload for one in measured))[::-1]
    directions = list(dict.fromkeys(one.setting.direction for one in measured))
    baselines = [
        name for name in dict.fromkeys(one.baseline for one in measured) if name != "saccade"
    ]
    size = (2.2 + 4.2 * len(directions), 1.9 + 0.36 * len(workloads))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for panel, direction in zip(panels, directions, strict=True):
        here = [one for one in measured if one.setting.direction == direction]
        panel.axvline(1, color="black", linewidth=1.2)
        panel.set_yticks(range(len(workloads)), workloads)
        panel.grid(axis="y", color="#e5e5e5")
        for name, colour, marker in zip(baselines, COLOURS, "oDs^vP*", strict=False):
            marks = [one for one in here if one.baseline == name]
            rows = [workloads.index(one.setting.workload) for one in marks]
            ratios = [one.ratio for one in marks]
            panel.scatter(ratios, rows, marker=marker, color=colour, s=42, label=name, zorder=3)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g} ×"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set(title=direction, xlabel="the baseline's time divided by Saccade's")
    if baselines:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title(first).split(' · ', 2)[2]}\n{machine()['processor']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
