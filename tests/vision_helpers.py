"""Small detectors with random weights, and images, for the tests of `saccade.vision`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from saccade.vision.detector import Detection, ImageResult
from saccade.vision.sampling_record import Frame, Look

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_detector(**options: Any) -> PreTrainedModel:
    """A Deformable DETR of a few layers with random weights."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_feature_levels": 4,
        "num_queries": 20,
        "with_box_refine": True,
    }
    labels = {index: f"digit {index}" for index in range(10)}
    config = DeformableDetrConfig(backbone_config=backbone, id2label=labels, **{**sizes, **options})
    model = DeformableDetrForObjectDetection(config).eval()
    # The default initialisation makes all queries and classes alike.
    for name, parameter in model.named_parameters():
        if "query_position" in name or ("class_embed" in name and "weight" in name):
            torch.nn.init.normal_(parameter)
        elif "attention_weights.weight" in name or "model.reference_points.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_random_detector(folder: Path, shortest_edge: int = 64, **options: Any) -> Path:
    """`random_detector` as `save_pretrained` writes it."""
    from transformers import DeformableDetrImageProcessorPil

    random_detector(**options).save_pretrained(folder)
    size = {"shortest_edge": shortest_edge, "longest_edge": shortest_edge * 3 // 2}
    DeformableDetrImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def random_rt_detr() -> PreTrainedModel:
    """An RT-DETR with random weights: it has no pixel mask and another decoder."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=15,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=0,
    )
    return RTDetrForObjectDetection(config).eval()


def save_random_rt_detr(folder: Path) -> Path:
    """`random_rt_detr` as `save_pretrained` writes it."""
    from transformers import RTDetrImageProcessorPil

    random_rt_detr().save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def gradient_image(width: int, height: int) -> Image.Image:
    """An image whose red channel grows with x and whose green channel grows with y."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (red, green, Image.new("L", (width, height), 128)))


class FakeDetector:
    """A detector without a model: it finds one object in the middle of every image."""

    name, num_layers = "a fake", 1
    backend = SimpleNamespace(name="none")

    def check_recording(self) -> None:
        """Does nothing: positions are made up."""

    def detect(self, images: Any, threshold: float = 0.5, layer: Any = None) -> list[ImageResult]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Image.Image) -> ImageResult:
        width, height = image.size
        positions = torch.tensor([[[width / 2, height / 2], [0.0, 0.0]]], dtype=torch.float64)
        look = Look(positions, torch.tensor([[0.75, 0.25]]), (width / 2, height / 2))
        box = (0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height)
        frame = Frame(image.size, image.size, (0, 0, width, height))
        return ImageResult([Detection("middle", 0, 0.9, box, 3, look)], frame, 1, 1)
