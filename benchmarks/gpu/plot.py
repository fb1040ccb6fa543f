"""The picture: how many times as fast as each peer, forward and backward, and how near the floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import (
    COLD,
    DETERMINISTIC,
    ENCODERS,
    LEAST_OF_GATHER_FLOOR,
    MOST_OF_FORWARD,
    Row,
    fastest_way,
    of,
    share_of_floor,
    time_of,
    times_its_forward,
)
from benchmarks.gpu.peers import SACCADE, all_peers
from saccade.benchmark.plot import COLOURS, ratios_along

DTYPES = ("float32", "bfloat16")
# As many as there are peers; the colours come round again before the marks do.
MARKERS = "oDs^vP*Xhd"


def save_plot(found: dict[str, Any], path: Path) -> None:
    """Draws ratios for both dtypes; beside those of the forward Saccade's share of the gather floor, beside
    those of the backward how many times its own forward it takes.

    Raises:
        ValueError: there is nothing to draw.
    """
    figures, floors, backward = (found.get(key, []) for key in ("figures", "floors", "backward"))
    drawn = [(name, rows) for name, rows in (("forward", figures), ("backward", backward)) if rows]
    drawn = [(name, rows) for name, rows in drawn if _cases(rows)]
    if not drawn:
        raise ValueError("figures: expected some of Saccade with model-like locations, got none")
    from matplotlib.figure import Figure as Canvas

    peers = [
        name
        for name in (*all_peers(), DETERMINISTIC)
        if name != SACCADE
        and any(row["peer"] == name and row["ratios"] for _, rows in drawn for row in rows)
    ]
    heights = [2.0 + 0.36 * len(_cases(rows)) for _, rows in drawn]
    canvas = Canvas(figsize=(14.5, 0.6 + sum(heights)), layout="constrained")
    grid = canvas.subplots(
        *(len(drawn), 3),
        sharey="row",
        squeeze=False,
        width_ratios=(4, 4, 2.4),
        height_ratios=heights,
    )
    handles: dict[str, Any] = {}
    for panels, (direction, of_direction) in zip(grid, drawn, strict=True):
        rows = {case: -index for index, case in enumerate(_cases(of_direction))}
        for panel, dtype in zip(panels, DTYPES, strict=False):
            _ratios(panel, of_direction, rows, dtype, peers)
            panel.set_title(f"{direction}, {dtype}", fontsize=11)
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if direction == "forward":
            _floor_shares(panels[2], figures, floors, rows)
        else:
            _of_forward(panels[2], backward, rows)
        panels[0].set_yticks(list(rows.values()), [_label(case) for case in rows])
        panels[0].set_ylim(-len(rows) + 0.4, 0.6)
    if handles:
        canvas.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(6, len(handles)),
            frameon=False,
        )
    machine = found["machine"]
    canvas.suptitle(
        "Saccade on a GPU, calls in a CUDA graph with a cold L2, model-like locations\n"
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)


def _cases(figures: Sequence[Row]) -> list[tuple[str, int]]:
    """Workloads and batches that Saccade has figures for."""
    return list(
        dict.fromkeys(
            (row["workload"], row["batch_size"])
            for row in figures
            if row["peer"] == SACCADE
            and row["locations"] == "model-like"
            and row["dtype"] in DTYPES
        )
    )


def _label(case: tuple[str, int]) -> str:
    return case[0] if case[1] == 1 else f"{case[0]}, batch {case[1]}"


def _ratios(
    panel: Any,
    figures: Sequence[Row],
    rows: dict[tuple[str, int], int],
    dtype: str,
    peers: Sequence[str],
) -> None:

    panel.axvline(1, color="black", linewidth=1.2)
    for index, peer in enumerate(peers):
        marks = []
        for case, height in rows.items():
            row = of(figures, *case, dtype).get(peer)
            ratio = row["ratios"].get(fastest_way(row)) if row is not None else None
            if ratio:
                marks.append((ratio, height))
        if marks:
            colour = COLOURS[index % len(COLOURS)]
            panel.scatter(
                *zip(*marks, strict=True),
                marker=MARKERS[index % len(MARKERS)],
                facecolor="none" if peer.startswith(SACCADE) else colour,
                edgecolor="black" if peer.startswith(SACCADE) else colour,
                s=42,
                label=peer,
                zorder=3,
            )
    for case, height in rows.items():  # Saccade's own time, at the right of its row
        time = time_of(of(figures, *case, dtype).get(SACCADE), COLD)
        if time == time:
            place = panel.get_yaxis_transform()
            panel.text(1.01, height, f"{time:.3g} µs", transform=place, va="center", fontsize=8)
    ratios_along(panel)
    panel.grid(axis="y", color="#e5e5e5")
    panel.set_axisbelow(True)
    panel.set_xlabel("the peer's time divided by Saccade's\n(right: Saccade's time)", fontsize=9)


def _floor_shares(
    panel: Any, figures: Sequence[Row], floors: Sequence[Row], rows: dict[tuple[str, int], int]
) -> None:
    def share(case: tuple[str, int], dtype: str) -> float:
        return share_of_floor(figures, floors, *case, dtype) if case[0] in ENCODERS else math.nan

    _bars(panel, rows, share, LEAST_OF_GATHER_FLOOR)
    panel.set_title("encoders: share of the gather floor", fontsize=11)
    panel.set_xlabel("the floor's time divided by Saccade's\n(goal: 0.5)", fontsize=9)


def _of_forward(panel: Any, backward: Sequence[Row], rows: dict[tuple[str, int], int]) -> None:
    _bars(
        panel, rows, lambda case, dtype: times_its_forward(backward, *case, dtype), MOST_OF_FORWARD
    )
    panel.set_title("backward and forward", fontsize=11)
    panel.set_xlabel(
        "the backward's time divided by its forward's\n(goal, detr-encoder: 3)", fontsize=9
    )


def _bars(
    panel: Any,
    rows: dict[tuple[str, int], int],
    figure: Callable[[tuple[str, int], str], float],
    goal: float,
) -> None:
    """A figure of each case in both dtypes, where there is one, and the goal."""
    panel.axvline(goal, color="black", linewidth=1, linestyle=":")
    for index, dtype in enumerate(DTYPES):
        marks = [
            (found, height + (0.17 if index == 0 else -0.17))
            for case, height in rows.items()
            if (found := figure(case, dtype)) == found
        ]
        if marks:
            lengths, heights = zip(*marks, strict=True)
            panel.barh(
                heights, lengths, height=0.3, color=("#0072b2", "#e69f00")[index], label=dtype
            )
    panel.set_xlim(0, max(1.1, panel.get_xlim()[1]))
    panel.tick_params(axis="y", length=0)
    panel.set_axisbelow(True)
    panel.grid(axis="x", color="#e5e5e5")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, loc="center right")
