"""Whatever a file or a state dict holds, the errors are those that are documented."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import pickle
import pickletools
import random
import struct
import warnings
import zipfile

import pytest
import torch
from checkpoint_helpers import attention
from helpers import ALL

from saccade.integrations import checkpoints

WEIGHTS = {"layer.attn.n_points_scale": torch.full((2,), 0.5)} | attention(
    "layer.attn", [2], heads=2
)
WEIGHTS = {
    name: tensor[:4, :4].contiguous() if tensor.dim() == 2 else tensor[:4].contiguous()
    for name, tensor in WEIGHTS.items()
}
WEIGHTS |= attention("layer.attn", [2], heads=2)
ARGS = {"nheads": 2, "dec_n_points": [2], "lr": 1e-4, "names": ["a", ("b", None)], 3: True}
CONTENT = {"model": WEIGHTS, "args": argparse.Namespace(nheads=2, device="cpu"), "other": ARGS}
KINDS = ["zip", "legacy", "pickle 2", "pickle 4", "safetensors"]


@contextlib.contextmanager
def errors(*kinds, saying="expected"):
    """Within it errors of these kinds may occur, which say this. The list has one if one did."""
    messages = []
    try:
        yield messages
    except kinds as error:
        messages.append(str(error))
    assert all(saying in message for message in messages), messages


def write(kind):
    """A small valid file, and where its pickle lies."""
    file = io.BytesIO()
    if kind in ("zip", "legacy"):
        torch.save(CONTENT, file, _use_new_zipfile_serialization=kind == "zip")
        content = file.getvalue()
        start = content.index(b"\x80\x02}q") if kind == "zip" else 0
        return content, start, min(len(content), start + 3500)
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch", reason="not installed")
        content = safetensors.save(WEIGHTS)
        return content, 0, min(len(content), 1500)
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    arrays["odd"] = numpy.zeros((2, 2), ">c8")
    content = pickle.dumps({"model": arrays, "args": ARGS}, int(kind[-1]))
    return content, 0, len(content)


OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


def mutate(draw, content, start, end):
    """Some bytes, most of them in the pickle, become others, are inserted, removed or cut off."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(start, end) if draw.random() < 0.9 else draw.randrange(len(content))
        action = draw.choice(
            ["byte", "opcode", "opcode", "insert", "remove", "copy", "cut", "number"]
        )
        at = min(at, len(content) - 1)
        if action == "byte":
            content[at] = draw.randrange(256)
        elif action == "opcode":
            content[at] = draw.choice(OPCODES)
        elif action == "insert":
            content[at:at] = bytes(draw.choices(OPCODES, k=draw.randrange(1, 4)))
        elif action == "remove":
            del content[at : at + draw.randrange(1, 4)]
        elif action == "copy":
            content[at:at] = content[at : at + draw.randrange(1, 40)]
        elif action == "number":
            content[at : at + 4] = struct.pack(
                "<I", draw.choice([0, 1, 255, 2**16, 2**31, 2**32 - 1])
            )
        elif draw.random() < 0.3:
            del content[at:]
        if not content:
            return bytes(content)
    return bytes(content)


def make_archive(draw, content):
    """An archive whose checksums are right, so that what is in it is read."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as archive:
        for name in source.namelist():
            member = source.read(name)
            if name.endswith("data.pkl"):
                member = mutate(draw, member, 0, len(member))
            archive.writestr(name, member)
    return result.getvalue()


def test_valid_files_are_loaded(tmp_path):
    for kind in KINDS:
        suffix = "safetensors" if kind == "safetensors" else "pth"
        (tmp_path / f"file.{suffix}").write_bytes(write(kind)[0])
        checkpoint = checkpoints.load(tmp_path / f"file.{suffix}")
        arguments = {"num_heads": 2, "num_levels": 1}
        assert list(checkpoints.attention_modules(checkpoint, **arguments)) == ["layer.attn"]


@pytest.mark.slow
def test_broken_files_raise_what_is_documented(tmp_path):
    files = {kind: write(kind) for kind in KINDS}
    outcomes = {"loaded": 0, "refused": 0}
    draws = 2000 if ALL else 50
    for kind, seed in itertools.product(KINDS, range(draws)):
        draw = random.Random(f"{kind} {seed}")
        content, start, end = files[kind]
        if kind == "zip" and draw.random() < 0.7:
            broken = make_archive(draw, content)
        else:
            broken = mutate(draw, content, start, end)
        path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
        path.write_bytes(broken)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with errors(ValueError, saying=str(path)) as messages:
                checkpoint = checkpoints.load(path)
        outcomes["refused" if messages else "loaded"] += 1
        if not messages:
            with errors(ValueError, TypeError):
                checkpoints.attention_modules(checkpoint, num_heads=2, num_levels=1)
    assert min(outcomes.values()) > 20, outcomes


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls some of these new, and others old
    ODD_VALUES = {
        "none": None,
        "text": "text",
        "number": 3,
        "no dimension": torch.tensor(1.0),
        "empty": torch.zeros(0),
        "int8": torch.zeros(8, 8, dtype=torch.int8),
        "uint16": torch.zeros(8, 8, dtype=torch.uint16),
        "bool": torch.zeros(8, 8, dtype=torch.bool),
        "complex": torch.zeros(8, 8, dtype=torch.complex64),
        "sparse": torch.eye(8).to_sparse(),
        "compressed": torch.eye(8).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.zeros(8, 8), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "infinite": torch.full((2,), torch.inf),
        "many": torch.zeros(10_000),
    }


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("name", [*WEIGHTS, "layer.attn.num_points_scale", "layer.level_embed"])
def test_odd_entries_raise_what_is_documented(name, value):
    weights = WEIGHTS | {name: ODD_VALUES[value], 3: torch.zeros(2), None: None, ("a", 1): "b"}
    weights.pop("layer.attn.n_points_scale")
    for arguments in ({"num_heads": 2, "num_levels": 1}, {}):
        with errors(ValueError):
            checkpoints.attention_modules(weights, **arguments)
    with errors(ValueError):
        checkpoints.state_dict_of(weights, "layer.attn")


def test_meta_tensors_stay_meta():
    weights = {name: tensor.to("meta") for name, tensor in attention("a", [2], heads=2).items()}
    (module,) = checkpoints.attention_modules(weights, num_heads=2, num_levels=1).values()
    assert all(parameter.is_meta for parameter in module.parameters())
    weights["a.n_points_scale"] = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match="a.num_points_scale: expected 1 / K .* got torch.float32"):
        checkpoints.attention_modules(weights)


@pytest.mark.parametrize("setting", [
    "eight", [], {}, [[2]], [2, None], 0, -1, True, 1.5, float("nan"), 10**400, "2" * 2000, b"2", [2] * 2000,
    torch.zeros(3), torch.tensor(2), (2,), {1}, [float("inf")],
])  # fmt: skip
@pytest.mark.parametrize("name", ["nheads", "dec_n_points", "num_feature_levels", "projector_scale",
                                  "encoder_method", "encoder_offset_scale"])  # fmt: skip
def test_odd_settings_raise_what_is_documented(tmp_path, name, setting):
    weights = attention("layer.attn", [2], heads=2)
    other = {"enc_n_points": setting} if name == "dec_n_points" else {}
    torch.save({"model": weights, "args": {name: setting, **other}}, tmp_path / "file.pth")
    checkpoint = checkpoints.load(tmp_path / "file.pth")
    assert repr(checkpoint)
    for config in (None, {name: setting, **other}):
        for arguments in ({}, {"num_heads": 2}, {"num_levels": 1}):
            with errors(TypeError, ValueError):
                checkpoints.attention_modules(checkpoint, config, **arguments)


def test_arguments_of_the_wrong_kind():
    for source in (3, None, [WEIGHTS]):
        for function in (
            checkpoints.attention_modules,
            checkpoints.attention_prefixes,
            lambda source: checkpoints.state_dict_of(source, "layer.attn"),
        ):
            with pytest.raises(TypeError, match="source: expected a Checkpoint or a mapping"):
                function(source)
    with pytest.raises(TypeError, match="prefix: expected a str, got int"):
        checkpoints.state_dict_of(WEIGHTS, 3)
    with pytest.raises(TypeError, match="prefix: expected a str, got NoneType"):
        checkpoints.attention_modules(WEIGHTS, prefix=None)
    with pytest.raises(TypeError):
        checkpoints.load(3)
    with pytest.raises(ValueError, match="null"):
        checkpoints.load("a\0b")
