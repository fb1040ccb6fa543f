"""Figures of the benchmark as a table in the terminal, and as a JSON file that can be read again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from saccade.benchmark.operator import Figure, LeftOut, Setting
from saccade.benchmark.timing import machine

METHOD = (
    "peers in one process, taking turns, on the same random tensors; medians of the rounds, after "
    "the results were compared with the definition in float64; ratio = the peer's time / Saccade's"
)


class Results(NamedTuple):
    """All that a run of `saccade bench` found."""

    command: str
    date: str
    machine: dict[str, str]
    figures: list[Figure]
    left_out: list[LeftOut]


def record(command: str) -> dict[str, Any]:
    """What stands above all figures: the command, the date and the machine."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }


def results(command: str, found: Iterable[Figure | LeftOut]) -> Results:
    """The figures with today's date and this machine."""
    kept = list(found)
    return Results(
        **record(command),
        figures=[figure for figure in kept if isinstance(figure, Figure)],
        left_out=[peer for peer in kept if isinstance(peer, LeftOut)],
    )


def write(found: Results, path: Path) -> None:
    """Writes a JSON file, one figure a line, so that two runs can be compared by `diff`."""
    head = {"command": found.command, "date": found.date, "machine": found.machine}
    parts = [f'"{key}": {json.dumps(value)}' for key, value in (head | {"method": METHOD}).items()]
    for key, rows in (("figures", found.figures), ("left_out", found.left_out)):
        lines = ",\n".join(json.dumps(_flat(row), ensure_ascii=False) for row in rows)
        parts.append(f'"{key}": [\n{lines}\n]')
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, and the folders to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read(path: Path) -> Results:
    """What `write` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Results(
        found["command"],
        found["date"],
        found["machine"],
        [Figure(**_nested(row)) for row in found["figures"]],
        [LeftOut(**_nested(row)) for row in found["left_out"]],
    )


def _flat(row: Figure | LeftOut) -> dict[str, Any]:
    return row.setting._asdict() | {
        key: value for key, value in row._asdict().items() if key != "setting"
    }


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    setting = Setting(**{name: row[name] for name in Setting._fields})
    return {"setting": setting} | {
        key: value for key, value in row.items() if key not in Setting._fields
    }


def machine_line() -> str:
    """What the figures depend on, for a person."""
    return ", ".join(f"{key} {value}" for key, value in machine().items())


def title(setting: Setting) -> str:
    """What a table holds for."""
    return (
        f"{setting.workload} · {setting.direction} · {setting.dtype} · {setting.locations}"
        f" · {setting.threads} thread{'' if setting.threads == 1 else 's'}"
        f"{'' if setting.caches == 'warm' else ' · single calls'}"
    )


def table(rows: Sequence[Figure | LeftOut]) -> Table:
    """One setting: the ratios first, what was left out last."""
    setting = rows[0].setting
    shown = Table(box=None, pad_edge=False)
    shown.add_column("ratio", justify="right", min_width=8, no_wrap=True)
    shown.add_column("peer", min_width=20, no_wrap=True)
    shown.add_column("time", justify="right", min_width=9, no_wrap=True)
    shown.add_column("", style="dim", overflow="fold")
    figures = [row for row in rows if isinstance(row, Figure)]
    for row in figures:
        ours = row is figures[0]  # the first peer is Saccade, which the others are divided by
        narrower = row.computes_in != setting.dtype
        note = row.kernel if ours else f"computes in {row.computes_in}" if narrower else ""
        shown.add_row(
            "" if ours else times(row.ratio), row.peer, milliseconds(row.milliseconds), note
        )
    for left in rows:
        if isinstance(left, LeftOut):
            # as Text: in a string, rich takes what is in brackets for markup
            shown.add_row("–", left.peer, "", Text(left.reason), style="dim")
    return shown


def times(ratio: float) -> str:
    """A ratio as a person reads it: three figures, two where the third is noise."""
    return (
        f"{ratio:.0f} ×" if ratio >= 100 else f"{ratio:.1f} ×" if ratio >= 2 else f"{ratio:.2f} ×"
    )


def milliseconds(time: float) -> str:
    """A time in milliseconds, three figures."""
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"
