"""The operator on every workload, in every setting that the pages quote: `python -m benchmarks.cpu`.

It takes about half an hour on two cores and writes benchmarks/results/cpu.json and docs/images/bench.png.
Beside the baselines of `saccade bench` it has `grid_sample` on lines and volumes, `grid_sample` under
torch.compile, its export in ONNX Runtime, and Saccade's other instruction sets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

import saccade
from benchmarks.results_file import RESULTS
from saccade.bench.baselines import BASELINES, Baseline, Function, GridSample, Saccade
from saccade.bench.command import on_threads
from saccade.bench.operator import Measurement, Skipped, compare
from saccade.bench.report import save_plot, table, title, write_measurements
from saccade.bench.workloads import WORKLOADS, Inputs, Workload
from saccade.integrations.exporter_logging import silence_exporters
from saccade.ops import native
from saccade.terminal import out

# Every position is a query: most of a detector's time, and what 16-bit values are for.
ENCODERS = ("detr-encoder", "dino5-encoder", "mask2former-encoder", "bevformer-tsa")
# Few queries: the cases whose times depend on what the caches hold.
DECODERS = ("detr-decoder", "rtdetr-decoder", "rfdetr-nano")
# Compiling takes half a minute per case and direction, and the result is slower than eager: a large
# case, a small one, different points per level, a line and a volume show it.
COMPILED = ("detr-encoder", "detr-decoder", "dfine-decoder", "tadtr-1d", "medical-3d")
# The oldest opset with GridSample is 16; torch's exporter begins at 18, 20 names the modes anew.
ONNX_OPSET = 20


class SaccadeOn(Saccade):
    """Saccade on a chosen instruction set."""

    def __init__(self, isa: str) -> None:
        self.name = f"cpu-{isa}"
        self.about = f"Saccade on {self.name}"

    def kernel(self) -> str:
        """The name of the backend."""
        return self.name

    def context(self) -> AbstractContextManager[object]:
        """`use_backend`, for a whole turn, so that its own time is not counted."""
        return saccade.use_backend(self.name)


class GridSampleAnywhere(GridSample):
    """transformers' functions, and the same in one and three dimensions."""

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Refuses nothing."""
        return None

    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """The function for the workload's dimensions."""
        if workload.spatial_dims == 2:
            return super().prepare(workload, inputs)
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


class CompiledGridSample(GridSampleAnywhere):
    """The same under torch.compile."""

    name = "torch.compile"
    about = "grid_sample under torch.compile, sizes fixed"

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Refuses what `COMPILED` leaves out."""
        return None if workload.name in COMPILED else "left out, to keep the study short"

    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """Compiled anew for each case: what was compiled before would make the sizes dynamic."""
        torch._dynamo.reset()
        compiled: Function = torch.compile(super().prepare(workload, inputs), dynamic=False)
        return compiled


class OnnxRuntime(GridSampleAnywhere):
    """The grid_sample path exported by torch.onnx, in ONNX Runtime."""

    name = "onnxruntime"
    about = "grid_sample exported to ONNX (GridSample), ONNX Runtime on the CPU; forward only"
    modules = ("transformers", "onnx", "onnxscript", "onnxruntime")

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Refuses the backward."""
        return "an exported graph has no backward" if backward else None

    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """A session on as many threads as torch has; tensors go in and out without a copy."""
        import onnxruntime

        assert inputs is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning after a call, and slow down the baseline whose turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            _export(super().prepare(workload, inputs), inputs),
            options,
            providers=["CPUExecutionProvider"],
        )
        names = [node.name for node in session.get_inputs()]

        def run(*tensors: Tensor) -> Tensor:
            arrays = (tensor.numpy() for tensor in tensors)
            outputs = session.run(None, dict(zip(names, arrays, strict=True)))
            return torch.from_numpy(outputs[0])

        return run


def _export(function: Function, inputs: Inputs) -> bytes:
    class Graph(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return function(value, locations, weights)

    file = BytesIO()
    with silence_exporters():
        program: Any = torch.onnx.export(
            Graph(), tuple(inputs[:3]), dynamo=True, opset_version=ONNX_OPSET, verbose=False
        )
        program.save(file)
    return file.getvalue()


class Step(NamedTuple):
    """One call of `compare`, forward and with backward."""

    workload: str
    baselines: list[Baseline]
    threads: int
    dtype: torch.dtype = torch.float32
    uniform: bool = False
    single_call: bool = False


def plan() -> Iterator[Step]:
    """What is measured: about half an hour on two cores.

    float32 and model-like locations on all threads and on one, uniform locations, bfloat16 for the
    encoders, single calls for the decoders.
    """
    best = saccade.which_backend().name
    isas = [SaccadeOn(isa) for isa in native.available_isas() if f"cpu-{isa}" != best]
    native_only = [BASELINES["saccade"], GridSampleAnywhere(), BASELINES["torch-ms-deform-attn"]]
    everything = [*native_only, CompiledGridSample(), OnnxRuntime(), *isas]
    threads = torch.get_num_threads()
    for name in WORKLOADS:
        yield Step(name, everything, threads)
    # One thread takes twice as long, and compiled code and ONNX Runtime show nothing new there.
    for name in WORKLOADS if threads > 1 else ():
        yield Step(name, [*native_only, *isas], 1)
    for name in WORKLOADS:
        yield Step(name, [*native_only, *isas], threads, uniform=True)
    for name in ENCODERS:
        yield Step(name, [*native_only, *isas], threads, torch.bfloat16)
    # Other instruction sets read the same memory: after them the caches would not be as others leave them.
    for name in DECODERS:
        yield Step(name, [*native_only, OnnxRuntime()], threads, single_call=True)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--seconds", type=float, default=1, help="of taking turns per measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--plot", type=Path, help="for example docs/images/bench.png")
    arguments = parser.parse_args()
    results: list[Measurement | Skipped] = []
    for step in plan():
        if step.workload not in (arguments.case or WORKLOADS):
            continue
        for backward in (False, True):
            with on_threads(step.threads):
                rows = list(
                    compare(
                        WORKLOADS[step.workload],
                        step.baselines,
                        dtype=step.dtype,
                        uniform=step.uniform,
                        backward=backward,
                        single_call=step.single_call,
                        seconds=arguments.seconds,
                    )
                )
            results += rows
            out.print(title(rows[0].setting), style="bold")
            out.print(table(rows), "")
    write_measurements(arguments.output, "python -m benchmarks.cpu", results)
    if arguments.plot:
        save_plot(results, arguments.plot)


if __name__ == "__main__":
    main()
