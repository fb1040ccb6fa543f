"""Whole transformers models with random weights on the GPU: as they come, and after saccade.patch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from benchmarks.gpu.results import Deadline, Results, ensure_device, memory_given_back, reason_of
from benchmarks.gpu.timing import Clock, in_turns
from saccade.benchmark.detectors import DETECTORS
from saccade.benchmark.models import _compare
from saccade.integrations.kernels import LAYER

MODELS = ("deformable-detr", "mask2former", "grounding-dino")
MODES = ("eager", "compiled")
DTYPES = {"eager": (torch.float32, torch.bfloat16), "compiled": (torch.float32,)}


def take_hub_kernel(model: Any) -> str:
    """Puts the hub kernel into a model where that can be had.

    Returns:
        str: "" when some module now runs it, else why none does.
    """
    try:
        model.set_use_kernels(True)
    except Exception as error:  # not installed, not in the cache, another version
        return reason_of(error)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if type(module).__name__ == LAYER and forward is not None:
            if getattr(forward, "__func__", forward) is not type(module).forward:
                return ""
            return "kernels fell back to the model's own forward"
    return "the model has no module that the hub has a kernel for"


def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a forward."""
    with torch.no_grad():
        return [tensor.float() for tensor in model(**inputs).values() if isinstance(tensor, Tensor)]


def measure_model(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    name: str,
    mode: str,
    *,
    small: bool = False,
) -> None:
    """One model in one mode; a row for each dtype under `models`, with the reason where it fails."""
    clock = Clock(device)
    results.put("doing", {"key": "models", "name": f"{name}, {mode}"})
    for dtype in DTYPES[mode]:
        row: dict[str, Any] = {"model": name, "mode": mode, "dtype": str(dtype)[6:], "reason": ""}
        try:
            deadline.check(2.0)
            with memory_given_back(device):
                row |= _measured(clock, name, mode, dtype, deadline, small)
        except Exception as error:
            row["reason"] = reason_of(error)
            results.add("models", row)
            ensure_device(device, error)
            continue
        results.add("models", row)


def _measured(
    clock: Clock, name: str, mode: str, dtype: torch.dtype, deadline: Deadline, small: bool
) -> dict[str, Any]:
    detector = DETECTORS[name]
    model = detector.build(small=small).to(clock.device, dtype)
    inputs = {
        key: tensor.to(clock.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in detector.inputs(small=small).items()
    }
    ours = copy.deepcopy(model)
    saccade.patch(ours)
    why = take_hub_kernel(model)
    found: dict[str, Any] = {
        "input": detector.input,
        "against": "the unpatched model" if why else "the model with the hub kernel",
        "why": why,
    }
    expected, got = outputs_of(model, inputs), outputs_of(ours, inputs)
    try:
        found["difference"] = float(f"{_compare(name, got, expected):.2g}")
    except ArithmeticError as error:  # in 16 bits the two round differently, and rows change places
        found["difference"] = None
        found["note"] = str(error)
    runs: dict[str, Callable[[], object]] = {}
    for key, one in (("before", model), ("after", ours)):
        if mode == "compiled":
            torch._dynamo.reset()
            one = torch.compile(one, dynamic=False)
            for _ in range(2):  # compiles
                outputs_of(one, inputs)
        runs[key] = lambda one=one: outputs_of(one, inputs)
    timings = in_turns(
        {key: lambda run=run: clock.seconds(run) for key, run in runs.items()},
        most_seconds=max(1.0, min(6.0, deadline.left - 1)),
    )
    before, after = (timings[key] for key in ("before", "after"))
    return found | {
        "ratio": float(f"{before.median / after.median:.4g}"),
        "before": before._asdict(),
        "after": after._asdict(),
    }
