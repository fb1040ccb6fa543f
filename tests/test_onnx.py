"""ONNX: each lowering gives the numbers of eager mode at every batch and size, or says why not."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from onnx_helpers import (
    HEADS,
    LOWERINGS,
    OTHER_SHAPES,
    POINTS,
    SHAPES,
    MultiScale,
    Operator,
    Runner,
    SingleMap,
    assert_equal,
    draw,
    export,
)

import saccade
from saccade.integrations import onnx as saccade_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

ROOT = Path(__file__).resolve().parent.parent
# Batch, queries and whether the maps have other sizes than those of the export.
CALLS = [(2, 5, False), (1, 5, False), (3, 7, True), (8, 4, True)]
RAGGED = {"queries_per_map": [3, 7]}


def check_at_every_size(model, program, lowering, spatial_dims=2, finite=False):
    runner = Runner(program, lowering)
    # The plugin's node in numpy is slow.
    for batch, queries, others in CALLS[:3] if lowering == "plugin" else CALLS:
        shapes = (OTHER_SHAPES if others else SHAPES)[spatial_dims]
        maps, query, mask = draw(batch, queries, shapes, seed=batch)
        if not finite:
            spoil(query)
        with torch.no_grad(), saccade.use_backend("reference"):
            expected = model(maps, query, mask)
        assert_equal(runner(maps, query, mask), expected)


def spoil(query):
    """Makes the first locations of some queries not finite, or so large that they are near no map."""
    for number, bad in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
        query[0, number, number % 2] = bad


def daily(*lowerings):
    """All lowerings; the others under `make test-all`."""
    return [
        pytest.param(lowering, marks=() if lowering in lowerings else pytest.mark.nightly)
        for lowering in LOWERINGS
    ]


# --- the matrix: every lowering, every batch, another resolution ---------------------------------

LOCATIONS = [{}, {"value_heads": 1, "masked": True}]
# Softmax and reference points are independent.
OFFSETS = [
    {"references": 1, "softmax": True},
    {"references": 2, "softmax": True},
    {"references": 1, "boxes": True, "softmax": True},
    {
        "references": 2,
        "boxes": True,
        "softmax": True,
        "reference_index": [0, 1, 0, 1, 1, 0],
    },
    {"references": 1, "softmax": True, "coordinates": "pixel"},
    {"references": 1, "softmax": True, "coordinates": "normalized_corners"},
    {"softmax": True},
    {"softmax": True, "padding": "border", "value_heads": 1},
    {"references": 1},
    {"references": 2, "boxes": True, "coordinates": "normalized_corners"},
]
# Each list has both combinations that no public function has: softmax with locations, weights with offsets.
OFFSETS_PER_LOWERING = {
    "grid_sample": [OFFSETS[index] for index in (3, 5, 6, 9)],
    "gather": [OFFSETS[index] for index in (2, 4, 7, 8)],
    "plugin": [OFFSETS[index] for index in (6, 8)],
    "native": [OFFSETS[index] for index in (0, 1, 7, 9)],
}


@pytest.mark.slow
@pytest.mark.parametrize("lowering", daily("grid_sample"))
def test_locations_at_every_batch_and_resolution(lowering):
    model = Operator(*LOCATIONS)
    check_at_every_size(model, export(model, draw(2, 5, SHAPES[2]), lowering), lowering)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "node"),
    [
        ("grid_sample", None),
        ("gather", None),
        ("plugin", ("trt.plugins", "MultiscaleDeformableAttnPlugin_TRT")),
        ("native", ("saccade", "DeformableAttention")),
    ],
)
def test_offsets_and_softmax_at_every_batch_and_resolution(lowering, node):
    calls = OFFSETS if helpers.ALL else OFFSETS_PER_LOWERING[lowering]
    model = Operator(*calls)
    program = export(model, draw(2, 5, SHAPES[2]), lowering)
    own = [(node.domain, node.op_type) for node in program.model_proto.graph.node if node.domain]
    assert own == ([node] * len(calls) if node else [])
    # A softmax of logits that are not finite would be NaN; other tests have non-finite locations.
    check_at_every_size(model, program, lowering, finite=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "make"),
    helpers.some(
        [(lowering, make) for make in (MultiScale, SingleMap) for lowering in LOWERINGS], 2
    ),
)
def test_modules_at_every_batch_and_resolution(lowering, make):
    torch.manual_seed(0)
    points = POINTS if lowering == "plugin" else [POINTS, 1]
    model = SingleMap() if make is SingleMap else MultiScale(points)
    program = export(model, draw(2, 5, SHAPES[2]), lowering)
    check_at_every_size(model, program, lowering, finite=True)


# --- options: included, or refused with the reason -----------------------------------------------


OPTIONS = [
    {"padding": "border", "coordinates": "pixel"},
    {"interpolation": "nearest"},
    {"interpolation": "discrete", "padding": "border"},
    {"interpolation": "discrete", "padding": "border_height"},
    {"interpolation": "discrete"},
    {"interpolation": "nearest", "padding": "border"},
    {"coordinates": "normalized_corners"},
]
# Every lowering, every dimension and every option once; the whole matrix under `make test-all`.
DAILY_OPTIONS = {
    ("grid_sample", 2): [OPTIONS[index] for index in (0, 3, 5, 6)],
    ("gather", 3): OPTIONS[1:3],
    ("plugin", 1): [OPTIONS[index] for index in (0, 4)],
    ("native", 2): OPTIONS,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "spatial_dims"),
    [
        pytest.param(*case, marks=() if case in DAILY_OPTIONS else pytest.mark.nightly)
        for case in itertools.product(LOWERINGS, (1, 2, 3))
        if case != ("plugin", 3)
    ],
)
def test_options_in_every_dimension(lowering, spatial_dims):
    # All of them on images, and one of each kind on lines and volumes.
    calls = OPTIONS if spatial_dims == 2 else OPTIONS[:3]
    if not helpers.ALL:
        calls = DAILY_OPTIONS[lowering, spatial_dims]
    model = Operator(*calls)
    program = export(model, draw(2, 5, SHAPES[spatial_dims]), lowering)
    check_at_every_size(model, program, lowering, spatial_dims)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["gather", "native"])
def test_ragged_queries_and_points_by_level(lowering):
    model = Operator(RAGGED, RAGGED | {"num_points": [4, 2], "value_heads": 1})
    example = draw(2, 5, SHAPES[2])
    runner = Runner(export(model, example, lowering, dynamic=False), lowering)
    assert_equal(runner(*example), model(*example))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lowering", "call", "spatial_dims", "others"),
    [
        ("grid_sample", RAGGED, 2, "'gather' or 'native'"),
        ("plugin", RAGGED, 2, "'gather' or 'native'"),
        ("plugin", {"num_points": [4, 2]}, 2, "'grid_sample', 'gather' or 'native'"),
        ("plugin", {}, 3, "'grid_sample', 'gather' or 'native'"),
    ],
)
def test_what_a_lowering_cannot_do_is_refused_at_export(lowering, call, spatial_dims, others):
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        export(Operator(call), draw(2, 5, SHAPES[spatial_dims]), lowering, dynamic=False)
    option = next(iter(call), "spatial_shapes of 3 dimensions")
    message = str(caught.value)
    assert f"the lowering '{lowering}' cannot express it" in message
    assert option in message
    assert f"the lowering {others} can" in message


@pytest.mark.slow
def test_volumes_in_an_older_opset_are_refused():
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="opset_version=20 on"):
        export(Operator({}), draw(2, 5, SHAPES[3]), "grid_sample", opset_version=18)


# --- what the definition says --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lowering", daily("grid_sample", "gather"))
def test_nearest_rounds_half_to_even_and_corners_outside_are_zero(lowering):
    class Line(torch.nn.Module):
        def forward(self, line, at):
            ones = torch.ones_like(at[..., 0])
            return tuple(
                saccade.deformable_attention(
                    line, [(4,)], at, ones, coordinates="pixel", interpolation=interpolation
                )
                for interpolation in ("nearest", "linear")
            )

    line = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
    at = torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.5, float("nan")]).view(1, 6, 1, 1, 1, 1)
    program = torch.onnx.export(
        Line().eval(),
        (line, at),
        dynamo=True,
        verbose=False,
        custom_translation_table=saccade_onnx.translations(lowering),
    )
    runner = Runner(program, lowering)
    nearest, linear = runner.run(
        None, dict(zip(runner.names, (line.numpy(), at.numpy()), strict=True))
    )
    assert nearest.flatten().tolist() == [1, 1, 3, 3, 0, 0]
    np.testing.assert_allclose(linear.flatten(), [0.5, 1.5, 2.5, 3.5, 2, 0], atol=1e-5)


@pytest.mark.slow
def test_gather_never_reads_what_no_corner_names():
    # An infinity in the first cell, which points outside must not read with the weight 0.
    model = Operator({})
    maps, query, mask = draw(1, 4, SHAPES[2])
    for feature_map in maps:
        feature_map[:, :, 0, 0] = float("inf")
    query[:, :, : HEADS * 2 * POINTS * 2] = -5
    runner = Runner(export(model, (maps, query, mask), "gather", dynamic=False), "gather")
    assert not runner(maps, query, mask)[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("lowering", daily("gather", "native"))
def test_a_float16_value_with_float32_positions(lowering):
    model = Operator({})
    example = draw(2, 5, SHAPES[2], dtype=torch.float16)
    runner = Runner(export(model, example, lowering, dynamic=False), lowering)
    (output,), (expected,) = runner(*example), model(*example)
    assert output.dtype == np.float16
    assert expected.dtype == torch.float16
    # Rounded once, at the end, from sums that differ in their last bits.
    np.testing.assert_allclose(output, expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["grid_sample", "gather"])
def test_float64_is_float64_throughout(lowering):
    model = Operator({}, {"padding": "border"})
    maps, query, mask = draw(2, 5, SHAPES[2], dtype=torch.float64)
    example = maps, query.double(), mask
    runner = Runner(export(model, example, lowering, dynamic=False), lowering)
    assert_equal(runner(*example), model(*example), tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["plugin", pytest.param("native", marks=pytest.mark.nightly)])
def test_float64_is_refused_by_nodes_in_float32(lowering):
    example = draw(2, 5, SHAPES[2], dtype=torch.float64)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="a float64 value: the lowering"):
        export(Operator({}), example, lowering, dynamic=False)


# --- the graphs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_gather_has_five_axes_at_most_and_no_grid_sample():
    # Without the call with an axis for the levels: the caller's own tensor has six axes there.
    model = Operator({"softmax": True, "value_heads": 1}, OFFSETS[2])
    graph = onnx.shape_inference.infer_shapes(
        export(model, draw(2, 5, SHAPES[2]), "gather").model_proto, data_prop=True
    ).graph
    assert not {node.op_type for node in graph.node} & {"GridSample", "ScatterND", "Scatter"}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.output)
    }
    ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    assert {output for node in graph.node for output in node.output} <= ranks.keys()
    assert max(ranks.values()) <= 5


@pytest.mark.slow
def test_the_page_runs():
    result = doctest.testfile(str(ROOT / "docs/onnx.md"), module_relative=False)
    assert result.attempted > 10
    assert not result.failed


def test_wrong_names_and_missing_packages_are_said(monkeypatch):
    with pytest.raises(ValueError, match="lowering: expected one of 'grid_sample', 'gather'"):
        saccade_onnx.translations("scatter")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install onnx onnxscript"):
        saccade_onnx.translations()
    with pytest.raises(ModuleNotFoundError, match="pip install onnxruntime onnxruntime-extensions"):
        saccade_onnx.session_options()


def test_a_broken_file_does_not_end_the_process(caplog):
    """An exception that leaves a Python operator would: `terminate`, not to be caught."""
    pytest.importorskip("onnxruntime_extensions", reason="onnxruntime-extensions is not installed")
    from onnx import TensorProto, helper

    from saccade.integrations.onnx import plugin

    shapes = {"value": [1, 6, 1, 4], "locations": [1, 2, 1, 1, 3, 2], "weights": [1, 2, 1, 1, 3]}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        for name, sizes in shapes.items()
    ] + [
        helper.make_tensor_value_info("shapes", TensorProto.INT32, [1, 2]),
        helper.make_tensor_value_info("starts", TensorProto.INT32, [1]),
    ]
    names = ["value", "shapes", "starts", "locations", "weights"]
    node = helper.make_node(
        plugin.NAME, names, ["output"], domain=plugin.DOMAIN, **plugin.ATTRIBUTES
    )
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "broken", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(plugin.DOMAIN, 1)],
        ir_version=10,
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), saccade_onnx.session_options()
    )
    inputs = {name: np.zeros(sizes, np.float32) for name, sizes in shapes.items()}
    inputs["starts"] = np.zeros(1, np.int32)
    good = session.run(None, inputs | {"shapes": np.array([[2, 3]], np.int32)})
    assert good[0].shape == (1, 2, 1, 4)
    for wrong in ([[2, 4]], [[-2, -3]]):
        (output,) = session.run(None, inputs | {"shapes": np.array(wrong, np.int32)})
        assert output.size == 0
        assert "gives nothing" in caplog.text
