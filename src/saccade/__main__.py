"""The console entry point. Works with torch alone: `saccade doctor` needs nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PLAIN_HELP = """usage: saccade [--help] [--version] doctor

The other commands need more packages; pip install 'saccade[detect]' brings all of them.
  doctor   what is installed, which kernel runs, and whether its numbers are right
  detect   find objects in pictures and show where their queries looked
  explain  deformable attention, one query, step by step
  export   a detector as ONNX, as an AOTInductor package or a torch program, verified
  bench    the operator's speed on this machine"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (or raises SystemExit with it)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        return _without_extras(given, error.name or "typer")
    from saccade.cli import app

    app(given, prog_name="saccade")
    return 0


def _without_extras(arguments: list[str], missing: str) -> int:
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command == "doctor" and "--help" not in arguments:
        from saccade import doctor

        return doctor.run()
    if command is None and "--version" in arguments:
        import saccade

        print(f"saccade {saccade.__version__}")
        return 0
    if command in (None, "doctor"):
        print(_PLAIN_HELP)
        return 0
    print(
        f"saccade {command} needs {missing}, which is not installed: pip install 'saccade[detect]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
