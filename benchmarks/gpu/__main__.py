"""`python -m benchmarks.gpu`: Saccade on an NVIDIA GPU, in ten minutes.

Checks a few calls against the definition, times the workloads beside what is installed (CUDA graphs, and calls
after a flush of the L2), then a whole model with and without saccade.patch, and writes JSON. The thorough checks
are tests: `pytest tests -m "gpu or triton"`.

Exit code: 0 done; 1 a result is wrong, or there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

# The hub kernel is a baseline where it was fetched before: nothing is downloaded here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

import saccade
from benchmarks.cpu import grid_sample_anywhere
from benchmarks.results_file import RESULTS, write_results
from saccade.bench.models import MODELS
from saccade.bench.operator import (
    TOLERANCES,
    WORKLOADS,
    Inputs,
    Truth,
    Workload,
    describe_error,
    draw,
    saccade_function,
    timed_call,
)
from saccade.doctor import compare_with_reference

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTILES = (0.5, 0.0, 0.75)
MAX_CHECK_ERROR = 1e-5
# How many maps the CUDA op of 2020 takes at once.
IM2COL_STEP = 64
HUB_REPOSITORY = "kernels-community/deformable-detr"


def join_halves(module: Any) -> Callable[..., Tensor]:
    """An extension's forward and backward as one function that autograd knows."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            output: Tensor = module.ms_deform_attn_forward(*tensors, IM2COL_STEP)
            return output

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            grads = module.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output.contiguous(), IM2COL_STEP
            )
            return grads[0], None, None, *grads[1:]

    apply: Callable[..., Tensor] = Attention.apply
    return apply


def _mmcv() -> Callable[..., Tensor]:
    module = import_module("mmcv.ops.multi_scale_deform_attn")
    function = module.MultiScaleDeformableAttnFunction
    return lambda *tensors: function.apply(*tensors, IM2COL_STEP)


# Functions of (value, shapes, starts, locations, weights) with axes for levels, all in float32 and on images;
# each is imported when it is asked for.
EXTENSIONS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "upstream CUDA": lambda: join_halves(import_module("MultiScaleDeformableAttention")),
    "mmcv CUDA": _mmcv,
    "hub kernel": lambda: join_halves(import_module("kernels").get_kernel(HUB_REPOSITORY)),
    "torch-ms-deform-attn": lambda: import_module("torch_ms_deform_attn").ms_deform_attn,
    "deformops": lambda: import_module("deformops.registry").msda,
}


def prepare(name: str, workload: Workload, inputs: Inputs) -> tuple[Function, Inputs]:
    """A baseline's function and its inputs.

    Raises:
        Exception: it is not installed, or cannot do the workload.
    """
    if name == "saccade":
        return saccade_function(workload), inputs
    if name == "grid_sample":  # takes one dtype for all tensors
        return grid_sample_anywhere(workload), Inputs(
            *(tensor.to(inputs.value.dtype) for tensor in inputs)
        )
    function = EXTENSIONS[name]()
    if workload.spatial_dims != 2 or len(set(workload.points)) > 1:
        raise NotImplementedError("takes images, and one number of points for all levels")
    shapes = torch.tensor([tuple(shape) for shape in workload.shapes], device="cuda")
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    by_level = (len(shapes), workload.points[0])

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        value = value.expand(-1, -1, workload.num_heads, -1).contiguous()
        locations, weights = locations.unflatten(3, by_level), weights.unflatten(3, by_level)
        return function(value, shapes, starts, locations.contiguous(), weights.contiguous())

    return run, Inputs(*(tensor.float() for tensor in inputs))


def time_operator(name: str, dtype: str, backward: bool) -> list[dict[str, Any]]:
    """Microseconds of Saccade and of each baseline, one row each; a baseline that cannot run says why.

    Raises:
        ArithmeticError: Saccade's results are wrong.
    """
    workload = WORKLOADS[name]
    drawn = draw(workload, dtype=DTYPES[dtype])
    truth = Truth(workload, drawn, backward)
    rows: list[dict[str, Any]] = []
    for baseline in ("saccade", "grid_sample", *EXTENSIONS):
        row: dict[str, Any] = {"workload": name, "dtype": dtype, "backward": backward}
        row["baseline"] = baseline
        try:
            function, inputs = prepare(
                baseline, workload, Inputs(*(tensor.cuda() for tensor in drawn))
            )
            row["computes_in"] = str(inputs.value.dtype).removeprefix("torch.")
            run = timed_call(function, inputs, backward)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = [tensor.cpu() for tensor in run()]
            row["peak_megabytes"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
            truth.check(baseline, results)
            row["flushed_us"] = _microseconds(do_bench(run, quantiles=QUANTILES))
            if not backward:
                row["graph_us"] = _microseconds(do_bench_cudagraph(run, quantiles=QUANTILES))
        except ArithmeticError as error:
            if baseline == "saccade":
                raise
            row["reason"] = str(error)
        except Exception as error:
            if baseline == "saccade":
                raise
            row["reason"] = describe_error(error)
        if rows and "flushed_us" in row:
            row["ratio"] = round(row["flushed_us"][0] / rows[0]["flushed_us"][0], 2)
        rows.append(row)
    return rows


def _microseconds(times: Any) -> list[float]:
    """Median, minimum and upper quartile."""
    return [float(f"{1e3 * milliseconds:.4g}") for milliseconds in times]


def time_model(name: str) -> dict[str, Any]:
    """Milliseconds of a forward, eager and patched."""
    model = MODELS[name].build().cuda()
    inputs = {key: tensor.cuda() for key, tensor in MODELS[name].inputs().items()}
    row: dict[str, Any] = {"model": MODELS[name].input}
    for key in ("eager", "patched"):
        if key == "patched":
            row["replaced"] = len(saccade.patch(model).replaced)
        with torch.no_grad():
            row[f"{key}_ms"] = round(
                float(do_bench(partial(model, **inputs), return_mode="median")), 3
            )
    row["ratio"] = round(row["eager_ms"] / row["patched_ms"], 2)
    return row


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table per workload, dtype and direction."""
    way = "forward + backward" if rows[0]["backward"] else "forward"
    table = Table("ratio", "baseline", "flushed, us", "in a graph, us", "", box=None)
    for row in rows:
        times = (f"{row[key][0]:g}" if key in row else "" for key in ("flushed_us", "graph_us"))
        table.add_row(str(row.get("ratio", "")), row["baseline"], *times, row.get("reason", ""))
    console.print(f"{rows[0]['workload']} · {rows[0]['dtype']} · {way}", style="bold")
    console.print(table, "")


def main() -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: both")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="a whole model")
    parser.add_argument("--minutes", type=float, default=9.5, help="nothing begins after these")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "python -m benchmarks.gpu needs an NVIDIA GPU, and torch sees none here",
            file=sys.stderr,
        )
        return 1
    console, end = Console(highlight=False), time.monotonic() + 60 * arguments.minutes
    card = torch.cuda.get_device_properties(0)
    errors = compare_with_reference(torch.device("cuda"))
    console.print(f"{card.name}; errors against the definition: {errors}", markup=False)
    results: dict[str, Any] = {
        "gpu": {"name": card.name, "memory": card.total_memory, "triton": triton.__version__},
        "method": "median, minimum and upper quartile of triton.testing.do_bench (L2 flushed) and "
        "do_bench_cudagraph, in microseconds; ratio = the baseline's time / Saccade's, L2 flushed",
        "allowed": {str(dtype): tolerance for dtype, tolerance in TOLERANCES.items()},
        "errors": errors,
        "operator": [],
        "models": [],
        "wrong": [],
    }
    if not all(error <= MAX_CHECK_ERROR for error in errors.values()):  # a NaN is wrong
        results["wrong"].append("the comparison with the definition")
    steps = itertools.product(arguments.case or WORKLOADS, arguments.dtype or DTYPES, (False, True))
    for name, dtype, backward in steps:
        if time.monotonic() > end:
            break
        try:
            rows = time_operator(name, dtype, backward)
        except ArithmeticError as error:
            results["wrong"].append(f"{name}, {dtype}: {error}")
            continue
        results["operator"] += rows
        print_rows(console, rows)
    for name in arguments.model or ["deformable-detr"]:
        if time.monotonic() < end:
            results["models"].append(time_model(name))
            console.print(results["models"][-1])
    write_results(arguments.output, "python -m benchmarks.gpu", results)
    for reason in results["wrong"]:
        console.print(f"wrong results: {reason}", markup=False)
    return 1 if results["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
