"""Detection with transformers' detectors whose attention runs on Saccade.

The model, its image processor and its post-processing come from transformers; `models` loads them.
This module records where the queries looked, and converts the results to plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from saccade.backend import which_backend
from saccade.files import as_text
from saccade.integrations import patch
from saccade.vision.models import ModelError, check_outputs, check_resized, load_model
from saccade.vision.sampling_record import (
    Frame,
    Look,
    Recorder,
    find_decoder_operators,
    find_frames,
    get_look,
)


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    label: str
    label_id: int
    score: float
    box: tuple[float, float, float, float]
    """(x0, y0, x1, y1) in pixels of the original image; the box may extend beyond its edges."""
    query: int
    """Index of the decoder query that predicted the object."""
    look: Look
    """Where that query looked."""


@dataclass(frozen=True)
class ImageResult:
    """The objects detected in one image, best score first."""

    detections: list[Detection]
    frame: Frame
    layer: int
    """The decoder layer whose looks are recorded, 1 the first."""
    num_layers: int


class Detector:
    """A detector of the Deformable-DETR family whose attention Saccade computes.

    `Detector.load` loads one; the constructor takes a model that is already loaded.

    Args:
        name: the name of the model in messages and reports.
        model: an object detection model of transformers; it is patched in place.
        processor: its image processor.

    Raises:
        ModelError: the model has no attention that Saccade can compute, or none in its decoder.
    """

    def __init__(self, name: str, model: nn.Module, processor: Any) -> None:
        self.name = name
        self.model = model.eval()
        self.processor = processor
        try:
            self.operators = patch(model).replaced
        except ValueError as error:
            raise ModelError(
                f"{name} is a {type(model).__name__}, which has no deformable attention that "
                "Saccade can compute (Deformable DETR, RT-DETR and their family have)"
            ) from error
        if not find_decoder_operators(self.operators):
            raise ModelError(
                f"{name} is a {type(model).__name__} without deformable attention in its decoder: "
                "its queries have no sampling points to show"
            )
        self.backend = which_backend(*model.parameters())

    @classmethod
    def load(cls, source: str | None = None) -> Detector:
        """Loads a detector.

        Args:
            source: a folder that `save_pretrained` wrote (nothing is fetched from the network), or
                the id of a model on the Hugging Face hub; None means the model shipped with Saccade.

        Raises:
            ModelError: the model does not exist, cannot be loaded, lacks weights, has weights that
                are not numbers, would run code of its own, or is not a detector with deformable
                attention.
        """
        return cls(*load_model(source))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(find_decoder_operators(self.operators))

    def check_recording(self) -> None:
        """Raises ModelError if it cannot be recorded where the queries look."""
        try:
            Recorder(self.model, self.operators)
        except ValueError as error:
            reason = str(error).removeprefix("model: ")
            raise ModelError(f"cannot show where {self.name} looks: {reason}") from error

    def detect(
        self,
        images: Sequence[Image.Image],
        threshold: float = 0.5,
        layer: int | None = None,
    ) -> list[ImageResult]:
        """Detects objects, and records where their queries looked.

        Args:
            images: RGB images; the processor pads them to a common size.
            threshold: the score that an object must exceed, 0 to 1.
            layer: the decoder layer whose looks are recorded, 1 the first; None means the last.

        Returns:
            One result for each image.

        Raises:
            ValueError: the decoder has no such layer, or one whose sampling points cannot be recorded.
            ModelError: scores or boxes are not numbers, or an image becomes too large for the model.
        """
        for image in images:
            check_resized(self.name, self.processor, image.size)
        inputs = self.processor(images=list(images), return_tensors="pt")
        # Processors give float32, also to models that were saved in another precision.
        dtype = next(self.model.parameters()).dtype
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        recorder = Recorder(self.model, self.operators, layer)
        with torch.inference_mode(), recorder:
            outputs = self.model(**inputs)
        check_outputs(self.name, outputs.logits, outputs.pred_boxes)
        recording = recorder.recording()
        frames = find_frames(
            [image.size for image in images], inputs["pixel_values"], inputs.get("pixel_mask")
        )
        objects_per_image = self._post_process(outputs, threshold, images)
        for objects in objects_per_image:
            if not bool(objects["boxes"].isfinite().all()):
                raise ModelError(f"{self.name} gives boxes that are infinite in pixels")
        queries_per_image = find_queries(self.processor, outputs, threshold)
        results = []
        for batch_index, (objects, queries, frame) in enumerate(
            zip(objects_per_image, queries_per_image, frames, strict=True)
        ):
            detections = [
                Detection(
                    self._label(int(label)),
                    int(label),
                    float(score),
                    _box(box),
                    query,
                    get_look(recording, frame, batch_index, query),
                )
                for score, label, box, query in zip(
                    objects["scores"], objects["labels"], objects["boxes"], queries, strict=True
                )
            ]
            detections.sort(key=lambda detection: -detection.score)
            results.append(ImageResult(detections, frame, recording.layer, recording.num_layers))
        return results

    def _post_process(
        self, outputs: Any, threshold: float, images: Sequence[Image.Image]
    ) -> list[dict[str, Tensor]]:
        sizes = [(image.height, image.width) for image in images]
        objects: list[dict[str, Tensor]] = self.processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return objects

    def _label(self, label_id: int) -> str:
        names = getattr(self.model.config, "id2label", None) or {}
        return as_text(str(names.get(label_id, label_id)))


def find_queries(processor: Any, outputs: Any, threshold: float) -> list[list[int]]:
    """Finds the query of each detection, which post-processing does not return.

    Post-processing sorts and drops queries but leaves their boxes unchanged. It is therefore run
    once more on boxes that encode their own index: query i gets a box of size 0 at (i, i).

    Args:
        processor: the image processor with `post_process_object_detection`.
        outputs: the model's outputs, with `logits` [B, Q, classes] and `pred_boxes` [B, Q, 4].
        threshold: the score that an object must exceed.

    Returns:
        For each image the query index of each detection, in the order of the detections.

    Raises:
        RuntimeError: the post-processing changes boxes, and the indices cannot be read back.
    """
    batch_size, num_queries = outputs.pred_boxes.shape[:2]
    index = torch.arange(num_queries, dtype=torch.float64)
    boxes = torch.stack((index, index, 0 * index, 0 * index), -1)
    marked = SimpleNamespace(
        logits=outputs.logits, pred_boxes=boxes.expand(batch_size, -1, -1).contiguous()
    )
    results = processor.post_process_object_detection(
        marked, threshold=threshold, target_sizes=None
    )
    queries = []
    for objects in results:
        corners = objects["boxes"].double()
        rounded = corners[:, :1].round()
        if not bool(((corners - rounded).abs() < 1e-3).all()):
            raise RuntimeError(
                f"{type(processor).__name__} changes boxes: the query of each object cannot be found"
            )
        queries.append([int(query) for query in rounded.flatten()])
    return queries


def _box(box: Tensor) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.double().tolist()
    return x0, y0, x1, y1
