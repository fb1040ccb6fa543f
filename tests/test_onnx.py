"""ONNX: each lowering gives the numbers of eager mode at every batch and size, or says why not."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_helpers import (
    HEADS,
    LOWERINGS,
    OTHER_SHAPES,
    POINTS,
    SHAPES,
    Fused,
    MultiScale,
    Plain,
    Runner,
    SingleMap,
    assert_equal,
    draw,
    export,
)

import saccade
from saccade.integrations import onnx as saccade_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parent.parent
# Batch, queries and whether the maps have other sizes than those of the export.
CALLS = [(2, 5, False), (1, 5, False), (3, 7, True), (8, 4, True)]
RAGGED = {"queries_per_map": [3, 7]}


def check_at_every_size(model, program, lowering, spatial_dims=2, not_finite=True):
    runner = Runner(program, lowering)
    for batch, queries, others in CALLS:
        shapes = (OTHER_SHAPES if others else SHAPES)[spatial_dims]
        maps, query, mask = draw(batch, queries, shapes, seed=batch)
        if not_finite:
            spoil(query)
        with torch.no_grad():
            expected = model(maps, query, mask)
        assert_equal(runner(maps, query, mask), expected)


def spoil(query):
    """The first locations of some queries are not finite, or so far away that no map is near."""
    for number, bad in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
        query[0, number, number % 2] = bad


# --- the matrix: every lowering, every batch, another resolution ---------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_operator_at_every_batch_and_resolution(lowering):
    model = Plain({}, {"value_heads": 1}, {"masked": True})
    program = export(model, draw(2, 5, SHAPES[2]), lowering)
    check_at_every_size(model, program, lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_fused_operator_at_every_batch_and_resolution(lowering):
    model = Fused(
        {},
        {"references": 2},
        {"boxes": True},
        {"references": 2, "boxes": True, "reference_index": [0, 1, 0, 1, 1, 0]},
        {"coordinates": "pixel"},
        {"coordinates": "normalized_corners"},
    )
    program = export(model, draw(2, 5, SHAPES[2]), lowering)
    # The softmax of logits that are spoilt would be no number; reference points are tried elsewhere.
    check_at_every_size(model, program, lowering, not_finite=False)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("make", [MultiScale, SingleMap])
def test_modules_at_every_batch_and_resolution(lowering, make):
    torch.manual_seed(0)
    points = POINTS if lowering == "plugin" else [POINTS, 1]
    model = SingleMap() if make is SingleMap else MultiScale(points)
    program = export(model, draw(2, 5, SHAPES[2]), lowering)
    check_at_every_size(model, program, lowering, not_finite=False)


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


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_options_in_every_dimension(lowering, spatial_dims):
    if (lowering, spatial_dims) == ("plugin", 3):
        pytest.skip("refused, which is tested below")
    # All of them on images, and of each kind one on lines and volumes.
    model = Plain(*(OPTIONS if spatial_dims == 2 else OPTIONS[:3]))
    program = export(model, draw(2, 5, SHAPES[spatial_dims]), lowering)
    check_at_every_size(model, program, lowering, spatial_dims)


@pytest.mark.parametrize("lowering", ["gather", "native"])
def test_ragged_queries_and_points_by_level(lowering):
    model = Plain(RAGGED, RAGGED | {"num_points": [4, 2], "value_heads": 1})
    example = draw(2, 5, SHAPES[2])
    runner = Runner(export(model, example, lowering, dynamic=False), lowering)
    assert_equal(runner(*example), model(*example))


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
        export(Plain(call), draw(2, 5, SHAPES[spatial_dims]), lowering, dynamic=False)
    option = next(iter(call), "spatial_shapes of 3 dimensions")
    message = str(caught.value)
    assert f"the lowering '{lowering}' cannot express it" in message
    assert option in message
    assert f"the lowering {others} can" in message


def test_volumes_in_an_older_opset_are_refused():
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="opset_version=20 on"):
        export(Plain({}), draw(2, 5, SHAPES[3]), "grid_sample", opset_version=18)


# --- what the definition says --------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
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


def test_gather_never_reads_what_no_corner_names():
    # An infinity in the first cell, which points outside must not read with the weight 0.
    model = Plain({})
    maps, query, mask = draw(1, 4, SHAPES[2])
    for feature_map in maps:
        feature_map[:, :, 0, 0] = float("inf")
    query[:, :, : HEADS * 2 * POINTS * 2] = -5
    found = Runner(export(model, (maps, query, mask), "gather", dynamic=False), "gather")
    assert not found(maps, query, mask)[0].any()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_float16_value_with_float32_positions(lowering):
    model = Plain({})
    example = draw(2, 5, SHAPES[2], dtype=torch.float16)
    runner = Runner(export(model, example, lowering, dynamic=False), lowering)
    (found,), (expected,) = runner(*example), model(*example)
    assert found.dtype == np.float16
    assert expected.dtype == torch.float16
    # Rounded once, at the end, from sums that differ in their last bits.
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("lowering", ["grid_sample", "gather"])
def test_float64_is_float64_throughout(lowering):
    model = Plain({}, {"padding": "border"})
    maps, query, mask = draw(2, 5, SHAPES[2], dtype=torch.float64)
    example = maps, query.double(), mask
    runner = Runner(export(model, example, lowering, dynamic=False), lowering)
    assert_equal(runner(*example), model(*example), tolerance=1e-12)


@pytest.mark.parametrize("lowering", ["plugin", "native"])
def test_float64_is_refused_by_nodes_in_float32(lowering):
    example = draw(2, 5, SHAPES[2], dtype=torch.float64)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="a float64 value: the lowering"):
        export(Plain({}), example, lowering, dynamic=False)


# --- the graphs ----------------------------------------------------------------------------------


def test_gather_has_five_axes_at_most_and_no_grid_sample():
    # Flat points: those by level have six axes before the operator sees them.
    flat = {"num_points": POINTS}
    for model in (Plain(flat, flat | {"value_heads": 1}), Fused({}, {"boxes": True})):
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


@pytest.mark.parametrize(("lowering", "operator"), [("plugin", 1), ("native", 0)])
def test_one_node_is_one_node(lowering, operator):
    graph = export(Fused({}), draw(2, 5, SHAPES[2]), lowering).model_proto.graph
    own = [node for node in graph.node if node.domain]
    names = ("FusedDeformableAttention", "MultiscaleDeformableAttnPlugin_TRT")
    assert [(node.domain, node.op_type) for node in own] == [
        (("saccade", "trt.plugins")[operator], names[operator])
    ]


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
    pytest.importorskip("onnxruntime_extensions")
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
    given = {name: np.zeros(sizes, np.float32) for name, sizes in shapes.items()}
    given["starts"] = np.zeros(1, np.int32)
    good = session.run(None, given | {"shapes": np.array([[2, 3]], np.int32)})
    assert good[0].shape == (1, 2, 1, 4)
    for wrong in ([[2, 4]], [[-2, -3]]):
        found = session.run(None, given | {"shapes": np.array(wrong, np.int32)})
        assert found[0].size == 0
        assert "gives nothing" in caplog.text
