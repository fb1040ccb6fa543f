"""What can be exported, tried out: the table of docs/export.md.

`python -m benchmarks.export_matrix` prints it, `--write` puts it between the marks of the page. Each
cell runs in a process of its own, with a limit. `TARGETS` and `RUNTIMES` are tables of functions: a
further runtime is one more entry.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import saccade
from saccade.benchmark.detectors import DETECTORS
from saccade.integrations.tracing import symbolic_sizes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "export.md"
MARKED = re.compile(r"(<!-- matrix -->\n).*?(<!-- end of matrix -->)", flags=re.DOTALL)
LIMIT_SECONDS = 400
CHANNELS, HEADS, QUERIES = 32, 4, 10
Tensors = tuple[Tensor, ...]


class Target(NamedTuple):
    """Something to export: how it is made, its inputs for (batch, scale), its dynamic axes."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensors]
    dynamic: tuple[dict[int, Any], ...]
    strict: bool = False


class _Operator(nn.Module):
    def forward(self, feature_map: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        shapes = [feature_map.shape[1:3]]
        return saccade.deformable_attention(feature_map.flatten(1, 2), shapes, locations, weights)


class _Fused(nn.Module):
    def forward(
        self, feature_map: Tensor, points: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        shapes = [feature_map.shape[1:3]]
        return saccade.fused_deformable_attention(
            feature_map.flatten(1, 2), shapes, points, offsets, logits
        )


class _Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = saccade.nn.MultiScaleDeformableAttention(CHANNELS, HEADS, 2, 4)

    def forward(self, query: Tensor, points: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        shapes = [feature_map.shape[2:] for feature_map in (fine, coarse)]
        value = torch.cat([each.flatten(2).transpose(1, 2) for each in (fine, coarse)], 1)
        found: Tensor = self.attention(query, points, value, shapes)
        return found


class _Detector(nn.Module):
    """A patched model of transformers: one tensor in, those of its outputs that are numbers out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = DETECTORS[name].build(small=True)
        saccade.patch(self.model)

    def forward(self, pixel_values: Tensor) -> Tensors:
        found = self.model(pixel_values=pixel_values)
        names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
        return tuple(found[name] for name in names if name in found)


_DYNAMIC = torch.export.Dim.DYNAMIC
_QUERIES = {0: _DYNAMIC, 1: _DYNAMIC}
_LAST, _FIRST = ({axis: _DYNAMIC for axis in axes} for axes in ((0, 1, 2), (0, 2, 3)))


def _given(batch: int, scale: int) -> Tensors:
    return (
        torch.randn(batch, 8 * scale, 12 * scale, HEADS, 8),
        torch.rand(batch, QUERIES, HEADS, 1, 4, 2),
        torch.rand(batch, QUERIES, HEADS, 1, 4),
    )


def _fused(batch: int, scale: int) -> Tensors:
    feature_map, offsets, logits = _given(batch, scale)
    return feature_map, torch.rand(batch, QUERIES, 1, 2), offsets, logits


def _levels(batch: int, scale: int) -> Tensors:
    maps = [torch.randn(batch, CHANNELS, size * scale, (size + 4) * scale) for size in (8, 4)]
    return torch.randn(batch, QUERIES, CHANNELS), torch.rand(batch, QUERIES, 1, 2), *maps


def _map(batch: int, scale: int) -> Tensors:
    query = torch.randn(batch, QUERIES, CHANNELS)
    return query, torch.randn(batch, 8 * scale, 12 * scale, CHANNELS)


def _pixels(batch: int, scale: int) -> Tensors:
    return (torch.randn(batch, 3, 64 + 32 * scale, 96 + 32 * scale),)


TARGETS: dict[str, Target] = {
    "op": Target(_Operator, _given, (_LAST, _QUERIES, _QUERIES)),
    "fused op": Target(_Fused, _fused, (_LAST, _QUERIES, _QUERIES, _QUERIES)),
    "nn.MultiScaleDeformableAttention": Target(
        _Levels, _levels, (_QUERIES, _QUERIES, _FIRST, _FIRST)
    ),
    "nn.DeformableAttention": Target(
        lambda: saccade.nn.DeformableAttention(CHANNELS, HEADS), _map, (_QUERIES, _LAST)
    ),
    "patched Deformable DETR": Target(lambda: _Detector("deformable-detr"), _pixels, (_FIRST,)),
    # It takes `len` of a tensor for the batch, which only a strict export follows.
    "patched RT-DETRv2": Target(lambda: _Detector("rt-detr-v2"), _pixels, (_FIRST,), strict=True),
    "patched Mask2Former": Target(lambda: _Detector("mask2former"), _pixels, (_FIRST,)),
}


def _compile(target: Target, module: nn.Module, inputs: Tensors) -> Callable[..., Any]:
    # transformers reads a number back in a check of its own.
    torch._dynamo.config.capture_scalar_outputs = True
    return torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")


def _export(target: Target, module: nn.Module, inputs: Tensors) -> torch.export.ExportedProgram:
    dynamic: Any = target.dynamic
    with symbolic_sizes():
        if isinstance(module, saccade.nn.DeformableAttention):
            dynamic = dict(zip(("query", "feature_map"), target.dynamic, strict=True))
        return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=target.strict)


def _exported(target: Target, module: nn.Module, inputs: Tensors) -> Callable[..., Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        torch.export.save(_export(target, module, inputs), path)
        return torch.export.load(path).module()


def _trace(target: Target, module: nn.Module, inputs: Tensors) -> Callable[..., Any]:
    traced: Callable[..., Any] = torch.jit.trace(module, inputs, check_trace=False)
    return traced


def _aoti(target: Target, module: nn.Module, inputs: Tensors) -> Callable[..., Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            _export(target, module, inputs),
            package_path=str(Path(folder) / "program.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
        loaded: Callable[..., Any] = torch._inductor.aoti_load_package(path)
        return loaded


RUNTIMES: dict[str, Callable[[Target, nn.Module, Tensors], Callable[..., Any]]] = {
    "compile": _compile,
    "export": _exported,
    "trace": _trace,
    "AOTI": _aoti,
}
CALLS = {"same": (3, 1), "other batch": (4, 1), "other resolution": (3, 2)}


def cell(target: str, runtime: str) -> dict[str, str]:
    """For each call "yes" or why not."""
    torch.manual_seed(0)
    module = TARGETS[target].make().eval()
    outcomes = {}
    with torch.no_grad():
        try:
            run = RUNTIMES[runtime](TARGETS[target], module, TARGETS[target].inputs(*CALLS["same"]))
        except Exception as error:  # whatever a toolchain raises is the answer
            return dict.fromkeys(CALLS, _reason(error))
        for call, size in CALLS.items():
            inputs = TARGETS[target].inputs(*size)
            try:
                expected, found = module(*inputs), run(*inputs)
                if isinstance(expected, Tensor) and not isinstance(found, Tensor):
                    found = found[0]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
                outcomes[call] = "yes"
            except Exception as error:
                outcomes[call] = _reason(error)
    return outcomes


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A trace tells its own lines first, the operator's complaint somewhere below.
    said = [line for line in lines if "expected" in line or line.startswith("RuntimeError")]
    told = re.sub(r"\S*/(\w+\.\w+)", r"\1", (said or lines or [""])[0])  # no paths of this machine
    return f"{type(error).__name__}: {told}".replace("|", "/")


def _in_short(told: str) -> str:
    """Without the places in the sources and the sizes of one case: the same reason is told once."""
    told = re.sub(r"(\w+Error: )+(understand, [\w.:]+, )?", r"\1", told)
    return re.sub(r"\b\d{2,}\b", "n", told)[:160]


def table() -> list[str]:
    """A row for each target, a column for each runtime; below it why what is refused is."""
    calls = [call for call in CALLS if call != "same"]
    rows = ["| | " + " | ".join(RUNTIMES) + " |", "| --- |" + " --- |" * len(RUNTIMES)]
    notes: list[str] = []
    for target in TARGETS:
        cells = [target]
        for runtime in RUNTIMES:
            outcomes = _in_a_process(target, runtime)
            print(target, runtime, outcomes, file=sys.stderr, flush=True)
            bad = {call: told for call, told in outcomes.items() if told != "yes"}
            if not bad:
                cells.append("yes")
                continue
            told = _in_short(next(iter(bad.values())))
            if told not in notes:
                notes.append(told)
            failed = "no" if "same" in bad else "no " + ", no ".join(c for c in calls if c in bad)
            cells.append(f"{failed} ({notes.index(told) + 1})")
        rows.append("| " + " | ".join(cells) + " |")
    return [*rows, "", *(f"{number}. {told}" for number, told in enumerate(notes, 1))]


def _in_a_process(target: str, runtime: str) -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.export_matrix", "--cell"]
    try:
        done = subprocess.run(
            [*command, target, runtime],
            capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return dict.fromkeys(CALLS, f"not finished after {LIMIT_SECONDS} seconds")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return dict.fromkeys(CALLS, f"ended with {done.returncode}")
    outcomes: dict[str, str] = json.loads(lines[-1])
    return outcomes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into docs/export.md")
    parser.add_argument("--cell", nargs=2, metavar=("TARGET", "RUNTIME"))
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(cell(*given.cell)))
        return
    lines = "\n".join(table()) + "\n"
    print(lines)
    if given.write:
        page = PAGE.read_text()
        PAGE.write_text(MARKED.sub(lambda found: found[1] + lines + found[2], page))


if __name__ == "__main__":
    main()
