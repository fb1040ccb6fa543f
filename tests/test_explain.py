"""`saccade explain`: values are the library's, the parts sum to its output, files are safe."""

from __future__ import annotations

import math

import pytest
import torch

import saccade
from saccade.vision.explain import explain_worked_example, take_apart, worked_map
from saccade.vision.explain_files import load_inputs, load_module
from saccade.vision.explain_module import explain_module
from saccade.vision.explain_table import format_number, format_pair


def test_worked_example_is_that_of_the_design() -> None:
    explanation = explain_worked_example()
    assert [point.position for point in explanation.points] == [(2, 2), (1, 2), (2, 1), (1, 1)]
    assert [point.attention_weight for point in explanation.points] == [0.25] * 4
    z = worked_map()  # indexed [y, x]
    expected = 0.25 * (z[2, 2] + z[2, 1] + z[1, 2] + z[1, 1])
    assert explanation.library == explanation.by_hand == float(expected) == 16.5
    for point in explanation.points:
        assert [corner.weight for corner in point.corners] == [1, 0, 0, 0]
    assert all(check.passed for check in explanation.checks)


def test_values_of_the_worked_map_tell_their_position() -> None:
    for point in explain_worked_example((1.3, 1.6)).points:
        for corner in point.corners:
            assert corner.value == 10 * corner.x + corner.y


def test_fractional_corner_weights_are_those_of_bilinear_interpolation() -> None:
    point = explain_worked_example((1.3, 1.6)).points[0]  # at (1.8, 2.1)
    expected = {(1, 2): 0.2 * 0.9, (2, 2): 0.8 * 0.9, (1, 3): 0.2 * 0.1, (2, 3): 0.8 * 0.1}
    weights = {(corner.x, corner.y): corner.weight for corner in point.corners}
    assert weights == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("interpolation", ["linear", "nearest", "discrete"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("reference", [(1.5, 1.5), (3.3, -0.1), (-2.0, 9.0), (0.5, 3.0)])
def test_worked_example_sums_to_the_library_everywhere(interpolation, padding, reference) -> None:
    explanation = explain_worked_example(reference, interpolation=interpolation, padding=padding)
    assert all(check.passed for check in explanation.checks)
    assert explanation.by_hand == pytest.approx(explanation.library, abs=1e-5)


def test_a_corner_outside_the_map_has_no_value() -> None:
    point = explain_worked_example((3.3, 1.0)).points[0]  # at (3.8, 1.5)
    outside = [corner for corner in point.corners if corner.x == 4]
    assert [corner.value for corner in outside] == [None, None]
    assert sum(corner.weight for corner in point.corners) == pytest.approx(1)


def test_a_location_that_is_not_finite_reads_nothing() -> None:
    locations = torch.tensor([[math.nan, 0.5], [math.inf, 0.5], [0.5, 0.5]])
    parts = take_apart(torch.ones(16, 2), [(4, 4)], locations, [3])
    assert parts.read.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_a_check_that_differs_fails() -> None:
    from saccade.vision.explain import check

    assert check("same", torch.ones(3), torch.ones(3)).passed
    assert not check("other", torch.ones(3), torch.tensor([1, 1, 1.001])).passed
    assert not check("nan", torch.tensor(math.nan), torch.tensor(1.0)).passed


def multi_scale(**options) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    module = saccade.nn.MultiScaleDeformableAttention(
        32, num_heads=4, num_levels=3, num_points=[3, 4, 2], **options
    )
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.2)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.2)
    mask = torch.zeros(2, 67, dtype=torch.bool)
    mask[1, 40:] = True
    inputs = {
        "query": torch.randn(2, 6, 32),
        "reference_points": torch.rand(2, 6, 1, 2),
        "value": torch.randn(2, 67, 32),
        "spatial_shapes": [(6, 8), (3, 5), (2, 2)],
        "value_padding_mask": mask,
    }
    return module, inputs


def single_scale(**options) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    module = saccade.nn.DeformableAttention(16, num_heads=2, num_points=5, **options)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.5)
    inputs = {"query": torch.randn(2, 6, 16), "feature_map": torch.randn(2, 7, 9, 16)}
    return module, inputs


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (multi_scale, {}),
        (multi_scale, {"padding": "border"}),
        (multi_scale, {"interpolation": "nearest"}),
        (multi_scale, {"interpolation": "discrete", "padding": "border"}),
        (multi_scale, {"interpolation": "discrete", "padding": "border_height"}),
        (single_scale, {}),
        (single_scale, {"value_projection": False}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_parts_of_a_module_reconstruct_its_output(make, options, dtype, tmp_path) -> None:
    module, inputs = make(**options)
    torch.save(module.to(dtype), tmp_path / "module.pt")
    inputs = {
        name: each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each
        for name, each in inputs.items()
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    loaded = load_module(tmp_path / "module.pt")
    loaded_inputs = load_inputs(tmp_path / "inputs.pt", loaded)
    for batch, query, head in ((0, 0, 0), (1, 5, 1)):
        explanation = explain_module(
            loaded, loaded_inputs, query=query, batch=batch, head=head, channel=3
        )
        assert len(explanation.checks) == 2
        assert all(check.passed for check in explanation.checks), explanation.checks
        total = sum(point.attention_weight for point in explanation.points)
        assert total == pytest.approx(1, abs=1e-5)


def test_the_checks_notice_a_wrong_operator(monkeypatch) -> None:
    from saccade.nn import sampling_module

    right = sampling_module.fused_deformable_attention
    monkeypatch.setattr(
        sampling_module,
        "fused_deformable_attention",
        lambda *args, **options: right(*args, **options) * 1.01,
    )
    module, inputs = multi_scale()
    assert [check.passed for check in explain_module(module, inputs).checks] == [False, False]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"query": 6}, "query: expected 0 to 5, got 6"),
        ({"batch": -1}, "batch: expected 0 to 1, got -1"),
        ({"head": 4}, "head: expected 0 to 3, got 4"),
        ({"channel": 8}, "channel: expected 0 to 7, got 8"),
    ],
)
def test_an_index_out_of_range_is_named(index, message) -> None:
    module, inputs = multi_scale()
    with pytest.raises(ValueError, match=message):
        explain_module(module, inputs, **index)


def test_lines_and_volumes_are_refused() -> None:
    module = saccade.nn.DeformableAttention(32, spatial_dims=1)
    inputs = {"query": torch.zeros(1, 5, 32), "feature_map": torch.zeros(1, 9, 32)}
    with pytest.raises(ValueError, match="module: expected spatial_dims 2, got 1"):
        explain_module(module, inputs)


class _Foreign:
    def __reduce__(self):
        return (print, ("foreign code ran",))


def test_foreign_code_in_a_file_does_not_run(tmp_path, capsys) -> None:
    torch.save(_Foreign(), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="print besides tensors"):
        load_module(tmp_path / "module.pt")
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.conv\.Conv2d besides"):
        load_module(tmp_path / "other.pt")
    assert capsys.readouterr().out == ""


def test_wrong_files_are_named(tmp_path) -> None:
    module, inputs = single_scale()
    with pytest.raises(ValueError, match="MODULE: cannot read .*: No such file"):
        load_module(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no torch file")
    with pytest.raises(ValueError, match=r"MODULE: .*text.pt: expected a file of torch\.save"):
        load_module(tmp_path / "text.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="a state dict"):
        load_module(tmp_path / "state.pt")
    torch.save({"query": inputs["query"], "map": inputs["feature_map"]}, tmp_path / "inputs.pt")
    with pytest.raises(ValueError, match="lacks feature_map and has in addition map"):
        load_inputs(tmp_path / "inputs.pt", module)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_inputs(tmp_path / "list.pt", module)


@pytest.mark.slow
@pytest.mark.parametrize("make", [multi_scale, single_scale])
def test_the_image_of_a_module_is_written(make, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from saccade.vision.explain_image import save_image

    module, inputs = make()
    save_image(explain_module(module, inputs), tmp_path / "module.png")
    assert (tmp_path / "module.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (16.5, "16.5"), (1 / 3, "0.333"), (1e-7, "1e-07"), (2.0, "2")],
)
def test_numbers_are_short(value, text) -> None:
    assert format_number(value) == text


def test_pairs_are_short() -> None:
    assert format_pair((0.5, -0.5), sign=True) == "(+0.5, -0.5)"
    assert format_pair((1e-9, -1e-9)) == "(0, 0)"
    assert format_pair((math.nan, math.inf)) == "(nan, inf)"
