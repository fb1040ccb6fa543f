"""An explanation as tables in the terminal, 80 columns wide."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from saccade.vision.explain import Check, Corner, Explanation, Point

MAX_POINTS = 32
"""The tables list at most this many points, those with the largest attention weights."""


def print_explanation(console: Console, explanation: Explanation, num_detailed: int = 4) -> None:
    """Prints an explanation step by step.

    Args:
        console: the console to print to.
        explanation: the explanation to print.
        num_detailed: the corners of this many points are shown, those with the largest attention
            weights first.
    """
    console.print()
    console.print(explanation.subject, style="bold", highlight=False)
    _print_map(console, explanation)
    _print_reference(console, explanation)
    _print_positions(console, explanation)
    _print_corners(console, explanation, num_detailed)
    _print_sum(console, explanation)
    _print_checks(console, explanation)


def format_number(value: float, digits: int = 3) -> str:
    """Formats `value` with at most `digits` decimals; very small and large ones as 1.2e-07."""
    if value != 0 and (abs(value) < 0.5 * 10**-digits or abs(value) >= 1e6):
        return f"{value:.2g}"
    return _decimals(value, digits)


def format_pair(values: tuple[float, ...], *, sign: bool = False, digits: int = 3) -> str:
    """Formats `(x, y)`; with `sign`, each value carries + or -."""
    texts = [_decimals(value, digits) for value in values]
    if sign:
        texts = [text if text[0] == "-" or text == "nan" else f"+{text}" for text in texts]
    return f"({', '.join(texts)})"


def _decimals(value: float, digits: int) -> str:
    if abs(value) >= 1e6:
        return f"{value:.2g}"
    if abs(value) >= 100:
        digits = min(digits, 1)  # Long values would make the tables too wide.
    text = f"{value:.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _step(console: Console, title: str, *sentences: str) -> None:
    console.print()
    console.print(title, style="bold cyan", highlight=False)
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)


def _table(*columns: str, left: int = 0) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _print_map(console: Console, explanation: Explanation) -> None:
    if not explanation.worked_example:
        maps = ", ".join(f"{height} x {width}" for height, width in explanation.spatial_shapes)
        _step(
            console,
            "1  The map",
            f"Levels (height x width): {maps}.",
            f"Shown: channel {explanation.channel} of the head's {explanation.num_channels}.",
        )
        return
    _step(
        console,
        "1  The map",
        "z(x, y) = 10 x + y: each value tells its own position, 21 stands at x=2, y=1.",
        "x runs to the right, y runs down, (0, 0) is the centre of the first pixel.",
    )
    values = explanation.maps[0]
    table = _table("", *(f"x={x}" for x in range(values.shape[1])))
    for y, row in enumerate(values.tolist()):
        table.add_row(f"[bold]y={y}[/bold]", *(format_number(value) for value in row))
    console.print(table)


def _print_reference(console: Console, explanation: Explanation) -> None:
    unit = "pixels" if explanation.coordinates == "pixel" else "normalized: 0 and 1 are the edges"
    is_box = len(explanation.reference[0]) == 4
    _step(
        console,
        "2  The reference " + ("box" if is_box else "point"),
        f"The query starts from here ({unit}"
        + ("; centre x, centre y, width, height)." if is_box else ")."),
    )
    references = explanation.reference
    if len(set(references)) == 1:
        console.print(f"  p = {format_pair(references[0])}", highlight=False)
    else:
        for level, reference in enumerate(references):
            console.print(f"  level {level}: p = {format_pair(reference)}", highlight=False)


def largest_points(explanation: Explanation, count: int) -> list[Point]:
    """Returns the `count` points with the largest attention weights, in their original order.

    A weight that is not a number counts as larger than any number.
    """

    def rank(point: Point) -> float:
        weight = point.attention_weight
        return -math.inf if math.isnan(weight) else -weight

    largest = sorted(explanation.points, key=rank)[:count]
    return sorted(largest, key=lambda point: point.number)


def _limit_note(explanation: Explanation, points: list[Point]) -> list[str]:
    if len(points) == explanation.num_points:
        return []
    return [
        f"Shown: the {len(points)} of {explanation.num_points} points with the largest attention "
        "weights."
    ]


def _print_positions(console: Console, explanation: Explanation) -> None:
    points = largest_points(explanation, MAX_POINTS)
    several_levels = len(explanation.spatial_shapes) > 1
    if explanation.coordinates == "pixel":
        formula = "position = reference point + offset; the query chooses the offsets."
    elif len(explanation.reference[0]) == 4:
        formula = "location = centre + offset * 0.5 / K * (width, height), K points per level;"
    else:
        formula = "location = reference + offset / (width, height) of the level;"
    sentences = [formula]
    if explanation.coordinates != "pixel":
        sentences.append("position = location * (width, height) - 0.5, in pixels of the level.")
    if explanation.padding != "zeros":
        sentences.append(
            f'padding="{explanation.padding}": a position outside moves to the border pixels.'
        )
    _step(console, "3  Offsets and positions", *sentences, *_limit_note(explanation, points))
    columns = ["point", *(["level"] if several_levels else []), "offset"]
    if explanation.coordinates == "pixel":
        columns += ["position", "normalized", "normalized_corners"]
    else:
        columns += ["location", "position", "weight"]
    table = _table(*columns)
    for point in points:
        row = [str(point.number), *([str(point.level)] if several_levels else [])]
        row.append(format_pair(point.offset, sign=True, digits=2))
        if explanation.coordinates == "pixel":
            height, width = explanation.spatial_shapes[0]
            x, y = point.location
            row += [
                format_pair(point.position),
                format_pair(((x + 0.5) / width, (y + 0.5) / height)),
                format_pair((x / (width - 1), y / (height - 1))),
            ]
        else:
            row += [
                format_pair(point.location),
                format_pair(point.position, digits=2),
                format_number(point.attention_weight),
            ]
        table.add_row(*row)
    console.print(table)
    if explanation.coordinates == "pixel":
        console.print(
            "The two columns on the right are the same positions in the other coordinates.",
            highlight=False,
        )


def _print_corners(console: Console, explanation: Explanation, num_detailed: int) -> None:
    points = largest_points(explanation, num_detailed)
    if explanation.interpolation == "nearest":
        sentences = ["Each point reads the nearest pixel; half way between two, the even one."]
    elif explanation.interpolation == "discrete":
        sentences = ["Each point reads the one pixel floor(position + 1), as RT-DETRv2 does."]
    else:
        sentences = [
            "Each point reads the four pixels around it; nearer pixels have larger weights.",
            "The value read is the sum of the products weight * value.",
            "A corner's weight is the area of the rectangle on the far side of the point.",
        ]
    if any(corner.value is None for point in points for corner in point.corners):
        sentences.append("A corner outside the map counts as 0.")
    _step(
        console,
        "4  Corners and their interpolation weights",
        *sentences,
        *_limit_note(explanation, points),
    )
    table = _table("point", "position", "corner", "weight", "value", "product", "read")
    for point in points:
        rows: list[Corner | None] = [*point.corners] or [None]
        for index, corner in enumerate(rows):
            first, last = index == 0, index == len(rows) - 1
            table.add_row(
                str(point.number) if first else "",
                format_pair(point.position) if first else "",
                *_corner_cells(corner),
                f"[bold]{format_number(point.read)}[/bold]" if last else "",
                end_section=last,
            )
    console.print(table)


def _corner_cells(corner: Corner | None) -> list[str]:
    if corner is None:
        return ["not finite", "", "", "0"]
    value = 0.0 if corner.value is None else corner.value
    cells = [
        format_pair((corner.x, corner.y)),
        format_number(corner.weight),
        "outside" if corner.value is None else format_number(value),
        format_number(corner.weight * value),
    ]
    # Corners that contribute nothing are dimmed.
    return [f"[dim]{cell}[/dim]" for cell in cells] if corner.weight * value == 0 else cells


def _print_sum(console: Console, explanation: Explanation) -> None:
    points = largest_points(explanation, MAX_POINTS)
    total = sum(point.attention_weight for point in explanation.points)
    _step(
        console,
        "5  Attention weights and output",
        "output = sum of attention weight * read; the weights "
        + (f"sum to {format_number(total)}." if math.isfinite(total) else "are not all finite."),
        *_limit_note(explanation, points),
    )
    several_levels = len(explanation.spatial_shapes) > 1
    table = _table(
        "point", *(["level"] if several_levels else []), "attention weight", "read", "product"
    )
    for point in points:
        table.add_row(
            str(point.number),
            *([str(point.level)] if several_levels else []),
            format_number(point.attention_weight),
            format_number(point.read),
            format_number(point.attention_weight * point.read, 4),
        )
    table.add_section()
    blank = [""] * (2 if several_levels else 1)
    name = "sum" if len(points) == explanation.num_points else "sum of all"
    table.add_row(
        f"[bold]{name}[/bold]", *blank, "", f"[bold]{format_number(explanation.by_hand, 5)}[/bold]"
    )
    console.print(table)


def _print_checks(console: Console, explanation: Explanation) -> None:
    subject = (
        "saccade.deformable_attention gives"
        if explanation.worked_example
        else f"The module's attended value, this head, channel {explanation.channel}:"
    )
    console.print(
        f"{subject} [bold]{format_number(explanation.library, 5)}[/bold]", highlight=False
    )
    for check in explanation.checks:
        verdict = "[green]equal[/green]" if check.passed else "[bold red]DIFFERENT[/bold red]"
        console.print(f"{verdict} ({_describe_difference(check)}): {check.name}", highlight=False)
    if any(check.num_not_finite for check in explanation.checks):
        word = "not a number" if math.isnan(explanation.library) else "not finite"
        subject = "The output" if not math.isfinite(explanation.library) else "Part of the output"
        console.print(
            f"[bold]{subject} is {word}[/bold]: weights or inputs are NaN, infinite or too large.",
            highlight=False,
        )


def _describe_difference(check: Check) -> str:
    if not math.isfinite(check.largest_difference):
        return "one side is not finite, the other another value"
    text = f"difference {format_number(check.largest_difference)}"
    if check.num_not_finite:
        text += f"; {check.num_not_finite} of {check.num_values} values not finite on both sides"
    return text
