"""Writes the figures of the README: `python -m benchmarks` (about ten minutes, a quiet machine).

The operator against the grid_sample path, peak memory, a whole detector, the import: each printed
and kept in benchmarks/results/, with the machine, the versions and the command.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch

from benchmarks.whole import detector, gradients_are_bitwise_equal, import_time, peak_memory
from saccade.benchmark.operator import compare
from saccade.benchmark.timing import machine
from saccade.benchmark.workloads import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"


def operator_figures(threads: int) -> list[dict[str, object]]:
    """Every workload in float32; bfloat16 and uniform locations where most of the time is spent."""
    torch.set_num_threads(threads)
    figures = []
    plan = [(workload, torch.float32, False) for workload in WORKLOADS.values()]
    for name in ("detr-encoder", "detr-decoder"):
        plan += [(WORKLOADS[name], torch.float32, True), (WORKLOADS[name], torch.bfloat16, False)]
    for workload, dtype, uniform in plan:
        for figure in compare(workload, dtype=dtype, uniform=uniform, seconds=2.0):
            print(
                f"{figure.ratio:7.1f} x  {figure.workload:20} {figure.direction:19}"
                f" {figure.locations:10} {figure.dtype:8} {figure.threads} threads"
                f"  {figure.saccade_ms:9.3f} ms against {figure.grid_sample_ms:9.3f} ms",
                flush=True,
            )
            figures.append(figure._asdict())
    return figures


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "foundation.json")
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "command": f"python -m benchmarks --threads {arguments.threads}",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
    }
    for name, measure in (
        ("import", import_time),
        ("peak_memory_detr_encoder_forward", peak_memory),
        ("gradients_bitwise_equal", gradients_are_bitwise_equal),
        ("operator", lambda: operator_figures(arguments.threads)),
        ("deformable_detr_800x1333_forward", lambda: detector(arguments.threads)),
    ):
        results[name] = measure()
        if name != "operator":
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
