"""The GPU kernels compiled for sm_90 on any machine: what they are made of stays within bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WITH_TRITON

ROOT = Path(__file__).resolve().parent.parent
pytestmark = WITH_TRITON

# Warp instructions for a corner of a sample and registers, as read with the Triton that the tests
# install, and a little room. Fewer is a reason to lower them. (case, points, dtype, how the gradient of
# the value is summed up or "no" for the forward, kernel)
BOUNDS = {
    ("detr-encoder", "given", "fp32", "no", "attend_queries"): (4.0, 72),
    ("detr-encoder", "given", "bf16", "no", "attend_queries"): (3.7, 88),
    ("detr-encoder", "points", "fp32", "no", "attend_queries"): (4.5, 80),
    ("detr-encoder", "points", "bf16", "no", "attend_queries"): (4.0, 96),
    # More points than are gone through at once by the softmax.
    ("dino5-encoder", "points", "fp32", "no", "attend_queries"): (4.5, 80),
    ("dino5-encoder", "points", "bf16", "no", "attend_queries"): (4.0, 104),
    ("detr-decoder", "given", "fp32", "no", "attend_points"): (5.5, 176),
    ("detr-decoder", "given", "bf16", "no", "attend_points"): (6.3, 96),
    ("detr-decoder", "points", "fp32", "no", "attend_points"): (7.0, 176),
    ("detr-decoder", "points", "bf16", "no", "attend_points"): (7.8, 96),
    ("detr-encoder", "given", "fp32", "add", "differentiate_queries"): (8.9, 88),
    ("detr-encoder", "given", "bf16", "add", "differentiate_queries"): (9.3, 110),
    ("detr-encoder", "points", "fp32", "add", "differentiate_queries"): (11.2, 112),
    ("detr-encoder", "points", "bf16", "add", "differentiate_queries"): (10.4, 126),
    ("detr-encoder", "given", "fp32", "sort", "differentiate_queries"): (7.8, 86),
    ("detr-encoder", "given", "bf16", "sort", "differentiate_queries"): (5.5, 96),
    ("detr-encoder", "points", "fp32", "sort", "differentiate_queries"): (9.3, 100),
    ("detr-encoder", "points", "bf16", "sort", "differentiate_queries"): (6.8, 128),
    ("detr-encoder", "given", "fp32", "sort", "sum_pieces"): (3.8, 50),
    ("detr-encoder", "given", "fp32", "sort", "sum_rows"): (3.7, 54),
    ("detr-decoder", "given", "fp32", "add", "differentiate_points"): (12.4, 150),
    ("detr-decoder", "points", "bf16", "add", "differentiate_points"): (14.6, 160),
}


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
    """In a process of its own: here the kernels are those of the interpreter."""
    output = tmp_path_factory.mktemp("compiled") / "readings.json"
    command = [sys.executable, "-m", "benchmarks.gpu.compile", "--output", str(output)]
    for case in sorted({key[0] for key in BOUNDS}):
        command += ["--case", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["readings"]
    keys = ("case", "points", "dtype", "value_gradient", "kernel")
    return {tuple(row[key] for key in keys): row for row in found}


@pytest.mark.parametrize("key", BOUNDS, ids="-".join)
def test_instructions_registers_and_spills(readings, key):
    row, (per_corner, registers) = readings[key], BOUNDS[key]
    *_, summed, kernel = key
    assert row["spills"] == 0
    assert row["registers"] <= registers
    assert 0.7 * per_corner <= row["per_sample"] / 4 <= per_corner
    # Four numbers with each atomic addition; in order, none.
    assert row["widest_addition"] == (4 if summed == "add" else 0)
    if not kernel.startswith("sum"):
        # Rows are read 16 bytes at a time.
        assert row["widest_value_load"] == 128


def test_the_machine_code_rounds_positions_twice():
    run(ROUNDED_TWICE)


def test_threads_wait_before_they_read_what_others_stored():
    run(WAITED)


def test_one_kernel_for_all_resolutions_and_numbers_of_queries():
    run(ONE_KERNEL)


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# x * width - 0.5: a product, then a sum of it and -0.5. Fused, -0.5 would be an addend.
ROUNDED_TWICE = """
import torch
from benchmarks.gpu import compile
from saccade.backends.triton import launch
for case in ("detr-encoder", "detr-decoder"):
    found = launch.plan(compile.call_of(compile.WORKLOADS[case], torch.float32))
    assert found.prepared.constants["enable_fp_fusion"] is False
    code = compile.machine_code(compile.forward_kernel(found, torch.float32, torch.float32))
    halves = [line for line in code if "-0.5" in line]
    assert halves, "the shift by half a pixel is not found"
    assert not any("FFMA" in line for line in halves), halves
"""

# Between the last store of a gradient of a weight and the first load for those of the logits.
WAITED = """
import re, torch
from benchmarks.gpu import compile
for gradient in ("add", "sort"):
    kernel = compile.kernels_of(compile.WORKLOADS["detr-encoder"], torch.float32, "points", gradient)[0]
    code = compile.machine_code(kernel)
    stores = [place for place, line in enumerate(code) if re.search(r"\\bSTG", line)]
    barriers = [place for place, line in enumerate(code) if "BAR.SYNC" in line]
    # The last store is that of the logits; the loads before it come after a barrier, and those are
    # loads that see what has been stored: not of constant memory.
    last = max(place for place in barriers if any(store < place for store in stores))
    loads = [line for line in code[last:] if re.search(r"\\bLDG", line)]
    assert len(loads) >= 2, code[last:]
    assert not any("CONSTANT" in line for line in loads), loads
    assert any(store > last for store in stores)
    before = [store for store in stores if store < last]
    assert before, stores
"""

# What Triton makes a kernel of its own for: types, and numbers that are 1 or multiples of 16.
ONE_KERNEL = """
import torch
from benchmarks.gpu import compile
from saccade.backends.triton import launch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
found = set()
workload = compile.WORKLOADS["detr-encoder"]
for shapes, queries, batch_size in (
    ([(100, 167), (50, 84), (25, 42), (13, 21)], 22223, 1),
    ([(64, 64), (32, 32), (16, 16), (8, 8)], 9600, 16),
    ([(17, 1), (9, 1), (5, 1), (1, 1)], 9001, 3),
):
    sizes = {"shapes": shapes, "num_queries": queries, "batch_size": batch_size}
    plan = launch.plan(compile.call_of(workload._replace(**sizes), torch.bfloat16))
    kernel, launched = plan.prepared.kernel, plan.launches[0]
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(compile.TARGET)
    )
    options = {"num_warps", "num_stages", "enable_fp_fusion"}
    constants = plan.prepared.constants
    constants = {name: constants[name] for name in constants if name not in options}
    tensors = [torch.empty(1)] * 5
    _, specialized, _ = bind(
        *tensors, plan.sizes, *launched[1:3], plan.num_positions, *launched[3:], **constants
    )
    found.add(str(specialized))
assert len(found) == 1, found
"""
