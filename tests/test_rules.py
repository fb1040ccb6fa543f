"""One test for each rule of docs/definition.md, on the reference and on every native kernel."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Case, assert_same, look, loops

import saccade

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = math.inf, math.nan


def test_worked_example():
    value = torch.arange(16.0)
    positions = [(2, 2), (1, 2), (2, 1), (1, 1)]
    result = look(value, (4, 4), positions, [0.25] * 4, coordinates="pixel")
    assert result == 0.25 * (value[10] + value[9] + value[6] + value[5]) == 7.5


def test_order_of_coordinates_is_x_then_y():
    grid = torch.arange(6.0)  # 2 rows, 3 columns
    assert look(grid, (2, 3), [(2, 1)], coordinates="pixel") == 5
    assert look(grid, (2, 3), [(1, 0)], coordinates="pixel") == 1


def test_normalized_0_and_1_are_the_outer_edges():
    # pixel = x * 4 - 0.5: 0.125 is the centre of the first of four pixels, 0.5 lies between two.
    assert look([10, 20, 30, 40], (1, 4), [(0.125, 0.5)]) == 10
    assert look([10, 20, 30, 40], (1, 4), [(0.5, 0.5)]) == 25
    assert look([10, 20, 30, 40], (1, 4), [(0.0, 0.5)]) == 5  # half of it is outside


def test_normalized_corners_0_and_1_are_the_outer_centres():
    corners = {"coordinates": "normalized_corners"}
    assert look([10, 20, 30, 40], (1, 4), [(0.0, 0.0)], **corners) == 10
    assert look([10, 20, 30, 40], (1, 4), [(1.0, 0.0)], **corners) == 40
    assert look([10, 20, 30, 40], (1, 4), [(0.5, 0.0)], **corners) == 25


def test_pixel_coordinates_integers_are_centres():
    assert look([10, 20, 30, 40], (1, 4), [(3, 0)], coordinates="pixel") == 40
    assert look([10, 20, 30, 40], (1, 4), [(1.25, 0)], coordinates="pixel") == 22.5


def test_zeros_padding_counts_each_corner_by_itself():
    four = [1, 2, 4, 8]
    pixel = {"coordinates": "pixel"}
    assert look(four, (2, 2), [(-0.5, -0.5)], **pixel) == 0.25 * 1
    assert look(four, (2, 2), [(1.5, 0.5)], **pixel) == 0.25 * (2 + 8)
    assert look(four, (2, 2), [(-1, 0)], **pixel) == 0
    assert look(four, (2, 2), [(1e30, 0)], **pixel) == 0


def test_border_padding_clamps_the_position():
    four = [1, 2, 4, 8]
    border = {"coordinates": "pixel", "padding": "border"}
    assert look(four, (2, 2), [(-7, 0)], **border) == 1
    assert look(four, (2, 2), [(9, 0.5)], **border) == 0.5 * (2 + 8)
    assert look(four, (2, 2), [(1e30, 1e30)], **border) == 8


def test_nearest_rounds_half_to_even():
    nearest = {"coordinates": "pixel", "interpolation": "nearest"}
    assert [
        look([1, 2, 3, 4], (1, 4), [(x, 0)], **nearest) for x in (-0.5, 0.5, 1.5, 2.5, 3.5, 3.51)
    ] == [1, 1, 3, 3, 0, 0]
    assert look([1, 2, 3, 4], (1, 4), [(9, 0)], padding="border", **nearest) == 4


@pytest.mark.parametrize("bad", [(NAN, 0.5), (0.5, NAN), (INF, 0.5), (-INF, INF), (NAN, INF)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_non_finite_location_contributes_0_and_gets_gradient_0(bad, padding, interpolation):
    case = Case(num_points=2, padding=padding, interpolation=interpolation)
    value, locations, weights = case.draw()
    without = weights.clone()
    without[:, 3, :, 1] = 0
    expected = case.call(value, locations, without)
    locations[:, 3, :, 1] = torch.tensor(bad)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = case.call(*leaves)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (locations.grad[:, 3, :, 1] == 0).all()
    assert (weights.grad[:, 3, :, 1] == 0).all()


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_finite_location_whose_position_overflows(padding, interpolation):
    case = Case(num_points=1, padding=padding, interpolation=interpolation)
    value, locations, weights = case.draw()
    locations[:, ::2, :, 0] = torch.tensor([3e38, -3e38])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = case.call(*leaves)
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][:, ::2, :, 0] == 0).all()


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_non_finite_value_reaches_only_those_who_read_it(bad):
    values = [1.0, 2, 3, bad]
    pixel = {"coordinates": "pixel"}
    # The cells that a point does not read stay out of it, wherever the point lies.
    for position in [(0, 0), (0.5, 0), (-0.5, 0), (-0.9, 0), (-1, 0), (-50, 0), (1, 0), (60, 0)]:
        assert math.isfinite(look(values, (1, 4), [position], **pixel)), position
    assert not math.isfinite(look(values, (1, 4), [(2.5, 0)], **pixel))
    assert not math.isfinite(look(values, (1, 4), [(3.5, 0)], **pixel))


def test_non_finite_weight_propagates():
    pixel = {"coordinates": "pixel"}
    assert look([1, 2], (1, 2), [(0, 0)], [INF], **pixel) == INF
    assert look([1, 2], (1, 2), [(0.5, 0)], [-INF], **pixel) == -INF
    assert look([1, 2], (1, 2), [(-0.5, 0)], [INF], **pixel) == INF
    assert look([1, -2], (1, 2), [(1.5, 0)], [INF], **pixel) == -INF
    assert math.isnan(look([1, 2], (1, 2), [(-5, 0)], [INF], **pixel))  # infinity times 0
    assert math.isnan(look([1, 2], (1, 2), [(0, 0)], [NAN], **pixel))


def test_non_finite_gradient_reaches_only_the_cells_that_were_read():
    value = torch.ones(1, 4, 1, 2, requires_grad=True)
    locations = torch.tensor([-0.5, 0.0]).view(1, 1, 1, 1, 1, 2)
    output = saccade.deformable_attention(
        value, [(1, 4)], locations, torch.ones(1, 1, 1, 1, 1), coordinates="pixel"
    )
    output.backward(torch.tensor([INF, 1.0]).view(1, 1, 2))
    assert value.grad[0, :, 0].tolist() == [[INF, 0.5], [0, 0], [0, 0], [0, 0]]


def test_points_per_level_lie_flat_level_after_level():
    value = torch.tensor([10.0, 20, 1, 2, 3]).view(1, 5, 1, 1)  # levels (1, 2) and (1, 3)
    locations = torch.tensor([[0.0, 0], [0, 0], [1, 0], [2, 0]]).view(1, 1, 1, 4, 2)
    weights = torch.tensor([1.0, 1, 1, 100]).view(1, 1, 1, 4)
    output = saccade.deformable_attention(
        value, [(1, 2), (1, 3)], locations, weights, num_points=[1, 3], coordinates="pixel"
    )
    assert output.item() == 10 + 1 + 2 + 300


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_are_float32_whatever_the_values_dtype(dtype):
    # Column 190 of 200: bfloat16 has a step of 1 there, float16 of 0.125.
    columns = torch.arange(200.0).sub(190).repeat(200).view(1, 40000, 1, 1).to(dtype)
    x = torch.linspace(189.0, 191.0, 101)
    locations = torch.stack(((x + 0.5) / 200, torch.full_like(x, 0.5)), -1).view(1, 101, 1, 1, 1, 2)
    weights = torch.ones(1, 101, 1, 1, 1)
    found = saccade.deformable_attention(columns, [(200, 200)], locations, weights)
    assert found.dtype == dtype
    assert (found.flatten().float() + 190 - x).abs().max() < 0.01


def test_locations_and_weights_may_have_another_dtype():
    case = Case(num_queries=4, batch_size=1)
    value, locations, weights = case.draw()
    expected = case.call(value, locations, weights)
    assert torch.equal(case.call(value, locations.double(), weights.double()), expected)
    # Numbers that 16 bits hold exactly give the same result in 16 bits.
    locations = (locations * 64).round() / 64
    weights = (weights * 64).round() / 64
    assert torch.equal(
        case.call(value, locations.bfloat16(), weights.half()),
        case.call(value, locations, weights),
    )


@pytest.mark.parametrize(
    ("batch_size", "num_queries"), [(0, 5), (2, 0), (0, 0), (1, 1), (134, 2), (3, 131)]
)
def test_any_number_of_queries_and_batch(batch_size, num_queries):
    case = Case(batch_size=batch_size, num_queries=num_queries, num_heads=2)
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    output = case.call(*leaves)
    assert output.shape == (batch_size, num_queries, 16)
    output.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("head_dim", [1, 3, 16, 30, 32, 71, 256, 1025])
def test_any_head_dim(head_dim):
    case = Case(
        head_dim=head_dim, num_heads=2, batch_size=1, num_queries=3, shapes=[(2, 3)],
        dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()
    assert_same([case.call(*inputs)], [loops(case, *inputs)])


def test_one_head_of_values_serves_all_heads():
    case = Case(shared_head=True, num_heads=4)
    value, locations, weights = case.draw()
    copied = value.repeat(1, 1, 4, 1)
    assert_same([case.call(value, locations, weights)], [case.call(copied, locations, weights)])


def test_results_do_not_depend_on_strides():
    case = Case(num_queries=9, num_heads=4)
    inputs = case.draw()
    expected = case.call(*inputs)
    permuted = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    every_other = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs]
    shifted = [torch.cat((tensor[:1], tensor))[1:] for tensor in inputs]
    for variant in (permuted, every_other, shifted):
        assert torch.equal(case.call(*variant), expected)
    expanded = [tensor[:1].expand(2, *tensor.shape[1:]) for tensor in inputs]
    assert torch.equal(
        case.call(*expanded), case.call(*(tensor.contiguous() for tensor in expanded))
    )


def test_gradients_do_not_depend_on_strides_of_grad_output():
    case = Case()
    inputs = case.draw()

    def gradients(grad_output):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        case.call(*leaves).backward(grad_output)
        return [leaf.grad for leaf in leaves]

    ones = torch.ones(2, 11, 24)
    for variant in (torch.ones(()).expand(2, 11, 24), torch.ones(24, 11, 2).permute(2, 1, 0)):
        for got, want in zip(gradients(variant), gradients(ones), strict=True):
            assert torch.equal(got, want)


def test_value_padding_mask_true_counts_as_0():
    case = Case()
    value, locations, weights = case.draw()
    mask = torch.rand(2, value.shape[1]) < 0.5
    zeroed = value * ~mask[..., None, None]
    value[mask] = NAN  # whatever lies there must not matter
    masked = saccade.deformable_attention(
        value, case.shapes, locations, weights, value_padding_mask=mask, **case.options
    )
    assert torch.equal(masked, case.call(zeroed, locations, weights))
    everything = torch.ones_like(mask)
    assert (
        saccade.deformable_attention(
            value, case.shapes, locations, weights, value_padding_mask=everything, **case.options
        )
        == 0
    ).all()


@pytest.mark.parametrize("shape", [(1001,), (37, 53), (7, 11, 13)])
def test_a_map_of_its_own_coordinates_is_read_back_bit_for_bit(shape):
    axes = torch.meshgrid(*[torch.arange(size).double() for size in shape], indexing="ij")
    count, dims = axes[0].numel(), len(shape)
    centres = torch.stack(axes[::-1], -1).reshape(1, count, 1, dims)
    locations = centres.view(1, count, 1, 1, 1, dims)
    weights = torch.ones(1, count, 1, 1, 1, dtype=torch.float64)
    found = saccade.deformable_attention(centres, [shape], locations, weights, coordinates="pixel")
    assert torch.equal(found, centres.view(1, count, dims))


def test_in_place_edit_of_the_output_keeps_gradients_right():
    case = Case()
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    plain = torch.autograd.grad(case.call(*leaves).mul(2).sum(), leaves)
    edited = torch.autograd.grad(case.call(*leaves).mul_(2).sum(), leaves)
    for got, want in zip(edited, plain, strict=True):
        assert torch.equal(got, want)


def test_reference_points_and_boxes():
    from saccade.sampling import sampling_locations

    offsets = torch.tensor([[2.0, -1.0], [1.0, 3.0]]).view(1, 1, 1, 2, 2)
    shapes, points = [(4, 8), (10, 5)], [1, 1]
    reference = torch.tensor([0.5, 0.25]).view(1, 1, 1, 2)
    found = sampling_locations(reference, offsets, shapes, points)
    expected = [[0.5 + 2 / 8, 0.25 - 1 / 4], [0.5 + 1 / 5, 0.25 + 3 / 10]]
    torch.testing.assert_close(found.view(2, 2), torch.tensor(expected))
    box = torch.tensor([0.5, 0.25, 0.2, 0.4]).view(1, 1, 1, 4)
    found = sampling_locations(box, offsets.repeat(1, 1, 1, 2, 1), shapes, [2, 2])
    expected = [
        [0.5 + 2 * 0.25 * 0.2, 0.25 - 0.25 * 0.4],
        [0.5 + 0.25 * 0.2, 0.25 + 3 * 0.25 * 0.4],
    ]
    torch.testing.assert_close(found.view(4, 2), torch.tensor(expected * 2))
    for offsets, shapes in (
        (torch.zeros(1, 1, 1, 1, 2), [(8,)]),
        (torch.zeros(1, 1, 1, 1, 1), [(4, 8)]),
    ):
        reference = torch.zeros(1, 1, 1, offsets.shape[-1])
        with pytest.raises(ValueError, match=r"spatial_shapes: expected . sizes for each level"):
            sampling_locations(reference, offsets, shapes, [1])
