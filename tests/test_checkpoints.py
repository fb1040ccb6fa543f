"""Checkpoints of other packages load into saccade's modules: every layout, strictly."""

from __future__ import annotations

import argparse

import helpers
import pytest
import torch
from checkpoint_helpers import (
    DECODER,
    EMBED_DIM,
    ENCODER,
    FORMATS,
    HEADS,
    POINTS,
    attention,
    check_same,
    layers,
    official,
    official_file,
    with_buffer,
)

import saccade
from benchmarks.small_models import SMALL_MODELS
from saccade.integrations import checkpoints


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


SEGMENTERS = {"mask2former", "oneformer"}
WITHOUT_PROJECTIONS = {"d-fine", "deimv2"}


FOLDERS = [
    (name, shards)
    for shards in (False, True)
    for name in SMALL_MODELS
    if name not in WITHOUT_PROJECTIONS
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shards"), helpers.some(FOLDERS, 6))
def test_transformers_folders(tmp_path, name, shards):
    pytest.importorskip("safetensors", reason="transformers writes with it")
    detector = SMALL_MODELS[name]
    model, inputs = detector.build(), detector.inputs()
    if name == "deformable-detr":
        inputs["pixel_mask"] = torch.ones(1, *inputs["pixel_values"].shape[2:], dtype=torch.long)
        inputs["pixel_mask"][:, 60:, 80:] = 0
    calls = attention_calls(model, inputs)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    checkpoint = checkpoints.load(tmp_path)
    # Their configurations do not say it.
    arguments = {"num_levels": 3} if name in SEGMENTERS else {}
    for modules in (
        checkpoints.attention_modules(checkpoint, **arguments),
        checkpoints.attention_modules(model.state_dict(), model.config, **arguments),
    ):
        # rf-detr's files have the authors' names, without "model" and with "transformer".
        by_name = {prefix.split(".", 1)[1]: module for prefix, module in modules.items()}
        assert by_name.keys() == {prefix.split(".", 1)[1] for prefix in calls}
        for prefix, (given, expected) in calls.items():
            found = attend(by_name[prefix.split(".", 1)[1]], given, keep=name not in SEGMENTERS)
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
        (
            {"decoder_n_levels": 4},
            r"attention_weights.weight: expected .*num_levels=4 \(decoder_n_l",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.attention_modules(source.state_dict(), settings | wrong)


def geometry(state_dict, config=None, **arguments):
    """Heads and points of the only module."""
    (module,) = checkpoints.attention_modules(state_dict, config, **arguments).values()
    return module.num_heads, module.num_points


def test_any_two_numbers_are_enough():
    weights = attention("decoder.cross_attn", [2] * 3, heads=8)
    for arguments in (
        {"num_heads": 8, "num_levels": 3},
        {"num_heads": 8, "num_points": 2},
        {"num_levels": 3, "num_points": 2},
        {"num_points": [2, 2, 2]},
        {"num_heads": 8, "num_levels": 3, "num_points": [2, 2, 2]},
    ):
        assert geometry(weights, **arguments) == (8, [2] * 3)
    # Arguments go before settings; those of the role before those of all.
    settings = {"decoder_attention_heads": 8, "encoder_attention_heads": 4, "nheads": 2}
    assert geometry(weights, settings, num_levels=3) == (8, [2] * 3)
    assert geometry(weights, settings, num_heads=16, num_levels=3) == (16, [1] * 3)
    assert geometry(weights, argparse.Namespace(**settings), num_points=[6]) == (8, [6])
    uneven = attention("cross_attn", [3, 6, 3])
    assert geometry(uneven, num_points=[3, 6, 3]) == (4, [3, 6, 3])
    half = {name: tensor.half() for name, tensor in with_buffer(uneven, [3, 6, 3]).items()}
    module = checkpoints.attention_modules(half)["cross_attn"]
    assert (module.num_points, module.value_proj.weight.dtype) == ([3, 6, 3], torch.float16)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_saccades_own_modules_come_back(spatial_dims):
    made = saccade.nn.MultiScaleDeformableAttention(32, 4, 2, [3, 1], spatial_dims=spatial_dims)
    for source in (made.state_dict(), torch.nn.ModuleDict({"a": made}).state_dict()):
        (module,) = checkpoints.attention_modules(source, num_points=[3, 1]).values()
        assert repr(module) == repr(made)
        assert all(map(torch.equal, module.parameters(), made.parameters()))
        assert all(parameter.requires_grad for parameter in module.parameters())
    mine = saccade.nn.MultiScaleDeformableAttention(32, 4, 2, [3, 1], spatial_dims=spatial_dims)
    mine.load_state_dict(checkpoints.state_dict_of(made.state_dict(), ""), strict=True)


WEIGHTS = attention("layer.attn", [4] * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"num_heads or num_levels or num_points: expected two .*'layer.attn' say only that "
             r"heads × levels × points = 64; got None"),
        ({"num_heads": 4}, r"num_levels or num_points: expected one .*and num_heads=4 \(argument\)"),
        ({"config": {"nheads": 4}}, r"expected one .*and num_heads=4 \(nheads\)"),
        ({"num_heads": 4, "num_levels": 5},
         r"layer.attn.attention_weights.weight: expected .*num_levels=5 \(argument\), got 64"),
        ({"num_heads": 4, "num_levels": 64}, "num_levels=64"),
        ({"num_heads": 4, "num_levels": 10**15}, r"num_levels=1000000000000000 \(argument\), got 64"),
        ({"num_heads": 4, "num_points": [4, 4]}, r"num_points=\[4, 4\] \(argument\), got 64"),
        ({"num_levels": 3, "num_points": [4] * 4}, "num_levels=3"),
        ({"config": {"nheads": 8, "num_feature_levels": 4}, "num_points": 4},
         r"num_heads=8 \(nheads\), num_levels=4 \(num_feature_levels\), num_points=4 \(argument\)"),
        ({"num_heads": 64, "num_levels": 1}, "layer.attn: num_heads: expected a divisor of embed_dim"),
        ({"num_heads": 0, "num_levels": 1}, "num_heads: expected at least 1, got 0"),
        ({"config": {"nheads": -1}}, "nheads: expected at least 1, got -1"),
        ({"prefix": "encoder"}, r"prefix: expected the beginning of one of \['layer.attn'\], got 'enc"),
        ({"num_heads": 4, "num_levels": 4, "padding": "mirror"}, "padding: expected one of"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_or_are_not_there(arguments, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.attention_modules(WEIGHTS, **arguments)


def test_numbers_of_the_wrong_kind():
    with pytest.raises(TypeError, match="num_heads: expected an int, got 'eight'"):
        checkpoints.attention_modules(WEIGHTS, num_heads="eight")
    with pytest.raises(TypeError, match="config: expected a mapping, .* got int"):
        checkpoints.attention_modules(WEIGHTS, 8)
    with pytest.raises(ValueError, match="source: expected entries that end in .*, got 1 others"):
        checkpoints.attention_modules({"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"prefix: expected one of \['layer.attn'\], got 'layer'"):
        checkpoints.state_dict_of(WEIGHTS, "layer")
    for scale in ([0.5, 0.25], [0.5], [0.0], [], [float("nan")], [1e-9]):
        weights = WEIGHTS | {"layer.attn.n_points_scale": torch.tensor(scale)}
        with pytest.raises(ValueError, match="points_scale: expected 1 / K for each of the K"):
            checkpoints.attention_modules(weights)


def test_the_embedding_of_levels_is_mentioned_and_not_believed():
    # BEVFormer's decoder has one level, and four rows here, which are those of its encoder's cameras.
    weights = layers("", DECODER, "self.{}", {"decoder": [4]}, count=1)
    weights["transformer.level_embeds"] = torch.zeros(4, EMBED_DIM)
    with pytest.raises(
        ValueError, match=r"\(transformer.level_embeds has 4 rows, perhaps one per lev"
    ):
        checkpoints.attention_modules(weights, num_heads=4)
    assert geometry(weights, num_heads=4, num_levels=1) == (4, [4])


def without(*layers):
    return {name: tensor for name, tensor in WEIGHTS.items() if name.split(".")[2] not in layers}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without("value_proj", "output_proj"),
         r"layer.attn: expected .* got none for value_proj.weight, .*as in D-FINE.* saccade.patch"),
        (without("output_proj"), "BEVFormer's .*MultiViewDeformableAttention"),
        (without("attention_weights"), "got none for attention_weights.weight, attention_weights.bias$"),
        (attention("layer.attn", [4] * 4, value_dim=16),
         r"layer.attn.value_proj.weight: expected floating point \[32, 32\], .*got torch.float32 "
         r"\[16, 32\]\. .*value_proj_ratio=1 in mmcv"),
        (WEIGHTS | {"layer.attn.norm.weight": torch.zeros(32)}, "got norm.weight too"),
        (WEIGHTS | {"layer.attn.sampling_offsets.bias": torch.zeros(7)},
         r"sampling_offsets.bias: expected floating point \[128\]"),
        (WEIGHTS | {"layer.attn.output_proj.bias": torch.zeros(32, dtype=torch.int8)}, "got torch.int8"),
        (WEIGHTS | {"layer.attn.attention_weights.bias": torch.zeros(())}, "expected floating point"),
        (WEIGHTS | {"layer.attn.sampling_offsets.weight": torch.zeros(())}, "expected floating point"),
    ],
)  # fmt: skip
def test_entries_that_do_not_fit(weights, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.attention_modules(weights, num_heads=4, num_levels=4)
    assert checkpoints.attention_prefixes(weights) == ["layer.attn"]


def test_d_fine_of_transformers_is_refused_with_the_reason():
    model = SMALL_MODELS["d-fine"].build()
    with pytest.raises(ValueError, match="its value comes projected, as in D-FINE"):
        checkpoints.attention_modules(model.state_dict(), model.config)
