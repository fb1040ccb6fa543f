"""`saccade explain`: values are the library's, the parts sum to its output, files are safe."""

from __future__ import annotations

import math
import os

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


class _Subclass(saccade.nn.DeformableAttention):
    def forward(self, **inputs):
        return None, None


def without(module, name):
    delattr(module, name)
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: torch.nn.Linear(2, 2), "module: expected a saccade.nn.* got Linear"),
        (lambda m: None, "module: expected a saccade.nn.* got NoneType"),
        (lambda m: m.state_dict(), "module: expected a saccade.nn.* got OrderedDict"),
        (lambda m: without(m, "sampling_offsets"), "module: expected a layer sampling_offsets"),
        (lambda m: without(m, "value_proj"), "module: expected a layer value_proj, or None"),
        (lambda m: without(m, "num_heads"), "module: expected an attribute num_heads"),
        (lambda m: _Subclass(16, num_heads=2), "module: expected a forward that returns a Samp"),
    ],
)
def test_a_module_without_what_explain_needs_is_named(make, message) -> None:
    module, inputs = single_scale()
    with pytest.raises(TypeError, match=message):
        explain_module(make(module), inputs)


def test_inputs_and_indices_of_the_wrong_kind_are_named() -> None:
    module, inputs = single_scale()
    with pytest.raises(TypeError, match="inputs: expected a dict, got list"):
        explain_module(module, [inputs])
    with pytest.raises(ValueError, match="inputs: expected the argument feature_map, got none"):
        explain_module(module, {"query": inputs["query"]})
    for index in ("0", 1.0, True, None):
        with pytest.raises(TypeError, match="query: expected an int, got "):
            explain_module(module, inputs, query=index)
    with pytest.raises(ValueError, match="module: expected numbers in sampling_offsets.weight"):
        explain_module(module.to("meta"), inputs)


NOT_FINITE = [math.nan, math.inf, -math.inf, 3e38]


@pytest.mark.parametrize("make", [multi_scale, single_scale])
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite_equal_those_of_the_library(make, value, dtype) -> None:
    names = [
        "sampling_offsets.bias",
        "attention_weights.bias",
        "value_proj.weight",
        "output_proj.bias",
    ]
    map_name = "value" if make is multi_scale else "feature_map"
    for name in [*names, "query", map_name]:
        module, inputs = make()
        if "." in name:
            module.get_parameter(name).data.view(-1)[:3] = value
        else:
            inputs[name].view(-1)[:5] = value
        inputs = {
            key: each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each
            for key, each in inputs.items()
        }
        explanation = explain_module(module.to(dtype), inputs)
        assert all(check.passed for check in explanation.checks), (name, explanation.checks)
    assert explanation.checks[0].num_values == (32 if make is multi_scale else 16)


def test_a_check_compares_what_is_not_finite() -> None:
    from saccade.vision.explain import check

    nan, inf = math.nan, math.inf
    values = torch.tensor([nan, inf, -inf, 1.0])
    same = check("same", values, values)
    assert same.passed
    assert (same.num_values, same.num_not_finite) == (4, 3)
    assert same.largest_difference == 0
    # An infinity on one side must not make the tolerance infinite.
    assert same.tolerance == 1e-5
    assert not check("one differs", values + torch.tensor([0, 0, 0, 0.1]), values).passed
    for one, other in ((nan, 1.0), (nan, inf), (inf, -inf), (inf, 1.0)):
        assert not check("", torch.tensor([one, 0]), torch.tensor([other, 0])).passed
        assert not check("", torch.tensor([other, 0]), torch.tensor([one, 0])).passed
    # The library's 16-bit result is infinite where the sum in 32 bits is not.
    assert check("", torch.tensor([7e4]), torch.tensor([inf], dtype=torch.float16)).passed


@pytest.mark.parametrize("value", NOT_FINITE)
def test_tables_show_what_is_not_finite_in_80_columns(value) -> None:
    rich_console = pytest.importorskip("rich.console")
    from saccade.vision.explain_table import print_explanation

    for name in ("attention_weights.bias", "value_proj.bias", "sampling_offsets.bias"):
        module, inputs = multi_scale()
        module.get_parameter(name).data[:2] = value
        console = rich_console.Console(width=80)
        with console.capture() as capture:
            print_explanation(console, explain_module(module, inputs))
        text = capture.get()
        assert "+nan" not in text
        assert "DIFFERENT" not in text
        assert text.count("equal (difference ") == 2
        assert max(map(len, text.splitlines())) <= 80
        if name == "value_proj.bias" and math.isinf(value):
            assert "The output is not finite" in text
        if name == "attention_weights.bias" and math.isnan(value):
            assert "the weights are not all finite" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", NOT_FINITE)
def test_images_of_what_is_not_finite_are_written(value, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from saccade.vision.explain_image import save_image

    module, inputs = multi_scale()
    inputs["reference_points"] = torch.rand(2, 6, 1, 4)
    inputs["reference_points"][..., 2] = value
    module.value_proj.bias.data[:2] = value
    module.attention_weights.bias.data[:2] = value
    save_image(explain_module(module, inputs), tmp_path / "box.svg")
    module, inputs = multi_scale()
    module.sampling_offsets.bias.data[::3] = value
    inputs["value"][:, 0] = value
    save_image(explain_module(module, inputs), tmp_path / "points.svg")
    text = (tmp_path / "box.svg").read_text() + (tmp_path / "points.svg").read_text()
    assert "nan %" not in text


@pytest.mark.slow
@pytest.mark.parametrize("reference", [(1e7, 5.0), (1e300, -1e300), (-3e38, 0.0)])
def test_a_reference_point_far_away_is_drawn(reference, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from saccade.vision.explain_image import save_image

    save_image(explain_worked_example(reference), tmp_path / "far.png")
    assert (tmp_path / "far.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (".", OSError, "a folder"),
        ("folder.png", OSError, "a folder"),
        ("pipe.png", OSError, "a pipe or a device"),
        ("no/explain.png", OSError, "does not exist"),
        ("explain", ValueError, "ends in .png, .jpg, .jpeg, .pdf, .svg, got no suffix"),
        ("explain.xyz", ValueError, "ends in .png, .jpg, .jpeg, .pdf, .svg, got .xyz"),
        (".png", ValueError, "got no suffix"),
    ],
)
def test_an_image_that_cannot_be_written_is_refused_before_it_is_drawn(
    name, error, message, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("matplotlib")
    typer_testing = pytest.importorskip("typer.testing")
    from saccade.cli import app
    from saccade.vision import explain
    from saccade.vision.explain_image import save_image

    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(error, match=message):
        save_image(explain_worked_example(), tmp_path / name)
    monkeypatch.setattr(explain, "explain_worked_example", None)
    result = typer_testing.CliRunner().invoke(app, ["explain", "--out", str(tmp_path / name)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --out: cannot write {tmp_path / name}: ")
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "pipe.png"]


@pytest.mark.slow
def test_an_image_appears_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from saccade.vision.explain_image import save_image

    save_image(explain_worked_example(), tmp_path / "explain.JPG")
    assert (tmp_path / "explain.JPG").read_bytes().startswith(b"\xff\xd8")

    def fail(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        save_image(explain_worked_example(), tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["explain.JPG"]
