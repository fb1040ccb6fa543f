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


class Plain(torch.nn.Module):
    """A detector with one tensor in and two out, which every runtime takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        found = self.model(pixel_values=pixel_values)
        return found.logits, found.pred_boxes


def embedded_detector():
    """The model that comes with saccade, and the shipped scenes as its input."""
    from saccade.vision.detector import Detector

    detector = Detector.load()
    pictures = [Image.open(path).convert("RGB") for path in SCENES]
    pixels = detector.processor(images=pictures, return_tensors="pt")["pixel_values"]
    return Plain(detector.model).eval(), pixels


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


def box_iou(first, second):
    """Of boxes (centre x, centre y, width, height), pair by pair."""
    low = torch.maximum(*(box[:, :2] - box[:, 2:] / 2 for box in (first, second)))
    high = torch.minimum(*(box[:, :2] + box[:, 2:] / 2 for box in (first, second)))
    common = (high - low).clamp(min=0).prod(-1)
    return common / (first[:, 2:].prod(-1) + second[:, 2:].prod(-1) - common)


def assert_same_detections(found, expected):
    """The same classes from the same queries, boxes with an IoU above 0.99."""
    names, boxes = detections(found)
    wanted_names, wanted = detections(expected)
    assert len(wanted_names) > 5
    assert names == wanted_names
    assert box_iou(boxes, wanted).min() > 0.99
