"""Checkpoints of other packages load into saccade's modules: every layout, strictly and safely."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saccade
from saccade.benchmark.detectors import DETECTORS
from saccade.integrations import checkpoints

EMBED_DIM, HEADS = 32, 4
POINTS = {"encoder": [4] * 4, "decoder": [2] * 4}


def attention(prefix, points, heads=HEADS, value_dim=EMBED_DIM):
    """The entries that a module of the family has, under the prefix."""
    rows = heads * sum(points)
    shapes = {
        "sampling_offsets": (2 * rows, EMBED_DIM),
        "attention_weights": (rows, EMBED_DIM),
        "value_proj": (value_dim, EMBED_DIM),
        "output_proj": (EMBED_DIM, value_dim),
    }
    found = {}
    for layer, (outputs, inputs) in shapes.items():
        found[f"{prefix}.{layer}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        found[f"{prefix}.{layer}.bias"] = torch.randn(outputs)
    return found


def multihead(prefix):
    return {
        f"{prefix}.in_proj_weight": torch.randn(3 * EMBED_DIM, EMBED_DIM),
        f"{prefix}.out_proj.weight": torch.randn(EMBED_DIM, EMBED_DIM),
    }


def layers(encoder, decoder, self_attention, points=POINTS, count=6, heads=HEADS, **others):
    """A model's state dict: templates of the prefixes, {} is the number of the layer."""
    found = {name: torch.randn(shape) for name, shape in others.items()}
    for number in range(count):
        if encoder:
            found |= attention(encoder.format(number), points["encoder"], heads)
        if decoder:
            found |= multihead(self_attention.format(number))
            found |= attention(decoder.format(number), points["decoder"], heads)
    return found


ENCODER, DECODER = (
    "transformer.encoder.layers.{}.self_attn",
    "transformer.decoder.layers.{}.cross_attn",
)
SELF = "transformer.decoder.layers.{}.self_attn"


def official():
    return layers(ENCODER, DECODER, SELF, **{"transformer.level_embed": (4, EMBED_DIM)})


def official_file(model):
    """As main.py of Deformable DETR saves it."""
    args = argparse.Namespace(
        nheads=HEADS, num_feature_levels=4, enc_n_points=4, dec_n_points=2, lr=2e-4, masks=False,
        lr_backbone_names=["backbone.0"], frozen_weights=None, device="cuda", output_dir="out",
    )  # fmt: skip
    state = {0: {"step": 1, "exp_avg": torch.zeros(3)}}
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [{"lr": 2e-4, "params": [0]}]},
        "lr_scheduler": {"step_size": 40, "_last_lr": [2e-4]},
        "epoch": 49,
        "args": args,
    }


def check_same(modules, state_dict):
    """Every entry of the attention modules arrived, under its own name."""
    found = {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    expected = {
        name: tensor
        for name, tensor in state_dict.items()
        if any(name.startswith(prefix + ".") for prefix in modules) and "points_scale" not in name
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def numbers(modules):
    return {(module.num_heads, tuple(module.num_points)) for module in modules.values()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "of-2020"])
def test_the_authors_file(tmp_path, zipped):
    model = official()
    torch.save(official_file(model), tmp_path / "r50.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = checkpoints.load(tmp_path / "r50.pth")
    assert (checkpoint.entry, checkpoint.config["nheads"]) == ("model", HEADS)
    assert "tensor" not in repr(checkpoint)
    modules = checkpoints.attention_modules(checkpoint)
    assert list(modules) == checkpoints.attention_prefixes(checkpoint)
    assert sorted(modules) == sorted(
        template.format(number) for template in (ENCODER, DECODER) for number in range(6)
    )
    check_same(modules, model)
    for prefix, module in modules.items():
        assert (module.embed_dim, module.num_heads) == (EMBED_DIM, HEADS)
        assert module.num_points == POINTS["encoder" if "encoder" in prefix else "decoder"]
    assert "modules of deformable attention: 12" in str(modules)
    assert "num_points=[2, 2, 2, 2] (dec_n_points)" in str(modules)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    # Copies: training them leaves the checkpoint alone.
    with torch.no_grad():
        next(iter(modules.values())).value_proj.weight.zero_()
    check_same(checkpoints.attention_modules(checkpoint), model)


def test_an_allowance_that_was_there_stays(tmp_path):
    torch.save(official_file(official()), tmp_path / "r50.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoints.load(tmp_path / "r50.pth")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def with_buffer(state_dict, points):
    scale = torch.tensor([1 / count for count in points for _ in range(count)])
    prefixes = checkpoints.attention_prefixes(state_dict)
    return state_dict | {f"{prefix}.num_points_scale": scale for prefix in prefixes}


RT = ("", "decoder.decoder.layers.{}.cross_attn", "decoder.decoder.layers.{}.self_attn")
RF = ("", DECODER, SELF)
D2 = "sem_seg_head.pixel_decoder.transformer.encoder.layers.{}.self_attn"
THREE = {"encoder": [4] * 3, "decoder": [4] * 3}
LISTED = {"decoder": [3, 6, 3]}
# Name -> state dict, what is around it in the file, arguments, heads and points that must be found.
FORMATS = {
    "dino, from its command line": (
        layers(ENCODER, DECODER, SELF, {"encoder": [4] * 5, "decoder": [4] * 5}),
        lambda model: official_file(model)
        | {"args": argparse.Namespace(nheads=4, num_feature_levels=5, enc_n_points=4, dec_n_points=4)},
        {}, {(4, (4,) * 5)},
    ),
    "grounding dino, saved by DataParallel": (
        layers("module." + ENCODER, "module." + DECODER, "module." + SELF, count=2),
        lambda model: {"model": model}, {"num_heads": 4, "num_levels": 4},
        {(4, (4,) * 4), (4, (2,) * 4)},
    ),
    "mask2former of detectron2": (
        layers(D2, "", "", THREE, **{"sem_seg_head.pixel_decoder.transformer.level_embed": (3, 32)}),
        lambda model: {"model": model, "iteration": 9}, {"num_heads": 4, "num_points": 4},
        {(4, (4,) * 3)},
    ),
    "detrex": (
        layers(
            "transformer.encoder.layers.{}.attentions.0",
            "transformer.decoder.layers.{}.attentions.1",
            "transformer.decoder.layers.{}.attentions.0.attn",
        ),
        lambda model: {"model": model, "iteration": 9}, {"num_heads": 4, "num_levels": 4},
        {(4, (4,) * 4), (4, (2,) * 4)},
    ),
    "mmdet": (
        layers("encoder.layers.{}.self_attn", "decoder.layers.{}.cross_attn",
               "decoder.layers.{}.self_attn.attn", level_embed=(4, 32)),
        lambda model: {"meta": {"cfg": "", "epoch": 50}, "state_dict": collections.OrderedDict(model)},
        {"num_heads": 4, "num_levels": 4}, {(4, (4,) * 4), (4, (2,) * 4)},
    ),
    "rt-detr, averaged weights": (
        layers(*RT, points=THREE), lambda model: {"ema": {"module": model, "updates": 7}},
        {"num_levels": 3, "num_points": 4}, {(4, (4,) * 3)},
    ),
    "rt-detrv2, points in a buffer": (
        with_buffer(layers(*RT, points=LISTED), [3, 6, 3]), lambda model: {"model": model},
        {}, {(4, (3, 6, 3))},
    ),
    "rf-detr of 2025": (
        layers(*RF, points={"decoder": [2]}, heads=16),
        lambda model: {"model": model, "args": argparse.Namespace(
            sa_nheads=8, ca_nheads=16, dec_n_points=2, num_feature_levels=1)},
        {}, {(16, (2,))},
    ),
    "rf-detr 1.11, twice in the file": (
        layers(*RF, points={"decoder": [4] * 2}, heads=8),
        lambda model: {
            "model": model, "args": {"lr": 1e-4},
            "model_config": {"ca_nheads": 8, "dec_n_points": 4, "projector_scale": ["P3", "P5"]},
            "state_dict": {f"model.{name}": tensor for name, tensor in model.items()},
        },
        {}, {(8, (4, 4))},
    ),
    "the state dict alone": (
        official(), dict, {"num_points": [4] * 4, "prefix": "transformer.encoder"}, {(4, (4,) * 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_layouts(tmp_path, name):
    state_dict, around, arguments, expected = FORMATS[name]
    torch.save(around(state_dict), tmp_path / "file.pth")
    modules = checkpoints.attention_modules(checkpoints.load(tmp_path / "file.pth"), **arguments)
    prefixes = checkpoints.attention_prefixes(state_dict)
    assert list(modules) == [
        name for name in prefixes if name.startswith(arguments.get("prefix", ""))
    ]
    assert numbers(modules) == expected
    check_same(modules, state_dict)


def test_several_state_dicts_are_not_chosen_between(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"model": official(), "ema": {"module": official()}}, path)
    with pytest.raises(ValueError, match=r"entry: expected one of 'model', 'ema.module', because"):
        checkpoints.load(path)
    assert checkpoints.load(path, entry="ema.module").entry == "ema.module"
    with pytest.raises(ValueError, match="expected entry 'ema' with .* got model, ema"):
        checkpoints.load(path, entry="ema")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_as_detectron2_publishes_them(tmp_path, protocol):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    state_dict = layers(D2, "", "", THREE, count=2)
    arrays = {name: tensor.numpy() for name, tensor in state_dict.items()}
    arrays["by_columns"] = numpy.asfortranarray(arrays[D2.format(0) + ".value_proj.weight"])
    arrays["count"], arrays["empty"] = numpy.array(7), numpy.zeros((0, 3), "f2")
    file = {"model": arrays, "__author__": "third_party", "iteration": numpy.float64(3)}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(file, protocol))
    found = checkpoints.load(tmp_path / "model.pkl").state_dict
    assert found.keys() == arrays.keys()
    assert all(torch.equal(found[name], torch.tensor(arrays[name])) for name in arrays)
    modules = checkpoints.attention_modules(found, num_heads=4, num_levels=3)
    check_same(modules, state_dict)
    for wrong in (numpy.array([{}], object), numpy.zeros(3, ">f4"), numpy.zeros(3, "c8")):
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": wrong}, protocol))
        with pytest.raises(ValueError, match="got a pickled (numpy )?array of"):
            checkpoints.load(tmp_path / "model.pkl")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Settings:
    """Harmless, but nothing that a reader could know."""


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("where", ["args", "inside args", "model"])
def test_nothing_in_a_file_is_run(tmp_path, write, where):
    proof, path = tmp_path / "proof", tmp_path / "file.pth"
    file = official_file(official() if write != "pickle" else {})
    if where == "args":
        file["args"] = Touch(proof)
    elif where == "inside args":
        file["args"].lr = Touch(proof)
    else:
        file["model"]["backbone.weight"] = Touch(proof)
    if write == "pickle":
        path.write_bytes(pickle.dumps(file | {"optimizer": {}}))
    else:
        torch.save(file, path, _use_new_zipfile_serialization=write == "zip")
    name = r"(posix|nt)\.mkdir|argparse\.Namespace"  # the latter is nothing for a pickle of arrays
    with pytest.raises(ValueError, match=rf"got a pickled ({name})\. .*nothing was run"):
        checkpoints.load(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if write != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # the file is as bad as it should be


def test_pickled_objects_are_named(tmp_path):
    torch.save({"model": official(), "args": Settings()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"got a pickled \S*\.Settings\. .*If you trust") as caught:
        checkpoints.load(tmp_path / "file.pth")
    assert "weights_only=False" not in str(caught.value)
    with torch.serialization.safe_globals([Settings]):
        assert checkpoints.load(tmp_path / "file.pth").config == {}
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 not a zip archive"):
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(
            ValueError, match="expected a file that torch.save or safetensors wrote"
        ):
            checkpoints.load(tmp_path / "file.pth")
    torch.save([1], tmp_path / "file.pth")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        checkpoints.load(tmp_path / "file.pth")
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"that end in sampling_offsets.weight, got model \(1 in"):
        checkpoints.load(tmp_path / "file.pth")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none.pth")


def attention_calls(model, inputs):
    """What the attention modules of a model were given in a forward, and what they gave."""
    calls = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("MultiscaleDeformableAttention"):
            module.register_forward_hook(
                lambda module, args, given, output, name=name: calls.update(
                    {name: (dict(given) | ({"hidden_states": args[0]} if args else {}), output[0])}
                ),
                with_kwargs=True,
            )
    with torch.no_grad():
        model(**inputs)
    return calls


def attend(module, given, *, keep):
    """The call of a transformers module, made to saccade's; `keep`: their mask is True for values."""
    query, mask = given["hidden_states"], given.get("attention_mask")
    if given.get("position_embeddings") is not None:
        query = query + given["position_embeddings"]
    if mask is not None:
        mask = ~mask.bool() if keep else mask.bool()
    with torch.no_grad():
        return module(
            query, given["reference_points"], given["encoder_hidden_states"],
            given["spatial_shapes_list"], mask,
        )  # fmt: skip


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "d-fine"])
def test_transformers_folders(tmp_path, name, shards):
    pytest.importorskip("safetensors", reason="transformers writes with it")
    detector = DETECTORS[name]
    model, inputs = detector.build(small=True), detector.inputs(small=True)
    if name == "deformable-detr":
        inputs["pixel_mask"] = torch.ones(1, *inputs["pixel_values"].shape[2:], dtype=torch.long)
        inputs["pixel_mask"][:, 60:, 80:] = 0
    calls = attention_calls(model, inputs)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    checkpoint = checkpoints.load(tmp_path)
    arguments = {"num_levels": 3} if name == "mask2former" else {}
    for modules in (
        checkpoints.attention_modules(checkpoint, **arguments),
        checkpoints.attention_modules(model.state_dict(), model.config, **arguments),
    ):
        # rf-detr's files have the authors' names, without "model" and with "transformer".
        by_name = {prefix.split(".", 1)[1]: module for prefix, module in modules.items()}
        assert by_name.keys() == {prefix.split(".", 1)[1] for prefix in calls}
        for prefix, (given, expected) in calls.items():
            found = attend(by_name[prefix.split(".", 1)[1]], given, keep=name != "mask2former")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("points", [[4, 4, 4], [3, 6, 3]], ids=str)
def test_rt_detr_v2_with_lists_and_the_discrete_method(method, points):
    from transformers import RTDetrV2Config
    from transformers.models.rt_detr_v2 import modeling_rt_detr_v2

    torch.manual_seed(0)
    config = RTDetrV2Config(d_model=32, decoder_attention_heads=4, decoder_method=method)
    source = modeling_rt_detr_v2.RTDetrV2MultiscaleDeformableAttention(config)
    # transformers has one number for all levels; the authors' lists are in their files.
    source.n_points_list = points
    source.n_points_scale = torch.tensor([1 / count for count in points for _ in range(count)])
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    settings = config.to_dict() | {"decoder_n_points": points}
    shapes = [(8, 12), (4, 6), (2, 3)]
    given = {
        "hidden_states": torch.randn(2, 9, 32),
        "encoder_hidden_states": torch.randn(2, 126, 32),
        "reference_points": torch.rand(2, 9, 1, 4),
        "attention_mask": torch.rand(2, 126) < 0.8,
        "spatial_shapes_list": shapes,
    }
    with torch.no_grad():
        expected = source(**given, spatial_shapes=torch.tensor(shapes))[0]
    module = checkpoints.attention_modules(source.state_dict(), settings)[""]
    assert (module.num_heads, module.num_points) == (4, points)
    torch.testing.assert_close(attend(module, given, keep=True), expected, rtol=1e-5, atol=1e-5)
    for wrong, message in (
        ({"decoder_offset_scale": 0.25}, "decoder_offset_scale: expected 0.5, .* got 0.25"),
        ({"decoder_method": "cubic"}, "decoder_method: expected one of 'default', 'discrete', got"),
        ({"decoder_n_points": [6, 3, 3]}, r"num_points: expected \[.*a buffer .*got \[6, 3, 3\]"),
        ({"decoder_n_levels": 4}, r"attention_weights.weight: expected .*num_levels=4 \(decoder_n_l"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.attention_modules(source.state_dict(), settings | wrong)


def test_mmcv_module():
    pytest.importorskip("mmcv", reason="mmcv is not installed: its module is not compared")
    ops = pytest.importorskip("mmcv.ops", reason="this mmcv comes without its operators")
    source = ops.MultiScaleDeformableAttention(EMBED_DIM, HEADS, 2, 3, batch_first=True).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shapes, mask = [(8, 12), (4, 6)], torch.rand(2, 120) < 0.2
    query, value, reference = torch.randn(2, 9, 32), torch.randn(2, 120, 32), torch.rand(2, 9, 2, 2)
    with torch.no_grad():
        expected = source(
            query, value=value, reference_points=reference, key_padding_mask=mask,
            spatial_shapes=torch.tensor(shapes), level_start_index=torch.tensor([0, 96]),
        )  # fmt: skip
        module = checkpoints.attention_modules(source.state_dict(), num_heads=4, num_levels=2)[""]
        found = module(query, reference, value, shapes, mask) + query  # mmcv adds the identity
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
