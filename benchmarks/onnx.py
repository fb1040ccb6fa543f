"""An exported encoder in ONNX Runtime, by each lowering: `python -m benchmarks.onnx`.

Deformable DETR's encoder (six layers of `MultiScaleDeformableAttention` and a feed-forward network), the
same layers without the feed-forward networks, and the fused operator alone, on images of two sizes;
medians of turns, printed and kept in benchmarks/results/onnx.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import tempfile
from collections.abc import Callable
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from benchmarks.results_file import RESULTS, write_results
from saccade.bench.command import machine
from saccade.integrations import onnx as saccade_onnx
from saccade.timing import alternate

LOWERINGS = ("grid_sample", "gather", "native")
SIZES = {"512 x 512": (512, 512), "800 x 1333": (800, 1333)}
"""The images, (height, width) by name."""


class Layer(nn.Module):
    """One layer of Deformable DETR's encoder; `hidden` 0: without the feed-forward network."""

    def __init__(self, hidden: int, embed_dim: int = 256) -> None:
        super().__init__()
        self.attention = saccade.nn.MultiScaleDeformableAttention(embed_dim)
        # Trained offsets differ from query to query.
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.1)
        nn.init.normal_(self.attention.attention_weights.weight, std=0.1)
        self.norm = nn.LayerNorm(embed_dim)
        self.forward_network: nn.Module | None = None
        if hidden:
            self.forward_network = nn.Sequential(
                nn.Linear(embed_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim)
            )
            self.last_norm = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor, reference: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
        """Tokens [B, S, C] to tokens."""
        tokens = self.norm(tokens + self.attention(tokens, reference, tokens, shapes))
        if self.forward_network is not None:
            tokens = self.last_norm(tokens + self.forward_network(tokens))
        return tokens


class Encoder(nn.Module):
    """Maps [B, 256, H, W] of four levels to tokens [B, S, 256]."""

    def __init__(self, hidden: int, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(hidden) for _ in range(layers)])

    def forward(self, maps: list[Tensor]) -> Tensor:
        """As docs/onnx.md has it: numbers from the shapes of the maps."""
        shapes: list[tuple[int, ...]] = [tuple(level.shape[2:]) for level in maps]
        tokens = torch.cat([level.flatten(2) for level in maps], 2).transpose(1, 2)
        reference = torch.cat([_centres(*shape) for shape in shapes])[None, :, None]
        reference = reference.expand(tokens.shape[0], -1, -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, reference, shapes)
        return tokens


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack((x, y), -1).flatten(0, 1)


Shapes = list[tuple[int, int]]


class Operator(nn.Module):
    """The fused operator of one layer."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        """What stands between the linear layers."""
        return saccade.fused_deformable_attention(
            value, self.shapes, reference, offsets, logits, num_points=4
        )


def encoder(shapes: Shapes, hidden: int = 1024) -> tuple[nn.Module, tuple[Any, ...]]:
    """The encoder and its maps."""
    torch.manual_seed(0)
    return Encoder(hidden).eval(), ([torch.randn(1, 256, *shape) for shape in shapes],)


def operator(shapes: Shapes) -> tuple[nn.Module, tuple[Any, ...]]:
    """The operator, as one layer of the encoder calls it."""
    torch.manual_seed(0)
    reference = torch.cat([_centres(*shape) for shape in shapes])[None, :, None]
    count = reference.shape[1]
    inputs = (
        torch.randn(1, count, 8, 32),
        reference,
        torch.randn(1, count, 8, 16, 2) * 2,
        torch.randn(1, count, 8, 16),
    )
    return Operator(list(shapes)).eval(), inputs


CASES: dict[str, Callable[[Shapes], tuple[nn.Module, tuple[Any, ...]]]] = {
    "encoder": encoder,
    "encoder without feed-forward networks": functools.partial(encoder, hidden=0),
    "operator": operator,
}


def pyramid(image: tuple[int, int]) -> Shapes:
    """The four maps of an image (height, width)."""
    return [(-(-image[0] // step), -(-image[1] // step)) for step in (8, 16, 32, 64)]


def measure(
    model: nn.Module, inputs: tuple[Any, ...], seconds: float, threads: int
) -> dict[str, Any]:
    """Milliseconds of each lowering and of torch itself, and how far each is from torch."""
    runtime = importlib.import_module("onnxruntime")
    torch.set_num_threads(threads)
    with torch.inference_mode():
        expected = model(*inputs)
    tensors = inputs[0] if isinstance(inputs[0], list) else inputs
    calls, errors = {}, {}
    for lowering in LOWERINGS:
        options = runtime.SessionOptions()
        if lowering == "native":
            options = saccade_onnx.session_options(options)
        options.intra_op_num_threads = threads
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.onnx")
            torch.onnx.export(
                model,
                inputs,
                path,
                dynamo=True,
                verbose=False,
                custom_translation_table=saccade_onnx.translations(lowering),
            )
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        feeds = dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True))
        calls[lowering] = functools.partial(session.run, None, feeds)
        output = torch.from_numpy(calls[lowering]()[0])
        errors[lowering] = float((output - expected).abs().max())
        gc.collect()

    def in_torch() -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(*inputs)
        return output

    timings = alternate({**calls, "torch": in_torch}, seconds)
    milliseconds = {name: round(timing.milliseconds, 1) for name, timing in timings.items()}
    return {
        "tokens": expected.shape[1],
        "threads": threads,
        "milliseconds": milliseconds,
        "native_is_faster_than": {
            name: round(milliseconds[name] / milliseconds["native"], 2)
            for name in milliseconds
            if name != "native"
        },
        "largest_difference_from_torch": errors,
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "onnx.json")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: all")
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    cases: dict[str, dict[str, Any]] = {}
    for size, name in product(arguments.size or SIZES, arguments.case or CASES):
        case = measure(*CASES[name](pyramid(SIZES[size])), arguments.seconds, arguments.threads)
        cases.setdefault(size, {})[name] = case
        print(size, name, case["milliseconds"], case["native_is_faster_than"], flush=True)
    versions = {name: metadata.version(name) for name in ("onnxruntime-extensions", "onnxscript")}
    results = {"machine": machine() | versions, "images": cases}
    write_results(arguments.output, "python -m benchmarks.onnx", results)


if __name__ == "__main__":
    main()
