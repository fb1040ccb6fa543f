"""Patched models of transformers through ONNX, as far as their own code can be exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vision_helpers import random_detector

import saccade
from saccade.integrations import onnx as saccade_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_a_patched_deformable_detr_at_every_batch():
    class Outputs(torch.nn.Module):
        def __init__(self, detector):
            super().__init__()
            self.detector = detector

        def forward(self, pictures):
            found = self.detector(pixel_values=pictures)
            return found.logits, found.pred_boxes

    detector = random_detector().eval()
    for name, parameter in detector.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    saccade.patch(detector)
    model, pictures = Outputs(detector).eval(), torch.randn(2, 3, 96, 128)
    program = torch.onnx.export(
        model,
        (pictures,),
        dynamo=True,
        verbose=False,
        # The optimizer of torch 2.13 loses a value of transformers' decoder, patched or not.
        optimize=False,
        dynamic_shapes=({0: torch.export.Dim("batch", max=64)},),
        custom_translation_table=saccade_onnx.translations(),
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = [node.name for node in session.get_inputs()]
    for batch in (1, 3, 8):
        pictures = torch.randn(batch, 3, 96, 128)
        with torch.no_grad():
            expected = model(pictures)
        for found, want in zip(session.run(None, {name: pictures.numpy()}), expected, strict=True):
            np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=2e-4)
