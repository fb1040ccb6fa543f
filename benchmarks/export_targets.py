"""What benchmarks/export_matrix.py and the tests export: the operators, the modules, whole models.

The small modules are written by the recipe of docs/export.md: the sizes are those of the maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import saccade
from benchmarks.small_models import SMALL_MODELS
from saccade.bench.models import Model
from saccade.integrations.exporter_logging import silence_exporters
from saccade.integrations.tracing import symbolic_sizes

CHANNELS, HEADS = 32, 4
Tensors = tuple[Tensor, ...]

DYNAMIC = torch.export.Dim.DYNAMIC
QUERIES = {0: DYNAMIC, 1: DYNAMIC}
CHANNELS_FIRST = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
CHANNELS_LAST = {0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC}


class Target(NamedTuple):
    """Something to export."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int, int], Tensors]
    """For (batch, queries, height, width)."""
    dynamic: Any
    """The dynamic axes of each input."""
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((8, 12), (16, 20))
    """(height, width) that it is exported with, and another."""
    whole: bool = False
    """A model of transformers: slow to export, sums of many layers."""
    strict: bool = False

    @property
    def tolerance(self) -> dict[str, float]:
        """How far from eager what was exported may be."""
        return {"rtol": 1e-3, "atol": 1e-3} if self.whole else {"rtol": 0, "atol": 1e-4}

    def export(self, module: nn.Module, inputs: Tensors) -> torch.export.ExportedProgram:
        """The module as a program, its dynamic axes dynamic."""
        with torch.no_grad(), symbolic_sizes(), silence_exporters():
            return torch.export.export(
                module, inputs, dynamic_shapes=self.dynamic, strict=self.strict
            )


class Operator(nn.Module):
    """The operator alone, on one map [B, H, W, M, D]."""

    def forward(self, feature_map: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """The sampled sums."""
        shapes = [feature_map.shape[1:3]]
        return saccade.deformable_attention(feature_map.flatten(1, 2), shapes, locations, weights)


class FusedOperator(nn.Module):
    """The fused operator alone, on one map [B, H, W, M, D]."""

    def forward(
        self, feature_map: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        """The sampled sums."""
        return saccade.fused_deformable_attention(
            feature_map.flatten(1, 2), [feature_map.shape[1:3]], reference_points, offsets, logits
        )


class Levels(nn.Module):
    """Feature maps [B, C, H, W] to the module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4)

    def forward(
        self, query: Tensor, reference_points: Tensor, fine: Tensor, coarse: Tensor
    ) -> Tensor:
        """What the module gives for both maps."""
        shapes = [feature_map.shape[2:] for feature_map in (fine, coarse)]
        value = torch.cat([each.flatten(2).transpose(1, 2) for each in (fine, coarse)], 1)
        output: Tensor = self.attention(query, reference_points, value, shapes)
        return output


class Detector(nn.Module):
    """A patched model of transformers: one tensor in, those of its outputs that are numbers out."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.build()
        saccade.patch(self.model)

    def forward(self, pixel_values: Tensor) -> Tensors:
        """Logits and boxes, or logits and masks."""
        outputs = self.model(pixel_values=pixel_values)
        names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
        return tuple(outputs[name] for name in names if name in outputs)


def _operator(batch: int, queries: int, height: int, width: int) -> Tensors:
    return (
        torch.randn(batch, height, width, HEADS, 8),
        torch.rand(batch, queries, HEADS, 1, 4, 2),
        torch.rand(batch, queries, HEADS, 1, 4),
    )


def _fused(batch: int, queries: int, height: int, width: int) -> Tensors:
    feature_map, offsets, logits = _operator(batch, queries, height, width)
    return feature_map, torch.rand(batch, queries, 1, 2), offsets, logits


def _levels(batch: int, queries: int, height: int, width: int) -> Tensors:
    return (
        torch.randn(batch, queries, CHANNELS),
        torch.rand(batch, queries, 1, 2),
        torch.randn(batch, CHANNELS, height, width),
        torch.randn(batch, CHANNELS, height // 2, width // 2),
    )


def _map(batch: int, queries: int, height: int, width: int) -> Tensors:
    return torch.randn(batch, queries, CHANNELS), torch.randn(batch, height, width, CHANNELS)


def _pixels(batch: int, queries: int, height: int, width: int) -> Tensors:
    return (torch.randn(batch, 3, height, width),)


def _patched(name: str, *, strict: bool = False) -> Target:
    return Target(
        lambda: Detector(SMALL_MODELS[name]),
        _pixels,
        (CHANNELS_FIRST,),
        sizes=((96, 128), (128, 160)),
        whole=True,
        strict=strict,
    )


def _mask2former_resnet() -> nn.Module:
    """The same model on a backbone without windows."""
    model = SMALL_MODELS["mask2former"]
    resnet = SMALL_MODELS["deformable-detr"].config["backbone_config"]
    resnet = resnet | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    return Detector(model._replace(config=model.config | {"backbone_config": resnet}))


TARGETS: dict[str, Target] = {
    "op": Target(Operator, _operator, (CHANNELS_LAST, QUERIES, QUERIES)),
    "fused op": Target(FusedOperator, _fused, (CHANNELS_LAST, QUERIES, QUERIES, QUERIES)),
    "nn.MultiScaleDeformableAttention": Target(
        Levels, _levels, (QUERIES, QUERIES, CHANNELS_FIRST, CHANNELS_FIRST)
    ),
    "nn.DeformableAttention": Target(
        lambda: saccade.nn.DeformableAttention(CHANNELS, HEADS, 4),
        _map,
        {"query": QUERIES, "feature_map": CHANNELS_LAST},
    ),
    "patched Deformable DETR": _patched("deformable-detr"),
    # It takes `len` of a tensor for the batch, which only a strict export follows.
    "patched RT-DETRv2": _patched("rt-detr-v2", strict=True),
    "patched Mask2Former, ResNet": _patched("mask2former")._replace(make=_mask2former_resnet),
    "patched Mask2Former, Swin": _patched("mask2former"),
}
