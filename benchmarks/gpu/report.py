"""What a person reads at the end: ratios first, goals beside the figures, the floors last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.gpu.goals import (
    COLD,
    DETERMINISTIC,
    EAGER,
    FILLING,
    WARM,
    WAYS,
    Row,
    fastest_way,
    goals,
    of,
    setting,
    time_of,
    times_its_forward,
)
from benchmarks.gpu.peers import SACCADE
from saccade.benchmark.report import times

METHOD = (
    "one process, taking turns, medians; in a graph: calls captured in a CUDA graph, on sets of inputs that "
    "together exceed the L2 (cold) or on one set over and over (warm); single: one eager call after 256 MB "
    "were written, device time; wall: eager calls back to back, host included; ratio = the peer's time / "
    "Saccade's; backward: torch.autograd.grad by all inputs on a graph that is kept"
)


def print_report(found: dict[str, Any], console: Console, *, details: bool = False) -> None:
    """What the results hold; with `details` a table for each setting too."""
    figures, floors = found.get("figures", []), found.get("floors", [])
    console.print(machine_line(found), style="bold", soft_wrap=True, markup=False)
    console.print(
        f"Saccade ran on {found.get('backend')}", style="bold", markup=False, soft_wrap=True
    )
    console.print(METHOD + "\n", style="dim", soft_wrap=True)
    if figures:
        console.print(ratio_table(figures))
        console.print()
    backward = found.get("backward", [])
    if backward:
        console.print(backward_table(backward), "\n", own_backward_table(backward), "\n", sep="")
    lines = remarks(figures, found.get("left_out", [])) + remarks(backward, [])
    for line in dict.fromkeys(lines):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    for one in dict.fromkeys(setting(row) for row in figures) if details else ():
        console.print(Text(f"\n{_title(*one)}", style="bold"))
        console.print(speed_table(figures, found.get("left_out", []), one))
    console.print()
    if found.get("models"):
        console.print(model_table(found["models"]), "\n")
    if found.get("training"):
        console.print(training_table(found["training"]), "\n")
    for name, calls in found.get("host", {}).items():
        text = ", ".join(f"{call} {_us(time)}" for call, time in calls.items())
        console.print(f"a small eager call, wall, {name}: {text}", soft_wrap=True)
    for name, text in found.get("peers", {}).items():
        console.print(f"{name}: {text}", style="dim", markup=False, soft_wrap=True)
    print_checks(found, console)
    console.print(goal_table(found))
    if floors:
        rate = found.get("copy_bytes_per_second") or math.nan
        console.print(f"\nthe two floors; a copy moves {rate / 1e12:.2f} TB/s, read and written")
        console.print(floor_table(figures, floors))
        console.print("\nfloors under a backward: rows added by atomics, and a sort of the points")
        console.print(backward_floor_table(backward, floors))
    for key in ("checks_cut", "gradients_cut", "time_cut", "backward_cut"):
        if found.get(key):
            console.print(f"cut off by time: {found[key]}", style="yellow", markup=False)
    for row in found.get("stopped", []):
        text = f"stopped: {row['step']}: {row['reason']}"
        console.print(text, style="yellow", markup=False, soft_wrap=True)


def machine_line(found: dict[str, Any]) -> str:
    """What the figures depend on."""
    return ", ".join(
        value if key == "gpu" else f"{key} {value}" for key, value in found["machine"].items()
    )


def _title(workload: str, batch_size: int, dtype: str, locations: str) -> str:
    return f"{workload} · batch {batch_size} · forward · {dtype} · {locations}"


def ratio_table(figures: Sequence[Row]) -> Table:
    """A row a setting: how many times as fast Saccade is as each peer, then its own times."""
    return _ratios(
        "forward",
        figures,
        ("Saccade cold", "warm", "wall"),
        lambda row: [_us(time_of(row, way)) for way in (COLD, WARM, EAGER)],
    )


def backward_table(rows: Sequence[Row]) -> Table:
    """The same of the backward."""
    rows = [row for row in rows if row["peer"] not in (DETERMINISTIC, FILLING)]
    return _ratios(
        "backward",
        rows,
        ("Saccade cold", "warm"),
        lambda row: [_us(time_of(row, way)) for way in (COLD, WARM)],
    )


def own_backward_table(rows: Sequence[Row]) -> Table:
    """Saccade's backward over its forward, deterministic over fast mode, both directions, and their memory."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1))
    shown.add_column("Saccade's backward", no_wrap=True)
    headings = (
        "of its forward",
        "deterministic",
        "new memory filled",
        "with forward, graph",
        "wall",
    )
    for heading in (*headings, "peak"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in dict.fromkeys(setting(row) for row in rows):
        own = of(rows, *one)
        fast = own.get(SACCADE)
        both = None if fast is None else fast | {"times": fast["both"]}
        peak = (fast or {}).get("peak_bytes")
        shown.add_row(
            Text(f"{one[0]}, batch {one[1]}, {one[2]}, {one[3]}"),
            _times(times_its_forward(rows, *one)),
            *(
                _times(time_of(own.get(name), COLD) / time_of(fast, COLD))
                for name in (DETERMINISTIC, FILLING)
            ),
            *(_us(time_of(both, way)) for way in (COLD, EAGER)),
            "–" if peak is None else f"{peak / 2**20:.0f} MiB",
        )
    return shown


def _ratios(
    title: str,
    figures: Sequence[Row],
    headings: Sequence[str],
    own: Callable[[Row | None], list[str]],
) -> Table:
    """Ratios of all peers, then what there is of Saccade itself."""
    peers = [name for name in dict.fromkeys(row["peer"] for row in figures) if name != SACCADE]
    shown = Table(box=None, pad_edge=False, padding=(0, 1))
    shown.add_column(title, no_wrap=True)
    for peer in peers:
        shown.add_column(peer, justify="right", max_width=11, min_width=7, overflow="fold")
    for heading in headings:
        shown.add_column(heading, justify="right", max_width=8, min_width=7)
    for one in dict.fromkeys(setting(row) for row in figures):
        rows = of(figures, *one)
        cells = []
        for peer in peers:
            row = rows.get(peer)
            mark = "" if row is None or row["exact"] else "!"
            ratio = math.nan if row is None else row["ratios"].get(fastest_way(row), math.nan)
            cells.append(_times(ratio) + mark)
        batch = f" ({one[1]})" if one[1] > 1 else ""
        places = "" if one[3] == "model-like" else f" {one[3]}"
        shown.add_row(
            Text(f"{one[0]}{batch} {one[2]}{places}"),
            *cells,
            *own(rows.get(SACCADE)),
        )
    return shown


def remarks(figures: Sequence[Row], left_out: Sequence[Row]) -> list[str]:
    """What the ratios do not say: who is inexact, who computes in another dtype, who is missing and why."""
    found: dict[str, list[str]] = {}
    for peer in dict.fromkeys(row["peer"] for row in figures if not row["exact"]):
        wrong = [row for row in figures if row["peer"] == peer and not row["exact"]]
        worst = max((math.inf if row["error"] is None else row["error"]) for row in wrong)
        text = f"{peer}: NOT RIGHT (marked !), off by up to {worst:.2g} of the largest number: "
        found[text] = [row["workload"] for row in wrong]
    for row in figures:
        if row["computes_in"] != row["dtype"]:
            text = f"{row['peer']}: {row['dtype']} values computed in {row['computes_in']}"
            found.setdefault(text, [])
    for row in left_out:
        found.setdefault(f"{row['peer']}: {row['reason']}: ", []).append(row["workload"])
    return [text + ", ".join(dict.fromkeys(cases)) for text, cases in found.items()]


def speed_table(figures: Sequence[Row], left_out: Sequence[Row], one: tuple[Any, ...]) -> Table:
    """The peers on one setting."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("ratio", justify="right", min_width=8, no_wrap=True)
    shown.add_column("peer", min_width=22, no_wrap=True)
    for heading in ("graph cold", "graph warm", "single", "wall"):
        shown.add_column(heading, justify="right", min_width=9, no_wrap=True)
    shown.add_column("spread", justify="right", no_wrap=True)
    shown.add_column("", style="dim", overflow="fold")
    for row in of(figures, *one).values():
        way = fastest_way(row)
        ratio = row["ratios"].get(way, math.nan)
        notes = [] if row["computes_in"] == row["dtype"] else [f"computes in {row['computes_in']}"]
        if not row["exact"]:
            notes.append(f"NOT RIGHT: off by {_number(row['error'])} of the largest number")
        shown.add_row(
            "" if row["peer"] == SACCADE else _times(ratio),
            row["peer"],
            *(_us(time_of(row, way)) for way in WAYS),
            _spread(row["times"].get(way)),
            Text("; ".join(notes), style="" if row["exact"] else "bold red"),
        )
    for row in left_out:
        if setting(row) == one and not row["reason"].startswith("backward: "):
            shown.add_row("–", row["peer"], "", "", "", "", "", Text(row["reason"]), style="dim")
    return shown


def model_table(rows: Sequence[Row]) -> Table:
    """Whole models, ratios first."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("ratio", "before", "after"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("whole model", overflow="fold")
    for row in rows:
        name = ", ".join(filter(None, (row["model"], row["mode"], row["dtype"])))
        if row["reason"]:
            shown.add_row("–", "", "", Text(f"{name}: {row['reason']}"), style="dim")
            continue
        note = f" ({row['why']})" if row["why"] else ""
        differs = row.get("note") or f"outputs differ by {_number(row['difference'])}"
        shown.add_row(
            _times(row["ratio"]),
            *(f"{row[key]['median'] / 1e3:.2f} ms" for key in ("before", "after")),
            Text(f"{name}, against {row['against']}{note}; {differs}"),
        )
    return shown


def training_table(rows: Sequence[Row]) -> Table:
    """Training steps before and after saccade.patch: time, peak memory, and whether all losses were finite."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("ratio", "before", "after", "peak before", "after"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("training step", overflow="fold")
    for row in rows:
        if row["reason"]:
            shown.add_row(*"–––––", Text(f"{row['model']}: {row['reason']}"), style="dim")
            continue
        note = f" ({row['why']})" if row["why"] else ""
        at = row["not_finite_at"]
        steps = f"{row['steps']} of {row['steps_wanted']} steps, " + (
            "all losses finite" if at is None else f"NOT FINITE at step {at}"
        )
        peaks = (row[key]["peak_bytes"] for key in ("before", "after"))
        shown.add_row(
            _times(row["ratio"]),
            *(f"{row[key]['median'] / 1e3:.1f} ms" for key in ("before", "after")),
            *("–" if peak is None else f"{peak / 2**30:.2f} GiB" for peak in peaks),
            Text(f"{row['model']}, {row['input']}, against {row['against']}{note}; {steps}"),
        )
    return shown


def print_checks(found: dict[str, Any], console: Console) -> None:
    """How many checks there were, and every one that failed, loudly."""
    rows = found.get("checks", [])
    failed = failed_checks(found)
    undone = [row for row in rows if row["ok"] and row.get("reason")]
    console.print(
        f"\nchecks on {found.get('backend', 'nothing')}: {len(rows) - len(failed) - len(undone)} right, "
        f"{len(failed)} wrong, {len(undone)} not done; seed {found.get('seed')}",
        style="bold red" if failed else "bold green" if rows else "yellow",
        markup=False,
        soft_wrap=True,
    )
    for row in rows:
        if row.get("note"):
            console.print(f"  {row['name']}: {row['note']}", style="dim", markup=False)
    for row in undone:
        console.print(f"  {row['name']}: {row['reason']}", style="dim", markup=False)
    for row in failed:
        console.print(
            f"  WRONG: {row['name']}: {row['reason']}",
            style="bold red",
            markup=False,
            soft_wrap=True,
        )
    console.print()


def failed_checks(found: dict[str, Any]) -> list[Row]:
    """The checks of Saccade's own kernels that did not hold."""
    return [row for row in found.get("checks", []) if not row["ok"]]


def goal_table(found: dict[str, Any]) -> Table:
    """Goals beside what was measured."""
    given = (found.get(key, []) for key in ("figures", "floors", "backward", "training"))
    shown = Table(box=None, pad_edge=False)
    shown.add_column("", no_wrap=True)
    shown.add_column("goal", no_wrap=True)
    shown.add_column("wanted", no_wrap=True)
    shown.add_column("measured", overflow="fold")
    signs = {True: Text("met", "green"), False: Text("missed", "bold red"), None: Text("–", "dim")}
    for goal in goals(*given):
        shown.add_row(signs[goal.met], goal.name, goal.wanted, Text(goal.measured))
    return shown


def floor_table(figures: Sequence[Row], floors: Sequence[Row]) -> Table:
    """Floors, and the share of each that Saccade reaches."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("setting", no_wrap=True)
    headings = (
        "bytes",
        "gathers cold",
        "warm",
        "Saccade cold",
        "warm",
        "of bytes",
        "of gathers",
        "warm",
    )
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in dict.fromkeys(setting(row) for row in floors):
        here, own = of(floors, *one), of(figures, *one).get(SACCADE)
        gathers, moved = here.get("gathers"), time_of(here.get("bytes"), COLD)
        cold, warm, own_cold, own_warm = (
            time_of(row, way) for row in (gathers, own) for way in (COLD, WARM)
        )
        shares = (moved / own_cold, cold / own_cold, warm / own_warm)
        shown.add_row(
            Text(f"{one[0]}, batch {one[1]}, {one[2]}, {one[3]}"),
            *(_us(time) for time in (moved, cold, warm, own_cold, own_warm)),
            *("–" if share != share else f"{share:.2f}" for share in shares),
        )
    return shown


def backward_floor_table(backward: Sequence[Row], floors: Sequence[Row]) -> Table:
    """The scatter and the sort, beside Saccade's backward in both modes."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("setting", no_wrap=True)
    headings = ("scatter", "sort", "backward", "deterministic", "scatter / backward")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in dict.fromkeys(setting(row) for row in floors if row["peer"] == "scatter"):
        here, own = of(floors, *one), of(backward, *one)
        floor, sort = (here.get(name) for name in ("scatter", "sort"))
        times = [
            *(time_of(row, fastest_way(row)) for row in (floor, sort)),
            *(time_of(own.get(name), COLD) for name in (SACCADE, DETERMINISTIC)),
        ]
        share = times[0] / times[2]
        shown.add_row(
            Text(f"{one[0]}, batch {one[1]}, {one[2]}, {one[3]}"),
            *map(_us, times),
            "–" if share != share else f"{share:.2f}",
        )
    return shown


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.2g}"


def _us(microseconds: float | None) -> str:
    if microseconds is None or microseconds != microseconds:
        return "–"
    return f"{microseconds:,.0f} µs" if microseconds >= 1000 else f"{microseconds:.3g} µs"


def _times(ratio: float) -> str:
    return "–" if ratio != ratio else times(ratio)


def _spread(timing: dict[str, Any] | None) -> str:
    """Between the quarters, in parts of the median."""
    if not timing or not timing["median"]:
        return ""
    return f"±{(timing['high'] - timing['low']) / 2 / timing['median']:.0%}"
