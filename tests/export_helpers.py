"""What the tests of export share: what is exported, and the embedded detector."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import saccade
from benchmarks.export_targets import (
    CHANNELS,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    HEADS,
    TARGETS,
    Target,
)
from saccade.export.verify import LEAST_IOU, box_iou
from saccade.integrations.tracing import symbolic_sizes

ROOT = Path(__file__).resolve().parent.parent
SCENES = [ROOT / f"examples/digit_scenes/scenes/scene_{number}.png" for number in (0, 1)]


def of_a_convolution(batch, queries, height, width):
    return (torch.randn(batch, height, width, CHANNELS),)


CASES = {name: target for name, target in TARGETS.items() if not target.whole} | {
    "nn.DeformableConv": Target(
        lambda: saccade.nn.DeformableConv(CHANNELS, HEADS), of_a_convolution, (CHANNELS_LAST,)
    )
}


def embedded_detector():
    """The model that comes with saccade, and the shipped scenes as its input."""
    # transformers, which not every test of export needs
    from saccade.export.detectors import Outputs
    from saccade.vision.detector import Detector

    detector = Detector.load()
    pictures = [Image.open(path).convert("RGB") for path in SCENES]
    pixels = detector.processor(images=pictures, return_tensors="pt")["pixel_values"]
    return Outputs(detector.model).eval(), pixels


def export_detector(model, pixels):
    """With a dynamic batch and resolution."""
    with torch.no_grad(), symbolic_sizes():
        return torch.export.export(model, (pixels,), dynamic_shapes=(CHANNELS_FIRST,))


def detections(outputs, threshold=0.5):
    """(image, query, label) and the boxes of what was found."""
    logits, boxes = outputs
    scores, labels = logits.sigmoid().max(-1)
    image, query = (scores > threshold).nonzero(as_tuple=True)
    names = list(zip(image.tolist(), query.tolist(), labels[image, query].tolist(), strict=True))
    return names, boxes[image, query]


def corners(boxes):
    """(x0, y0, x1, y1) of (centre x, centre y, width, height)."""
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def assert_same_detections(found, expected):
    """The same classes from the same queries, boxes with an IoU above 0.99."""
    names, boxes = detections(found)
    wanted_names, wanted = detections(expected)
    assert len(wanted_names) > 5
    assert names == wanted_names
    assert box_iou(corners(boxes), corners(wanted)).diagonal().min() > LEAST_IOU
