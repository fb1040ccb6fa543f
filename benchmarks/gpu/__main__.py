"""`python -m benchmarks.gpu`: Saccade on an NVIDIA GPU, in ten minutes.

Checks every variant of a call, forward and backward, against the definition in float64, times the workloads
beside whatever is installed of the peers, whole models and training steps with and without saccade.patch, and
the floors; prints ratios first and goals beside the figures, writes JSON and a picture. What has been found is
on disk at every moment.

Exit code: 0 done; 1 a check of Saccade failed, none could be made, or there is no GPU; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The hub kernel is a peer where it has been fetched before: nothing is downloaded here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console

from benchmarks.gpu import steps
from benchmarks.gpu.goals import goals
from benchmarks.gpu.peers import all_peers
from benchmarks.gpu.plot import save_plot
from benchmarks.gpu.report import failed_checks, print_report
from benchmarks.gpu.results import Results
from benchmarks.gpu.special import special_checks
from benchmarks.gpu.special_gradients import special_gradient_checks
from benchmarks.gpu.speed import settings
from benchmarks.gpu.variants import planned
from saccade.benchmark.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = (
    "python -m benchmarks.gpu needs an NVIDIA GPU, and torch sees none here; "
    "python -m benchmarks.gpu --dry-run lists what it would do"
)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--section", default=",".join(steps.SECTIONS), help="some of check,time,floors,models")
    add("--case", action="append", default=[], help="a workload; repeat it. Without it, all")
    add(
        "--quick",
        action="store_true",
        help="three minutes: a part of the checks, what the goals name",
    )
    add("--minutes", type=float, help="how long it may take in all (default 9.5, with --quick 3)")
    add("--peer-path", action="append", default=[], help="a folder with a compiled peer; repeat it")
    add("--seed", type=int, help="of the random inputs (default: another one each time)")
    add("--resume", action="store_true", help="go on with the JSON file that is there")
    add("--json", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    add("--plot", type=Path, default=ROOT / "docs/images/gpu.png")
    add("--details", action="store_true", help="also print a table for each setting")
    add("--dry-run", action="store_true", help="only list checks, workloads, peers and goals")
    add("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: for tests
    add("--small", action="store_true", help=argparse.SUPPRESS)  # small models: for tests
    add("--step", help=argparse.SUPPRESS)  # one part in a process of its own
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    reader = parser()
    given = reader.parse_args(words)
    sections = given.section.split(",")
    for option, names, known in (
        ("--section", sections, steps.SECTIONS),
        ("--case", given.case, WORKLOADS),
    ):
        for name in names:
            if name not in known:
                reader.error(f"{option}: expected one of {', '.join(known)}, got {name}")
    sys.path.extend(given.peer_path)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if given.dry_run:
        dry_run(console, sections, given)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    if given.step:
        return steps.run_step(given)
    if given.resume and not given.json.exists():
        reader.error(f"--resume: {given.json} is not there")
    steps.run_all(given, sections, command_of(words), console)
    found = Results(given.json).found
    console.rule()
    print_report(found, console, details=given.details)
    console.print(f"\nWritten: {given.json}", markup=False, soft_wrap=True)
    try:
        save_plot(found, given.plot)
        console.print(f"Written: {given.plot}", markup=False, soft_wrap=True)
    except ValueError as error:
        console.print(f"no picture: {error}", markup=False, soft_wrap=True)
    nothing_checked = "check" in sections and not found.get("checks")
    return 1 if failed_checks(found) or nothing_checked else 0


def command_of(words: Sequence[str]) -> str:
    """The command for the record; folders of this machine are not named."""
    kept = [word for word in words if not Path(word.rpartition("=")[2]).is_absolute()]
    for option in ("--peer-path", "--json", "--plot"):
        while option in kept:
            kept.remove(option)
    return " ".join(["python -m benchmarks.gpu", *kept])


def dry_run(console: Console, sections: Sequence[str], given: argparse.Namespace) -> None:
    """Lists what would be done."""

    def show(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    show("parts, and how long each may take:", "bold")
    for step in steps.planned_steps(sections, quick=given.quick):
        show(f"  {step.name}: {step.seconds} s")
    plan = planned()
    show(
        f"\nvariants that are checked, forward and backward, then random ones ({len(plan)}):",
        "bold",
    )
    for variant in plan:
        show(f"  {variant.name}")
    show("\nother checks:", "bold")
    for name in (*special_checks(given.quick), *special_gradient_checks(given.quick)):
        show(f"  {name}")
    show("\nsettings that are timed, forward, then backward:", "bold")
    for setting in settings(given.case, quick=given.quick):
        show(f"  {setting.name}")
    show("\npeers:", "bold")
    for peer in all_peers().values():
        show(f"  {peer.name}: {peer.missing() or f'here {peer.version()}'.strip()}")
    show("\ngoals:", "bold")
    for goal in goals([], []):
        show(f"  {goal.name}: {goal.wanted}")


if __name__ == "__main__":
    raise SystemExit(main())
