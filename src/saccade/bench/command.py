"""`saccade bench`: reads arguments, prints tables, writes JSON and a plot."""

from __future__ import annotations

import datetime
import json as json_format
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import saccade
from saccade.bench import models, operator
from saccade.bench.models import MODELS
from saccade.bench.operator import BASELINES, DEFAULT_WORKLOADS, DTYPES, WORKLOADS, Row
from saccade.doctor import processor_name
from saccade.terminal import MAX_THREADS, Threads, fail, need, out

PACKAGES = ("transformers", "torch-ms-deform-attn", "onnxruntime")  # whose versions are recorded
Names = list[str] | None
Seconds = Annotated[float, typer.Option(min=0, help="How long to take turns, per measurement.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results here.")]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    case: Annotated[Names, typer.Option(help="A workload of --list; repeat it.")] = None,
    dtype: Annotated[
        Names, typer.Option(help="float32 (default), bfloat16 or float16; repeat it.")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=MAX_THREADS, help="CPU threads, up to four per processor; repeat it."
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also time forward and backward together.")
    ] = False,
    seconds: Seconds = 1.0,
    json: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the ratios, for example bench.png.")
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Only list the workloads.")] = False,
) -> None:
    """The operator's speed on this machine, beside every baseline that is installed.

    All run in this process, taking turns, on the same inputs, after their results were compared with
    the definition in float64. Times are medians; a ratio is the baseline's time divided by Saccade's. A
    baseline that is missing or cannot do a case is listed with the reason.

    Exit code: 0 done; 1 a baseline gave wrong results; 2 wrong usage, or a file that cannot be written.
    """
    if context.invoked_subcommand is not None:
        return
    if only_list:
        for name, workload in WORKLOADS.items():
            out.print(f"{name:20} {workload.source}", markup=False, soft_wrap=True)
        return
    _check("--case", case, WORKLOADS)
    _check("--dtype", dtype, DTYPES)
    if plot is not None:
        need("bench --plot", "bench", "matplotlib")
    _print_head(operator.METHOD)
    results: list[Row] = []
    directions = (False, True) if backward else (False,)
    cases, numbers = case or DEFAULT_WORKLOADS, threads or [torch.get_num_threads()]
    for number, dtype_name, name, both in product(numbers, dtype or ["float32"], cases, directions):
        torch.set_num_threads(number)
        setting = {"dtype": DTYPES[dtype_name], "backward": both, "seconds": seconds}
        rows = operator.compare(WORKLOADS[name], list(BASELINES.values()), **setting)
        heading = (name, rows[0]["direction"], dtype_name, f"threads: {number}")
        out.print(" · ".join(heading), style="bold", soft_wrap=True)
        print_table(rows, "baseline", ("milliseconds", "minimum", "upper_quartile"))
        results += rows
    content = {"method": operator.METHOD, "measurements": results}
    _write(json, partial(write, command="saccade bench", results=content))
    _write(plot, partial(save_plot, results))
    _fail_if_wrong(results)


@app.command("models")
def bench_models(
    model: Annotated[Names, typer.Option(help="A model, by name; repeat it. Default: all.")] = None,
    threads: Threads = None,
    seconds: Seconds = 10.0,
    json: JsonFile = None,
) -> None:
    """Whole transformers models with random weights: a forward eager, and after saccade.patch.

    The models are made here, nothing is downloaded. One that cannot be made is listed with the reason.

    Exit code: 0 done; 1 a patched model gave other outputs; 2 wrong usage or something is missing.
    """
    need("bench models", "bench", "transformers")
    _check("--model", model, MODELS)
    _print_head(models.METHOD)
    torch.set_num_threads(threads or torch.get_num_threads())
    content = models.measure_all([(name, MODELS[name]) for name in model or MODELS], seconds)
    print_table(content["models"], "input", ("eager_ms", "patched_ms"))
    _write(json, partial(write, command="saccade bench models", results=content))
    _fail_if_wrong(content["models"])


def _print_head(method: str) -> None:
    parts = (f"{key} {value}" for key, value in machine().items())
    out.print(", ".join(parts), markup=False, soft_wrap=True)
    out.print(f"{method}\n", style="dim", markup=False)


def _check(option: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    for name in names or ():
        if name not in known:
            fail(f"{option}: expected one of {', '.join(known)}, got {name}")


def _fail_if_wrong(rows: Sequence[Row]) -> None:
    if any(row.get("is_wrong") for row in rows):
        raise typer.Exit(1)


def _write(path: Path | None, write_to: Callable[[Path], None]) -> None:
    if path is not None:
        try:
            write_to(path)
        except (OSError, ValueError) as error:
            fail(f"cannot write {path}: {error}")
        out.print(f"Written: {path}", markup=False, soft_wrap=True)


def machine() -> dict[str, str]:
    """What a measurement depends on."""
    versions = {
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "saccade": saccade.__version__,
        "backend": saccade.which_backend().name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def write(path: Path, command: str, results: dict[str, Any]) -> None:
    """Writes a JSON file: command, date, machine and the results; of a list one element per line."""
    head = {"command": command, "date": datetime.date.today().isoformat(), "machine": machine()}
    parts = []
    for key, value in (head | results).items():
        text = json_format.dumps(value, indent=2)
        if isinstance(value, list):
            rows = ",\n".join(json_format.dumps(row, ensure_ascii=False) for row in value)
            text = f"[\n{rows}\n]"
        parts.append(f"{json_format.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def times(ratio: float) -> str:
    """A ratio as a person reads it: three digits, two where the third is noise."""
    return f"{ratio:.{0 if ratio >= 100 else 1 if ratio >= 2 else 2}f} ×"


def milliseconds(time: float) -> str:
    """A time in milliseconds, three digits."""
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"


def print_table(rows: Sequence[Row], name: str, keys: Sequence[str]) -> None:
    """Prints the ratio, what is at `name`, and the times in milliseconds at `keys`; or why there are none."""
    headings = (key.replace("milliseconds", "median").replace("_", " ") for key in keys)
    table = Table("ratio", name, *headings, "computes in", box=None)
    for row in rows:
        if "ratio" in row:
            cells = (milliseconds(row[key]) for key in keys)
            table.add_row(times(row["ratio"]), row[name], *cells, row.get("computes_in"))
    out.print(table)
    for row in rows:
        if "reason" in row:
            out.print(f"–  {row[name]}: {row['reason']}", style="dim", markup=False, soft_wrap=True)
    out.print()


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws the ratios of the first dtype and number of threads: a row per workload, a mark per baseline."""
    measured = [row for row in rows if "ratio" in row]
    if not measured:
        raise ValueError("measurements: expected at least one, got none")
    from matplotlib.figure import Figure

    setting = (measured[0]["dtype"], measured[0]["threads"])
    measured = [row for row in measured if (row["dtype"], row["threads"]) == setting]
    workloads, directions, baselines = (
        list(dict.fromkeys(row[key] for row in measured))
        for key in ("workload", "direction", "baseline")
    )
    figure = Figure((11, 2 + 0.4 * len(workloads)), layout="constrained")
    figure.suptitle(f"{setting[0]}, {setting[1]} threads, {processor_name()}", fontsize=10)
    panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for panel, direction in zip(panels, directions, strict=True):
        for baseline in baselines:
            here = {"baseline": baseline, "direction": direction}
            marks = [row for row in measured if here.items() <= row.items()]
            ratios = [row["ratio"] for row in marks]
            panel.scatter(ratios, [row["workload"] for row in marks], label=baseline)
        panel.set(title=direction, xlabel="the baseline's time divided by Saccade's", xscale="log")
        panel.grid(axis="y")
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.savefig(path, dpi=130)
