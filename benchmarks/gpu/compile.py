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
from saccade.backends.triton import backward, launch
from saccade.backends.triton.backward import GradientPlan, Wanted
from saccade.backends.triton.launch import Plan, Prepared
from saccade.benchmark.workloads import WORKLOADS, Workload

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
    """Of the whole program."""
    per_sample: float
    """Warp instructions for each sample: of the innermost loop, or of the whole where there is none."""
    widest_value_load: int
    """Bits of the widest load."""
    widest_addition: int
    """Numbers that the widest atomic addition adds; 0 without any."""


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


# How the gradient of the value is summed up; "no" is the forward.
GRADIENTS = ("no", "add", "sort")
# What a program of each kernel takes at once.
BLOCKS = ("QUERIES", "PIECES", "ROWS")


class Kernel(NamedTuple):
    """A kernel of a plan, and what its arguments point to."""

    prepared: Prepared
    pointers: dict[str, torch.dtype]
    sizes: tuple[int, ...] = ()
    samples: int = 0
    """That a program works on each time around its innermost loop, or in all where it has none."""

    @property
    def name(self) -> str:
        """As in the sources."""
        return str(self.prepared.kernel.__name__)


def forward_kernel(plan: Plan, value: torch.dtype, points: torch.dtype) -> Kernel:
    """The kernel of a call."""
    pointers = dict.fromkeys(("output", "value"), value)
    pointers |= dict.fromkeys(("points", "weights", "references"), points)
    return Kernel(plan.prepared, pointers, plan.sizes, _samples(plan.prepared.constants))


def backward_kernels(plan: GradientPlan, value: torch.dtype, points: torch.dtype) -> list[Kernel]:
    """The kernels of a backward: that of the points, then those that sum up in order."""
    constants, compute = plan.prepared.constants, plan.compute_dtype
    added = constants["VALUE_GRADIENT"] == "add"
    pointers = {
        "grad_value": compute if added else value,
        "grad_weights": compute if plan.fused else points,
        **dict.fromkeys(("grad_points", "grad_logits", "points", "weights", "references"), points),
        **dict.fromkeys(("grad_output", "value"), value),
        **dict.fromkeys(("grad_locations", "records"), compute),
        "keys": torch.int32,
    }
    found = [Kernel(plan.prepared, pointers, plan.sizes, _samples(constants))]
    if plan.in_order is not None:
        pieces, rows = plan.in_order.pieces, plan.in_order.rows
        counts = dict.fromkeys(
            ("order", "first_points", "first_pieces", "cell_of_piece"), torch.int64
        )
        given = {"sums": compute, "grad_output": value, "records": compute, **counts}
        found.append(Kernel(pieces, given, (), pieces.constants["PIECES"]))
        given = {"grad_value": value, "sums": compute, "first_pieces": torch.int64}
        found.append(Kernel(rows, given, plan.sizes, rows.constants["ROWS"]))
    return found


def _samples(constants: dict[str, Any]) -> int:
    return int(constants["QUERIES"] * constants.get("TOGETHER", constants["POINTS"]))


def read(kernel: Kernel) -> Reading:
    """Compiles a kernel as its launch would, and reads the machine code."""
    compiled = _compiled(kernel)
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
            len(loop or code) * kernel.prepared.constants["num_warps"] / kernel.samples, 2
        ),
        widest_value_load=max(loads, default=32),
        widest_addition=max((int(width[1:] or 1) for width in additions), default=0),
    )


def machine_code(kernel: Kernel) -> list[str]:
    """The instructions of a kernel."""
    return _without_labels(_machine_code(_compiled(kernel).asm["cubin"]))


def _compiled(kernel: Kernel) -> Any:
    options = {
        name: kernel.prepared.constants[name]
        for name in ("num_warps", "num_stages", "enable_fp_fusion")
    }
    constants = {
        name: number for name, number in kernel.prepared.constants.items() if name not in options
    }
    names = kernel.prepared.kernel.arg_names
    signature: dict[str, Any] = dict.fromkeys(names, "i32")
    signature |= {name: f"*{TYPES[dtype]}" for name, dtype in kernel.pointers.items()}
    if kernel.sizes:
        signature["sizes"] = ("i32",) * len(kernel.sizes)
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.pointers}
    source = ASTSource(kernel.prepared.kernel, signature, constants, aligned)
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


def kernels_of(workload: Workload, dtype: torch.dtype, kind: str, gradient: str) -> list[Kernel]:
    """The kernels of a workload: of its forward ("no"), or of its backward with value gradients that are
    added up by atomic operations ("add") or in order ("sort").
    """
    call = call_of(workload, dtype, kind)
    if gradient == "no":
        return [forward_kernel(launch.plan(call), dtype, torch.float32)]
    batch, queries, heads, _, _ = launch.points_of(call).shape
    grad_output = call.value.new_empty(batch, queries, heads * workload.head_dim)
    wanted = Wanted(True, False, True, True)
    plan = backward.gradient_plan(call, wanted, grad_output, in_order=gradient == "sort")
    return backward_kernels(plan, dtype, torch.float32)


def readings(
    names: Iterable[str], kinds: Iterable[str], gradients: Iterable[str] = ("no",)
) -> Iterable[dict[str, Any]]:
    """Each workload in float32 and bfloat16."""
    dtypes = (torch.float32, torch.bfloat16)
    for name, gradient, kind, dtype in itertools.product(names, gradients, kinds, dtypes):
        for kernel in kernels_of(WORKLOADS[name], dtype, kind, gradient):
            constants = kernel.prepared.constants
            yield {
                "case": name,
                "points": kind,
                "dtype": TYPES[dtype],
                "value_gradient": gradient,
                "kernel": kernel.name,
                "block": next(constants[one] for one in BLOCKS if one in constants),
                "warps": constants["num_warps"],
                **read(kernel)._asdict(),
            }


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=list(WORKLOADS))
    parser.add_argument("--backward", action="store_true", help="only the backward's kernels")
    parser.add_argument("--forward", action="store_true", help="only the forward's kernels")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    gradients = (
        ("no",) if arguments.forward else ("add", "sort") if arguments.backward else GRADIENTS
    )
    rows = list(readings(arguments.case or WORKLOADS, ("given", "points"), gradients))
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
