"""Shared by the tests of export: the exported modules, and the embedded detector."""

from __future__ import annotations

import functools
from pathlib import Path

import helpers
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
from saccade.export.verify import MIN_IOU, box_iou
from saccade.integrations.tracing import symbolic_sizes

ROOT = Path(__file__).resolve().parent.parent
NUM_DECODER_LAYERS = 2
SCENES = [ROOT / f"examples/digit_scenes/scenes/scene_{number}.png" for number in (0, 1)]


def make_convolution_inputs(batch, queries, height, width):
    return (torch.randn(batch, height, width, CHANNELS),)


CASES = {name: target for name, target in TARGETS.items() if not target.whole} | {
    "nn.DeformableConv": Target(
        lambda: saccade.nn.DeformableConv(CHANNELS, HEADS),
        make_convolution_inputs,
        (CHANNELS_LAST,),
    )
}


@functools.cache
def embedded_detector():
    """Returns the model that comes with saccade, and the shipped scenes as its input.

    Only the full set of tests keeps all six decoder layers: each of them predicts, and the time that
    exporters and compilers take grows with their number.
    """
    # These import transformers, which some tests of export do not need.
    from saccade.export.detectors import Outputs
    from saccade.vision.detector import Detector

    detector = Detector.load()
    images = [Image.open(path).convert("RGB") for path in SCENES]
    pixels = detector.processor(images=images, return_tensors="pt")["pixel_values"]
    if not helpers.ALL:
        decoder = detector.model.model.decoder
        decoder.layers = decoder.layers[:NUM_DECODER_LAYERS]
    return Outputs(detector.model).eval(), pixels


@functools.cache
def exported_detector():
    """Returns the embedded detector, its input, and its program with dynamic batch and resolution."""
    model, pixels = embedded_detector()
    with torch.no_grad(), symbolic_sizes():
        program = torch.export.export(model, (pixels,), dynamic_shapes=(CHANNELS_FIRST,))
    return model, pixels, program


def detections(outputs, threshold=0.5):
    """Returns (image, query, label) of each detection, and the boxes."""
    logits, boxes = outputs
    scores, labels = logits.sigmoid().max(-1)
    image, query = (scores > threshold).nonzero(as_tuple=True)
    names = list(zip(image.tolist(), query.tolist(), labels[image, query].tolist(), strict=True))
    return names, boxes[image, query]


def corners(boxes):
    """Converts boxes from (centre x, centre y, width, height) to (x0, y0, x1, y1)."""
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def assert_same_detections(actual, expected):
    """Checks for the same classes from the same queries, and boxes with an IoU above 0.99."""
    names, boxes = detections(actual)
    expected_names, expected_boxes = detections(expected)
    assert len(expected_names) > 5
    assert names == expected_names
    assert box_iou(corners(boxes), corners(expected_boxes)).diagonal().min() > MIN_IOU
