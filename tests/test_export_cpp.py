"""An exported detector, compiled ahead of time, runs in Python and in C++ without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import helpers
import pytest
import torch
from export_helpers import (
    CHANNELS_FIRST,
    ROOT,
    assert_same_detections,
    detections,
    exported_detector,
)

import saccade
from saccade.export import formats
from saccade.ops import native

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="AOTInductor and C++ need a C++ compiler"),
    pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}"),
]


class SmallDetector(torch.nn.Module):
    """Logits and boxes of 20 queries from one layer of attention: compiled in seconds, not minutes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(3, 32, 8, stride=8)
        self.query = torch.nn.Parameter(torch.randn(1, 20, 32))
        self.attention = saccade.nn.DeformableAttention(32, num_heads=4)
        self.heads = torch.nn.Linear(32, 14)
        self.register_buffer("reference_points", torch.rand(1, 20, 2))

    def forward(self, pixel_values):
        feature_map = self.stem(pixel_values).permute(0, 2, 3, 1)
        batch_size = feature_map.shape[0]
        query = self.query.expand(batch_size, -1, -1)
        reference_points = self.reference_points.expand(batch_size, -1, -1)
        outputs = self.heads(query + self.attention(query, feature_map, reference_points))
        return outputs[..., :10], outputs[..., 10:].sigmoid()


def export_small_detector():
    """Returns the small detector, random pixels, and its program with dynamic sizes."""
    model, pixels = SmallDetector().eval(), torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        return (
            model,
            pixels,
            torch.export.export(model, (pixels,), dynamic_shapes=(CHANNELS_FIRST,)),
        )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A detector, its input, and its package: under `make test-all` that of the embedded detector."""
    model, pixels, program = exported_detector() if helpers.ALL else export_small_detector()
    path = str(tmp_path_factory.mktemp("aoti") / "detector.pt2")
    formats.write(program, Path(path), "aoti", "grid_sample")
    return model, pixels, path


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """examples/cpp, built as its CMakeLists.txt builds it."""
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("examples/cpp is built by cmake and ninja")
    folder = tmp_path_factory.mktemp("build")
    run("cmake", "-G", "Ninja", "-S", str(ROOT / "examples/cpp"), "-B", str(folder),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")  # fmt: skip
    run("cmake", "--build", str(folder))
    return folder / "detect"


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_python(compiled):
    model, pixels, path = compiled
    loaded = formats.in_package(Path(path))
    with torch.no_grad():
        assert_same_detections(loaded(pixels), model(pixels))
        for other in (pixels[:1], torch.cat([pixels, pixels])[:3, :, :, :130].contiguous()):
            for actual, expected in zip(loaded(other), model(other), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
        # Four channels, and another dtype: what the package was not compiled for.
        for wrong in (torch.zeros(1, 4, 160, 160), pixels.double()):
            with pytest.raises(RuntimeError):
                loaded(wrong)


def test_from_cpp_without_python(compiled, program, tmp_path):
    model, pixels, path = compiled
    libraries = run("ldd", str(program)) + run("ldd", str(native.LIBRARY))
    assert "libtorch_cpu" in libraries
    assert "libpython" not in libraries
    for inputs in (pixels, torch.cat([pixels, pixels])[:3, :, :, :130].contiguous()):
        inputs.numpy().tofile(tmp_path / "input.raw")
        batch, _, height, width = map(str, inputs.shape)
        printed = run(
            str(program),
            path,
            str(native.LIBRARY),
            str(tmp_path / "input.raw"),
            batch,
            height,
            width,
        )
        rows = [line.split() for line in printed.splitlines()]
        with torch.no_grad():
            names, boxes = detections(model(inputs))
        assert [(int(row[0]), int(row[1])) for row in rows] == [(i, label) for i, _, label in names]
        printed_boxes = torch.tensor([[float(number) for number in row[3:]] for row in rows])
        torch.testing.assert_close(printed_boxes, boxes, rtol=0, atol=1e-3)


def test_cpp_says_what_is_wrong(program, tmp_path):
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected: PACKAGE.pt2" in done.stderr
    missing = str(Path(tmp_path) / "missing.so")
    done = subprocess.run(
        [str(program), "a.pt2", missing, "input.raw", "1", "8", "8"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "NATIVE_LIBRARY" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "8", "8"), "BATCH: expected a whole number of at least 1, got x"),
        (("1", "-8", "8"), "HEIGHT: expected a whole number of at least 1, got -8"),
        (("1", "8", "1e3"), "WIDTH: expected a whole number of at least 1, got 1e3"),
        (("1", "8", "9"), "INPUT.raw: expected 864 bytes, got 768 in "),
        (("1", "8", "8", "xx"), "MIN_SCORE: expected a number from 0 to 1, got xx"),
        (("1", "8", "8", "1.5"), "MIN_SCORE: expected a number from 0 to 1, got 1.5"),
        (("1", "8", "8"), "PACKAGE.pt2: cannot be read"),
    ],
)
def test_cpp_refuses(program, tmp_path, arguments, message):
    pixels = tmp_path / "input.raw"
    torch.zeros(1, 3, 8, 8).numpy().tofile(pixels)
    command = [str(program), str(tmp_path / "a.pt2"), str(native.LIBRARY), str(pixels), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
