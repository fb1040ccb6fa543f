"""Files appear whole or not at all, also after errors and signals; only regular files are read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import default_signals

from saccade import files
from saccade.files import as_line, as_text, open_regular, write_whole


def write_three(path: Path, text: str) -> None:
    with write_whole(path) as temporary:
        for name in ("a.png", "b.png"):
            temporary.with_name(name).write_text(text)
        temporary.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "" for path in folder.iterdir()}


def test_files_move_together_and_replace_the_previous_ones(tmp_path) -> None:
    for text in ("one", "two"):
        write_three(tmp_path / "x.json", text)
        assert contents(tmp_path) == dict.fromkeys(("a.png", "b.png", "x.json"), text)


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_within_the_block_leaves_nothing(tmp_path, error) -> None:
    write_three(tmp_path / "x.json", "one")
    with pytest.raises(type(error)), write_whole(tmp_path / "x.json") as temporary:  # noqa: PT012
        temporary.write_text("half")
        temporary.with_name("a.png").write_text("half")
        raise error
    assert contents(tmp_path) == dict.fromkeys(("a.png", "b.png", "x.json"), "one")


def test_a_block_that_writes_nothing_leaves_nothing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "x.json") as temporary:
        temporary.with_name("a.png").write_text("alone")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("old", [(), ("a.png",), ("a.png", "b.png", "x.json")])
@pytest.mark.parametrize("failing", range(6))
def test_an_error_while_the_files_move_restores_the_previous_ones(
    tmp_path, monkeypatch, old, failing
) -> None:
    for name in old:
        (tmp_path / name).write_text("one")
    replace, calls = Path.replace, []

    def fail_once(self, target):
        calls.append(self)
        if len(calls) - 1 == failing:
            raise PermissionError("not now")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    try:
        write_three(tmp_path / "x.json", "two")
    except PermissionError:
        assert contents(tmp_path) == dict.fromkeys(old, "one")
    else:
        assert failing >= len(calls) >= 3
        assert contents(tmp_path) == dict.fromkeys(("a.png", "b.png", "x.json"), "two")


@pytest.mark.parametrize("name", ["a.png", "x.json"])
def test_only_a_regular_file_is_replaced(tmp_path, name) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=rf"{name} is a folder, not a file"):
        write_three(tmp_path / "x.json", "one")
    assert contents(tmp_path) == {name: ""}
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(OSError, match="null is a device"):
        write_three(tmp_path / "null", "one")
    assert (tmp_path / "null").is_symlink()


# It pauses at one of three places: while writing, between two moves, and while removing the folder.
PROGRAM = """
import importlib.util, shutil, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("files", sys.argv[1])  # without the package and torch
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)

def pause(owner, name, number, seconds):
    function, calls = getattr(owner, name), []
    def paused(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            print("now", flush=True)
            time.sleep(seconds)
        return function(*arguments, **options)
    setattr(owner, name, paused)

pause(*{
    "writing": (Path, "write_text", 2, 60),
    "moving": (Path, "replace", 2, 0.3),
    "removing": (shutil, "rmtree", 1, 0.3),
}[sys.argv[2]])
with files.exit_on_signals(), files.write_whole(Path("x.json")) as temporary:
    temporary.with_name("a.png").write_text("two")
    temporary.write_text("two")
print("not reached")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)]
)
@pytest.mark.parametrize("place", ["writing", "moving", "removing"])
def test_signals_leave_all_files_or_none(tmp_path, number, code, place) -> None:
    for name in ("a.png", "x.json"):
        (tmp_path / name).write_text("one")
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, files.__file__, place],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=default_signals,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, ""), stderr
    text = "one" if place == "writing" else "two"
    assert contents(tmp_path) == dict.fromkeys(("a.png", "x.json"), text)


def test_an_error_names_the_target(tmp_path) -> None:
    for path in (tmp_path / "no folder" / "x.json", tmp_path / "x.json"):
        with pytest.raises(OSError, match=r"x\.json'$") as caught, write_whole(path) as temporary:
            (temporary / "below").write_text("one")
        assert ".saccade-" not in str(caught.value)


def test_only_regular_files_are_opened(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"data"
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        listener.bind("socket")
    for path, reason in {
        "fifo": "is a FIFO",
        "socket": "is a socket",
        ".": "is a folder",
        "/dev/zero": "is a device",
    }.items():
        with pytest.raises(ValueError, match=reason):
            open_regular(tmp_path / path)
    (tmp_path / "loop").symlink_to("loop")
    for path in ("loop", "nothing", "file/below"):
        with pytest.raises(OSError, match=path):
            open_regular(tmp_path / path)


def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"data")
    stat = os.stat

    def swap(path):
        result = stat(path)
        os.unlink(path)
        os.mkfifo(path)
        return result

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(ValueError, match="is a FIFO"):
        open_regular(tmp_path / "file")


def test_names_that_are_not_utf8_become_text() -> None:
    assert as_text(Path(os.fsdecode(b"\xe9 \xc3\xa9.png"))) == "\\xe9 é.png"


def test_text_for_the_screen_is_one_line_that_a_terminal_does_not_obey() -> None:
    text = "\x1b[2J a\nb \u202egpj.exe\u2069 写真\u3000é \udce9"
    assert as_line(text) == r"\x1b[2J a\x0ab \u202egpj.exe\u2069 写真" + "\u3000é " + r"\xe9"
