"""`saccade export`: reads arguments, shows progress, prints what was verified."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table

from saccade import doctor
from saccade.export.formats import CHECK_INPUTS, Format
from saccade.integrations.onnx import Lowering
from saccade.terminal import err, fail, need, out

if TYPE_CHECKING:
    from saccade.export.detectors import Checked, Export

# transformers, onnx and the rest are imported after the arguments.


def export(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER|HUB-ID",
            help="A detector of the Deformable-DETR family in the format of transformers. Without "
            "it: the model that comes with Saccade, which finds handwritten digits.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Format,
        typer.Option(
            help="onnx; aoti, compiled ahead of time for this processor, for Python and C++; torch, "
            "a program of torch.export."
        ),
    ] = "onnx",
    lowering: Annotated[
        Lowering | None,
        typer.Option(
            help="How ONNX expresses the operator. grid_sample (the default) and gather: in standard "
            "ONNX; plugin: TensorRT's node; native: Saccade's kernel in ONNX Runtime.",
            show_default=False,
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option("--out", help="The file; otherwise MODEL.onnx or MODEL.pt2, here."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="What to verify the file with; otherwise a scene that comes with Saccade.",
            show_default=False,
        ),
    ] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Batch 1 and the picture's resolution alone.")
    ] = False,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Detections above this score are compared (at least 10)."
        ),
    ] = 0.5,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure the speeds.")] = 3.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default=False)
    ] = None,
) -> None:
    """Writes a detector as a file for another runtime, and verifies the file.

    The file takes pixel_values as the model's image processor makes them, and gives logits and
    pred_boxes. Batch and resolution are dynamic as far as the model's own code allows. The file is
    run here, on the picture, on a batch and on another resolution, and compared with the model; one
    that does not give the same detections is not left behind.

    Exit code: 0 written and verified; 1 the model cannot be exported so, or the file gave other
    numbers, and there is no file; 2 wrong usage, no model or no picture.
    """
    if lowering is not None and to != "onnx":
        fail(f"--lowering: expected with --to onnx alone, got it with --to {to}")
    need("export", "export" if to == "onnx" else "detect")
    from saccade.export.detectors import ExportError, export_detector
    from saccade.vision.detector import Detector, ModelError
    from saccade.vision.pictures import PictureError, open_picture

    if threads is not None:
        torch.set_num_threads(threads)
    lowering = lowering or "grid_sample"
    if path is not None and path.is_dir():
        fail(f"--out: expected a file, got the folder {path}")
    try:
        looked_at = open_picture(doctor.EXAMPLE_PICTURE if picture is None else picture)
        with err.status("Loading the model") if err.is_terminal else nullcontext():
            detector = Detector.load(model)
    except ModelError as error:
        fail(error)
    except PictureError as error:
        fail(f"{picture or doctor.EXAMPLE_PICTURE} {error}")
    with err.status("Exporting") if err.is_terminal else nullcontext() as status:

        def tell(doing: str) -> None:
            if status is not None:
                status.update(doing.capitalize())

        try:
            done = export_detector(
                detector,
                to,
                path,
                picture=looked_at,
                lowering=lowering,
                fixed=fixed,
                threshold=threshold,
                seconds=seconds,
                tell=tell,
            )
        except (ExportError, OSError, ValueError) as error:
            err.print(f"error: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
    _print(done, to, lowering)


def _print(done: Export, to: Format, lowering: Lowering) -> None:
    megabytes = done.path.stat().st_size / 1e6
    out.print(f"Written: {done.path} ({megabytes:.1f} MB)", markup=False, soft_wrap=True)
    batch, height, width = (
        axis if axis in done.dynamic else str(size)
        for axis, size in zip(("batch", "height", "width"), (1, *done.size), strict=True)
    )
    out.print(
        f"  takes  pixel_values [{batch}, 3, {height}, {width}], as the image processor makes them\n"
        f"  gives  logits [{batch}, queries, classes], pred_boxes [{batch}, queries, 4] "
        f"(centre x, y, width, height; 0 to 1){_least(done, to)}\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(
        "", "largest difference", "detections compared", "ms a picture", box=None, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(f"PyTorch {torch.__version__}", "", "", f"{done.eager_milliseconds:.1f}")
    for name, checked in done.runtimes.items():
        compared = sum(each.detections for each in checked.comparisons.values())
        table.add_row(
            name,
            f"{checked.largest_difference:.1e}",
            f"{compared}, all the same{_apart(checked)}",
            f"{checked.milliseconds:.1f}",
        )
    out.print(table)
    calls = dict.fromkeys(call for each in done.runtimes.values() for call in each.comparisons)
    out.print(f"\nVerified: {'; '.join(calls)}", markup=False, soft_wrap=True)
    for note in done.fixed_because:
        out.print(f"Not dynamic: {note}", markup=False, soft_wrap=True)
    for note in _notes(to, lowering, done.path):
        out.print(note, markup=False, soft_wrap=True)


def _least(done: Export, to: Format) -> str:
    """The smallest picture, where its size may change and what runs the file asks for it."""
    if to != "torch" or "height" not in done.dynamic:
        return ""
    height, width = done.least_size
    return f"\n  for    pictures of at least {height} x {width}; it refuses smaller ones"


def _apart(checked: Checked) -> str:
    """Rows of queries that one of both did not choose, which the largest difference leaves out."""
    apart = sum(each.rows_apart for each in checked.comparisons.values())
    return f" ({apart} other rows of other queries)" if apart else ""


def _notes(to: Format, lowering: Lowering, path: Path) -> list[str]:
    """What the file needs where it runs."""
    if to == "torch":
        return [f"To run it: import saccade; torch.export.load({str(path)!r}).module()"]
    if to == "aoti":
        return [
            f"To run it: import saccade; torch._inductor.aoti_load_package({str(path)!r}); in C++ as "
            f"examples/cpp does. Set {CHECK_INPUTS}=1 in the environment: without it the package takes "
            "inputs of other sizes and computes wrong numbers. It was compiled for this processor and "
            "this torch."
        ]
    if lowering == "plugin":
        return [
            "The plugin's node was run on Saccade's kernel. TensorRT itself did not run it: "
            "compare there before you ship."
        ]
    if lowering == "native":
        return [
            "To run it: onnxruntime.InferenceSession(path, "
            "saccade.integrations.onnx.session_options())"
        ]
    return []
