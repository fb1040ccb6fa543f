"""What `saccade bench` does not measure: `python -m benchmarks.whole` (a minute).

Peak memory, the import, small calls, and whether gradients are bitwise equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import saccade
from benchmarks.results_file import RESULTS, write_results
from saccade.bench.operator import BASELINES, WORKLOADS, Function, Workload, draw
from saccade.call import parse_call
from saccade.ops.schema import to_arguments
from saccade.sampling import sampling_locations

MEGABYTE = 1e6


def peak_memory() -> dict[str, float]:
    """Extra memory of one forward on detr-encoder beyond its inputs, each in a process of its own."""
    return {
        f"{name}_megabytes": float(
            _run(f"from benchmarks.whole import _peak; print(_peak({name!r}))")
        )
        for name in _CALLS
    } | {
        "output_megabytes": 22223 * 256 * 4 / MEGABYTE,
        "value_megabytes": 22223 * 256 * 4 / MEGABYTE,
    }


def _fused_call(workload: Workload) -> Function:
    """Takes the offsets in the place of locations, the logits in that of weights."""

    def run(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        centre = torch.full((*offsets.shape[:2], 1, 2), 0.5)
        return saccade.fused_deformable_attention(
            value, workload.shapes, centre, offsets, logits, num_points=workload.points
        )

    return run


def _unfused_call(workload: Workload) -> Function:
    """The same with locations and weights in memory."""

    def run(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        centre = torch.full((*offsets.shape[:2], 1, 2), 0.5)
        shapes, points = workload.shapes, workload.points
        locations = sampling_locations(centre, offsets, shapes, points)
        return saccade.deformable_attention(
            value, shapes, locations, logits.softmax(-1), num_points=points
        )

    return run


_CALLS: dict[str, Callable[[Workload], Function]] = {
    "saccade": BASELINES["saccade"].prepare,
    "grid_sample": BASELINES["grid_sample"].prepare,
    "fused": _fused_call,
    "unfused": _unfused_call,
}


def _peak(name: str) -> float:
    """Growth of the largest resident memory during the second call (Linux)."""
    workload = WORKLOADS["detr-encoder"]
    torch.set_num_threads(2)
    inputs = draw(workload, dtype=torch.float32)
    call = _CALLS[name](workload)
    small = workload._replace(shapes=[(8, 8)] * 4)
    with torch.no_grad():
        # Code and thread pools in place.
        _CALLS[name](small)(*draw(small, dtype=torch.float32)[:3])
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
        output = call(*inputs[:3])
    assert output.shape == (1, 22223, 256)
    return round((_status("VmHWM") - before) * 1024 / MEGABYTE, 1)


def _status(field: str) -> int:
    """Kilobytes of one line of /proc/self/status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


def import_time() -> dict[str, float]:
    """Seconds that `import saccade` takes beyond `import torch`, median of nine processes."""
    code = """
import time, torch
begin = time.perf_counter()
import saccade
print(time.perf_counter() - begin)
"""
    return {
        "seconds_beyond_torch": round(statistics.median(float(_run(code)) for _ in range(9)), 4)
    }


def gradients_are_bitwise_equal() -> bool:
    """Output and gradients on 1, 2 and 16 threads and from run to run.

    An encoder, and two cases in which 16 threads have to share a head's gradient of the value.
    """
    threads = torch.get_num_threads()
    equal = True
    for name in ("detr-encoder", "rtdetr-decoder", "plain-single-map"):
        workload = WORKLOADS[name]
        inputs = draw(workload, dtype=torch.float32)
        results = []
        for number in (1, 2, 2, 16):
            torch.set_num_threads(number)
            leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
            output = BASELINES["saccade"].prepare(workload)(*leaves)
            results.append([output, *torch.autograd.grad(output, leaves, inputs.grad_output)])
        equal = equal and all(
            torch.equal(tensor, expected)
            for other in results[1:]
            for tensor, expected in zip(other, results[0], strict=True)
        )
    torch.set_num_threads(threads)
    return equal


def small_calls() -> dict[str, dict[str, float]]:
    """Microseconds of a call with 16 elements on one thread, the least of the repeats.

    The operator and the public function where no gradient is needed, and a multiplication beside them:
    what lies beyond it is the price of the call.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    value, locations, weights = (
        torch.rand(1, 4, 1, 4),
        torch.rand(1, 2, 1, 1, 2),
        torch.rand(1, 2, 1, 1),
    )
    sixteen = torch.rand(16)
    arguments = to_arguments(parse_call(value, [(2, 2)], locations, weights, num_points=1))
    functions = {
        "aten::mul": lambda: torch.ops.aten.mul.Tensor(sixteen, sixteen),
        "operator": lambda: torch.ops.saccade.deformable_attention.default(*arguments),
        "function": lambda: saccade.deformable_attention(
            value, [(2, 2)], locations, weights, num_points=1
        ),
    }
    microseconds = {}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            microseconds[mode.__name__] = {
                name: round(min(timeit.repeat(call, number=3000, repeat=9)) / 3000 * 1e6, 2)
                for name, call in functions.items()
            }
    torch.set_num_threads(threads)
    return microseconds


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


MEASURES: dict[str, Callable[[], object]] = {
    "import": import_time,
    "peak_memory_detr_encoder_forward": peak_memory,
    "gradients_bitwise_equal": gradients_are_bitwise_equal,
    "small_call_microseconds": small_calls,
}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS / "whole.json")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.only or MEASURES:
        results[name] = MEASURES[name]()
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    write_results(arguments.output, "python -m benchmarks.whole", results)


if __name__ == "__main__":
    main()
