"""The parts of the benchmark, each in a process of its own: a crash or a hang of one costs no other."""

from __future__ import annotations

import argparse
import datetime
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

import saccade
from benchmarks.gpu.ahead import compiling_ahead
from benchmarks.gpu.backward import measure_backward
from benchmarks.gpu.checks import check_variants
from benchmarks.gpu.floors import measure_floors
from benchmarks.gpu.goals import COLD, DETERMINISTIC, WARM, time_of
from benchmarks.gpu.gradients import check_gradients
from benchmarks.gpu.models import MODELS, MODES, measure_model
from benchmarks.gpu.peers import SACCADE
from benchmarks.gpu.report import METHOD
from benchmarks.gpu.results import (
    Deadline,
    DeviceLostError,
    OutOfTimeError,
    Results,
    reason_of,
)
from benchmarks.gpu.special import check_special, special_checks
from benchmarks.gpu.special_gradients import special_gradient_checks
from benchmarks.gpu.speed import measure_speed
from benchmarks.gpu.timing import card
from benchmarks.gpu.training import measure_training

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("check", "time", "floors", "models")
MINUTES, QUICK_MINUTES = 9.5, 3.0
# How a part's process ends.
DONE, OUT_OF_TIME, LOST = 0, 3, 70
# Beyond its own deadline, before a part is taken for hung; and what the report takes.
GRACE_SECONDS, REPORT_SECONDS = 15.0, 8.0
LEAST_SECONDS = 6.0
MOST_RESTARTS = 6
# Whose times are told while a person waits.
TALKED_OF = (SACCADE, DETERMINISTIC, "gathers", "scatter")


class Step(NamedTuple):
    """A part, and how long it may take."""

    name: str
    seconds: float


def planned_steps(sections: Sequence[str], *, quick: bool = False) -> list[Step]:
    """The parts of the sections, in order; what one leaves of the time goes to those after it."""
    found = []
    if "check" in sections:
        found += [Step("variants", 12 if quick else 50), Step("special", 12 if quick else 45)]
        found.append(Step("gradients", 18 if quick else 70))
        found.append(Step("special_gradients", 15 if quick else 50))
    if "time" in sections:
        found.append(Step("time", 20 if quick else 95))
        found.append(Step("backward", 30 if quick else 80))
    if "floors" in sections:
        found.append(Step("floors", 12 if quick else 40))
    if "models" in sections:
        for mode in MODES[:1] if quick else MODES:
            for name in MODELS[:1] if quick else MODELS:
                found.append(Step(f"models {name} {mode}", 18 if mode == MODES[0] else 150))
            if mode == MODES[0]:
                found.append(Step("training", 30 if quick else 85))
    return found


class Talking(Results):
    """Results that say on the terminal what is added to them."""

    def add(self, key: str, *rows: Mapping[str, Any]) -> None:
        """Adds, and prints a line for what a person waits for."""
        super().add(key, *rows)
        for row in rows:
            text = _line(key, row)
            if text:
                print(text, flush=True)


def _line(key: str, row: Mapping[str, Any]) -> str:
    if key == "checks":
        return "" if row["ok"] else f"WRONG: {row['name']}: {row['reason']}"
    if key == "models":
        what = row["reason"] or f"{row['ratio']:.3g} times as fast"
        return f"{row['model']}, {row['mode']}, {row['dtype']}: {what}"
    if key in ("figures", "backward", "floors") and row["peer"] in TALKED_OF:
        times = ", ".join(f"{way} {time_of(dict(row), way):.4g} µs" for way in (COLD, WARM))
        head = f"{row['workload']}, batch {row['batch_size']}, {row['dtype']}, {row['locations']}"
        direction = " backward" if key == "backward" else ""
        return f"{head}: {row['peer']}{direction} {times}"
    return ""


def run_step(given: argparse.Namespace) -> int:
    """One part, in this process; gives its exit code."""
    results, device = Talking(given.json), torch.device(given.device)
    deadline, seed = Deadline(given.seconds), results.found["seed"]
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    found = card(device)
    if results.found["machine"] and results.found["machine"].get("gpu") != found["gpu"]:
        results.put("error", "the file holds figures of another card")
        return 1
    results.put("machine", found)
    backend = saccade.which_backend(torch.zeros(1, device=device))
    results.put("backend", str(backend))
    chosen = {"cases": given.case, "quick": given.quick}
    try:
        if given.step == "variants":
            with compiling_ahead("variants", device):
                check_variants(results, device, deadline, seed, quick=given.quick)
        elif given.step == "special":
            check_special(results, device, deadline, seed, checks=special_checks(given.quick))
        elif given.step == "gradients":
            of_gradients = {"check": check_gradients, "of": "backward: "}
            with compiling_ahead("gradients", device):
                check_variants(results, device, deadline, seed, quick=given.quick, **of_gradients)
        elif given.step == "special_gradients":
            checks = special_gradient_checks(given.quick)
            check_special(results, device, deadline, seed, checks=checks)
        elif given.step == "time":
            measure_speed(results, device, deadline, seed, **chosen)
        elif given.step == "backward":
            measure_backward(results, device, deadline, seed, **chosen)
        elif given.step == "floors":
            measure_floors(results, device, deadline, seed, **chosen)
        elif given.step == "training":
            small = {"quick": given.quick, "small": given.small}
            measure_training(results, device, deadline, seed, **small)
        else:
            _, name, mode = given.step.split()
            measure_model(results, device, deadline, name, mode, small=given.small)
    except OutOfTimeError:
        return OUT_OF_TIME
    except DeviceLostError as error:
        results.put("error", str(error))
        sys.stdout.flush()
        os._exit(LOST)  # tidying up would ask the lost GPU again
    except Exception as error:
        results.put("error", reason_of(error))
        raise
    return DONE


def run_all(
    given: argparse.Namespace, sections: Sequence[str], command: str, console: Console
) -> None:
    """Every part of the sections, as far as the time goes; the JSON file holds what was found."""
    begin_file(given, command)
    minutes = given.minutes or (QUICK_MINUTES if given.quick else MINUTES)
    deadline = Deadline(60 * minutes - REPORT_SECONDS)
    steps = planned_steps(sections, quick=given.quick)
    if given.minutes:  # more than all parts need: each gets its share of it
        share = max(1.0, deadline.left / (sum(step.seconds for step in steps) or 1.0))
        steps = [step._replace(seconds=step.seconds * share) for step in steps]
    for number, step in enumerate(steps):
        # Compilers take what is left at the end; all others share what there is.
        needed = sum(one.seconds for one in steps[number:] if not one.name.endswith(MODES[1]))
        left = deadline.left - GRACE_SECONDS / 3
        seconds = min(step.seconds, left, step.seconds * left / (needed or left))
        if seconds < min(LEAST_SECONDS, step.seconds):
            _stopped(given.json, step.name, "no time is left for it")
            continue
        console.rule(f"{step.name}, at most {seconds:.0f} s", style="dim", align="left")
        run_restarting(given, step.name, Deadline(seconds))
    results = Results(given.json)
    results.found.pop("doing", None)
    results.save()


def begin_file(given: argparse.Namespace, command: str) -> None:
    """A new JSON file, or the one that is there."""
    if given.resume:
        return
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    head = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": {},
        "seed": seed,
        "method": METHOD,
    }
    Results(given.json, head)


def run_restarting(given: argparse.Namespace, name: str, deadline: Deadline) -> None:
    """One part; after a crash it goes on in a new process with what comes next."""
    for _ in range(MOST_RESTARTS):
        if deadline.left <= 0:
            _stopped(given.json, name, "its time was up")
            return
        Results(given.json).put("doing", None)
        code = run_process(given, name, deadline.left)
        if code == DONE:
            return
        if code == OUT_OF_TIME:
            _stopped(given.json, name, "its time was up")
            return
        results = Results(given.json)
        reason = results.found.pop("error", None) or (
            "the process was ended: not done within its time"
            if code is None
            else f"exit code {code}"
        )
        _stopped(given.json, name, reason)
        # An error of the benchmark itself comes again; so does one before anything was begun.
        if code == 1 or not blame(Results(given.json), reason):
            return


def run_process(given: argparse.Namespace, name: str, seconds: float) -> int | None:
    """The exit code of a part's process; None: it hung and was ended."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--step",
        name,
        "--seconds",
        f"{seconds:.1f}",
    ]
    command += ["--json", str(given.json.resolve()), "--device", given.device]
    for option in ("quick", "small"):
        command += [f"--{option}"] if getattr(given, option) else []
    for option in ("case", "peer_path"):
        for value in getattr(given, option):
            if option == "peer_path":
                value = str(Path(value).resolve())
            command += [f"--{option.replace('_', '-')}", value]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if (
            process.poll() is None
        ):  # also on a keyboard interrupt; with the compilers it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def blame(results: Results, reason: str) -> bool:
    """Notes what the process was doing when it ended, so that the next one leaves it out.

    Returns:
        bool: whether a new process can go on.
    """
    doing = results.found.get("doing")
    if not doing:
        return False
    key, name = doing["key"], doing["name"]
    if key == "checks":
        results.add("checks", {"name": name, "ok": False, "reason": reason})
    elif key == "training":
        rows = results.rows("training")
        if rows:  # what was measured before it is kept
            rows[-1]["stopped"] = reason
            results.save()
        else:
            results.add("training", {"model": name, "reason": reason})
        return False
    elif key == "models":
        model, mode = name.split(", ")
        row = {"model": model, "mode": mode, "dtype": "", "reason": reason}
        results.add("models", row)
        return False
    elif doing.get("peer") not in (None, SACCADE):
        results.add("crashed", {"peer": doing["peer"], "reason": f"{reason} ({name})"})
    else:
        results.rows("skipped").append(name)
        if doing.get("peer") == SACCADE:
            results.add("checks", {"name": f"timed: {name}", "ok": False, "reason": reason})
        results.save()
    return True


def _stopped(path: Path, name: str, reason: str) -> None:
    row = {"step": name, "reason": reason, "at": time.strftime("%H:%M:%S")}
    Results(path).add("stopped", row)
