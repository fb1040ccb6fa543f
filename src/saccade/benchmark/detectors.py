"""Whole transformers models with random weights, made here: no hub, no timm, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Sizes of the small versions, which the tests compare: every part is there, nothing takes long.
_NARROW: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
}
_LAST_THREE: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}


class Detector(NamedTuple):
    """A family of models: how one is made, and what it looks at."""

    name: str
    input: str
    size: tuple[int, int]
    """(height, width) of the picture."""
    small_size: tuple[int, int]
    make: Callable[[bool], nn.Module]
    """True: a small one."""
    text_tokens: int = 0
    task_tokens: int = 0

    def build(self, *, small: bool = False, seed: int = 0) -> nn.Module:
        """The model, ready to infer; its queries look at different places."""
        torch.manual_seed(seed)
        model = self.make(small).eval()
        for name, parameter in model.named_parameters():
            # Fresh models have zeros here: all queries would look at the same places.
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                nn.init.normal_(parameter, std=0.3 if small else 0.02)
            elif name.endswith(("value_proj.weight", "output_proj.weight")):
                nn.init.xavier_uniform_(parameter)
        _wake(model, self.inputs(small=small))
        return model

    def inputs(self, *, small: bool = False, seed: int = 0) -> dict[str, Tensor]:
        """A random picture, and a text where the model reads one."""
        random = torch.Generator().manual_seed(seed)
        height, width = self.small_size if small else self.size
        found = {"pixel_values": torch.randn(1, 3, height, width, generator=random)}
        if self.text_tokens:
            # [CLS] words . [SEP], in the numbers of BERT's vocabulary
            words = torch.randint(200, 900, (self.text_tokens - 3,), generator=random)
            tokens = torch.cat([torch.tensor([101]), words, torch.tensor([1012, 102])])[None]
            found |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.task_tokens:
            found["task_inputs"] = torch.randint(0, 900, (1, self.task_tokens), generator=random)
        return found


def _wake(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Keeps the signal of a fresh convolutional encoder from vanishing on its way to the attention.

    RT-DETR begins with tiny convolutions and batch norms that scale down; one picture gives the
    norms statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for norm in norms:
        norm.momentum = 1.0
        nn.init.ones_(norm.weight)
        norm.train()
    with torch.no_grad():
        model(**inputs)
    model.eval()


def _deformable_detr(small: bool) -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**(_NARROW | {"layer_type": "basic"} if small else {}), **_LAST_THREE)
    sizes = _small_transformer("encoder", "decoder") | {"num_queries": 20} if small else {}
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, **sizes))


def _grounding_dino(small: bool, name: str = "GroundingDino") -> nn.Module:
    import transformers
    from transformers import BertConfig, SwinConfig

    config_of = getattr(transformers, f"{name}Config")
    sizes: dict[str, Any] = {}
    text: dict[str, Any] = {}
    if small:
        sizes = _small_transformer("encoder", "decoder") | {"num_queries": 20}
        text = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 2000,
        }
    model: nn.Module = getattr(transformers, f"{name}ForObjectDetection")(
        config_of(
            backbone_config=SwinConfig(**_swin(small), **_LAST_THREE),
            text_config=BertConfig(**text),
            **sizes,
        )
    )
    return model


def _mm_grounding_dino(small: bool) -> nn.Module:
    return _grounding_dino(small, "MMGroundingDino")


def _mask2former(small: bool) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    sizes: dict[str, Any] = {}
    if small:
        sizes = {
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
    stages = {"out_features": ["stage1", *_LAST_THREE["out_features"]]}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=SwinConfig(**_swin(small) | stages), **sizes)
    )


def _rt_detr(small: bool) -> nn.Module:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        **(_NARROW | {"layer_type": "basic"} if small else {}), **_LAST_THREE
    )
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **_real_time(small)))


def _rt_detr_v2(small: bool) -> nn.Module:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        **(_NARROW | {"layer_type": "basic"} if small else {}), **_LAST_THREE
    )
    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=backbone, **_real_time(small)))


def _lw_detr(small: bool) -> nn.Module:
    from transformers import LwDetrConfig, LwDetrForObjectDetection

    sizes: dict[str, Any] = {"num_queries": 10, "group_detr": 2} if small else {}
    # LW-DETR S: one map, as large as the transformer's; its configuration has none by itself.
    return LwDetrForObjectDetection(LwDetrConfig(projector_scale_factors=[1.0], **sizes))


def _deimv2(small: bool) -> nn.Module:
    from transformers import Deimv2Config, Deimv2ForObjectDetection

    sizes: dict[str, Any] = {"num_queries": 15} if small else {}
    return Deimv2ForObjectDetection(Deimv2Config(num_denoising=0, **sizes))


def _oneformer(small: bool) -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    sizes: dict[str, Any] = {"is_training": False}
    if small:
        sizes |= {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 10}
    return OneFormerForUniversalSegmentation(OneFormerConfig(**sizes))


def _d_fine(small: bool) -> nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    narrow: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 32],
        "stem_channels": [3, 4, 8],
        "stage_in_channels": [8, 8, 16, 16],
        "stage_mid_channels": [4, 4, 8, 8],
        "stage_out_channels": [8, 16, 16, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    }
    # The points of D-FINE L, which its configuration calls by a list.
    return DFineForObjectDetection(
        DFineConfig(
            backbone_config=HGNetV2Config(**(narrow if small else {}) | _LAST_THREE),
            decoder_n_points=[3, 6, 3],
            **_real_time(small),
        )
    )


def _rf_detr(small: bool) -> nn.Module:
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    # RF-DETR L of 2025: a small DINOv2 with patches of 16, one map of 44 x 44, two points a head.
    backbone: dict[str, Any] = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 12,
        "image_size": 704,
        "patch_size": 16,
        "num_windows": 2,
        "out_indices": [3, 6, 9, 12],
    }
    sizes: dict[str, Any] = {"decoder_layers": 4, "decoder_n_points": 2}
    if small:
        backbone |= {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "image_size": 64,
            "out_indices": [2, 4],
        }
        sizes |= {
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_ffn_dim": 32,
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 4,
            "num_queries": 10,
            "group_detr": 2,
        }
    return RfDetrForObjectDetection(
        RfDetrConfig(backbone_config=RfDetrDinov2Config(**backbone), **sizes)
    )


def _swin(small: bool) -> dict[str, Any]:
    """Swin T, or a narrow one."""
    if small:
        return {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    return {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}


def _small_transformer(*parts: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {"d_model": 32}
    for part in parts:
        sizes |= {f"{part}_layers": 2, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 4}
    return sizes


def _real_time(small: bool) -> dict[str, Any]:
    """RT-DETR and D-FINE; without denoising queries, which only training has."""
    sizes: dict[str, Any] = {"num_denoising": 0}
    if small:
        sizes |= _small_transformer("decoder")
        sizes |= {
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [16, 16, 32],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "num_queries": 15,
            "decoder_in_channels": [32, 32, 32],
        }
    return sizes


DETECTORS = {
    detector.name: detector
    for detector in (
        Detector(
            "deformable-detr",
            "Deformable DETR, R50, 800 x 1333",
            (800, 1333),
            (96, 128),
            _deformable_detr,
        ),
        Detector(
            "grounding-dino",
            "Grounding DINO, Swin T, 800 x 1333, 16 tokens",
            (800, 1333),
            (96, 128),
            _grounding_dino,
            text_tokens=16,
        ),
        Detector(
            "mask2former", "Mask2Former, Swin T, 1024 x 1024", (1024, 1024), (64, 96), _mask2former
        ),
        Detector(
            "mm-grounding-dino",
            "MM Grounding DINO, Swin T, 800 x 1333, 16 tokens",
            (800, 1333),
            (96, 128),
            _mm_grounding_dino,
            text_tokens=16,
        ),
        Detector(
            "oneformer",
            "OneFormer, Swin T, 640 x 640",
            (640, 640),
            (64, 96),
            _oneformer,
            task_tokens=77,
        ),
        Detector("rt-detr", "RT-DETR, R50, 640 x 640", (640, 640), (96, 128), _rt_detr),
        Detector("rt-detr-v2", "RT-DETRv2, R50, 640 x 640", (640, 640), (96, 128), _rt_detr_v2),
        Detector("lw-detr", "LW-DETR S, 640 x 640", (640, 640), (64, 64), _lw_detr),
        Detector("deimv2", "DEIMv2, 640 x 640", (640, 640), (96, 128), _deimv2),
        Detector("d-fine", "D-FINE L, HGNetV2 B4, 640 x 640", (640, 640), (96, 128), _d_fine),
        Detector("rf-detr", "RF-DETR L, DINOv2 small, 704 x 704", (704, 704), (64, 64), _rf_detr),
    )
}
