"""Whole transformers models, eager against patched: how long a forward takes, and how much is attention.

The models have random weights and are made here: nothing is downloaded.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import saccade
from saccade.bench.operator import describe_error
from saccade.bench.report import times
from saccade.timing import alternate

# Patched and eager outputs may differ by rounding; and where a model takes the best of its proposals,
# two of nearly the same score may change places, which moves a row or two.
TOLERANCE = 1e-3
MAX_SHARE_MOVED = 0.05
METHOD = (
    "random weights, one forward per turn, eager and patched taking turns in one process, medians; shares "
    "are of the attention modules with their projections; the outputs agree within "
    f"{TOLERANCE} of the largest element in at least {1 - MAX_SHARE_MOVED:.0%} of the elements"
)


class Model(NamedTuple):
    """A family of models: the classes of transformers, and the sizes that differ from their defaults."""

    name: str
    family: str
    """The beginning of the names of its classes."""
    input: str
    size: tuple[int, int]
    """(height, width) of the image."""
    backbone: tuple[str, dict[str, Any]] | None = None
    """The backbone's configuration, where the family's default has none."""
    config: dict[str, Any] = {}  # noqa: RUF012
    text: dict[str, Any] | None = None
    """The configuration of BERT, where the model reads a text."""
    task: str = "ObjectDetection"
    tokens: dict[str, int] = {}  # noqa: RUF012
    """The number of tokens of each text that the model reads."""
    std: float = 0.02
    """The standard deviation of the layers that predict offsets and weights."""

    def build(self, seed: int = 0) -> nn.Module:
        """The model, ready to infer; its queries look at different positions."""
        transformers = importlib.import_module("transformers")
        torch.manual_seed(seed)
        config = dict(self.config)
        if self.backbone is not None:
            kind, sizes = self.backbone
            config["backbone_config"] = _config_class(kind)(**sizes)
        if self.text is not None:
            config["text_config"] = transformers.BertConfig(**self.text)
        make = getattr(transformers, f"{self.family}For{self.task}")
        model: nn.Module = make(_config_class(self.family)(**config)).eval()
        for name, parameter in model.named_parameters():
            # Fresh models have zeros here: all queries would look at the same positions.
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                nn.init.normal_(parameter, std=self.std)
            elif name.endswith(("value_proj.weight", "output_proj.weight")):
                nn.init.xavier_uniform_(parameter)
        _calibrate(model, self.inputs())
        return model

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """A random image, and the texts that the model reads."""
        random = torch.Generator().manual_seed(seed)
        inputs = {"pixel_values": torch.randn(1, 3, *self.size, generator=random)}
        for name, count in self.tokens.items():
            inputs[name] = torch.randint(200, 900, (1, count), generator=random)
            if name == "input_ids":
                # [CLS] words . [SEP], in the numbers of BERT's vocabulary
                inputs[name][0, [0, -2, -1]] = torch.tensor([101, 1012, 102])
                inputs["attention_mask"] = torch.ones_like(inputs[name])
        return inputs


def _config_class(name: str) -> Any:
    if name == "RfDetrDinov2":  # transformers does not export it
        module = "transformers.models.rf_detr.configuration_rf_detr"
        return importlib.import_module(module).RfDetrDinov2Config
    return getattr(importlib.import_module("transformers"), f"{name}Config")


def _calibrate(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Gives batch norms the statistics of one image, so that the signal of fresh convolutions does not
    vanish on its way to the attention.
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


_THREE: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
_FOUR: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
_DINOV2_S = {
    **{"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "image_size": 704},
    **{"patch_size": 16, "num_windows": 2, "out_indices": [3, 6, 9, 12]},
}
_LARGE, _SQUARE = (800, 1333), (640, 640)
_NO_DENOISING = {"num_denoising": 0}  # only training has such queries
_GROUNDING: dict[str, Any] = {
    **{"size": _LARGE, "backbone": ("Swin", _SWIN_T | _THREE), "text": {}},
    **{"input": "Swin T, 800 x 1333, 16 tokens", "tokens": {"input_ids": 16}},
}
MODELS = {
    model.name: model._replace(input=f"{title}, {model.input}")
    for title, model in {
        "Deformable DETR": Model(
            "deformable-detr", "DeformableDetr", "R50, 800 x 1333", _LARGE, ("ResNet", _THREE)
        ),
        "Grounding DINO": Model("grounding-dino", "GroundingDino", **_GROUNDING),
        "Mask2Former": Model(
            *("mask2former", "Mask2Former", "Swin T, 1024 x 1024", (1024, 1024)),
            backbone=("Swin", _SWIN_T | _FOUR),
            task="UniversalSegmentation",
        ),
        "MM Grounding DINO": Model("mm-grounding-dino", "MMGroundingDino", **_GROUNDING),
        "OneFormer": Model(
            *("oneformer", "OneFormer", "Swin T, 640 x 640", _SQUARE),
            config={"is_training": False},
            task="UniversalSegmentation",
            tokens={"task_inputs": 77},
        ),
        "RT-DETR": Model(
            *("rt-detr", "RTDetr", "R50, 640 x 640", _SQUARE),
            *(("RTDetrResNet", _THREE), _NO_DENOISING),
        ),
        "RT-DETRv2": Model(
            *("rt-detr-v2", "RTDetrV2", "R50, 640 x 640", _SQUARE),
            *(("RTDetrResNet", _THREE), _NO_DENOISING),
        ),
        # LW-DETR has one map; its default configuration has no factors.
        "LW-DETR S": Model(
            *("lw-detr", "LwDetr", "640 x 640", _SQUARE), config={"projector_scale_factors": [1.0]}
        ),
        "DEIMv2": Model("deimv2", "Deimv2", "640 x 640", _SQUARE, config=_NO_DENOISING),
        "D-FINE L": Model(
            *("d-fine", "DFine", "HGNetV2 B4, 640 x 640", _SQUARE, ("HGNetV2", _THREE)),
            config=_NO_DENOISING | {"decoder_n_points": [3, 6, 3]},
        ),
        "RF-DETR L": Model(
            *("rf-detr", "RfDetr", "DINOv2 small, 704 x 704", (704, 704)),
            backbone=("RfDetrDinov2", _DINOV2_S),
            config={"decoder_layers": 4, "decoder_n_points": 2},
        ),
    }.items()
}


class ModelMeasurement(NamedTuple):
    """One model: times in milliseconds; a share is the part of a forward spent in attention modules."""

    model: str
    input: str
    ratio: float | None = None
    eager_ms: float | None = None
    patched_ms: float | None = None
    eager_share: float | None = None
    patched_share: float | None = None
    attention_modules: int = 0
    largest_difference: float | None = None
    """Between the outputs, relative to the largest element."""
    rounds: int = 0
    reason: str = ""
    """Why nothing was measured."""


def measure(model: Any, seconds: float) -> ModelMeasurement:
    """Times one model, of transformers or of whatever else has `name`, `input`, `build()` and `inputs()`.

    Raises:
        ArithmeticError: the patched model gives other outputs.
    """
    try:
        module, inputs = model.build(), model.inputs()
        replaced = saccade.patch(module).replaced
        saccade.unpatch(module)
    except Exception as error:  # versions of transformers differ in what they have and need
        return ModelMeasurement(model.name, model.input, reason=describe_error(error))
    spent = [0.0]
    hooks = _time_attention(module, replaced, spent)
    shares: dict[str, list[float]] = {"eager": [], "patched": []}

    def run(name: str) -> list[Tensor]:
        spent[0], begin = 0.0, time.perf_counter()
        with torch.no_grad():
            outputs = module(**inputs)
        shares[name].append(spent[0] / (time.perf_counter() - begin))
        return [tensor for tensor in outputs.values() if isinstance(tensor, Tensor)]

    @contextmanager
    def patched() -> Iterator[None]:
        saccade.patch(module)
        try:
            yield
        finally:
            saccade.unpatch(module)

    expected = run("eager")
    with patched():
        difference = _compare(model.name, run("patched"), expected)
    for some in shares.values():
        some.clear()  # the first call is slower in other parts
    runs = {name: partial(run, name) for name in shares}
    timings = alternate(runs, seconds, turn_seconds=0, contexts={"patched": patched})
    for hook in hooks:
        hook.remove()
    eager, ours = timings["eager"].milliseconds, timings["patched"].milliseconds
    return ModelMeasurement(
        model.name,
        model.input,
        float(f"{eager / ours:.3g}"),
        float(f"{eager:.4g}"),
        float(f"{ours:.4g}"),
        float(f"{statistics.median(shares['eager']):.3g}"),
        float(f"{statistics.median(shares['patched']):.3g}"),
        len(hooks) // 2,
        float(f"{difference:.2g}"),
        timings["eager"].rounds,
    )


def _time_attention(module: nn.Module, replaced: list[str], spent: list[float]) -> list[Any]:
    """Hooks that add up in `spent` the seconds of the attention modules, projections included.

    They cost microseconds per call, eager and patched alike. No such module lies in another, and a CPU has
    done its work when a forward returns.
    """
    begin = [0.0]

    def start(*_: Any) -> None:
        begin[0] = time.perf_counter()

    def stop(*_: Any) -> None:
        spent[0] += time.perf_counter() - begin[0]

    hooks: list[Any] = []
    for name in replaced:
        attention = module.get_submodule(name)
        if next(attention.parameters(), None) is None:  # the operator alone: its parent projects
            attention = module.get_submodule(name.rpartition(".")[0])
        hooks.append(attention.register_forward_pre_hook(start))
        hooks.append(attention.register_forward_hook(stop))
    return hooks


def _compare(name: str, outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    largest = 0.0
    for output, truth in zip(outputs, expected, strict=True):
        if not truth.is_floating_point() or not truth.numel():
            continue
        # Grounding DINO's logits of absent words are -inf, in both.
        same_inf = (output == truth) & truth.isinf()
        errors = (output - truth).abs().masked_fill(same_inf, 0)
        errors = errors / truth[truth.isfinite()].abs().max().clamp_min(1e-12)
        share = (~(errors <= TOLERANCE)).double().mean()  # a NaN is wrong
        if share > MAX_SHARE_MOVED:
            raise ArithmeticError(
                f"{name}: patched and eager outputs differ in {share:.0%} of the elements, "
                f"by {errors.max():.2g} of the largest"
            )
        largest = max(largest, float(errors.max()))
    return largest


def table(rows: list[ModelMeasurement]) -> Table:
    """One row per model, the ratio first."""
    shown = Table(box=None, pad_edge=False)
    for heading in ("ratio", "eager", "patched", "attention before", "after"):
        shown.add_column(heading, justify="right")
    shown.add_column("model", overflow="fold")
    for row in rows:
        if row.ratio is None:
            shown.add_row("–", "", "", "", "", Text(f"{row.input}: {row.reason}"), style="dim")
            continue
        spent = (f"{(ms or 0) / 1e3:.3g} s" for ms in (row.eager_ms, row.patched_ms))
        shares = (f"{share:.0%}" for share in (row.eager_share, row.patched_share))
        shown.add_row(times(row.ratio), *spent, *shares, row.input)
    return shown
