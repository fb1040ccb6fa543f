"""Whole transformers models with random weights, eager against patched. Nothing is downloaded."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import saccade
from saccade.bench.operator import Row, describe_error
from saccade.timing import alternate

TOLERANCE = 1e-3
MAX_SHARE_MOVED = 0.05  # two proposals of nearly the same score may change places
METHOD = (
    "random weights, one forward per turn, eager and patched taking turns in one process, medians; the outputs "
    f"agree within {TOLERANCE} of the largest element in at least {1 - MAX_SHARE_MOVED:.0%} of the elements"
)


class Model(NamedTuple):
    """A model of transformers: its class, and what differs from the defaults of its configuration."""

    input: str
    """The model and its image, for a reader."""
    class_name: str
    size: tuple[int, int]
    """(height, width) of the image."""
    config: dict[str, Any]
    std: float = 0.02
    """The standard deviation of the layers that predict offsets and weights."""

    def build(self, seed: int = 0) -> nn.Module:
        """The model, ready to infer; its queries look at different positions."""
        torch.manual_seed(seed)
        model_class = getattr(importlib.import_module("transformers"), self.class_name)
        # The classes of configurations take entries out of their dictionaries.
        config = model_class.config_class(**copy.deepcopy(self.config))
        model: nn.Module = model_class(config).eval()
        spread_queries(model, self.std)
        _calibrate(model, self.inputs())
        return model

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """A random image."""
        random = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(1, 3, *self.size, generator=random)}


def spread_queries(model: nn.Module, std: float) -> None:
    """Fresh models have zeros here, with which all queries look at the same positions."""
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=std)
        elif name.endswith(("value_proj.weight", "output_proj.weight")):
            nn.init.xavier_uniform_(parameter)


def _calibrate(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Gives batch norms the statistics of one image: fresh convolutions would make the signal vanish."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.ones_(module.weight)
            module.train()
    with torch.no_grad():
        model(**inputs)
    model.eval()


def backbone(model_type: str, num_stages: int, **sizes: Any) -> dict[str, Any]:
    """The configuration of a backbone that gives the maps of its last stages."""
    stages = [f"stage{index}" for index in range(5 - num_stages, 5)]
    return {"backbone_config": {"model_type": model_type, "out_features": stages, **sizes}}


SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
NO_DENOISING = {"num_denoising": 0}  # only training has such queries
_DINOV2_S = {
    **{"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "image_size": 704},
    **{"patch_size": 16, "num_windows": 2, "out_indices": [3, 6, 9, 12]},
}
_RF_DETR = {"backbone_config": {"model_type": "rf_detr_dinov2", **_DINOV2_S}, "decoder_layers": 4}
# fmt: off
MODELS = {
    "deformable-detr": Model("Deformable DETR, R50, 800 x 1333", "DeformableDetrForObjectDetection",
                             (800, 1333), backbone("resnet", 3)),
    "mask2former": Model("Mask2Former, Swin T, 1024 x 1024", "Mask2FormerForUniversalSegmentation",
                         (1024, 1024), backbone("swin", 4, **SWIN_T)),
    "rt-detr-v2": Model("RT-DETRv2, R50, 640 x 640", "RTDetrV2ForObjectDetection",
                        (640, 640), backbone("rt_detr_resnet", 3) | NO_DENOISING),
    "d-fine": Model("D-FINE L, HGNetV2 B4, 640 x 640", "DFineForObjectDetection", (640, 640),
                    backbone("hgnet_v2", 3) | NO_DENOISING | {"decoder_n_points": [3, 6, 3]}),
    "rf-detr": Model("RF-DETR L, DINOv2 small, 704 x 704", "RfDetrForObjectDetection",
                     (704, 704), _RF_DETR | {"decoder_n_points": 2}),
}
# fmt: on


def measure_all(models: Iterable[tuple[str, Any]], seconds: float) -> dict[str, Any]:
    """Times models, of transformers or whatever else has `input`, `build()` and `inputs()`."""
    rows = [measure(name, model, seconds) for name, model in models]
    return {"method": METHOD, "threads": torch.get_num_threads(), "models": rows}


def measure(name: str, model: Any, seconds: float) -> Row:
    """The times of one model in milliseconds, or the reason why there are none."""
    row: Row = {"model": name, "input": model.input}
    try:
        eager, inputs = model.build(), model.inputs()
        patched = copy.deepcopy(eager)
        replaced = saccade.patch(patched).replaced
    except Exception as error:  # versions of transformers differ in what they have and need
        return row | {"reason": describe_error(error)}

    def run(module: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            outputs = module(**inputs)
        return [tensor for tensor in outputs.values() if isinstance(tensor, Tensor)]

    expected = run(eager)
    if any(bool(output.isnan().any()) for output in expected):
        return row | {"reason": "the model gives scores that are not numbers, without Saccade too"}
    share, difference = compare_outputs(run(patched), expected)
    if share > MAX_SHARE_MOVED:
        reason = f"wrong results: {share:.0%} of an output differ, by up to {difference:.2g}"
        return row | {"reason": reason, "is_wrong": True}
    runs = {"eager": partial(run, eager), "patched": partial(run, patched)}
    timings = alternate(runs, seconds, turn_seconds=0)
    eager_ms, patched_ms = (timings[key].milliseconds for key in runs)
    return row | {
        "ratio": float(f"{eager_ms / patched_ms:.3g}"),
        "eager_ms": eager_ms,
        "patched_ms": patched_ms,
        "attention_modules": len(replaced),
        "largest_difference": float(f"{difference:.2g}"),
        "rounds": timings["eager"].rounds,
    }


def compare_outputs(outputs: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """The largest share of an output that differs, and the largest difference, relative to its largest element."""
    worst = (0.0, 0.0)
    for output, truth in zip(outputs, expected, strict=True):
        if truth.is_floating_point() and truth.numel():
            # Grounding DINO's logits of absent words are -inf, in both.
            errors = (output - truth).abs().masked_fill(output == truth, 0)
            errors = errors.nan_to_num(nan=torch.inf)
            errors = errors / truth.abs().nan_to_num(0, 0).max().clamp_min(1e-12)
            share = (~(errors <= TOLERANCE)).double().mean()  # a NaN is wrong
            worst = max(worst[0], float(share)), max(worst[1], float(errors.max()))
    return worst
