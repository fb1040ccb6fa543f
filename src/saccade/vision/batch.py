"""Many images through one detector: a broken one is reported, and the others are processed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from saccade.vision import MAX_MEGAPIXELS
from saccade.vision.detector import Detector
from saccade.vision.images import ImageError, open_image
from saccade.vision.report import Outputs, plan_outputs, write_outputs


class ProcessedImage(NamedTuple):
    """The outcome for one image."""

    path: Path
    objects: list[tuple[str, float]]
    """Label and score of each detected object, best first."""
    files: Outputs | None
    problem: str | None
    """Why the image was skipped, or None."""


def detect_images(
    detector: Detector,
    paths: Sequence[Path],
    folder: Path,
    threshold: float = 0.5,
    layer: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Iterator[ProcessedImage]:
    """Detects objects in each image and writes the results, yielding after each image.

    Images are processed one at a time. The result of an image then does not depend on the others,
    as it would if they were padded to a common size, and memory stays small.

    Args:
        detector: a loaded detector.
        paths: the image files.
        folder: an existing folder for the results.
        threshold: the score that an object must exceed, 0 to 1.
        layer: the decoder layer whose looks are drawn, 1 the first; None means the last.
        max_megapixels: larger images are skipped; see `open_image`.
    """
    for path, files in zip(paths, plan_outputs(paths, folder), strict=True):
        try:
            image = open_image(path, max_megapixels)
        except ImageError as error:
            yield ProcessedImage(path, [], None, str(error))
            continue
        try:
            result = detector.detect([image], threshold, layer)[0]
            write_outputs(files, path, image, result, detector, threshold)
        except OSError as error:
            problem = f"has results that cannot be written: {error.strerror or error}"
            yield ProcessedImage(path, [], None, problem)
        except Exception as error:  # image processors fail on a size of 1 x 5000, for example
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            problem = f"has {image.width} x {image.height} pixels and cannot be processed: {reason}"
            yield ProcessedImage(path, [], None, problem)
        else:
            objects = [(detection.label, detection.score) for detection in result.detections]
            yield ProcessedImage(path, objects, files, None)
