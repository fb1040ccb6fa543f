"""Models of other packages, as PyPI has them, with random weights: as published against patched.

`python -m benchmarks.packages` writes benchmarks/results/packages.json, as `saccade bench models` does for
transformers. The packages are those of .ci/packages.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from saccade.benchmark import models
from saccade.benchmark.detectors import Detector
from saccade.integrations import extensions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "packages.json"


class Whole(nn.Module):
    """A package's model behind the arguments and results of transformers' models."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], dict[str, Any]]):
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, pixel_values: Tensor) -> dict[str, Any]:
        return self._call(self.model, pixel_values)


def rfdetr(small: bool) -> nn.Module:
    from rfdetr.config import RFDETRNanoConfig
    from rfdetr.models.lwdetr import build_model_from_config
    from rfdetr.utilities.tensors import NestedTensor

    def call(model: nn.Module, picture: Tensor) -> dict[str, Any]:
        mask = torch.zeros(len(picture), *picture.shape[2:], dtype=torch.bool)
        found = model(NestedTensor(picture, mask))
        return {name: found[name] for name in ("pred_logits", "pred_boxes")}

    return Whole(build_model_from_config(RFDETRNanoConfig(pretrain_weights=None)), call)


def of_mmdet(path: str) -> Callable[[bool], nn.Module]:
    def make(small: bool) -> nn.Module:
        extensions.install("mmcv._ext")
        import mmdet
        from mmdet.registry import MODELS
        from mmdet.structures import DetDataSample
        from mmdet.utils import register_all_modules
        from mmengine.config import Config

        register_all_modules()
        config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / path)
        config.model.backbone.init_cfg = None
        model = MODELS.build(config.model)
        nn.init.normal_(model.level_embed)  # mmdet leaves it as the memory was

        def call(model: nn.Module, picture: Tensor) -> dict[str, Any]:
            size = tuple(picture.shape[2:])
            sample = DetDataSample()
            sample.set_metainfo({"img_shape": size, "batch_input_shape": size, "ori_shape": size})
            found = model(picture, [sample], mode="tensor")
            return {str(place): tensor for place, tensor in enumerate(found)}

        return Whole(model, call)

    return make


DETECTORS = (
    Detector(
        "mmdet",
        "Deformable DETR, R50, 800 x 1333",
        (800, 1333),
        (192, 256),
        of_mmdet("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"),
    ),
    Detector(
        "mmdet",
        "DINO, 4 levels, R50, 800 x 1333",
        (800, 1333),
        (192, 256),
        of_mmdet("dino/dino-4scale_r50_8xb2-12e_coco.py"),
    ),
    Detector("rfdetr", "RF-DETR Nano, 384 x 384", (384, 384), (384, 384), rfdetr),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packages", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of taking turns, for each model")
    parser.add_argument("--small", action="store_true", help="small pictures, nothing is written")
    chosen = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))
    import packages

    packages.add_to_path()
    packages.import_torchvision()
    figures = [models.measure(found, chosen.seconds, small=chosen.small) for found in DETECTORS]
    Console().print(models.table(figures))
    if not chosen.small:
        models.write("python -m benchmarks.packages", figures, RESULTS)


if __name__ == "__main__":
    main()
