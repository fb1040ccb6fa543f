"""transformers' Deformable DETR on Saccade: the same numbers, and back again."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DeformableDetrForObjectDetection
from vision_helpers import random_detector, random_rt_detr

import saccade


def scatter_parameters(model):
    """Away from the initial zeros, where every query would look at the same places."""
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs_and_gradients(model, pictures, mask=None):
    model.zero_grad()
    arguments = {"pixel_values": pictures} | ({} if mask is None else {"pixel_mask": mask})
    found = model(**arguments)
    (found.logits.square().mean() + found.pred_boxes.square().mean()).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return [found.logits.detach(), found.pred_boxes.detach()], gradients


@pytest.mark.parametrize(
    ("make", "operators"),
    [
        (random_detector, 4),
        (lambda: random_detector(two_stage=True, two_stage_num_proposals=20), 4),
        (random_rt_detr, 2),
    ],
    ids=["deformable-detr", "two-stage", "rt-detr"],
)
def test_patched_model_gives_the_same_outputs_and_gradients(make, operators):
    model = scatter_parameters(make())
    pictures = torch.randn(2, 3, 96, 128)
    mask = None
    if isinstance(model, DeformableDetrForObjectDetection):
        mask = torch.ones(2, 96, 128, dtype=torch.long)
        mask[1, :, 80:] = 0
    state = copy.deepcopy(model.state_dict())
    expected, expected_gradients = outputs_and_gradients(model, pictures, mask)
    report = saccade.patch(model)
    assert len(report.replaced) == operators
    assert not report.left
    found, gradients = outputs_and_gradients(model, pictures, mask)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, want in expected_gradients.items():
        torch.testing.assert_close(gradients[name], want, rtol=1e-3, atol=1e-4, msg=name)
    assert model.state_dict().keys() == state.keys()


def test_patch_is_explicit_idempotent_and_reversible():
    model, other = random_detector(), random_detector()
    operator = model.model.encoder.layers[0].self_attn.attn
    before = dict(operator.__dict__)
    first = saccade.patch(model)
    assert saccade.patch(model) == first
    assert "forward" in operator.__dict__
    assert "forward" not in other.model.encoder.layers[0].self_attn.attn.__dict__
    clone = copy.deepcopy(model)
    cloned = clone.model.encoder.layers[0].self_attn.attn
    assert cloned.forward.__self__ is cloned
    restored = saccade.unpatch(model)
    assert restored.replaced == first.replaced
    assert operator.__dict__ == before
    assert saccade.unpatch(model).replaced == []


def test_patch_refuses_what_it_cannot_replace():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        saccade.patch("transformers")
    with pytest.raises(ValueError, match="model: expected submodules .* got Linear with none"):
        saccade.patch(torch.nn.Linear(1, 1))

    class MultiScaleDeformableAttention(torch.nn.Module):
        def forward(self, value, locations):
            return value

    unknown = torch.nn.Sequential(MultiScaleDeformableAttention())
    with pytest.raises(ValueError, match=r"0: its forward takes \('value', 'locations'\)"):
        saccade.patch(unknown)
