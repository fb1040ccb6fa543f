"""The picture of `saccade bench`: how many times as fast Saccade is, for each peer and workload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saccade.benchmark.report import Results, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito); the peers in the order of the registry.
COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#56b4e9", "#999999", "#cc79a7")
MARKERS = "oDs^vP*"
DIRECTIONS = ("forward", "forward + backward")


def save_plot(found: Results, path: Path) -> None:
    """Draws the ratios of one setting: the first dtype, locations and threads of the results.

    A row a workload, a mark a peer, the ratio on a logarithmic axis; Saccade is the line at 1.

    Raises:
        ValueError: there is nothing to draw, or matplotlib does not know the format of the file.
    """
    if not found.figures:
        raise ValueError("figures: expected at least one, got none")
    from matplotlib.figure import Figure as Canvas

    first = found.figures[0].setting
    shown = [
        figure
        for figure in found.figures
        if figure.setting[2:] == first[2:]  # all but the workload and the direction
    ]
    workloads = list(dict.fromkeys(figure.setting.workload for figure in shown))
    peers = [peer for peer in dict.fromkeys(figure.peer for figure in shown) if peer != "saccade"]
    directions = [
        name for name in DIRECTIONS if any(figure.setting.direction == name for figure in shown)
    ]
    canvas = Canvas(
        figsize=(2.2 + 4.2 * len(directions), 1.9 + 0.36 * len(workloads)), layout="constrained"
    )
    panels = canvas.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    rows = {name: -index for index, name in enumerate(workloads)}
    for panel, direction in zip(panels, directions, strict=True):
        here = [figure for figure in shown if figure.setting.direction == direction]
        panel.axvline(1, color="black", linewidth=1.2)
        panel.set_yticks(list(rows.values()), list(rows))
        panel.set_ylim(-len(rows) + 0.4, 0.6)
        panel.grid(axis="y", color="#e5e5e5")
        panel.set_axisbelow(True)
        for index, peer in enumerate(peers):
            marks = [figure for figure in here if figure.peer == peer]
            panel.scatter(
                [figure.ratio for figure in marks],
                [rows[figure.setting.workload] for figure in marks],
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                s=42,
                label=f"Saccade on {peer}" if peer.startswith("cpu-") else peer,
                zorder=3,
            )
        ours = {
            figure.setting.workload: figure.milliseconds
            for figure in here
            if figure.peer == "saccade"
        }
        for name, time in ours.items():  # Saccade's own time, at the right of its row
            panel.text(
                1.01,
                rows[name],
                milliseconds(time),
                transform=panel.get_yaxis_transform(),
                va="center",
                fontsize=8,
            )
        ratios_along(panel)
        panel.set_title(direction, fontsize=11)
        panel.set_xlabel(
            "the peer's time divided by Saccade's\n(right: Saccade's time)", fontsize=9
        )
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
    )
    machine = found.machine
    canvas.suptitle(
        f"Saccade, how many times as fast as each peer: {first.dtype}, {first.locations} locations, "
        f"{first.threads} thread{'' if first.threads == 1 else 's'}\n"
        f"{machine['processor']}, {machine['backend']}, torch {machine['torch']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)


def ratios_along(panel: Axes) -> None:
    """Makes the axis to the right one of ratios, and that upwards one of names."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g} ×"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
