"""Bad arguments: an error that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from fused_helpers import COMBINATIONS
from helpers import Case
from torch.fx.experimental.proxy_tensor import make_fx

import saccade
from saccade import call as call_module
from saccade.call import MAX_CACHED, parse_call
from saccade.ops import native
from saccade.ops.registration import BACKWARD_OPERATOR, OPERATOR
from saccade.ops.schema import to_arguments

NEEDS_NATIVE = pytest.mark.skipif(
    native.failure is not None, reason=f"no native library: {native.failure}"
)

CASE = Case()
VALUE, LOCATIONS, WEIGHTS = CASE.draw()
GOOD = {
    "value": VALUE,
    "spatial_shapes": CASE.shapes,
    "sampling_locations": LOCATIONS,
    "attention_weights": WEIGHTS,
    "num_points": 3,
}
SIX_AXES = {
    "sampling_locations": LOCATIONS.unflatten(3, (2, 3)),
    "attention_weights": WEIGHTS.unflatten(3, (2, 3)),
    "num_points": None,
}

BAD = {
    "value-not-a-tensor": ({"value": [1.0]}, TypeError, "value: expected a Tensor, got list"),
    "value-integer": ({"value": VALUE.long()}, ValueError, "value: expected one of .*int64"),
    "value-complex": ({"value": VALUE + 0j}, ValueError, "value: expected one of .*complex64"),
    "value-axes": ({"value": VALUE[0]}, ValueError, r"value: expected 4 axes .* got 3 axes"),
    "value-sparse": ({"value": VALUE.to_sparse()}, ValueError, "value: expected a dense"),
    "value-heads": ({"value": VALUE[:, :, :2]}, ValueError, r"value: expected 3 heads .*got 2"),
    "value-no-channels": ({"value": VALUE[..., :0]}, ValueError, "value: expected a head_dim"),
    "value-batch": ({"value": VALUE[:1]}, ValueError, r"sampling_locations: expected \[1, any"),
    "shapes-sum": ({"spatial_shapes": [(6, 7), (3, 5)]}, ValueError, r"spatial_shapes: .*54.*57"),
    "shapes-empty": ({"spatial_shapes": []}, ValueError, "spatial_shapes: expected at least one"),
    "shapes-negative": ({"spatial_shapes": [(-6, -7), (3, 4)]}, ValueError, "positive sizes"),
    "shapes-zero": ({"spatial_shapes": [(6, 9), (0, 4)]}, ValueError, "positive sizes"),
    "shapes-float": ({"spatial_shapes": [(6.0, 7), (3, 4)]}, TypeError, "spatial_shapes: expected"),
    "shapes-flat": ({"spatial_shapes": [6, 7]}, TypeError, "spatial_shapes: expected a sequence"),
    "shapes-3d": (
        {"spatial_shapes": [(1, 6, 7), (3, 4, 1)]},
        ValueError,
        r"sampling_locations: .*\(last axis must be 3 for 3-D spatial_shapes\)",
    ),
    "shapes-4d": ({"spatial_shapes": [(6, 9, 1, 1)]}, ValueError, r"\(depth, height, width\), the"),
    "shapes-mixed": ({"spatial_shapes": [(6, 7), (12,)]}, ValueError, r"same for each .*\(12,\)"),
    "shapes-levels": ({"spatial_shapes": [(6, 9)]}, ValueError, r"\[2, any, any, 3, 2\]"),
    "locations-last-axis": (
        {"sampling_locations": torch.zeros(2, 11, 3, 6, 3)},
        ValueError,
        r"sampling_locations: expected \[2, any, any, 6, 2\], got \[2, 11, 3, 6, 3\] "
        r"\(last axis must be 2 for 2-D spatial_shapes\)",
    ),
    "locations-axes": (
        {"sampling_locations": LOCATIONS[0]},
        ValueError,
        "sampling_locations: expected 6 axes",
    ),
    "locations-integer": ({"sampling_locations": LOCATIONS.long()}, ValueError, "sampling_loc"),
    "locations-none": ({"sampling_locations": None}, TypeError, "sampling_locations: .*NoneType"),
    "locations-device": (
        {"sampling_locations": LOCATIONS.to("meta")},
        ValueError,
        "sampling_locations: expected a tensor on cpu like value, got meta",
    ),
    "weights-shape": (
        {"attention_weights": WEIGHTS[:, :10]},
        ValueError,
        r"attention_weights: expected \[2, 11, 3, 6\], got \[2, 10, 3, 6\]",
    ),
    "points-missing": ({"num_points": None}, ValueError, "num_points: expected a number of points"),
    "points-levels": ({"num_points": [6]}, ValueError, "num_points: expected 2 numbers"),
    "points-sum": ({"num_points": [3, 4]}, ValueError, r"\[2, any, any, 7, 2\]"),
    "points-zero": ({"num_points": [6, 0]}, ValueError, "num_points: expected at least 1"),
    "points-float": ({"num_points": 3.0}, TypeError, "num_points: expected an int"),
    "points-bool": ({"num_points": True}, TypeError, "num_points: expected an int"),
    "points-contradict": (
        {**SIX_AXES, "num_points": [2, 4]},
        ValueError,
        r"num_points: expected 3 for each level.*got \[2, 4\]",
    ),
    "levels-contradict": (
        {**SIX_AXES, "spatial_shapes": [(6, 9)]},
        ValueError,
        r"spatial_shapes has 1 levels",
    ),
    "shapes-too-large": (
        {"value": torch.zeros(1, 1, 1, 1).expand(2, 2**31, 1, 1), "spatial_shapes": [(2, 2**30)]},
        ValueError,
        "spatial_shapes: expected at most 2147483647 positions per level",
    ),
    "shapes-meta": (
        {"spatial_shapes": torch.tensor(CASE.shapes).to("meta")},
        ValueError,
        "spatial_shapes: expected numbers, got a meta tensor",
    ),
    "value-nested": (
        {"value": torch.nested.nested_tensor([torch.zeros(54, 3, 8)] * 2)},
        ValueError,
        "value: expected a dense",
    ),
    "option-tensor": ({"padding": VALUE}, ValueError, "padding: .*got Tensor$"),
    "mask-device": (
        {"value_padding_mask": torch.zeros(2, 54, dtype=torch.bool, device="meta")},
        ValueError,
        "value_padding_mask: expected a dense tensor on cpu",
    ),
    "interpolation": ({"interpolation": "cubic"}, ValueError, "interpolation: .*'cubic'"),
    "padding": ({"padding": "reflect"}, ValueError, "padding: .*'zeros', 'border'.*'reflect'"),
    "coordinates": ({"coordinates": None}, ValueError, "coordinates: .*'normalized'.*None"),
    "mask-dtype": (
        {"value_padding_mask": torch.zeros(2, 54)},
        ValueError,
        "value_padding_mask: expected torch.bool",
    ),
    "mask-shape": (
        {"value_padding_mask": torch.zeros(2, 53, dtype=torch.bool)},
        ValueError,
        r"value_padding_mask: expected \[2, 54\]",
    ),
    "mask-kind": ({"value_padding_mask": 1}, TypeError, "value_padding_mask: expected a Tensor"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_argument_is_named(change, error, message):
    with pytest.raises(error, match=message):
        saccade.deformable_attention(**{**GOOD, **change})
    with pytest.raises(error, match=message):
        saccade.reference.deformable_attention(**{**GOOD, **change})


def test_spatial_shapes_of_every_kind_agree():
    expected = saccade.deformable_attention(**GOOD)
    as_tensor = torch.tensor(CASE.shapes)
    for shapes in (
        as_tensor,
        as_tensor.int(),
        as_tensor.numpy(),
        tuple(CASE.shapes),
        [list(shape) for shape in CASE.shapes],
        [torch.Size(shape) for shape in CASE.shapes],
    ):
        output = saccade.deformable_attention(**{**GOOD, "spatial_shapes": shapes})
        assert torch.equal(output, expected)


def test_six_axes_equal_five_with_num_points():
    expected = saccade.deformable_attention(**GOOD)
    assert torch.equal(saccade.deformable_attention(**{**GOOD, **SIX_AXES}), expected)


# Queries of both maps one after the other.
RAGGED = {"points": LOCATIONS.flatten(0, 1)[None], "weights": WEIGHTS.flatten(0, 1)[None]}
ARGUMENTS = to_arguments(CASE.parse(VALUE, LOCATIONS, WEIGHTS))
FUSED_ARGUMENTS = ARGUMENTS._replace(
    reference_points=torch.rand(2, 11, 1, 2), reference_index=[0] * 6, softmax=True
)


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (arguments, changes, message)
        for arguments, rows in (
            (
                ARGUMENTS,
                [
                    ({"spatial_shapes": [6, 7, 3, 400000]}, "value: expected"),
                    ({"spatial_shapes": [6, 7, 3]}, "spatial_shapes: expected"),
                    ({"spatial_shapes": [2**40, 2**40, 3, 4]}, "spatial_shapes: expected"),
                    ({"spatial_shapes": [-6, -7, 3, 4]}, "spatial_shapes: expected"),
                    ({"num_points": [3, 300]}, "sampling_locations: expected"),
                    ({"num_points": [7, -1]}, "num_points: expected"),
                    ({"num_points": []}, "spatial_shapes: expected"),
                    ({"weights": WEIGHTS[:1]}, "attention_weights: expected"),
                    ({"weights": WEIGHTS[:1], "softmax": True}, "attention_logits: expected"),
                    ({"points": LOCATIONS[..., :1]}, "spatial_shapes: expected 1 for each"),
                    ({"points": LOCATIONS[..., :0]}, "sampling_locations: expected"),
                    ({"value": VALUE.int()}, "value: expected"),
                    ({"value": VALUE[:, :, :2]}, "value: expected 1 or 3 heads"),
                    ({"padding": "reflect"}, "padding: .*'border_height', got 'reflect'"),
                    ({"padding": "border_height"}, "padding: .* interpolation 'discrete'"),
                    ({"reference_index": [0] * 6}, "reference_index: expected"),
                    ({"queries_per_map": [11, 11]}, r"sampling_locations: expected \[1, 11"),
                    ({**RAGGED, "queries_per_map": [11, 12]}, "queries_per_map: .* that sum"),
                    ({**RAGGED, "queries_per_map": [-1, 23]}, "queries_per_map: .* that sum"),
                    ({**RAGGED, "queries_per_map": [2**62, 2**62]}, "queries_per_map: expected"),
                    ({**RAGGED, "queries_per_map": [1, 21, 0]}, "queries_per_map: .* 2 numbers"),
                ],
            ),
            (
                FUSED_ARGUMENTS,
                [
                    ({"reference_points": torch.rand(2, 11, 1, 3)}, "reference_points: expected"),
                    ({"reference_points": torch.rand(2, 10, 1, 2)}, "reference_points: expected"),
                    ({"reference_index": None}, "reference_index: expected a list"),
                    ({"reference_index": [0] * 5}, "reference_index: expected 6 numbers"),
                    ({"reference_index": [0] * 5 + [1]}, "reference_index: .* 0 to 0, got 1"),
                    ({"reference_index": [-1] * 6}, "reference_index: .* 0 to 0, got -1"),
                    ({"points": LOCATIONS[:, :5]}, "attention_logits: expected"),
                    ({"num_points": [3, 300]}, "sampling_offsets: expected"),
                ],
            ),
        )
        for changes, message in rows
    ],
)
def test_the_operator_itself_checks_what_could_read_out_of_bounds(arguments, changes, message):
    assert OPERATOR(*arguments).shape == (2, 11, 24)
    wrong = arguments._replace(**changes)
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(*wrong)
    # The reference checks the same, with messages of its own.
    with saccade.use_backend("reference"):
        assert OPERATOR(*arguments).shape == (2, 11, 24)
        with pytest.raises((TypeError, ValueError), match=": expected"):
            OPERATOR(*wrong)


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("arguments", "output_mask", "message"),
    [
        (ARGUMENTS, [True] * 3, "output_mask: expected 4"),
        (FUSED_ARGUMENTS, [True] * 5, "output_mask: expected 4"),
        (ARGUMENTS, [True] * 4, "output_mask: .*reference_points"),
    ],
)
def test_the_backward_operator_checks_its_mask(arguments, output_mask, message):
    with pytest.raises(RuntimeError, match=message):
        BACKWARD_OPERATOR(torch.rand(2, 11, 24), *arguments, output_mask)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"spatial_shapes": [(6.0, 7), (3, 4)]}, TypeError),
        ({"spatial_shapes": [6, 7, 3, 4]}, TypeError),
        ({"spatial_shapes": [(6, 7, 3, 4)]}, ValueError),
        ({"spatial_shapes": torch.tensor(CASE.shapes).double()}, TypeError),
        ({"num_points": 3.0}, TypeError),
        ({"num_points": [3, 3.0]}, TypeError),
        ({"value": VALUE.to_sparse()}, ValueError),
        ({"attention_weights": WEIGHTS.to("meta")}, ValueError),
        ({"padding": ["zeros"]}, ValueError),
    ],
)
def test_a_cached_call_does_not_hide_one_that_is_almost_the_same(change, error):
    saccade.deformable_attention(**GOOD)
    with pytest.raises(error):
        saccade.deformable_attention(**{**GOOD, **change})
    saccade.deformable_attention(**GOOD)


def parse(num_queries=11, value=VALUE, **options):
    locations = LOCATIONS[:, :1].expand(-1, num_queries, -1, -1, -1)
    weights = WEIGHTS[:, :1].expand(-1, num_queries, -1, -1)
    shapes = options.pop("spatial_shapes", CASE.shapes)
    return parse_call(value, shapes, locations, weights, **{"num_points": 3, **options})


def test_equal_sizes_share_their_options_and_plans():
    call = parse()
    again = parse(
        value=VALUE.clone().requires_grad_(),
        spatial_shapes=torch.tensor(CASE.shapes),
        num_points=3,
    )
    assert again.options is call.options
    assert again.plans is call.plans
    for changes in (
        {"num_queries": 10},
        {"value": VALUE.double()},
        {"value": VALUE[:, :, :1]},
        {"spatial_shapes": [(7, 6), (3, 4)]},
        {"num_points": [2, 4]},
        {"padding": "border"},
        {"interpolation": "nearest"},
        {"coordinates": "pixel"},
        {"softmax": True},
        {"reference_points": torch.zeros(2, 11, 1, 2)},
        {"reference_points": torch.zeros(2, 11, 2, 2), "reference_index": [0] * 6},
        {"reference_points": torch.zeros(2, 11, 2, 2), "reference_index": [1] * 6},
    ):
        assert parse(**changes).plans is not call.plans, changes
    for call in (COMBINATIONS[name].parse(*COMBINATIONS[name].draw()) for name in COMBINATIONS):
        assert to_arguments(call).checked_call().options == call.options


def test_the_cache_of_calls_is_bounded_and_holds_no_tensor():
    call_module._cache.clear()
    for num_queries in range(1, MAX_CACHED + 20):
        parse(num_queries)
    assert 0 < len(call_module._cache) <= MAX_CACHED
    for key, recipe in call_module._cache.items():
        assert not any(isinstance(part, torch.Tensor) for part in (*key, *recipe.options))
        assert not recipe.plans


@pytest.mark.slow
def test_nothing_is_cached_while_a_program_is_traced_or_compiled():
    inputs = CASE.draw()
    torch.compiler.reset()
    call_module._cache.clear()
    torch.compile(CASE.call, fullgraph=True, backend="eager")(*inputs)
    torch.jit.trace(CASE.call, inputs, check_trace=False)
    make_fx(lambda *tensors: CASE.call(*tensors), tracing_mode="symbolic")(*inputs)
    assert not call_module._cache
    CASE.call(*inputs)
    assert len(call_module._cache) == 1


class Row:
    """A shape whose sizes change between calls."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __iter__(self):
        return iter(self.sizes)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return self.sizes[index]


def test_sizes_that_may_change_are_checked_again():
    value = torch.arange(12.0).reshape(1, 12, 1, 1)
    locations = torch.rand(1, 5, 1, 1, 2, 2)
    weights = torch.rand(1, 5, 1, 1, 2)
    row = Row(3, 4)
    for sizes in ((3, 4), (4, 3), (2, 6)):
        row.sizes = sizes
        output = saccade.deformable_attention(value, [row], locations, weights)
        expected = saccade.deformable_attention(value, [sizes], locations, weights)
        assert torch.equal(output, expected)
    for wrong in ([(3, 4, 1)], [(3.0, 4)], [(True, 12)], [3, 4], "34"):
        saccade.deformable_attention(value, [(3, 4)], locations, weights)
        with pytest.raises((TypeError, ValueError), match="spatial_shapes"):
            saccade.deformable_attention(value, wrong, locations, weights)


FUSED = {
    "value": VALUE,
    "spatial_shapes": CASE.shapes,
    "reference_points": torch.rand(2, 11, 1, 2),
    "sampling_offsets": LOCATIONS,
    "attention_logits": WEIGHTS,
    "num_points": 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_points": torch.rand(2, 11, 2)}, r"reference_points: expected \[2, 11, 1 or 2"),
        (
            {"reference_points": torch.rand(2, 11, 3, 2)},
            r"reference_points: expected \[2, 11, 1 or 2",
        ),
        ({"reference_points": torch.rand(2, 11, 1, 3)}, "2 or 4], got"),
        ({"reference_points": torch.rand(1, 11, 1, 2)}, "reference_points: expected"),
        ({"reference_points": torch.rand(2, 11, 1, 2).int()}, "reference_points: expected one of"),
        ({"reference_index": [0] * 5}, "reference_index: expected 6 numbers"),
        ({"reference_index": [0] * 5 + [1]}, "reference_index: .* from 0 to 0"),
        ({"reference_index": [-1] * 6}, "reference_index: expected 6 numbers"),
        ({"sampling_offsets": LOCATIONS[..., :1]}, "sampling_offsets: .*last axis must be 2"),
        ({"attention_logits": WEIGHTS[..., :1]}, "attention_logits: expected"),
        ({"num_points": None}, "num_points: .* because sampling_offsets has its points flat"),
        ({"value": VALUE[:, :, :2]}, "value: expected 3 heads as in sampling_offsets"),
    ],
)
def test_errors_of_a_fused_call_name_the_argument(change, message):
    assert saccade.fused_deformable_attention(**FUSED).shape == (2, 11, 24)
    for function in (
        saccade.fused_deformable_attention,
        saccade.reference.fused_deformable_attention,
    ):
        with pytest.raises(ValueError, match=message):
            function(**{**FUSED, **change})
    with pytest.raises(TypeError, match="reference_points: expected a Tensor, got NoneType"):
        saccade.fused_deformable_attention(**{**FUSED, "reference_points": None})
