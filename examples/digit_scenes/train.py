"""Train the embedded detector from scratch on digit scenes, through Saccade's operator.

    python train.py --output /tmp/digit_scenes_run

The same command goes on after an interruption: it starts from the newest checkpoint in the output folder, and ends with
the same weights as a run that was never interrupted. The trained model is left in ``<output>/model``.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from accelerate.utils import send_to_device
from evaluate import average_precision, detect
from model import new_image_processor, new_model, save_model
from scenes import SCENE_SIZE, coco_dataset, make_scene
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import saccade

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
WARM_UP_STEPS = 200
LAST_LEARNING_RATE = 0.005  # of the highest, at the end of the cosine
GRADIENT_CLIP = 1.0
AVERAGE_DECAY = 0.998  # of the running average of the weights that is evaluated and shipped
OTHER_SHAPES = 0.3  # share of the batches that are not square, so that other pictures are not strange to the model
LONGEST_SIDE = 240
LOG_EVERY = 50
VALIDATION_SCENES = 64
VALIDATION_SEED = 1_000_003  # a stream of training scenes that training never sees: the held-out set stays untouched


Batch = tuple[torch.Tensor, list[dict[str, torch.Tensor]]]


class SceneBatches(IterableDataset):
    """Batches of training scenes, drawn on the fly; batch ``n`` is the same in every run with the same seed."""

    def __init__(self, first: int, stop: int, batch_size: int, seed: int) -> None:
        self.first, self.stop, self.batch_size, self.seed = first, stop, batch_size, seed
        self.processor = new_image_processor()

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(self.first + offset, self.stop, stride):
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        """Return batch ``number``: pixel values and labels. Its scenes have one shape: no padding."""
        size = self._size(number)
        indices = range(number * self.batch_size, (number + 1) * self.batch_size)
        pictures, annotations = [], []
        for index in indices:
            picture, digits = make_scene("train", index, self.seed, size)
            pictures.append(picture)
            annotations.append({"image_id": index, "annotations": digits})
        inputs = self.processor(pictures, annotations, do_resize=False, return_tensors="pt")
        labels = [
            {"class_labels": label["class_labels"], "boxes": label["boxes"]}
            for label in inputs["labels"]
        ]
        return inputs["pixel_values"], labels

    def _size(self, number: int) -> tuple[int, int]:
        rng = np.random.default_rng([self.seed, number])
        if rng.random() >= OTHER_SHAPES:
            return SCENE_SIZE
        size = (
            SCENE_SIZE[0],
            16 * int(rng.integers(SCENE_SIZE[1] // 16 + 1, LONGEST_SIDE // 16 + 1)),
        )
        return size if rng.random() < 0.5 else size[::-1]


class WeightAverage:
    """A copy of a model that holds the running average of its weights and batch statistics."""

    def __init__(self, model: nn.Module, decay: float = AVERAGE_DECAY) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model: faster in the first updates, which start far from the goal."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average, current = _tensors(self.model), _tensors(model)
        torch._foreach_lerp_(average, current, 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and the floating-point buffers of a model, shared ones once."""
    return [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as for Deformable DETR: sampling positions learn slowly, vectors do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        slow = "sampling_offsets" in name or "reference_points" in name
        groups.setdefault((slow, parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": LEARNING_RATE * (0.1 if slow else 1.0),
                "weight_decay": WEIGHT_DECAY if decays else 0.0,
            }
            for (slow, decays), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: a linear warm-up, then half a cosine."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return LAST_LEARNING_RATE + (1.0 - LAST_LEARNING_RATE) * cosine


def save_checkpoint(accelerator: Accelerator, output: Path, step: int) -> None:
    """Save everything that the next step depends on. An interruption while saving leaves the last checkpoint whole."""
    partial, checkpoint = output / "checkpoint.partial", output / f"checkpoint-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    accelerator.save_state(str(partial), safe_serialization=False)
    older = list(output.glob("checkpoint-*"))
    partial.rename(checkpoint)
    for folder in older:
        shutil.rmtree(folder)


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the newest checkpoint of the output folder; return the number of steps done, 0 without a checkpoint."""
    checkpoints = sorted(output.glob("checkpoint-*"))
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    return int(checkpoints[-1].name.rpartition("-")[2])


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a run beside its checkpoints, and refuse to go on with other ones."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        raise typer.BadParameter(
            f"{output} holds a run with {before}, not {settings}: another --output?"
        )
    path.write_text(json.dumps(settings))


def validate(model: nn.Module, processor: Any) -> str:
    """Return the average precision on training scenes that training never sees, as text."""
    dataset, pictures = coco_dataset("train", VALIDATION_SCENES, VALIDATION_SEED)
    figures = average_precision(dataset, detect(model, processor, pictures))
    return "  ".join(f"{name} {figures[name]:.3f}" for name in ("AP", "AP50", "AP75"))


def main(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")],
    steps: Annotated[int, typer.Option(help="Training steps in all.")] = 8000,
    batch_size: Annotated[int, typer.Option(help="Scenes a step.")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads for PyTorch; 0: its choice.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the scenes.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    validate_every: Annotated[int, typer.Option(help="Steps between figures of AP.")] = 500,
) -> None:
    """Train the embedded detector; go on from the newest checkpoint where the output has one."""
    if threads:
        torch.set_num_threads(threads)
    check_settings(output, {"steps": steps, "batch_size": batch_size, "seed": seed})
    torch.manual_seed(seed)
    accelerator = Accelerator()
    model = new_model().to(memory_format=torch.channels_last)  # convolutions on CPUs: 15 % faster
    saccade.patch(model)
    average = WeightAverage(model.to(accelerator.device))
    optimizer = new_optimizer(model)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.register_for_checkpointing(average)
    done = resume(accelerator, output)
    print(f"from step {done} to {steps}: {output}", flush=True)

    data = SceneBatches(done, steps, batch_size, seed)
    loader = DataLoader(data, None, num_workers=workers, prefetch_factor=4 if workers else None)
    model.train()
    losses: list[float] = []
    seconds, mark = 0.0, time.perf_counter()
    for step, batch in enumerate(loader, done + 1):
        pixel_values, labels = send_to_device(batch, accelerator.device)
        loss = model(pixel_values.contiguous(memory_format=torch.channels_last), labels=labels).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update(accelerator.unwrap_model(model))
        losses.append(loss.item())
        seconds += (
            time.perf_counter() - mark
        )  # the wait for the batch is in it, what follows is not
        last = step == steps
        if step % LOG_EVERY == 0 or last:
            count = len(losses)
            print(
                f"step {step}/{steps}  loss {sum(losses) / count:.3f}  {seconds / count:.3f} s/step",
                flush=True,
            )
            losses, seconds = [], 0.0
        if step % validate_every == 0 or last:
            print(f"step {step}/{steps}  {validate(average.model, data.processor)}", flush=True)
        if step % checkpoint_every == 0 or last:
            save_checkpoint(accelerator, output, step)
        mark = time.perf_counter()
    config = copy.deepcopy(accelerator.unwrap_model(model).config)
    save_model(average.model.state_dict(), config, output / "model")
    print(f"model: {output / 'model'}")


if __name__ == "__main__":
    typer.run(main)
