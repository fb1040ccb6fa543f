"""One test for each rule of docs/definition.md, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import Case, assert_same, loops, read_points, some

import saccade
from saccade.sampling import sampling_locations

pytestmark = pytest.mark.usefixtures("backend")

INF, NAN = math.inf, math.nan
# Triton's interpreter takes milliseconds for each query and head.
SMALL = Case(shapes=[(3, 4), (2, 2)], num_points=1, num_queries=4, num_heads=2, head_dim=4)


def test_worked_example():
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    positions = [(2, 2), (1, 2), (2, 1), (1, 1)]
    result = read_points(10 * x + y, (4, 4), positions, [0.25] * 4, coordinates="pixel")
    assert result == 0.25 * (22 + 12 + 21 + 11) == 16.5


def test_order_of_coordinates_is_x_then_y():
    grid = torch.arange(6.0)  # 2 rows, 3 columns
    assert read_points(grid, (2, 3), [(2, 1)], coordinates="pixel") == 5
    assert read_points(grid, (2, 3), [(1, 0)], coordinates="pixel") == 1


def test_normalized_0_and_1_are_the_outer_edges():
    # pixel = x * 4 - 0.5: 0.125 is the centre of the first of four pixels, 0.5 lies between two.
    assert read_points([10, 20, 30, 40], (1, 4), [(0.125, 0.5)]) == 10
    assert read_points([10, 20, 30, 40], (1, 4), [(0.5, 0.5)]) == 25
    assert read_points([10, 20, 30, 40], (1, 4), [(0.0, 0.5)]) == 5  # half of it is outside


def test_normalized_corners_0_and_1_are_the_outer_centres():
    corners = {"coordinates": "normalized_corners"}
    assert read_points([10, 20, 30, 40], (1, 4), [(0.0, 0.0)], **corners) == 10
    assert read_points([10, 20, 30, 40], (1, 4), [(1.0, 0.0)], **corners) == 40
    assert read_points([10, 20, 30, 40], (1, 4), [(0.5, 0.0)], **corners) == 25


def test_pixel_coordinates_integers_are_centres():
    assert read_points([10, 20, 30, 40], (1, 4), [(3, 0)], coordinates="pixel") == 40
    assert read_points([10, 20, 30, 40], (1, 4), [(1.25, 0)], coordinates="pixel") == 22.5


def test_zeros_padding_counts_each_corner_by_itself():
    four = [1, 2, 4, 8]
    pixel = {"coordinates": "pixel"}
    assert read_points(four, (2, 2), [(-0.5, -0.5)], **pixel) == 0.25 * 1
    assert read_points(four, (2, 2), [(1.5, 0.5)], **pixel) == 0.25 * (2 + 8)
    assert read_points(four, (2, 2), [(-1, 0)], **pixel) == 0
    assert read_points(four, (2, 2), [(1e30, 0)], **pixel) == 0


def test_border_padding_clamps_the_position():
    four = [1, 2, 4, 8]
    border = {"coordinates": "pixel", "padding": "border"}
    assert read_points(four, (2, 2), [(-7, 0)], **border) == 1
    assert read_points(four, (2, 2), [(9, 0.5)], **border) == 0.5 * (2 + 8)
    assert read_points(four, (2, 2), [(1e30, 1e30)], **border) == 8


def test_nearest_rounds_half_to_even():
    nearest = {"coordinates": "pixel", "interpolation": "nearest"}
    assert [
        read_points([1, 2, 3, 4], (1, 4), [(x, 0)], **nearest)
        for x in (-0.5, 0.5, 1.5, 2.5, 3.5, 3.51)
    ] == [1, 1, 3, 3, 0, 0]
    assert read_points([1, 2, 3, 4], (1, 4), [(9, 0)], padding="border", **nearest) == 4


@pytest.mark.parametrize(
    ("bad", "padding", "interpolation"),
    some(
        itertools.product(
            [(NAN, 0.5), (0.5, NAN), (INF, 0.5), (-INF, INF), (NAN, INF)],
            ["zeros", "border"],
            ["linear", "nearest"],
        ),
        6,
    ),
)
def test_non_finite_location_contributes_0_and_gets_gradient_0(bad, padding, interpolation):
    case = SMALL.with_(num_points=2, padding=padding, interpolation=interpolation)
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
    case = SMALL.with_(padding=padding, interpolation=interpolation)
    value, locations, weights = case.draw()
    locations[:, ::2, :, 0] = torch.tensor([3e38, -3e38])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = case.call(*leaves)
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][:, ::2, :, 0] == 0).all()


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_non_finite_value_reaches_only_the_queries_that_read_it(bad):
    values = [1.0, 2, 3, bad]
    pixel = {"coordinates": "pixel"}
    # Cells that a point does not read do not reach the output, wherever the point lies.
    for position in [(0, 0), (0.5, 0), (-0.5, 0), (-0.9, 0), (-1, 0), (-50, 0), (1, 0), (60, 0)]:
        assert math.isfinite(read_points(values, (1, 4), [position], **pixel)), position
    assert not math.isfinite(read_points(values, (1, 4), [(2.5, 0)], **pixel))
    assert not math.isfinite(read_points(values, (1, 4), [(3.5, 0)], **pixel))


def test_non_finite_weight_propagates():
    pixel = {"coordinates": "pixel"}
    assert read_points([1, 2], (1, 2), [(0, 0)], [INF], **pixel) == INF
    assert read_points([1, 2], (1, 2), [(0.5, 0)], [-INF], **pixel) == -INF
    assert read_points([1, 2], (1, 2), [(-0.5, 0)], [INF], **pixel) == INF
    assert read_points([1, -2], (1, 2), [(1.5, 0)], [INF], **pixel) == -INF
    assert math.isnan(read_points([1, 2], (1, 2), [(-5, 0)], [INF], **pixel))  # infinity times 0
    assert math.isnan(read_points([1, 2], (1, 2), [(0, 0)], [NAN], **pixel))


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


def test_queries_of_several_maps_read_their_own_map():
    value = torch.tensor([[10.0, 20, 30, 40], [1, 2, 3, 4]]).view(2, 4, 1, 1)
    locations, weights = torch.full((3, 1, 1, 1, 1), 2.0), torch.ones(3, 1, 1, 1)
    output = saccade.deformable_attention(
        value, [(4,)], locations, weights, queries_per_map=[1, 2], coordinates="pixel"
    )
    assert output.flatten().tolist() == [30, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_are_float32_whatever_the_values_dtype(dtype):
    # Column 190 of 200: bfloat16 has a step of 1 there, float16 of 0.125.
    columns = torch.arange(200.0).sub(190).repeat(200).view(1, 40000, 1, 1).to(dtype)
    x = torch.linspace(189.0, 191.0, 101)
    locations = torch.stack(((x + 0.5) / 200, torch.full_like(x, 0.5)), -1).view(1, 101, 1, 1, 1, 2)
    weights = torch.ones(1, 101, 1, 1, 1)
    output = saccade.deformable_attention(columns, [(200, 200)], locations, weights)
    assert output.dtype == dtype
    assert (output.flatten().float() + 190 - x).abs().max() < 0.01


@pytest.mark.slow
def test_locations_and_weights_may_have_another_dtype():
    case = SMALL
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "num_queries"), [(0, 5), (2, 0), (0, 0), (1, 1), (70, 1), (2, 67)]
)
def test_any_number_of_queries_and_batch(batch_size, num_queries):
    case = Case(
        batch_size=batch_size,
        num_queries=num_queries,
        num_heads=1,
        head_dim=4,
        shapes=[(2, 3)],
        num_points=1,
    )
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    output = case.call(*leaves)
    assert output.shape == (batch_size, num_queries, 4)
    output.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("head_dim", [1, 3, 16, 30, 32, 71, 256, 1025])
def test_any_head_dim(head_dim):
    case = Case(
        head_dim=head_dim, num_heads=2 if head_dim < 100 else 1, batch_size=1, num_queries=2,
        num_points=2 if head_dim < 100 else 1, shapes=[(2, 3)], dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()
    assert_same([case.call(*inputs)], [loops(case, *inputs)])


def test_one_head_of_values_serves_all_heads():
    case = SMALL.with_(shared_head=True, num_heads=4)
    value, locations, weights = case.draw()
    copied = value.repeat(1, 1, 4, 1)
    assert_same([case.call(value, locations, weights)], [case.call(copied, locations, weights)])


@pytest.mark.slow
def test_results_do_not_depend_on_strides():
    case = SMALL
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


@pytest.mark.slow
def test_gradients_do_not_depend_on_strides_of_grad_output():
    case = SMALL
    inputs = case.draw()

    def gradients(grad_output):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        case.call(*leaves).backward(grad_output)
        return [leaf.grad for leaf in leaves]

    ones = torch.ones(2, 4, 8)
    for variant in (torch.ones(()).expand(2, 4, 8), torch.ones(8, 4, 2).permute(2, 1, 0)):
        for got, want in zip(gradients(variant), gradients(ones), strict=True):
            assert torch.equal(got, want)


def test_value_padding_mask_true_counts_as_0():
    case = SMALL
    value, locations, weights = case.draw()
    mask = torch.rand(2, value.shape[1]) < 0.5
    zeroed = value * ~mask[..., None, None]
    value[mask] = NAN  # must not reach the output
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


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1001,), (37, 53), (7, 11, 13)])
def test_a_map_of_its_own_coordinates_is_read_back_bit_for_bit(shape):
    axes = torch.meshgrid(*[torch.arange(size).double() for size in shape], indexing="ij")
    count, dims = axes[0].numel(), len(shape)
    centres = torch.stack(axes[::-1], -1).reshape(1, count, 1, dims)
    locations = centres.view(1, count, 1, 1, 1, dims)
    weights = torch.ones(1, count, 1, 1, 1, dtype=torch.float64)
    output = saccade.deformable_attention(centres, [shape], locations, weights, coordinates="pixel")
    assert torch.equal(output, centres.view(1, count, dims))


@pytest.mark.slow
def test_in_place_edit_of_the_output_keeps_gradients_right():
    case = SMALL
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    plain = torch.autograd.grad(case.call(*leaves).mul(2).sum(), leaves)
    edited = torch.autograd.grad(case.call(*leaves).mul_(2).sum(), leaves)
    assert all(map(torch.equal, edited, plain))


def test_reference_points_and_boxes():
    offsets = torch.tensor([[2.0, -1.0], [1.0, 3.0]]).view(1, 1, 1, 2, 2)
    shapes, points = [(4, 8), (10, 5)], [1, 1]
    reference = torch.tensor([0.5, 0.25]).view(1, 1, 1, 2)
    locations = sampling_locations(reference, offsets, shapes, points)
    expected = [[0.5 + 2 / 8, 0.25 - 1 / 4], [0.5 + 1 / 5, 0.25 + 3 / 10]]
    torch.testing.assert_close(locations.view(2, 2), torch.tensor(expected))
    box = torch.tensor([0.5, 0.25, 0.2, 0.4]).view(1, 1, 1, 4)
    locations = sampling_locations(box, offsets.repeat(1, 1, 1, 2, 1), shapes, [2, 2])
    expected = [
        [0.5 + 2 * 0.25 * 0.2, 0.25 - 0.25 * 0.4],
        [0.5 + 0.25 * 0.2, 0.25 + 3 * 0.25 * 0.4],
    ]
    torch.testing.assert_close(locations.view(4, 2), torch.tensor(expected * 2))
    for offsets, shapes in (
        (torch.zeros(1, 1, 1, 1, 2), [(8,)]),
        (torch.zeros(1, 1, 1, 1, 1), [(4, 8)]),
    ):
        reference = torch.zeros(1, 1, 1, offsets.shape[-1])
        with pytest.raises(ValueError, match=r"spatial_shapes: expected . sizes for each level"):
            sampling_locations(reference, offsets, shapes, [1])


def test_discrete_rounds_from_the_edge():
    # floor(x * 4 + 0.5): half a pixel further than the pixel's own centre.
    cells = [10.0, 20, 30, 40]
    for x, expected in ((0.0, 10), (0.124, 10), (0.125, 20), (0.3, 20), (0.375, 30), (0.8, 40)):
        assert read_points(cells, (1, 4), [(x, 0.4)], interpolation="discrete") == expected
    # In pixels, where a centre is whole, floor(x + 1).
    for x, expected in ((-1.01, 0), (-1.0, 10), (-0.01, 10), (0.0, 20), (2.9, 40), (3.0, 0)):
        options = {"interpolation": "discrete", "coordinates": "pixel"}
        assert read_points(cells, (1, 4), [(x, -0.5)], **options) == expected


def test_discrete_with_border_is_clamped():
    cells, border = [10.0, 20, 30, 40], {"interpolation": "discrete", "padding": "border"}
    assert read_points(cells, (1, 4), [(-7.0, 9.0)], **border) == 10
    assert read_points(cells, (1, 4), [(7.0, -9.0)], **border) == 40
    assert read_points(cells, (1, 4), [(3e38, 0.5)], **border) == 40
    assert read_points(cells, (1, 4), [(math.nan, 0.5)], **border) == 0


def test_discrete_with_border_height_is_clamped_to_the_height():
    by_height = {"interpolation": "discrete", "padding": "border_height"}
    rows = torch.arange(8.0)  # 2 rows, 4 columns
    assert read_points(rows, (2, 4), [(0.9, 0.9)], **by_height) == 5  # x is clamped to 1, y to 1
    assert read_points(rows, (2, 4), [(0.9, 0.1)], **by_height) == 1
    assert read_points(rows, (4, 2), [(0.9, 0.9)], **by_height) == 7  # never beyond the map


@pytest.mark.parametrize("padding", ["zeros", "border", "border_height"])
def test_discrete_has_no_gradient_to_locations(padding):
    case = SMALL.with_(interpolation="discrete", padding=padding, num_points=4)
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
    """The unit of an offset is a pixel in every kind of coordinates; for a box it is half of its size."""
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
    output = saccade.fused_deformable_attention(
        **alone, reference_points=torch.zeros(1, 1, 1, 1), attention_logits=logits,
        sampling_offsets=torch.full((1, 1, 1, 1, 1, 1), 3.0), coordinates="normalized_corners",
    )  # fmt: skip
    assert output.item() == 0.0  # with one pixel, all locations coincide: the step is 0


def test_the_worked_example_fused():
    """The fused operator reads the same four pixels from reference point, offsets and logits."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    offsets = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]])
    output = saccade.fused_deformable_attention(
        (10 * x + y).reshape(1, 16, 1, 1), [(4, 4)], torch.full((1, 1, 1, 2), 1.5),
        offsets.view(1, 1, 1, 1, 4, 2), torch.zeros(1, 1, 1, 1, 4), coordinates="pixel",
    )  # fmt: skip
    assert output.item() == 16.5


def test_each_point_starts_from_the_reference_of_its_index():
    value = torch.arange(8.0).view(1, 8, 1, 1)
    references = torch.tensor([1.0, 4.0, 6.0]).view(1, 1, 3, 1)
    offsets, logits = torch.zeros(1, 1, 1, 4, 1), torch.zeros(1, 1, 1, 4)
    for index, expected in (([0, 0, 0, 0], 1.0), ([2, 2, 1, 1], 5.0), ([0, 1, 2, 0], 3.0)):
        output = saccade.fused_deformable_attention(
            value, [(8,)], references, offsets, logits,
            num_points=4, reference_index=index, coordinates="pixel",
        )  # fmt: skip
        assert output.item() == expected
