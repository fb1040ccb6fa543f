"""Model folders from anybody: nothing runs, nothing is fetched, and what is wrong is a `ModelError`."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from model_folders import (
    CONFIG,
    PROCESSOR,
    SHIPPED,
    WEIGHTS,
    copy_model,
    load_weights,
    write,
)

import saccade
from saccade.vision import models
from saccade.vision.detector import Detector
from saccade.vision.models import ModelError

EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"
HUB_BACKBONE = {"backbone": "microsoft/resnet-50", "use_timm_backbone": False}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The shipped model in a folder that a test may change."""
    return copy_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def requests(monkeypatch) -> list[Any]:
    """What a test asks the network or the user for, none of which is answered."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("builtins.input", refuse)
    return asked


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def refusal(folder: Path) -> str:
    """The message with which a model is refused: one line that names the folder."""
    with pytest.raises(ModelError) as error:
        Detector.load(str(folder))
    message = str(error.value)
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 2 * models.MAX_MESSAGE
    return message


# --- code -------------------------------------------------------------------------------------

AUTO_MAP = dict.fromkeys(
    ("AutoConfig", "AutoModelForObjectDetection", "AutoBackbone", "AutoImageProcessor"), "evil.Evil"
)


def plant_code(folder: Path, place: str) -> None:
    """Makes a folder ask for code of its own at one place."""
    (folder / "evil.py").write_text(EVIL)
    config, processor = copy.deepcopy(CONFIG), dict(PROCESSOR)
    if place == "model of an unknown type":
        config |= {"model_type": "own", "auto_map": AUTO_MAP}
    elif place == "model of a known type":
        config["auto_map"] = AUTO_MAP
    elif place == "backbone":
        own = {"model_type": "bert", "auto_map": AUTO_MAP, "name_or_path": str(folder)}
        config["backbone_config"] = own
    elif place == "image processor":
        processor |= {"image_processor_type": "Own", "auto_map": AUTO_MAP}
    write(folder, config, processor)
    if place == "whole processor":
        whole = {"image_processor": processor | {"auto_map": AUTO_MAP}}
        (folder / models.WHOLE_PROCESSOR).write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "place",
    [
        "model of an unknown type",
        "model of a known type",
        "backbone",
        "image processor",
        "whole processor",
    ],
)
def test_no_code_of_a_folder_runs(folder, requests, monkeypatch, place) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: requests.append("input") or "y")
    plant_code(folder, place)
    assert "names code to run (auto_map)" in refusal(folder)
    assert not (folder / "ran").exists()
    assert not requests


@pytest.mark.slow
def test_the_command_does_not_ask_whether_to_run_code(folder, tmp_path) -> None:
    """In a process of its own, whose standard input says yes."""
    plant_code(folder, "model of an unknown type")
    program = "import sys; from saccade.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "export", folder, "--out", tmp_path / "model.onnx"],
        input="y\ny\n",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(saccade.__file__).parent.parent)},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: cannot load .* names code to run \(auto_map\).*\n", done.stderr)
    assert not (folder / "ran").exists()


def test_kernels_of_the_hub_are_code(folder, requests) -> None:
    write(folder, CONFIG | {"attn_implementation": "kernels-community/flash-attn"})
    assert "names code to run (attn_implementation)" in refusal(folder)
    assert not requests


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_pickled_weights_run_no_code(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    torch.save(load_weights() | {"more": _Evil()}, folder / "pytorch_model.bin")
    assert "got a pickled" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_read(folder) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(load_weights(), folder / "pytorch_model.bin")
    ours, theirs = Detector.load(str(folder)).model, Detector.load().model
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_folder_that_names_a_backbone_of_the_hub_is_loaded_offline(
    folder, requests, pretrained
) -> None:
    config = without(CONFIG, "backbone_config") | HUB_BACKBONE
    write(folder, config | {"use_pretrained_backbone": pretrained})
    assert "takes a part of the model from the network (backbone)" in refusal(folder)
    # With its own configuration of the backbone, the folder has all that it needs.
    write(folder, CONFIG | HUB_BACKBONE | {"use_pretrained_backbone": pretrained})
    assert len(Detector.load(str(folder)).operators) > 0
    assert not requests


def test_the_hub_stays_usable_after_a_folder_was_loaded(folder) -> None:
    from huggingface_hub import constants

    assert not constants.HF_HUB_OFFLINE
    Detector.load(str(folder))
    write(folder, {})
    refusal(folder)
    assert not constants.HF_HUB_OFFLINE


def test_an_adapter_does_not_replace_the_folder(folder, requests) -> None:
    adapter = {"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert "it has an adapter (adapter_config.json)" in refusal(folder)
    assert not requests


def test_a_model_of_the_hub_is_fetched_and_then_loaded_as_a_folder(
    folder, requests, monkeypatch
) -> None:
    fetched: list[Any] = []

    def fetch(repository: str, *, allow_patterns: list[str]) -> str:
        fetched.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    detector = Detector.load("owner/name")
    assert detector.name == "owner/name"
    assert [repository for repository, _ in fetched] == ["owner/name"]
    assert not any("*.py" in pattern or pattern == "*" for _, each in fetched for pattern in each)
    # Only without safetensors are pickles fetched.
    (folder / WEIGHTS).unlink()
    torch.save(load_weights(), folder / "pytorch_model.bin")
    Detector.load("owner/name")
    assert "pytorch_model.bin" in fetched[-1][1]
    assert not any("bin" in pattern for _, each in fetched[:-1] for pattern in each)
    plant_code(folder, "backbone")
    with pytest.raises(ModelError, match=r"cannot load owner/name: .*names code to run"):
        Detector.load("owner/name")
    assert not requests


@pytest.mark.parametrize("source", ["owner/name", "a b/c", "owner/" + 200 * "n"])
def test_a_model_that_the_hub_does_not_give_is_named(source) -> None:
    with pytest.raises(ModelError, match=f"cannot load {source}: "):
        Detector.load(source)


# --- broken and absurd folders ----------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other widths": ({"d_model": 128}, r"\d+ weights do not have the shapes.*class_embed.*expected"),
    "zero widths": ({"d_model": 0}, "ZeroDivisionError"),
    "negative widths": ({"d_model": -1}, "negative dimension"),
    "a word for a number": ({"d_model": "x"}, "'d_model' expected int, got str"),
    "huge widths": ({"d_model": 2**18}, "files are too small"),
    "no decoder": ({"decoder_layers": 0}, ""),
    "a part of the decoder": ({"decoder_layers": 1}, ""),
    "no encoder": ({"encoder_layers": 0}, "leaves out layers that have 32 weights"),
    "a part of the encoder": ({"encoder_layers": 1}, "leaves out layers that have 16 weights"),
    "too many layers": ({"encoder_layers": 3}, r"lacks 16 weights.*encoder\.layers\.2"),
    "absurdly many layers": ({"encoder_layers": 10**6}, "files are too small"),
    "zero heads": ({"encoder_attention_heads": 0}, "ZeroDivisionError"),
    "three heads": ({"encoder_attention_heads": 3}, "divisible"),
    "zero levels": ({"num_feature_levels": 0}, "do not have the shapes"),
    "zero points": ({"decoder_n_points": 0}, "do not have the shapes"),
    "fewer queries": ({"num_queries": 29}, r"1 weights.*expected \[29, 128\], got \[30, 128\]"),
    "many labels": ({"num_labels": 10**12}, "expected num_labels up to 65536"),
    "a number of 4000 digits": ({"any": 10**4000}, "expected any up to 1048576"),
    "labels without numbers": ({"id2label": {"a": "b"}}, "invalid literal"),
    "labels in a list": ({"id2label": []}, "AttributeError"),
    "an unknown activation": ({"activation_function": "nope"}, "KeyError: 'nope'"),
    "no backbone": ({"backbone_config": 5}, "backbone_config"),
    "an empty backbone": ({"backbone_config": {}}, "KeyError"),
    "a backbone for text": ({"backbone_config": {"model_type": "bert"}}, "Unrecognized"),
    "an unknown dtype": ({"dtype": "evil"}, "no attribute 'evil'"),
    "an unknown type": ({"model_type": "own"}, "model type `own`"),
    "a type that no terminal can show": ({"model_type": "\ud800\x1b[31m"}, r"model type `\\ud800\\x1b\[31m`"),
    "a type that is a list": ({"model_type": []}, "TypeError"),
    "a model for text": ({"model_type": "bert"}, "Unrecognized configuration class"),
    "a method": ({"to_dict": 5}, "not callable"),
    "other files": ({"configuration_files": ["config.4.0.0.json"]}, "points to other files"),
    "other weights": ({"transformers_weights": "../model.safetensors"}, "points to other files"),
    "huge anchors": ({"anchor_image_size": [2**16, 2**16]}, "anchor_image_size up to 4096"),
    "two stages": ({"two_stage": True}, "lacks 44 weights"),
    "quantized": ({"quantization_config": 5}, "AttributeError"),
    "huge buffers": (
        {"backbone_config": {"model_type": "swin", "window_size": 300}},
        "files are too small",
    ),
}  # fmt: skip
PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "for other models": ({"image_processor_type": "ViTImageProcessor"}, "not for object detection"),
    "unknown": ({"image_processor_type": "Nope"}, "Unrecognized image processor"),
    "no word": ({"image_processor_type": 5}, "AttributeError"),
    "huge": ({"size": {"height": 10**9, "width": 1}}, "up to 4096 .* got height = 1000000000"),
    "huge padding": ({"pad_size": {"height": 10**9, "width": 1}}, "got height = 1000000000"),
    "without a size": ({"size": {}}, "size must have"),
    "NaN": ({"image_std": [math.nan] * 3}, "got image_std = nan"),
    "infinite": ({"rescale_factor": math.inf}, "got rescale_factor = inf"),
}
FILES: dict[str, tuple[str, bytes | str | None, str]] = {
    "no config": (models.CONFIG, None, "No such file"),
    "an empty config": (models.CONFIG, b"", "expected JSON"),
    "a config that is a list": (models.CONFIG, b"[]", "expected a JSON object, got list"),
    "a nested config": (models.CONFIG, b"[" * 10**6, "RecursionError"),
    "a less nested config": (
        models.CONFIG,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        "recursion|model_type",
    ),
    "a config of 5 MB": (models.CONFIG, b" " * 5 * 2**20 + b"{}", "at most 4194304 bytes"),
    "a config of bytes": (models.CONFIG, b"\xff\xff", "UnicodeDecodeError"),
    "a config without an end": (models.CONFIG, "/dev/zero", "is a device"),
    "no processor": (models.PROCESSOR, None, "has no image processor"),
    "a processor that is a pipe": (models.PROCESSOR, "pipe", "is a FIFO"),
    "a whole processor for text": (models.WHOLE_PROCESSOR, b"[]", "expected a JSON object"),
    "no weights": (WEIGHTS, None, "has no weights"),
    "empty weights": (WEIGHTS, b"", "is broken or incomplete"),
    "half of the weights": (WEIGHTS, b"half", "is broken or incomplete.*not fully covered"),
    "weights left in Git LFS": (WEIGHTS, b"version https://git-lfs", "is broken or incomplete"),
    "weights that are a folder": (WEIGHTS, "folder", "is a folder"),
    "weights that are a pipe": (WEIGHTS, "pipe", "is a FIFO"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "absurdly many layers" else [])
        for name in CONFIGS
    ],
)
def test_a_config_that_cannot_be_meant(folder, requests, name) -> None:
    changes, reason = CONFIGS[name]
    write(folder, CONFIG | changes)
    assert re.search(reason, refusal(folder))
    assert not requests


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_processor_that_cannot_be_meant(folder, name) -> None:
    changes, reason = PROCESSORS[name]
    write(folder, CONFIG, PROCESSOR | changes)
    assert re.search(reason, refusal(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_broken(folder, name) -> None:
    file, content, reason = FILES[name]
    path = folder / file
    path.unlink(missing_ok=True)
    if content == b"half":
        whole = (SHIPPED / WEIGHTS).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.symlink_to(content)
    assert re.search(reason, refusal(folder))


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ({"a": "model-2.safetensors"}, "No such file"),
        ({"a": "../model/model-1.safetensors"}, "expected names of files beside it"),
        ({"a": ".."}, "expected names of files beside it"),
        ({"a": 5}, "expected names of files beside it"),
        ([], "expected names of files beside it"),
        ({}, ""),
    ],
)
def test_shards_that_are_not_there(folder, shards, reason) -> None:
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": shards}
    (folder / (WEIGHTS + models.INDEX)).write_text(json.dumps(index))
    assert re.search(reason, refusal(folder))


def test_a_file_of_many_tensors_is_not_read(folder, monkeypatch) -> None:
    """A header of safetensors can name a million tensors without elements."""
    monkeypatch.setattr(models, "MAX_TENSORS", 50)
    assert re.search(
        r"expected at most 50 tensors in model\.safetensors, got \d{3}", refusal(folder)
    )


def test_a_model_of_many_modules_is_not_built(folder, monkeypatch) -> None:
    monkeypatch.setattr(models, "MAX_MODULES", 50)
    assert "asks for more than 50 modules" in refusal(folder)
    monkeypatch.undo()
    Detector.load(str(folder))  # Nothing of the limit is left.


def test_a_folder_that_cannot_be_read_is_named(tmp_path) -> None:
    for source in ("a/b/c", "~nobody/x", 5000 * "x", "nul\0/name/x", "\ud800"):
        with pytest.raises(ModelError, match="is neither a folder nor the id of a model"):
            Detector.load(source)


VALUES = [
    None, 0, -1, 1, 2, 3, 7, 100, 2**16, 2**20, 10**12, 10**400, 1.5, 0.0, -2.0, 1e30, math.nan, math.inf,
    True, False, "x", "", "relu", "a/b", "resnet", "\ud800", [], {}, [1], [0], [-1], {"a": 1}, {"0": 5},
    [[[]]], [None], ["stage9"], [64] * 50, {"model_type": "swin", "out_features": ["stage2"]},
    {"model_type": "dinov2", "image_size": 4096, "patch_size": 1},
]  # fmt: skip
KEYS = [
    "anchor_image_size", "eval_size", "feat_strides", "num_hidden_layers", "backbone", "backbone_kwargs",
    "group_detr", "eval_idx", "quantization_config", "encode_proj_layers", "label2id", "attribute_map",
    "sub_configs", "num_labels", "rope_parameters", "per_layer_config", "_attn_implementation",
]  # fmt: skip
TYPES = ["rt_detr", "rt_detr_v2", "d_fine", "rf_detr", "lw_detr", "detr", "dab-detr", "yolos"]


def mutate(content: Any, chance: random.Random) -> Any:
    """Changes one value of a JSON object at any depth."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []
    remaining = [content]
    while remaining:
        value = remaining.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        places += [(value, key) for key in keys]
        remaining += [value[key] for key in keys if isinstance(value[key], (dict, list))]
    value, key = chance.choice(places)
    way = chance.random()
    if way < 0.15 and isinstance(value, dict):
        value.pop(key)
    elif way < 0.3:
        other, other_key = chance.choice(places)
        value[key] = copy.deepcopy(other[other_key])
    elif way < 0.45 and "model_type" in content:
        content["model_type"] = chance.choice(TYPES)
    elif way < 0.65:
        content[chance.choice(KEYS)] = chance.choice(VALUES)
    else:
        value[key] = chance.choice(VALUES)
    return content


@pytest.mark.slow
@pytest.mark.parametrize("seed", helpers.some(range(1000), 40))
def test_any_change_loads_or_is_refused(folder, requests, seed) -> None:
    chance = random.Random(seed)
    config, processor = CONFIG, PROCESSOR
    for _ in range(chance.choice([1, 1, 2])):
        if chance.random() < 0.8:
            config = mutate(config, chance)
        else:
            processor = mutate(processor, chance)
    write(folder, config, processor)
    try:
        Detector.load(str(folder))
    except ModelError as error:
        assert str(error).isprintable()  # noqa: PT017
    assert not requests
