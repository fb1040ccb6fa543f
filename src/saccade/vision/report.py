"""What `saccade detect` writes: file names and the JSON of a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from saccade.vision.detector import Detector, PictureResult
from saccade.vision.drawing import draw_detections
from saccade.vision.looked_drawing import draw_looked


class Outputs(NamedTuple):
    """The files written for one picture."""

    detections: Path
    looked: Path
    json: Path


def plan_outputs(pictures: Sequence[Path], folder: Path) -> list[Outputs]:
    """The files to write for each picture, no two the same and none of them an input.

    They are called after the stem of the picture; pictures with equal stems, from several folders
    or with several endings, become `name`, `name-2`, `name-3`.

    Args:
        pictures: the pictures, as given.
        folder: where the files go.

    Returns:
        One `Outputs` for each picture, in the same order.
    """
    # Not every file system tells A from a.
    inputs = {str(picture.resolve()).casefold() for picture in pictures}
    taken: set[str] = set()
    planned = []
    for picture in pictures:
        number = 1
        while True:
            name = picture.stem if number == 1 else f"{picture.stem}-{number}"
            files = Outputs(
                folder / f"{name}_detections.png",
                folder / f"{name}_looked.png",
                folder / f"{name}.json",
            )
            keys = {str(file.resolve()).casefold() for file in files}
            if not keys & taken and not keys & inputs:
                break
            number += 1
        taken |= keys
        planned.append(files)
    return planned


def describe(
    picture_path: Path,
    picture: Image.Image,
    result: PictureResult,
    detector: Detector,
    threshold: float,
) -> dict[str, Any]:
    """The detections as plain data for JSON.

    Returns:
        A dict with `picture` (the path as given), `width` and `height` (pixels, upright), `model`,
        `threshold`, `backend` and `detections`: a list of `label`, `label_id`, `score`, `box`
        ([x0, y0, x1, y1] in pixels of the upright picture, 0 its left or upper edge; boxes may
        reach over the edges) and `query`.
    """
    return {
        "picture": str(picture_path),
        "width": picture.width,
        "height": picture.height,
        "model": detector.name,
        "threshold": threshold,
        "backend": detector.backend.name,
        "detections": [
            {
                "label": detection.label,
                "label_id": detection.label_id,
                "score": round(detection.score, 4),
                "box": [round(side, 2) for side in detection.box],
                "query": detection.query,
            }
            for detection in result.detections
        ],
    }


def write_outputs(
    files: Outputs,
    picture_path: Path,
    picture: Image.Image,
    result: PictureResult,
    detector: Detector,
    threshold: float,
) -> None:
    """Draws and writes everything there is for one picture.

    Raises:
        OSError: a file cannot be written.
    """
    draw_detections(picture, result.detections).save(files.detections)
    draw_looked(picture, result, threshold).save(files.looked)
    report = describe(picture_path, picture, result, detector, threshold)
    files.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
