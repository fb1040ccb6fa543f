"""`saccade export`: every file is verified and as dynamic as the model allows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
typer_testing = pytest.importorskip("typer.testing")

from export_helpers import corners  # noqa: E402
from vision_helpers import (  # noqa: E402
    gradient_image,
    save_random_detector,
    save_random_rt_detr,
)

from saccade import doctor  # noqa: E402
from saccade.export import detectors, formats  # noqa: E402
from saccade.export.detectors import ExportError, export_detector  # noqa: E402
from saccade.integrations.onnx import session_options  # noqa: E402
from saccade.vision.detector import Detector  # noqa: E402

IMAGE = gradient_image(96, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # The last level must have several rows, because exporters treat sizes of 1 separately.
    folder = tmp_path_factory.mktemp("model") / "a-detr"
    return save_random_detector(folder, shortest_edge=128, encoder_layers=1)


@pytest.fixture(scope="module")
def detector(folder):
    return Detector.load(str(folder))


class TinyModel(torch.nn.Module):
    """Logits and boxes of the 64 cells of an image: exported in a second, with the same contract."""

    def __init__(self, fixed_size=None, fewer_rows_differ=0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 9, 3, padding=1)
        self.fixed_size, self.fewer_rows_differ = fixed_size, fewer_rows_differ

    def forward(self, pixel_values):
        if self.fixed_size is not None:
            pixel_values = pixel_values + torch.zeros(self.fixed_size)
        if pixel_values.shape[2] < self.fewer_rows_differ:
            pixel_values = -pixel_values
        cells = torch.nn.functional.adaptive_avg_pool2d(self.layer(pixel_values), 8)
        rows = cells.flatten(2).transpose(1, 2)
        logits, boxes = 50 * rows[..., :5], rows[..., 5:].sigmoid()
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


class TinyProcessor:
    """Pixels of 64 x 96, and detections as DETR's post-processing gives them."""

    def __call__(self, images, return_tensors):
        pixels = np.stack([np.asarray(image.resize((96, 64))) for image in images]) / 255
        return {"pixel_values": torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)}

    def post_process_object_detection(self, outputs, threshold, target_sizes):
        detections = []
        for logits, boxes in zip(outputs.logits, outputs.pred_boxes, strict=True):
            scores, labels = logits.sigmoid().max(-1)
            detections.append({"scores": scores, "labels": labels, "boxes": corners(boxes)})
        return detections


def tiny(**options):
    return SimpleNamespace(
        name="an owner/tiny", model=TinyModel(**options).eval(), processor=TinyProcessor()
    )


@pytest.fixture
def invoke(monkeypatch):
    from saccade.cli import app

    def call(*arguments):
        # Wide enough that no line of a table breaks.
        monkeypatch.setenv("COLUMNS", "200")
        return typer_testing.CliRunner().invoke(app, ["export", *map(str, arguments)])

    return call


def export(detector, path, to="torch", **options):
    return export_detector(detector, to, path, image=IMAGE, seconds=0, **options)


# The command below writes the same detector as ONNX.
@pytest.mark.nightly
def test_a_program_that_takes_any_batch_and_resolution(detector, tmp_path):
    path = tmp_path / "new" / "detr.pt2"
    result = export(detector, path)
    assert (result.path, result.dynamic, result.size) == (
        path,
        ("batch", "height", "width"),
        (128, 192),
    )
    (runtime,) = result.runtimes.values()
    assert list(runtime.comparisons) == [
        "batch 1, 128 x 192", "batch 2, 128 x 192", "batch 2, 96 x 128", "batch 3, 192 x 224",
    ]  # fmt: skip
    assert all(each.same and each.detections >= 10 for each in runtime.comparisons.values())
    program = torch.export.load(path).module()
    pixels = torch.randn(3, 3, 160, 128)
    with torch.no_grad():
        expected = detector.model(pixel_values=pixels)
        torch.testing.assert_close(program(pixels), (expected.logits, expected.pred_boxes))


@pytest.mark.slow
def test_fixed(tmp_path):
    result = export(tiny(), tmp_path / "tiny.pt2", fixed=True)
    assert (result.dynamic, result.reasons_not_dynamic) == ((), ())
    program = torch.export.load(result.path).module()
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.randn(2, 3, 64, 96))


@pytest.mark.slow
def test_the_smallest_image(tmp_path):
    result = export(tiny(fewer_rows_differ=24), tmp_path / "tiny.pt2")
    assert result.dynamic == ("batch", "height", "width")
    assert result.min_size[0] == 24
    result = export(tiny(fewer_rows_differ=24), tmp_path / "tiny.pt2", fixed=True)
    assert result.min_size == result.size == (64, 96)


@pytest.mark.slow
def test_a_model_whose_code_fixes_the_resolution(tmp_path):
    result = export(tiny(fixed_size=(64, 96)), tmp_path / "tiny.pt2")
    assert result.dynamic == ("batch",)
    (reason,) = result.reasons_not_dynamic
    assert reason.startswith("batch and height and width: ")


def perturbed(change):
    """A stand-in for `formats.runtimes` whose runtime changes the logits."""

    def runtimes(path, to, lowering):
        real = formats.in_program(path)

        def run(pixels):
            logits, boxes = real(pixels)
            return change(logits), boxes

        return {"a broken runtime": run}

    return runtimes


@pytest.mark.slow
def test_other_numbers_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "runtimes", perturbed(lambda logits: logits + 0.01))
    path = tmp_path / "tiny.pt2"
    path.write_text("an older file")
    with pytest.raises(ExportError, match=r"no file was left[^$]*largest difference 0.01"):
        export(tiny(), path)
    # The file that existed before is kept.
    assert path.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_numbers_that_are_right_for_one_image_only(tmp_path, monkeypatch):
    """A file that is wrong for a batch is written again, for a batch of one."""
    monkeypatch.setattr(formats, "runtimes", perturbed(lambda logits: logits.roll(1, 0)))
    result = export(tiny(), tmp_path / "tiny.pt2")
    assert result.dynamic == ()
    assert [reason.split(": ")[:2] for reason in result.reasons_not_dynamic] == [
        ["batch and height and width", "batch 2, 64 x 96"], ["batch", "batch 2, 64 x 96"]
    ]  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_is_an_error_with_its_reason(invoke, tmp_path, monkeypatch):
    calls = []

    def fail(program, path, *arguments):
        calls.append(path)
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Detector, "load", lambda model: tiny())
    monkeypatch.setattr(formats, "write", fail)
    path = tmp_path / "tiny.pt2"
    path.write_text("an older file")
    result = invoke("--to", "torch", "--out", path)
    assert result.exit_code == 1, result.output
    assert f"{path} cannot be written, no file was left: [Errno 28] No space" in result.stderr
    assert len(calls) == 1  # Other sizes would not fit either.
    assert path.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [path]


WRITE_TO_A_FULL_DISK = """
import sys
import torch
from pathlib import Path
from saccade.export import formats

program = torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(2, 64),))
path = Path("x" + formats.SUFFIXES[sys.argv[1]])
path.symlink_to("/dev/full")
try:
    formats.write(program, path, sys.argv[1], "grid_sample")
except OSError as error:
    sys.exit(error.strerror)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize(
    "to", ["torch", *(pytest.param(to, marks=pytest.mark.nightly) for to in ("onnx", "aoti"))]
)
def test_a_write_that_fails_is_an_exception(tmp_path, to):
    """torch's writer of archives aborts the process instead, if it writes to a file itself."""
    source = str(Path(formats.__file__).resolve().parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TO_A_FULL_DISK, to],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": source},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("No space left on device\n")


def test_a_wrong_name():
    with pytest.raises(ExportError, match=r"expected a name that ends with \.pt2"):
        export(tiny(), Path("tiny.onnx"))
    with pytest.raises(ValueError, match=r"to: expected .*'onnx'.* got 'tflite'"):
        export(tiny(), None, to="tflite")


def test_the_name_of_a_file():
    assert detectors._file_name("SenseTime/deformable-detr") == "deformable-detr"
    assert detectors._file_name("saccade's digits") == "saccade_s_digits"


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_rt_detr(tmp_path, fixed):
    """Its two stages select queries by score; it is as dynamic as its own code allows."""
    detector = Detector.load(str(save_random_rt_detr(tmp_path / "rt-detr")))
    result = export(detector, tmp_path / "rt-detr.pt2", fixed=fixed)
    assert result.path.is_file()
    assert ("batch" in result.dynamic) != fixed
    (runtime,) = result.runtimes.values()
    assert runtime.largest_difference < 1e-4


def assert_holds_no_path_of_this_machine(content):
    for folder in (sys.prefix, str(Path.home()), str(doctor.DEFAULT_MODEL.parent.parent)):
        assert folder.encode() not in content


@pytest.mark.slow
def test_a_program_keeps_neither_the_image_nor_the_folders_of_this_machine(tmp_path):
    result = export(tiny(), tmp_path / "tiny.pt2")
    with zipfile.ZipFile(result.path) as archive:
        for name in archive.namelist():
            assert_holds_no_path_of_this_machine(archive.read(name))
        inputs = [name for name in archive.namelist() if "sample_inputs" in name]
        assert sum(archive.getinfo(name).file_size for name in inputs) < 5000
    assert torch.export.load(result.path).example_inputs is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "lowering", ["grid_sample", pytest.param("plugin", marks=pytest.mark.nightly)]
)
def test_the_command(invoke, folder, tmp_path, lowering):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime_extensions")
    path, image = tmp_path / "detr.onnx", tmp_path / "image.png"
    IMAGE.save(image)
    result = invoke(
        folder, "--to", "onnx", "--lowering", lowering, "--out", path, "--image", image,
        "--seconds", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"Written: {path}" in result.output
    assert "pixel_values [batch, 3, height, width]" in result.output
    assert f"ONNX Runtime {onnxruntime.__version__}" in result.output
    assert "all the same" in result.output
    assert "Verified: batch 1, 128 x 192; batch 2, 128 x 192; batch 2, 96 x 128" in result.output
    assert ("TensorRT itself did not run it" in result.output) == (lowering == "plugin")
    assert_holds_no_path_of_this_machine(path.read_bytes())
    session = onnxruntime.InferenceSession(path, session_options())
    assert [node.name for node in session.get_outputs()] == ["logits", "pred_boxes"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [node.shape[0] for node in session.get_outputs()] == ["batch", "batch"]
    assert list(tmp_path.glob("*.onnx*")) == [path]


@pytest.mark.slow
def test_the_command_states_the_smallest_image_of_a_program(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(Detector, "load", lambda model: tiny(fewer_rows_differ=24))
    result = invoke("--to", "torch", "--out", tmp_path / "tiny.pt2", "--seconds", 0)
    assert result.exit_code == 0, result.output
    assert "images of at least 24 x " in result.output
    with pytest.raises(RuntimeError, match="24"):
        torch.export.load(tmp_path / "tiny.pt2").module()(torch.zeros(2, 3, 23, 96))


def test_the_command_without_an_image_takes_the_scene(invoke, tmp_path, monkeypatch):
    seen = []

    def refuse(detector, to, path, *, image, **options):
        seen.append((detector.name, to, image.size))
        raise ExportError("not today")

    monkeypatch.setattr(detectors, "export_detector", refuse)
    result = invoke("--to", "torch")
    assert result.exit_code == 1
    assert "error: not today" in result.output
    assert seen == [("saccade's digits", "torch", (160, 160))]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "tflite"], 2, "tflite"),
        (["--lowering", "magic"], 2, "magic"),
        (["no-such-folder"], 2, "neither a folder nor the id of a model"),
        (["--image", "no-such.png"], 2, "no-such.png does not exist"),
        (["--out", "."], 2, "--out: expected a file, got the folder ."),
        (["--to", "aoti", "--lowering", "gather"], 2, "--lowering: expected with --to onnx only"),
        (["--to", "torch", "--out", "model.onnx"], 1, "ends with .pt2"),
        (["--to", "onnx", "--out", "model.pt2"], 1, "ends with .onnx"),
    ],
)
def test_wrong_usage(invoke, arguments, code, message):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output


def test_what_is_missing_is_named(invoke, monkeypatch):
    monkeypatch.setattr(doctor, "missing_modules", lambda extra: ["onnxscript"])
    result = invoke()
    assert result.exit_code == 2
    assert "needs onnxscript, not installed here: pip install 'saccade[export]'" in result.output


@pytest.mark.slow
def test_the_scene_is_an_image_that_the_model_reads():
    image = Image.open(doctor.EXAMPLE_IMAGE).convert("RGB")
    (result,) = Detector.load().detect([image])
    assert sorted(each.label for each in result.detections) == ["1", "2", "2", "5", "8", "9", "9"]
