"""The command line: reads arguments, prints results. The work is done elsewhere."""

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
from saccade.terminal import err, fail, need, out

if TYPE_CHECKING:
    from saccade.vision.batch import PictureDone

# Nothing heavy (transformers, matplotlib) is imported before the command that needs it.

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


def _print_version(wanted: bool) -> None:
    if wanted:
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
    """What is installed, which kernel runs and why, and whether its numbers are right.

    Exit code: 0 healthy (also on the reference alone, for a stated reason); 1 a check failed: wrong
    numbers, or the native library is there and does not load.
    """
    raise typer.Exit(doctor_report.run())


@app.command()
def explain(
    module: Annotated[
        Path | None,
        typer.Argument(
            help="A saccade.nn.DeformableAttention or MultiScaleDeformableAttention saved by "
            "torch.save(module, path). Without it: the worked example.",
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
    query: Annotated[int, typer.Option(help="Which query of the module.")] = 0,
    batch: Annotated[int, typer.Option(help="Of which element of the batch.")] = 0,
    head: Annotated[int, typer.Option(help="Which head.")] = 0,
    channel: Annotated[int, typer.Option(help="Which channel of the head's values.")] = 0,
    points: Annotated[
        int,
        typer.Option(min=1, help="Of how many points to show the corners, largest weights first."),
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
    picture: Annotated[
        Path | None,
        typer.Option("--out", help="Also draw it, for example explain.png.", show_default=False),
    ] = None,
) -> None:
    """Deformable attention, one query, step by step.

    Without arguments it walks through the worked example of the documentation. With MODULE and
    INPUTS, through one query and head of a module of yours. The last lines check that the parts
    sum to what the library gives.

    Exit code: 0 done; 1 a check failed; 2 wrong usage or a file that cannot be read.
    """
    from saccade.vision.explain import explain_worked_example
    from saccade.vision.explain_table import print_explanation

    if picture is not None:
        need("explain --out", "explain")
    if (module is None) != (inputs is None):
        fail("explain takes MODULE and INPUTS together, or neither for the worked example")
    try:
        if module is None or inputs is None:
            explanation = explain_worked_example(
                reference, interpolation=interpolation, padding=padding
            )
        else:
            from saccade.vision.explain_module import explain_module, load_inputs, load_module

            loaded = load_module(module)
            explanation = explain_module(
                loaded,
                load_inputs(inputs, loaded),
                query=query,
                batch=batch,
                head=head,
                channel=channel,
            )
    except (ValueError, TypeError, RuntimeError) as error:
        fail(error)
    print_explanation(out, explanation, points)
    if picture is not None:
        from saccade.vision.explain_picture import save_picture

        try:
            save_picture(explanation, picture)
        except (OSError, ValueError) as error:
            fail(f"cannot write {picture}: {error}")
        out.print(f"\nWritten: {picture}", markup=False, soft_wrap=True)
    if not all(check.passed for check in explanation.checks):
        raise typer.Exit(1)


@app.command()
def detect(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="The pictures.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB-ID",
            help="A detector of the Deformable-DETR family in the format of transformers. Without "
            "it: the model that comes with Saccade, which finds handwritten digits.",
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
            help="The decoder layer whose looks are drawn, 1 the first; without it, the last.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default=False)
    ] = None,
) -> None:
    """Finds objects in pictures and shows where their queries looked.

    Writes for each picture NAME_detections.png (boxes and labels), NAME_looked.png (the points that
    the queries of the objects read) and NAME.json (label, score and box in pixels).

    Exit code: 0 all done; 1 some pictures were skipped, each named with the reason; 2 wrong usage,
    no model, or no picture could be done.
    """
    need("detect", "detect")
    from saccade.vision.batch import detect_pictures
    from saccade.vision.detector import Detector, ModelError

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {folder}: {error.strerror or error}")
    try:
        with err.status("Loading the model") if err.is_terminal else nullcontext():
            detector = Detector.load(model)
    except ModelError as error:
        fail(error)
    if layer is not None and not 1 <= layer <= detector.num_layers:
        fail(f"--layer: expected 1 to {detector.num_layers}, the decoder's layers, got {layer}")
    skipped = 0
    # One console for all that shares the terminal with the bar: only it can print above the bar.
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
        disable=len(pictures) == 1 or not screen.is_terminal,
    ) as progress:
        task = progress.add_task("Pictures", total=len(pictures))
        for done in detect_pictures(detector, pictures, folder, threshold, layer):
            if done.problem is not None:
                skipped += 1
                errors.print(
                    f"skipped: {done.picture} {done.problem}", markup=False, soft_wrap=True
                )
            else:
                _print_detections(done)
            progress.advance(task)
    if skipped:
        err.print(f"{skipped} of {len(pictures)} pictures skipped", soft_wrap=True)
        raise typer.Exit(2 if skipped == len(pictures) else 1)


def _print_detections(done: PictureDone) -> None:
    found = ", ".join(f"{name} {score:.2f}" for name, score in done.found[:8])
    more = f", and {len(done.found) - 8} more" if len(done.found) > 8 else ""
    count = f"{len(done.found)} object" + ("" if len(done.found) == 1 else "s")
    text = f"{done.picture}: {count}{' (' if found else ''}{found}{more}{')' if found else ''}"
    out.print(text, markup=False, soft_wrap=True)
    assert done.files is not None
    for file in done.files:
        out.print(f"  {file}", markup=False, soft_wrap=True, style="dim")
