"""The embedded detector, exported, traced, compiled and in ONNX: the same detections everywhere."""

from __future__ import annotations

import pytest
import torch
from export_helpers import (
    assert_same_detections,
    embedded_detector,
    exported_detector,
)

from saccade import doctor
from saccade.export import formats

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_exported():
    model, pixels, program = exported_detector()
    with torch.no_grad():
        assert_same_detections(program.module()(pixels), model(pixels))
        other = torch.cat([pixels, pixels[:1]])[:, :, :, :130]
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced():
    model, pixels = embedded_detector()
    with torch.no_grad():
        traced = torch.jit.trace(model, (pixels,), check_trace=False)
        assert_same_detections(traced(pixels), model(pixels))


@pytest.mark.nightly
def test_compiled():
    model, pixels = embedded_detector()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_detections(compiled(pixels), model(pixels))


# `make test` exports whole detectors to ONNX in tests/test_export_command.py.
@pytest.mark.nightly
@pytest.mark.parametrize("lowering", ["grid_sample", "gather", "plugin", "native"])
def test_in_onnx(lowering, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    if lowering in ("plugin", "native"):
        pytest.importorskip("onnxruntime_extensions")
    model, pixels, program = exported_detector()
    path = tmp_path / "detector.onnx"
    formats.write(program, path, "onnx", lowering)
    runs = formats.runtimes(path, "onnx", lowering)
    openvino = lowering in ("grid_sample", "gather") and doctor.installed("openvino")
    assert [name.split()[0] for name in runs] == ["ONNX", "OpenVINO"][: 1 + openvino]
    with torch.no_grad():
        expected = model(pixels)
        for run in runs.values():
            assert_same_detections(run(pixels), expected)
            for one, logits, boxes in zip(pixels, *expected, strict=True):
                outputs = run(one[None])
                torch.testing.assert_close(outputs[0], logits[None], rtol=0, atol=1e-3)
                torch.testing.assert_close(outputs[1], boxes[None], rtol=0, atol=1e-4)
