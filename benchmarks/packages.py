"""Models of other packages, as PyPI has them, with random weights: as published against patched.

`python -m benchmarks.packages` writes benchmarks/results/packages.json, as benchmarks.models does for
transformers. The packages are those of .ci/packages.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import write_models
from saccade.bench import models
from saccade.integrations import extensions

ROOT = Path(__file__).resolve().parent.parent


class Whole(nn.Module):
    """A package's model behind the arguments and results of transformers' models."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], dict[str, Any]]):
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, pixel_values: Tensor) -> dict[str, Any]:
        return self._call(self.model, pixel_values)


class Package(NamedTuple):
    """A package's model, as `saccade.bench.models.measure` takes it."""

    package: str
    input: str
    size: tuple[int, int]
    make: Callable[[], nn.Module]

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        models.spread_queries(model, std=0.02)
        return model

    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 3, *self.size)}


def make_rfdetr() -> nn.Module:
    from rfdetr.config import RFDETRNanoConfig
    from rfdetr.models.lwdetr import build_model_from_config
    from rfdetr.utilities.tensors import NestedTensor

    def call(model: nn.Module, image: Tensor) -> dict[str, Any]:
        mask = torch.zeros(len(image), *image.shape[2:], dtype=torch.bool)
        outputs = model(NestedTensor(image, mask))
        return {name: outputs[name] for name in ("pred_logits", "pred_boxes")}

    return Whole(build_model_from_config(RFDETRNanoConfig(pretrain_weights=None)), call)


def make_mmdet(path: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
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

        def call(model: nn.Module, image: Tensor) -> dict[str, Any]:
            size = tuple(image.shape[2:])
            sample = DetDataSample()
            sample.set_metainfo({"img_shape": size, "batch_input_shape": size, "ori_shape": size})
            outputs = model(image, [sample], mode="tensor")
            return {str(index): tensor for index, tensor in enumerate(outputs)}

        return Whole(model, call)

    return make


PACKAGES = (
    Package(
        *("mmdet", "Deformable DETR, R50, 800 x 1333", (800, 1333)),
        make_mmdet("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"),
    ),
    Package(
        *("mmdet", "DINO, 4 levels, R50, 800 x 1333", (800, 1333)),
        make_mmdet("dino/dino-4scale_r50_8xb2-12e_coco.py"),
    ),
    Package("rfdetr", "RF-DETR Nano, 384 x 384", (384, 384), make_rfdetr),
)


def main() -> None:
    sys.path.append(str(ROOT / "tests"))
    import packages

    packages.add_to_path()
    packages.import_torchvision()
    write_models("packages", __doc__, [(package.package, package) for package in PACKAGES])


if __name__ == "__main__":
    main()
