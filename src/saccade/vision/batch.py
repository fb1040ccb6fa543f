"""Many pictures through one detector: a broken one is reported, and the rest go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from saccade.vision.detector import Detector
from saccade.vision.pictures import PictureError, open_picture
from saccade.vision.report import Outputs, plan_outputs, write_outputs


class PictureDone(NamedTuple):
    """What came of one picture."""

    picture: Path
    found: list[tuple[str, float]]
    """Label and score of each object, best first."""
    files: Outputs | None
    problem: str | None
    """Why the picture was skipped, or None."""


def detect_pictures(
    detector: Detector,
    pictures: Sequence[Path],
    folder: Path,
    threshold: float = 0.5,
    layer: int | None = None,
) -> Iterator[PictureDone]:
    """Detects in each picture and writes the results, yielding after each.

    One picture at a time: a picture's result does not depend on its neighbours, as it would if they
    were padded to a common size, and memory stays small.

    Args:
        detector: a loaded detector.
        pictures: their files.
        folder: an existing folder for the results.
        threshold: the score that an object must exceed, 0 to 1.
        layer: which decoder layer's looks to draw, 1 the first; None: the last.
    """
    for path, files in zip(pictures, plan_outputs(pictures, folder), strict=True):
        try:
            picture = open_picture(path)
            result = detector.detect([picture], threshold, layer)[0]
            write_outputs(files, path, picture, result, detector, threshold)
        except PictureError as error:
            yield PictureDone(path, [], None, str(error))
        except OSError as error:
            yield PictureDone(path, [], None, f"its results cannot be written: {error}")
        except Exception as error:  # a size of 1 x 5000 fails inside image processors
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            yield PictureDone(path, [], None, f"cannot be processed: {reason}")
        else:
            found = [(detection.label, detection.score) for detection in result.detections]
            yield PictureDone(path, found, files, None)
