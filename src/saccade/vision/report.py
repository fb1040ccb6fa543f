"""The files that `saccade detect` writes: their names, and the JSON for an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from saccade.vision.detector import Detector, ImageResult
from saccade.vision.draw_sampling import draw_looks
from saccade.vision.drawing import draw_detections


class Outputs(NamedTuple):
    """The files written for one image."""

    detections: Path
    looks: Path
    json: Path


def plan_outputs(paths: Sequence[Path], folder: Path) -> list[Outputs]:
    """Chooses the files to write for each image: no name occurs twice, and no input is overwritten.

    The files are named after the stem of the image. Images with equal stems, from several folders
    or with several suffixes, become `name`, `name-2`, `name-3`.

    Args:
        paths: the image files.
        folder: the folder to write to.

    Returns:
        One `Outputs` for each image, in the same order.
    """
    # Some file systems do not distinguish A from a.
    inputs = {str(path.resolve()).casefold() for path in paths}
    taken: set[str] = set()
    planned = []
    for path in paths:
        number = 1
        while True:
            name = path.stem if number == 1 else f"{path.stem}-{number}"
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
    image_path: Path,
    image: Image.Image,
    result: ImageResult,
    detector: Detector,
    threshold: float,
) -> dict[str, Any]:
    """Describes the detections as plain data for JSON.

    Returns:
        A dict with `image` (its path), `width` and `height` (pixels, upright), `model`,
        `threshold`, `backend` and `detections`: a list of `label`, `label_id`, `score`, `box`
        ([x0, y0, x1, y1] in pixels of the upright image, 0 is its left or upper edge; boxes may
        extend beyond the edges) and `query`.
    """
    return {
        "image": str(image_path),
        "width": image.width,
        "height": image.height,
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
    image_path: Path,
    image: Image.Image,
    result: ImageResult,
    detector: Detector,
    threshold: float,
) -> None:
    """Writes all files for one image.

    Raises:
        OSError: a file cannot be written.
    """
    draw_detections(image, result.detections).save(files.detections)
    draw_looks(image, result, threshold).save(files.looks)
    report = describe(image_path, image, result, detector, threshold)
    files.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
