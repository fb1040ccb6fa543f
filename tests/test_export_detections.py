"""What the embedded detector finds on the shipped scenes, in every runtime of ONNX: the same."""

from __future__ import annotations

import pytest
import torch
from export_helpers import assert_same_detections, embedded_detector, export_detector

from saccade import doctor
from saccade.export import formats

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported():
    model, pixels = embedded_detector()
    return model, pixels, export_detector(model, pixels)


@pytest.mark.parametrize("lowering", ["grid_sample", "gather", "plugin", "native"])
def test_in_onnx(exported, lowering, tmp_path):
    if lowering in ("plugin", "native"):
        pytest.importorskip("onnxruntime_extensions")
    model, pixels, program = exported
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
                found = run(one[None])
                torch.testing.assert_close(found[0], logits[None], rtol=0, atol=1e-3)
                torch.testing.assert_close(found[1], boxes[None], rtol=0, atol=1e-4)
