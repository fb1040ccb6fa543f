"""Checkpoints with random weights, laid out as each package saves them."""

from __future__ import annotations

import argparse
import collections

import torch

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
