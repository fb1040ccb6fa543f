"""`saccade bench`: reads arguments, shows progress, prints tables, writes JSON and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from saccade.benchmark.detectors import DETECTORS
from saccade.benchmark.workloads import WORKLOADS
from saccade.terminal import err, fail, need, out

if TYPE_CHECKING:
    from saccade.benchmark.operator import Figure, LeftOut
    from saccade.benchmark.plan import Step

# transformers, matplotlib and onnxruntime are imported by what needs them, after the arguments.

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
LOCATIONS = ("model-like", "uniform")
Seconds = Annotated[float, typer.Option(min=0, help="How long to take turns for each figure.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures here.", show_default=False)
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", help="Also draw them, for example bench.png.", show_default=False),
]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    case: Annotated[
        list[str] | None, typer.Option(help="A workload of --list; repeat it. Without it, all.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A peer of --list; repeat it. Without it, all.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 (default), bfloat16 or float16; repeat it.")
    ] = None,
    locations: Annotated[
        list[str] | None,
        typer.Option(
            help="model-like (default): around the queries' places; uniform: anywhere. Repeat it."
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="CPU threads, repeat it. Without it, torch's choice."),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also time forward and backward together.")
    ] = False,
    single_call: Annotated[
        bool,
        typer.Option(
            "--single-call",
            help="One call a turn: caches as the peers leave them. Without it, warm caches.",
        ),
    ] = False,
    seconds: Seconds = 1.0,
    full: Annotated[
        bool,
        typer.Option("--full", help="All that benchmarks/results/cpu.json holds; some 20 minutes."),
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Whole models instead; the same as: bench models.")
    ] = False,
    json: JsonFile = None,
    plot: PlotFile = None,
    names: Annotated[bool, typer.Option("--list", help="Only list workloads and peers.")] = False,
) -> None:
    """The operator's speed on this machine, beside every peer that is installed.

    All run in this process, taking turns, on the same inputs, after their results were compared with
    the definition in float64. Times are medians; a ratio is the peer's time divided by Saccade's. A
    peer that is missing or cannot do a case is listed with the reason. The grid_sample path is
    transformers' own code.

    Exit code: 0 done; 1 a peer gave wrong numbers; 2 wrong usage, or a file that cannot be written.
    """
    if context.invoked_subcommand is not None:
        return
    if names:
        _print_names()
        return
    from saccade.benchmark.peers import all_peers, default_peers
    from saccade.benchmark.plan import chosen_plan, committed_plan

    _check("--case", case, WORKLOADS)
    _check("--peer", peer, all_peers())
    _check("--dtype", dtype, DTYPES)
    _check("--locations", locations, LOCATIONS)
    for option, wanted in (("--full", full), ("--models", models)):
        if wanted and (case or peer or dtype or locations or threads or single_call):
            fail(f"{option}: expected it without --case, --peer, --dtype and the like")
    if models:
        bench_models(context, json=json)
        return
    if plot is not None:
        need("bench --plot", "bench", "matplotlib")
    if full:
        plan = committed_plan()
    else:
        others = [name for name in peer or default_peers() if name != "saccade"]
        plan = chosen_plan(
            case or list(WORKLOADS),
            ["saccade", *others],
            dtypes=[DTYPES[name] for name in dtype or ["float32"]],
            threads=threads or [torch.get_num_threads()],
            locations=locations or ["model-like"],
            backward=backward,
            single_call=single_call,
        )
    _run(plan, seconds, command_line(context), json, plot)


def _check(option: str, given: Iterable[str] | None, known: Iterable[str]) -> None:
    for name in given or ():
        if name not in known:
            fail(f"{option}: expected one of {', '.join(known)}, got {name}")


def _print_names() -> None:
    from saccade.benchmark.peers import all_peers

    for workload in WORKLOADS.values():
        out.print(f"{workload.name:20} {workload.source}", markup=False)
    out.print()
    for peer in all_peers().values():
        reason = peer.missing()
        text = f"not here: {reason}" if reason else peer.about
        out.print(f"{peer.name:20} {text}", markup=False, soft_wrap=True)


def _run(
    plan: Sequence[Step], seconds: float, command: str, json: Path | None, plot: Path | None
) -> None:
    from saccade.benchmark import report
    from saccade.benchmark.plan import measure

    out.print(report.machine_line(), soft_wrap=True)
    out.print(f"{report.METHOD}\n", style="dim")
    found: list[Figure | LeftOut] = []
    wrong = False
    with on_threads(None), progress_bar("Figures", len(plan)) as progress:
        for step in plan:
            progress.update(TaskID(0), description=step.workload)
            try:
                rows = measure(step, seconds)
            except ArithmeticError as error:
                wrong = True
                err.print(f"wrong numbers: {step.workload}: {error}", markup=False, soft_wrap=True)
            else:
                found += rows
                out.print(report.title(rows[0].setting), style="bold", soft_wrap=True)
                out.print(report.table(rows))
                out.print()
            progress.advance(TaskID(0))
    results = report.results(command, found)
    if json is not None:
        with writing(json):
            report.write(results, json)
    if plot is not None:
        from saccade.benchmark.plot import save_plot

        with writing(plot):
            save_plot(results, plot)
    if wrong:
        raise typer.Exit(1)


@contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """torch's number of CPU threads, and the one before again."""
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


@app.command("models")
def bench_models(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(DETECTORS)}; repeat it. Without it, all."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. Without it, torch's choice.", show_default=False),
    ] = None,
    seconds: Seconds = 10.0,
    json: JsonFile = None,
) -> None:
    """Whole transformers models with random weights: a forward eager, and after saccade.patch.

    Also how much of the forward is spent in attention, projections included, before and after. The
    models are made here, nothing is downloaded. One that cannot be made is listed with the reason.

    Exit code: 0 done; 1 a patched model gave other outputs; 2 wrong usage or something is missing.
    """
    _check("--model", model, DETECTORS)
    need("bench models", "bench", "transformers")
    from saccade.benchmark import models, report

    figures, wrong = [], False
    with on_threads(threads):
        out.print(report.machine_line(), soft_wrap=True)
        out.print(f"threads: {torch.get_num_threads()}; ratio = eager / patched\n")
        chosen = model or list(DETECTORS)
        with progress_bar("Models", len(chosen)) as progress:
            for name in chosen:
                progress.update(TaskID(0), description=name)
                try:
                    figures.append(models.measure(DETECTORS[name], seconds))
                except ArithmeticError as error:
                    wrong = True
                    err.print(f"wrong numbers: {error}", markup=False, soft_wrap=True)
                progress.advance(TaskID(0))
        out.print(models.table(figures))
        if json is not None:
            with writing(json):
                models.write(command_line(context), figures, json)
    if wrong:
        raise typer.Exit(1)


@app.command("fused")
def bench_fused(
    context: typer.Context,
    case: Annotated[
        list[str] | None, typer.Option(help="A workload; repeat it. Without it, eight.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. Without it, torch's choice.", show_default=False),
    ] = None,
    seconds: Seconds = 5.0,
    json: JsonFile = None,
) -> None:
    """The fused operator against softmax, locations and the plain one; ragged against padded queries.

    For bevformer-sca, what lies between the projections of BEVFormer's cross attention to six cameras,
    with the geometry of a car: without padding, and padded and rebatched as its code has it.

    Exit code: 0 done; 1 wrong numbers; 2 wrong usage or something is missing.
    """
    need("bench fused", "bench", "transformers")
    from saccade.benchmark import fused, report

    known, rows = [*fused.CASES, fused.VIEWS], []
    _check("--case", case, known)
    chosen = case or known
    with on_threads(threads):
        out.print(report.machine_line(), soft_wrap=True)
        out.print(f"threads: {torch.get_num_threads()}; {fused.METHOD}\n", style="dim")
        try:
            with progress_bar("Workloads", len(chosen)) as progress:
                for name in chosen:
                    rows += fused.rows_of(name, seconds)
                    progress.advance(TaskID(0))
        except ArithmeticError as error:
            err.print(f"wrong numbers: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None
        out.print(fused.table(rows))
        if json is not None:
            with writing(json):
                fused.write(command_line(context), rows, json)


@app.command("sweep")
def bench_sweep(
    context: typer.Context,
    shapes: Annotated[
        int, typer.Option(min=0, help="How many random shapes beside the registry.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of the random shapes.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. Without it, torch's choice.", show_default=False),
    ] = None,
    seconds: Seconds = 0.1,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Where the kernel is slow for its work: the registry and random shapes, and how time grows.

    The work is the cache lines that the value rows read lie in; a bandwidth is the work over the time,
    with warm caches. The worst shapes are named, and how far they are below the median. Then time
    against queries, against levels and points, and on one thread and many.

    Exit code: 0 done; 1 wrong numbers; 2 wrong usage, or a file that cannot be written.
    """
    if plot is not None:
        need("bench sweep --plot", "bench", "matplotlib")
    from saccade.benchmark import report, sweep

    with on_threads(threads):
        out.print(report.machine_line(), soft_wrap=True)
        out.print(f"threads: {torch.get_num_threads()}; {sweep.METHOD}\n", style="dim")
        sweep.keep_memory()
        chosen = [*WORKLOADS.values(), *sweep.random_workloads(shapes, seed)]
        steps = sweep.scaling_steps()
        figures, curves = [], []
        try:
            with progress_bar("Shapes", len(chosen) + len(steps)) as progress:
                for workload in chosen:
                    figures.append(sweep.shape_figure(workload, seconds))
                    progress.advance(TaskID(0))
                for figure in sweep.scaling_figures(steps, seconds):
                    curves.append(figure)
                    progress.advance(TaskID(0))
        except ArithmeticError as error:
            err.print(f"wrong numbers: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None
        for line in sweep.described(sweep.summarise(figures), curves):
            out.print(line, markup=False, soft_wrap=True)
        if json is not None:
            with writing(json):
                sweep.write(command_line(context), figures, curves, json)
        if plot is not None:
            from saccade.benchmark.sweep_plot import save_plot
            from saccade.benchmark.timing import machine

            with writing(plot):
                save_plot(figures, curves, machine(), torch.get_num_threads(), plot)


def command_line(context: typer.Context) -> str:
    """The command as it was given, for the record; files elsewhere on this machine are not named."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or value is False or value == [] or value == parameter.default:
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if not (isinstance(one, Path) and one.is_absolute()):
                words += [parameter.opts[0]] + ([] if one is True else [str(one)])
    return shlex.join(words)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere; its one task is task 0."""
    # One console for all that shares the terminal with the bar: only it can print above the bar.
    screen = out if out.is_terminal else err
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not screen.is_terminal,
    ) as progress:
        progress.add_task(what, total=total)
        yield progress
