"""`python -m benchmarks.gpu`: the floors, their rows and their kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import saccade

pytest.importorskip("benchmarks.gpu", reason="benchmarks/ is not in a wheel")

from benchmarks.gpu import floors, floors_backward, timing
from benchmarks.gpu.goals import COLD, WARM
from benchmarks.gpu.results import Deadline, Results
from saccade.benchmark.workloads import WORKLOADS, Workload, draw

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    small = Workload("detr-encoder", "", [(6, 9), (3, 5)], 13, num_heads=2, head_dim=8)
    monkeypatch.setitem(WORKLOADS, "detr-encoder", small)
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-4)


CASES = {
    1: Workload("line", "", [(7,), (4,)], 5, 2, 4, 3, 2),
    2: Workload("image", "", [(5, 7), (3, 4)], 33, 3, 4, [1, 3], 2),
    3: Workload("volume", "", [(3, 4, 5)], 5, 2, 4, 2, 2),
    "shared": Workload("shared", "", [(5, 7)], 5, 3, 4, 2, 2, shared_head=True),
}


@pytest.mark.parametrize("kind", CASES)
def test_corner_rows_are_those_that_points_read(kind):
    """A value with one number in one row: the rows say which queries see it."""
    workload = CASES[kind]
    inputs = draw(workload, dtype=torch.float32, uniform=True, seed=3)
    locations = inputs.sampling_locations * 1.4 - 0.2
    rows = floors.corner_rows(workload, locations)
    points = sum(workload.points) * 2**workload.spatial_dims
    looks = (workload.batch_size, workload.queries, workload.num_heads)
    assert rows.shape == (points, *looks)
    assert rows.dtype == torch.int32
    assert (rows == -1).any()
    ones = torch.ones_like(inputs.attention_weights)
    for row in torch.randperm(inputs.value.shape[:3].numel())[:20].tolist():
        value = torch.zeros_like(inputs.value)
        value.view(-1, 4)[row] = 1
        seen = saccade.deformable_attention(
            value, workload.shapes, locations, ones, num_points=workload.points
        )
        assert torch.equal(seen.unflatten(2, (looks[2], 4))[..., 0] > 0, (rows == row).any(0))


def test_every_order_has_the_same_looks():
    rows = floors.corner_rows(CASES[2], draw(CASES[2], dtype=torch.float32, uniform=True)[1])
    columns = [sorted(floors.ordered(rows, order).mT.tolist()) for order in floors.ORDERS]
    assert columns[0] == columns[1]
    assert [one for one in columns[2] if any(row >= 0 for row in one)] == [
        one for one in columns[0] if any(row >= 0 for row in one)
    ]
    by_head = floors.ordered(rows, "head after head")
    assert torch.equal(by_head[:, 33], rows[:, 0, 0, 1])
    blocks = floors.ordered(rows, "32 queries of a head")
    assert torch.equal(blocks[:, 32 + 5], rows[:, 0, 5, 1])
    assert torch.equal(blocks[:, 3 * 32], rows[:, 0, 32, 0])


IN_INTERPRETER = """
import json, sys, torch
from benchmarks.gpu import floors
from benchmarks.gpu.floors import Launch, checked_gather, copy_rate, corner_rows, gather, ordered
from benchmarks.gpu.timing import Clock
from saccade.benchmark.workloads import Workload, draw
workload = Workload("w", "", [(5, 7)], 5, 2, 16, 2)
for dtype in (torch.float32, torch.bfloat16):
    inputs = draw(workload, dtype=dtype, uniform=True)
    rows = ordered(corner_rows(workload, inputs.sampling_locations), "heads fastest")
    output = gather(inputs.value, rows, 16, Launch(4, 1, 4))()
    checked_gather(output, inputs.value, rows, 16)
    output[3] += 1
    try:
        checked_gather(output, inputs.value, rows, 16)
        sys.exit("a wrong sum was not found")
    except ArithmeticError:
        pass
from benchmarks.gpu.floors_backward import checked_scatter, scatter
inputs = draw(workload, dtype=torch.float32, uniform=True)
rows = ordered(corner_rows(workload, inputs.sampling_locations * 1.4 - 0.2), "head after head")
for dtype in (torch.float32, torch.bfloat16):
    source = torch.randn(rows.shape[1], 16).to(dtype)
    target = scatter(source, rows, torch.zeros(35 * 8, 16), Launch(4, 1, 4))()
    checked_scatter(target, source, rows)
    for wrong in (target + 0.01, target.roll(1, 0)):
        try:
            checked_scatter(wrong, source, rows)
            sys.exit("a wrong sum was not found")
        except ArithmeticError:
            pass
floors.COPIED_BYTES = 1 << 12
print(copy_rate(Clock(torch.device("cpu"))))
"""


def test_the_floor_kernels_run_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_INTERPRETER], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.gpu import floors, floors_backward
from benchmarks.gpu.kernels import copy_kernel, gather_kernel

target, aligned = GPUTarget("cuda", 90, 32), [["tt.divisibility", 16]]
for pointer, launch in (("*fp32", floors.LAUNCHES[0]), ("*bf16", floors.LAUNCHES[2])):
    types = [pointer, "*i32", pointer, "i32", "i32"]
    constants = {"HEAD_DIM": 32, "BLOCK": launch.block, "AT_ONCE": launch.at_once}
    source = ASTSource(
        gather_kernel,
        dict(zip(gather_kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(place,): aligned for place in range(3)},
    )
    compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps})
    loads = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line]
    assert sum(".v4." in line for line in loads) >= launch.at_once, loads
from benchmarks.gpu.kernels import scatter_kernel
launch = floors_backward.LAUNCHES[0]
for pointer in ("*fp32", "*bf16"):
    types = [pointer, "*i32", "*fp32", "i32", "i32"]
    constants = {"HEAD_DIM": 32, "BLOCK": launch.block, "AT_ONCE": launch.at_once}
    source = ASTSource(
        scatter_kernel,
        dict(zip(scatter_kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(place,): aligned for place in range(3)},
    )
    compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps})
    added = [line for line in compiled.asm["ptx"].splitlines() if "red.global" in line or "atom." in line]
    assert added and all(".v4." in line and "relaxed" in line for line in added), added
signature = {"source": "*fp32", "target": "*fp32", "count": "i32", "BLOCK": "constexpr"}
source = ASTSource(copy_kernel, signature, constexprs={"BLOCK": 1024})
assert "st.global" in triton.compile(source, target=target).asm["ptx"]
"""


def test_the_floor_kernels_compile_for_hopper_with_128_bit_loads():
    pytest.importorskip("triton")
    # In a process of its own: in this one kernels may be those of the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_floors_are_rows_of_the_results(tiny, tmp_path, monkeypatch):
    """With a gather in torch in the place of the kernel."""

    def gather(value, rows, head_dim, launch):
        read = value.view(-1, head_dim)
        return lambda: read[rows.clamp_min(0).long()].masked_fill((rows < 0)[..., None], 0).sum(0)

    def scatter(source, rows, target, launch):
        def call():
            for row in rows:
                looks = row >= 0
                target.index_add_(0, row[looks].long(), source[looks].float())
            return target

        return call

    monkeypatch.setattr(floors, "gather", gather)
    monkeypatch.setattr(floors_backward, "scatter", scatter)
    monkeypatch.setattr(floors_backward, "LAUNCHES", floors_backward.LAUNCHES[:1])
    monkeypatch.setattr(floors, "copy_rate", lambda clock: 1e9)
    monkeypatch.setattr(floors, "LAUNCHES", floors.LAUNCHES[:1])
    results = Results(tmp_path / "gpu.json", {})
    floors.measure_floors(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    rows = json.loads(results.path.read_text())["floors"]
    assert [row["peer"] for row in rows] == [
        *("bytes", "gathers", "scatter", "sort", "bytes", "gathers") * 2
    ]
    assert rows[3]["keys"] == 13 * 2 * 2 * 4  # a key a point
    assert rows[2]["times"].keys() == {COLD, WARM}
    one = rows[0]
    # Read once: at most all rows of 2 levels' 69 cells; points 13 · 2 · 8 · (2 + 1); the output.
    points, output = 13 * 2 * 8 * 3 * 4, 13 * 2 * 8 * 4
    assert points + output < one["bytes"] <= points + output + 69 * 2 * 8 * 4
    assert one["times"][COLD]["median"] == pytest.approx(one["bytes"] / 1e9 * 1e6, rel=1e-3)
    assert rows[1]["times"].keys() == {COLD, WARM}
    monkeypatch.setattr(floors, "gather", lambda v, rows, *_: lambda: torch.zeros(rows.shape[1], 8))
    results = Results(tmp_path / "other.json", {})
    floors.measure_floors(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    assert {row["reason"].split(":")[0] for row in results.rows("left_out")} == {"ArithmeticError"}
