"""The GPU kernels compiled for a card that need not be there, and what came out.

`python -m benchmarks.gpu.compile` compiles the kernels of the registry's workloads for sm_90 and prints
registers, spills, shared memory and warp instructions per sample (one point of one query and head, all
its corners). Nothing is run: this says how much work a kernel issues, not how long it waits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Kernels that are interpreted cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saccade.backends.triton import backward_plan, forward_plan
from saccade.backends.triton.backward import BackwardPlan
from saccade.backends.triton.forward import ForwardPlan
from saccade.backends.triton.plan import Kernel
from saccade.bench.operator import WORKLOADS, Workload
from saccade.call import Call, parse_call

RESULTS = Path(__file__).resolve().parent.parent / "results" / "gpu_compile.json"

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Reading(NamedTuple):
    """What a compiled kernel is made of."""

    registers: int
    spills: int
    """Instructions that move registers to local memory and back for each sample."""
    shared_bytes: int
    instructions: int
    """Instructions of the whole program."""
    per_sample: float
    """Warp instructions for each sample: of the innermost loop, or of the whole program without one."""
    widest_value_load: int
    """Bits of the widest load."""
    widest_addition: int
    """Elements that the widest atomic addition adds; 0 without any."""


def make_call(
    workload: Workload, dtype: torch.dtype, reference: str = "none", *, softmax: bool | None = None
) -> Call:
    """A call with meta tensors, with the options of detectors. `reference` is "none", "points" or "boxes";
    with reference points the weights are logits, unless `softmax` says otherwise.
    """
    batch, queries, heads = workload.batch_size, workload.queries, workload.num_heads
    num_points, spatial_dims = sum(workload.points), workload.spatial_dims
    value = torch.empty(
        batch, workload.num_positions, 1 if workload.shared_head else heads, workload.head_dim,
        dtype=dtype, device="meta",
    )  # fmt: skip
    points = torch.empty(batch, queries, heads, num_points, spatial_dims, device="meta")
    weights = torch.empty(batch, queries, heads, num_points, device="meta")
    reference_points = None
    if reference != "none":
        coordinates = 2 * spatial_dims if reference == "boxes" else spatial_dims
        reference_points = torch.empty(batch, queries, 1, coordinates, device="meta")
    return parse_call(
        value,
        workload.shapes,
        points,
        weights,
        reference_points=reference_points,
        softmax=reference != "none" if softmax is None else softmax,
        num_points=workload.points,
    )


# How the gradient of the value is summed up; "none" is the forward.
GRAD_VALUES = ("none", "atomic", "sorted")


class Source(NamedTuple):
    """A kernel of a plan, and what its arguments point to."""

    kernel: Kernel
    pointers: dict[str, torch.dtype]
    sizes: tuple[int, ...]
    samples: int
    """Samples of a program: each time around its innermost loop, or in all where it has none."""


def forward_source(plan: ForwardPlan, value: torch.dtype, points: torch.dtype) -> Source:
    """The kernel of a call."""
    pointers = dict.fromkeys(("output", "value"), value)
    pointers |= dict.fromkeys(("points", "weights", "reference_points"), points)
    return Source(plan.kernel, pointers, plan.sizes, _samples(plan.kernel))


def backward_sources(plan: BackwardPlan, value: torch.dtype, points: torch.dtype) -> list[Source]:
    """The kernels of a backward: that of the points, then those of the ordered sum."""
    compute = plan.compute_dtype
    atomic = plan.kernel.constants.GRAD_VALUE == "atomic"
    pointers = {
        "grad_value": compute if atomic else value,
        "grad_attention_weights": compute if plan.has_attention_weight_buffer else points,
        **dict.fromkeys(("grad_points", "grad_weights", "points", "weights"), points),
        "reference_points": points,
        **dict.fromkeys(("grad_output", "value"), value),
        **dict.fromkeys(("grad_locations", "records"), compute),
        "keys": torch.int32,
    }
    sources = [Source(plan.kernel, pointers, plan.sizes, _samples(plan.kernel))]
    if plan.ordered_sum is not None:
        pieces, rows = plan.ordered_sum.pieces, plan.ordered_sum.rows
        indices = ("order", "first_points", "first_pieces", "piece_cell")
        pointers = {"sums": compute, "grad_output": value, "records": compute}
        pointers |= dict.fromkeys(indices, torch.int64)
        sources.append(Source(pieces, pointers, (), pieces.constants.BLOCK_PIECES))
        pointers = {"grad_value": value, "sums": compute, "first_pieces": torch.int64}
        sources.append(Source(rows, pointers, plan.sizes, rows.constants.BLOCK_ROWS))
    return sources


def _samples(kernel: Kernel) -> int:
    constants = kernel.constants
    one_by_one = "queries" in kernel.name
    num_points = constants.POINTS_PER_STEP if one_by_one else constants.NUM_POINTS
    return int(constants.BLOCK_QUERIES * num_points)


def read(source: Source) -> Reading:
    """Compiles a kernel as its launch would, and reads the machine code."""
    compiled = compile_ahead(source)
    lines = _machine_code(compiled.asm["cubin"])
    code = _without_labels(lines)
    loop = _innermost_loop(lines)
    loads = [int(width) for line in code for width in re.findall(r"LDG\.E\.(64|128)", line)]
    additions = re.findall(
        r"(?:red|atom)\.[.\w]*?add\.(?:(v\d)\.)?(?:noftz\.)?f\d+", compiled.asm["ptx"]
    )
    return Reading(
        registers=_registers(compiled.asm["cubin"]),
        spills=sum("LDL" in line or "STL" in line for line in loop or code),
        shared_bytes=compiled.metadata.shared,
        instructions=len(code),
        per_sample=round(
            len(loop or code) * source.kernel.options["num_warps"] / source.samples, 2
        ),
        widest_value_load=max(loads, default=32),
        widest_addition=max((int(width[1:] or 1) for width in additions), default=0),
    )


def machine_code(source: Source) -> list[str]:
    """The instructions of a kernel."""
    return _without_labels(_machine_code(compile_ahead(source).asm["cubin"]))


@functools.cache
def _compile(kernel: Kernel, pointers: tuple[tuple[str, torch.dtype], ...], num_sizes: int) -> Any:
    names = kernel.function.arg_names
    signature: dict[str, Any] = dict.fromkeys(names, "i32")
    signature |= {name: f"*{TYPES[dtype]}" for name, dtype in pointers}
    if num_sizes:
        signature["sizes"] = ("i32",) * num_sizes
    signature["C"] = "constexpr"
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, _ in pointers}
    source = ASTSource(kernel.function, signature, {"C": kernel.constants}, aligned)
    return triton.compile(source, target=TARGET, options=kernel.options)


def compile_ahead(source: Source) -> Any:
    """The kernel as a launch on such a card would compile it, with aligned tensors."""
    return _compile(source.kernel, tuple(source.pointers.items()), len(source.sizes))


def _without_labels(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.endswith(":")]


def _machine_code(cubin: bytes) -> list[str]:
    """Instructions, and labels that end with a colon."""
    text = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    lines = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+:)", line):
            lines.append(label.group(1))
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            lines.append(instruction.group(1))
    return lines


def _registers(cubin: bytes) -> int:
    usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    usage_match = re.search(r"REG:(\d+)", usage)
    assert usage_match, usage
    return int(usage_match.group(1))


def _tool(program: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [program, option, file.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return done.stdout + done.stderr


def _innermost_loop(lines: list[str]) -> list[str]:
    """The largest piece of code without a label in it that jumps back to its beginning."""
    largest: list[str] = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        label = f"{jump.group(1)}:" if jump else ""
        if label not in lines[:end]:
            continue
        body = [each for each in lines[lines.index(label) : end + 1] if not each.endswith(":")]
        # A single jump to itself is how machine code ends.
        if len(body) > max(1, len(largest)):
            largest = body
    return largest


def make_sources(call: Call, grad_value: str) -> list[Source]:
    """The kernels of a call's forward ("none"), or of its backward, where the gradient of the value is summed
    up by atomic operations ("atomic") or in order ("sorted").
    """
    value, points = call.value.dtype, call.points.dtype
    if grad_value == "none":
        return [forward_source(forward_plan(call), value, points)]
    mask = (True, True, True, False)
    plan = backward_plan(call, mask, ordered=grad_value == "sorted")
    return backward_sources(plan, value, points)


def readings(
    names: Iterable[str], references: Iterable[str], grad_values: Iterable[str] = ("none",)
) -> Iterable[dict[str, Any]]:
    """Each workload in float32 and bfloat16."""
    dtypes = (torch.float32, torch.bfloat16)
    for name, grad_value, reference, dtype in itertools.product(
        names, grad_values, references, dtypes
    ):
        for source in make_sources(make_call(WORKLOADS[name], dtype, reference), grad_value):
            yield {
                "case": name,
                "reference": reference,
                "dtype": TYPES[dtype],
                "grad_value": grad_value,
                "kernel": source.kernel.name,
                "warps": source.kernel.options["num_warps"],
                **read(source)._asdict(),
            }


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=list(WORKLOADS))
    parser.add_argument(
        "--grad-value", action="append", choices=GRAD_VALUES, help='"none": forward'
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    grad_values = arguments.grad_value or GRAD_VALUES
    rows = list(readings(arguments.case or WORKLOADS, ("none", "points"), grad_values))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=200).print(table)
    results = {
        "command": "python -m benchmarks.gpu.compile",
        "target": f"sm_{TARGET.arch}, compiled and read, not run",
        "triton": triton.__version__,
        "readings": rows,
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
