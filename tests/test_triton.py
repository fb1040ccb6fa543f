"""The GPU kernels against the reference and the loops: on a card, or in the interpreter of Triton."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import (
    FEW_PAIRS,
    NO_TRITON,
    ON_A_CARD,
    TOO_WIDE,
    WITH_TRITON,
    gpu_plans,
    summing,
    table,
)
from fused_helpers import FusedCase, fused_loops
from helpers import Case, assert_16_bit_is_as_good_as_naive, grid_sample_path, loops, some
from triton_helpers import (
    assert_close,
    draw_call,
    draw_grad_output,
    draw_options,
    run_kernels,
    run_reference,
)

import saccade
from saccade import call as call_cache
from saccade.ops import schema
from saccade.reference import execute

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import forward, plan


def check_call(monkeypatch, call, kernel, summed):
    """Output and gradients are those of the reference; gives the names of the kernels that ran."""
    grad_output = draw_grad_output(call)
    entries = {"few_pairs": FEW_PAIRS[kernel], **summing(summed)}
    with table(monkeypatch, **entries) as ran:
        actual = run_kernels(call, grad_output)
    assert_close(actual, run_reference(call, grad_output))
    return ran


def few_quick(cases, count):
    """All cases, of which the first `count` belong to `make test-quick`."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    slow = (pytest.param(*case, marks=pytest.mark.slow) for case in cases[count:])
    return [*(pytest.param(*case) for case in cases[:count]), *slow]


@pytest.mark.slow
@pytest.mark.parametrize("seed", few_quick(some(range(600), 48), 4))
def test_drawn_calls(monkeypatch, seed):
    options = draw_options(seed)
    call = draw_call(seed)
    ran = check_call(monkeypatch, call, options["kernel"], options["summed"])
    ways = ("forward", "backward") if call.has_queries else ()
    assert ran == [f"{way}_{options['kernel']}_kernel" for way in ways]


SIZES = {
    "wide-rows": {"shapes": [(2, 3)], "head_dim": 300, "num_heads": 1, "num_points": 1},
    "slices-of-rows": {"shapes": [(2, 2)], "head_dim": 2100, "num_heads": 1, "num_points": 1},
    "many-points": {"shapes": [(3, 3), (1, 2)], "num_points": [40, 9], "num_heads": 1},
    "nine-levels": {"shapes": [(n, 10 - n) for n in range(1, 10)], "num_points": 1},
    "thin-volumes": {
        "shapes": [(1, 1, 7), (6, 1, 1), (1, 5, 1), (1, 1, 1), (3, 1, 2)],
        "num_points": 1,
    },
    "more-blocks-than-one": {
        "num_queries": 131,
        "shapes": [(3, 4)],
        "num_points": 1,
        "head_dim": 8,
    },
    "no-queries": {"num_queries": 0},
    "no-maps": {"batch_size": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", [("queries", "sorted"), ("points", "atomic")], ids="-".join)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(monkeypatch, name, way):
    usual = {
        "batch_size": 1, "num_queries": 2, "num_heads": 1, "interpolation": "linear",
        "queries_per_map": None, "dtype": torch.float32, "point_dtype": torch.float32,
    }  # fmt: skip
    call = draw_call(0, **usual | SIZES[name])
    ran = check_call(monkeypatch, call, *way)
    assert f"forward_{way[0]}_kernel" in ran or name in TOO_WIDE or not call.has_queries


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["none", "points"])
def test_softmax_and_reference_points_are_independent(monkeypatch, reference):
    # Softmax of logits at locations, and plain weights at reference points with offsets.
    softmax = reference == "none"
    for seed, kernel in enumerate(FEW_PAIRS):
        fixed = {"dtype": torch.float64, "point_dtype": torch.float64, "num_queries": 4}
        call = draw_call(seed, reference=reference, softmax=softmax, **fixed)
        check_call(monkeypatch, call, kernel, "atomic")
        # By parts: the softmax and the offsets applied before the call change nothing.
        by_parts = call._replace(
            options=call.options._replace(softmax=False),
            weights=call.weights.softmax(-1) if softmax else call.weights,
        )
        torch.testing.assert_close(execute(by_parts), execute(call), rtol=0, atol=1e-14)


# Every rule once on maps of one to three dimensions, against scalar loops that share no code.
RULES = [
    (shapes, interpolation, padding, coordinates)
    for shapes in ([(3, 4), (1, 2)], [(5,), (1,)], [(2, 3, 2)])
    for interpolation in ("linear", "nearest", "discrete")
    for padding in ("zeros", "border", "border_height")
    for coordinates in ("normalized", "normalized_corners", "pixel")
    if padding != "border_height" or (interpolation == "discrete" and len(shapes[0]) == 2)
]


@pytest.mark.parametrize(
    ("shapes", "interpolation", "padding", "coordinates"), few_quick(some(RULES, 20), 3)
)
def test_options_by_scalar_loops(kernel, shapes, interpolation, padding, coordinates):
    case = Case(
        shapes=shapes, num_points=2, num_queries=4, num_heads=1, head_dim=2, batch_size=1,
        interpolation=interpolation, padding=padding, coordinates=coordinates, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), loops(case, *inputs), rtol=0, atol=1e-12)


FUSED_RULES = itertools.product(
    ([(3, 4), (1, 2)], [(5,), (1,)], [(2, 3, 2)]),
    (False, True),
    ("normalized", "normalized_corners", "pixel"),
    (None, [2, 0, 1]),
)


@pytest.mark.parametrize(
    ("shapes", "boxes", "coordinates", "ragged"), few_quick(some(FUSED_RULES, 10), 2)
)
def test_fused_by_scalar_loops(kernel, shapes, boxes, coordinates, ragged):
    case = FusedCase(
        shapes=shapes, num_points=2, num_queries=3, num_heads=1, head_dim=2,
        batch_size=1 if ragged is None else 3, queries_per_map=ragged, references="levels",
        boxes=boxes, coordinates=coordinates, dtype=torch.float64,
    )  # fmt: skip
    inputs = case.draw()
    torch.testing.assert_close(case.call(*inputs), fused_loops(case, *inputs), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
def test_exactly_on_edges_and_centres(kernel, interpolation, padding):
    case = Case(
        shapes=[(3, 4)], num_points=1, num_queries=81, num_heads=1, batch_size=1, head_dim=1,
        interpolation=interpolation, padding=padding, coordinates="pixel",
    )  # fmt: skip
    value, _, weights = case.draw()
    steps = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    locations = torch.cartesian_prod(steps, steps).view(1, 81, 1, 1, 2)
    expected = execute(case.parse(value, locations, weights))
    torch.testing.assert_close(case.call(value, locations, weights), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_positions_are_rounded_twice(kernel):
    # On a map that holds its own coordinate, at and beside the edges and centres of pixels: at some
    # locations a product and a sum that are rounded at once come out otherwise.
    size = 77
    edges = ((torch.arange(2 * size, dtype=torch.float64) / 2 + 0.5) / size).float()
    near = [edges]
    for end in (-1.0, 2.0):
        moved = edges
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
        actual = saccade.deformable_attention(*arguments, interpolation=interpolation)
        expected = saccade.reference.deformable_attention(*arguments, interpolation=interpolation)
        assert torch.equal(actual, expected), interpolation


def test_fused_locations_are_those_of_the_operator_to_the_last_bit(kernel):
    # A map that holds its own coordinate, read by one point with weight 1: the position comes out.
    size, queries = 77, 1000
    value = torch.arange(float(size)).view(1, size, 1, 1)
    references, offsets = torch.rand(1, queries, 1, 1), torch.randn(1, queries, 1, 1, 1, 1)
    options = {"interpolation": "nearest", "padding": "border"}
    logits = torch.zeros(1, queries, 1, 1, 1)
    actual = saccade.fused_deformable_attention(
        value, [(size,)], references, offsets, logits, **options
    )
    locations = references[:, :, None, None] + offsets * (1 / torch.tensor(float(size)))
    expected = saccade.deformable_attention(
        value, [(size,)], locations, torch.ones_like(logits), **options
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_as_exact_as_naive_ones(kernel, dtype):
    case = Case(dtype=dtype, batch_size=1, num_heads=1)
    inputs = case.draw()
    truth = execute(case.parse(*(tensor.double() for tensor in inputs)))
    naive = grid_sample_path(case, *inputs)
    assert_16_bit_is_as_good_as_naive([case.call(*inputs)], [naive], [truth])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_written_as_it_is(kernel, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[~values.isnan()]
    values = values[: len(values) // 256 * 256].view(1, -1, 1, 256)
    positions = values.shape[1]
    actual = saccade.deformable_attention(
        values, [(positions,)], torch.arange(float(positions)).view(1, -1, 1, 1, 1, 1),
        torch.ones(1, positions, 1, 1, 1), coordinates="pixel", interpolation="nearest",
    )  # fmt: skip
    assert torch.equal(actual.flatten(), values.flatten())


@pytest.mark.slow
def test_words_of_two_elements_begin_where_words_begin(kernel, monkeypatch):
    case = Case(dtype=torch.bfloat16, head_dim=4, num_queries=3, num_heads=1)
    device = "cuda" if ON_A_CARD else "cpu"
    value, locations, weights = (tensor.to(device) for tensor in case.draw())
    moved = value.new_empty(value.numel() + 1)[1:].view(value.shape).copy_(value)
    assert moved.data_ptr() % 4
    read, start = [], plan.Kernel.start
    monkeypatch.setattr(
        plan.Kernel,
        "start",
        lambda self, programs, tensors, *rest: (
            read.append(tensors[1]) or start(self, programs, tensors, *rest)
        ),
    )
    actual, expected = (
        forward(*schema.to_arguments(case.parse(each, locations, weights)))
        for each in (moved, value)
    )
    assert [tensor.data_ptr() % 4 for tensor in read] == [0, 0]
    assert torch.equal(actual, expected)


def test_the_last_pixel_of_a_map_that_is_wider_than_floats_are_exact(kernel):
    size = 2**24 + 4
    value = torch.zeros(1, size, 1, 1)
    value[:, -5:] = 1
    far = torch.tensor([1.0, 3.0, 1e30]).view(1, 3, 1, 1, 1, 1)
    arguments = (value, [(size,)], far, torch.ones(1, 3, 1, 1, 1))
    assert (saccade.deformable_attention(*arguments, padding="border") == 1).all()
    assert (saccade.reference.deformable_attention(*arguments, padding="border") == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shapes", [[(7,), (2,)], [(6, 7), (3, 4)], [(2, 3, 4)]])
def test_what_is_not_finite_as_in_the_reference(monkeypatch, shapes, padding):
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e300, 0.5])
    reference = {1: "none", 2: "points", 3: "boxes"}[len(shapes[0])]
    call = draw_call(
        len(shapes[0]), shapes=shapes, padding=padding, num_queries=16, num_heads=1, num_points=2,
        reference=reference, batch_size=1, queries_per_map=None, interpolation="linear",
        head_dim=4, dtype=torch.float64, point_dtype=torch.float64,
    )  # fmt: skip
    grad_output = draw_grad_output(call)
    shares = ((call.value, 0.02), (call.points, 0.1), (call.weights, 0.03), (grad_output, 0.02))
    for tensor, share in shares:
        chosen = torch.rand(tensor.shape) < share
        tensor[chosen] = odd[torch.randint(len(odd), (int(chosen.sum()),))].double()
    expected = run_reference(call, grad_output)
    for kernel, summed in zip(FEW_PAIRS, ("sorted", "atomic"), strict=True):
        with table(monkeypatch, few_pairs=FEW_PAIRS[kernel], **summing(summed)):
            actual = run_kernels(call, grad_output)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("location", [-1.0, 4.0])
def test_a_corner_inside_takes_part_with_a_weight_of_0(kernel, location):
    # At -1 exactly: 0 of the first pixel. At 4, of four pixels, nothing is inside.
    value = torch.full((1, 4, 1, 2), math.inf)
    arguments = (value, [(4,)], torch.full((1, 1, 1, 1, 1, 1), location), torch.ones(1, 1, 1, 1, 1))
    actual = saccade.deformable_attention(*arguments, coordinates="pixel")
    expected = saccade.reference.deformable_attention(*arguments, coordinates="pixel")
    assert expected.isnan().all() == (location == -1)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_infinite_pixels_that_no_point_reads_stay_where_they_are(kernel):
    # Five points: the kernels work on powers of two, and the points that fill up must not read.
    case = Case(shapes=[(6, 7)], num_points=5, coordinates="pixel", num_queries=5, num_heads=1)
    value, locations, weights = case.draw()
    value[:, 0] = value[:, -1] = math.inf
    assert case.call(value, locations.clamp(1.1, 4.0), weights).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("points", [1, 5, 40])
def test_softmax_of_odd_logits_is_that_of_torch(kernel, points):
    logits = torch.randn(9, points) * 30
    inf, nan = math.inf, math.nan
    logits[0], logits[1, 0], logits[2, -1], logits[3, 0] = -inf, inf, nan, -inf
    logits[4], logits[5] = 1e30, -1e30
    value = torch.randn(1, 30, 1, 3)
    references, offsets = torch.rand(1, 9, 1, 2), torch.randn(1, 9, 1, 1, points, 2)
    arguments = (value, [(5, 6)], references, offsets, logits.view(1, 9, 1, 1, points))
    torch.testing.assert_close(
        saccade.fused_deformable_attention(*arguments),
        saccade.reference.fused_deformable_attention(*arguments),
        equal_nan=True,
    )


def test_powers_do_not_overflow(kernel):
    value = torch.full((1, 30, 1, 4), 2e38)
    logits = torch.zeros(1, 3, 1, 1, 4)
    references, offsets = torch.full((1, 3, 1, 2), 0.5), torch.zeros(1, 3, 1, 1, 4, 2)
    actual = saccade.fused_deformable_attention(value, [(5, 6)], references, offsets, logits)
    torch.testing.assert_close(actual, torch.full_like(actual, 2e38))


@pytest.mark.slow
@pytest.mark.parametrize("seed", some(range(40), 4))
def test_offsets_counted_in_64_bits(monkeypatch, seed):
    from saccade.backends.triton import ordered_sum

    shapes = [[(5,), (1,)], [(3, 4), (1, 2)], [(2, 3, 2)]][seed % 3]
    call = draw_call(seed, shapes=shapes, num_queries=3, dtype=torch.float32)
    grad_output = draw_grad_output(call)
    entries = {"few_pairs": FEW_PAIRS["queries" if seed % 2 else "points"], **summing("sorted")}
    with table(monkeypatch, **entries):
        narrow = run_kernels(call, grad_output)
        assert not any(each.kernel.constants.USE_INT64_OFFSETS for each in gpu_plans())
        call_cache._cache.clear()
        monkeypatch.setattr(plan, "MAX_INT32_ELEMENTS", 0)
        monkeypatch.setattr(ordered_sum, "MAX_INT32_KEYS", 0)
        wide = run_kernels(call, grad_output)
        assert all(each.kernel.constants.USE_INT64_OFFSETS for each in gpu_plans())
    assert all(map(torch.equal, wide, narrow))


@pytest.mark.slow
def test_strides_do_not_matter(kernel):
    case = Case(num_queries=3)
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


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("spatial_shapes", [6, 7, 3, 400000], "spatial_shapes: expected"),
        ("spatial_shapes", [6, 7, 3], "spatial_shapes: expected"),
        ("spatial_shapes", [-6, -7, 3, 4], "spatial_shapes: expected"),
        ("points", torch.rand(2, 11, 3, 5, 2), "sampling_locations: expected"),
        ("weights", torch.rand(1, 11, 3, 6), "attention_weights: expected"),
        ("num_points", [3, 300], "sampling_locations: expected"),
        ("interpolation", "cubic", "interpolation: expected"),
        ("queries_per_map", [11, 11], r"sampling_locations: expected \[1, "),
        ("reference_points", torch.rand(2, 11, 5, 2), "reference_index: expected|reference_points"),
    ],
)
def test_the_operator_itself_checks_what_could_read_out_of_bounds(argument, change, message):
    case = Case()
    arguments = schema.to_arguments(case.parse(*case.draw()))
    with pytest.raises((ValueError, RuntimeError), match=message):
        forward(*arguments._replace(**{argument: change}))


@pytest.mark.slow
def test_freed_storage_is_an_error_not_a_crash(kernel):
    case = Case(num_queries=1)
    inputs = case.draw()
    case.call(*inputs)
    inputs[0].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="storage"):
        case.call(*inputs)


def test_a_plan_is_made_once_for_calls_alike(kernel):
    case = Case(num_queries=2, num_heads=1, batch_size=1)
    for _ in range(3):
        case.call(*case.draw())
    assert len(gpu_plans()) == 1
    case.with_(padding="border").call(*case.draw())
    assert len(gpu_plans()) == 2


def test_a_compiled_kernel_is_kept_for_what_it_was_compiled_for():
    case, compiled, launched = Case(), [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Function:
        def __getitem__(self, grid):
            return lambda *arguments, **options: compiled.append((arguments, options)) or Compiled()

    value, output = case.draw()[0], torch.empty(4)
    moved = torch.empty(value.numel() + 1)[1:].view(value.shape)
    kernel = plan.Kernel(Function(), ("constants",), 8)
    for each in (value, value, moved, moved, value):
        kernel.start(7, (output, each), (9, 11), (37,))
    # One for aligned memory, one for unaligned memory; after that as they are.
    assert [arguments[1].data_ptr() for arguments, _ in compiled] == [
        value.data_ptr(),
        moved.data_ptr(),
    ]
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
    assert all(each == options | {"C": ("constants",)} for _, each in compiled)
    assert len(launched) == 3
    grid, arguments = launched[0]
    assert grid == (7, 1, 1)
    assert arguments[0] is output
    assert arguments[1] is value
    assert arguments[2:] == ((9, 11), 37, ("constants",))
    # Numbers beyond 32 bits are of another type: for those Triton finds the kernel anew.
    kernel.start(7, (output, value), (9, 11), (2**31,))
    assert len(compiled) == 3
    kernel.start(0, (output, value), (9, 11), (37,))
    assert len(compiled) + len(launched) == 6
