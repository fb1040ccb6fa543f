"""What counts as the same in two runs of a detector."""

from __future__ import annotations

import pytest
import torch
from export_helpers import corners

from saccade.export.verify import TOLERANCE, box_iou, compare

QUERIES, CLASSES = 100, 5


def outputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, QUERIES, CLASSES, generator=generator) * 2
    boxes = torch.rand(batch, QUERIES, 4, generator=generator) * 0.4 + 0.3
    return logits, boxes


def detections_of(found):
    """The best class of each query, as post-processing gives it, the best first."""
    detections = []
    for logits, boxes in zip(*found, strict=True):
        scores, labels = logits.sigmoid().max(-1)
        order = scores.argsort(descending=True)
        detections.append(
            {"scores": scores[order], "labels": labels[order], "boxes": corners(boxes)[order]}
        )
    return detections


def changed(**of_row):
    """The outputs with another logit or box coordinate in a row: `logits=(image, query, by)`."""
    logits, boxes = outputs()
    for name, (image, query, by) in of_row.items():
        {"logits": logits, "boxes": boxes}[name][image, query, 0] += by
    return logits, boxes


def same(found, threshold=0.5, chooses_queries=True):
    return compare(outputs(), found, detections_of, threshold, chooses_queries=chooses_queries)


def best(image=0):
    """The query with the highest score."""
    return int(outputs()[0][image].amax(-1).argmax())


def test_equal_and_nearly_equal():
    assert same(outputs()).same
    assert same(outputs()).largest_difference == 0
    assert same(outputs()).rows == 2 * QUERIES
    nearly = same(changed(logits=(1, 3, 1e-4)))
    assert nearly.same
    assert nearly.largest_difference == pytest.approx(1e-4, rel=0.01)


def test_rows_that_changed_places_are_the_same():
    logits, boxes = outputs()
    order = torch.randperm(QUERIES, generator=torch.Generator().manual_seed(1))
    found = same((logits[:, order], boxes[:, order]))
    assert found.same
    assert (found.rows_apart, found.largest_difference) == (0, 0)
    # Where each row belongs to a query of its own, they are not.
    assert not same((logits[:, order], boxes[:, order]), chooses_queries=False).same


def test_a_row_of_another_query_counts_where_it_is_no_detection():
    worst = int(outputs()[0][0].amax(-1).argmin())
    found = same(changed(boxes=(0, worst, 0.3)), threshold=0.9)
    assert (found.rows_apart, found.detections_missed) == (1, 0)
    assert found.same
    assert found.largest_difference == 0
    found = same(changed(boxes=(0, worst, 0.3)), threshold=0.9, chooses_queries=False)
    assert found.largest_difference == pytest.approx(0.3)
    assert not found.same
    # The same in a detection is a detection missed, from both sides.
    found = same(changed(boxes=(0, best(), 0.3)))
    assert found.detections_missed == 2
    assert not found.same


def test_many_rows_apart_are_other_numbers():
    logits, boxes = outputs()
    boxes[0, :3] += 0.3
    found = same((logits, boxes), threshold=0.999)
    assert found.largest_difference == pytest.approx(0.3)
    assert not found.same


@pytest.mark.parametrize("name", ["logits", "boxes"])
def test_a_difference_above_the_tolerance_in_every_row(name):
    logits, boxes = outputs()
    moved = {"logits": logits, "boxes": boxes}
    moved[name] += 2 * TOLERANCE
    assert not same((moved["logits"], moved["boxes"])).same


def test_another_class_of_a_detection():
    logits, boxes = outputs()
    logits[0, best()] = logits[0, best()].roll(1)
    found = same((logits, boxes))
    assert found.detections_missed == 2
    assert not found.same


def test_never_fewer_than_the_ten_best_are_compared():
    assert same(outputs(), threshold=1.0).detections == 20
    everything = same(outputs(), threshold=0.0)
    assert everything.detections == 2 * QUERIES


def test_other_shapes_and_numbers_that_are_not_finite():
    logits, boxes = outputs()
    with pytest.raises(ValueError, match=r"expected an output \[2, 100, 5\], got \[1, 100, 5\]"):
        same((logits[:1], boxes[:1]))
    with pytest.raises(ValueError, match="not finite"):
        same(changed(logits=(0, 0, float("nan"))))


def test_what_is_not_finite_in_both_is_the_same():
    logits, boxes = outputs()
    logits[:, :, 4] = -torch.inf  # a class that is switched off
    found = compare((logits, boxes), (logits.clone(), boxes), detections_of)
    assert (found.same, found.largest_difference) == (True, 0)
    with pytest.raises(ValueError, match="not finite"):
        compare((logits, boxes), (-logits, boxes), detections_of)
    with pytest.raises(ValueError, match="expected 2 outputs, got 1"):
        compare((logits, boxes), (logits,), detections_of)


def test_boxes_without_an_area():
    logits, boxes = outputs()
    boxes[..., 2:] = 0
    assert compare((logits, boxes), (logits, boxes), detections_of).same


def test_box_iou():
    first = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    second = torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]])
    expected = torch.tensor([[1 / 3, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(box_iou(first, second), expected)
