"""Depth-weighted attention and multi-camera aggregation: loops, identities, gradients, edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from composition_helpers import (
    CAMERAS,
    SHAPES,
    assert_all_close,
    camera_by_camera,
    depth_weighted_loops,
    draw_depth_weighted,
    draw_multi_camera,
    multi_camera_loops,
    on_the_volume,
    with_gradients,
)
from conftest import BACKENDS
from helpers import TOLERANCE, some
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade
from saccade import depth_weighted_deformable_attention as depth_weighted
from saccade import multi_camera_deformable_aggregation as multi_camera

INF, NAN = math.inf, math.nan


HEADS = [(2, 2), (2, 1), (1, 2), (1, 1)]


@pytest.mark.parametrize(
    ("heads", "dtype"), some(itertools.product(HEADS, (torch.float32, torch.float64)), 4)
)
def test_depth_weighted_is_its_loops(backend, heads, dtype):
    value_heads, depth_heads = heads
    value, depth, locations, weights = draw_depth_weighted(
        dtype, value_heads=value_heads, depth_heads=depth_heads
    )
    output = depth_weighted(value, depth, SHAPES, locations, weights)
    assert output.dtype == dtype
    expected = depth_weighted_loops(value, depth, SHAPES, locations, weights)
    assert_all_close([output], [expected], TOLERANCE[dtype])


@pytest.mark.parametrize(("value_heads", "depth_heads"), HEADS)
def test_depth_weighted_is_the_operator_on_the_volume(cpu_backend, value_heads, depth_heads):
    value, depth, locations, weights = draw_depth_weighted(
        value_heads=value_heads, depth_heads=depth_heads, queries=9
    )
    # Every kind of edge along every axis: the last cell that is outside, borders, centres, beyond.
    edges = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5, -1e30, 0.25, 2.0, 7.0])
    pixels = edges.double() / torch.tensor([4.0, 3, 3]).double()[:, None]
    for axis in range(3):
        locations[0, :, 0, 0, axis, axis] = pixels[axis]
    inputs = (value, depth, locations, weights)
    actual = with_gradients(lambda v, d, p, w: depth_weighted(v, d, SHAPES, p, w), inputs)
    expected = with_gradients(lambda v, d, p, w: on_the_volume(v, d, SHAPES, p, w), inputs)
    assert_all_close(actual, expected, 4 * TOLERANCE[torch.float64])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_depth_weighted_is_the_operator_on_any_volume(data):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    size = st.integers(1, 5)
    shapes = data.draw(st.lists(st.tuples(size, size), min_size=1, max_size=3))
    heads = data.draw(st.integers(1, 3))
    inputs = draw_depth_weighted(
        shapes=shapes,
        heads=heads,
        value_heads=data.draw(st.sampled_from([1, heads])),
        depth_heads=data.draw(st.sampled_from([1, heads])),
        bins=data.draw(st.integers(1, 4)),
        points=data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.integers(1, 9)),
        spread=data.draw(st.floats(0, 2)),
    )
    actual = with_gradients(lambda v, d, p, w: depth_weighted(v, d, shapes, p, w), inputs)
    expected = with_gradients(lambda v, d, p, w: on_the_volume(v, d, shapes, p, w), inputs)
    assert_all_close(actual, expected, 4 * TOLERANCE[torch.float64])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multi_camera_is_its_loops(backend, dtype):
    value, locations, weights = draw_multi_camera(dtype)
    output = multi_camera(value, CAMERAS, locations, weights)
    assert output.dtype == dtype
    expected = multi_camera_loops(value, CAMERAS, locations, weights)
    assert_all_close([output], [expected], TOLERANCE[dtype])
    assert torch.equal(output, multi_camera(value, torch.tensor(CAMERAS), locations, weights))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_multi_camera_is_the_operator_camera_by_camera(data):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    size, levels = st.integers(1, 5), data.draw(st.integers(1, 3))
    pyramids = st.lists(st.tuples(size, size), min_size=levels, max_size=levels)
    cameras = data.draw(st.lists(pyramids, min_size=1, max_size=3))
    groups = data.draw(st.integers(1, 4))
    inputs = draw_multi_camera(
        cameras=cameras,
        groups=groups,
        channels=groups * data.draw(st.integers(1, 9)),
        points=data.draw(st.integers(1, 4)),
    )
    actual = with_gradients(lambda v, p, w: multi_camera(v, cameras, p, w), inputs)
    expected = with_gradients(lambda v, p, w: camera_by_camera(v, cameras, p, w), inputs)
    assert_all_close(actual, expected, 4 * TOLERANCE[torch.float64])


def test_multi_camera_reads_strictly_inside_only(backend):
    shapes = [[(2, 2)]]
    value = torch.ones(1, 4, 1)
    # On the border and beyond: nothing. A hair inside: half of a corner pixel's row is outside.
    numbers = torch.tensor([0.0, 1.0, -0.1, 1.1, NAN, INF, 1e-6, 1 - 1e-6, 0.5])
    for axis in range(2):
        points = torch.full((1, 9, 1, 1, 2), 0.5)
        points[0, :, 0, 0, axis] = numbers
        points.requires_grad_()
        weights = torch.ones(1, 9, 1, 1, 1, 1, requires_grad=True)
        output = multi_camera(value, shapes, points, weights)
        expected = torch.tensor([0.0] * 6 + [0.5, 0.5, 1.0])
        assert torch.allclose(output.flatten(), expected, atol=1e-5)
        output.sum().backward()
        assert not points.grad[0, :6].any()
        assert points.grad[0, 6, 0, 0, axis] > 0 > points.grad[0, 7, 0, 0, axis]
        assert torch.allclose(weights.grad.flatten(), expected, atol=1e-5)


@pytest.mark.slow
def test_first_derivatives(cpu_backend):
    shapes, cameras = [(2, 3), (1, 2)], [[(2, 2)], [(1, 3)]]
    inputs = draw_depth_weighted(shapes=shapes, batch=1, queries=2, points=2, head_dim=2)
    assert torch.autograd.gradcheck(
        lambda v, d, p, w: depth_weighted(v, d, shapes, p, w),
        [tensor.requires_grad_() for tensor in inputs],
    )
    inputs = draw_multi_camera(cameras=cameras, batch=1, anchors=2, channels=4)
    assert torch.autograd.gradcheck(
        lambda v, p, w: multi_camera(v, cameras, p, w),
        [tensor.requires_grad_() for tensor in inputs],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS[:2])
def test_second_derivatives(name):
    with saccade.use_backend(name):
        assert_second_derivatives()


def assert_second_derivatives():
    depth_inputs = draw_depth_weighted(
        shapes=[(2, 2)], bins=2, batch=1, queries=1, points=2, head_dim=1
    )
    assert torch.autograd.gradgradcheck(
        lambda v, d, p, w: depth_weighted(v, d, [(2, 2)], p, w),
        [t.requires_grad_() for t in depth_inputs],
    )
    cameras = [[(2, 2)], [(1, 2)]]
    inputs = draw_multi_camera(cameras=cameras, batch=1, anchors=1, points=2, channels=2)
    assert torch.autograd.gradgradcheck(
        lambda v, p, w: multi_camera(v, cameras, p, w), [t.requires_grad_() for t in inputs]
    )


# One rounding of the result: half of the last bit.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_16_bit_is_rounded_once(backend, dtype):
    value, depth, locations, weights = draw_depth_weighted(dtype, shapes=[(90, 120)], spread=0)
    output = depth_weighted(value, depth, [(90, 120)], locations, weights)
    expected = depth_weighted_loops(value, depth, [(90, 120)], locations, weights)
    # float32 locations: an error of 1e-5 of a pixel, times slopes and depths.
    assert output.dtype == dtype
    assert ((output - expected).abs() <= ROUNDING[dtype] * expected.abs() + 1e-3).all()
    cameras = [[(90, 120)], [(60, 80)]]
    value, locations, weights = draw_multi_camera(dtype, cameras=cameras)
    output = multi_camera(value, cameras, locations, weights)
    expected = multi_camera_loops(value, cameras, locations, weights)
    assert output.dtype == dtype
    assert ((output - expected).abs() <= ROUNDING[dtype] * expected.abs() + 1e-3).all()


def test_the_gradient_of_a_16_bit_depth_is_rounded_once(cpu_backend):
    value, depth, locations, weights = draw_depth_weighted(torch.float32, queries=50)
    inputs = (value, depth.bfloat16(), locations, weights)
    _, _, actual, *_ = with_gradients(lambda v, d, p, w: depth_weighted(v, d, SHAPES, p, w), inputs)
    assert actual.dtype == torch.bfloat16
    exact = [tensor.double() for tensor in inputs]
    _, _, expected, *_ = with_gradients(lambda v, d, p, w: on_the_volume(v, d, SHAPES, p, w), exact)
    # Contributions of both signs: a sum of rounded parts would be off by more than its last bit.
    assert ((actual - expected).abs() <= ROUNDING[torch.bfloat16] * expected.abs() + 1e-4).all()


@pytest.mark.parametrize("number", [INF, -INF, NAN, 1e38])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_location_that_is_not_finite_contributes_nothing(cpu_backend, axis, number):
    value, depth, locations, weights = draw_depth_weighted(torch.float32)
    # Infinite wherever a dropped point could be led to read instead.
    locations[..., axis] = number
    for cell in (0, 12, -1):
        value[:, cell] = depth[:, cell] = INF
    inputs = (value, depth, locations, weights)
    for tensor in with_gradients(lambda v, d, p, w: depth_weighted(v, d, SHAPES, p, w), inputs):
        assert not tensor.any()
    if axis == 2:
        return
    value, locations, weights = draw_multi_camera(torch.float32)
    locations[..., axis] = number
    value[:, 0] = value[:, -1] = INF
    inputs = (value, locations, weights)
    for tensor in with_gradients(lambda v, p, w: multi_camera(v, CAMERAS, p, w), inputs):
        assert not tensor.any()


def test_infinite_numbers_do_not_leak_from_cells_that_nobody_reads(backend):
    shape, bins = (4, 4), 4
    value, depth = torch.full((1, 16, 1, 1), INF), torch.full((1, 16, 1, bins), INF)
    read = [5, 6, 9, 10]  # the pixels (1 … 2, 1 … 2)
    value[:, read] = 1
    depth[:, read, :, 1:3] = 1
    locations = torch.tensor([0.5, 0.5, 0.5]).view(1, 1, 1, 1, 1, 3)
    inputs = (value, depth, locations, torch.ones(1, 1, 1, 1, 1))
    output, *gradients = with_gradients(
        lambda v, d, p, w: depth_weighted(v, d, [shape], p, w), inputs
    )
    assert output.item() == 1
    assert all(gradient.isfinite().all() for gradient in gradients)
    # And one that is read does reach the output.
    depth[:, 10, :, 2] = INF
    assert depth_weighted(value, depth, [shape], *inputs[2:]).item() == INF


@pytest.mark.parametrize(("z", "reads"), [(-0.5, False), (-0.24, True), (0.5, True), (1.25, False)])
def test_outside_along_depth_reads_nothing(backend, z, reads):
    # The positions are -1.5, -0.98, 0.5 and 2 on two bins; the value shows whether it was read.
    value, depth = torch.full((1, 1, 1, 1), INF), torch.ones(1, 1, 1, 2)
    locations = torch.tensor([0.5, 0.5, z]).view(1, 1, 1, 1, 1, 3)
    output = depth_weighted(value, depth, [(1, 1)], locations, torch.ones(1, 1, 1, 1, 1))
    assert output.item() == (INF if reads else 0)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}])
def test_nothing_to_do(backend, sizes):
    inputs = draw_depth_weighted(torch.float32, **sizes)
    actual = with_gradients(lambda v, d, p, w: depth_weighted(v, d, SHAPES, p, w), inputs)
    assert actual[0].shape == (sizes.get("batch", 2), sizes.get("queries", 4), 6)
    assert not any(gradient.any() for gradient in actual[1:])
    sizes = {{"queries": "anchors"}.get(name, name): size for name, size in sizes.items()}
    inputs = draw_multi_camera(torch.float32, **sizes)
    actual = with_gradients(lambda v, p, w: multi_camera(v, CAMERAS, p, w), inputs)
    assert actual[0].shape == (sizes.get("batch", 2), sizes.get("anchors", 3), 6)
    assert not any(gradient.any() for gradient in actual[1:])


def test_strides_do_not_matter():
    inputs = draw_depth_weighted()
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert torch.equal(
        depth_weighted(*inputs[:2], SHAPES, *inputs[2:]),
        depth_weighted(*strided[:2], SHAPES, *strided[2:]),
    )
    inputs = draw_multi_camera()
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert torch.equal(
        multi_camera(inputs[0], CAMERAS, *inputs[1:]),
        multi_camera(strided[0], CAMERAS, *strided[1:]),
    )


def test_the_bits_do_not_depend_on_threads():
    inputs = draw_depth_weighted(torch.float32, batch=1, queries=300, points=8, depth_heads=1)
    many = draw_multi_camera(torch.float32, batch=1, anchors=300, points=13)
    threads, actual = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            deep = with_gradients(lambda v, d, p, w: depth_weighted(v, d, SHAPES, p, w), inputs)
            wide = with_gradients(lambda v, p, w: multi_camera(v, CAMERAS, p, w), many)
            actual.append((*deep, *wide))
    finally:
        torch.set_num_threads(threads)
    for again in actual[1:]:
        assert all(torch.equal(*pair) for pair in zip(actual[0], again, strict=True))


@pytest.mark.slow
def test_one_graph_for_a_compiler():
    inputs = draw_depth_weighted(torch.float32)
    compiled = torch.compile(depth_weighted, backend="eager", fullgraph=True)
    expected = depth_weighted(*inputs[:2], SHAPES, *inputs[2:])
    assert torch.equal(compiled(*inputs[:2], SHAPES, *inputs[2:]), expected)
    inputs = draw_multi_camera(torch.float32)
    compiled = torch.compile(multi_camera, backend="eager", fullgraph=True)
    expected = multi_camera(inputs[0], CAMERAS, *inputs[1:])
    assert torch.equal(compiled(inputs[0], CAMERAS, *inputs[1:]), expected)


VALUE, DEPTH, LOCATIONS, WEIGHTS = draw_depth_weighted()
MANY_VALUE, MANY_LOCATIONS, MANY_WEIGHTS = draw_multi_camera()
BAD_DEPTH_WEIGHTED = {
    "value-kind": ({"value": 1.0}, TypeError, "value: expected a Tensor, got float"),
    "value-dtype": ({"value": VALUE.long()}, ValueError, "value: expected one of .*int64"),
    "value-axes": ({"value": VALUE[0]}, ValueError, r"value: expected \[batch, positions, heads,"),
    "value-heads": ({"value": VALUE.repeat(1, 1, 2, 1)}, ValueError, "value: expected 2 heads"),
    "value-empty": ({"value": VALUE[..., :0]}, ValueError, "value: expected .*head_dim"),
    "depth-heads": (
        {"depth_distribution": DEPTH.repeat(1, 1, 2, 1)},
        ValueError,
        "depth_distribution: expected 2 heads .*got 4",
    ),
    "depth-positions": (
        {"depth_distribution": DEPTH[:, :5]},
        ValueError,
        r"depth_distribution: expected \[batch 2, positions 17, heads, bins\], got \[2, 5, 2, 3\]",
    ),
    "depth-bins": ({"depth_distribution": DEPTH[..., :0]}, ValueError, "depth_distribution: "),
    "depth-sparse": (
        {"depth_distribution": DEPTH.to_sparse()},
        ValueError,
        "depth_distribution: expected a dense",
    ),
    "shapes-sum": ({"spatial_shapes": [(3, 4), (1, 6)]}, ValueError, "spatial_shapes: .*17.*18"),
    "shapes-3d": ({"spatial_shapes": [(3, 4, 1)]}, ValueError, r"spatial_shapes: .*\(height, wid"),
    "locations-2d": (
        {"sampling_locations": LOCATIONS[..., :2]},
        ValueError,
        r"sampling_locations: expected \[batch 2, queries, heads, levels 2, points, coordinates 3\]",
    ),
    "locations-flat": ({"sampling_locations": LOCATIONS.flatten(3, 4)}, ValueError, "sampling_loc"),
    "locations-device": (
        {"sampling_locations": LOCATIONS.to("meta")},
        ValueError,
        "sampling_locations: expected a tensor on cpu like value, got meta",
    ),
    "weights-shape": (
        {"attention_weights": WEIGHTS[:, :1]},
        ValueError,
        "attention_weights: expected .*queries 4",
    ),
}


@pytest.mark.parametrize("name", list(BAD_DEPTH_WEIGHTED))
def test_bad_arguments_of_depth_weighted(name):
    change, kind, message = BAD_DEPTH_WEIGHTED[name]
    good = {
        "value": VALUE,
        "depth_distribution": DEPTH,
        "spatial_shapes": SHAPES,
        "sampling_locations": LOCATIONS,
        "attention_weights": WEIGHTS,
    }
    depth_weighted(**good)
    with pytest.raises(kind, match=message):
        depth_weighted(**{**good, **change})


BAD_MULTI_CAMERA = {
    "value-axes": ({"value": VALUE}, ValueError, r"value: expected \[batch, positions, channels\]"),
    "shapes-flat": ({"spatial_shapes": CAMERAS[0]}, TypeError, "spatial_shapes: expected for each"),
    "shapes-none": ({"spatial_shapes": None}, TypeError, "spatial_shapes: expected for each"),
    "shapes-empty": ({"spatial_shapes": []}, ValueError, "spatial_shapes: .*no camera"),
    "shapes-levels": (
        {"spatial_shapes": [CAMERAS[0], CAMERAS[1][:1]]},
        ValueError,
        "spatial_shapes: .*same number of levels",
    ),
    "shapes-tensor": (
        {"spatial_shapes": torch.tensor(CAMERAS[0])},
        ValueError,
        r"spatial_shapes: .*\[cameras, levels, 2\], got \[2, 2\]",
    ),
    "shapes-meta": (
        {"spatial_shapes": torch.zeros(3, 2, 2, device="meta")},
        ValueError,
        "spatial_shapes: expected numbers",
    ),
    "shapes-sum": ({"spatial_shapes": CAMERAS[:2]}, ValueError, "spatial_shapes: .*sum to"),
    "locations-cameras": (
        {"sampling_locations": MANY_LOCATIONS[:, :, :, :2]},
        ValueError,
        "sampling_locations: expected .*cameras 3",
    ),
    "weights-levels": (
        {"attention_weights": MANY_WEIGHTS[..., :1, :]},
        ValueError,
        "attention_weights: expected .*levels 2",
    ),
    "weights-groups": (
        {"attention_weights": MANY_WEIGHTS.repeat(1, 1, 1, 1, 1, 2)},
        ValueError,
        "attention_weights: expected a number of groups that divides the 6 channels",
    ),
}


@pytest.mark.parametrize("name", list(BAD_MULTI_CAMERA))
def test_bad_arguments_of_multi_camera(name):
    change, kind, message = BAD_MULTI_CAMERA[name]
    good = {
        "value": MANY_VALUE,
        "spatial_shapes": CAMERAS,
        "sampling_locations": MANY_LOCATIONS,
        "attention_weights": MANY_WEIGHTS,
    }
    multi_camera(**good)
    with pytest.raises(kind, match=message):
        multi_camera(**{**good, **change})
