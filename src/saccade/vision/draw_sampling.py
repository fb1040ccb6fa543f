"""Draws where the queries of the detected objects looked."""

from __future__ import annotations

import math
from typing import NamedTuple

from PIL import Image, ImageDraw

from saccade.vision.detector import Detection, ImageResult
from saccade.vision.drawing import (
    GREY,
    INK,
    PAPER,
    Colour,
    Rectangle,
    colours,
    font,
    grow,
    shorten,
)

MAX_OBJECTS = 12
"""Only the looks of this many objects with the best scores are drawn."""

# Markers are drawn this much larger and then reduced, because Pillow's circles have ragged edges.
_SMOOTH = 2


class View(NamedTuple):
    """A part of the original image, and the size it is drawn at."""

    left: float
    top: float
    zoom: float
    size: tuple[int, int]
    """(width, height) of the drawing in pixels."""

    @property
    def window(self) -> Rectangle:
        """(x0, y0, x1, y1) of the part, in pixels of the original image."""
        width, height = self.size
        return self.left, self.top, self.left + width / self.zoom, self.top + height / self.zoom

    def to_drawing(self, x: float, y: float) -> tuple[float, float]:
        """Converts a position in the original image to a position in the drawing."""
        return (x - self.left) * self.zoom, (y - self.top) * self.zoom


def draw_looks(image: Image.Image, result: ImageResult, threshold: float) -> Image.Image:
    """Draws where the query of each object looked, in one panel per object.

    A panel shows the part of the image that holds the object's box and its sampling points. The
    points are coloured by head, and their area is the attention weight.

    Args:
        image: the original image, RGB.
        result: the objects detected in it; at most `MAX_OBJECTS` of them are drawn.
        threshold: the score that the objects exceed; the title names it if there are no objects.

    Returns:
        An RGB image of about 700 to 1500 pixels.
    """
    shown = result.detections[:MAX_OBJECTS]
    columns = {0: 1, 1: 1, 2: 2, 3: 3, 4: 2}.get(len(shown), 3 if len(shown) <= 9 else 4)
    longest = {1: 760, 2: 560, 3: 460, 4: 380}[columns]
    panel_size = _panel_size(image.size, longest)
    title, note = _title(result, threshold)
    heads = shown[0].look.weights.shape[0] if shown else 0
    panels = [_panel(image, detection, panel_size) for detection in shown]
    if not panels:
        zoom = min(panel_size[0] / image.width, panel_size[1] / image.height)
        size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
        panels = [image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)]
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
        corner = (left + column * (cell_width + margin), top + row * (cell_height + margin))
        page.paste(panel, corner)
    if legend:
        page.paste(legend, (margin, height - legend.height - 6))
    return page


def _title(result: ImageResult, threshold: float) -> tuple[str, str]:
    count = len(result.detections)
    layer = f"Cross attention of decoder layer {result.layer} of {result.num_layers}"
    if count == 0:
        return f"No object with a score above {threshold:g}", "No query to show."
    if count == 1:
        return "Where the query of the detected object looked", f"{layer}."
    title = f"Where the queries of the {count} detected objects looked"
    shown = f"; the {MAX_OBJECTS} of {count} with the best scores" if count > MAX_OBJECTS else ""
    return title, f"{layer}{shown}."


def _panel_size(image_size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Returns a size in the proportions of the image, at most 2:1."""
    aspect = min(2.0, max(0.5, image_size[0] / image_size[1]))
    if aspect >= 1:
        return longest, round(longest / aspect)
    return round(longest * aspect), longest


def find_view(
    detection: Detection, image_size: tuple[int, int], panel_size: tuple[int, int]
) -> View:
    """Finds the part of an image that holds an object's box and its points, with a margin.

    Distant points that together hold at most 5 % of the attention do not widen the view.

    Args:
        detection: an object in the image.
        image_size: (width, height) of the image.
        panel_size: (width, height) of the largest drawing that fits.

    Returns:
        View: within the image; points outside the image do not widen it.
    """
    xs, ys = [*detection.box[::2]], [*detection.box[1::2]]
    points = _get_near_points(detection)
    if detection.look.reference is not None:
        points.append(detection.look.reference)
    for x, y in points:
        if 0 <= x <= image_size[0] and 0 <= y <= image_size[1]:
            xs.append(x)
            ys.append(y)
    low = (min(max(min(xs), 0), image_size[0]), min(max(min(ys), 0), image_size[1]))
    high = (min(max(max(xs), 0), image_size[0]), min(max(max(ys), 0), image_size[1]))
    # The extent and a margin must fit, and the view never exceeds the whole image.
    full_zoom = min(panel_size[0] / image_size[0], panel_size[1] / image_size[1])
    extent = [1.25 * max(high[axis] - low[axis], 8.0) for axis in (0, 1)]
    zoom = max(full_zoom, min(panel_size[0] / extent[0], panel_size[1] / extent[1]))
    if zoom < 1.5 * full_zoom:
        zoom = full_zoom  # The view would hold nearly everything: the whole image is clearer.
    corner, size = [], []
    for axis in (0, 1):
        length = min(image_size[axis], panel_size[axis] / zoom)
        middle = (low[axis] + high[axis]) / 2
        corner.append(min(max(middle - length / 2, 0), image_size[axis] - length))
        size.append(max(1, round(length * zoom)))
    return View(corner[0], corner[1], zoom, (size[0], size[1]))


def _get_near_points(detection: Detection) -> list[tuple[float, float]]:
    """Returns the points without the farthest from the box, which hold at most 5 % of the attention."""
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
            return [position for _, _, position in points[index:]]
    return []


def _panel(image: Image.Image, detection: Detection, panel_size: tuple[int, int]) -> Image.Image:
    view = find_view(detection, image.size, panel_size)
    caption, large, small = 26, font(16), font(12)
    page = Image.new("RGB", (panel_size[0], panel_size[1] + caption), PAPER)
    draw = ImageDraw.Draw(page)
    text = f"{shorten(detection.label, 20)} {detection.score:.2f}"
    draw.text((0, 2), text, font=large, fill=INK)
    begin = draw.textlength(text, font=large) + 10
    for note in (_panel_note(detection, view), f"query {detection.query}"):
        if begin + draw.textlength(note, font=small) <= panel_size[0]:
            draw.text((begin, 6), note, font=small, fill=GREY)
            break
    drawing = draw_look(image, detection, view)
    page.paste(drawing, ((panel_size[0] - view.size[0]) // 2, caption))
    return page


def _panel_note(detection: Detection, view: View) -> str:
    x0, y0, x1, y1 = view.window
    points = detection.look.positions.flatten(0, 1).tolist()
    outside = sum(not (x0 <= x <= x1 and y0 <= y <= y1) for x, y in points)
    beyond = f", {outside} of {len(points)} points outside this view" if outside else ""
    return f"query {detection.query}{beyond}"


def draw_look(image: Image.Image, detection: Detection, view: View) -> Image.Image:
    """Draws one object's box, reference point and sampling points over a part of the image.

    Returns:
        An RGB image of the size `view.size`; its background is pale, so that points stand out.
    """
    large = (view.size[0] * _SMOOTH, view.size[1] * _SMOOTH)
    zoom = view.zoom * _SMOOTH
    resampling = Image.Resampling.LANCZOS if zoom < 1 else Image.Resampling.BICUBIC
    window = _clip(view.window, image.size)
    base = image.resize(large, resampling, window, reducing_gap=2.0)
    pale = Image.blend(base, base.convert("L").convert("RGB"), 0.5)
    pale = Image.blend(pale, Image.new("RGB", large, PAPER), 0.3)
    layer = Image.new("RGBA", large)
    draw = ImageDraw.Draw(layer)
    unit = _unit_radius(max(view.size)) * _SMOOTH
    look = detection.look
    palette = colours(look.weights.shape[0])
    points = [
        (float(look.weights[head, point]), head, *look.positions[head, point].tolist())
        for head in range(look.weights.shape[0])
        for point in range(look.weights.shape[1])
    ]
    points = [point for point in points if math.isfinite(point[2]) and math.isfinite(point[3])]
    for weight, head, x, y in sorted(points, reverse=True):  # Small markers end up on top.
        centre = tuple(_SMOOTH * side for side in view.to_drawing(x, y))
        _disc(draw, (centre[0], centre[1]), unit * math.sqrt(max(weight, 0.0)), palette[head])
    x0, y0 = (_SMOOTH * side for side in view.to_drawing(*detection.box[:2]))
    x1, y1 = (_SMOOTH * side for side in view.to_drawing(*detection.box[2:]))
    frame = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
    draw.rectangle(grow(frame, _SMOOTH), outline=(*INK, 255), width=3 * _SMOOTH)
    draw.rectangle(frame, outline=(*PAPER, 255), width=_SMOOTH)
    if look.reference is not None:
        middle = tuple(_SMOOTH * side for side in view.to_drawing(*look.reference))
        _cross(draw, (middle[0], middle[1]), 9 * _SMOOTH)
    pale.paste(layer, mask=layer)
    return pale.resize(view.size, Image.Resampling.BOX)


def _clip(window: Rectangle, size: tuple[int, int]) -> Rectangle:
    return max(0, window[0]), max(0, window[1]), min(size[0], window[2]), min(size[1], window[3])


def _unit_radius(longest: int) -> float:
    """Returns the radius of a marker with the attention weight 1; areas grow with the weights."""
    return max(16.0, longest / 18)


def _disc(
    draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, colour: Colour
) -> None:
    radius = max(radius, 1.5 * _SMOOTH)
    # Pillow's pixel i covers [i, i + 1]: a shift by half a pixel centres the disc.
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
    """Draws the legend: the colours of the heads, the sizes of the weights, the other markers."""
    letters = font(14)
    scratch = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    unit = _unit_radius(longest)
    height = max(30, round(2 * unit * math.sqrt(0.3)) + 6)
    entries: list[tuple[str, str, float, Colour]] = [
        ("disc", f"head {head}" if head == 0 else str(head), 7.0, colour)
        for head, colour in enumerate(colours(heads))
    ]
    entries += [
        ("disc", text, unit * math.sqrt(weight), (200, 200, 200))
        for text, weight in (("attention weight 0.3", 0.3), ("0.1", 0.1), ("0.02", 0.02))
    ]
    entries += [("cross", "reference point", 8, PAPER), ("box", "detected box", 8, PAPER)]
    placed, x, y = [], 0.0, 0
    for kind, text, radius, colour in entries:
        length = 2 * radius + 8 + scratch.textlength(text, font=letters) + 16
        if x + length > width and x > 0:
            x, y = 0.0, y + height
        placed.append((x, y, kind, text, radius, colour))
        x += length
    page = Image.new("RGB", (width, y + height), PAPER)
    draw = ImageDraw.Draw(page)
    large = Image.new("RGBA", (width * _SMOOTH, (y + height) * _SMOOTH))
    marks = ImageDraw.Draw(large)
    for x, y, kind, text, radius, colour in placed:
        centre = (_SMOOTH * (x + radius + 1), _SMOOTH * (y + height / 2))
        if kind == "disc":
            _disc(marks, centre, radius * _SMOOTH, colour)
        elif kind == "cross":
            _cross(marks, centre, radius * _SMOOTH)
        else:
            side = radius * _SMOOTH
            frame = (centre[0] - side, centre[1] - side, centre[0] + side, centre[1] + side)
            marks.rectangle(grow(frame, _SMOOTH), outline=(*INK, 255), width=4 * _SMOOTH)
            marks.rectangle(frame, outline=(*PAPER, 255), width=2 * _SMOOTH)
        draw.text((x + 2 * radius + 7, y + height / 2), text, font=letters, fill=INK, anchor="lm")
    small = large.resize(page.size, Image.Resampling.BOX)
    page.paste(small, mask=small)
    return page
