"""What can be exported, and what runs it: the table of docs/export.md, tried out.

`python -m benchmarks.export_matrix` prints it, `--write` puts it between the marks of the page, `--keep
FILE` goes on where an earlier run stopped. A target (benchmarks/export_targets.py) is exported once, and
its program goes through all that runs programs, in a process with a limit; torch.compile and
torch.jit.trace have processes of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.export_targets import TARGETS, Target, Tensors
from saccade.export import formats
from saccade.export.detectors import summarize_error
from saccade.integrations.exporter_logging import silence_exporters
from saccade.integrations.onnx import Lowering

PAGE = Path(__file__).resolve().parent.parent / "docs" / "export.md"
MARKED = re.compile(r"(<!-- matrix -->\n).*?(<!-- end of matrix -->)", flags=re.DOTALL)
QUERIES = 10
# The batch, and which of the target's two sizes; the first is what is exported.
CALLS = {"same": (3, 0), "batch 1": (1, 0), "batch 8": (8, 0), "other resolution": (3, 1)}
Outcomes = dict[str, str]
"""For each call "yes", or why not."""


class Work:
    """A target on its way through the runtimes; what several of them need is made once."""

    def __init__(self, target: Target, folder: Path) -> None:
        torch.manual_seed(0)
        self.target, self.folder = target, folder
        self.module: nn.Module = target.make().eval()
        self._made: dict[str, Any] = {}

    def inputs(self, call: str) -> Tensors:
        """Random tensors for a call."""
        batch, size = CALLS[call]
        return self.target.inputs(batch, QUERIES, *self.target.sizes[size])

    def program(self) -> torch.export.ExportedProgram:
        """Exported at the first size."""
        return self._once("program", lambda: self.target.export(self.module, self.inputs("same")))

    def onnx(self, lowering: Lowering) -> Path:
        """The program as a file."""
        path = self.folder / f"{lowering}.onnx"
        self._once(lowering, lambda: formats.write_onnx(self.program(), path, lowering))
        return path

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """The same result, or the same error, however often it is asked for."""
        if name not in self._made:
            try:
                self._made[name] = make()
            except Exception as error:  # whatever a toolchain raises is the answer
                self._made[name] = error
        if isinstance(self._made[name], Exception):
            raise self._made[name]
        return self._made[name]


def _compile(work: Work) -> Callable[..., Any]:
    # transformers reads a number back in a check of its own.
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(work.module, fullgraph=True, dynamic=True, backend="aot_eager")
        compiled(*work.inputs("same"))
    return torch._dynamo.config.patch(capture_scalar_outputs=True)(compiled)


def _trace(work: Work) -> Callable[..., Any]:
    with silence_exporters():
        return torch.jit.trace(work.module, work.inputs("same"), check_trace=False)


def _exported(work: Work) -> Callable[..., Any]:
    path = work.folder / "exported.pt2"
    torch.export.save(work.program(), path)
    return formats.in_program(path)


def _aoti(work: Work) -> Callable[..., Any]:
    path = work.folder / "compiled.pt2"
    formats.write(work.program(), path, "aoti", "grid_sample")
    return formats.in_package(path)


def _onnxruntime(lowering: Lowering, work: Work) -> Callable[..., Any]:
    return formats.in_onnxruntime(work.onnx(lowering), lowering)


def _openvino(lowering: Lowering, work: Work) -> Callable[..., Any]:
    return formats.in_openvino(work.onnx(lowering))


RUNTIMES: dict[str, Callable[[Work], Callable[..., Any]]] = {
    "compile": _compile,
    "trace": _trace,
    "export": _exported,
    "AOTI": _aoti,
    "ONNX Runtime, grid_sample": partial(_onnxruntime, "grid_sample"),
    "ONNX Runtime, gather": partial(_onnxruntime, "gather"),
    "ONNX Runtime, plugin": partial(_onnxruntime, "plugin"),
    "ONNX Runtime, native": partial(_onnxruntime, "native"),
    "OpenVINO, grid_sample": partial(_openvino, "grid_sample"),
    "OpenVINO, gather": partial(_openvino, "gather"),
}
# What shares a process, and for how many seconds it may run: Swin takes a quarter of an hour to compile.
GROUPS = {("compile",): 1800, ("trace",): 300, tuple(RUNTIMES)[2:]: 3600}


def cell(work: Work, runtime: str) -> Outcomes:
    """What becomes of each call."""
    outcomes = {}
    with torch.no_grad():
        try:
            run = RUNTIMES[runtime](work)
        except Exception as error:
            return dict.fromkeys(CALLS, _describe_refusal(error))
        for call in CALLS:
            inputs = work.inputs(call)
            try:
                expected, actual = _tuple(work.module(*inputs)), _tuple(run(*inputs))
                torch.testing.assert_close(actual, expected, **work.target.tolerance)
                outcomes[call] = "yes"
            except Exception as error:
                outcomes[call] = _describe_refusal(error)
    return outcomes


def _tuple(outputs: Any) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _describe_refusal(error: Exception) -> str:
    """The reason, without places in sources, paths and sizes of one case, so that notes do not repeat."""
    message = re.sub(r"\S*/(\w+\.\w+)", r"\1", summarize_error(error))
    message = re.sub(r"(\w+Error: )+(\w+, [\w.:]+, )?", r"\1", message)
    return re.sub(r"\b\d{2,}\b", "n", message).replace("|", "/")[:160]


_WINDOWS = (
    "Swin, without Saccade too: it decides by the numbers of the resolution whether to pad its maps to "
    "whole windows, so that a program is for one resolution; torch.export refuses others by a guard, "
    "which forbids batch 1 too, and the other runtimes stop within Swin. torch.compile compiles again."
)
# What a reader should know of an expected refusal: a part of the target's name, a part of the message.
# A message that is not here is printed as it is, and the test of the page objects.
EXPLAINED = {
    ("", "value: expected [batch, n, heads or 1, head_dim]"): (
        "A trace keeps the sizes of the maps as numbers, and Saccade refuses maps of other sizes."
    ),
    ("Swin", "Guard failed"): _WINDOWS,
    ("Swin", "node_Add"): _WINDOWS,
    ("Swin", "The expanded size of the tensor"): _WINDOWS,
    ("Swin", "infer_request"): _WINDOWS,
}
NOT_RUN = "not run"


def explained(target: str, message: str) -> str | None:
    """The explanation of an expected refusal; None: there is none."""
    explanations = (
        text for (name, part), text in EXPLAINED.items() if name in target and part in message
    )
    return next(explanations, None)


def table(outcomes: dict[str, dict[str, Outcomes]]) -> list[str]:
    """A row for each target, a column for each runtime; below it why what is refused is."""
    rows = ["| target | " + " | ".join(RUNTIMES) + " |", "| --- |" + " --- |" * len(RUNTIMES)]
    notes: list[str] = []
    for target, by_runtime in outcomes.items():
        cells = [
            _in_a_cell(target, by_runtime[name], notes) if name in by_runtime else NOT_RUN
            for name in RUNTIMES
        ]
        rows.append(f"| {target} | " + " | ".join(cells) + " |")
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return [
        *rows,
        "",
        *(f"{n}. {message}" for n, message in enumerate(notes, 1)),
        "",
        f"With {versions}.",
    ]


def _in_a_cell(target: str, outcomes: Outcomes, notes: list[str]) -> str:
    """What is refused, by reason, or "yes"; a reason that is new is added to the notes."""
    refused: dict[str, list[str]] = {}
    for call, message in outcomes.items():
        if message != "yes":
            refused.setdefault(explained(target, message) or message, []).append(call)
    if not refused:
        return "yes"
    notes += [message for message in refused if message not in notes]
    return "; ".join(
        f"no{'' if 'same' in calls else ' ' + ' or '.join(calls)} ({notes.index(message) + 1})"
        for message, calls in refused.items()
    )


def _in_a_process(target: str, runtimes: tuple[str, ...], seconds: int) -> dict[str, Outcomes]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.export_matrix", "--cells", target]
    with tempfile.TemporaryFile("w+") as printed:
        try:
            done: Any = subprocess.run(
                [*command, *runtimes], stdout=printed, stderr=subprocess.DEVNULL,
                check=False, timeout=seconds,
            )  # fmt: skip
            ended = f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not finished after {seconds // 60} minutes"
        printed.seek(0)
        outcomes = dict(json.loads(line) for line in printed if line.startswith('["'))
    missing = [runtime for runtime in runtimes if runtime not in outcomes]
    # The first that is missing ended the process; those after it were not tried.
    untried = {name: dict.fromkeys(CALLS, ended if name == missing[0] else "") for name in missing}
    return {**outcomes, **untried}


def _all(keep: Path | None, only: list[str]) -> dict[str, dict[str, Outcomes]]:
    outcomes = json.loads(keep.read_text()) if keep and keep.exists() else {}
    for target in only:
        row = outcomes.setdefault(target, {})
        for runtimes, seconds in GROUPS.items():
            left = tuple(runtime for runtime in runtimes if not any(row.get(runtime, {}).values()))
            while left:
                row |= _in_a_process(target, left, seconds)
                for runtime in left:
                    print(target, runtime, row[runtime], file=sys.stderr, flush=True)
                left = tuple(runtime for runtime in left if not any(row[runtime].values()))
            if keep:
                keep.write_text(json.dumps(outcomes, indent=1))
    return {target: outcomes[target] for target in TARGETS if target in outcomes}


def _cells(target: str, runtimes: list[str]) -> Iterator[tuple[str, Outcomes]]:
    with tempfile.TemporaryDirectory() as folder:
        work = Work(TARGETS[target], Path(folder))
        for runtime in runtimes:
            yield runtime, cell(work, runtime)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into docs/export.md")
    parser.add_argument("--keep", type=Path, help="outcomes, kept and not tried again")
    parser.add_argument("--kept", action="store_true", help="try nothing, show what was kept")
    parser.add_argument("--only", nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--cells", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cells:
        for runtime, outcomes in _cells(arguments.cells[0], arguments.cells[1:]):
            print("\n" + json.dumps([runtime, outcomes]), flush=True)
        return
    kept = (
        json.loads(arguments.keep.read_text())
        if arguments.kept
        else _all(arguments.keep, arguments.only)
    )
    lines = "\n".join(table({name: kept.get(name, {}) for name in TARGETS})) + "\n"
    print(lines)
    if arguments.write:
        page = PAGE.read_text()
        PAGE.write_text(MARKED.sub(lambda mark: mark[1] + lines + mark[2], page))


if __name__ == "__main__":
    main()
