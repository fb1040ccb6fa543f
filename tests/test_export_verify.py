"""The comparison of two runs of a detector."""

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


def get_detections(outputs):
    """The best class of each query, as post-processing gives it, the best first."""
    detections = []
    for logits, boxes in zip(*outputs, strict=True):
        scores, labels = logits.sigmoid().max(-1)
        order = scores.argsort(descending=True)
        detections.append(
            {"scores": scores[order], "labels": labels[order], "boxes": corners(boxes)[order]}
        )
    return detections


def changed(**changes):
    """The outputs with one logit or box coordinate changed: `logits=(image, query, by)`."""
    logits, boxes = outputs()
    for name, (image, query, by) in changes.items():
        {"logits": logits, "boxes": boxes}[name][image, query, 0] += by
    return logits, boxes


def compare_to_outputs(actual, threshold=0.5, selects_queries=True):
    return compare(outputs(), actual, get_detections, threshold, selects_queries=selects_queries)


def best(image=0):
    """The query with the highest score."""
    return int(outputs()[0][image].amax(-1).argmax())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_elements_that_are_not_numbers_in_one_run_or_both(value):
    logits, boxes = changed(logits=(1, 3, value))
    with pytest.raises(ValueError, match="not finite"):
        compare_to_outputs((logits, boxes))
    with pytest.raises(ValueError, match="not finite"):
        compare((logits, boxes), (logits, boxes), get_detections)


def test_equal_and_nearly_equal():
    assert compare_to_outputs(outputs()).same
    assert compare_to_outputs(outputs()).largest_difference == 0
    assert compare_to_outputs(outputs()).rows == 2 * QUERIES
    nearly = compare_to_outputs(changed(logits=(1, 3, 1e-4)))
    assert nearly.same
    assert nearly.largest_difference == pytest.approx(1e-4, rel=0.01)


def test_rows_that_changed_places_are_the_same():
    logits, boxes = outputs()
    order = torch.randperm(QUERIES, generator=torch.Generator().manual_seed(1))
    result = compare_to_outputs((logits[:, order], boxes[:, order]))
    assert result.same
    assert (result.unmatched_rows, result.largest_difference) == (0, 0)
    # Where each row belongs to a query of its own, they are not.
    assert not compare_to_outputs((logits[:, order], boxes[:, order]), selects_queries=False).same


def test_a_row_of_another_query_counts_where_it_is_no_detection():
    worst = int(outputs()[0][0].amax(-1).argmin())
    result = compare_to_outputs(changed(boxes=(0, worst, 0.3)), threshold=0.9)
    assert (result.unmatched_rows, result.detections_missed) == (1, 0)
    assert result.same
    assert result.largest_difference == 0
    result = compare_to_outputs(
        changed(boxes=(0, worst, 0.3)), threshold=0.9, selects_queries=False
    )
    assert result.largest_difference == pytest.approx(0.3)
    assert not result.same
    # The same in a detection is a detection missed, from both sides.
    result = compare_to_outputs(changed(boxes=(0, best(), 0.3)))
    assert result.detections_missed == 2
    assert not result.same


def test_many_unmatched_rows_are_other_numbers():
    logits, boxes = outputs()
    boxes[0, :3] += 0.3
    result = compare_to_outputs((logits, boxes), threshold=0.999)
    assert result.largest_difference == pytest.approx(0.3)
    assert not result.same


@pytest.mark.parametrize("name", ["logits", "boxes"])
def test_a_difference_above_the_tolerance_in_every_row(name):
    logits, boxes = outputs()
    moved = {"logits": logits, "boxes": boxes}
    moved[name] += 2 * TOLERANCE
    assert not compare_to_outputs((moved["logits"], moved["boxes"])).same


def test_another_class_of_a_detection():
    logits, boxes = outputs()
    logits[0, best()] = logits[0, best()].roll(1)
    result = compare_to_outputs((logits, boxes))
    assert result.detections_missed == 2
    assert not result.same


def test_never_fewer_than_the_ten_best_are_compared():
    assert compare_to_outputs(outputs(), threshold=1.0).detections == 20
    everything = compare_to_outputs(outputs(), threshold=0.0)
    assert everything.detections == 2 * QUERIES


def test_other_shapes_and_numbers_that_are_not_finite():
    logits, boxes = outputs()
    with pytest.raises(ValueError, match=r"expected an output \[2, 100, 5\], got \[1, 100, 5\]"):
        compare_to_outputs((logits[:1], boxes[:1]))
    with pytest.raises(ValueError, match="not finite"):
        compare_to_outputs(changed(logits=(0, 0, float("nan"))))


def test_what_is_not_finite_in_both_is_the_same():
    logits, boxes = outputs()
    logits[:, :, 4] = -torch.inf  # a class that is switched off
    result = compare((logits, boxes), (logits.clone(), boxes), get_detections)
    assert (result.same, result.largest_difference) == (True, 0)
    with pytest.raises(ValueError, match="not finite"):
        compare((logits, boxes), (-logits, boxes), get_detections)
    with pytest.raises(ValueError, match="expected 2 outputs, got 1"):
        compare((logits, boxes), (logits,), get_detections)


def test_boxes_without_an_area():
    logits, boxes = outputs()
    boxes[..., 2:] = 0
    assert compare((logits, boxes), (logits, boxes), get_detections).same


def test_box_iou():
    first = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    second = torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]])
    expected = torch.tensor([[1 / 3, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(box_iou(first, second), expected)
