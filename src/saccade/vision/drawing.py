"""Draws detections, and holds what both drawings of `saccade detect` share."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from saccade.vision.detector import Detection

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Rectangle = tuple[float, float, float, float]

MIN_LONGER_SIDE = 640
"""An image whose longer side is shorter is enlarged, so that labels can be read."""
MAX_LONGER_SIDE = 4096
"""An image whose longer side is longer is reduced, so that its drawing takes seconds at most."""
INK, GREY, PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
# Okabe and Ito's colours, which colour-blind people can tell apart too.
_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0),
    (240, 228, 66), (0, 114, 178), (204, 121, 167), (40, 40, 40),
)  # fmt: skip


def colours(count: int) -> list[Colour]:
    """Returns `count` colours: easy to tell apart up to eight, evenly spaced hues beyond."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    wheel = (colorsys.hsv_to_rgb(index / count, 0.75, 0.9) for index in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in wheel]


def draw_detections(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """Draws a box, label and score for each object onto a copy of the image.

    Args:
        image: the original image, RGB.
        detections: their boxes are in pixels of `image`.

    Returns:
        An RGB image, enlarged by a whole factor if its longer side is below `MIN_LONGER_SIDE`, and
        reduced to `MAX_LONGER_SIDE` if it is longer.
    """
    longest = max(image.size)
    zoom: float = math.ceil(MIN_LONGER_SIDE / longest)
    if longest > MAX_LONGER_SIDE:
        zoom = MAX_LONGER_SIDE / longest
    size = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    canvas = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    draw = ImageDraw.Draw(canvas)
    longest = max(size)
    line, letters = max(2, round(longest / 400)), font(max(15, round(longest / 45)))
    boxes = [_fit(detection.box, zoom, canvas.size, line) for detection in detections]
    # The best object is drawn last, on top of the others.
    for detection, box in reversed(list(zip(detections, boxes, strict=True))):
        draw.rectangle(grow(box, 1), outline=INK, width=line + 2)
        draw.rectangle(box, outline=_label_colour(detection), width=line)
    taken: list[Rectangle] = []
    for detection, box in zip(detections, boxes, strict=True):
        _draw_tag(draw, detection, box, letters, canvas.size, taken)
    return canvas


def _label_colour(detection: Detection) -> Colour:
    return _COLOURS[:-1][detection.label_id % (len(_COLOURS) - 1)]


def _fit(box: Rectangle, zoom: float, size: tuple[int, int], line: int) -> Rectangle:
    """Converts a box to pixels of the canvas, clipped so that its outline is visible."""
    x0, y0, x1, y1 = (zoom * side for side in box)
    left, top = min(max(x0, 0), size[0] - 1), min(max(y0, 0), size[1] - 1)
    # Pillow's far corner is the last pixel of the box, not the edge behind it.
    right = max(left, min(max(x1, 0), size[0]) - 1)
    bottom = max(top, min(max(y1, 0), size[1]) - 1)
    return left, top, right, bottom


def grow(box: Rectangle, by: float) -> Rectangle:
    """Returns `box` with every side moved outwards."""
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    detection: Detection,
    box: Rectangle,
    letters: Font,
    size: tuple[int, int],
    taken: list[Rectangle],
) -> None:
    """Draws label and score beside the box, where they cover other tags and the border least."""
    text = f"{shorten(detection.label, 24)} {detection.score:.2f}"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
    pad = max(2, round((bottom - top) / 4))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    corners = (
        (box[0] - 1, box[1] - height), (box[0] - 1, box[3] + 1), (box[2] - width, box[1] - height),
        (box[2] - width, box[3] + 1), (box[0], box[1]), (box[0], box[3] - height),
    )  # fmt: skip
    tags = []
    for x, y in corners:
        inside_x = min(max(x, 0), max(0, size[0] - width))
        inside_y = min(max(y, 0), max(0, size[1] - height))
        tag = (inside_x, inside_y, inside_x + width, inside_y + height)
        covered = sum(_overlap(tag, other) for other in taken)
        tags.append((covered + 0.5 * (abs(inside_x - x) + abs(inside_y - y)) * height, tag))
    tag = min(tags, key=lambda candidate: candidate[0])[1]
    taken.append(tag)
    fill = _label_colour(detection)
    draw.rectangle(tag, fill=fill, outline=INK)
    light = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 110
    draw.text(
        (tag[0] + pad - left, tag[1] + pad - top), text, font=letters, fill=INK if light else PAPER
    )


def _overlap(first: Rectangle, second: Rectangle) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)


def shorten(text: str, length: int) -> str:
    """Cuts `text` to one line of `length` letters."""
    text = " ".join(text.split())  # Pillow measures one line only.
    return text if len(text) <= length else text[: length - 1] + "…"


@functools.cache
def font(size: int) -> Font:
    """Loads DejaVu, which matplotlib ships and which covers most alphabets; else Pillow's own font."""
    spec = util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
