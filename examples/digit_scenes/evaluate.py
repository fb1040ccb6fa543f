"""Measure a detector on the held-out digit scenes, through Saccade's operator.

python evaluate.py                                  # the model that Saccade ships
python evaluate.py --model /tmp/digit_scenes_run/model --output figures.json
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import TEST_SCENES, coco_dataset
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import saccade

SHIPPED_MODEL = Path(saccade.__file__).parent / "vision" / "model"
SHIPPED_SCENES = Path(__file__).parent / "scenes"
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
PACKAGES = ("torch", "transformers", "pycocotools", "numpy", "pillow", "scikit-learn")
EXPECTED_SCORE = 0.5  # detections below are not part of expected.json

Detection = dict[str, Any]


@torch.inference_mode()
def detect(
    model: torch.nn.Module,
    processor: Any,
    pictures: Sequence[Image.Image],
    batch_size: int = 16,
    threshold: float = 0.0,
) -> list[list[Detection]]:
    """Return the detections of every picture: ``category_id``, ``score``, ``bbox`` (left, top, width, height)."""
    model.eval()
    device = next(model.parameters()).device
    found: list[list[Detection]] = []
    for start in range(0, len(pictures), batch_size):
        chunk = list(pictures[start : start + batch_size])
        inputs = processor(chunk, return_tensors="pt").to(device)
        sizes = [(picture.height, picture.width) for picture in chunk]
        results = processor.post_process_object_detection(
            model(**inputs), threshold=threshold, target_sizes=sizes
        )
        for result in results:
            corners = result["boxes"].tolist()
            found.append(
                [
                    {"category_id": label, "score": score, "bbox": [x, y, right - x, low - y]}
                    for label, score, (x, y, right, low) in zip(
                        result["labels"].tolist(), result["scores"].tolist(), corners, strict=True
                    )
                ]
            )
    return found


def average_precision(dataset: dict[str, Any], found: list[list[Detection]]) -> dict[str, float]:
    """Return COCO's figures for the detections of the images of a COCO data set, in the order of the images."""
    results = [
        {"image_id": image["id"], **detection}
        for image, detections in zip(dataset["images"], found, strict=True)
        for detection in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every stage
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: round(float(evaluation.stats[i]), 4) for i, name in enumerate(FIGURES)}


def load(folder: Path) -> tuple[torch.nn.Module, Any]:
    """Return the model, running through Saccade, and the image processor of a transformers folder."""
    model = AutoModelForObjectDetection.from_pretrained(folder)
    saccade.patch(model)
    return model, AutoImageProcessor.from_pretrained(folder)


def write_expected(model: torch.nn.Module, processor: Any, folder: Path) -> Path:
    """Write what the model finds in the pictures of a folder to ``expected.json`` there."""
    expected = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as picture:
            detections = detect(model, processor, [picture.convert("RGB")], 1, EXPECTED_SCORE)[0]
        expected[path.name] = [
            {
                "label": model.config.id2label[detection["category_id"]],
                "score": round(detection["score"], 4),
                "bbox": [round(value, 2) for value in detection["bbox"]],
            }
            for detection in detections
        ]
    path = folder / "expected.json"
    path.write_text(json.dumps(expected, indent=1) + "\n")
    return path


def main(
    model: Annotated[Path, typer.Option(help="A transformers folder.")] = SHIPPED_MODEL,
    count: Annotated[int, typer.Option(help="Number of held-out scenes.")] = TEST_SCENES,
    size: Annotated[str, typer.Option(help="Width x height of the scenes.")] = "160x160",
    threads: Annotated[int, typer.Option(help="CPU threads for PyTorch; 0 leaves its choice.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    expected: Annotated[
        bool, typer.Option("--write-expected", help="Only write scenes/expected.json.")
    ] = False,
) -> None:
    """Measure the average precision of a detector on the held-out digit scenes."""
    if threads:
        torch.set_num_threads(threads)
    detector, processor = load(model)
    if expected:
        print(write_expected(detector, processor, SHIPPED_SCENES))
        return
    width, _, height = size.partition("x")
    shape = (int(width), int(height))
    dataset, pictures = coco_dataset("test", count, size=shape)
    digest = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()
    started = time.perf_counter()
    found = detect(detector, processor, pictures)
    seconds = time.perf_counter() - started
    report = {
        **average_precision(dataset, found),
        "scenes": count,
        "digits": len(dataset["annotations"]),
        "size": size,
        "scenes_sha256": digest[:16],
        "seconds_per_scene": round(seconds / count, 5),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {"saccade": saccade.__version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
