"""The files of `saccade explain`: nothing in them is called, and each fault is named with exit code 2."""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict

import pytest
import torch
from test_explain import multi_scale, single_scale

import saccade
from saccade.integrations.checkpoints.pickle_bounds import Limits
from saccade.vision.explain_files import load_inputs, load_module
from saccade.vision.explain_module import explain_module

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")


def invoke(*arguments):
    from saccade.cli import app

    return typer_testing.CliRunner().invoke(app, ["explain", *map(str, arguments)])


def save(folder, module, inputs):
    torch.save(module, folder / "module.pt")
    torch.save(inputs, folder / "inputs.pt")
    return folder / "module.pt", folder / "inputs.pt"


def assert_refused(result, *texts):
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: "), result.output
    assert result.stdout == ""
    for text in texts:
        assert text in result.stderr, result.stderr


# --- the module -------------------------------------------------------------------------------


def set_layer(module, layer, name, tensor):
    layers = module._modules[layer]
    layers._parameters[name] = tensor


MODULES = {
    "no sampling_offsets": (lambda m: m.__delattr__("sampling_offsets"), "sampling_offsets.weight"),
    "no output_proj": (lambda m: m.__delattr__("output_proj"), "output_proj.weight: expected [32, 32], got none"),
    "no layers": (lambda m: m.__dict__.pop("_modules"), "sampling_offsets.weight"),
    "layers as text": (lambda m: m.__dict__.update(_modules="x"), "sampling_offsets.weight"),
    "no num_heads": (lambda m: m.__dict__.pop("num_heads"), "num_heads: expected an int, got none"),
    "num_heads text": (lambda m: m.__dict__.update(num_heads="4"), "num_heads: expected an int"),
    "num_heads bool": (lambda m: m.__dict__.update(num_heads=True), "num_heads: expected an int"),
    "num_heads 0": (lambda m: m.__dict__.update(num_heads=0), "num_heads: expected 1 to 2147483647, got 0"),
    "num_heads 5": (lambda m: m.__dict__.update(num_heads=5), "expected [90, 32]"),
    "embed_dim": (lambda m: m.__dict__.update(embed_dim=2**70), "embed_dim: expected 1 to "),
    "num_points huge": (lambda m: m.__dict__.update(num_points=[2**60] * 3), "expected 1 to 2147483647 for each"),
    "num_points below 0": (lambda m: m.__dict__.update(num_points=[12, -1, -2]), "num_points: expected 1 to "),
    "num_points none": (lambda m: m.__dict__.update(num_points=[]), "num_points: expected 1 to "),
    "num_points text": (lambda m: m.__dict__.update(num_points="342"), "expected a list of ints"),
    "spatial_dims": (lambda m: m.__dict__.update(spatial_dims=3), "sampling_offsets.weight"),
    "padding": (lambda m: m.__dict__.update(padding="x" * 10**6), "padding: expected one of"),
    "no padding": (lambda m: m.__dict__.pop("padding"), "padding: expected one of"),
    "interpolation": (lambda m: m.__dict__.update(interpolation=[1]), "interpolation: expected one of"),
    "weight is text": (
        lambda m: set_layer(m, "value_proj", "weight", "x"),
        "value_proj.weight: expected a Tensor, got 'x'",
    ),
    "weight of another shape": (
        lambda m: set_layer(m, "value_proj", "weight", torch.zeros(32, 31)),
        "value_proj.weight: expected [32, 32], got [32, 31]",
    ),
    "weight of integers": (
        lambda m: set_layer(m, "value_proj", "weight", torch.zeros(32, 32, dtype=torch.int64)),
        "value_proj.weight: expected one of torch.float32",
    ),
    "no bias": (lambda m: set_layer(m, "output_proj", "bias", None), "output_proj.bias"),
    "sparse weight": (
        lambda m: set_layer(m, "value_proj", "weight", torch.eye(32).to_sparse()),
        "value_proj.weight: expected a dense (strided) tensor",
    ),
    "meta": (lambda m: m.to("meta"), "expected numbers, got a meta tensor"),
    "layer of another kind": (
        lambda m: m._modules.update(value_proj=torch.nn.Identity()),
        "torch.nn.modules.linear.Identity besides",
    ),
    "a layer is a module": (
        lambda m: m._modules.update(value_proj=multi_scale()[0]),
        "value_proj: expected a torch.nn.Linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_lacks_something_is_refused_by_name(name, tmp_path) -> None:
    module, inputs = multi_scale()
    change, message = MODULES[name]
    change(module)
    result = invoke(*save(tmp_path, module, inputs))
    assert_refused(result, "MODULE: ", message)
    assert len(result.stderr) < 1000


OBJECTS = {
    "a state dict": (lambda: multi_scale()[0].state_dict(), "holds a OrderedDict (a state dict?"),
    "a tensor": (lambda: torch.ones(3), "holds a Tensor"),
    "a layer": (lambda: torch.nn.Linear(2, 2), "holds a Linear"),
    "none": (lambda: None, "holds a NoneType"),
    "another module": (lambda: torch.nn.Conv2d(1, 1, 1), "Conv2d besides"),
    "a module of Saccade": (lambda: saccade.nn.DeformableConv(8, 2), "DeformableConv besides"),
    "a module of modules": (lambda: torch.nn.Sequential(multi_scale()[0]), "Sequential besides"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_another_object_than_a_module_is_refused(name, tmp_path) -> None:
    make, message = OBJECTS[name]
    assert_refused(invoke(*save(tmp_path, make(), multi_scale()[1])), "MODULE: ", message)


def test_what_a_file_puts_into_a_module_is_not_called(tmp_path) -> None:
    module, inputs = multi_scale()
    expected = explain_module(module, inputs)
    state = module.__dict__
    # All of these are names that torch allows, so that the file is unpickled.
    state["forward"] = state["_call_impl"] = state["__call__"] = state["eval"] = set
    state["_forward_hooks"] = OrderedDict({0: torch.Size})
    state["_forward_pre_hooks"] = OrderedDict({0: torch.device})
    state["__setstate__"] = state["project"] = state["attend"] = torch.Size
    state["training"] = "yes"
    module._modules["value_proj"].__dict__["forward"] = set
    module._modules["value_proj"]._parameters["weight"].__dict__["detach"] = set
    loaded = load_module(save(tmp_path, module, inputs)[0])
    assert type(loaded) is saccade.nn.MultiScaleDeformableAttention
    assert loaded.training is False
    assert not {"forward", "attend", "project", "__setstate__"} & vars(loaded).keys()
    result = explain_module(loaded, load_inputs(tmp_path / "inputs.pt", loaded))
    assert result.library == expected.library
    assert invoke(tmp_path / "module.pt", tmp_path / "inputs.pt").exit_code == 0


class _Call:
    """Pickled, it calls a function with arguments when the file is opened."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_file_makes_no_module_while_it_is_opened(tmp_path, monkeypatch) -> None:
    made = []
    for cls in (saccade.nn.DeformableAttention, saccade.nn.MultiScaleDeformableAttention):
        monkeypatch.setattr(cls, "__init__", lambda self, *arguments: made.append(arguments))
        torch.save(_Call(cls, 8, 2**40, 2**40), tmp_path / "module.pt")
        with pytest.raises(ValueError, match="MODULE: "):
            load_module(tmp_path / "module.pt")
    assert made == []


@pytest.mark.parametrize("make", [multi_scale, single_scale])
def test_a_loaded_module_has_the_settings_and_weights_of_the_saved_one(make, tmp_path) -> None:
    module, inputs = make(padding="border")
    module.train().half()
    module.output_proj.requires_grad_(False)
    loaded = load_module(save(tmp_path, module, inputs)[0])
    assert not loaded.training
    assert repr(loaded) == repr(module)
    assert (loaded.padding, loaded.num_points) == ("border", module.num_points)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == torch.float16


def test_a_module_without_optional_layers_is_loaded(tmp_path) -> None:
    module, inputs = single_scale(value_projection=False, predict_reference_points=False)
    inputs["reference_points"] = torch.rand(2, 6, 2)
    files = save(tmp_path, module, inputs)
    assert invoke(*files).exit_code == 0
    torch.save({**inputs, "reference_points": None}, tmp_path / "inputs.pt")
    assert_refused(invoke(*files), "reference_points: expected a tensor")


# --- the inputs -------------------------------------------------------------------------------


INPUTS = {
    "a list": (lambda i: [1], "INPUTS: expected a dict", "holds a list"),
    "a module": (lambda i: multi_scale()[0], "holds a MultiScaleDeformableAttention"),
    "a missing argument": (lambda i: {n: i[n] for n in i if n != "value"}, "lacks value"),
    "keys that are not text": (lambda i: {**i, 3: 4}, "has in addition a key of type int"),
    "keys that a terminal obeys": (lambda i: {**i, "\x1b[31m": 4}, r"has in addition \x1b[31m"),
    "long keys": (lambda i: {**i, "x" * 10**6: 4}, "has in addition xxx"),
    "text": (lambda i: {**i, "query": "x"}, "INPUTS: query: expected a tensor, integers or None"),
    "a number": (lambda i: {**i, "query": 1}, "query: expected a Tensor, got int"),
    "none": (lambda i: {**i, "value": None}, "value: expected a Tensor, got NoneType"),
    "another dtype": (
        lambda i: {**i, "query": i["query"].double()},
        "query: expected one of torch.float32, got torch.float64",
    ),
    "integers": (lambda i: {**i, "value": i["value"].long()}, "value: expected one of torch.float32"),
    "complex": (
        lambda i: {**i, "reference_points": i["reference_points"].cfloat()},
        "reference_points: expected one of",
    ),
    "sparse": (lambda i: {**i, "value": i["value"].to_sparse()}, "INPUTS: value: expected a dense"),
    "meta": (lambda i: {**i, "query": i["query"].to("meta")}, "INPUTS: query: expected numbers, got"),
    "too few axes": (lambda i: {**i, "query": i["query"][0]}, "query: expected [batch, queries, "),
    "no axes": (lambda i: {**i, "query": torch.ones(())}, "query: expected [batch, queries, "),
    "no queries": (lambda i: {**i, "query": i["query"][:, :0]}, "query: expected inputs that have one"),
    "no batch": (lambda i: {**i, "query": i["query"][:0]}, "batch: expected inputs that have one"),
    "other channels": (lambda i: {**i, "query": i["query"][..., :31]}, "query: expected [batch, queries, 32]"),
    "another batch": (lambda i: {**i, "value": i["value"][:1]}, "value: expected a batch of 2"),
    "shapes": (lambda i: {**i, "spatial_shapes": [(6, 8)]}, "spatial_shapes: expected 3 levels"),
    "shapes of floats": (lambda i: {**i, "spatial_shapes": [(6.5, 8)]}, "INPUTS: spatial_shapes: expected"),
    "huge shapes": (lambda i: {**i, "spatial_shapes": [(2**70, 1)] * 3}, "spatial_shapes: expected at most"),
    "no shapes": (lambda i: {**i, "spatial_shapes": None}, "spatial_shapes: expected a sequence"),
    "mask": (lambda i: {**i, "value_padding_mask": torch.zeros(2, 67)}, "value_padding_mask: expected torch.bool"),
    "several maps": (
        lambda i: {**i, "query": i["query"][0], "queries_per_map": [4, 2]},
        "queries_per_map: expected none",
    ),
    "a repeated element": (lambda i: {**i, "value": torch.zeros(1).expand(2, 2**30, 32)}, "INPUTS: "),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_wrong_inputs_are_named(name, tmp_path) -> None:
    module, inputs = multi_scale()
    change, *messages = INPUTS[name]
    result = invoke(*save(tmp_path, module, change(inputs)))
    assert_refused(result, *messages)
    assert len(result.stderr) < 1000


def test_a_call_of_too_many_points_is_refused_before_it_runs() -> None:
    module = saccade.nn.DeformableAttention(2, num_heads=1, num_points=64)
    query = torch.zeros(1).expand(1, 2**40, 2)
    with pytest.raises(ValueError, match="query: expected at most 67108864 points"):
        explain_module(module, {"query": query, "feature_map": torch.zeros(1, 2, 2, 2)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_explained(dtype, tmp_path) -> None:
    module, inputs = single_scale()
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    result = invoke(*save(tmp_path, module.to(dtype).train(), inputs))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("equal (difference") == 2


# --- files that are not files of torch.save ---------------------------------------------------


def write_text(path):
    path.write_text("no file of torch.save")


def write_truncated(path):
    torch.save(multi_scale()[0], path)
    path.write_bytes(path.read_bytes()[:-2000])


def write_script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))


def write_nested(path):
    nested = []
    for _ in range(Limits().depth + 50):
        nested = [nested]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * (limit + Limits().depth))
    try:
        torch.save(nested, path)
    finally:
        sys.setrecursionlimit(limit)


def write_loop(path):
    loop: dict = {}
    loop["query"] = loop["value"] = [loop]
    torch.save(loop, path)


FILES = {
    "nothing": (lambda path: None, "cannot read"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a pipe": (os.mkfifo, "is a FIFO"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot read"),
    "empty": (lambda path: path.touch(), "expected a file of torch.save"),
    "text": (write_text, "expected a file of torch.save"),
    "truncated": (write_truncated, "expected a whole zip archive"),
    "nested deeply": (write_nested, "depth"),
    "in itself": (write_loop, "expected containers"),
}


@pytest.mark.parametrize("argument", ["MODULE", "INPUTS"])
@pytest.mark.parametrize("name", FILES)
def test_other_files_are_refused_by_name(name, argument, tmp_path) -> None:
    files = dict(zip(("MODULE", "INPUTS"), save(tmp_path, *multi_scale()), strict=True))
    files[argument] = tmp_path / "other.pt"
    write, message = FILES[name]
    write(files[argument])
    assert_refused(invoke(*files.values()), f"{argument}: ", "other.pt", message)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_is_refused(tmp_path) -> None:
    write_script(tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"MODULE: .*script\.pt: .*TorchScript"):
        load_module(tmp_path / "script.pt")


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--query", 6), "query: expected 0 to 5, got 6"),
        (("--batch", -1), "batch: expected 0 to 1, got -1"),
        (("--head", 2**70), "head: expected 0 to 3, got "),
        (("--channel", 8), "channel: expected 0 to 7, got 8"),
        (("--reference", 1, 1), "--reference, --interpolation and --padding are for the worked"),
        (("--padding", "border"), "--reference, --interpolation and --padding are for the worked"),
    ],
)
def test_options_that_do_not_fit_a_module_are_refused(options, message, tmp_path) -> None:
    assert_refused(invoke(*save(tmp_path, *multi_scale()), *options), message)


@pytest.mark.parametrize("name", ["query", "batch", "head", "channel"])
def test_the_worked_example_has_one_query(name) -> None:
    assert_refused(invoke(f"--{name}", 1), f"--{name}: expected 0, because the worked example")


# --- not a number -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "is not a number"), (math.inf, "is not finite")]
)
def test_equal_values_that_are_not_finite_are_equal(value, words, tmp_path) -> None:
    module, inputs = single_scale()
    torch.nn.init.constant_(module.value_proj.bias, value)
    result = invoke(*save(tmp_path, module, inputs))
    assert result.exit_code == 0, result.output
    assert "DIFFERENT" not in result.stdout
    assert "16 of 16 values not finite on both sides" in " ".join(result.stdout.split())
    assert f"The output {words}" in result.stdout


def test_the_example_of_the_page_runs(tmp_path, monkeypatch) -> None:
    import doctest
    from pathlib import Path

    page = Path(__file__).resolve().parent.parent / "docs/explain.md"
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 0
    assert not result.failed
    command = "module.pt inputs.pt --query 5 --head 1"
    assert f"saccade explain {command}" in page.read_text()
    assert invoke(*command.split()).exit_code == 0


@pytest.mark.slow
def test_names_that_are_not_utf8_are_printed(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / os.fsdecode(b"\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    result = invoke("--out", folder / "explain.svg")
    assert result.exit_code == 0, result.exception
    assert r"\xff/explain.svg" in result.stdout.replace("\n", "")
    assert (folder / "explain.svg").stat().st_size > 1000
    result = invoke(folder / "module.pt", folder / "inputs.pt")
    assert result.exit_code == 2, result.exception
    assert "MODULE: cannot read" in result.stderr
