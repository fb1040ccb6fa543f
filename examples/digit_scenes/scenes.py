"""Scenes of handwritten digits over photographs: the data that the embedded detector learns from.

A scene is a 160 x 160 crop of a real photograph with one to eight real handwritten digits drawn
over it. Digits and photographs come with scikit-learn, so nothing is downloaded. Training and test
scenes share no digit sample and no part of a photograph. A scene depends on its split, its index
and the seed alone: the training set is an endless stream that needs no disk, and the held-out set
is the same wherever it is built.

    python scenes.py --output data        # the held-out scenes as a COCO data set
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

Split = Literal["train", "test"]
Annotation = dict[str, Any]

SCENE_SIZE = (160, 160)  # (width, height)
TEST_SCENES = 300  # the figures in the README are measured on test scenes 0 … 299
DIGIT_PIXELS = (12.0, 64.0)  # side of the 8 x 8 cell that holds a digit, in pixels of the scene
MAX_DIGITS = 8
MAX_COVERED = 0.10  # of the smaller of two boxes: more, and the lower digit could not be read

# A digit is drawn once, large, then shrunk to its size: its box is then exact to a fraction of a
# pixel. Small digits need it: rounding a box of 12 pixels can already cost it an IoU of 0.95.
MASTER_PIXELS = 104
MASTER_CELL = 64  # the 8 x 8 cell within the master; the rest is room for the rotation

_SPLIT_NUMBER = {"train": 0, "test": 1}


@functools.cache
def digit_samples(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images [N, 8, 8] in 0 … 1 and the labels [N] of a split of scikit-learn's digits.

    The checksum of a sample's own pixels decides on its split (a fifth goes to the test split), so
    two equal samples can never end up on both sides.
    """
    digits = load_digits()
    in_test = np.array([zlib.crc32(i.astype(np.uint8).tobytes()) % 5 == 0 for i in digits.images])
    chosen = in_test if split == "test" else ~in_test
    return digits.images[chosen].astype(np.float32) / 16.0, digits.target[chosen]


@functools.cache
def photographs(split: Split) -> tuple[Image.Image, ...]:
    """Returns a split's parts of scikit-learn's photographs: left halves train, right ones test."""
    parts = []
    for pixels in load_sample_images().images:
        middle = pixels.shape[1] // 2
        parts.append(
            Image.fromarray(pixels[:, :middle] if split == "train" else pixels[:, middle:])
        )
    return tuple(parts)


def make_scene(
    split: Split, index: int, seed: int = 0, size: tuple[int, int] = SCENE_SIZE
) -> tuple[Image.Image, list[Annotation]]:
    """Draws one scene.

    Args:
        split: `"train"` or `"test"`: which digits and which parts of the photographs may appear.
        index: number of the scene in the endless stream of its split.
        seed: another seed gives another stream.
        size: width and height of the scene, in pixels.

    Returns:
        The RGB image, and for each digit a COCO annotation: `bbox` (left, top, width, height, in
        pixels), `category_id` (the digit itself, 0 … 9), `area`, `iscrowd`.
    """
    rng = np.random.default_rng([seed, _SPLIT_NUMBER[split], index])
    canvas = _background(rng, split, size)
    annotations: list[Annotation] = []
    # Largest first: the small digits then find the gaps, and lie on top where two touch.
    low, high = DIGIT_PIXELS
    cells = np.exp(rng.uniform(math.log(low), math.log(high), int(rng.integers(1, MAX_DIGITS + 1))))
    for cell in sorted(cells, reverse=True):
        annotation = _add_digit(rng, canvas, split, float(cell), [a["bbox"] for a in annotations])
        if annotation is not None:
            annotations.append(annotation)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(
        rng.uniform(0.0, 8.0)
    )
    image = Image.fromarray(np.clip(canvas + 0.5, 0.0, 255.0).astype(np.uint8))
    return image, annotations


def _background(rng: np.random.Generator, split: Split, size: tuple[int, int]) -> np.ndarray:
    """Cuts out a piece of a photograph at a random scale, with random brightness and colour cast."""
    photograph = photographs(split)[rng.integers(len(photographs(split)))]
    largest = min(photograph.width / size[0], photograph.height / size[1])
    scale = rng.uniform(0.4 * largest, largest)
    width, height = scale * size[0], scale * size[1]
    left = rng.uniform(0.0, photograph.width - width)
    top = rng.uniform(0.0, photograph.height - height)
    box = (left, top, left + width, top + height)
    piece = photograph.resize(size, Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if split == "train":
        # Two half photographs are few. Upside down and with swapped colours, they teach the model
        # to leave alone what it has never seen. The test split stays as photographed.
        if rng.random() < 0.5:
            piece = piece.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        bands = piece.split()
        piece = Image.merge("RGB", [bands[band] for band in rng.permutation(3)])
    gain = rng.uniform(0.7, 1.2) * rng.uniform(0.9, 1.1, 3)
    return np.clip(np.asarray(piece) * gain.astype(np.float32), 0.0, 255.0)


def _add_digit(
    rng: np.random.Generator,
    canvas: np.ndarray,
    split: Split,
    cell: float,
    taken: list[list[float]],
) -> Annotation | None:
    """Draws a digit where it hides no other, in a colour that can be read there.

    Returns:
        Its annotation; None if no place was found.
    """
    images, labels = digit_samples(split)
    sample = int(rng.integers(len(labels)))
    ink, (left, top, right, bottom) = _draw_digit(rng, images[sample], cell)
    scene_height, scene_width = canvas.shape[:2]
    for _ in range(30):
        # The ink may be anywhere in the scene; the empty rim of the drawing may hang over its edge.
        x = int(rng.integers(math.ceil(-left), math.floor(scene_width - right) + 1))
        y = int(rng.integers(math.ceil(-top), math.floor(scene_height - bottom) + 1))
        bbox = [x + left, y + top, right - left, bottom - top]
        if all(_covered(bbox, other) <= MAX_COVERED for other in taken):
            break
    else:
        return None
    inside = ink[
        max(0, -y) : min(ink.shape[0], scene_height - y),
        max(0, -x) : min(ink.shape[1], scene_width - x),
    ]
    patch = canvas[max(0, y) :, max(0, x) :][: inside.shape[0], : inside.shape[1]]
    behind = (patch * inside[..., None]).sum(axis=(0, 1)) / inside.sum()
    colour = _readable_colour(rng, behind)
    alpha = inside[..., None] * np.float32(rng.uniform(0.75, 1.0))
    patch += (colour - patch) * alpha  # a view: this draws into the canvas
    bbox = [round(value, 2) for value in bbox]
    return {
        "bbox": bbox,
        "category_id": int(labels[sample]),
        "area": round(bbox[2] * bbox[3], 2),
        "iscrowd": 0,
    }


def _draw_digit(
    rng: np.random.Generator, sample: np.ndarray, cell: float
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Turns a digit by up to 15 degrees and scales it so that its 8 x 8 cell measures `cell` pixels.

    Returns:
        The ink [side, side] in 0 … 1, and the box of its visible part: left, top, right, bottom.
    """
    angle = math.radians(rng.uniform(-15.0, 15.0))
    widening = rng.uniform(0.8, 1.2)
    step = 8.0 / MASTER_CELL  # pixels of the sample for one of the master
    cosine, sine = math.cos(angle) * step, math.sin(angle) * step
    centre = MASTER_PIXELS / 2.0
    padded = np.pad(sample, 2)  # so that bicubic interpolation fades out around the sample
    middle = padded.shape[0] / 2.0
    across = np.array([cosine, sine]) / widening
    down = np.array([-sine, cosine])
    origin = middle - (across + down) * centre
    matrix = (across[0], down[0], origin[0], across[1], down[1], origin[1])
    master = Image.fromarray(padded).transform(
        (MASTER_PIXELS, MASTER_PIXELS),
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BICUBIC,
    )
    # Steeper edges than interpolation leaves: strokes of a pen, not clouds.
    ink = np.clip((np.asarray(master) - 0.3) * np.float32(2.5), 0.0, 1.0)
    columns = np.flatnonzero((ink >= 0.5).any(axis=0))
    rows = np.flatnonzero((ink >= 0.5).any(axis=1))
    side = max(1, round(cell * MASTER_PIXELS / MASTER_CELL))
    ratio = side / MASTER_PIXELS
    box = (
        float(columns[0]) * ratio,
        float(rows[0]) * ratio,
        float(columns[-1] + 1) * ratio,
        float(rows[-1] + 1) * ratio,
    )
    small = Image.fromarray(ink).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small), box


def _covered(first: list[float], second: list[float]) -> float:
    """Returns the intersection of two boxes as a share of the smaller one."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(first[2] * first[3], second[2] * second[3])


def _readable_colour(rng: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    """Returns a random colour whose brightness differs clearly from that of the colour behind."""
    brightness = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    while True:
        colour = rng.uniform(0.0, 255.0, 3).astype(np.float32)
        if abs(float((colour - behind) @ brightness)) >= 70.0:
            return colour


def coco_dataset(
    split: Split, count: int = TEST_SCENES, seed: int = 0, size: tuple[int, int] = SCENE_SIZE
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Returns the first `count` scenes of a split: a COCO dictionary, and the images in its order.

    The id of an image is the index of its scene. Annotation ids start at 1: pycocotools takes a
    match with annotation 0 for none.
    """
    images: list[Image.Image] = []
    entries: list[dict[str, Any]] = []
    annotations: list[Annotation] = []
    for index in range(count):
        image, digits = make_scene(split, index, seed, size)
        images.append(image)
        entries.append(
            {
                "id": index,
                "file_name": f"{index:06d}.png",
                "width": image.width,
                "height": image.height,
            }
        )
        for digit in digits:
            annotations.append({"id": len(annotations) + 1, "image_id": index, **digit})
    dataset = {
        "info": {"description": f"digit scenes, {split} split, seed {seed}"},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": digit, "name": str(digit)} for digit in range(10)],
    }
    return dataset, images


def write_coco(folder: Path, split: Split, count: int = TEST_SCENES, seed: int = 0) -> Path:
    """Writes scenes as a COCO data set, `images/000000.png` … and `instances.json`.

    Returns:
        The path of `instances.json`.
    """
    dataset, images = coco_dataset(split, count, seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry, image in zip(dataset["images"], images, strict=True):
        image.save(folder / "images" / entry["file_name"])
    path = folder / "instances.json"
    path.write_text(json.dumps(dataset, indent=1))
    return path


def main(
    output: Annotated[Path, typer.Option(help="Folder to write images/ and instances.json to.")],
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    count: Annotated[int, typer.Option(help="Number of scenes.")] = TEST_SCENES,
    seed: Annotated[int, typer.Option(help="Seed of the stream.")] = 0,
) -> None:
    """Writes scenes of handwritten digits as a COCO data set."""
    if split not in _SPLIT_NUMBER:
        raise typer.BadParameter(f"split: expected train or test, got {split}")
    path = write_coco(output, split, count, seed)  # type: ignore[arg-type]
    print(f"{count} scenes of the {split} split: {path}")


if __name__ == "__main__":
    typer.run(main)
