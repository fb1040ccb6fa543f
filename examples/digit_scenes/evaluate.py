"""Measures a detector on the held-out digit scenes, through Saccade's operator.

python evaluate.py                                     # the model that Saccade ships
python evaluate.py --model runs/default/model --output figures.json
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
from scenes import SCENE_SIZE, TEST_SCENES, coco_dataset, make_scene
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import logging

import saccade
from saccade.terminal import MAX_THREADS

SHIPPED_MODEL = Path(saccade.__file__).parent / "vision" / "model"
SHIPPED_SCENES = Path(__file__).parent / "scenes"
SHIPPED_INDICES = (32, 100)  # held-out scenes that show digits of many sizes over both photographs
SHIPPED_THRESHOLD = 0.5  # detections with a lower score are not part of expected.json
METRICS = ("AP", "AP50", "AP75")  # pycocotools' order
PACKAGES = ("torch", "transformers", "pycocotools", "numpy", "pillow", "scikit-learn")

Detection = dict[str, Any]


@torch.inference_mode()
def detect(
    model: torch.nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    batch_size: int = 16,
) -> list[list[Detection]]:
    """Detects objects in images of one size.

    Returns:
        For each image its detections, best score first: `category_id`, `score` and `bbox` (left,
        top, width, height, in pixels).
    """
    device = next(model.parameters()).device
    detections: list[list[Detection]] = []
    for start in range(0, len(images), batch_size):
        chunk = list(images[start : start + batch_size])
        inputs = processor(images=chunk, return_tensors="pt").to(device)
        sizes = [(image.height, image.width) for image in chunk]
        for result in processor.post_process_object_detection(model(**inputs), 0.0, sizes):
            boxes = result["boxes"].cpu()
            boxes[:, 2:] -= boxes[:, :2]
            detections.append(
                [
                    {"category_id": label, "score": score, "bbox": bbox}
                    for label, score, bbox in zip(
                        result["labels"].tolist(),
                        result["scores"].tolist(),
                        boxes.tolist(),
                        strict=True,
                    )
                ]
            )
    return detections


def average_precision(
    dataset: dict[str, Any], detections: list[list[Detection]]
) -> dict[str, float]:
    """Returns COCO's metrics.

    Args:
        dataset: a COCO dictionary with the truth.
        detections: the detections of each of its images, in their order.
    """
    results = [
        {"image_id": image["id"], **detection}
        for image, image_detections in zip(dataset["images"], detections, strict=True)
        for detection in image_detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every stage
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: round(float(evaluation.stats[i]), 4) for i, name in enumerate(METRICS)}


def load(folder: Path) -> tuple[torch.nn.Module, Any]:
    """Returns the model of a transformers folder, running through Saccade, and its processor."""
    options = {"trust_remote_code": False, "local_files_only": True}
    model = AutoModelForObjectDetection.from_pretrained(folder, **options)
    saccade.patch(model)
    return model.eval(), AutoImageProcessor.from_pretrained(folder, **options)


def write_shipped_scenes(model: torch.nn.Module, processor: Any, folder: Path) -> Path:
    """Writes the scenes that ship with the examples, and what the model finds in them.

    Returns:
        The path of `expected.json`: for each image label, score and box (left, top, right,
        bottom, in pixels) of its detections, best score first.
    """
    folder.mkdir(exist_ok=True)
    expected = {}
    for number, index in enumerate(SHIPPED_INDICES):
        image, _ = make_scene("test", index)
        name = f"scene_{number}.png"
        image.save(folder / name)
        expected[name] = [
            {
                "label": model.config.id2label[detection["category_id"]],
                "score": round(detection["score"], 4),
                "box": [round(v, 2) for v in (x, y, x + width, y + height)],
            }
            for detection in detect(model, processor, [image])[0]
            for x, y, width, height in [detection["bbox"]]
            if detection["score"] > SHIPPED_THRESHOLD
        ]
    path = folder / "expected.json"
    path.write_text(json.dumps(expected, indent=1) + "\n")
    return path


def main(
    model: Annotated[
        Path, typer.Option(help="A transformers folder.", exists=True, file_okay=False)
    ] = SHIPPED_MODEL,
    count: Annotated[int, typer.Option(help="Number of held-out scenes.")] = TEST_SCENES,
    width: Annotated[int, typer.Option(help="Width of the scenes.")] = SCENE_SIZE[0],
    height: Annotated[int, typer.Option(help="Height of the scenes.")] = SCENE_SIZE[1],
    threads: Annotated[
        int, typer.Option(min=0, max=MAX_THREADS, help="CPU threads for PyTorch; 0: its choice.")
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the metrics.")] = None,
    write_expected: Annotated[
        bool, typer.Option("--write-expected", help="Only write the scenes that are shipped.")
    ] = False,
) -> None:
    """Measures the average precision of a detector on the held-out digit scenes."""
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    detector, processor = load(model)
    if write_expected:
        print(write_shipped_scenes(detector, processor, SHIPPED_SCENES))
        return
    dataset, images = coco_dataset("test", count, size=(width, height))
    started = time.perf_counter()
    detections = detect(detector, processor, images)
    seconds = time.perf_counter() - started
    # Equal digests: the figures were measured on the very same pixels.
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
    report = {
        **average_precision(dataset, detections),
        "scenes": count,
        "digits": len(dataset["annotations"]),
        "size": [width, height],
        "scenes_sha256": digest,
        "milliseconds_per_scene": round(1000.0 * seconds / count, 2),
        "threads": torch.get_num_threads(),
        "backend": saccade.which_backend(*detector.parameters()).name,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "saccade": saccade.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
