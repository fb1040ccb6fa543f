"""`saccade bench`: reads arguments, shows progress, prints tables, writes JSON and a plot."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from saccade.bench.workloads import WORKLOADS
from saccade.terminal import err, fail, need, out

if TYPE_CHECKING:
    from saccade.bench.operator import Measurement, Skipped

# transformers and matplotlib are imported by what needs them, after the arguments.

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
Names = list[str] | None
Seconds = Annotated[float, typer.Option(min=0, help="How long to take turns, per measurement.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the results here.", show_default=False)
]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    case: Annotated[
        Names, typer.Option(help="A workload of --list; repeat it. Default: all.")
    ] = None,
    baseline: Annotated[
        Names, typer.Option(help="A baseline of --list; repeat it. Default: all.")
    ] = None,
    dtype: Annotated[
        Names, typer.Option(help="float32 (default), bfloat16 or float16; repeat it.")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="CPU threads; repeat it. Default: torch's choice."),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also time forward and backward together.")
    ] = False,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Locations anywhere on the map, not near the queries.")
    ] = False,
    single_call: Annotated[
        bool,
        typer.Option(
            "--single-call", help="One call per turn: caches as the baselines leave them."
        ),
    ] = False,
    seconds: Seconds = 1.0,
    json: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Also draw the ratios, for example bench.png.", show_default=False
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--list", help="Only list workloads and baselines.")
    ] = False,
) -> None:
    """The operator's speed on this machine, beside every baseline that is installed.

    All run in this process, taking turns, on the same inputs, after their results were compared with
    the definition in float64. Times are medians; a ratio is the baseline's time divided by Saccade's. A
    baseline that is missing or cannot do a case is listed with the reason. The grid_sample path is
    transformers' own code.

    Exit code: 0 done; 1 a baseline gave wrong results; 2 wrong usage, or a file that cannot be written.
    """
    if context.invoked_subcommand is not None:
        return
    from saccade.bench import report
    from saccade.bench.baselines import BASELINES
    from saccade.bench.operator import compare

    if names:
        for workload in WORKLOADS.values():
            out.print(f"{workload.name:20} {workload.source}", markup=False)
        for one in BASELINES.values():
            reason = one.missing()
            text = f"not here: {reason}" if reason else one.about
            out.print(f"{one.name:20} {text}", markup=False, soft_wrap=True)
        return
    _check("--case", case, WORKLOADS)
    _check("--baseline", baseline, BASELINES)
    _check("--dtype", dtype, DTYPES)
    if plot is not None:
        need("bench --plot", "bench", "matplotlib")
    baselines = [BASELINES[name] for name in dict.fromkeys(["saccade", *(baseline or BASELINES)])]
    out.print(report.machine_line(), soft_wrap=True)
    out.print(f"{report.METHOD}\n", style="dim")
    results: list[Measurement | Skipped] = []
    has_failed = False
    directions = [False, True] if backward else [False]
    numbers: list[int | None] = list(threads) if threads else [None]
    steps = product(numbers, dtype or ["float32"], case or WORKLOADS, directions)
    for number, dtype_name, name, with_backward in steps:
        try:
            with on_threads(number):
                rows = list(
                    compare(
                        WORKLOADS[name],
                        baselines,
                        dtype=DTYPES[dtype_name],
                        uniform=uniform,
                        backward=with_backward,
                        single_call=single_call,
                        seconds=seconds,
                    )
                )
        except ArithmeticError as error:
            has_failed = True
            err.print(f"wrong results: {name}: {error}", markup=False, soft_wrap=True)
            continue
        results += rows
        out.print(report.title(rows[0].setting), style="bold", soft_wrap=True)
        out.print(report.table(rows))
        for line in report.skipped_lines(rows):
            out.print(line, style="dim", markup=False, soft_wrap=True)
        out.print()
    if json is not None:
        with writing(json):
            report.write_measurements(json, command_line(context), results)
    if plot is not None:
        with writing(plot):
            report.save_plot(results, plot)
    if has_failed:
        raise typer.Exit(1)


@app.command("models")
def bench_models(
    context: typer.Context,
    model: Annotated[Names, typer.Option(help="A model, by name; repeat it. Default: all.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    seconds: Seconds = 10.0,
    json: JsonFile = None,
) -> None:
    """Whole transformers models with random weights: a forward eager, and after saccade.patch.

    Also how much of the forward is spent in attention, projections included, before and after. The
    models are made here, nothing is downloaded. One that cannot be made is listed with the reason.

    Exit code: 0 done; 1 a patched model gave other outputs; 2 wrong usage or something is missing.
    """
    need("bench models", "bench", "transformers")
    from saccade.bench import models, report

    _check("--model", model, models.MODELS)
    rows, has_failed = [], False
    with on_threads(threads):
        out.print(report.machine_line(), soft_wrap=True)
        out.print(f"threads: {torch.get_num_threads()}; ratio = eager / patched\n")
        for name in model or models.MODELS:
            err.print(f"{name} …", style="dim")
            try:
                rows.append(models.measure(models.MODELS[name], seconds))
            except ArithmeticError as error:
                has_failed = True
                err.print(f"wrong results: {error}", markup=False, soft_wrap=True)
        out.print(models.table(rows))
        if json is not None:
            head = {"method": models.METHOD, "threads": torch.get_num_threads()}
            with writing(json):
                rows_by_key = {"models": [row._asdict() for row in rows]}
                report.write(json, command_line(context), head, rows_by_key)
    if has_failed:
        raise typer.Exit(1)


def _check(option: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    for name in names or ():
        if name not in known:
            fail(f"{option}: expected one of {', '.join(known)}, got {name}")


@contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """Sets torch's number of CPU threads, and the one before again; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what was written, or why it could not be."""
    try:
        yield
    except (OSError, ValueError) as error:
        fail(f"cannot write {path}: {error}")
    out.print(f"Written: {path}", markup=False, soft_wrap=True)


def command_line(context: typer.Context) -> str:
    """The command, for the record; absolute paths are left out, as they name this machine's folders."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or value is False or value == [] or value == parameter.default:
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if not (isinstance(one, Path) and one.is_absolute()):
                words += [parameter.opts[0]] + ([] if one is True else [str(one)])
    return shlex.join(words)
