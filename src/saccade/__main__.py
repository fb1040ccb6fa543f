"""The console entry point. It needs torch only, as does `saccade doctor`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

_PLAIN_HELP = """usage: saccade [--help] [--version] doctor

The other commands need more packages: pip install 'saccade[detect]'
  doctor   show what is installed and which kernel runs, and check its results
  detect   find objects in images and show where their queries looked
  explain  explain deformable attention step by step, for one query
  export   write a detector as ONNX, AOTInductor package or torch program, verified
  bench    measure the operator's speed on this machine"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (or raises SystemExit with it)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        return _without_extras(arguments, error.name or "typer")
    # A name or label that the terminal's encoding lacks is shown as an escape.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    from saccade.files import exit_on_signals

    with exit_on_signals():
        try:
            from saccade.cli import app

            app(arguments, prog_name="saccade")
        except KeyboardInterrupt:
            return 130
        except OSError as error:  # Standard output is a full disk, for example.
            print(f"error: {error}", file=sys.stderr)
            # Python would fail once more where it flushes the output at its end.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 2
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
