"""A detector to a file: exported with as many dynamic sizes as its code allows, written, verified."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import pad

from saccade.timing import alternate
from saccade.checks import check_option
from saccade.export import formats
from saccade.export.formats import SUFFIXES, Format, Run
from saccade.export.verify import Comparison, compare, post_processed
from saccade.integrations.onnx import Lowering
from saccade.integrations.quiet import quiet_exporters
from saccade.integrations.tracing import symbolic_sizes
from saccade.vision.detector import Detector

# Sides of other pictures than the one exported with are multiples of what backbones divide by.
STEP = 32
EAGER = "eager"
AXES = {0: "batch", 2: "height", 3: "width"}
OUTPUT_NAMES = ("logits", "pred_boxes")


class ExportError(Exception):
    """A detector that could not be exported, or a file that did not pass; no file was left."""


@dataclass(frozen=True)
class Checked:
    """A runtime that ran the file."""

    comparisons: dict[str, Comparison]
    """Against the model itself, by what was run: "batch 1, 160 x 160"."""
    milliseconds: float
    """For one picture."""

    @property
    def largest_difference(self) -> float:
        """Of all logits and boxes."""
        return max(comparison.largest_difference for comparison in self.comparisons.values())


@dataclass(frozen=True)
class Export:
    """A verified file."""

    path: Path
    dynamic: tuple[str, ...]
    """The sizes that may change: "batch", "height", "width"."""
    size: tuple[int, int]
    """(height, width) of the pixels it was exported with."""
    least_size: tuple[int, int]
    """The lowest (height, width) that torch.export found: below, the model's code would go another way.
    The model may ask for more, for multiples of a number for example."""
    fixed_because: tuple[str, ...]
    """Why more sizes could not be dynamic, one line for each attempt."""
    eager_milliseconds: float
    """What the model itself takes for one picture."""
    runtimes: dict[str, Checked]


def export_detector(
    detector: Detector,
    to: Format,
    path: str | Path | None = None,
    *,
    picture: Image.Image,
    lowering: Lowering = "grid_sample",
    fixed: bool = False,
    threshold: float = 0.5,
    seconds: float = 3.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Export:
    """Writes a detector as a file, runs the file, and compares it with the detector itself.

    The file takes `pixel_values` [B, 3, H, W], as the detector's processor makes them, and gives
    `logits` [B, Q, classes] and `pred_boxes` [B, Q, 4] (centre x, centre y, width, height; 0 to 1).
    It appears at `path` after everything that can run it here has given the detector's numbers: for
    the picture, for a batch of two, and for a smaller and a larger resolution, as far as these are
    dynamic.

    Args:
        detector: what to export, its attention computed by Saccade.
        to: "onnx"; "aoti", a package compiled by AOTInductor; "torch", a program of torch.export.
        path: where the file goes; what is there is replaced.
        picture: RGB; what the file is verified with.
        lowering: of onnx alone, how it expresses the operator; see `saccade.integrations.onnx.translations`.
        fixed: for one picture of this one size; otherwise batch and resolution are dynamic as far
            as the detector's own code allows.
        threshold: detections with a higher score are compared, and never fewer than the ten best.
        seconds: how long the speeds are measured.
        tell: called with what is being done.

    Raises:
        ExportError: nothing could be exported, or the file gave other numbers; there is no new file.
        ModuleNotFoundError: a package that this needs is not installed.
    """
    check_option("to", to, Format)
    check_option("lowering", lowering, Lowering)
    path = Path(f"{_file_name(detector.name)}{SUFFIXES[to]}" if path is None else path)
    if path.suffix != SUFFIXES[to]:
        raise ExportError(f"{path}: expected a name that ends with {SUFFIXES[to]}")
    if path.is_dir():
        raise ExportError(f"{path}: expected a file, got a folder")
    if not isinstance(picture, Image.Image):
        raise TypeError(f"picture: expected a PIL.Image.Image, got {type(picture).__name__}")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = _Attempt(detector, to, lowering, picture, threshold, tell)
    reasons: list[str] = []
    for axes in ((),) if fixed else ((0, 2, 3), (0,), ()):
        try:
            # Beside the target, so that a file appears there whole or not at all.
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saccade-") as folder:
                file = Path(folder) / path.name
                checked, runs, least_size = attempt(file, axes)
                tell("measuring")
                pixels = attempt.pixels(1)
                calls: dict[str, Run] = {
                    name: functools.partial(run, pixels)
                    for name, run in ({EAGER: attempt.run} | runs).items()
                }
                with torch.inference_mode():
                    timings = alternate(calls, seconds)
                # A large ONNX model has its weights beside it; they come first.
                for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
                    part.replace(path.parent / part.name)
        except _NotThisWay as error:
            reasons.append(f"{_in_words(axes)}: {error}")
            continue
        return Export(
            path,
            tuple(AXES[axis] for axis in axes),
            (pixels.shape[2], pixels.shape[3]),
            least_size,
            tuple(reasons),
            timings[EAGER].milliseconds,
            {
                name: Checked(comparisons, timings[name].milliseconds)
                for name, comparisons in checked.items()
            },
        )
    told = "\n".join(
        [f"{detector.name} could not be exported to {to}; no file was left.", *reasons]
    )
    raise ExportError(told)


class _NotThisWay(Exception):  # noqa: N818
    """An attempt that failed; the message is the reason, in a line."""


class Outputs(nn.Module):
    """A detector with one tensor in and two out (logits, boxes), which every runtime takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(pixel_values=pixel_values)
        return found.logits, found.pred_boxes


class _Attempt:
    """One way to export a detector, done and verified."""

    def __init__(
        self,
        detector: Detector,
        to: Format,
        lowering: Lowering,
        picture: Image.Image,
        threshold: float,
        tell: Callable[[str], None],
    ) -> None:
        self.model = Outputs(detector.model).eval()
        self._processor, self._threshold = detector.processor, threshold
        self._to, self._lowering, self._tell = to, lowering, tell
        # Another picture of the same size makes a batch.
        pictures = [picture, ImageOps.mirror(picture)]
        pixels: Tensor = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        dtype = next(detector.model.parameters()).dtype
        self._pixels = pixels.to(dtype).contiguous()
        with torch.inference_mode():
            found = detector.model(pixel_values=self.pixels(1))
        # Models of two stages tell the scores by which they chose their queries.
        stages = (getattr(found, name, None) for name in ("enc_outputs_class", "enc_topk_logits"))
        self._chooses_queries = any(scores is not None for scores in stages)

    def pixels(self, batch: int) -> Tensor:
        """The picture, or both."""
        return self._pixels[:batch]

    def run(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The model itself."""
        outputs: tuple[Tensor, ...] = self.model(pixels)
        return outputs

    def __call__(
        self, file: Path, axes: tuple[int, ...]
    ) -> tuple[dict[str, dict[str, Comparison]], dict[str, Run], tuple[int, int]]:
        self._tell(f"exporting ({_in_words(axes)})")
        try:
            program = self._program(axes)
            least_size = _least_size(program)
            self._tell(f"writing {self._to} ({_in_words(axes)})")
            names = {axis: AXES[axis] for axis in axes}
            formats.write(program, file, self._to, self._lowering, OUTPUT_NAMES, [names])
            runs = formats.runtimes(file, self._to, self._lowering)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever others' code and exporters raise
            raise _NotThisWay(reason(error)) from error
        self._tell("verifying")
        checked = {name: self._compared(run, axes) for name, run in runs.items()}
        return checked, runs, least_size

    def _program(self, axes: tuple[int, ...]) -> ExportedProgram:
        pixels = self.pixels(2 if 0 in axes else 1)
        export = functools.partial(
            torch.export.export,
            self.model,
            (pixels,),
            dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),),
        )
        with torch.no_grad(), symbolic_sizes(), quiet_exporters():
            try:
                return export(strict=False)
            except Exception as first:
                # RT-DETRv2 asks a tensor for its len(), which only a strict export follows.
                try:
                    return export(strict=True)
                except Exception:
                    raise first from None

    def _compared(self, run: Run, axes: tuple[int, ...]) -> dict[str, Comparison]:
        found = {}
        for pixels in self._calls(axes):
            batch, _, height, width = pixels.shape
            call = f"batch {batch}, {height} x {width}"

            def detections_of(outputs: Any, size: tuple[int, int] = (height, width)) -> Any:
                return post_processed(self._processor, outputs, size)

            try:
                with torch.inference_mode():
                    expected, given = self.run(pixels), run(pixels)
                found[call] = compare(
                    expected,
                    given,
                    detections_of,
                    self._threshold,
                    chooses_queries=self._chooses_queries,
                )
            except Exception as error:
                raise _NotThisWay(f"{call}: {reason(error)}") from error
            if not found[call].same:
                raise _NotThisWay(f"{call}: {_told(found[call])}")
        return found

    def _calls(self, axes: tuple[int, ...]) -> Iterator[Tensor]:
        yield self.pixels(1)
        if 0 in axes:
            yield self.pixels(2)
        if 2 in axes:
            height, width = self._pixels.shape[2:]
            smaller = self.pixels(2)[:, :, : _smaller(height), : _smaller(width)]
            yield smaller.contiguous()
            # Three pictures that are higher and wider.
            yield pad(self._pixels[[0, 1, 0]], (0, STEP, 0, 2 * STEP))


def _least_size(program: ExportedProgram) -> tuple[int, int]:
    """(height, width) that a program's only input has at least, as torch.export found."""
    (name,) = program.graph_signature.user_inputs
    (given,) = (node for node in program.graph.nodes if node.name == name)
    limits = program.range_constraints
    height, width = (
        int(limits[size.node.expr].lower) if isinstance(size, torch.SymInt) else size
        for size in given.meta["val"].shape[2:]
    )
    return height, width


def _in_words(axes: tuple[int, ...]) -> str:
    return " and ".join(AXES[axis] for axis in axes) or "fixed sizes"


def _smaller(size: int) -> int:
    """A side that is some three quarters as long; the same where that leaves nothing."""
    return min(size, max(STEP, int(0.75 * size / STEP) * STEP))


def _told(comparison: Comparison) -> str:
    return (
        f"largest difference {comparison.largest_difference:.2g}, {comparison.rows_apart} of "
        f"{comparison.rows} rows of another query, {comparison.detections_missed} detections of "
        "either without a counterpart in the other"
    )


def reason(error: BaseException) -> str:
    """The line of an error that says most; exporters' messages go over pages."""
    # torch.onnx.export wraps what happened.
    while error.__cause__ is not None and type(error).__module__.startswith("torch.onnx"):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Exception from ")] or lines
    said = [line for line in lines if "expected" in line or line.startswith("RuntimeError")]
    return f"{type(error).__name__}: {(said or lines or [''])[0][:300]}"


def _file_name(name: str) -> str:
    """What a model is called, without the owner and what is awkward in a file name."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in last)
