"""What `saccade bench` measures: the cases that were asked for, or the committed plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from saccade.benchmark.operator import Figure, LeftOut, compare, setting_of
from saccade.benchmark.peers import all_peers, default_peers
from saccade.benchmark.workloads import WORKLOADS

# Every position is a query: most of a detector's time, and what 16-bit values are for.
ENCODERS = ("detr-encoder", "dino5-encoder", "mask2former-encoder", "bevformer-tsa")
# Few queries: the cases whose times depend on what the caches hold.
DECODERS = ("detr-decoder", "rtdetr-decoder", "rfdetr-nano")
# The operator on lines and volumes, where few peers can follow: measured apart from the detectors.
FAMILY = ("tadtr-1d", "medical-3d")
# Compiling takes half a minute a case and direction, and what comes out is slower than eager: a large
# case, a small one and lists of points show it.
COMPILED = ("detr-encoder", "detr-decoder", "dfine-decoder")


class Step(NamedTuple):
    """One call of `compare`."""

    workload: str
    peers: Sequence[str]
    dtype: torch.dtype = torch.float32
    uniform: bool = False
    backward: bool = False
    threads: int = 1
    single_call: bool = False
    left_out: Sequence[tuple[str, str]] = ()
    """Peers that this step would have, and why it does not."""


def measure(step: Step, seconds: float) -> list[Figure | LeftOut]:
    """The figures of one step; it sets the number of threads of the process.

    Raises:
        ArithmeticError: a peer's results differ from the truth.
    """
    torch.set_num_threads(step.threads)
    known = all_peers()
    workload = WORKLOADS[step.workload]
    options = {
        name: getattr(step, name) for name in ("dtype", "uniform", "backward", "single_call")
    }
    found = list(
        compare(workload, [known[name] for name in step.peers], seconds=seconds, **options)
    )
    setting = setting_of(workload, **options)
    return found + [LeftOut(setting, peer, reason) for peer, reason in step.left_out]


def chosen_plan(
    cases: Sequence[str],
    peers: Sequence[str],
    *,
    dtypes: Sequence[torch.dtype],
    threads: Sequence[int],
    locations: Sequence[str],
    backward: bool,
    single_call: bool,
) -> list[Step]:
    """Every combination of what was asked for."""
    return [
        Step(case, peers, dtype, kind == "uniform", direction, number, single_call)
        for number in threads
        for dtype in dtypes
        for kind in locations
        for case in cases
        for direction in ([False, True] if backward else [False])
    ]


def committed_plan() -> list[Step]:
    """The figures in benchmarks/results/cpu.json: about twenty minutes on two cores.

    float32 and model-like locations on all threads and on one, uniform locations, bfloat16 for the
    encoders, single calls for the decoders; forward, and forward with backward.
    """
    everyone = default_peers()
    many = torch.get_num_threads()
    compiled, runtime = "torch.compile", "onnxruntime"
    steps = []
    detectors = [name for name in WORKLOADS if name not in FAMILY]
    for name in detectors:
        left = [] if name in COMPILED else [compiled]
        steps += _both(name, everyone, left, threads=many)
    # One thread takes twice as long, and compiled code and ONNX Runtime's say nothing new there.
    for name in detectors if many > 1 else ():
        steps += _both(name, everyone, [compiled, runtime], threads=1)
    for name in detectors:
        steps += _both(name, everyone, [compiled, runtime], threads=many, uniform=True)
    for name in ENCODERS:
        steps += _both(name, everyone, [compiled, runtime], threads=many, dtype=torch.bfloat16)
    # Other instruction sets read the same memory: behind them, nothing would be as others leave it.
    others = [name for name in everyone if not name.startswith("cpu-")]
    for name in DECODERS:
        steps += _both(name, others, [compiled], threads=many, single_call=True)
    return steps


def _both(
    name: str,
    peers: Sequence[str],
    left: Sequence[str],
    *,
    threads: int,
    dtype: torch.dtype = torch.float32,
    uniform: bool = False,
    single_call: bool = False,
) -> list[Step]:
    reason = "not in the committed plan, to keep it short; --case and --peer measure it"
    return [
        Step(
            name,
            [peer for peer in peers if peer not in left],
            dtype,
            uniform,
            backward,
            threads,
            single_call,
            [(peer, reason) for peer in left if all_peers()[peer].missing() is None],
        )
        for backward in (False, True)
    ]
