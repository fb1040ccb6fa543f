"""The files that `saccade detect` writes: their names, and the JSON for an image."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from saccade.files import as_text, write_whole
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
    resolve = cache(os.path.realpath)  # once per folder

    def get_key(path: Path) -> str:
        """Returns a key that all spellings of one directory entry share."""
        return _fold(os.path.join(resolve(path.parent), path.name))

    inputs = {get_key(path) for path in paths}
    # Links to an input, and its other spellings on this file system, are the same file.
    identities = {identity for path in paths if (identity := _identify(path)) is not None}
    taken: set[str] = set()
    next_numbers: dict[str, int] = {}
    planned = []
    for path in paths:
        stem = _fold(path.stem)
        number = next_numbers.get(stem, 1)
        while True:
            files = _name_outputs(folder, path.stem if number == 1 else f"{path.stem}-{number}")
            number += 1
            if get_key(files.json) not in taken and not any(
                get_key(file) in inputs or _identify(file) in identities for file in files
            ):
                break
        next_numbers[stem] = number
        taken.add(get_key(files.json))
        planned.append(files)
    return planned


def _name_outputs(folder: Path, name: str) -> Outputs:
    return Outputs(
        folder / f"{name}_detections.png", folder / f"{name}_looked.png", folder / f"{name}.json"
    )


def _fold(name: str) -> str:
    """Removes what some file systems do not distinguish: A and a, composed and decomposed letters."""
    return unicodedata.normalize("NFC", name.casefold())


def _identify(path: Path) -> tuple[int, int] | None:
    """Returns device and number of the file that a path leads to, or None."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def describe(
    image_path: Path,
    image: Image.Image,
    result: ImageResult,
    detector: Detector,
    threshold: float,
) -> dict[str, Any]:
    """Describes the detections as plain data for JSON.

    Returns:
        A dict with `image` (its path; bytes that are not UTF-8 become escapes), `width` and
        `height` (pixels, upright), `model`, `threshold`, `backend` and `detections`: a list of
        `label`, `label_id`, `score`, `box` ([x0, y0, x1, y1] in pixels of the upright image, 0 is
        its left or upper edge; boxes may extend beyond the edges) and `query`.
    """
    return {
        "image": as_text(image_path),
        "width": image.width,
        "height": image.height,
        "model": as_text(detector.name),
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
    """Writes all files for one image, or none of them.

    Raises:
        OSError: a file cannot be written.
        ValueError: a score or a box is not finite, which JSON cannot express.
    """
    report = describe(image_path, image, result, detector, threshold)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    with write_whole(files.json) as temporary:
        detections = draw_detections(image, result.detections)
        detections.save(temporary.with_name(files.detections.name))
        draw_looks(image, result, threshold).save(temporary.with_name(files.looks.name))
        temporary.write_text(text + "\n", encoding="utf-8")
