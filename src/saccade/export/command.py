"""`saccade export`: reads arguments, shows progress, prints the results."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table

from saccade import doctor
from saccade.export.formats import CHECK_INPUTS, Format
from saccade.files import as_line
from saccade.integrations.onnx import Lowering
from saccade.terminal import MaxMegapixels, Threads, err, fail, need, out
from saccade.vision import MAX_MEGAPIXELS

if TYPE_CHECKING:
    from saccade.export.detectors import Export, RuntimeResult

# Heavy packages such as transformers and onnx are imported only after the arguments were read.


def export(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER|HUB-ID",
            help="A detector of the Deformable-DETR family in the format of transformers. By default "
            "the model that comes with Saccade, which finds handwritten digits.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Format,
        typer.Option(
            help="onnx; aoti: compiled ahead of time for this processor, for Python and C++; torch: "
            "a program of torch.export."
        ),
    ] = "onnx",
    lowering: Annotated[
        Lowering | None,
        typer.Option(
            help="How ONNX expresses the operator. grid_sample (the default) and gather: standard "
            "ONNX; plugin: TensorRT's node; native: Saccade's kernel in ONNX Runtime.",
            show_default=False,
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The file to write; by default MODEL.onnx or MODEL.pt2 in this folder."
        ),
    ] = None,
    image_path: Annotated[
        Path | None,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="The image to verify the file with; by default a scene that comes with Saccade.",
            show_default=False,
        ),
    ] = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Export for batch 1 and the image's resolution only.")
    ] = False,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Detections above this score are compared, but never fewer than 10.",
        ),
    ] = 0.5,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure speed.")] = 3.0,
    threads: Threads = None,
) -> None:
    """Writes a detector as a file for another runtime, and verifies the file.

    The file takes pixel_values from the model's image processor, and returns logits and pred_boxes.
    Batch and resolution are dynamic as far as the model's own code allows. The file is run here on
    the image, on a batch and on another resolution, and compared with the model. A file that does
    not give the same detections is deleted.

    Exit code: 0 written and verified; 1 the model cannot be exported this way, or the file gave
    other numbers, or the disk is full, and no file is left; 2 wrong usage, no image, no model, or one
    that is broken or gives scores that are not numbers; 130 or 143 ended by SIGINT or SIGTERM.
    """
    if lowering is not None and to != "onnx":
        fail(f"--lowering: expected with --to onnx only, got it with --to {to}")
    need("export", "export" if to == "onnx" else "detect")
    from saccade.export.detectors import ExportError, export_detector
    from saccade.vision.detector import Detector
    from saccade.vision.images import ImageError, open_image
    from saccade.vision.models import ModelError

    if threads is not None:
        torch.set_num_threads(threads)
    lowering = lowering or "grid_sample"
    if path is not None and path.is_dir():
        fail(f"--out: expected a file, got the folder {as_line(path)}")
    try:
        image = open_image(image_path or doctor.EXAMPLE_IMAGE, max_megapixels)
        with err.status("Loading the model") if err.is_terminal else nullcontext():
            detector = Detector.load(model)
    except ModelError as error:
        fail(error)
    except ImageError as error:
        fail(f"{as_line(image_path or doctor.EXAMPLE_IMAGE)} {error}")
    with err.status("Exporting") if err.is_terminal else nullcontext() as status:

        def show_progress(step: str) -> None:
            if status is not None:
                status.update(step.capitalize())

        try:
            result = export_detector(
                detector,
                to,
                path,
                image=image,
                lowering=lowering,
                fixed=fixed,
                threshold=threshold,
                seconds=seconds,
                show_progress=show_progress,
            )
        except ModelError as error:
            fail(error)
        except (ExportError, OSError, ValueError) as error:
            err.print(f"error: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
    _print(result, to, lowering)


def _print(result: Export, to: Format, lowering: Lowering) -> None:
    megabytes = result.path.stat().st_size / 1e6
    out.print(f"Written: {as_line(result.path)} ({megabytes:.1f} MB)", markup=False, soft_wrap=True)
    batch, height, width = (
        axis if axis in result.dynamic else str(size)
        for axis, size in zip(("batch", "height", "width"), (1, *result.size), strict=True)
    )
    out.print(
        f"  takes  pixel_values [{batch}, 3, {height}, {width}] from the image processor\n"
        f"  gives  logits [{batch}, queries, classes], pred_boxes [{batch}, queries, 4] "
        f"(centre x, y, width, height; 0 to 1){_describe_min_size(result, to)}\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(
        "", "largest difference", "detections compared", "ms per image", box=None, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(f"PyTorch {torch.__version__}", "", "", f"{result.eager_milliseconds:.1f}")
    for name, runtime in result.runtimes.items():
        compared = sum(comparison.detections for comparison in runtime.comparisons.values())
        table.add_row(
            name,
            f"{runtime.largest_difference:.1e}",
            f"{compared}, all the same{_describe_unmatched_rows(runtime)}",
            f"{runtime.milliseconds:.1f}",
        )
    out.print(table)
    inputs = dict.fromkeys(
        name for runtime in result.runtimes.values() for name in runtime.comparisons
    )
    out.print(f"\nVerified: {'; '.join(inputs)}", markup=False, soft_wrap=True)
    for note in result.reasons_not_dynamic:
        out.print(f"Not dynamic: {note}", markup=False, soft_wrap=True)
    for note in _notes(to, lowering, result.path):
        out.print(note, markup=False, soft_wrap=True)


def _describe_min_size(result: Export, to: Format) -> str:
    """States the smallest image that the file accepts, if the file checks that."""
    if to != "torch" or "height" not in result.dynamic:
        return ""
    height, width = result.min_size
    return f"\n  for    images of at least {height} x {width}; it rejects smaller ones"


def _describe_unmatched_rows(runtime: RuntimeResult) -> str:
    """Counts rows whose queries only one run selected; the largest difference excludes them."""
    count = sum(comparison.unmatched_rows for comparison in runtime.comparisons.values())
    return f" ({count} other rows belong to other queries)" if count else ""


def _notes(to: Format, lowering: Lowering, path: Path) -> list[str]:
    """States how to run the file, and what to beware of."""
    if to == "torch":
        return [f"To run it: import saccade; torch.export.load({str(path)!r}).module()"]
    if to == "aoti":
        return [
            f"To run it: import saccade; torch._inductor.aoti_load_package({str(path)!r}); in C++ as "
            f"examples/cpp does. Set {CHECK_INPUTS}=1 in the environment: without it the package accepts "
            "inputs of other sizes and computes wrong numbers. It was compiled for this processor and "
            "this torch."
        ]
    if lowering == "plugin":
        return [
            "Saccade's kernel ran the plugin's node. TensorRT itself did not run it: "
            "compare there before you ship."
        ]
    if lowering == "native":
        return [
            "To run it: onnxruntime.InferenceSession(path, "
            "saccade.integrations.onnx.session_options())"
        ]
    return []
