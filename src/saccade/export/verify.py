"""Compares the outputs of two runs of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""The largest difference of a logit or of a box coordinate (0 to 1) that counts as the same."""
MIN_IOU = 0.99
MIN_DETECTIONS = 10
"""At least this many detections are compared, even if fewer exceed the threshold."""
MAX_UNMATCHED_SHARE = 0.02
"""The share of rows that may belong to other queries, in models that select theirs by score."""

Detections = list[dict[str, Tensor]]
"""For each image scores [N], labels [N] and boxes [N, 4] (x0, y0, x1, y1), best score first."""


@dataclass(frozen=True)
class Comparison:
    """The differences between a run and the eager run."""

    largest_difference: float
    """The largest difference of logits and boxes, row by row."""
    unmatched_rows: int
    """Rows that belong to another query: queries with nearly equal scores may differ between runtimes."""
    rows: int
    detections: int
    """Number of detections of the eager run that were compared."""
    detections_missed: int
    """Number of detections without a counterpart in the other run (same class and score, IoU above 0.99).
    Both runs are counted, so a changed detection counts twice."""

    @property
    def same(self) -> bool:
        """Whether both runs detect the same objects."""
        return (
            self.largest_difference <= TOLERANCE
            and self.unmatched_rows <= MAX_UNMATCHED_SHARE * self.rows
            and self.detections_missed == 0
        )


def compare(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    get_detections: Callable[[Sequence[Tensor]], Detections],
    threshold: float = 0.5,
    *,
    selects_queries: bool = False,
) -> Comparison:
    """Compares outputs (logits [B, Q, classes], boxes [B, Q, 4]) of two runs.

    Args:
        expected: the outputs of the model itself.
        actual: the outputs of the runtime.
        get_detections: the model's post-processing, without a threshold.
        threshold: detections with a higher score are compared, and never fewer than the ten best.
        selects_queries: whether the model selects its queries by score. Then rows may change places,
            and a few may belong to other queries; otherwise each row is compared with its own.

    Raises:
        ValueError: the number of outputs, their shapes, or the elements that are not finite differ;
            or the expected outputs are not numbers. Minus infinity is the logit of a score of 0.
    """
    if len(actual) != len(expected):
        raise ValueError(f"expected {len(expected)} outputs, got {len(actual)}")
    for output, reference in zip(actual, expected, strict=True):
        if output.shape != reference.shape:
            raise ValueError(
                f"expected an output {list(reference.shape)}, got {list(output.shape)}"
            )
        if not bool((reference.isfinite() | reference.isneginf()).all()):
            raise ValueError("expected numbers of the model itself, got some that are not finite")
        if not bool((output.isneginf() == reference.isneginf()).all()) or not bool(
            (output.isfinite() == reference.isfinite()).all()
        ):
            raise ValueError("elements of an output are not finite, unlike in the expected one")
    expected_rows, actual_rows = _concatenate(expected), _concatenate(actual)
    difference, unmatched = (expected_rows - actual_rows).abs().amax(-1), 0
    if selects_queries:
        difference, unmatched = _match_rows(expected_rows, actual_rows, difference)
    largest = float(difference.max()) if difference.numel() else 0.0
    compared, missed = 0, 0
    for mine, theirs in zip(get_detections(expected), get_detections(actual), strict=True):
        count = max(int((mine["scores"] > threshold).sum()), MIN_DETECTIONS)
        compared += min(count, len(mine["scores"]))
        missed += _count_missed(mine, theirs, count) + _count_missed(theirs, mine, count)
    batch_size, num_queries = expected[0].shape[:2]
    return Comparison(largest, unmatched, batch_size * num_queries, compared, missed)


def _concatenate(outputs: Sequence[Tensor]) -> Tensor:
    """Joins logits and boxes to [B, Q, classes + 4]; elements that are minus infinity count as 0."""
    return torch.cat([output.double().nan_to_num(0.0, 0.0, 0.0) for output in outputs], -1)


def _match_rows(expected: Tensor, actual: Tensor, difference: Tensor) -> tuple[Tensor, int]:
    """Matches rows that changed places.

    Returns:
        The differences [B, Q] of matched rows, and the number of rows that belong to other queries.
    """
    num_unmatched = 0
    for image in range(len(expected)):
        rows = (difference[image] > TOLERANCE).nonzero()[:, 0]
        if not len(rows):
            continue
        # Differences between all pairs of the rows that differ, [rows, rows].
        between = (expected[image, rows][:, None] - actual[image, rows][None]).abs().amax(-1)
        nearest, partner = between.min(1)
        moved = (nearest <= TOLERANCE) & (between.argmin(0)[partner] == torch.arange(len(rows)))
        difference[image, rows] = torch.where(moved, nearest, difference[image, rows])
        num_left = int((~moved).sum())
        if num_left <= MAX_UNMATCHED_SHARE * expected.shape[1]:
            num_unmatched += num_left
            difference[image, rows[~moved]] = 0.0
    return difference, num_unmatched


def _count_missed(mine: dict[str, Tensor], theirs: dict[str, Tensor], count: int) -> int:
    """Counts how many of the `count` best detections in `mine` have no counterpart in `theirs`."""
    scores, labels, boxes = (mine[key][:count] for key in ("scores", "labels", "boxes"))
    same = (
        (labels[:, None] == theirs["labels"])
        & ((scores[:, None] - theirs["scores"]).abs() <= TOLERANCE)
        & (box_iou(boxes, theirs["boxes"]) > MIN_IOU)
    )
    return int((~same.any(1)).sum())


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Computes the intersection over union [N, M] of boxes [N, 4] and [M, 4], (x0, y0, x1, y1)."""
    first, second = first.double()[:, None], second.double()[None]
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - common
    # The IoU of boxes without an area is 0 / 0: 1 for equal boxes, otherwise 0.
    iou: Tensor = torch.where(union > 0, common / union, (first == second).all(-1).double())
    return iou


def post_process(processor: Any, outputs: Sequence[Tensor], size: tuple[int, int]) -> Detections:
    """Returns the processor's detections without a threshold; `size` is (height, width) in pixels."""
    logits, boxes = outputs
    detections: Detections = processor.post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes),
        threshold=0.0,
        target_sizes=[size] * len(logits),
    )
    return [
        {key: value[objects["scores"].argsort(descending=True)] for key, value in objects.items()}
        for objects in detections
    ]
