"""Figures about more than one call: memory, a whole detector, the import, bitwise equal gradients."""

from __future__ import annotations

import statistics
import subprocess
import sys

import torch

import saccade
from saccade.benchmark.operator import grid_sample_call, saccade_call
from saccade.benchmark.timing import alternate
from saccade.benchmark.workloads import WORKLOADS, draw

MEGABYTE = 1e6


def peak_memory() -> dict[str, float]:
    """Extra memory of one forward on detr-encoder beyond its inputs, each in a process of its own."""
    return {
        f"{name}_megabytes": float(
            _run(f"from benchmarks.whole import _peak; print(_peak({name!r}))")
        )
        for name in ("saccade", "grid_sample")
    } | {
        "output_megabytes": 22223 * 256 * 4 / MEGABYTE,
        "value_megabytes": 22223 * 256 * 4 / MEGABYTE,
    }


def _peak(name: str) -> float:
    """Growth of the largest resident memory during the second call (Linux)."""
    workload = WORKLOADS["detr-encoder"]
    torch.set_num_threads(2)
    inputs = draw(workload, dtype=torch.float32, uniform=False)
    attend = {"saccade": saccade_call, "grid_sample": grid_sample_call}[name](workload)
    small = workload._replace(shapes=[(8, 8)] * 4)
    warm = {"saccade": saccade_call, "grid_sample": grid_sample_call}[name](small)
    with torch.no_grad():
        warm(*draw(small, dtype=torch.float32, uniform=False)[:3])  # code and thread pools in place
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
        output = attend(*inputs[:3])
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
    """Output and gradients of detr-encoder on 1 and 2 threads and from run to run."""
    workload = WORKLOADS["detr-encoder"]
    inputs = draw(workload, dtype=torch.float32, uniform=False)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 2, 1):
        torch.set_num_threads(number)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
        output = saccade_call(workload)(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, inputs.grad_output)])
    torch.set_num_threads(threads)
    return all(
        torch.equal(found, expected)
        for other in results[1:]
        for found, expected in zip(other, results[0], strict=True)
    )


def detector(threads: int) -> dict[str, float]:
    """A forward of transformers' Deformable DETR (R50, random weights), unpatched and patched."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            torch.nn.init.normal_(parameter, std=0.02)  # not all queries alike
    picture = torch.randn(1, 3, 800, 1333)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            found = model(picture)
        return [found.logits, found.pred_boxes]

    def patched() -> list[torch.Tensor]:
        saccade.patch(model)
        try:
            return run()
        finally:
            saccade.unpatch(model)

    pairs = list(zip(patched(), run(), strict=True))
    error = max((found - expected).abs().max().item() for found, expected in pairs)
    times = alternate({"patched": patched, "unpatched": run}, seconds=60)
    return {
        "ratio": round(times["unpatched"] / times["patched"], 2),
        "patched_seconds": round(times["patched"] / 1e3, 3),
        "unpatched_seconds": round(times["unpatched"] / 1e3, 3),
        "largest_difference_of_outputs": error,
        "threads": threads,
    }


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]
