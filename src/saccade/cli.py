"""The command line: reads arguments and prints results; other modules do the work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import saccade
from saccade import doctor as doctor_report
from saccade.bench.command import app as bench
from saccade.call import Interpolation, Padding
from saccade.export.command import export
from saccade.files import as_line
from saccade.terminal import MaxMegapixels, Threads, err, fail, need, out
from saccade.vision import MAX_MEGAPIXELS

if TYPE_CHECKING:
    from saccade.vision.batch import ProcessedImage

# Heavy packages (transformers, matplotlib) are imported only by the commands that need them.

app = typer.Typer(
    name="saccade",
    help="Deformable attention: see where queries look, and detect objects with it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command()(export)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"saccade {saccade.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Deformable attention: see where queries look, and detect objects with it."""


@app.command()
def doctor() -> None:
    """Shows what is installed and which kernel runs and why, and checks its results.

    Exit code: 0 healthy (also if only the reference runs, for a stated reason); 1 a check failed:
    wrong numbers, or the native library exists and does not load.
    """
    raise typer.Exit(doctor_report.run())


@app.command()
def explain(
    module: Annotated[
        Path | None,
        typer.Argument(
            help="A saccade.nn.DeformableAttention or MultiScaleDeformableAttention saved by "
            "torch.save(module, path). By default the worked example is explained.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Argument(
            help="The arguments of the module's forward: a dict saved by torch.save(dict, path).",
            show_default=False,
        ),
    ] = None,
    query: Annotated[int, typer.Option(help="Index of the query.")] = 0,
    batch: Annotated[int, typer.Option(help="Index of the batch element.")] = 0,
    head: Annotated[int, typer.Option(help="Index of the head.")] = 0,
    channel: Annotated[int, typer.Option(help="Index of the channel of the head's values.")] = 0,
    points: Annotated[
        int,
        typer.Option(
            min=1, help="Show the corners of this many points, those with the largest weights."
        ),
    ] = 4,
    reference: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="X Y",
            help="Worked example: move the reference point (pixels); try 1.3 1.6.",
        ),
    ] = (1.5, 1.5),
    interpolation: Annotated[
        Interpolation, typer.Option(help="Worked example: how a point reads between pixels.")
    ] = "linear",
    padding: Annotated[
        Padding, typer.Option(help="Worked example: what a point reads outside the map.")
    ] = "zeros",
    image_path: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Also draw an image: a file that ends in .png, .jpg, .jpeg, .pdf or .svg.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Explains deformable attention step by step, for one query.

    Without arguments, it explains the worked example of the documentation. With MODULE and INPUTS,
    it explains one query and head of your module. The last lines check that the parts sum to the
    output of the library.

    Exit code: 0 done, also where the output is NaN or infinite, which the last line says; 1 a check
    failed: the parts differ from the output; 2 wrong usage, or a file that cannot be read or written.
    """
    from saccade.vision.explain import explain_worked_example
    from saccade.vision.explain_table import print_explanation

    if image_path is not None:
        need("explain --out", "explain")
        from saccade.vision.explain_image import check_path

        try:
            check_path(image_path)
        except (OSError, ValueError) as error:
            fail(f"--out: cannot write {as_line(image_path)}: {getattr(error, 'strerror', error)}")
    if (module is None) != (inputs is None):
        fail("explain takes both MODULE and INPUTS, or neither for the worked example")
    indices = {"query": query, "batch": batch, "head": head, "channel": channel}
    worked = (reference, interpolation, padding)
    if module is None and any(indices.values()):
        name = next(name for name, index in indices.items() if index)
        fail(f"--{name}: expected 0, because the worked example has one, got {indices[name]}")
    if module is not None and worked != ((1.5, 1.5), "linear", "zeros"):
        fail("--reference, --interpolation and --padding are for the worked example, got a MODULE")
    try:
        if module is None or inputs is None:
            explanation = explain_worked_example(
                reference, interpolation=interpolation, padding=padding
            )
        else:
            from saccade.vision.explain_files import load_inputs, load_module
            from saccade.vision.explain_module import explain_module

            loaded = load_module(module)
            explanation = explain_module(loaded, load_inputs(inputs, loaded), **indices)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        # Names in a file may hold characters that a terminal obeys.
        fail(as_line(str(error).partition("\n")[0] or type(error).__name__))
    print_explanation(out, explanation, points)
    if image_path is not None:
        from saccade.vision.explain_image import save_image

        try:
            save_image(explanation, image_path)
        except (OSError, ValueError) as error:
            fail(f"--out: cannot write {as_line(image_path)}: {error}")
        out.print(f"\nWritten: {as_line(image_path)}", markup=False, soft_wrap=True)
    if not all(check.passed for check in explanation.checks):
        raise typer.Exit(1)


@app.command()
def detect(
    image_paths: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB-ID",
            help="A detector of the Deformable-DETR family in the format of transformers. By default "
            "the model that comes with Saccade, which finds handwritten digits.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "saccade-out"
    ),
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The score that an object must exceed.")
    ] = 0.5,
    layer: Annotated[
        int | None,
        typer.Option(
            help="The decoder layer whose looks are drawn, 1 the first; by default the last.",
            show_default=False,
        ),
    ] = None,
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS,
    threads: Threads = None,
) -> None:
    """Finds objects in images and shows where their queries looked.

    Writes for each image NAME_detections.png (boxes and labels), NAME_looked.png (the points that
    the queries of the objects read) and NAME.json (label, score and box in pixels).

    The three files of an image appear together. Images are PNG, JPEG, WebP, AVIF, BMP, GIF, TIFF,
    PPM or JPEG 2000.

    Exit code: 0 all done; 1 some images were skipped, each named with the reason, for example that
    the model's scores for it are not numbers; 2 wrong usage, no model or a broken one, or no image
    could be processed; 130 or 143 ended by SIGINT or SIGTERM.
    """
    need("detect", "detect")
    from saccade.vision.batch import detect_images
    from saccade.vision.detector import Detector
    from saccade.vision.models import ModelError

    if not 0 <= threshold <= 1:  # not every typer refuses NaN
        fail(f"--threshold: expected 0 to 1, got {threshold}")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {as_line(folder)}: {error.strerror or error}")
    try:
        with err.status("Loading the model") if err.is_terminal else nullcontext():
            detector = Detector.load(model)
        detector.check_recording()
    except ModelError as error:
        fail(error)
    if layer is not None and not 1 <= layer <= detector.num_layers:
        fail(f"--layer: expected 1 to {detector.num_layers}, the decoder's layers, got {layer}")
    skipped = 0
    # Only the console that draws the progress bar can print above it.
    screen = out if out.is_terminal else err
    errors = screen if err.is_terminal else err
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=len(image_paths) == 1 or not screen.is_terminal,
    ) as progress:
        task = progress.add_task("Images", total=len(image_paths))
        for result in detect_images(
            detector, image_paths, folder, threshold, layer, max_megapixels
        ):
            if result.problem is not None:
                skipped += 1
                errors.print(
                    f"skipped: {as_line(result.path)} {result.problem}",
                    markup=False,
                    soft_wrap=True,
                )
            else:
                _print_detections(result)
            progress.advance(task)
    if skipped:
        err.print(f"{skipped} of {len(image_paths)} images skipped", soft_wrap=True)
        raise typer.Exit(2 if skipped == len(image_paths) else 1)


def _print_detections(result: ProcessedImage) -> None:
    objects = result.objects
    names = ", ".join(as_line(f"{label} {score:.2f}") for label, score in objects[:8])
    more = f", and {len(objects) - 8} more" if len(objects) > 8 else ""
    count = f"{len(objects)} object" + ("" if len(objects) == 1 else "s")
    text = f"{as_line(result.path)}: {count}" + (f" ({names}{more})" if names else "")
    out.print(text, markup=False, soft_wrap=True)
    assert result.files is not None
    for file in result.files:
        out.print(f"  {as_line(file)}", markup=False, soft_wrap=True, style="dim")
