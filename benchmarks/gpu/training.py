"""A training step of transformers' Deformable DETR, as it comes and after saccade.patch, then many of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import saccade
from benchmarks.gpu.backward import peak_bytes
from benchmarks.gpu.goals import TRAINING_STEPS
from benchmarks.gpu.models import take_hub_kernel
from benchmarks.gpu.results import (
    Deadline,
    OutOfTimeError,
    Results,
    ensure_device,
    memory_given_back,
    reason_of,
)
from benchmarks.gpu.timing import Clock, in_turns
from saccade.benchmark.detectors import DETECTORS

MODEL = "deformable-detr"
BATCH_SIZE, OBJECTS = 4, 10
# As Deformable DETR is trained.
LEARNING_RATE, MOST_NORM = 1e-4, 0.1
QUICK_STEPS, SMALL_STEPS = 20, 3
MOST_SECONDS_OF_TURNS = 20.0
SAVED_EVERY = 20


class Trained:
    """A model with its optimizer; every part that transformers leaves trainable is trained."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model.train(), device
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE)

    def step(self, batch: dict[str, Any]) -> Tensor:
        """One step in bfloat16 autocast; gives the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss: Tensor = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MOST_NORM)
        self.optimizer.step()
        return loss.detach()


def draw_batch(size: tuple[int, int], classes: int, device: torch.device, seed: int) -> Any:
    """Random pictures, and random boxes in them."""
    numbers = torch.Generator().manual_seed(seed)
    boxes = torch.rand(BATCH_SIZE, OBJECTS, 4, generator=numbers)
    boxes = 0.1 + torch.cat((0.8 * boxes[..., :2], 0.3 * boxes[..., 2:]), -1)
    labels = torch.randint(classes, (BATCH_SIZE, OBJECTS), generator=numbers)
    pixels = torch.Generator(device).manual_seed(seed)
    return {
        "pixel_values": torch.randn(BATCH_SIZE, 3, *size, generator=pixels, device=device),
        "labels": [
            {"class_labels": label.to(device), "boxes": box.to(device)}
            for label, box in zip(labels, boxes, strict=True)
        ],
    }


def measure_training(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    seed: int,
    *,
    quick: bool = False,
    small: bool = False,
) -> None:
    """A row under `training`: time and memory of a step first, then whether many steps stay finite."""
    wanted = SMALL_STEPS if small else QUICK_STEPS if quick else TRAINING_STEPS
    rows = results.rows("training")
    if any(not row["reason"] and row["steps"] >= row["steps_wanted"] for row in rows):
        return
    rows.clear()
    results.put("doing", {"key": "training", "name": MODEL})
    row: dict[str, Any] = {"model": MODEL, "reason": "", "steps": 0, "steps_wanted": wanted}
    try:
        deadline.check(2.0)
        with memory_given_back(device):
            trained, batches = _measure(results, row, device, deadline, seed, small)
        with memory_given_back(device):
            _train(results, trained, batches, wanted, deadline)
    except OutOfTimeError:
        raise
    except Exception as error:  # scipy is not here, say, which the loss needs
        row["reason"] = reason_of(error)
        if not rows:
            results.add("training", row)
        else:
            rows[-1]["reason"] = row["reason"]
            results.save()
        ensure_device(device, error)


def _measure(
    results: Results,
    row: dict[str, Any],
    device: torch.device,
    deadline: Deadline,
    seed: int,
    small: bool,
) -> tuple[Trained, Callable[[int], Any]]:
    """Adds the row with time and memory; gives what to go on with."""
    detector, clock = DETECTORS[MODEL], Clock(device)
    size = detector.small_size if small else detector.size
    model: Any = detector.build(small=small).to(device)

    def batches(number: int) -> Any:
        return draw_batch(size, model.config.num_labels, device, seed + number)

    batch = batches(0)
    ours = copy.deepcopy(model)
    saccade.patch(ours)
    before, why = _before(model, batch, device)
    runs = {"before": before, "after": Trained(ours, device)}
    # Each once: the optimizer's memory is there from then on, and compilers have compiled.
    for trained in runs.values():
        if not bool(trained.step(batch).isfinite()):
            raise ArithmeticError("the loss of the first step is not finite")
    peaks = {}
    for key, trained in runs.items():
        trained.optimizer.zero_grad(set_to_none=True)
        peaks[key] = peak_bytes(device, lambda one=trained: one.step(batch))
        trained.optimizer.zero_grad(set_to_none=True)
    timings = in_turns(
        {key: lambda one=one: clock.seconds(lambda: one.step(batch)) for key, one in runs.items()},
        most_seconds=max(1.0, min(MOST_SECONDS_OF_TURNS, deadline.left / 4)),
    )
    results.add(
        "training",
        row
        | {
            "input": f"batch {BATCH_SIZE}, {size[0]} x {size[1]}, bfloat16 autocast, AdamW",
            "against": "the unpatched model" if why else "the model with the hub kernel",
            "why": why,
            "ratio": float(f"{timings['before'].median / timings['after'].median:.4g}"),
            "not_finite_at": None,
        }
        | {key: timings[key]._asdict() | {"peak_bytes": peaks[key]} for key in runs},
    )
    return runs["after"], batches


def _before(model: Any, batch: Any, device: torch.device) -> tuple[Trained, str]:
    """The model with the hub kernel where that trains, else as it comes; and why it is not the former."""
    as_it_comes = copy.deepcopy(model)
    why = take_hub_kernel(model)
    if not why:
        trained = Trained(model, device)
        try:
            trained.step(batch)
            return trained, ""
        except Exception as error:  # no backward, or none in these dtypes
            ensure_device(device, error)
            why = f"the hub kernel does not train: {reason_of(error)}"
    return Trained(as_it_comes, device), why


def _train(
    results: Results,
    trained: Trained,
    batches: Callable[[int], Any],
    wanted: int,
    deadline: Deadline,
) -> None:
    """Steps on a new batch each, until one is not finite or the time is up; the row says how many."""
    row = results.rows("training")[-1]
    try:
        for number in range(1, wanted + 1):
            deadline.check(1.0)
            loss = trained.step(batches(number))
            row["steps"], row["loss"] = number, float(loss)
            finite = bool(loss.isfinite())
            if number == wanted:
                finite = finite and all(bool(one.isfinite().all()) for one in trained.parameters)
            if not finite:
                row["not_finite_at"] = number
                reason = f"not finite at step {number}"
                results.add("checks", {"name": f"training: {MODEL}", "ok": False, "reason": reason})
                return
            if number % SAVED_EVERY == 0:
                results.save()
    finally:
        results.save()
