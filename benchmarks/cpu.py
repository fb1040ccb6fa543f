"""The operator on every workload, in every setting that the pages quote: `python -m benchmarks.cpu`.

It takes about half an hour on two cores and writes benchmarks/results/cpu.json and docs/images/bench.png.
Beside the baselines of `saccade bench` it has `grid_sample` on lines and volumes, `grid_sample` under
torch.compile, its export in ONNX Runtime, and Saccade's other instruction sets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

import saccade
from benchmarks.results_file import RESULTS, write_results
from saccade.bench.command import print_table, save_plot
from saccade.bench.operator import (
    BASELINES,
    METHOD,
    WORKLOADS,
    Baseline,
    Function,
    Row,
    Workload,
    compare,
    draw,
    grid_sample_function,
    saccade_function,
)
from saccade.integrations.exporter_logging import silence_exporters
from saccade.ops import native

# Every position is a query: most of a detector's time, and what 16-bit values are for.
ENCODERS = ("detr-encoder", "dino5-encoder", "mask2former-encoder", "bevformer-tsa")
# Few queries: the cases whose times depend on what the caches hold.
DECODERS = ("detr-decoder", "rtdetr-decoder", "rfdetr-nano")
# Compiling takes half a minute per case and direction, and the result is slower than eager: a large
# case, a small one, different points per level, a line and a volume show it.
COMPILED = ("detr-encoder", "detr-decoder", "dfine-decoder", "tadtr-1d", "medical-3d")
# The oldest opset with GridSample is 16; torch's exporter begins at 18, 20 names the modes anew.
ONNX_OPSET = 20


def saccade_on(isa: str) -> Baseline:
    """Saccade on a chosen instruction set."""
    name = f"cpu-{isa}"

    def prepare(workload: Workload) -> Function:
        function = saccade_function(workload)

        def run(*tensors: Tensor) -> Tensor:
            with saccade.use_backend(name):
                return function(*tensors)

        return run

    return Baseline(name, prepare, takes_16_bits=True)


def grid_sample_anywhere(workload: Workload) -> Function:
    """transformers' functions, and the same in one and three dimensions."""
    if workload.spatial_dims == 2:
        return grid_sample_function(workload)
    return _grid_sample_on_lines_or_volumes(workload)


def _grid_sample_on_lines_or_volumes(workload: Workload) -> Function:
    """transformers' function in other dimensions: one call of grid_sample per level.

    grid_sample takes images and volumes; a line is passed as an image of height 1.
    """
    shapes, points, heads = workload.shapes, workload.points, workload.num_heads
    is_line = workload.spatial_dims == 1

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        batch_size, _, _, head_dim = value.shape
        value = value.expand(-1, -1, heads, -1)
        grids = 2 * locations - 1
        if is_line:
            grids = torch.cat((grids, torch.zeros_like(grids)), -1)
        levels = value.split([math.prod(shape) for shape in shapes], 1)
        sampled = []
        for level, shape, grid in zip(levels, shapes, grids.split(points, 3), strict=True):
            level = level.flatten(2).transpose(1, 2)
            size = (1, *shape) if is_line else shape
            level = level.reshape(batch_size * heads, head_dim, *size)
            # [B * M, Q, K, 2], or [B * M, Q, K, 1, 3]
            grid = grid.transpose(1, 2).flatten(0, 1).unflatten(2, (-1,) if is_line else (-1, 1))
            sampled.append(grid_sample(level, grid, align_corners=False).flatten(3))
        flat_weights = weights.transpose(1, 2).reshape(batch_size * heads, 1, -1, sum(points))
        output = (torch.cat(sampled, -1) * flat_weights).sum(-1)
        return output.view(batch_size, heads * head_dim, -1).transpose(1, 2).contiguous()

    return run


def compiled_grid_sample(workload: Workload) -> Function:
    """The same under torch.compile, sizes fixed."""
    if workload.name not in COMPILED:
        raise NotImplementedError("left out, to keep the study short")
    # Compiled anew for each case: what was compiled before would make the sizes dynamic.
    torch._dynamo.reset()
    compiled: Function = torch.compile(grid_sample_anywhere(workload), dynamic=False)
    return compiled


def onnx_runtime(workload: Workload) -> Function:
    """The grid_sample path exported by torch.onnx, in ONNX Runtime on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning after a call, and slow down the baseline whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session: Any = None

    def run(*tensors: Tensor) -> Tensor:
        nonlocal session
        if tensors[0].requires_grad:
            raise NotImplementedError("an exported graph has no backward")
        if session is None:
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(_export(workload), options, providers=providers)
        names = [node.name for node in session.get_inputs()]
        arrays = (tensor.numpy() for tensor in tensors)
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(outputs[0])

    return run


def _export(workload: Workload) -> bytes:
    function = grid_sample_anywhere(workload)

    class Graph(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return function(value, locations, weights)

    file = BytesIO()
    with silence_exporters():
        program: Any = torch.onnx.export(
            Graph(),
            tuple(draw(workload, dtype=torch.float32)[:3]),
            dynamo=True,
            opset_version=ONNX_OPSET,
            verbose=False,
        )
        program.save(file)
    return file.getvalue()


def steps() -> Iterator[tuple[str, Sequence[Baseline], dict[str, Any]]]:
    """The workloads, what they are measured against, and in which setting.

    float32 on all threads and on one, bfloat16 for the encoders, single calls for the decoders.
    """
    best = saccade.which_backend().name
    isas = [saccade_on(isa) for isa in native.available_isas() if f"cpu-{isa}" != best]
    onnx = Baseline("onnxruntime", onnx_runtime)
    native_only = [
        BASELINES["saccade"],
        Baseline("grid_sample", grid_sample_anywhere),
        BASELINES["torch-ms-deform-attn"],
    ]
    everything = [*native_only, Baseline("torch.compile", compiled_grid_sample), onnx, *isas]
    threads = torch.get_num_threads()
    for name in WORKLOADS:
        yield name, everything, {"threads": threads}
    # One thread takes twice as long, and compiled code and ONNX Runtime show nothing new there.
    for name in WORKLOADS if threads > 1 else ():
        yield name, [*native_only, *isas], {"threads": 1}
    for name in ENCODERS:
        yield name, [*native_only, *isas], {"threads": threads, "dtype": torch.bfloat16}
    # Other instruction sets read the same memory: after them the caches would not be as others leave them.
    for name in DECODERS:
        yield name, [*native_only, onnx], {"threads": threads, "turn_seconds": 0}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--seconds", type=float, default=1, help="of taking turns per measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--plot", type=Path, help="for example docs/images/bench.png")
    arguments = parser.parse_args()
    results: list[Row] = []
    for name, baselines, setting in steps():
        if name not in (arguments.case or WORKLOADS):
            continue
        caches = "as left" if "turn_seconds" in setting else "warm"
        torch.set_num_threads(setting.pop("threads"))
        for backward in (False, True):
            rows = compare(
                WORKLOADS[name], baselines, backward=backward, seconds=arguments.seconds, **setting
            )
            print(*(rows[0][key] for key in ("workload", "direction", "dtype", "threads")), caches)
            print_table(rows, "baseline", ("milliseconds", "minimum", "upper_quartile"))
            results += [row | {"caches": caches} for row in rows]
    content = {"method": METHOD, "measurements": results}
    write_results(arguments.output, "python -m benchmarks.cpu", content)
    if arguments.plot:
        save_plot([row for row in results if row["caches"] == "warm"], arguments.plot)


if __name__ == "__main__":
    main()
