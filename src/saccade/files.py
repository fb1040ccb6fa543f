"""Files: reading regular ones only, and writing results that appear whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

_ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file for reading; a FIFO or a device would be read without end.

    Raises:
        OSError: the file does not exist or cannot be opened, for example for lack of permission.
        ValueError: the path is a folder, a FIFO, a device or a socket; the message continues the
            name, as in "is a folder, not a file".
    """
    # Opening a device can have effects of its own, hence the first check.
    _check_regular(os.stat(path).st_mode)
    # The file may be another one by now: O_NONBLOCK keeps a FIFO from waiting for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_regular(os.fstat(file.fileno()).st_mode)
    except ValueError:
        file.close()
        raise
    return file


def _check_regular(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    raise ValueError(f"is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file")


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Gives the path to write instead of `path`; the file moves to `path` when the block ends.

    The path has the same name and lies in a hidden folder beside the target. Other files that the
    block writes into that folder move along, before `path` itself. All of them replace existing
    files; a link is replaced, not followed. After an exception, including those of SIGINT and of
    `exit_on_signals`, none of them is left, and the files that existed before stay.

        with write_whole(Path("result.png")) as temporary:
            image.save(temporary)

    Args:
        path: the file to write; its folder exists.

    Raises:
        OSError: a file cannot be written, or a target exists that is not a regular file.
    """
    _check_replaceable(path)
    folder = path.parent / f".saccade-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        yield folder / path.name
        parts = [part for part in sorted(folder.iterdir()) if part.name != path.name]
        with _signals_deferred():
            _move_together([*parts, folder / path.name], path.parent)
    except OSError as error:
        if str(error.filename).startswith(str(folder)):
            error.filename = str(path)  # The hidden folder would tell a reader nothing.
        raise
    finally:
        with _signals_deferred():
            shutil.rmtree(folder, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    try:
        _check_regular(path.stat().st_mode)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise OSError(f"{path} {error}") from error


def _move_together(parts: list[Path], folder: Path) -> None:
    """Moves all files into a folder, or none of them."""
    for part in parts:
        _check_replaceable(folder / part.name)
    with contextlib.ExitStack() as undo:
        for part in parts[:-1]:
            target, previous = folder / part.name, part.with_name(f"{secrets.token_hex(8)}.old")
            if os.path.lexists(target):
                target.replace(previous)
                undo.callback(previous.replace, target)
            else:
                undo.callback(target.unlink, missing_ok=True)
            part.replace(target)
        # Nothing can fail after the last file, which therefore needs no copy of the previous one.
        parts[-1].replace(folder / parts[-1].name)
        undo.pop_all()


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Delivers the signals that end a command after the block instead of within it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs the handlers of signals in the main thread.
        return
    pending: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    def deliver() -> None:
        for number in pending:
            signal.raise_signal(number)

    with contextlib.ExitStack() as restore:
        restore.callback(deliver)
        for number in _ENDING_SIGNALS:
            handler = signal.getsignal(number)
            # None stands for a handler that was not set from Python, which could not be put back.
            if handler not in (None, signal.SIG_IGN):
                restore.callback(signal.signal, number, handler)
                signal.signal(number, keep)
        yield


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the block by SystemExit, so that temporary files are removed.

    The exit code is 128 and the number of the signal, as a shell reports it: 143 for SIGTERM.
    """
    numbers = [
        number
        for number in _ENDING_SIGNALS
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL
    ]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    try:
        for number in numbers:
            signal.signal(number, _exit)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def as_text(text: str | os.PathLike[str]) -> str:
    r"""Returns a path or another text in a form that can be encoded.

    Bytes of a file name that are not UTF-8 become escapes such as \xe9.
    """
    return _SURROGATES.sub(_escape, os.fspath(text))


def as_line(text: str | os.PathLike[str]) -> str:
    r"""Returns a path or another text as one line for the screen.

    What `as_text` escapes, and characters that a terminal obeys, become escapes such as \x1b.
    """
    return _CONTROLS.sub(_escape, as_text(text))


_SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters, and those that change the direction of writing.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    # Python holds a byte of a file name that is not UTF-8 as U+DC00 + byte.
    byte = number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else number
    return f"\\x{byte:02x}" if byte < 0x100 else f"\\u{byte:04x}"
