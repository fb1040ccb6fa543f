"""Exports a detector to a file, with as many dynamic sizes as its code allows, and verifies it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import pad

from saccade.checks import check_option
from saccade.export import formats
from saccade.export.formats import SUFFIXES, Format, Run
from saccade.export.verify import Comparison, compare, post_process
from saccade.files import write_whole
from saccade.integrations.exporter_logging import silence_exporters
from saccade.integrations.onnx import Lowering
from saccade.integrations.tracing import symbolic_sizes
from saccade.timing import alternate
from saccade.vision.detector import Detector
from saccade.vision.models import ModelError, check_outputs, describe_error

# Backbones divide the sides of an image by powers of two up to this one.
STEP = 32
EAGER = "eager"
AXES = {0: "batch", 2: "height", 3: "width"}
OUTPUT_NAMES = ("logits", "pred_boxes")


class ExportError(Exception):
    """A detector could not be exported, or its file failed verification; no file was left."""


@dataclass(frozen=True)
class RuntimeResult:
    """The results of one runtime that ran the file."""

    comparisons: dict[str, Comparison]
    """Comparisons with the model itself, by input, for example "batch 1, 160 x 160"."""
    milliseconds: float
    """The time for one image."""

    @property
    def largest_difference(self) -> float:
        """The largest difference of all logits and boxes."""
        return max(comparison.largest_difference for comparison in self.comparisons.values())


@dataclass(frozen=True)
class Export:
    """A verified file."""

    path: Path
    dynamic: tuple[str, ...]
    """The sizes that may change, among "batch", "height" and "width"."""
    size: tuple[int, int]
    """(height, width) of the pixels that the detector was exported with."""
    min_size: tuple[int, int]
    """The smallest (height, width) according to torch.export: below, the model's code would branch
    differently. The model may require more, for example multiples of a number."""
    reasons_not_dynamic: tuple[str, ...]
    """Why more sizes could not be dynamic, one line for each failed trial."""
    eager_milliseconds: float
    """The time that the model itself takes for one image."""
    runtimes: dict[str, RuntimeResult]
    """The results of each runtime that ran the file."""


def export_detector(
    detector: Detector,
    to: Format,
    path: str | Path | None = None,
    *,
    image: Image.Image,
    lowering: Lowering = "grid_sample",
    fixed: bool = False,
    threshold: float = 0.5,
    seconds: float = 3.0,
    show_progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Writes a detector as a file, runs the file, and compares it with the detector itself.

    The file takes `pixel_values` [B, 3, H, W] from the detector's processor, and returns `logits`
    [B, Q, classes] and `pred_boxes` [B, Q, 4] (centre x, centre y, width, height; 0 to 1). It is
    moved to `path` only after every runtime that can run it here has given the detector's results:
    for the image, for a batch of two, and for a smaller and a larger resolution, as far as these
    are dynamic.

    Args:
        detector: the detector to export, its attention computed by Saccade.
        to: "onnx"; "aoti", a package compiled by AOTInductor; "torch", a program of torch.export.
        path: the file to write; an existing file is replaced.
        image: the RGB image that the file is verified with.
        lowering: how ONNX expresses the operator, see `saccade.integrations.onnx.translations`;
            ignored by the other formats.
        fixed: whether the file is for one image of this size only; otherwise batch and resolution
            are dynamic as far as the detector's own code allows.
        threshold: detections with a higher score are compared, and never fewer than the ten best.
        seconds: how long speed is measured.
        show_progress: called with the name of each step.

    Raises:
        ExportError: nothing could be exported, or the file gave other results; no file is written.
        ModelError: the detector cannot process the image, or its scores are not numbers.
        ModuleNotFoundError: a required package is not installed.
    """
    check_option("to", to, Format)
    check_option("lowering", lowering, Lowering)
    path = Path(f"{_file_name(detector.name)}{SUFFIXES[to]}" if path is None else path)
    if path.suffix != SUFFIXES[to]:
        raise ExportError(f"{path}: expected a name that ends with {SUFFIXES[to]}")
    if path.is_dir():
        raise ExportError(f"{path}: expected a file, got a folder")
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL.Image.Image, got {type(image).__name__}")
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = _Trial(detector, to, lowering, image, threshold, show_progress)
    reasons: list[str] = []
    for axes in ((),) if fixed else ((0, 2, 3), (0,), ()):
        try:
            # A large ONNX model has its weights in a second file, which moves together with the first.
            with write_whole(path) as file:
                comparisons, runs, min_size = trial(file, axes)
                show_progress("measuring")
                pixels = trial.pixels(1)
                calls: dict[str, Run] = {
                    name: functools.partial(run, pixels)
                    for name, run in ({EAGER: trial.run} | runs).items()
                }
                with torch.inference_mode():
                    timings = alternate(calls, seconds)
        except _TrialFailed as error:
            reasons.append(f"{_describe_axes(axes)}: {error}")
            continue
        except OSError as error:
            raise ExportError(f"{path} cannot be written, no file was left: {error}") from error
        return Export(
            path,
            tuple(AXES[axis] for axis in axes),
            (pixels.shape[2], pixels.shape[3]),
            min_size,
            tuple(reasons),
            timings[EAGER].milliseconds,
            {
                name: RuntimeResult(comparisons[name], timings[name].milliseconds)
                for name in comparisons
            },
        )
    message = f"{detector.name} could not be exported to {to}; no file was left."
    raise ExportError("\n".join([message, *reasons]))


class _TrialFailed(Exception):  # noqa: N818
    """A trial failed; the message is the reason, in one line."""


class Outputs(nn.Module):
    """A detector with one input tensor and two outputs (logits, boxes), as every runtime accepts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes


class _Trial:
    """Exports a detector with some dynamic axes, and verifies the file."""

    def __init__(
        self,
        detector: Detector,
        to: Format,
        lowering: Lowering,
        image: Image.Image,
        threshold: float,
        show_progress: Callable[[str], None],
    ) -> None:
        self.model = Outputs(detector.model).eval()
        self._processor, self._threshold = detector.processor, threshold
        self._to, self._lowering, self._show_progress = to, lowering, show_progress
        # The mirrored image has the same size and completes a batch of two.
        images = [image, ImageOps.mirror(image)]
        try:
            pixels: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
            dtype = next(detector.model.parameters()).dtype
            self._pixels = pixels.to(dtype).contiguous()
            with torch.inference_mode():
                outputs = detector.model(pixel_values=self.pixels(1))
                logits, boxes = outputs.logits, outputs.pred_boxes
        except Exception as error:  # models raise errors of any type
            raise ModelError(
                f"{detector.name} cannot process the image: {describe_error(error)}"
            ) from error
        check_outputs(detector.name, logits, boxes)
        # Two-stage models return the scores by which they selected their queries.
        stages = (getattr(outputs, name, None) for name in ("enc_outputs_class", "enc_topk_logits"))
        self._selects_queries = any(scores is not None for scores in stages)

    def pixels(self, batch: int) -> Tensor:
        """Returns the pixels of the image, or of both images."""
        return self._pixels[:batch]

    def run(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Runs the model itself."""
        outputs: tuple[Tensor, ...] = self.model(pixels)
        return outputs

    def __call__(
        self, file: Path, axes: tuple[int, ...]
    ) -> tuple[dict[str, dict[str, Comparison]], dict[str, Run], tuple[int, int]]:
        self._show_progress(f"exporting ({_describe_axes(axes)})")
        try:
            program = self._program(axes)
            min_size = _find_min_size(program)
            self._show_progress(f"writing {self._to} ({_describe_axes(axes)})")
            names = {axis: AXES[axis] for axis in axes}
            formats.write(program, file, self._to, self._lowering, OUTPUT_NAMES, [names])
            runs = formats.runtimes(file, self._to, self._lowering)
        except (ModuleNotFoundError, OSError):  # of packages and disks, not of these axes
            raise
        except Exception as error:  # models and exporters raise errors of any type
            raise _TrialFailed(summarize_error(error)) from error
        self._show_progress("verifying")
        comparisons = {name: self._compare(run, axes) for name, run in runs.items()}
        return comparisons, runs, min_size

    def _program(self, axes: tuple[int, ...]) -> ExportedProgram:
        pixels = self.pixels(2 if 0 in axes else 1)
        export = functools.partial(
            torch.export.export,
            self.model,
            (pixels,),
            dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),),
        )
        with torch.no_grad(), symbolic_sizes(), silence_exporters():
            try:
                return export(strict=False)
            except Exception as first:
                # RT-DETRv2 takes the len() of a tensor, which only a strict export can trace.
                try:
                    return export(strict=True)
                except Exception:
                    raise first from None

    def _compare(self, run: Run, axes: tuple[int, ...]) -> dict[str, Comparison]:
        comparisons = {}
        for pixels in self._make_inputs(axes):
            batch, _, height, width = pixels.shape
            name = f"batch {batch}, {height} x {width}"

            def get_detections(outputs: Any, size: tuple[int, int] = (height, width)) -> Any:
                return post_process(self._processor, outputs, size)

            try:
                with torch.inference_mode():
                    expected, actual = self.run(pixels), run(pixels)
                # A file is not verified by numbers that the model itself does not give.
                check_outputs("the model", *expected)
                comparisons[name] = compare(
                    expected,
                    actual,
                    get_detections,
                    self._threshold,
                    selects_queries=self._selects_queries,
                )
            except Exception as error:
                raise _TrialFailed(f"{name}: {summarize_error(error)}") from error
            if not comparisons[name].same:
                raise _TrialFailed(f"{name}: {_describe_differences(comparisons[name])}")
        return comparisons

    def _make_inputs(self, axes: tuple[int, ...]) -> Iterator[Tensor]:
        yield self.pixels(1)
        if 0 in axes:
            yield self.pixels(2)
        if 2 in axes:
            height, width = self._pixels.shape[2:]
            smaller = self.pixels(2)[:, :, : _shrink(height), : _shrink(width)]
            yield smaller.contiguous()
            # Three images, higher and wider than the first.
            yield pad(self._pixels[[0, 1, 0]], (0, STEP, 0, 2 * STEP))


def _find_min_size(program: ExportedProgram) -> tuple[int, int]:
    """Returns the smallest (height, width) of a program's only input, according to torch.export."""
    (name,) = program.graph_signature.user_inputs
    (pixels,) = (node for node in program.graph.nodes if node.name == name)
    limits = program.range_constraints
    height, width = (
        int(limits[size.node.expr].lower) if isinstance(size, torch.SymInt) else size
        for size in pixels.meta["val"].shape[2:]
    )
    return height, width


def _describe_axes(axes: tuple[int, ...]) -> str:
    return " and ".join(AXES[axis] for axis in axes) or "fixed sizes"


def _shrink(size: int) -> int:
    """Returns a side about three quarters as long, but at least `STEP` or the side itself."""
    return min(size, max(STEP, int(0.75 * size / STEP) * STEP))


def _describe_differences(comparison: Comparison) -> str:
    return (
        f"largest difference {comparison.largest_difference:.2g}, {comparison.unmatched_rows} of "
        f"{comparison.rows} rows belong to another query, {comparison.detections_missed} detections of "
        "either run have no counterpart in the other"
    )


def summarize_error(error: BaseException) -> str:
    """Returns the most informative line of an error; exporters' messages can fill pages."""
    # torch.onnx.export wraps the original error.
    while error.__cause__ is not None and type(error).__module__.startswith("torch.onnx"):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Exception from ")] or lines
    informative = [line for line in lines if "expected" in line or line.startswith("RuntimeError")]
    return f"{type(error).__name__}: {(informative or lines or [''])[0][:300]}"


def _file_name(name: str) -> str:
    """Returns a model's name without its owner; letters unsuitable for a file become _."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in last)
