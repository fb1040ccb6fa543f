"""The GPU kernels against the reference and the loops: on a card, or in the interpreter of Triton."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import NO_TRITON, ON_A_CARD, WITH_TRITON
from helpers import (
    Case,
    assert_16_bit_is_as_good_as_naive,
    assert_same,
    grid_sample_path,
    loops,
)

import saccade
from saccade.ops import contract

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import launch


def reference(case, inputs, dtype=None):
    with saccade.use_backend("reference"):
        return case.call(*(tensor.to(dtype or tensor.dtype) for tensor in inputs))


def assert_equals_reference(case, inputs):
    found, expected = case.call(*inputs), reference(case, inputs)
    assert_same([found], [expected])


CASES = {
    "one-level": Case(shapes=[(6, 7)], num_queries=37, head_dim=32, num_points=4),
    "odd-head-dim": Case(head_dim=7, num_points=[1, 5]),
    "one-channel": Case(head_dim=1, num_heads=5),
    "wide-rows": Case(head_dim=300, num_heads=1, num_queries=3),
    "slices-of-rows": Case(head_dim=2100, num_heads=2, num_queries=2, num_points=1, batch_size=1),
    "single-cells": Case(shapes=[(1, 1), (1, 6), (5, 1)]),
    "lists": Case(shapes=[(8, 8), (4, 4), (2, 2)], num_points=[3, 6, 3]),
    "nine-levels": Case(shapes=[(n, 10 - n) for n in range(1, 10)], num_points=1),
    "many-points": Case(num_points=[40, 9], num_queries=2, num_heads=1, batch_size=1),
    "all-outside": Case(spread=40.0),
    "shared-head": Case(shared_head=True, num_heads=4, head_dim=33),
    "more-blocks-than-one": Case(num_queries=263, num_heads=1, head_dim=8, num_points=1),
    "lines": Case(shapes=[(13,), (1,), (6,)], num_points=[3, 1, 5], head_dim=17),
    "volumes": Case(shapes=[(4, 5, 6), (2, 1, 3)], num_points=[4, 3], head_dim=19),
    "thin-volumes": Case(shapes=[(1, 1, 7), (6, 1, 1), (1, 5, 1), (1, 1, 1), (3, 1, 2)]),
    "no-queries": Case(num_queries=0),
    "no-batch": Case(batch_size=0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sizes(kernel, case):
    assert_equals_reference(case, case.draw())


@pytest.mark.parametrize("coordinates", ["normalized", "normalized_corners", "pixel"])
@pytest.mark.parametrize(
    ("name", "interpolation", "padding"),
    [
        *itertools.product(
            ("one-level", "lists", "lines", "volumes"),
            ("linear", "nearest", "discrete"),
            ("zeros", "border"),
        ),
        ("one-level", "discrete", "border_height"),
        ("lists", "discrete", "border_height"),
    ],
)
def test_options_by_scalar_loops(kernel, name, interpolation, padding, coordinates):
    case = CASES[name].with_(
        interpolation=interpolation, padding=padding, coordinates=coordinates,
        num_queries=3, num_heads=2, head_dim=2, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), loops(case, *inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
def test_exactly_on_edges_and_centres(kernel, interpolation, padding):
    case = Case(
        shapes=[(3, 4), (1, 2)], num_points=1, num_queries=81, num_heads=1, batch_size=1,
        interpolation=interpolation, padding=padding, coordinates="pixel",
    )  # fmt: skip
    value, _, weights = case.draw()
    steps = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    locations = torch.cartesian_prod(steps, steps).view(1, 81, 1, 1, 2).repeat(1, 1, 1, 2, 1)
    assert_equals_reference(case, (value, locations, weights))


def test_positions_are_rounded_twice(kernel):
    # On a map that holds its own coordinate, at and beside the edges and centres of cells: in some
    # places a product and a sum that are rounded at once come out otherwise.
    size = 77
    places = ((torch.arange(2 * size, dtype=torch.float64) / 2 + 0.5) / size).float()
    near = [places]
    for end in (-1.0, 2.0):
        moved = places
        for _ in range(3):
            moved = moved.nextafter(torch.tensor(end))
            near.append(moved)
    near = torch.cat(near)
    for shift in (-0.5, 0.5):
        once = (near.double() * size + shift).float()
        assert (near * size + shift != once).any()
        assert ((near * size + shift).floor() != once.floor()).any()
    value = torch.arange(float(size)).view(1, size, 1, 1)
    locations = near.view(1, -1, 1, 1, 1, 1)
    weights = torch.ones(locations.shape[:-1])
    for interpolation in ("nearest", "discrete", "linear"):
        arguments = (value, [(size,)], locations, weights)
        found = saccade.deformable_attention(*arguments, interpolation=interpolation)
        expected = saccade.reference.deformable_attention(*arguments, interpolation=interpolation)
        assert torch.equal(found, expected), interpolation


@pytest.mark.parametrize("location_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["one-level", "odd-head-dim", "shared-head", "lines", "volumes"])
def test_16_bit_values(kernel, name, dtype, location_dtype):
    case = CASES[name].with_(dtype=dtype, location_dtype=location_dtype, batch_size=1)
    inputs = case.draw()
    truth = reference(case, inputs, torch.float64)
    naive = grid_sample_path(case, inputs[0], inputs[1].float(), inputs[2].float())
    assert_16_bit_is_as_good_as_naive([case.call(*inputs)], [naive], [truth])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_written_as_it_is(kernel, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[~values.isnan()]
    values = values[: len(values) // 64 * 64].view(1, -1, 1, 64)
    positions = values.shape[1]
    found = saccade.deformable_attention(
        values, [(positions,)], torch.arange(float(positions)).view(1, -1, 1, 1, 1, 1),
        torch.ones(1, positions, 1, 1, 1), coordinates="pixel", interpolation="nearest",
    )  # fmt: skip
    assert torch.equal(found.flatten(), values.flatten())


def test_words_of_two_numbers_begin_where_words_begin(kernel, monkeypatch):
    case = Case(dtype=torch.bfloat16, head_dim=4)
    device = "cuda" if ON_A_CARD else "cpu"
    value, locations, weights = (tensor.to(device) for tensor in case.draw())
    moved = value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value)
    assert moved.data_ptr() % 4
    given, start = [], launch.Prepared.start
    monkeypatch.setattr(
        launch.Prepared,
        "start",
        lambda self, programs, tensors, *rest: (
            given.append(tensors[1]) or start(self, programs, tensors, *rest)
        ),
    )
    found, expected = (
        launch.attend(*contract.arguments_of(case.understood(each, locations, weights)))
        for each in (moved, value)
    )
    assert [tensor.data_ptr() % 4 for tensor in given] == [0, 0]
    assert torch.equal(found, expected)


def test_the_last_pixel_of_a_map_that_is_wider_than_numbers_are_exact(kernel):
    size = 2**24 + 4
    value = torch.zeros(1, size, 1, 1)
    value[:, -5:] = 1
    far = torch.tensor([1.0, 3.0, 1e30]).view(1, 3, 1, 1, 1, 1)
    arguments = (value, [(size,)], far, torch.ones(1, 3, 1, 1, 1))
    assert (saccade.deformable_attention(*arguments, padding="border") == 1).all()
    assert (saccade.reference.deformable_attention(*arguments, padding="border") == 1).all()


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shapes", [[(7,), (2,)], [(6, 7), (3, 4)], [(2, 3, 4)]])
def test_what_is_not_finite_as_in_the_reference(kernel, shapes, padding):
    case = Case(shapes=shapes, num_queries=40, num_heads=1, padding=padding, dtype=torch.float64)
    value, locations, weights = case.draw()
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e300, 0.5])
    for tensor, share in ((value, 0.02), (locations, 0.1), (weights, 0.05)):
        chosen = torch.rand(tensor.shape) < share
        tensor[chosen] = odd[torch.randint(6, (int(chosen.sum()),))].double()
    inputs = (value, locations, weights)
    torch.testing.assert_close(
        case.call(*inputs), reference(case, inputs), rtol=1e-12, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize("location", [-1.0, 4.0])
def test_a_corner_inside_takes_part_with_a_weight_of_0(kernel, location):
    # At -1 exactly: 0 of the first pixel. At 4, of four pixels, nothing is inside.
    value = torch.full((1, 4, 1, 2), math.inf)
    points = (value, [(4,)], torch.full((1, 1, 1, 1, 1, 1), location), torch.ones(1, 1, 1, 1, 1))
    found = saccade.deformable_attention(*points, coordinates="pixel")
    expected = saccade.reference.deformable_attention(*points, coordinates="pixel")
    assert expected.isnan().all() == (location == -1)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_infinite_cells_that_nobody_reads_stay_where_they_are(kernel):
    # Five points: the kernels know powers of two, and what they fill up with must not read.
    case = Case(shapes=[(6, 7)], num_points=5, coordinates="pixel")
    value, locations, weights = case.draw()
    value[:, 0] = value[:, -1] = math.inf
    locations = locations.clamp(1.1, 4.0)
    assert case.call(value, locations, weights).isfinite().all()


def test_strides_do_not_matter(kernel):
    case = Case()
    value, locations, weights = case.draw()
    strided = (
        value.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        locations.flip(-1).contiguous().flip(-1).permute(4, 3, 2, 1, 0).contiguous().permute(
            4, 3, 2, 1, 0
        ),
        weights[:, :1].expand(-1, case.num_queries, -1, -1),
    )  # fmt: skip
    assert not any(tensor.is_contiguous() for tensor in strided)
    expected = case.call(*(tensor.contiguous() for tensor in strided))
    assert torch.equal(case.call(*strided), expected)


OPERATOR = torch.ops.saccade.deformable_attention


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (1, [6, 7, 3, 400000], "spatial_shapes: expected"),
        (1, [6, 7, 3], "spatial_shapes: expected"),
        (1, [-6, -7, 3, 4], "spatial_shapes: expected"),
        (2, torch.rand(2, 11, 3, 5, 2), "sampling_locations: expected"),
        (3, torch.rand(1, 11, 3, 6), "attention_weights: expected"),
        (4, [3, 300], "sampling_locations: expected"),
        (5, "cubic", "interpolation: expected"),
        (8, [11, 11], r"sampling_locations: expected \[1, "),
    ],
)
def test_the_operator_itself_checks_what_could_read_out_of_bounds(
    kernel, position, change, message
):
    case = Case()
    value, locations, weights = case.draw()
    arguments = [
        value,
        [6, 7, 3, 4],
        locations,
        weights,
        [3, 3],
        "linear",
        "zeros",
        "normalized",
        None,
    ]
    assert OPERATOR(*arguments).shape == (2, 11, 24)
    arguments[position] = change
    with pytest.raises((ValueError, RuntimeError), match=message):
        OPERATOR(*arguments)


def test_freed_storage_is_an_error_not_a_crash(kernel):
    inputs = Case().draw()
    inputs[0].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="storage"):
        Case().call(*inputs)


def test_a_kernel_that_was_found_is_kept_for_what_it_was_compiled_for():
    case, found, launched = Case(), [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Kernel:
        arg_names = ("output", "value", "sizes", "num_queries", "HEADS", "WIDE")

        def __getitem__(self, grid):
            return lambda *arguments, **constants: (
                found.append((arguments, constants)) or Compiled()
            )

    value, output = case.draw()[0], torch.empty(4)
    moved = torch.empty(value.numel() + 1)[1:].view(value.shape)
    constants = {"WIDE": False, "num_warps": 4, "HEADS": 3}
    prepared = launch.Prepared(Kernel(), constants, {})
    for given_value in (value, value, moved, moved, value):
        prepared.start(7, (output, given_value), ((9, 11),), (37,))
    # One for aligned memory, one for what is not; after that as they are, constants in their order.
    assert [arguments[1].data_ptr() for arguments, _ in found] == [
        value.data_ptr(),
        moved.data_ptr(),
    ]
    assert all(given == constants for _, given in found)
    assert len(launched) == 3
    grid, arguments = launched[0]
    assert grid == (7, 1, 1)
    assert arguments[0] is output
    assert arguments[1] is value
    assert arguments[2:] == ((9, 11), 37, 3, False)
    # Numbers beyond 32 bits are of another type: for those it is found anew.
    prepared.start(7, (output, value), ((9, 11),), (2**31,))
    assert len(found) == 3
    prepared.start(0, (output, value), ((9, 11),), (37,))
    assert len(found) + len(launched) == 6
