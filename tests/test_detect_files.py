"""`saccade detect` and its files: bad inputs, names, full disks, signals. The detector is a fake."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

Image = pytest.importorskip("PIL.Image")
typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("transformers")

from helpers import default_signals  # noqa: E402
from vision_helpers import FakeDetector, gradient_image  # noqa: E402

import saccade  # noqa: E402
from saccade.vision import report  # noqa: E402
from saccade.vision.batch import detect_images  # noqa: E402
from saccade.vision.detector import Detector  # noqa: E402
from saccade.vision.drawing import MAX_LONGER_SIDE  # noqa: E402
from saccade.vision.models import ModelError  # noqa: E402
from saccade.vision.report import plan_outputs  # noqa: E402


@pytest.fixture
def detect(monkeypatch):
    """Runs the command; a file that it waits for is an error instead of a test without end."""
    from saccade.cli import app

    def refuse_to_wait(number, frame):
        pytest.fail("the command waits")

    monkeypatch.setattr(Detector, "load", lambda model: FakeDetector())
    previous = signal.signal(signal.SIGALRM, refuse_to_wait)
    signal.alarm(30)
    yield lambda *arguments: typer_testing.CliRunner().invoke(
        app, ["detect", *map(os.fspath, arguments)]
    )
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def scene(tmp_path) -> Path:
    gradient_image(40, 30).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def outputs(name: str) -> list[str]:
    return [f"{name}.json", f"{name}_detections.png", f"{name}_looked.png"]


def test_a_detector_whose_points_cannot_be_recorded_ends_the_command(
    detect, scene, tmp_path, monkeypatch
) -> None:
    def refuse(self) -> None:
        raise ModelError("no points")

    monkeypatch.setattr(FakeDetector, "check_recording", refuse)
    result = detect(scene, scene, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (2, "error: no points\n")
    assert names(tmp_path / "out") == []


@pytest.mark.slow
def test_a_bad_input_costs_itself_only(detect, scene, tmp_path, monkeypatch) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        listener.bind("socket.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "cut.png").write_bytes(scene.read_bytes()[:-30])
    Image.new("1", (1400, 1000)).save(tmp_path / "large.png")
    reasons = {
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "zero.png": "is a device, not a file",
        "fifo.png": "is a FIFO, not a file",
        "socket.png": "is a socket, not a file",
        "folder.png": "is a folder, not a file",
        "gone.png": "does not exist",
        "cut.png": "is broken: image file is truncated",
        "large.png": "has 1.4 megapixels: expected at most 1,",
    }
    out = tmp_path / "out"
    paths = [tmp_path / name for name in reasons]
    result = detect(*paths, scene, "--out", out, "--max-megapixels", "1")
    assert result.exit_code == 1, result.output
    for path, reason in zip(paths, reasons.values(), strict=True):
        assert f"skipped: {path} {reason}" in result.stderr
    assert "8 of 9 images skipped" in result.stderr
    assert names(out) == outputs("scene")


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system of macOS refuses such names")
def test_names_that_are_not_utf8_and_that_a_terminal_obeys(detect, scene, tmp_path) -> None:
    paths = [tmp_path / os.fsdecode(b"\xe9.png"), tmp_path / "\x1b[2J\n.png"]
    for path in paths:
        path.write_bytes(scene.read_bytes())
    out = tmp_path / "out"
    result = detect(*paths, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/\\xe9.png: 1 object (middle 0.90)" in result.stdout
    assert f"{tmp_path}/\\x1b[2J\\x0a.png: 1 object" in result.stdout
    assert "\x1b" not in result.stdout
    assert names(out) == sorted(outputs(paths[0].stem) + outputs(paths[1].stem))
    texts = [(out / f"{path.stem}.json").read_text(encoding="utf-8") for path in paths]
    images = [json.loads(text)["image"] for text in texts]
    assert images == [f"{tmp_path}/\\xe9.png", str(paths[1])]


@pytest.mark.parametrize("part", ["draw_detections", "draw_looks", "describe"])
@pytest.mark.parametrize("old", [False, True])
def test_a_result_is_whole_or_not_there(scene, tmp_path, monkeypatch, part, old) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if old:
        list(detect_images(FakeDetector(), [scene], out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == (outputs("scene") if old else [])

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, part, fail)
    (done,) = detect_images(FakeDetector(), [scene], out)
    assert done.problem == "has results that cannot be written: No space left on device"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_box_that_is_not_finite_leaves_no_file(scene, tmp_path, monkeypatch) -> None:
    broken = dict.fromkeys(("image", "detections"), float("nan"))
    monkeypatch.setattr(report, "describe", lambda *_: broken)
    (done,) = detect_images(FakeDetector(), [scene], tmp_path)
    assert "has 40 x 30 pixels and cannot be processed" in str(done.problem)
    assert names(tmp_path) == ["scene.png"]


def test_a_label_that_is_not_text_is_escaped() -> None:
    """JSON can hold half of a surrogate pair, which can be neither printed nor drawn."""
    config = SimpleNamespace(id2label={0: json.loads('"\\ud800 cat"')})
    fake = SimpleNamespace(model=SimpleNamespace(config=config))
    assert Detector._label(fake, 0) == "\\ud800 cat"
    assert Detector._label(fake, 1) == "1"


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (30000, 1), (3, 2)])
def test_images_of_extreme_shapes_are_drawn(tmp_path, size) -> None:
    Image.new("RGB", size).save(tmp_path / "x.png")
    (done,) = detect_images(FakeDetector(), [tmp_path / "x.png"], tmp_path)
    assert done.problem is None
    assert done.files is not None
    drawing = Image.open(done.files.detections)
    assert 640 <= max(drawing.size) <= MAX_LONGER_SIDE
    assert json.loads(done.files.json.read_text())["width"] == size[0]


# --- the names of files -----------------------------------------------------------------------


def test_equal_stems_cost_linear_work(tmp_path, monkeypatch) -> None:
    """Counted are the names that are tried, and the questions to the file system."""
    calls = {"names": 0, "file system": 0}

    def count(owner, name, kind):
        function = getattr(owner, name)

        def counted(*arguments, **options):
            calls[kind] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(report, "_name_outputs", "names")
    count(os.path, "realpath", "file system")
    count(Path, "stat", "file system")
    images = [Path(f"{number}/frame.png") for number in range(300)]
    images += [Path(f"{number}/frame-2.png") for number in range(300)]
    planned = plan_outputs(images, tmp_path)
    assert len({file for files in planned for file in files}) == 3 * 600
    assert [files.json.stem for files in planned[298:302]] == [
        "frame-299", "frame-300", "frame-2-2", "frame-2-3",
    ]  # fmt: skip
    assert calls["names"] <= 600 + 2
    assert calls["file system"] <= 6 * 600


def test_names_that_some_file_systems_do_not_distinguish(tmp_path) -> None:
    images = [Path("a/\u00e9.png"), Path("b/E\u0301.png"), Path("c/e\u0301.png")]
    stems = [files.json.stem for files in plan_outputs(images, tmp_path)]
    assert stems == ["\u00e9", "E\u0301-2", "e\u0301-3"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_input_is_not_overwritten_through_a_link(scene, tmp_path, link) -> None:
    out = tmp_path / "out"
    out.mkdir()
    link(scene, out / "scene_looked.png")
    content = scene.read_bytes()
    (done,) = detect_images(FakeDetector(), [scene], out)
    assert done.files is not None
    assert done.files.json.name == "scene-2.json"
    assert scene.read_bytes() == (out / "scene_looked.png").read_bytes() == content


def test_a_link_into_the_output_folder_is_not_overwritten(scene, tmp_path) -> None:
    (tmp_path / "scene_looked.png").symlink_to("scene.png")
    inputs = [scene, tmp_path / "scene_looked.png"]
    planned = plan_outputs(inputs, tmp_path)
    assert not {file for files in planned for file in files} & set(inputs)


# --- signals ----------------------------------------------------------------------------------

PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from vision_helpers import FakeDetector
from saccade.__main__ import main
from saccade.vision import report
from saccade.vision.detector import Detector

draw_looks, calls = report.draw_looks, []

def slow(*arguments):
    calls.append(1)
    if len(calls) == 2:
        print("now", flush=True)
        time.sleep(60)
    return draw_looks(*arguments)

report.draw_looks = slow
Detector.load = lambda model: FakeDetector()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_whole_results(scene, tmp_path, number, code) -> None:
    source = Path(saccade.__file__).resolve().parent.parent
    tests = Path(__file__).resolve().parent
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tests, "detect", scene, scene, "--out", "out"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        preexec_fn=default_signals,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline() not in ("now\n", ""):
            pass
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert names(tmp_path / "out") == outputs("scene")
