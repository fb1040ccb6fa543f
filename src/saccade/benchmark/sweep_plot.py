"""The pictures of `saccade bench sweep`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saccade.benchmark.sweep import DIRECTIONS, WORST, ScalingFigure, ShapeFigure

_REGISTRY, _FULL, _RANDOM, _BAD = "#0072b2", "#009e73", "#b0b0b0", "#d55e00"
_CURVES = ("#0072b2", "#009e73", "#e69f00", "#d55e00")


def save_plot(
    shapes: Sequence[ShapeFigure],
    scaling: Sequence[ScalingFigure],
    machine: dict[str, str],
    threads: int,
    path: Path,
) -> None:
    """Draws bandwidth against work with the worst shapes labelled, and the curves of scaling.

    Raises:
        ValueError: matplotlib does not know the format of the file.
    """
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(12, 9.2), layout="constrained")
    panels = canvas.subplots(2, 2, height_ratios=(1.35, 1))
    for panel, direction in zip(panels[0], DIRECTIONS, strict=True):
        _bandwidths(panel, shapes, direction)
    _queries(panels[1, 0], [figure for figure in scaling if figure.curve == "queries"])
    _points(panels[1, 1], [figure for figure in scaling if figure.curve == "levels x points"])
    canvas.suptitle(
        f"Saccade, float32, {threads} thread{'' if threads == 1 else 's'}, warm caches; "
        f"{machine['processor']}, {machine['backend']}, torch {machine['torch']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def _bandwidths(panel: Any, shapes: Sequence[ShapeFigure], direction: str) -> None:
    groups = (
        ("random, other head_dim", _RANDOM, 14),
        ("random, head_dim a multiple of 16", _FULL, 14),
        ("registry", _REGISTRY, 34),
    )
    for rank, (label, colour, size) in enumerate(groups):
        some = [figure for figure in shapes if _group(figure) == rank]
        panel.scatter(
            [figure.megabytes for figure in some],
            [figure.bandwidth(direction) for figure in some],
            s=size,
            color=colour,
            label=label,
            zorder=2 + rank,
        )
    median = statistics.median(figure.bandwidth(direction) for figure in shapes)
    panel.axhline(median, color="black", linewidth=1, label=f"median, {median:.3g} GB/s")
    worst = sorted(shapes, key=lambda figure: figure.bandwidth(direction))[:WORST]
    panel.scatter(
        [figure.megabytes for figure in worst],
        [figure.bandwidth(direction) for figure in worst],
        s=70,
        facecolors="none",
        edgecolors=_BAD,
        zorder=4,
    )
    for rank, figure in enumerate(worst, 1):
        panel.annotate(
            str(rank),
            (figure.megabytes, figure.bandwidth(direction)),
            xytext=(6, -3),
            textcoords="offset points",
            fontsize=8,
            color=_BAD,
        )
    names = "\n".join(
        f"{rank}  {median / figure.bandwidth(direction):.1f} × below  {figure.name}  "
        f"{_short(figure.shape)}"
        for rank, figure in enumerate(worst, 1)
    )
    panel.set_title(direction)
    _logarithmic(panel)
    panel.set_ylabel("effective bandwidth, GB/s")
    panel.set_xlabel(f"value rows read by the forward, MB\n\n{names}", loc="left", fontsize=8)
    panel.set_axisbelow(True)
    bottom, top = panel.get_ylim()
    panel.set_ylim(bottom * (bottom / top) ** 0.2, top)  # room for the legend below the worst
    panel.legend(fontsize=8, loc="lower center", ncols=2)


def _group(figure: ShapeFigure) -> int:
    return figure.fills_vectors if figure.name.startswith("random-") else 2


def _short(shape: str) -> str:
    """Without the sizes of many levels; the JSON file has them."""
    head, _, sizes = shape.rpartition(" [")
    levels = sizes.rstrip("]").split(", ")
    return f"{head} [{sizes}" if len(levels) < 3 else f"{head} {len(levels)} levels"


def _queries(panel: Any, figures: Sequence[ScalingFigure]) -> None:
    x = [figure.x for figure in figures]
    panel.plot(
        x, [figure.forward_ms for figure in figures], "o-", color=_CURVES[0], label=DIRECTIONS[0]
    )
    panel.plot(
        x, [figure.both_ms for figure in figures], "s-", color=_CURVES[3], label=DIRECTIONS[1]
    )
    last = figures[-1]
    panel.plot(
        x,
        [last.forward_ms * number / last.x for number in x],
        ":",
        color="black",
        label="in proportion to the queries",
    )
    panel.set_xlabel("queries, on the maps of detr-decoder")
    _curves(panel)


def _points(panel: Any, figures: Sequence[ScalingFigure]) -> None:
    for index, of in enumerate(dict.fromkeys(figure.of for figure in figures)):
        some = [figure for figure in figures if figure.of == of]
        x = [figure.x for figure in some]
        colour = _CURVES[index % len(_CURVES)]
        panel.plot(x, [f.forward_ms for f in some], "o-", color=colour, label=of)
        panel.plot(x, [f.both_ms for f in some], "s--", color=colour)
    panel.set_xlabel(
        "levels × points a level, 2000 queries, maps of 48 x 48\n"
        "solid: forward, dashed: forward + backward"
    )
    _curves(panel)


def _curves(panel: Any) -> None:
    panel.set_ylabel("time, ms")
    panel.legend(fontsize=8)
    _logarithmic(panel)


def _logarithmic(panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        first, last = axis.get_view_interval()
        wide = last > 3e3 * first  # a label at each power of ten is then enough
        axis.set_major_locator(LogLocator(10, subs=(1,) if wide else (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.grid(color="#e8e8e8")
