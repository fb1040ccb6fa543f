"""Models of other packages, as PyPI has them: the same outputs, gradients and losses on Saccade."""

from __future__ import annotations

import packages

# What the processes share: random weights that look at different places, a comparison of everything.
COMPARE = """
import torch
import saccade

torch.set_num_threads(1)

def wake(model):
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model

def tensors(found):
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, dict):
        found = found.values()
    if isinstance(found, (list, tuple)) or hasattr(found, "__iter__"):
        return [tensor for part in found for tensor in tensors(part)]
    return []

def outputs_and_gradients(model, call):
    model.zero_grad()
    found = [tensor for tensor in tensors(call(model)) if tensor.requires_grad]
    assert found
    sum(tensor.square().mean() for tensor in found).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {str(i): tensor.detach() for i, tensor in enumerate(found)} | gradients

def check(model, call, operators):
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    expected = outputs_and_gradients(model, call)
    report = saccade.patch(model)
    assert len(report.replaced) == operators and not report.left, report
    assert saccade.patch(model) == report
    found = outputs_and_gradients(model, call)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        # Some are sums that cancel out to nothing but their rounding.
        atol = max(1e-4 * float(want.abs().max()), 1e-12)
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=atol)
    assert list(model.state_dict()) == keys
    assert saccade.unpatch(model).replaced == report.replaced
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert after.keys() == before.keys()
    for name, wanted in before.items():
        assert all(after[name][key] is wanted[key] for key in wanted if not key.startswith("_"))

def train(make, loss_of):
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = wake(make()).train()
        if patched:
            saccade.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        steps = []
        for _ in range(20):
            torch.manual_seed(1)
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(torch.tensor(steps))
    assert losses[0].min() < losses[0][0], losses
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
"""

RFDETR = """
import rfdetr
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.models.lwdetr import build_criterion_from_config, build_model_from_config
from rfdetr.utilities.tensors import NestedTensor

def config(**options):
    return RFDETRNanoConfig(pretrain_weights=None, **options)

def pictures(size, count=1):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return NestedTensor(picture, torch.zeros(count, size, size, dtype=torch.bool))
"""


def test_rfdetr_nano_as_it_is_published():
    code = """
made = build_model_from_config(config())
check(wake(made).double().eval(), lambda model: model(pictures(384)), operators=2)
"""
    packages.run(COMPARE + RFDETR + code, "torchvision", "rfdetr")


def test_rfdetr_trains_the_same():
    code = """
small = config(resolution=64, positional_encoding_size=4, num_queries=4, num_select=4, group_detr=2)
criterion, _ = build_criterion_from_config(small, TrainConfig(dataset_dir=".", output_dir="."))
generator = torch.Generator().manual_seed(0)
targets = [
    {
        "labels": torch.tensor([1, 2]),
        "boxes": torch.rand(2, 4, generator=generator, dtype=torch.float64) / 2 + 0.2,
    }
]

def loss_of(model):
    found = criterion(model(pictures(64)), targets)
    weights = criterion.weight_dict
    return sum(found[name] * weights[name] for name in found if name in weights)

def make():
    model = build_model_from_config(small).double()
    model.backbone.requires_grad_(False)  # most of the time, and none of it attention of this kind
    return model

train(make, loss_of)
"""
    packages.run(COMPARE + RFDETR + code, "torchvision", "rfdetr", timeout=600)


def test_rfdetr_by_name():
    code = """
report = saccade.patch("rfdetr")
assert not report.left, report
assert "rfdetr.models.ops.modules.ms_deform_attn.ms_deform_attn_core_pytorch" in report.replaced
assert saccade.unpatch("rfdetr").replaced == report.replaced
"""
    packages.run(COMPARE + RFDETR + code, "torchvision", "rfdetr")


def test_a_layer_of_the_kernels_package():
    """The ecosystem's own way, without `patch`: a mapping, and `kernelize`."""
    code = """
import kernels
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from vision_helpers import random_detector
from saccade.integrations import kernels as integration

# transformers does this itself with a version of kernels that it takes for new enough.
kernels.replace_kernel_forward_from_hub(MultiScaleDeformableAttention, integration.LAYER)

model = wake(random_detector()).double().train()
model.model.backbone.requires_grad_(False)
pictures = torch.randn(1, 3, 96, 128, dtype=torch.float64)

def call(model):
    found = model(pictures)
    return found.logits, found.pred_boxes

torch.manual_seed(0)
expected = outputs_and_gradients(model.eval(), call)
calls = []
integration.deformable_attention = lambda *given: calls.append(given) or saccade.deformable_attention(*given)
with kernels.use_kernel_mapping(integration.mapping()):
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    model = kernels.kernelize(model, mode=mode, device="cpu")
found = outputs_and_gradients(model, call)
assert len(calls) == 4
for name, want in expected.items():
    atol = max(1e-4 * float(want.abs().max()), 1e-12)
    torch.testing.assert_close(found[name], want, rtol=1e-4, atol=atol)
kernels.register_kernel_mapping(integration.mapping())
kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
"""
    packages.run(COMPARE + code, "torchvision", "kernels")
