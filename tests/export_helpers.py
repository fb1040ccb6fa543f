"""What the tests of export share: modules by the recipe of docs/export.md, the embedded detector."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch.export import Dim

import saccade
from saccade.integrations.tracing import symbolic_sizes

ROOT = Path(__file__).resolve().parent.parent
SCENES = [ROOT / f"examples/digit_scenes/scenes/scene_{number}.png" for number in (0, 1)]
CHANNELS, HEADS = 32, 4


class Levels(torch.nn.Module):
    """Feature maps to the module; the sizes are those of the maps."""

    def __init__(self):
        super().__init__()
        self.attention = saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4)

    def forward(self, query, reference_points, fine, coarse):
        shapes = [feature_map.shape[2:] for feature_map in (fine, coarse)]
        value = torch.cat([each.flatten(2).transpose(1, 2) for each in (fine, coarse)], 1)
        return self.attention(query, reference_points, value, shapes)


class Operator(torch.nn.Module):
    """The operator alone, on one map [B, H, W, M, D]."""

    def forward(self, feature_map, locations, weights):
        shapes = [feature_map.shape[1:3]]
        return saccade.deformable_attention(feature_map.flatten(1, 2), shapes, locations, weights)


class FusedOperator(torch.nn.Module):
    """The fused operator alone, on one map [B, H, W, M, D]."""

    def forward(self, feature_map, reference_points, offsets, logits):
        return saccade.fused_deformable_attention(
            feature_map.flatten(1, 2), [feature_map.shape[1:3]], reference_points, offsets, logits
        )


def of_levels(batch, queries, height, width):
    return (
        torch.randn(batch, queries, CHANNELS),
        torch.rand(batch, queries, 1, 2),
        torch.randn(batch, CHANNELS, height, width),
        torch.randn(batch, CHANNELS, height // 2, width // 2),
    )


def of_operator(batch, queries, height, width):
    return (
        torch.randn(batch, height, width, HEADS, 8),
        torch.rand(batch, queries, HEADS, 1, 4, 2),
        torch.rand(batch, queries, HEADS, 1, 4),
    )


def of_fused(batch, queries, height, width):
    feature_map, offsets, logits = of_operator(batch, queries, height, width)
    return feature_map, torch.rand(batch, queries, 1, 2), offsets, logits


def of_a_map(batch, queries, height, width):
    query = torch.randn(batch, queries, CHANNELS)
    return query, torch.randn(batch, height, width, CHANNELS)


def of_a_convolution(batch, queries, height, width):
    return (torch.randn(batch, height, width, CHANNELS),)


AUTO = Dim.DYNAMIC
QUERIES = {0: AUTO, 1: AUTO}
CHANNELS_FIRST = {0: AUTO, 2: AUTO, 3: AUTO}
CHANNELS_LAST = {0: AUTO, 1: AUTO, 2: AUTO}
# How each is made, its inputs, and which axes are dynamic.
CASES = {
    "op": (Operator, of_operator, (CHANNELS_LAST, QUERIES, QUERIES)),
    "fused op": (FusedOperator, of_fused, (CHANNELS_LAST, QUERIES, QUERIES, QUERIES)),
    "MultiScaleDeformableAttention": (
        Levels, of_levels, (QUERIES, QUERIES, CHANNELS_FIRST, CHANNELS_FIRST),
    ),
    "DeformableAttention": (
        lambda: saccade.nn.DeformableAttention(CHANNELS, HEADS, 4), of_a_map,
        {"query": QUERIES, "feature_map": CHANNELS_LAST},
    ),
    "DeformableConv": (
        lambda: saccade.nn.DeformableConv(CHANNELS, HEADS), of_a_convolution, (CHANNELS_LAST,),
    ),
}  # fmt: skip


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
