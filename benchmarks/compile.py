"""torch.compile against eager, both on Saccade: `python -m benchmarks.compile`.

The operator, the modules, Deformable DETR's encoder, and the detector that comes with Saccade, patched;
each compiled by inductor as one graph with dynamic sizes. Medians of turns, printed and kept in
benchmarks/results/compile.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import saccade
from benchmarks.onnx import SIZES, encoder, operator, pyramid
from benchmarks.results_file import RESULTS, write_results
from saccade import doctor
from saccade.timing import alternate
from saccade.vision.detector import Detector

SHAPES = pyramid(SIZES["800 x 1333"])
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def module(queries: int | None) -> Case:
    """The module of detectors on the maps of a large image; with None every position is a query."""
    torch.manual_seed(0)
    positions = sum(height * width for height, width in SHAPES)
    queries = positions if queries is None else queries
    query, value = torch.randn(1, queries, 256), torch.randn(1, positions, 256)
    attention = saccade.nn.MultiScaleDeformableAttention(256).eval()
    return attention, (query, torch.rand(1, queries, 1, 2), value, SHAPES)


def single_map() -> Case:
    """The module for one map."""
    torch.manual_seed(0)
    feature_map = torch.randn(1, 100, 167, 256)
    return saccade.nn.DeformableAttention(256, 8).eval(), (torch.randn(1, 300, 256), feature_map)


def detector() -> Case:
    """The embedded detector on its scene."""
    loaded = Detector.load()
    image = Image.open(doctor.EXAMPLE_IMAGE).convert("RGB")
    pixels = loaded.processor(images=[image], return_tensors="pt")["pixel_values"]
    return loaded.model, (pixels,)


CASES: dict[str, Callable[[], Case]] = {
    "fused operator, 22,223 queries": functools.partial(operator, SHAPES),
    "MultiScaleDeformableAttention, 22,223 queries": functools.partial(module, None),
    "MultiScaleDeformableAttention, 300 queries": functools.partial(module, 300),
    "DeformableAttention, 300 queries": single_map,
    "Deformable DETR's encoder, 512 x 512": functools.partial(encoder, pyramid(SIZES["512 x 512"])),
    "the embedded detector, patched": detector,
}


def measure(
    function: Callable[..., Any], inputs: tuple[Any, ...], seconds: float
) -> dict[str, Any]:
    """Milliseconds of both, and how long compiling took."""
    torch.compiler.reset()
    if isinstance(function, nn.Module):
        function.eval()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch.no_grad():
        begin = time.perf_counter()
        compiled(*inputs)
        taken = time.perf_counter() - begin
        timings = alternate(
            {
                "eager": functools.partial(function, *inputs),
                "compiled": functools.partial(compiled, *inputs),
            },
            seconds,
        )
    milliseconds = {name: round(timing.milliseconds, 3) for name, timing in timings.items()}
    return {
        "milliseconds": milliseconds,
        "compiled_is_faster": round(
            timings["eager"].milliseconds / timings["compiled"].milliseconds, 2
        ),
        "seconds_to_compile": round(taken, 1),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "compile.json")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = {}
    for name in arguments.case or CASES:
        cases[name] = measure(*CASES[name](), arguments.seconds)
        print(name, json.dumps(cases[name]), flush=True)
    results = {"threads": arguments.threads, "cases": cases}
    write_results(arguments.output, "python -m benchmarks.compile", results)


if __name__ == "__main__":
    main()
