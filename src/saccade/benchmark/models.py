"""Whole models, eager against patched: how long a forward takes, and how much of it is attention."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import saccade
from saccade.benchmark.detectors import Detector
from saccade.benchmark.report import record, times, write_text
from saccade.benchmark.timing import alternate

# Patched and eager outputs may differ by rounding; and where a model takes the best of its proposals,
# two of nearly the same score may change places, which moves a row or two.
TOLERANCE = 1e-3
ALLOWED_ELSEWHERE = 0.05


class ModelFigure(NamedTuple):
    """One model: the ratio first, times in milliseconds, shares of attention between 0 and 1."""

    model: str
    input: str
    ratio: float = float("nan")
    eager_ms: float = float("nan")
    patched_ms: float = float("nan")
    eager_share: float = float("nan")
    """Part of the eager forward that is spent in the attention modules."""
    patched_share: float = float("nan")
    attention_modules: int = 0
    largest_difference: float = float("nan")
    """Of the outputs, in parts of the largest number."""
    rounds: int = 0
    reason: str = ""
    """Why there are no figures."""


def measure(detector: Detector, seconds: float, *, small: bool = False) -> ModelFigure:
    """Times one model; one that cannot be made or patched here is a figure with the reason.

    Args:
        detector: the model.
        seconds: how long eager and patched take turns, at least.
        small: a small version of it, for tests.

    Raises:
        ArithmeticError: patched, the model gives other outputs.
    """
    try:
        model = detector.build(small=small)
        inputs = detector.inputs(small=small)
        replaced = saccade.patch(model).replaced
        saccade.unpatch(model)
    except Exception as error:  # transformers differ in what they have and need
        first_line = next(iter(str(error).splitlines()), "")
        return ModelFigure(
            detector.name, detector.input, reason=f"{type(error).__name__}: {first_line}"
        )
    attention = _Clock([model.get_submodule(name) for name in _attention_modules(model, replaced)])
    shares: dict[str, list[float]] = {"eager": [], "patched": []}

    def forward(name: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            attention.seconds = 0.0
            begin = time.perf_counter()
            with torch.no_grad():
                found = model(**inputs)
            shares[name].append(attention.seconds / (time.perf_counter() - begin))
            return [tensor for tensor in found.values() if isinstance(tensor, Tensor)]

        return run

    @contextmanager
    def patched() -> Iterator[None]:
        saccade.patch(model)
        try:
            yield
        finally:
            saccade.unpatch(model)

    within: dict[str, Callable[[], AbstractContextManager[object]]] = {"patched": patched}
    functions = {"eager": forward("eager"), "patched": forward("patched")}
    expected = functions["eager"]()
    with patched():
        difference = _compare(detector.name, functions["patched"](), expected)
    for found in shares.values():
        found.clear()  # the first call is slower in other parts
    timings = alternate(functions, seconds, turn_seconds=0, within=within)
    attention.remove()
    eager, ours = (timings[name].milliseconds for name in ("eager", "patched"))
    return ModelFigure(
        detector.name,
        detector.input,
        float(f"{eager / ours:.3g}"),
        float(f"{eager:.4g}"),
        float(f"{ours:.4g}"),
        float(f"{statistics.median(shares['eager']):.3g}"),
        float(f"{statistics.median(shares['patched']):.3g}"),
        len(attention.modules),
        float(f"{difference:.2g}"),
        timings["eager"].rounds,
    )


def _attention_modules(model: nn.Module, replaced: list[str]) -> list[str]:
    """The whole modules, projections included: the parent, where a submodule is the operator alone."""
    return [
        name.rpartition(".")[0]
        if next(model.get_submodule(name).parameters(), None) is None
        else name
        for name in replaced
    ]


class _Clock:
    """Adds up the time between the beginning and the end of the forward of some modules.

    By hooks, which cost microseconds a call and are there for eager and patched alike. No module lies
    in another, and a CPU has done its work when a forward returns.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.seconds = 0.0
        self._begin = 0.0
        self._hooks = [
            hook
            for module in modules
            for hook in (
                module.register_forward_pre_hook(self._start),
                module.register_forward_hook(self._stop),
            )
        ]

    def _start(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begin

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _compare(name: str, found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in parts of the largest number of its tensor."""
    largest = 0.0
    for got, want in zip(found, expected, strict=True):
        if not want.is_floating_point() or not want.numel():
            continue
        # Grounding DINO's logits of absent words are -inf, in both.
        same_place = got.isfinite() == want.isfinite()
        got, want = got.nan_to_num(posinf=0, neginf=0), want.nan_to_num(posinf=0, neginf=0)
        scale = want.abs().max().clamp_min(1e-12)
        errors = (got - want).abs() / scale
        if not same_place.all():
            raise ArithmeticError(
                f"{name}: patched and eager outputs are finite in different places"
            )
        wrong = ~(errors <= TOLERANCE)
        if wrong.double().mean() > ALLOWED_ELSEWHERE:
            raise ArithmeticError(
                f"{name}: patched and eager outputs differ in {wrong.double().mean():.0%} of the "
                f"numbers, by {errors.max():.2g} of the largest"
            )
        largest = max(largest, float(errors.max()))
    return largest


def table(figures: list[ModelFigure]) -> Table:
    """The models, ratios first."""
    shown = Table(box=None, pad_edge=False, caption_justify="left")
    for heading in ("ratio", "eager", "patched"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for heading in ("attention before", "after"):
        shown.add_column(heading, justify="right")
    shown.add_column("model", overflow="fold")
    for figure in figures:
        if figure.reason:
            reason = Text(f"{figure.input}: {figure.reason}")
            shown.add_row("–", "", "", "", "", reason, style="dim")
        else:
            shown.add_row(
                times(figure.ratio),
                f"{figure.eager_ms / 1e3:.3g} s",
                f"{figure.patched_ms / 1e3:.3g} s",
                f"{figure.eager_share:.0%}",
                f"{figure.patched_share:.0%}",
                figure.input,
            )
    return shown


def write(command: str, figures: list[ModelFigure], path: Path) -> None:
    """Writes a JSON file; NaN, where there is no figure, as null."""
    rows = [
        {key: None if value != value else value for key, value in figure._asdict().items()}
        for figure in figures
    ]
    found = record(command) | {
        "method": "random weights, one forward a turn, eager and patched taking turns in one "
        "process, medians; shares are of the attention modules with their projections; the outputs agree "
        f"within {TOLERANCE} of the largest number in at least {1 - ALLOWED_ELSEWHERE:.0%} of the numbers "
        "(proposals of nearly the same score may change places)",
        "threads": torch.get_num_threads(),
        "models": rows,
    }
    write_text(path, json.dumps(found, indent=2) + "\n")
