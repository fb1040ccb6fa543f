"""Detection with transformers' detectors whose attention runs on Saccade.

Model, image processor and post-processing are transformers'; here they are loaded, joined to the
recording of where the queries looked, and their results put into plain numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from saccade import doctor
from saccade.backend import which_backend
from saccade.integrations import patch
from saccade.vision.looking import Frame, Look, Recorder, decoder_operators, frames, look_of


class ModelError(Exception):
    """A model that cannot be loaded or used; the message names it and says why."""


@dataclass(frozen=True)
class Detection:
    """One object."""

    label: str
    label_id: int
    score: float
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the original picture; may reach over its edges."""
    query: int
    """Index of the decoder's query that found it."""
    look: Look
    """Where that query looked."""


@dataclass(frozen=True)
class PictureResult:
    """What was found in one picture, best score first."""

    detections: list[Detection]
    frame: Frame
    layer: int
    """The decoder layer whose looks are recorded, 1 the first."""
    num_layers: int


class Detector:
    """A detector of the Deformable-DETR family, its attention computed by Saccade.

    Use `Detector.load`; the constructor takes what is loaded already.

    Args:
        name: what to call the model in messages and reports.
        model: transformers' model for object detection; it is patched in place.
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
        if not decoder_operators(self.operators):
            raise ModelError(
                f"{name} is a {type(model).__name__} without deformable attention in its decoder: "
                "there is nothing to show of where its queries looked"
            )
        self.backend = which_backend(*model.parameters())

    @classmethod
    def load(cls, source: str | None = None) -> Detector:
        """Loads a detector.

        Args:
            source: a folder that `save_pretrained` wrote (nothing is fetched from the network), or
                the id of a model on the Hugging Face hub; None: the model that comes with Saccade.

        Raises:
            ModelError: it is not there, cannot be loaded, lacks weights, or is no such detector.
        """
        if source is None:
            lacking = doctor.missing_model_files()
            if lacking:
                raise ModelError(
                    f"this installation has no default model ({', '.join(lacking)} missing in "
                    f"{doctor.DEFAULT_MODEL}); name one with --model"
                )
            return cls("saccade's digits", *_from_pretrained(str(doctor.DEFAULT_MODEL), local=True))
        local = Path(source).expanduser().is_dir()
        if not local and (source.startswith((".", "/", "~")) or source.count("/") != 1):
            raise ModelError(f"{source} is neither a folder nor the id of a model (owner/name)")
        path = str(Path(source).expanduser()) if local else source
        return cls(source, *_from_pretrained(path, local=local))

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(decoder_operators(self.operators))

    def detect(
        self,
        pictures: Sequence[Image.Image],
        threshold: float = 0.5,
        layer: int | None = None,
    ) -> list[PictureResult]:
        """Finds objects, and records where their queries looked.

        Args:
            pictures: RGB pictures; they are padded to a common size, as the processor does.
            threshold: the score that an object must exceed, 0 to 1.
            layer: which decoder layer's looks to record, 1 the first; None: the last.

        Returns:
            One result for each picture.

        Raises:
            ValueError: the decoder has no such layer.
        """
        inputs = self.processor(images=list(pictures), return_tensors="pt")
        recorder = Recorder(self.model, self.operators, layer)
        with torch.inference_mode(), recorder:
            outputs = self.model(**inputs)
        recording = recorder.recording()
        placed = frames(
            [picture.size for picture in pictures], inputs["pixel_values"], inputs.get("pixel_mask")
        )
        found = self._post_process(outputs, threshold, pictures)
        queries = queries_of(self.processor, outputs, threshold)
        results = []
        for batch, (objects, indices, frame) in enumerate(zip(found, queries, placed, strict=True)):
            detections = [
                Detection(
                    self._label(int(label)),
                    int(label),
                    float(score),
                    _box(box),
                    query,
                    look_of(recording, frame, batch, query),
                )
                for score, label, box, query in zip(
                    objects["scores"], objects["labels"], objects["boxes"], indices, strict=True
                )
            ]
            detections.sort(key=lambda detection: -detection.score)
            results.append(PictureResult(detections, frame, recording.layer, recording.num_layers))
        return results

    def _post_process(
        self, outputs: Any, threshold: float, pictures: Sequence[Image.Image]
    ) -> list[dict[str, Tensor]]:
        sizes = [(picture.height, picture.width) for picture in pictures]
        found: list[dict[str, Tensor]] = self.processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return found

    def _label(self, label_id: int) -> str:
        names = getattr(self.model.config, "id2label", None) or {}
        return str(names.get(label_id, label_id))


def queries_of(processor: Any, outputs: Any, threshold: float) -> list[list[int]]:
    """Which query each detection comes from: post-processing sorts and drops them without a word.

    It carries boxes through untouched, so it is run once more on boxes that say their own index:
    of size 0, at the position (i, i) for query i. What comes out is what went in, in its order.

    Args:
        processor: the image processor with `post_process_object_detection`.
        outputs: the model's outputs, with `logits` [B, Q, classes] and `pred_boxes` [B, Q, 4].
        threshold: the score that an object must exceed.

    Returns:
        For each picture the query index of each detection, in the order of the detections.

    Raises:
        RuntimeError: the post-processing changes boxes, and the indices cannot be read back.
    """
    batch_size, num_queries = outputs.pred_boxes.shape[:2]
    index = torch.arange(num_queries, dtype=torch.float64)
    boxes = torch.stack((index, index, 0 * index, 0 * index), -1)
    marked = SimpleNamespace(
        logits=outputs.logits, pred_boxes=boxes.expand(batch_size, -1, -1).contiguous()
    )
    found = processor.post_process_object_detection(marked, threshold=threshold, target_sizes=None)
    queries = []
    for objects in found:
        carried = objects["boxes"].double()
        rounded = carried[:, :1].round()
        if not bool(((carried - rounded).abs() < 1e-3).all()):
            raise RuntimeError(
                f"{type(processor).__name__} changes boxes: which query found which object is lost"
            )
        queries.append([int(number) for number in rounded.flatten()])
    return queries


def _box(box: Tensor) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.double().tolist()
    return x0, y0, x1, y1


def _from_pretrained(path: str, *, local: bool) -> tuple[nn.Module, Any]:
    with _quiet_transformers():
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            model, info = AutoModelForObjectDetection.from_pretrained(
                path, local_files_only=local, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(path, local_files_only=local)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise ModelError(f"cannot load {path}: {reason}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, among them "
            f"{missing[0]}: it would detect at random"
        )
    return model, processor


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the notes and bars of loading, which tell a user of the command line nothing."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
