"""Trains the embedded detector from scratch on digit scenes, through Saccade's operator.

    python train.py --output runs/default

The same command goes on after an interruption: it starts from the newest checkpoint in the output
folder, and ends with the same weights, bit for bit, as a run that was never interrupted. The
trained model is left in `<output>/model`.
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
from transformers.utils import logging

import saccade
from saccade.terminal import MAX_THREADS

LEARNING_RATE = 2e-3
LAST_LEARNING_RATE = 0.005  # share of it at the end of the cosine
WARM_UP_STEPS = 200
WEIGHT_DECAY = 1e-4
GRADIENT_CLIP = 1.0
AVERAGE_DECAY = 0.998  # of the running average of the weights, which is validated and shipped
OTHER_SHAPES = 0.3  # share of the batches that are not square: few images of users are
LONGEST_SIDE = 240
LOG_EVERY = 50
VALIDATION_SCENES = 64
VALIDATION_SEED = 1_000_003  # training scenes that training never sees; the held-out set waits

Batch = tuple[torch.Tensor, list[dict[str, torch.Tensor]]]


class SceneBatches(IterableDataset):
    """Batches of training scenes, drawn on the fly; a batch depends on its number and the seed.

    Args:
        first: number of the first batch; a resumed training skips those done without drawing them.
        stop: number after the last batch.
        batch_size: scenes in a batch.
        seed: another seed gives other scenes.
    """

    def __init__(self, first: int, stop: int, batch_size: int, seed: int) -> None:
        self.first, self.stop, self.batch_size, self.seed = first, stop, batch_size, seed
        self.processor = new_image_processor()

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(self.first + offset, self.stop, stride):
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        """Returns pixel values and labels of a batch. Its scenes have one shape: no padding."""
        size = self._size(number)
        images, annotations = [], []
        for index in range(number * self.batch_size, (number + 1) * self.batch_size):
            image, digits = make_scene("train", index, self.seed, size)
            images.append(image)
            annotations.append({"image_id": index, "annotations": digits})
        inputs = self.processor(images, annotations, do_resize=False, return_tensors="pt")
        labels = [{k: v[k] for k in ("class_labels", "boxes")} for v in inputs["labels"]]
        return inputs["pixel_values"], labels

    def _size(self, number: int) -> tuple[int, int]:
        rng = np.random.default_rng([self.seed, number])
        if rng.random() >= OTHER_SHAPES:
            return SCENE_SIZE
        shorter = SCENE_SIZE[0]
        longer = 16 * int(rng.integers(shorter // 16 + 1, LONGEST_SIDE // 16 + 1))
        return (shorter, longer) if rng.random() < 0.5 else (longer, shorter)


class WeightAverage:
    """A copy of a model that holds the running average of its weights and batch statistics."""

    def __init__(self, model: nn.Module, decay: float = AVERAGE_DECAY) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model: faster at first, when it starts far from the goal."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(_tensors(self.model), _tensors(model), 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Returns parameters and floating-point buffers, shared ones once."""
    return [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW as for Deformable DETR: sampling positions learn slowly, vectors stay large."""
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
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Returns the share of the highest learning rate: a linear warm-up, then half a cosine."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return LAST_LEARNING_RATE + (1.0 - LAST_LEARNING_RATE) * cosine


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings of a run beside its checkpoints, and refuses to go on with other ones."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        raise typer.BadParameter(f"{output} holds a run with {before}, not {settings}")
    path.write_text(json.dumps(settings))


def save_checkpoint(accelerator: Accelerator, output: Path, step: int) -> None:
    """Saves all that the next step depends on; an interruption here spares the last checkpoint."""
    partial, checkpoint = output / "checkpoint.partial", output / f"checkpoint-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    # Not as safetensors, which would drop the weights that the heads share, and warn each time.
    accelerator.save_state(str(partial), safe_serialization=False)
    older = [folder for folder in output.glob("checkpoint-*") if folder != checkpoint]
    partial.rename(checkpoint)
    for folder in older:
        shutil.rmtree(folder)


def resume(accelerator: Accelerator, output: Path) -> int:
    """Loads the newest checkpoint of a folder; returns the steps done, 0 without a checkpoint."""
    checkpoints = sorted(output.glob("checkpoint-*"))
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    return int(checkpoints[-1].name.rpartition("-")[2])


def validate(model: nn.Module, processor: Any) -> str:
    """Returns the average precision on training scenes that training never sees, as text."""
    dataset, images = coco_dataset("train", VALIDATION_SCENES, VALIDATION_SEED)
    metrics = average_precision(dataset, detect(model, processor, images))
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def main(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")],
    steps: Annotated[int, typer.Option(help="Training steps in all.")] = 6500,
    batch_size: Annotated[int, typer.Option(help="Scenes a step.")] = 16,
    threads: Annotated[
        int, typer.Option(min=0, max=MAX_THREADS, help="CPU threads for PyTorch; 0: its choice.")
    ] = 0,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the scenes.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 500,
) -> None:
    """Trains the embedded detector; goes on from the newest checkpoint where there is one."""
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    check_settings(output, {"steps": steps, "batch_size": batch_size, "seed": seed})
    torch.manual_seed(seed)
    accelerator = Accelerator()
    model = new_model().to(memory_format=torch.channels_last)  # on a CPU, 15 % faster
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
        pixels, labels = send_to_device(batch, accelerator.device)
        loss = model(pixels.contiguous(memory_format=torch.channels_last), labels=labels).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update(accelerator.unwrap_model(model))
        losses.append(loss.item())
        seconds += time.perf_counter() - mark  # the wait for scenes counts, what follows does not

        last = step == steps
        if step % LOG_EVERY == 0 or last:
            mean, pace = sum(losses) / len(losses), seconds / len(losses)
            print(f"step {step}/{steps}  loss {mean:.3f}  {pace:.3f} s/step", flush=True)
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
