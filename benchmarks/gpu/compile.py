"""The GPU kernels compiled for a card that need not be there, and what came out.

`python -m benchmarks.gpu.compile` compiles the kernels of the registry's workloads for sm_90 and prints
registers, spills, shared memory and warp instructions a sample (one point of one query and head, all
its corners). Nothing is run: this says how much work a kernel issues, not how long it waits.
"""

from __future__ import annotations

import argparse
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

from saccade.arguments import Call, FusedCall, Options, understand, understand_fused
from saccade.backends.triton import launch
from saccade.backends.triton.launch import Plan
from saccade.benchmark.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parent.parent / "results" / "gpu_compile.json"

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
POINTERS = ("output", "value", "points", "weights", "references")


class Reading(NamedTuple):
    """What a compiled kernel is made of."""

    registers: int
    spills: int
    """Instructions that move registers to local memory and back."""
    shared_bytes: int
    instructions: int
    """Of the whole program."""
    per_sample: float
    """Warp instructions for each sample: of the innermost loop, or of the whole where there is none."""
    widest_value_load: int
    """Bits of the widest load."""


def options_of(workload: Workload) -> Options:
    """What detectors use."""
    return Options(workload.shapes, workload.points, "linear", "zeros", "normalized", None)


def call_of(workload: Workload, dtype: torch.dtype, kind: str = "given") -> Call | FusedCall:
    """A call with tensors that have sizes and nothing else."""
    batch, queries, heads = workload.batch_size, workload.queries, workload.num_heads
    points, axes = sum(workload.points), workload.spatial_dims
    value = torch.empty(
        batch, workload.num_positions, 1 if workload.shared_head else heads, workload.head_dim,
        dtype=dtype, device="meta",
    )  # fmt: skip
    locations = torch.empty(batch, queries, heads, points, axes, device="meta")
    weights = torch.empty(batch, queries, heads, points, device="meta")
    options = options_of(workload)
    if kind == "given":
        return understand(value, locations, weights, options)
    numbers = 2 * axes if kind == "boxes" else axes
    references = torch.empty(batch, queries, 1, numbers, device="meta")
    return understand_fused(value, references, locations, weights, options)


def read(plan: Plan, value_dtype: torch.dtype, points_dtype: torch.dtype) -> Reading:
    """Compiles the kernel of a plan as its launch would, and reads the machine code."""
    compiled = _compiled(plan, value_dtype, points_dtype)
    lines = _machine_code(compiled.asm["cubin"])
    code = _without_labels(lines)
    loop = _innermost_loop(lines)
    per_warp = plan.constants["QUERIES"] / plan.constants["num_warps"]
    together = plan.constants.get("TOGETHER", plan.constants["POINTS"])
    loads = [int(width) for line in code for width in re.findall(r"LDG\.E\.(64|128)", line)]
    return Reading(
        registers=_registers(compiled.asm["cubin"]),
        spills=sum("LDL" in line or "STL" in line for line in code),
        shared_bytes=compiled.metadata.shared,
        instructions=len(code),
        per_sample=round(len(loop or code) / (per_warp * together), 2),
        widest_value_load=max(loads, default=32),
    )


def machine_code(plan: Plan, value_dtype: torch.dtype, points_dtype: torch.dtype) -> list[str]:
    """The instructions of the kernel of a plan."""
    return _without_labels(_machine_code(_compiled(plan, value_dtype, points_dtype).asm["cubin"]))


def _compiled(plan: Plan, value_dtype: torch.dtype, points_dtype: torch.dtype) -> Any:
    constants = {
        name: number
        for name, number in plan.constants.items()
        if name not in ("num_warps", "num_stages", "enable_fp_fusion")
    }
    options = {name: plan.constants[name] for name in plan.constants if name not in constants}
    names = plan.kernel.arg_names
    signature: dict[str, Any] = dict.fromkeys(names, "i32")
    signature |= dict.fromkeys(POINTERS, "*" + TYPES[points_dtype])
    signature |= dict.fromkeys(("output", "value"), "*" + TYPES[value_dtype])
    signature |= {"sizes": ("i32",) * len(plan.sizes)} | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS}
    source = ASTSource(plan.kernel, signature, constants, aligned)
    return triton.compile(source, target=TARGET, options=options)


def _without_labels(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.endswith(":")]


def _machine_code(cubin: bytes) -> list[str]:
    """Instructions, and labels that end with a colon."""
    text = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    found = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+:)", line):
            found.append(label.group(1))
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            found.append(instruction.group(1))
    return found


def _registers(cubin: bytes) -> int:
    usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return int(found.group(1))


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


def readings(names: Iterable[str], kinds: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Each workload in float32 and bfloat16."""
    for name, kind, dtype in itertools.product(names, kinds, (torch.float32, torch.bfloat16)):
        plan = launch.plan(call_of(WORKLOADS[name], dtype, kind))
        found = read(plan, dtype, torch.float32)
        yield {
            "case": name,
            "points": kind,
            "dtype": TYPES[dtype],
            "kernel": plan.kernel.__name__,
            "queries": plan.constants["QUERIES"],
            "warps": plan.constants["num_warps"],
            **found._asdict(),
        }


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=list(WORKLOADS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = list(readings(arguments.case or WORKLOADS, ("given", "points")))
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
