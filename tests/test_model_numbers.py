"""Weights, scores and boxes that are not numbers, and images that would become huge."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from model_folders import (
    CONFIG,
    copy_model,
    load_weights,
    replace_weights,
    write,
)
from vision_helpers import gradient_image

from saccade import doctor
from saccade.vision.detector import Detector
from saccade.vision.models import ModelError, check_outputs, check_resized

IMAGE = gradient_image(96, 64)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The shipped model in a folder that a test may change."""
    return copy_model(tmp_path / "model")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers(folder, value) -> None:
    weights = load_weights()
    weights["model.decoder.layers.0.fc1.weight"].view(-1)[7] = value
    replace_weights(folder, weights)
    with pytest.raises(ModelError, match=r"not numbers: 1 of 16384 elements of \S*fc1\.weight"):
        Detector.load(str(folder))


def test_scores_that_are_not_numbers(folder) -> None:
    weights = load_weights()
    name = next(name for name in weights if name.endswith("running_var"))
    weights[name][0] = math.nan
    replace_weights(folder, weights)
    detector = Detector.load(str(folder))
    with pytest.raises(ModelError, match=f"scores are not numbers: {folder} gives .* 30 of 30"):
        detector.detect([IMAGE])


@pytest.mark.parametrize(
    ("logits", "boxes", "is_number"),
    [
        ([1.0, -2.0], [0.5] * 4, True),
        ([1.0, -math.inf], [0.5] * 4, True),  # a class that a model leaves out
        ([-math.inf, -math.inf], [0.5] * 4, False),
        ([1.0, math.nan], [0.5] * 4, False),
        ([1.0, math.inf], [0.5] * 4, False),
        ([1.0, 2.0], [0.5, 0.5, math.nan, 0.5], False),
        ([1.0, 2.0], [0.5, 0.5, 0.5, -math.inf], False),
    ],
)
def test_which_outputs_are_numbers(logits, boxes, is_number) -> None:
    good = torch.zeros(2, 3, 2), torch.zeros(2, 3, 4)
    check_outputs("model", *good)
    for output, row in zip(good, (logits, boxes), strict=True):
        output[1, 2] = torch.tensor(row)
    if is_number:
        check_outputs("model", *good)
        return
    with pytest.raises(ModelError, match="model gives NaN .* for 1 of 3 queries of image 1"):
        check_outputs("model", *good)


def test_boxes_that_are_infinite_in_pixels(monkeypatch) -> None:
    detector = Detector.load()
    inner = detector._post_process

    def overflow(*arguments: Any) -> Any:
        return [objects | {"boxes": objects["boxes"] * 1e38} for objects in inner(*arguments)]

    monkeypatch.setattr(detector, "_post_process", overflow)
    with pytest.raises(ModelError, match="boxes that are infinite"):
        detector.detect([IMAGE], threshold=0.0)


def test_an_image_that_would_become_huge() -> None:
    detector = Detector.load()
    check_resized("model", detector.processor, (3000, 1))  # Its longest edge is limited.
    processor = SimpleNamespace(size={"shortest_edge": 800})
    check_resized("model", processor, (3000, 200))
    with pytest.raises(ModelError, match="model would read it at 800000 x 800 pixels"):
        check_resized("model", processor, (3000, 3))
    detector.processor.size = processor.size
    with pytest.raises(ModelError, match="at 800 x 800000 pixels"):
        detector.detect([gradient_image(3, 3000)])


@pytest.fixture
def invoke(monkeypatch):
    testing = pytest.importorskip("typer.testing")
    from saccade.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: testing.CliRunner().invoke(app, [*map(str, arguments)])


class WideImagesAreNaN:
    """An image processor that gives NaN for wide images."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        inputs = self.inner(images=images, **options)
        for image, pixels in zip(images, inputs["pixel_values"], strict=True):
            if image.width > image.height:
                pixels.fill_(math.nan)
        return inputs


@pytest.mark.slow
def test_detect_says_which_images_have_scores_that_are_not_numbers(
    invoke, tmp_path, monkeypatch
) -> None:
    detector = Detector.load()
    detector.processor = WideImagesAreNaN(detector.processor)
    monkeypatch.setattr(Detector, "load", lambda _: detector)
    wide, narrow = tmp_path / "wide.png", tmp_path / "narrow.png"
    gradient_image(60, 40).save(wide)
    gradient_image(40, 60).save(narrow)
    result = invoke("detect", wide, narrow, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(
        rf"skipped: {wide} .*the scores are not numbers: saccade's digits", result.stderr
    )
    assert f"{narrow}: " in result.stdout
    assert not list((tmp_path / "out").glob("wide*"))
    result = invoke("detect", wide, "--out", tmp_path / "out")
    assert result.exit_code == 2


@pytest.mark.slow
def test_the_commands_end_with_2_for_a_model_that_is_not_numbers(
    invoke, folder, tmp_path, monkeypatch
) -> None:
    weights = load_weights()
    next(iter(weights.values())).view(-1)[0] = math.nan
    replace_weights(folder, weights)
    for arguments in (
        ("detect", doctor.EXAMPLE_IMAGE, "--model", folder, "--out", tmp_path / "out"),
        ("export", folder, "--to", "torch", "--out", tmp_path / "model.pt2"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert f"error: {folder} has weights that are not numbers" in result.stderr
    # Where the scores alone are not numbers, no file is verified by them.
    detector = Detector.load()
    detector.processor = WideImagesAreNaN(detector.processor)
    monkeypatch.setattr(Detector, "load", lambda _: detector)
    IMAGE.save(tmp_path / "wide.png")
    options = ("--to", "torch", "--out", tmp_path / "model.pt2", "--image", tmp_path / "wide.png")
    result = invoke("export", *options)
    assert result.exit_code == 2
    assert "the scores are not numbers: saccade's digits" in result.stderr
    assert not (tmp_path / "model.pt2").exists()


def test_export_of_a_model_that_cannot_process_an_image(invoke, folder, tmp_path) -> None:
    for changes in ({"return_dict": False}, {"dropout": -1}):
        write(folder, CONFIG | changes)
        result = invoke("export", folder, "--to", "torch", "--out", tmp_path / "model.pt2")
        assert result.exit_code == 2
        assert f"error: {folder} cannot process the image: " in result.stderr


def test_a_threshold_that_is_not_a_number(invoke, tmp_path) -> None:
    result = invoke("detect", "x.png", "--threshold", "nan", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--threshold" in result.stderr
