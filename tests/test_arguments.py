"""Bad arguments: an error that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from fused_helpers import COMBINATIONS
from helpers import Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import saccade
from saccade import call as call_module
from saccade.call import MAX_CACHED, parse_call
from saccade.ops import native
from saccade.ops.registration import BACKWARD_OPERATOR, OPERATOR
from saccade.ops.schema import to_arguments

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


GRADIENT = torch.rand(2, 11, 24)
TWO_MAPS = {**RAGGED, "queries_per_map": [11, 11]}
RAGGED_REFERENCES = {**TWO_MAPS, "reference_points": torch.rand(1, 22, 1, 2)}


def wrong_kinds(name, tensor, **others):
    """Changes to calls in which one tensor has a wrong dtype, device or number of axes."""
    return [
        ({**others, name: tensor.int()}, f"{tensor_name(name)}: expected"),
        ({**others, name: tensor > 0}, f"{tensor_name(name)}: expected"),
        ({**others, name: tensor + 0j}, f"{tensor_name(name)}: expected"),
        ({**others, name: tensor[None]}, ": expected"),
        ({**others, name: tensor[0]}, ": expected"),
    ]


def tensor_name(argument):
    names = {"points": "sampling_(locations|offsets)", "weights": "attention_(weights|logits)"}
    return names.get(argument, argument)


# Direct calls of the operator that the kernels refuse, with the kernel's message.
WRONG_CALLS = [
    (arguments, changes, message)
    for arguments, rows in (
        (
            ARGUMENTS,
            [
                *wrong_kinds("value", VALUE),
                *wrong_kinds("points", LOCATIONS),
                *wrong_kinds("weights", WEIGHTS),
                ({"spatial_shapes": [6, 7, 3, 400000]}, "value: expected"),
                ({"spatial_shapes": [6, 7, 3]}, "spatial_shapes: expected"),
                ({"spatial_shapes": [6, 9]}, "spatial_shapes: expected"),
                ({"spatial_shapes": []}, "spatial_shapes: expected"),
                ({"spatial_shapes": [6, 7, 3, 4, 1, 1]}, "spatial_shapes: expected"),
                ({"spatial_shapes": [6, 7, 0, 4]}, "spatial_shapes: expected"),
                ({"spatial_shapes": [6, 7, 3, 5]}, "value: expected"),
                ({"spatial_shapes": [2**40, 2**40, 3, 4]}, "spatial_shapes: expected"),
                ({"spatial_shapes": [-6, -7, 3, 4]}, "spatial_shapes: expected"),
                ({"num_points": [3, 300]}, "sampling_locations: expected"),
                ({"num_points": [3, 4]}, "sampling_locations: expected"),
                ({"num_points": [7, -1]}, "num_points: expected"),
                ({"num_points": [6, 0]}, "num_points: expected"),
                ({"num_points": [6]}, "spatial_shapes: expected"),
                ({"num_points": [2, 2, 2]}, "spatial_shapes: expected"),
                ({"num_points": []}, "spatial_shapes: expected"),
                ({"weights": WEIGHTS[:1]}, "attention_weights: expected"),
                ({"weights": WEIGHTS[:, :10]}, "attention_weights: expected"),
                ({"weights": WEIGHTS[:, :, :1]}, "attention_weights: expected"),
                ({"weights": WEIGHTS[..., :5]}, "attention_weights: expected"),
                ({"weights": WEIGHTS[:1], "softmax": True}, "attention_logits: expected"),
                ({"points": LOCATIONS[:1]}, "sampling_locations: expected"),
                ({"points": LOCATIONS[:, :10]}, "attention_weights: expected"),
                ({"points": LOCATIONS[:, :, :2]}, ": expected"),
                ({"points": LOCATIONS[:, :, :0], "weights": WEIGHTS[:, :, :0]}, "sampling_loc"),
                ({"points": LOCATIONS[..., :5, :]}, "sampling_locations: expected"),
                ({"points": LOCATIONS[..., :1]}, "spatial_shapes: expected 1 for each"),
                ({"points": LOCATIONS[..., :0]}, "sampling_locations: expected"),
                ({"points": torch.rand(2, 11, 3, 6, 4)}, "sampling_locations: expected"),
                ({"value": VALUE[:1]}, "sampling_locations: expected"),
                ({"value": VALUE[:, :-1]}, "value: expected"),
                ({"value": VALUE[:, :, :2]}, "value: expected 1 or 3 heads"),
                ({"value": VALUE[:, :, :0]}, "value: expected 1 or 3 heads"),
                ({"value": VALUE[..., :0]}, "value: expected"),
                ({"interpolation": "cubic"}, "interpolation: .*'discrete', got 'cubic'"),
                ({"coordinates": "pixels"}, "coordinates: .*'pixel', got 'pixels'"),
                ({"padding": "reflect"}, "padding: .*'border_height', got 'reflect'"),
                ({"padding": "border_height"}, "padding: .* interpolation 'discrete'"),
                (
                    {
                        "padding": "border_height",
                        "interpolation": "discrete",
                        "points": LOCATIONS[..., :1],
                        "spatial_shapes": [42, 12],
                    },
                    "padding: expected",
                ),
                ({"reference_index": [0] * 6}, "reference_index: expected"),
                ({"queries_per_map": [11, 11]}, r"sampling_locations: expected \[1, 11"),
                ({"queries_per_map": [22, 22]}, r"sampling_locations: expected \[1, 11"),
                (RAGGED, r"sampling_locations: expected \[2, 22"),
                ({**RAGGED, "queries_per_map": [11, 12]}, "queries_per_map: .* that sum"),
                ({**RAGGED, "queries_per_map": [11, 10]}, "queries_per_map: .* that sum"),
                ({**RAGGED, "queries_per_map": [-1, 23]}, "queries_per_map: .* that sum"),
                ({**RAGGED, "queries_per_map": [2**62, 2**62]}, "queries_per_map: expected"),
                ({**RAGGED, "queries_per_map": [1, 21, 0]}, "queries_per_map: .* 2 numbers"),
                ({**RAGGED, "queries_per_map": []}, "queries_per_map: .* 2 numbers"),
                ({**TWO_MAPS, "weights": WEIGHTS}, "attention_weights: expected"),
            ],
        ),
        (
            FUSED_ARGUMENTS,
            [
                *wrong_kinds("reference_points", torch.rand(2, 11, 1, 2)),
                ({"reference_points": torch.rand(2, 11, 1, 3)}, "reference_points: expected"),
                ({"reference_points": torch.rand(2, 11, 1, 1)}, "reference_points: expected"),
                ({"reference_points": torch.rand(2, 11, 0, 2)}, "reference_points: expected"),
                ({"reference_points": torch.rand(2, 10, 1, 2)}, "reference_points: expected"),
                ({"reference_points": torch.rand(1, 11, 1, 2)}, "reference_points: expected"),
                ({"reference_points": None}, "reference_index: expected None"),
                ({"reference_index": None}, "reference_index: expected a list"),
                ({"reference_index": [0] * 5}, "reference_index: expected 6 numbers"),
                ({"reference_index": []}, "reference_index: expected 6 numbers"),
                ({"reference_index": [0] * 5 + [1]}, "reference_index: .* 0 to 0, got 1"),
                ({"reference_index": [-1] * 6}, "reference_index: .* 0 to 0, got -1"),
                ({"points": LOCATIONS[:, :5]}, "attention_logits: expected"),
                ({"num_points": [3, 300]}, "sampling_offsets: expected"),
                (
                    {**RAGGED_REFERENCES, "reference_points": torch.rand(1, 21, 1, 2)},
                    "reference_points: expected",
                ),
                (
                    {**RAGGED_REFERENCES, "reference_points": torch.rand(2, 11, 1, 2)},
                    "reference_points: expected",
                ),
            ],
        ),
    )
    for changes, message in rows
]
RIGHT_CALLS = [
    ARGUMENTS,
    ARGUMENTS._replace(value=VALUE[:, :, :1], softmax=True, padding="border"),
    ARGUMENTS._replace(points=LOCATIONS.double(), weights=WEIGHTS.half()),
    ARGUMENTS._replace(interpolation="discrete", padding="border_height", coordinates="pixel"),
    ARGUMENTS._replace(points=LOCATIONS[..., :1], spatial_shapes=[42, 12]),
    ARGUMENTS._replace(points=LOCATIONS[:, :0], weights=WEIGHTS[:, :0]),
    ARGUMENTS._replace(value=VALUE[:0], points=LOCATIONS[:0], weights=WEIGHTS[:0]),
    ARGUMENTS._replace(**TWO_MAPS),
    FUSED_ARGUMENTS,
    FUSED_ARGUMENTS._replace(reference_points=torch.rand(2, 11, 7, 4), reference_index=[6] * 6),
    FUSED_ARGUMENTS._replace(**RAGGED_REFERENCES),
]


def fake_call(operator, *arguments):
    """A call of an operator with fake tensors."""
    with FakeTensorMode() as mode:
        return operator(
            *(
                mode.from_tensor(each) if isinstance(each, torch.Tensor) else each
                for each in arguments
            )
        )


@pytest.mark.parametrize(("arguments", "changes", "message"), WRONG_CALLS)
def test_the_operator_itself_checks_what_could_read_out_of_bounds(arguments, changes, message):
    wrong = arguments._replace(**changes)
    mask = [True, True, True, wrong.reference_points is not None]
    if native.failure is None:
        with pytest.raises(RuntimeError, match=message):
            OPERATOR(*wrong)
        with pytest.raises(RuntimeError, match=message):
            BACKWARD_OPERATOR(GRADIENT, *wrong, mask)
    # The reference and the fake kernels check the same, with messages of their own.
    for operator, inputs in ((OPERATOR, wrong), (BACKWARD_OPERATOR, (GRADIENT, *wrong, mask))):
        with (
            saccade.use_backend("reference"),
            pytest.raises((TypeError, ValueError), match=": expected"),
        ):
            operator(*inputs)
        with pytest.raises((TypeError, ValueError), match=": expected"):
            fake_call(operator, *inputs)


@pytest.mark.parametrize("arguments", RIGHT_CALLS)
def test_the_kernels_and_the_fake_ones_take_the_same(arguments):
    output = OPERATOR(*arguments)
    mask = [True, True, True, arguments.reference_points is not None]
    inputs = (OPERATOR, arguments), (BACKWARD_OPERATOR, (output, *arguments, mask))
    with saccade.use_backend("reference"):
        expected = [operator(*call) for operator, call in inputs]
    for results in (
        [operator(*call) for operator, call in inputs],
        [fake_call(operator, *call) for operator, call in inputs],
    ):
        for tensor, expected_tensor in zip(
            (results[0], *results[1]), (expected[0], *expected[1]), strict=True
        ):
            assert (tensor.shape, tensor.dtype) == (expected_tensor.shape, expected_tensor.dtype)


@pytest.mark.parametrize("name", ["points", "weights", "reference_points"])
def test_tensors_on_two_devices_are_refused(name):
    arguments = FUSED_ARGUMENTS._replace(**{name: getattr(FUSED_ARGUMENTS, name).to("meta")})
    mask = [True] * 4
    for call in (
        lambda: OPERATOR(*arguments),
        lambda: fake_call(OPERATOR, *arguments),
        lambda: BACKWARD_OPERATOR(GRADIENT, *arguments, mask),
        lambda: fake_call(BACKWARD_OPERATOR, GRADIENT, *arguments, mask),
        lambda: fake_call(BACKWARD_OPERATOR, GRADIENT.to("meta"), *FUSED_ARGUMENTS, mask),
    ):
        with pytest.raises(ValueError, match="expected a tensor on (cpu|meta) like value, got"):
            call()


@pytest.mark.parametrize(
    ("arguments", "grad_output", "output_mask", "message"),
    [
        (ARGUMENTS, GRADIENT, [True] * 3, "output_mask: expected 4"),
        (FUSED_ARGUMENTS, GRADIENT, [True] * 5, "output_mask: expected 4"),
        (ARGUMENTS, GRADIENT, [], "output_mask: expected 4"),
        (ARGUMENTS, GRADIENT, [True] * 4, "output_mask: .*reference_points"),
        *(
            (FUSED_ARGUMENTS, gradient, [True] * 4, "grad_output: expected")
            for gradient in (
                GRADIENT.double(),
                GRADIENT.int(),
                GRADIENT[0],
                GRADIENT[None],
                GRADIENT[:1],
                GRADIENT[:, :10],
                GRADIENT[..., :23],
                GRADIENT.unflatten(2, (3, 8)),
            )
        ),
        (ARGUMENTS._replace(**TWO_MAPS), GRADIENT, [True] * 3 + [False], "grad_output: exp"),
    ],
)
def test_the_backward_operator_checks_its_own_inputs(arguments, grad_output, output_mask, message):
    inputs = (grad_output, *arguments, output_mask)
    if native.failure is None:
        with pytest.raises(RuntimeError, match=message):
            BACKWARD_OPERATOR(*inputs)
    with saccade.use_backend("reference"), pytest.raises(ValueError, match=message):
        BACKWARD_OPERATOR(*inputs)
    with pytest.raises(ValueError, match=message):
        fake_call(BACKWARD_OPERATOR, *inputs)


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
