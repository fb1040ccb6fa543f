"""The embedded detector: a small Deformable DETR, how it starts, and how it is saved.

The model is transformers' own class, unchanged. Trained from scratch, that class needs three
corrections, which `new_model` makes: its backbone is frozen, its batch norms never learn, and its
initialisation is not the paper's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessorPil,
    ResNetConfig,
)
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrFrozenBatchNorm2d,
)

LABELS = {digit: str(digit) for digit in range(10)}


def new_config() -> DeformableDetrConfig:
    """Returns the configuration of the embedded detector: about 1.2 million parameters."""
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return DeformableDetrConfig(
        backbone_config=backbone,
        d_model=64,  # the group norm of the input projections asks for a multiple of 32
        encoder_layers=2,
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_layers=6,
        decoder_ffn_dim=256,
        decoder_attention_heads=4,
        num_queries=30,
        num_feature_levels=4,
        with_box_refine=True,
        auxiliary_loss=True,
        dropout=0.0,
        class_cost=2,
        id2label=LABELS,
        label2id={label: digit for digit, label in LABELS.items()},
    )


def new_model(config: DeformableDetrConfig | None = None) -> DeformableDetrForObjectDetection:
    """Returns an untrained model that is ready to learn from scratch."""
    model = DeformableDetrForObjectDetection(config or new_config())
    # transformers freezes every layer of a ResNet backbone: the names that it exempts do not occur.
    model.requires_grad_(True)
    _thaw_batch_norm(model)
    _initialise_as_in_the_paper(model)
    return model


def _thaw_batch_norm(module: nn.Module) -> None:
    """Replaces the frozen batch norms, which suit a pretrained backbone, by ones that learn."""
    for name, child in module.named_children():
        if isinstance(child, DeformableDetrFrozenBatchNorm2d):
            module.register_module(name, nn.BatchNorm2d(child.weight.numel()))
        else:
            _thaw_batch_norm(child)


@torch.no_grad()
def _initialise_as_in_the_paper(model: DeformableDetrForObjectDetection) -> None:
    """Initialises as the authors' code does; from transformers' values, training barely starts."""
    core = model.model
    for part in (core.encoder.layers, core.decoder.layers, core.input_proj):
        for name, parameter in part.named_parameters():
            # The attention's own directional initialisation is right already.
            if parameter.dim() > 1 and not name.endswith(
                ("sampling_offsets.weight", "attention_weights.weight")
            ):
                nn.init.xavier_uniform_(parameter)
    nn.init.normal_(core.query_position_embeddings.weight)
    for head in model.class_embed:
        head.reset_parameters()
        nn.init.constant_(
            head.bias, -math.log(99.0)
        )  # every class starts at 1 %: focal loss needs it
    for head in model.bbox_embed:  # the decoder's own list holds the same modules' parameters
        for layer in head.layers:
            layer.reset_parameters()
        nn.init.zeros_(head.layers[-1].weight)
        nn.init.zeros_(head.layers[-1].bias)
    model.bbox_embed[0].layers[-1].bias[2:] = -2.0  # boxes start at 12 % of the image


def new_image_processor() -> DeformableDetrImageProcessorPil:
    """Returns the image processor that ships with the model.

    A scene keeps its 160 x 160 pixels. Any other image keeps its shape and is scaled to a shorter
    side of 160 or, when it is longer than 3:2, to a longer side of 240: the shapes trained on.
    """
    return DeformableDetrImageProcessorPil(size={"shortest_edge": 160, "longest_edge": 240})


def save_model(state: dict[str, torch.Tensor], config: DeformableDetrConfig, folder: Path) -> None:
    """Saves trained weights, configuration and image processor as a plain transformers folder.

    Half precision halves the file and costs no accuracy; `config.json` says float32, so that the
    weights are widened again when they are loaded.
    """
    stock = DeformableDetrForObjectDetection(config)
    # The stock model's frozen batch norms hold the same statistics, but do not count batches.
    trained = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    stock.load_state_dict(trained)
    stock.half().save_pretrained(folder)
    config.dtype = torch.float32
    config.architectures = [type(stock).__name__]
    config.save_pretrained(folder)
    new_image_processor().save_pretrained(folder)
