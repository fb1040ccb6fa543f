"""Whether two runs of a detector found the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""The largest difference of a logit or of a box coordinate (0 to 1) that counts as the same."""
LEAST_IOU = 0.99
BEST = 10
"""So many detections are compared where fewer have a score above the threshold."""
MOST_APART = 0.02
"""The share of rows that may be other queries, in models that choose theirs by score."""

Detections = list[dict[str, Tensor]]
"""For each picture scores [N], labels [N] and boxes [N, 4] (x0, y0, x1, y1), the best first."""


@dataclass(frozen=True)
class Comparison:
    """How far a run is from the eager one."""

    largest_difference: float
    """Of logits and boxes, row by row."""
    rows_apart: int
    """Rows that are another query's: scores that are nearly equal change places between runtimes."""
    rows: int
    detections: int
    """How many of the eager run were looked for in the other."""
    detections_missed: int
    """How many have no counterpart in the other run (the same class and score, an IoU above 0.99): those
    of the eager one and those of the run together, so that a changed detection counts twice."""

    @property
    def same(self) -> bool:
        """Whether they found the same."""
        return (
            self.largest_difference <= TOLERANCE
            and self.rows_apart <= MOST_APART * self.rows
            and self.detections_missed == 0
        )


def compare(
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    detections_of: Callable[[Sequence[Tensor]], Detections],
    threshold: float = 0.5,
    *,
    chooses_queries: bool = False,
) -> Comparison:
    """Compares outputs (logits [B, Q, classes], boxes [B, Q, 4]) of two runs.

    Args:
        expected: what the model itself gives.
        found: what the runtime gives.
        detections_of: the model's post-processing, without a threshold.
        threshold: detections with a higher score are compared, and never fewer than the ten best.
        chooses_queries: the model chooses its queries by score: rows may change places, and a few be
            those of other queries. Otherwise each row is compared with its own.

    Raises:
        ValueError: the outputs are of another number, have other shapes, or are not finite in other
            places.
    """
    if len(found) != len(expected):
        raise ValueError(f"expected {len(expected)} outputs, got {len(found)}")
    for have, want in zip(found, expected, strict=True):
        if have.shape != want.shape:
            raise ValueError(f"expected an output {list(want.shape)}, got {list(have.shape)}")
        finite = want.isfinite()
        if not bool((have.isfinite() == finite).all()) or not have[~finite].equal(want[~finite]):
            raise ValueError("an output has other numbers that are not finite than expected")
    wanted_rows, found_rows = _joined(expected), _joined(found)
    difference, apart = (wanted_rows - found_rows).abs().amax(-1), 0
    if chooses_queries:
        difference, apart = _of_partners(wanted_rows, found_rows, difference)
    largest = float(difference.max()) if difference.numel() else 0.0
    counted, missed = 0, 0
    for wanted, given in zip(detections_of(expected), detections_of(found), strict=True):
        count = max(int((wanted["scores"] > threshold).sum()), BEST)
        counted += min(count, len(wanted["scores"]))
        missed += _missed(wanted, given, count) + _missed(given, wanted, count)
    batch, queries = expected[0].shape[:2]
    return Comparison(largest, apart, batch * queries, counted, missed)


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    """Side by side; what is not finite is equal by now, and counts as 0."""
    return torch.cat([output.double().nan_to_num(0.0, 0.0, 0.0) for output in outputs], -1)


def _of_partners(expected: Tensor, found: Tensor, difference: Tensor) -> tuple[Tensor, int]:
    """The differences [B, Q] where rows changed places, and how many rows are another query's."""
    apart = 0
    for image in range(len(expected)):
        rows = (difference[image] > TOLERANCE).nonzero()[:, 0]
        if not len(rows):
            continue
        # Rows may have changed places: the differences between all of these.
        want, have = expected[image, rows], found[image, rows]
        between = (want[:, None] - have[None]).abs().amax(-1)
        nearest, partner = between.min(1)
        moved = (nearest <= TOLERANCE) & (between.argmin(0)[partner] == torch.arange(len(rows)))
        difference[image, rows] = torch.where(moved, nearest, difference[image, rows])
        left = int((~moved).sum())
        if left <= MOST_APART * expected.shape[1]:
            apart += left
            difference[image, rows[~moved]] = 0.0
    return difference, apart


def _missed(wanted: dict[str, Tensor], found: dict[str, Tensor], count: int) -> int:
    """How many of the best have no counterpart."""
    scores, labels, boxes = (wanted[key][:count] for key in ("scores", "labels", "boxes"))
    same = (
        (labels[:, None] == found["labels"])
        & ((scores[:, None] - found["scores"]).abs() <= TOLERANCE)
        & (box_iou(boxes, found["boxes"]) > LEAST_IOU)
    )
    return int((~same.any(1)).sum())


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of each box [N, 4] with each [M, 4], (x0, y0, x1, y1): [N, M]."""
    first, second = first.double()[:, None], second.double()[None]
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - common
    # Boxes without an area have none in common; at the same place they are the same.
    found: Tensor = torch.where(union > 0, common / union, (first == second).all(-1).double())
    return found


def post_processed(processor: Any, outputs: Sequence[Tensor], size: tuple[int, int]) -> Detections:
    """The processor's detections without a threshold, boxes in pixels of pictures (height, width)."""
    logits, boxes = outputs
    found: Detections = processor.post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes),
        threshold=0.0,
        target_sizes=[size] * len(logits),
    )
    return [
        {key: value[objects["scores"].argsort(descending=True)] for key, value in objects.items()}
        for objects in found
    ]
