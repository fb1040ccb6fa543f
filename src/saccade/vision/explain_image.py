"""Draws an explanation as an image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from saccade.vision.explain import Explanation, Point
from saccade.vision.explain_table import format_number, format_pair

# Colours of the points, which colour-blind people can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_INK, _GREY, _PAPER = "#222222", "#777777", "#f6f5f1"
_MAX_LEVELS = 4


def save_image(explanation: Explanation, path: Path) -> None:
    """Draws an explanation into a file; the suffix of its name determines the format.

    The worked example is drawn as a map with its values, reference point, offsets and positions,
    and an enlarged view of the corners of each point. A module's query is drawn as one map per
    level, with the points sized by attention weight.

    Raises:
        OSError: the file cannot be written.
        ValueError: the format is unknown.
    """
    draw = _worked_example if explanation.worked_example else _module
    figure = draw(explanation)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, facecolor="white")


def _worked_example(explanation: Explanation) -> Figure:
    figure = Figure(figsize=(12.6, 7.6))
    grid = figure.add_gridspec(
        2, 3, width_ratios=[2.05, 1, 1], left=0.04, right=0.985, top=0.85, bottom=0.21,
        wspace=0.12, hspace=0.36,
    )  # fmt: skip
    figure.text(0.04, 0.945, "Deformable attention, one query", fontsize=17, weight="bold")
    what_is_read = {
        "linear": "the pixels around it, the nearer the more",
        "nearest": "the nearest pixel",
        "discrete": "the pixel of floor(position + 1)",
    }[explanation.interpolation]
    for left, text in (
        (0.04, "The query jumps from its reference point by four offsets …"),
        (0.53, f"… and at each position reads {what_is_read}"),
    ):
        figure.text(left, 0.91, text, fontsize=11.5, color=_GREY)
    _draw_map(figure.add_subplot(grid[:, 0]), explanation)
    # The panels are arranged as the points are around the reference point.
    for point, cell in zip(explanation.points, ((1, 2), (1, 1), (0, 2), (0, 1)), strict=True):
        _draw_corners(figure.add_subplot(grid[cell]), explanation, point)
    terms = " + ".join(
        f"{format_number(point.attention_weight)} · {format_number(point.read)}"
        for point in explanation.points
    )
    figure.text(
        0.5, 0.075,
        f"output = Σ attention weight · read = {terms} = {format_number(explanation.by_hand, 4)}",
        fontsize=14, ha="center", color=_INK, weight="bold",
    )  # fmt: skip
    figure.text(
        0.5, 0.035, f"saccade.deformable_attention gives {format_number(explanation.library, 4)}",
        fontsize=11, ha="center", color=_GREY,
    )  # fmt: skip
    return figure


def _draw_map(axes: Any, explanation: Explanation) -> None:
    (height, width), values = explanation.spatial_shapes[0], explanation.maps[0]
    for row in range(height):
        for column in range(width):
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, facecolor=_PAPER, edgecolor="#cccccc", lw=1
                )
            )
            axes.text(
                column, row + 0.33, format_number(float(values[row, column])), fontsize=12, color=_INK,
                ha="center", va="center",
            )  # fmt: skip
    reference_x, reference_y = explanation.reference[0]
    for point, colour in zip(explanation.points, _COLOURS, strict=True):
        start = (reference_x, reference_y)
        end = (reference_x + point.offset[0], reference_y + point.offset[1])
        axes.annotate(
            "", xy=end, xytext=start,
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 7, "shrinkB": 9},
        )  # fmt: skip
        if explanation.padding != "zeros":  # Clamping may have moved the position.
            axes.plot(*zip(end, point.position, strict=True), ":", color=colour, lw=1.5)
        x, y = point.position
        axes.plot(x, y, "o", ms=17, color=colour, mec="white", mew=1.5, zorder=4)
        axes.text(
            x, y + 0.01, str(point.number), color="white", ha="center", va="center", fontsize=11,
            weight="bold", zorder=5,
        )  # fmt: skip
    axes.plot(reference_x, reference_y, "*", ms=20, color=_INK, mec="white", mew=1.2, zorder=4)
    xs = [reference_x, *(reference_x + point.offset[0] for point in explanation.points)]
    ys = [reference_y, *(reference_y + point.offset[1] for point in explanation.points)]
    axes.set_xlim(min(-0.55, min(xs) - 0.3), max(width - 0.45, max(xs) + 0.3))
    axes.set_ylim(max(height - 0.45, max(ys) + 0.3), min(-0.55, min(ys) - 0.3))
    axes.set_aspect("equal")
    axes.set_xticks(range(width), [f"x={x}" for x in range(width)], fontsize=11)
    axes.set_yticks(range(height), [f"y={y}" for y in range(height)], fontsize=11)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, pad=2)
    axes.set_frame_on(False)
    axes.set_xlabel(
        f"★ reference point {format_pair((reference_x, reference_y))}    → offset    "
        "● position\nin the cells: the values of the map, z(x, y) = 10 x + y",
        fontsize=11, color=_INK, labelpad=8,
    )  # fmt: skip


def _draw_corners(axes: Any, explanation: Explanation, point: Point) -> None:
    """Draws the pixels that a point reads; the depth of the colour shows the weight."""
    colour = _COLOURS[point.number - 1]
    for corner in point.corners:
        axes.add_patch(
            Rectangle((corner.x - 0.5, corner.y - 0.5), 1, 1, facecolor="white", zorder=0)
        )
        axes.add_patch(
            Rectangle(
                (corner.x - 0.5, corner.y - 0.5),
                1,
                1,
                facecolor=colour,
                edgecolor="#bbbbbb",
                lw=1,
                alpha=0.08 + 0.5 * corner.weight,
                hatch="///" if corner.value is None else None,
            )
        )
        text_colour = _INK if corner.weight > 0 else "#999999"
        value = "outside: 0" if corner.value is None else format_number(corner.value)
        # The text avoids the middle of the panel, where the point may lie.
        upper = corner.y == min(other.y for other in point.corners)
        y = corner.y + (-0.32 if upper else 0.12)
        axes.text(
            corner.x, y, value, ha="center", fontsize=12, color=text_colour, weight="bold", zorder=5
        )
        axes.text(
            corner.x, y + (0.2 if len(point.corners) == 4 else 0.1),
            f"weight {format_number(corner.weight)}", ha="center", fontsize=9.5, color=text_colour, zorder=5,
        )  # fmt: skip
    x, y = point.position
    axes.plot(x, y, "o", ms=9, color=colour, mec="white", mew=1.5, zorder=6)
    xs = [corner.x for corner in point.corners] or [0]
    ys = [corner.y for corner in point.corners] or [0]
    axes.set_xlim(min(xs) - 0.52, max(xs) + 0.52)
    axes.set_ylim(max(ys) + 0.52, min(ys) - 0.52)
    axes.set_aspect("equal")
    axes.set_xticks(sorted(set(xs)), [f"x={x}" for x in sorted(set(xs))], fontsize=9)
    axes.set_yticks(sorted(set(ys)), [f"y={y}" for y in sorted(set(ys))], fontsize=9)
    axes.tick_params(length=0, pad=1)
    axes.set_frame_on(False)
    axes.set_title(
        f"{point.number}  at {format_pair(point.position)}  reads {format_number(point.read)}",
        color=colour, fontsize=12, weight="bold", pad=5,
    )  # fmt: skip


def _module(explanation: Explanation) -> Figure:
    shapes = explanation.spatial_shapes[:_MAX_LEVELS]
    columns = min(2, len(shapes))
    rows = math.ceil(len(shapes) / columns)
    tallest = min(1.5, max(height / width for height, width in shapes))
    figure = Figure(
        figsize=(max(7.6, 5.6 * columns + 0.8), (5.2 * tallest + 0.5) * rows + 1.5),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )
    figure.suptitle(explanation.subject.replace(": ", "\n", 1), fontsize=13, weight="bold")
    largest = max(point.attention_weight for point in explanation.points) or 1.0
    for level in range(len(shapes)):
        _draw_level(figure.add_subplot(rows, columns, level + 1), explanation, level, largest)
    notes = [
        "★ reference    ● position, its area the attention weight "
        f"(largest {format_number(largest)})    grey: channel {explanation.channel} of the value",
        f"sum of attention weight · read = {format_number(explanation.by_hand, 5)};  "
        f"the module's attended value = {format_number(explanation.library, 5)}",
    ]
    if len(explanation.spatial_shapes) > len(shapes):
        notes.append(f"the first {len(shapes)} of {len(explanation.spatial_shapes)} levels")
    figure.supxlabel("\n".join(notes), fontsize=10)
    return figure


def _draw_level(axes: Any, explanation: Explanation, level: int, largest: float) -> None:
    height, width = explanation.spatial_shapes[level]
    darkest = min(float(values.min()) for values in explanation.maps)
    lightest = max(float(values.max()) for values in explanation.maps)
    axes.imshow(
        explanation.maps[level].float().numpy(), cmap="gray", alpha=0.45, interpolation="nearest",
        vmin=darkest, vmax=lightest,
    )  # fmt: skip
    references = explanation.reference
    reference = references[level if len(references) > 1 else 0]
    centre = (reference[0] * width - 0.5, reference[1] * height - 0.5)
    if len(reference) == 4:
        box = (reference[2] * width, reference[3] * height)
        corner = (centre[0] - box[0] / 2, centre[1] - box[1] / 2)
        axes.add_patch(Rectangle(corner, *box, fill=False, edgecolor=_INK, lw=1.5, ls="--"))
    points = [point for point in explanation.points if point.level == level]
    for point in points:
        axes.plot(*zip(centre, point.position, strict=True), color=_COLOURS[0], lw=0.9, alpha=0.7)
    axes.scatter(
        [point.position[0] for point in points],
        [point.position[1] for point in points],
        s=[20 + 380 * point.attention_weight / largest for point in points],
        c=_COLOURS[1], edgecolors="white", linewidths=1, alpha=0.85, zorder=3,
    )  # fmt: skip
    axes.plot(*centre, "*", ms=17, color=_INK, mec="white", mew=1.2, zorder=4)
    share = 100 * sum(point.attention_weight for point in points)
    axes.set_title(
        f"level {level}: {height} x {width} pixels, {format_number(share, 1)} % of the attention",
        fontsize=11,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _keep_in_view(axes, width, height, [centre] + [point.position for point in points])


def _keep_in_view(axes: Any, width: int, height: int, positions: list[tuple[float, float]]) -> None:
    """Shows the whole map, and points outside it up to one map size away on each side."""
    xs = [min(max(x, -width), 2 * width) for x, y in positions if math.isfinite(x + y)]
    ys = [min(max(y, -height), 2 * height) for x, y in positions if math.isfinite(x + y)]
    axes.set_xlim(min([-0.5, *(x - 0.5 for x in xs)]), max([width - 0.5, *(x + 0.5 for x in xs)]))
    axes.set_ylim(max([height - 0.5, *(y + 0.5 for y in ys)]), min([-0.5, *(y - 0.5 for y in ys)]))
