"""The picture of where the queries of the detected objects looked."""

from __future__ import annotations

import math
from typing import NamedTuple

from PIL import Image, ImageDraw

from saccade.vision.detector import Detection, PictureResult
from saccade.vision.drawing import (
    GREY,
    INK,
    PAPER,
    Colour,
    Rectangle,
    colours,
    font,
    grown,
    shortened,
)

MAX_OBJECTS = 12
"""Objects whose looks are drawn, best scores first."""

_SMOOTH = 2  # points are drawn this much larger and shrunk: Pillow's circles have ragged edges


class View(NamedTuple):
    """A part of the original picture, and how large it is drawn."""

    left: float
    top: float
    zoom: float
    size: tuple[int, int]
    """(width, height) of the drawing in pixels."""

    @property
    def window(self) -> Rectangle:
        """x0, y0, x1, y1 of the part, in pixels of the original picture."""
        width, height = self.size
        return self.left, self.top, self.left + width / self.zoom, self.top + height / self.zoom

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a position of the original picture lies in the drawing."""
        return (x - self.left) * self.zoom, (y - self.top) * self.zoom


def draw_looked(picture: Image.Image, result: PictureResult, threshold: float) -> Image.Image:
    """Where the query of each object looked: a panel for each, the best `MAX_OBJECTS` of them.

    A panel shows the part of the picture that holds the object's box and all its points; the points
    are coloured by head, their area is the attention weight.

    Args:
        picture: the original picture, RGB.
        result: what a detector found in it.
        threshold: the score that the objects exceed; named where there are none.

    Returns:
        An RGB picture of about 700 to 1500 pixels.
    """
    shown = result.detections[:MAX_OBJECTS]
    columns = {0: 1, 1: 1, 2: 2, 3: 3, 4: 2}.get(len(shown), 3 if len(shown) <= 9 else 4)
    longest = {1: 760, 2: 560, 3: 460, 4: 380}[columns]
    panel_size = _panel_size(picture.size, longest)
    title, note = _title(result, threshold)
    heads = shown[0].look.weights.shape[0] if shown else 0
    panels = [_panel(picture, detection, panel_size) for detection in shown]
    if not panels:
        zoom = min(panel_size[0] / picture.width, panel_size[1] / picture.height)
        size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
        panels = [picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)]
    margin, heading = 16, font(19)
    cell_width, cell_height = panels[0].width, max(panel.height for panel in panels)
    rows = math.ceil(len(panels) / columns)
    width = max(2 * margin + columns * (cell_width + margin) - margin, 700)
    legend = _legend(width - 2 * margin, heads, longest) if heads else None
    top = 66
    height = top + rows * (cell_height + margin) + (legend.height + 6 if legend else 0)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((margin, 12), title, font=heading, fill=INK)
    draw.text((margin, 39), note, font=font(14), fill=GREY)
    left = (width - columns * (cell_width + margin) + margin) // 2
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        place = (left + column * (cell_width + margin), top + row * (cell_height + margin))
        page.paste(panel, place)
    if legend:
        page.paste(legend, (margin, height - legend.height - 6))
    return page


def _title(result: PictureResult, threshold: float) -> tuple[str, str]:
    count = len(result.detections)
    layer = f"Cross attention of decoder layer {result.layer} of {result.num_layers}"
    if count == 0:
        return f"No object with a score above {threshold:g}", "No query to show."
    if count == 1:
        return "Where the query of the detected object looked", f"{layer}."
    title = f"Where the queries of the {count} detected objects looked"
    shown = f"; the {MAX_OBJECTS} of {count} with the best scores" if count > MAX_OBJECTS else ""
    return title, f"{layer}{shown}."


def _panel_size(picture: tuple[int, int], longest: int) -> tuple[int, int]:
    """The shape of the picture, at most twice as long as wide."""
    aspect = min(2.0, max(0.5, picture[0] / picture[1]))
    if aspect >= 1:
        return longest, round(longest / aspect)
    return round(longest * aspect), longest


def view_of(detection: Detection, picture: tuple[int, int], panel: tuple[int, int]) -> View:
    """The part of a picture that holds an object's box and its points, with room around them.

    Far points that together hold no more than a twentieth of the attention do not widen it.

    Args:
        detection: an object in the picture.
        picture: (width, height) of the picture.
        panel: (width, height) of the largest drawing there is room for.

    Returns:
        View: within the picture; points outside the picture do not widen it.
    """
    xs, ys = [*detection.box[::2]], [*detection.box[1::2]]
    points = _points_that_count(detection)
    if detection.look.reference is not None:
        points.append(detection.look.reference)
    for x, y in points:
        if 0 <= x <= picture[0] and 0 <= y <= picture[1]:
            xs.append(x)
            ys.append(y)
    low = (min(max(min(xs), 0), picture[0]), min(max(min(ys), 0), picture[1]))
    high = (min(max(max(xs), 0), picture[0]), min(max(max(ys), 0), picture[1]))
    # The zoom at which the extent and some room fit; never more than the whole picture is needed.
    whole = min(panel[0] / picture[0], panel[1] / picture[1])
    extent = [1.25 * max(high[axis] - low[axis], 8.0) for axis in (0, 1)]
    zoom = max(whole, min(panel[0] / extent[0], panel[1] / extent[1]))
    if zoom < 1.5 * whole:
        zoom = whole  # nearly everything: rather the whole picture
    corner, size = [], []
    for axis in (0, 1):
        length = min(picture[axis], panel[axis] / zoom)
        middle = (low[axis] + high[axis]) / 2
        corner.append(min(max(middle - length / 2, 0), picture[axis] - length))
        size.append(max(1, round(length * zoom)))
    return View(corner[0], corner[1], zoom, (size[0], size[1]))


def _points_that_count(detection: Detection) -> list[tuple[float, float]]:
    """The points, less the farthest from the box, as far as these hold 5 % of the attention."""
    look = detection.look
    middle = [(detection.box[0] + detection.box[2]) / 2, (detection.box[1] + detection.box[3]) / 2]
    points = [
        (math.dist(point, middle), weight, (point[0], point[1]))
        for point, weight in zip(
            look.positions.flatten(0, 1).tolist(), look.weights.flatten().tolist(), strict=True
        )
        if math.isfinite(point[0]) and math.isfinite(point[1])
    ]
    points.sort(reverse=True)
    spare = 0.05 * sum(weight for _, weight, _ in points)
    for index, (_, weight, _) in enumerate(points):
        spare -= weight
        if spare < 0:
            return [place for _, _, place in points[index:]]
    return []


def _panel(picture: Image.Image, detection: Detection, panel: tuple[int, int]) -> Image.Image:
    view = view_of(detection, picture.size, panel)
    caption, large, small = 26, font(16), font(12)
    page = Image.new("RGB", (panel[0], panel[1] + caption), PAPER)
    draw = ImageDraw.Draw(page)
    text = f"{shortened(detection.label, 20)} {detection.score:.2f}"
    draw.text((0, 2), text, font=large, fill=INK)
    begin = draw.textlength(text, font=large) + 10
    for note in (_panel_note(detection, view), f"query {detection.query}"):
        if begin + draw.textlength(note, font=small) <= panel[0]:
            draw.text((begin, 6), note, font=small, fill=GREY)
            break
    drawing = draw_look(picture, detection, view)
    page.paste(drawing, ((panel[0] - view.size[0]) // 2, caption))
    return page


def _panel_note(detection: Detection, view: View) -> str:
    x0, y0, x1, y1 = view.window
    points = detection.look.positions.flatten(0, 1).tolist()
    outside = sum(not (x0 <= x <= x1 and y0 <= y <= y1) for x, y in points)
    beyond = f", {outside} of {len(points)} points outside this view" if outside else ""
    return f"query {detection.query}{beyond}"


def draw_look(picture: Image.Image, detection: Detection, view: View) -> Image.Image:
    """One object's box, reference point and sampling points over a part of the picture.

    Returns:
        An RGB picture of the size `view.size`; the picture in it is pale, so that points stand out.
    """
    large = (view.size[0] * _SMOOTH, view.size[1] * _SMOOTH)
    zoom = view.zoom * _SMOOTH
    kind = Image.Resampling.LANCZOS if zoom < 1 else Image.Resampling.BICUBIC
    base = picture.convert("RGB").resize(large, kind, box=_within(view.window, picture.size))
    pale = Image.blend(base, base.convert("L").convert("RGB"), 0.5)
    pale = Image.blend(pale, Image.new("RGB", large, PAPER), 0.3)
    layer = Image.new("RGBA", large)
    draw = ImageDraw.Draw(layer)
    unit = _radius_of_one(max(view.size)) * _SMOOTH
    look = detection.look
    palette = colours(look.weights.shape[0])
    points = [
        (float(look.weights[head, point]), head, *look.positions[head, point].tolist())
        for head in range(look.weights.shape[0])
        for point in range(look.weights.shape[1])
    ]
    points = [point for point in points if math.isfinite(point[2]) and math.isfinite(point[3])]
    for weight, head, x, y in sorted(points, reverse=True):  # small ones on top
        centre = tuple(_SMOOTH * side for side in view.place(x, y))
        _disc(draw, (centre[0], centre[1]), unit * math.sqrt(max(weight, 0.0)), palette[head])
    x0, y0 = (_SMOOTH * side for side in view.place(*detection.box[:2]))
    x1, y1 = (_SMOOTH * side for side in view.place(*detection.box[2:]))
    frame = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
    draw.rectangle(grown(frame, _SMOOTH), outline=(*INK, 255), width=3 * _SMOOTH)
    draw.rectangle(frame, outline=(*PAPER, 255), width=_SMOOTH)
    if look.reference is not None:
        middle = tuple(_SMOOTH * side for side in view.place(*look.reference))
        _cross(draw, (middle[0], middle[1]), 9 * _SMOOTH)
    pale.paste(layer, mask=layer)
    return pale.resize(view.size, Image.Resampling.BOX)


def _within(window: Rectangle, size: tuple[int, int]) -> Rectangle:
    return max(0, window[0]), max(0, window[1]), min(size[0], window[2]), min(size[1], window[3])


def _radius_of_one(longest: int) -> float:
    """The radius of a point with the attention weight 1; areas go with the weights."""
    return max(16.0, longest / 18)


def _disc(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, colour: Colour
) -> None:
    radius = max(radius, 1.5 * _SMOOTH)
    # Pillow's pixel i covers [i, i + 1]: half a pixel less on each side centres the disc.
    x, y = centre[0] - 0.5, centre[1] - 0.5
    draw.ellipse(
        (x - radius, y - radius, x + radius, y + radius), fill=(*colour, 205),
        outline=(*INK, 230), width=_SMOOTH,
    )  # fmt: skip


def _cross(draw: ImageDraw.ImageDraw, centre: tuple[float, float], arm: float) -> None:
    x, y = centre[0] - 0.5, centre[1] - 0.5
    for fill, width, length in ((INK, 5, arm + _SMOOTH), (PAPER, 2, arm)):
        half = width * _SMOOTH / 2
        draw.rectangle((x - length, y - half, x + length, y + half), fill=(*fill, 255))
        draw.rectangle((x - half, y - length, x + half, y + length), fill=(*fill, 255))


def _legend(width: int, heads: int, longest: int) -> Image.Image:
    """One or more lines: the colours of the heads, the sizes of the weights, the markers."""
    letters = font(14)
    scratch = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    unit = _radius_of_one(longest)
    height = max(30, round(2 * unit * math.sqrt(0.3)) + 6)
    items: list[tuple[str, str, float, Colour]] = [
        ("disc", f"head {head}" if head == 0 else str(head), 7.0, colour)
        for head, colour in enumerate(colours(heads))
    ]
    items += [
        ("disc", text, unit * math.sqrt(weight), (200, 200, 200))
        for text, weight in (("attention weight 0.3", 0.3), ("0.1", 0.1), ("0.02", 0.02))
    ]
    items += [("cross", "reference point", 8, PAPER), ("box", "detected box", 8, PAPER)]
    places, x, y = [], 0.0, 0
    for kind, text, radius, colour in items:
        length = 2 * radius + 8 + scratch.textlength(text, font=letters) + 16
        if x + length > width and x > 0:
            x, y = 0.0, y + height
        places.append((x, y, kind, text, radius, colour))
        x += length
    page = Image.new("RGB", (width, y + height), PAPER)
    draw = ImageDraw.Draw(page)
    large = Image.new("RGBA", (width * _SMOOTH, (y + height) * _SMOOTH))
    marks = ImageDraw.Draw(large)
    for x, y, kind, text, radius, colour in places:
        centre = (_SMOOTH * (x + radius + 1), _SMOOTH * (y + height / 2))
        if kind == "disc":
            _disc(marks, centre, radius * _SMOOTH, colour)
        elif kind == "cross":
            _cross(marks, centre, radius * _SMOOTH)
        else:
            side = radius * _SMOOTH
            frame = (centre[0] - side, centre[1] - side, centre[0] + side, centre[1] + side)
            marks.rectangle(grown(frame, _SMOOTH), outline=(*INK, 255), width=4 * _SMOOTH)
            marks.rectangle(frame, outline=(*PAPER, 255), width=2 * _SMOOTH)
        draw.text((x + 2 * radius + 7, y + height / 2), text, font=letters, fill=INK, anchor="lm")
    small = large.resize(page.size, Image.Resampling.BOX)
    page.paste(small, mask=small)
    return page
