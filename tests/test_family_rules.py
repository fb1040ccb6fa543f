"""The rules of docs/definition.md for discrete sampling and for fused calls, on every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Case, look

import saccade

pytestmark = pytest.mark.usefixtures("backend")


def test_discrete_rounds_from_the_edge():
    # floor(x * 4 + 0.5): half a pixel further than the pixel's own centre.
    cells = [10.0, 20, 30, 40]
    for x, want in ((0.0, 10), (0.124, 10), (0.125, 20), (0.3, 20), (0.375, 30), (0.8, 40)):
        assert look(cells, (1, 4), [(x, 0.4)], interpolation="discrete") == want
    # In pixels, where a centre is whole, floor(x + 1).
    for x, want in ((-1.01, 0), (-1.0, 10), (-0.01, 10), (0.0, 20), (2.9, 40), (3.0, 0)):
        options = {"interpolation": "discrete", "coordinates": "pixel"}
        assert look(cells, (1, 4), [(x, -0.5)], **options) == want


def test_discrete_with_border_is_clamped():
    cells, border = [10.0, 20, 30, 40], {"interpolation": "discrete", "padding": "border"}
    assert look(cells, (1, 4), [(-7.0, 9.0)], **border) == 10
    assert look(cells, (1, 4), [(7.0, -9.0)], **border) == 40
    assert look(cells, (1, 4), [(3e38, 0.5)], **border) == 40
    assert look(cells, (1, 4), [(math.nan, 0.5)], **border) == 0


def test_discrete_with_border_height_is_clamped_to_the_height():
    by_height = {"interpolation": "discrete", "padding": "border_height"}
    rows = torch.arange(8.0)  # 2 rows, 4 columns
    assert look(rows, (2, 4), [(0.9, 0.9)], **by_height) == 5  # x is clamped to 1, y to 1
    assert look(rows, (2, 4), [(0.9, 0.1)], **by_height) == 1
    assert look(rows, (4, 2), [(0.9, 0.9)], **by_height) == 7  # never beyond the map


@pytest.mark.parametrize("padding", ["zeros", "border", "border_height"])
def test_discrete_has_no_gradient_to_locations(padding):
    case = Case(interpolation="discrete", padding=padding, num_points=4)
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    gradients = torch.autograd.grad(case.call(*leaves).sum(), leaves)
    assert (gradients[1] == 0).all()
    assert (gradients[0] != 0).any()
    assert (gradients[2] != 0).any()


def test_border_height_goes_with_discrete_images_only():
    for options in ({}, {"interpolation": "discrete", "spatial_dims": 3}):
        with pytest.raises(ValueError, match="padding: expected 'zeros' or 'border'"):
            saccade.nn.DeformableAttention(32, padding="border_height", **options)
    saccade.nn.DeformableAttention(32, padding="border_height", interpolation="discrete")
    value, points = (
        torch.zeros(1, 8, 1, 1),
        (torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)),
    )
    with pytest.raises(
        ValueError, match="padding: expected 'zeros' or 'border' with interpolation"
    ):
        saccade.deformable_attention(value, [(2, 4)], *points, padding="border_height")
    with pytest.raises(ValueError, match="padding: expected 'zeros' or 'border' in 1 dimensions"):
        saccade.deformable_attention(
            value, [(8,)], points[0][..., :1], points[1],
            interpolation="discrete", padding="border_height",
        )  # fmt: skip


def test_an_offset_is_counted_in_pixels_of_its_level():
    """From a reference point, in every kind of coordinates; of a box in half of its size."""
    value = torch.arange(8.0).view(1, 8, 1, 1)
    logits = torch.zeros(1, 1, 1, 1, 1)

    def read(reference, offset, **options):
        return saccade.fused_deformable_attention(
            value, [(8,)], torch.tensor(reference).view(1, 1, 1, -1),
            torch.tensor(offset).view(1, 1, 1, 1, 1, 1), logits, **options,
        ).item()  # fmt: skip

    assert read([0.5], 2.0) == 5.5
    assert read([0.5], 2.0, coordinates="normalized_corners") == 5.5
    assert read([3.5], 2.0, coordinates="pixel") == 5.5
    assert read([0.5, 0.25], 2.0) == 5.5  # centre 3.5, half of the size is one pixel
    alone = {"value": value[:, :1], "spatial_shapes": [(1,)]}
    found = saccade.fused_deformable_attention(
        **alone, reference_points=torch.zeros(1, 1, 1, 1), attention_logits=logits,
        sampling_offsets=torch.full((1, 1, 1, 1, 1, 1), 3.0), coordinates="normalized_corners",
    )  # fmt: skip
    assert found.item() == 0.0  # between the corners of one pixel there is no way to go


def test_the_worked_example_fused():
    """Reference point, offsets and logits as they are: nothing is computed beside the operator."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    offsets = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])
    found = saccade.fused_deformable_attention(
        (10 * x + y).reshape(1, 16, 1, 1), [(4, 4)], torch.full((1, 1, 1, 2), 1.5),
        offsets.view(1, 1, 1, 1, 4, 2), torch.zeros(1, 1, 1, 1, 4), coordinates="pixel",
    )  # fmt: skip
    assert found.item() == 16.5


def test_each_point_starts_from_the_reference_of_its_index():
    value = torch.arange(8.0).view(1, 8, 1, 1)
    references = torch.tensor([1.0, 4.0, 6.0]).view(1, 1, 3, 1)
    offsets, logits = torch.zeros(1, 1, 1, 4, 1), torch.zeros(1, 1, 1, 4)
    for index, want in (([0, 0, 0, 0], 1.0), ([2, 2, 1, 1], 5.0), ([0, 1, 2, 0], 3.0)):
        found = saccade.fused_deformable_attention(
            value, [(8,)], references, offsets, logits,
            num_points=4, reference_index=index, coordinates="pixel",
        )  # fmt: skip
        assert found.item() == want
