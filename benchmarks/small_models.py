"""All families of models, and small ones of each: every part is there, and nothing takes long.

Tests and the export study use the small ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.bench.models import MODELS, NO_DENOISING, SWIN_T, Model, backbone


class TextModel(Model):
    """A model that reads a text too, or its task."""

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        inputs = super().inputs(seed)
        if "text_config" not in self.config:
            return inputs | {"task_inputs": torch.randint(200, 900, (1, 77), generator=random)}
        tokens = torch.randint(200, 900, (1, 16), generator=random)
        # [CLS] words . [SEP], in the numbers of BERT's vocabulary
        tokens[0, [0, -2, -1]] = torch.tensor([101, 1012, 102])
        return inputs | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


_GROUNDING = backbone("swin", 3, **SWIN_T) | {"text_config": {"model_type": "bert"}}
# fmt: off
ALL_MODELS: dict[str, Model] = MODELS | {
    "grounding-dino": TextModel(
        "Grounding DINO, Swin T, 800 x 1333, 16 tokens", "GroundingDinoForObjectDetection",
        (800, 1333), _GROUNDING),
    "mm-grounding-dino": TextModel(
        "MM Grounding DINO, Swin T, 800 x 1333, 16 tokens", "MMGroundingDinoForObjectDetection",
        (800, 1333), _GROUNDING),
    "oneformer": TextModel("OneFormer, Swin T, 640 x 640", "OneFormerForUniversalSegmentation",
                           (640, 640), {"is_training": False}),
    "rt-detr": Model("RT-DETR, R50, 640 x 640", "RTDetrForObjectDetection",
                     (640, 640), backbone("rt_detr_resnet", 3) | NO_DENOISING),
    # LW-DETR has one map; its default configuration has no factors.
    "lw-detr": Model("LW-DETR S, 640 x 640", "LwDetrForObjectDetection",
                     (640, 640), {"projector_scale_factors": [1.0]}),
    "deimv2": Model("DEIMv2, 640 x 640", "Deimv2ForObjectDetection", (640, 640), NO_DENOISING),
}
# fmt: on
_NARROW: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
}
_RESNET = _NARROW | {"layer_type": "basic"}
_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
_HGNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "stem_channels": [3, 4, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [4, 4, 8, 8],
    "stage_out_channels": [8, 16, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 2000,
}


def _transformer(*parts: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {"d_model": 32}
    for part in parts:
        sizes |= {f"{part}_layers": 2, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 4}
    return sizes


_BOTH = _transformer("encoder", "decoder") | {"num_queries": 20}
_REAL_TIME = _transformer("decoder") | {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 32],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "num_queries": 15,
    "decoder_in_channels": [32, 32, 32],
}
_MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_queries": 10,
}
_DINOV2 = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "image_size": 64,
    "out_indices": [2, 4],
}
_RF_DETR = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 4,
    "num_queries": 10,
    "group_detr": 2,
}
# The size of the image, the backbone's sizes, and the rest's.
_SIZES: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    "deformable-detr": ((96, 128), _RESNET, _BOTH),
    "grounding-dino": ((96, 128), _SWIN, _BOTH),
    "mask2former": ((64, 96), _SWIN, _MASK2FORMER),
    "mm-grounding-dino": ((96, 128), _SWIN, _BOTH),
    "oneformer": ((64, 96), {}, {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 10}),
    "rt-detr": ((96, 128), _RESNET, _REAL_TIME),
    "rt-detr-v2": ((96, 128), _RESNET, _REAL_TIME),
    "lw-detr": ((64, 64), {}, {"num_queries": 10, "group_detr": 2}),
    "deimv2": ((96, 128), {}, {"num_queries": 15}),
    "d-fine": ((96, 128), _HGNET, _REAL_TIME),
    "rf-detr": ((64, 64), _DINOV2, _RF_DETR),
}


def _make_small(name: str, model: Model) -> Model:
    size, backbone_sizes, sizes = _SIZES[name]
    config = model.config | sizes
    for part, part_sizes in (("backbone_config", backbone_sizes), ("text_config", _TEXT)):
        if part in config:
            config[part] = config[part] | part_sizes
    return model._replace(size=size, config=config, std=0.3)


SMALL_MODELS = {name: _make_small(name, ALL_MODELS[name]) for name in _SIZES}
