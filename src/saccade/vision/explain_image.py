"""Draws an explanation as an image."""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from saccade.files import write_whole
from saccade.vision.explain import Explanation, Point
from saccade.vision.explain_table import format_number, format_pair, largest_points

# Colours of the points, which colour-blind people can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_INK, _GREY, _PAPER = "#222222", "#777777", "#f6f5f1"
_NOT_A_NUMBER = "#F0E442"
_MAX_LEVELS = 4
# More points would cover each other, and take minutes to draw.
_MAX_POINTS = 1000
# Positions that are so many map sizes away are not drawn; they would be out of view.
_FAR = 1000

SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
"""The names that an image can have, in upper or lower case."""


def check_path(path: Path) -> None:
    """Raises unless an image can be written to a path: a known suffix, and a file in a folder.

    Raises:
        OSError: the folder of the file does not exist, or the path is a folder, pipe or device.
        ValueError: the suffix is none of `SUFFIXES`.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, expected the name of a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is a pipe or a device, expected a file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"expected a name that ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {path.parent} does not exist")


def save_image(explanation: Explanation, path: Path) -> None:
    """Draws an explanation into a file; the suffix of its name determines the format.

    The file appears whole or not at all.

    The worked example is drawn as a map with its values, reference point, offsets and positions,
    and an enlarged view of the corners of each point. A module's query is drawn as one map per
    level, with the points sized by attention weight.

    What is not a number is left out or marked, and the image says so.

    Args:
        explanation: what is drawn.
        path: the file, with one of `SUFFIXES`.

    Raises:
        OSError: the file cannot be written.
        ValueError: the suffix is unknown.
    """
    check_path(path)
    draw = _worked_example if explanation.worked_example else _module
    figure = draw(explanation)
    FigureCanvasAgg(figure)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, facecolor="white")


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
    reference_x, reference_y = explanation.reference[0][:2]
    start = (reference_x, reference_y)
    in_view = [(-width, 2 * width), (-height, 2 * height)]
    ends = [
        (reference_x + point.offset[0], reference_y + point.offset[1])
        for point in explanation.points
    ]
    for point, end, colour in zip(explanation.points, ends, _COLOURS, strict=True):
        if _is_near(start, in_view) and _is_near(end, in_view):
            axes.annotate(
                "", xy=end, xytext=start,
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 7, "shrinkB": 9},
            )  # fmt: skip
        x, y = point.position
        if not _is_near((x, y), in_view):
            continue
        if explanation.padding != "zeros" and _is_near(end, in_view):
            # Clamping may have moved the position.
            axes.plot(*zip(end, point.position, strict=True), ":", color=colour, lw=1.5)
        axes.plot(x, y, "o", ms=17, color=colour, mec="white", mew=1.5, zorder=4)
        axes.text(
            x, y + 0.01, str(point.number), color="white", ha="center", va="center", fontsize=11,
            weight="bold", zorder=5,
        )  # fmt: skip
    if _is_near(start, in_view):
        axes.plot(*start, "*", ms=20, color=_INK, mec="white", mew=1.2, zorder=4)
    _keep_in_view(axes, width, height, [start, *ends])
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
    xs = [corner.x for corner in point.corners] or [0]
    ys = [corner.y for corner in point.corners] or [0]
    if _is_near((x, y), [(min(xs) - 1, max(xs) + 1), (min(ys) - 1, max(ys) + 1)]):
        axes.plot(x, y, "o", ms=9, color=colour, mec="white", mew=1.5, zorder=6)
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
    weights = [point.attention_weight for point in explanation.points]
    largest = max((weight for weight in weights if math.isfinite(weight)), default=0.0)
    for level in range(len(shapes)):
        _draw_level(figure.add_subplot(rows, columns, level + 1), explanation, level, largest)
    notes = [
        "★ reference    ● position, its area the attention weight "
        f"(largest {format_number(largest)})    grey: channel {explanation.channel} of the value",
        f"sum of attention weight · read = {format_number(explanation.by_hand, 5)};  "
        f"the module's attended value = {format_number(explanation.library, 5)}",
    ]
    if any(bool(values.isnan().any()) for values in explanation.maps[: len(shapes)]):
        notes.append("yellow: the value is not a number")
    if explanation.num_points > _MAX_POINTS:
        notes.append(f"the {_MAX_POINTS} points with the largest attention weights")
    if len(explanation.spatial_shapes) > len(shapes):
        notes.append(f"the first {len(shapes)} of {len(explanation.spatial_shapes)} levels")
    figure.supxlabel("\n".join(notes), fontsize=10)
    return figure


def _draw_level(axes: Any, explanation: Explanation, level: int, largest: float) -> None:
    height, width = explanation.spatial_shapes[level]
    axes.imshow(
        _shades(explanation, level).numpy(),
        cmap=colormaps["gray"].with_extremes(bad=_NOT_A_NUMBER),
        alpha=0.45,
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    references = explanation.reference
    reference = references[level if len(references) > 1 else 0]
    centre = (reference[0] * width - 0.5, reference[1] * height - 0.5)
    # Numbers that are far away would overflow in the renderer.
    near = [(-_FAR * size, _FAR * size) for size in (width, height)]
    if len(reference) == 4 and all(map(math.isfinite, reference)):
        sides = (reference[2] * width, reference[3] * height)
        corners = [
            [min(max(at - side, low), high), min(max(at + side, low), high)]
            for at, side, (low, high) in zip(centre, (s / 2 for s in sides), near, strict=True)
        ]
        (left, right), (top, bottom) = corners
        axes.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=_INK, lw=1.5, ls="--"
            )
        )
    points = [point for point in explanation.points if point.level == level]
    share = 100 * sum(point.attention_weight for point in points)
    drawn = [
        point
        for point in largest_points(explanation, _MAX_POINTS)
        if point.level == level and _is_near(point.position, near)
    ]
    if _is_near(centre, near):
        for point in drawn:
            axes.plot(
                *zip(centre, point.position, strict=True), color=_COLOURS[0], lw=0.9, alpha=0.7
            )
        axes.plot(*centre, "*", ms=17, color=_INK, mec="white", mew=1.2, zorder=4)
    axes.scatter(
        [point.position[0] for point in drawn],
        [point.position[1] for point in drawn],
        s=[20 + 380 * _relative(point.attention_weight, largest) for point in drawn],
        c=_COLOURS[1], edgecolors="white", linewidths=1, alpha=0.85, zorder=3,
    )  # fmt: skip
    attention = f"{format_number(share, 1)} % of the attention"
    if not math.isfinite(share):
        attention = "attention weights that are not numbers"
    lost = sum(not math.isfinite(sum(point.position)) for point in points)
    axes.set_title(
        f"level {level}: {height} x {width} pixels, {attention}"
        + (f"\n{lost} of {len(points)} positions not finite" if lost else ""),
        fontsize=11,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _keep_in_view(axes, width, height, [centre] + [point.position for point in points])


def _shades(explanation: Explanation, level: int) -> torch.Tensor:
    """A level of the map [H, W] between 0, the smallest value of all levels, and 1, the largest.

    Infinities are 0 and 1; what is not a number stays so.
    """
    finite = [values[values.isfinite()].double() for values in explanation.maps]
    darkest = min((float(values.min()) for values in finite if len(values)), default=0.0)
    lightest = max((float(values.max()) for values in finite if len(values)), default=0.0)
    values = explanation.maps[level].detach().cpu().double()
    # Halves, because the difference of the largest numbers would be infinite.
    span = lightest / 2 - darkest / 2
    return ((values / 2 - darkest / 2) / (span or 1.0)).clamp(0, 1)


def _is_near(position: tuple[float, ...], bounds: Sequence[tuple[float, float]]) -> bool:
    """Whether both coordinates are numbers within the bounds."""
    return all(low <= at <= high for at, (low, high) in zip(position, bounds, strict=True))


def _relative(weight: float, largest: float) -> float:
    return weight / largest if largest > 0 and math.isfinite(weight) else 0.0


def _keep_in_view(axes: Any, width: int, height: int, positions: list[tuple[float, float]]) -> None:
    """Shows the whole map, and points outside it up to one map size away on each side."""
    xs = [min(max(x, -width), 2 * width) for x, y in positions if math.isfinite(x + y)]
    ys = [min(max(y, -height), 2 * height) for x, y in positions if math.isfinite(x + y)]
    axes.set_xlim(min([-0.5, *(x - 0.5 for x in xs)]), max([width - 0.5, *(x + 0.5 for x in xs)]))
    axes.set_ylim(max([height - 0.5, *(y + 0.5 for y in ys)]), min([-0.5, *(y - 0.5 for y in ys)]))
