"""The shipped model as a folder that a test may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from saccade import doctor
from saccade.vision import models

SHIPPED = doctor.DEFAULT_MODEL
WEIGHTS = "model.safetensors"
CONFIG, PROCESSOR = (
    json.loads((SHIPPED / name).read_text()) for name in (models.CONFIG, models.PROCESSOR)
)


def copy_model(folder: Path) -> Path:
    """Makes the folder; its weights are a link."""
    folder.mkdir()
    write(folder)
    (folder / WEIGHTS).symlink_to(SHIPPED / WEIGHTS)
    return folder


def write(folder: Path, config: Any = CONFIG, processor: Any = PROCESSOR) -> None:
    """Writes the two JSON files of a model."""
    for name, content in ((models.CONFIG, config), (models.PROCESSOR, processor)):
        (folder / name).write_text(json.dumps(content))


def load_weights() -> dict[str, torch.Tensor]:
    return load_file(SHIPPED / WEIGHTS)


def replace_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
