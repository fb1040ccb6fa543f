"""The GPU kernels compiled for sm_90 on any machine: what they are made of stays within bounds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WITH_TRITON
from helpers import some

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [*WITH_TRITON, pytest.mark.slow]

# Warp instructions for a corner of a sample and registers, as read with the Triton that the tests
# install, and a little room. Fewer is a reason to lower them. (workload, what locations start from, with
# a softmax for all but "none", dtype, how the gradient of the value is summed up, kernel)
BOUNDS = {
    ("detr-encoder", "none", "fp32", "none", "forward_queries_kernel"): (4.0, 72),
    ("detr-encoder", "none", "bf16", "none", "forward_queries_kernel"): (3.7, 88),
    ("detr-encoder", "points", "fp32", "none", "forward_queries_kernel"): (4.5, 80),
    ("detr-encoder", "points", "bf16", "none", "forward_queries_kernel"): (4.0, 96),
    # More points than are gone through at once by the softmax.
    ("dino5-encoder", "points", "fp32", "none", "forward_queries_kernel"): (4.5, 80),
    ("dino5-encoder", "points", "bf16", "none", "forward_queries_kernel"): (4.0, 104),
    ("detr-decoder", "none", "fp32", "none", "forward_points_kernel"): (5.5, 176),
    ("detr-decoder", "none", "bf16", "none", "forward_points_kernel"): (6.3, 96),
    ("detr-decoder", "points", "fp32", "none", "forward_points_kernel"): (7.0, 176),
    ("detr-decoder", "points", "bf16", "none", "forward_points_kernel"): (7.8, 96),
    ("detr-encoder", "none", "fp32", "atomic", "backward_queries_kernel"): (8.9, 88),
    ("detr-encoder", "none", "bf16", "atomic", "backward_queries_kernel"): (9.3, 110),
    ("detr-encoder", "points", "fp32", "atomic", "backward_queries_kernel"): (11.2, 112),
    ("detr-encoder", "points", "bf16", "atomic", "backward_queries_kernel"): (10.4, 126),
    ("detr-encoder", "none", "fp32", "sorted", "backward_queries_kernel"): (7.8, 86),
    ("detr-encoder", "none", "bf16", "sorted", "backward_queries_kernel"): (5.5, 96),
    ("detr-encoder", "points", "fp32", "sorted", "backward_queries_kernel"): (9.3, 100),
    ("detr-encoder", "points", "bf16", "sorted", "backward_queries_kernel"): (6.8, 128),
    ("detr-encoder", "none", "fp32", "sorted", "sum_pieces_kernel"): (3.8, 50),
    ("detr-encoder", "none", "fp32", "sorted", "sum_rows_kernel"): (3.7, 54),
    ("detr-decoder", "none", "fp32", "atomic", "backward_points_kernel"): (12.4, 150),
    ("detr-decoder", "points", "bf16", "atomic", "backward_points_kernel"): (14.6, 160),
}


# What the tests below read in the machine code, and a draw of the others.
ROUNDED = [
    ("detr-encoder", "none", "fp32", "none", "forward_queries_kernel"),
    ("detr-decoder", "none", "fp32", "none", "forward_points_kernel"),
]
WAITED = [
    ("detr-encoder", "points", "fp32", "atomic", "backward_queries_kernel"),
    ("detr-encoder", "points", "fp32", "sorted", "backward_queries_kernel"),
]
KEYS = list(dict.fromkeys([*ROUNDED, *WAITED, *some(BOUNDS, 4)]))

# In a process of its own: here the kernels are those of the interpreter. Each is compiled once.
COMPILE = """
import json, sys
import torch
from benchmarks.gpu import compile
dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
for key in json.loads(sys.argv[1]):
    workload, reference, dtype, grad_value, kernel = key
    call = compile.make_call(compile.WORKLOADS[workload], dtypes[dtype], reference)
    for source in compile.make_sources(call, grad_value):
        if source.kernel.name == kernel:
            print(json.dumps([key, {
                **compile.read(source)._asdict(),
                "fp_fusion": source.kernel.options["enable_fp_fusion"],
                "code": compile.machine_code(source),
            }]))
"""


@pytest.fixture(scope="module")
def readings():
    lines = run(COMPILE, json.dumps(KEYS)).splitlines()
    return {tuple(key): reading for key, reading in map(json.loads, lines)}


def run(code, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_instructions_registers_and_spills(readings, key):
    row, (per_corner, registers) = readings[key], BOUNDS[key]
    *_, grad_value, kernel = key
    assert row["spills"] == 0
    assert row["registers"] <= registers
    assert 0.7 * per_corner <= row["per_sample"] / 4 <= per_corner
    # Four elements with each atomic addition; in order, none.
    assert row["widest_addition"] == (4 if grad_value == "atomic" else 0)
    if not kernel.startswith("sum"):
        # Rows are read 16 bytes at a time.
        assert row["widest_value_load"] == 128


@pytest.mark.parametrize("key", ROUNDED, ids="-".join)
def test_the_machine_code_rounds_positions_twice(readings, key):
    # x * width - 0.5: a product, then a sum of it and -0.5. Fused, -0.5 would be an addend.
    assert readings[key]["fp_fusion"] is False
    halves = [line for line in readings[key]["code"] if "-0.5" in line]
    assert halves, "the shift by half a pixel is not found"
    assert not any("FFMA" in line for line in halves), halves


@pytest.mark.parametrize("key", WAITED, ids="-".join)
def test_threads_wait_before_they_read_what_others_stored(readings, key):
    # Between the last store of a gradient of a weight and the first load for those of the logits.
    code = readings[key]["code"]
    stores = [index for index, line in enumerate(code) if re.search(r"\bSTG", line)]
    barriers = [index for index, line in enumerate(code) if "BAR.SYNC" in line]
    # The last store is that of the logits; the loads before it come after a barrier, and those are
    # loads that see what has been stored: not of constant memory.
    last = max(index for index in barriers if any(store < index for store in stores))
    loads = [line for line in code[last:] if re.search(r"\bLDG", line)]
    assert len(loads) >= 2, code[last:]
    assert not any("CONSTANT" in line for line in loads), loads
    assert any(store > last for store in stores)
    assert any(store < last for store in stores)


def test_one_kernel_for_all_resolutions_and_numbers_of_queries():
    run(ONE_KERNEL)


# What Triton compiles another kernel for: types, constants, and numbers that are 1 or multiples of 16.
ONE_KERNEL = """
import torch
from benchmarks.gpu import compile
from saccade.backends.triton import forward_plan
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature
keys, known = set(), {}

def add_key(**sizes):
    plan = forward_plan(
        compile.make_call(workload._replace(**sizes), torch.bfloat16, "points")
    )
    function, launch = plan.kernel.function, plan.launches[0]
    bind = create_function_from_signature(
        function.signature, function.params, make_backend(compile.TARGET)
    )
    scalars = launch.scalars(plan.num_positions)
    tensors = [torch.empty(1)] * 5
    _, specialized, _ = bind(*tensors, plan.sizes, *scalars, C=plan.kernel.constants)
    keys.add(compute_cache_key(known, specialized, {}))

workload = compile.WORKLOADS["detr-encoder"]
for shapes, queries, batch_size in (
    ([(100, 167), (50, 84), (25, 42), (13, 21)], 22223, 1),
    ([(64, 64), (32, 32), (16, 16), (8, 8)], 9600, 16),
    ([(17, 1), (9, 1), (5, 1), (1, 1)], 9001, 3),
):
    add_key(shapes=shapes, num_queries=queries, batch_size=batch_size)
assert len(keys) == 1, keys
# Other constants are another kernel.
add_key(num_points=[4, 4, 4, 5])
assert len(keys) == 2, keys
"""
