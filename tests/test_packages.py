"""Models of other packages, as PyPI has them: the same outputs, gradients and losses on Saccade."""

from __future__ import annotations

import helpers
import packages
import pytest
from test_downstream import upstream

STEPS = 20 if helpers.ALL else 4

# What the processes share: random weights that look at different places, a comparison of everything.
COMPARE = (
    f"STEPS = {STEPS}"
    + """
import torch
import saccade

torch.set_num_threads(1)

def wake(model):
    for name, parameter in model.named_parameters():
        # mmdet leaves level_embed as the memory was.
        if any(part in name for part in ("sampling_offsets", "attention_weights", "level_embed")):
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

def attributes(model):
    "Copies of the dictionaries of parameters and the like, by the identity of what is in them."
    def copied(found):
        return {key: id(value) for key, value in found.items()} if isinstance(found, dict) else found
    return {
        name: {key: copied(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }

def check(model, call, operators):
    before = attributes(model)
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
    after = attributes(model)
    assert after.keys() == before.keys()
    for name, wanted in before.items():
        assert after[name].keys() == wanted.keys()
        for key, value in wanted.items():
            found = after[name][key]
            assert found is value if not isinstance(value, dict) else found == value, (name, key)

def train(make, get_loss):
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = wake(make()).train()
        if patched:
            saccade.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        steps = []
        for _ in range(STEPS):
            torch.manual_seed(1)
            loss = get_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(torch.tensor(steps))
    assert losses[0].min() < losses[0][0], losses
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
"""
)

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


RFDETR_SMALL = """
small = config(resolution=64, positional_encoding_size=4, num_queries=4, num_select=4, group_detr=2)
"""


@pytest.mark.nightly
def test_rfdetr_nano_as_it_is_published():
    code = """
model = build_model_from_config(config())
check(wake(model).double().eval(), lambda model: model(pictures(384)), operators=2)
"""
    packages.run(COMPARE + RFDETR + code, "torchvision", "rfdetr")


@pytest.mark.slow
def test_rfdetr_trains_the_same_and_is_patched_by_name():
    code = """
small_model = wake(build_model_from_config(small)).double().eval()
check(small_model, lambda model: model(pictures(64)), operators=2)

criterion, _ = build_criterion_from_config(small, TrainConfig(dataset_dir=".", output_dir="."))
generator = torch.Generator().manual_seed(0)
targets = [
    {
        "labels": torch.tensor([1, 2]),
        "boxes": torch.rand(2, 4, generator=generator, dtype=torch.float64) / 2 + 0.2,
    }
]

def get_loss(model):
    outputs = criterion(model(pictures(64)), targets)
    weights = criterion.weight_dict
    return sum(outputs[name] * weights[name] for name in outputs if name in weights)

def make():
    model = build_model_from_config(small).double()
    model.backbone.requires_grad_(False)  # most of the time, and not attention of this kind
    return model

train(make, get_loss)

report = saccade.patch("rfdetr")
assert not report.left, report
assert "rfdetr.models.ops.modules.ms_deform_attn.ms_deform_attn_core_pytorch" in report.replaced
assert saccade.unpatch("rfdetr").replaced == report.replaced
"""
    packages.run(COMPARE + RFDETR + RFDETR_SMALL + code, "torchvision", "rfdetr", timeout=600)


MMDET = """
import warnings
warnings.simplefilter("ignore")
from saccade.integrations import checkpoints, extensions
extensions.install("mmcv._ext")
import mmdet
from pathlib import Path
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

register_all_modules()

def built(path, **changes):
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / path)
    config.model.backbone.init_cfg = None
    config.merge_from_dict({"model." + name: value for name, value in changes.items()})
    return MODELS.build(config.model)

def samples(height, width, objects=0):
    sample, generator = DetDataSample(), torch.Generator().manual_seed(0)
    size = (height, width)
    sample.set_metainfo(dict(img_shape=size, batch_input_shape=size, ori_shape=size, scale_factor=(1, 1)))
    corners = torch.rand(objects, 2, generator=generator, dtype=torch.float64) * 30
    boxes = torch.cat([corners, corners + 20], -1)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(objects))
    return [sample]

def picture(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
"""
NAMES = ("torchvision", "mmcv", "mmdet", "mmengine")


@pytest.mark.nightly
@pytest.mark.parametrize(
    "path",
    [
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
        "dino/dino-4scale_r50_8xb2-12e_coco.py",
    ],
)
def test_mmdet_models_as_they_are_published(path):
    code = f"""
model = wake(built({path!r})).double().eval()
size = (192, 256)
check(model, lambda model: model(picture(*size), samples(*size), mode="tensor"), operators=12)
"""
    packages.run(COMPARE + MMDET + code, *NAMES)


MMDET_TESTS = {
    "dino": """
layers = {"encoder.num_layers": 1, "decoder.num_layers": 1, "num_queries": 20}
model = wake(built("dino/dino-4scale_r50_8xb2-12e_coco.py", **layers)).double().eval()
check(model, lambda model: model(picture(64, 96), samples(64, 96), mode="tensor"), operators=2)
""",
    "training": """
layers = {"encoder.num_layers": 1, "decoder.num_layers": 1, "num_queries": 20}

def make():
    model = built("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", **layers).double()
    model.backbone.requires_grad_(False)
    return model

def get_loss(model):
    losses = model(picture(64, 64), samples(64, 64, objects=2), mode="loss")
    return sum(loss for name, loss in losses.items() if "loss" in name)

train(make, get_loss)
""",
    "mmcv": """
source = wake(MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True)).eval()
shapes, mask = [(8, 12), (4, 6)], torch.rand(2, 120) < 0.2
query, value, reference = torch.randn(2, 9, 32), torch.randn(2, 120, 32), torch.rand(2, 9, 2, 2)

def attended():
    with torch.no_grad():
        return source(
            query,
            value=value,
            reference_points=reference,
            key_padding_mask=mask,
            spatial_shapes=torch.tensor(shapes),
            level_start_index=torch.tensor([0, 96]),
        )

expected = attended()
module = checkpoints.attention_modules(source.state_dict(), num_heads=4, num_levels=2)[""]
found = module(query, reference, value, shapes, mask) + query  # mmcv adds the identity
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

report = saccade.patch("mmcv")
file = "mmcv.ops.multi_scale_deform_attn."
assert report.replaced == [
    file + "MultiScaleDeformableAttnFunction", file + "multi_scale_deformable_attn_pytorch"
]
assert not report.left
torch.testing.assert_close(attended(), expected, rtol=1e-5, atol=1e-5)
assert saccade.unpatch("mmcv").replaced == report.replaced
assert torch.equal(attended(), expected)
""",
}


@pytest.mark.slow
def test_mmdet_and_mmcv():
    """In one process: their imports take longer than what is tested."""
    code = "\n".join(
        f"print({name!r})\n{test}\nprint('passed')" for name, test in MMDET_TESTS.items()
    )
    printed = packages.run(COMPARE + MMDET + code, *NAMES, timeout=600)
    assert printed.count("passed") == len(MMDET_TESTS)


@pytest.mark.slow
def test_a_package_that_nobody_listed():
    code = """
from rtdetr.nn.decoder import MSDeformableAttention
module = wake(MSDeformableAttention(32, 4, 2, 3)).double()
shapes = [(8, 12), (4, 6)]
query, value = torch.randn(2, 9, 32).double(), torch.randn(2, 120, 32).double()
boxes = torch.rand(2, 9, 1, 4).double()
check(module, lambda module: module(query, boxes, value, shapes), operators=1)
assert saccade.patch("rtdetr").replaced == ["rtdetr.nn.decoder.deformable_attention"]
"""
    packages.run(COMPARE + code, "rtdetr")


@pytest.mark.parametrize(
    ("repository", "file", "options"),
    [
        ("lyuwenyu+RT-DETR/rtdetr_pytorch", "rtdetr.rtdetr_decoder", [{"num_points": 4}]),
        *(
            (
                repository,
                file,
                [{"num_points": [4, 2, 3], "method": how} for how in ("default", "discrete")],
            )
            for repository, file in (
                ("lyuwenyu+RT-DETR/rtdetrv2_pytorch", "rtdetr.rtdetrv2_decoder"),
                ("Peterande+D-FINE", "dfine.dfine_decoder"),
            )
        ),
    ],
)
def test_the_authors_real_time_detectors(repository, file, options):
    """Lists of points, a value in levels, their own clamp: in the files as they are."""
    code = f"""
import importlib
import sys
import types
from pathlib import Path

def bare(name):
    "A package without what its __init__ imports: data sets, logging, torchvision."
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(Path({upstream(repository)!r}, *name.split(".")))]
    return package

for name in ("src", "src.zoo", "src.zoo.rtdetr", "src.zoo.dfine", "src.core"):
    bare(name)
as_it_is = lambda found: found
sys.modules["src.core"].register = lambda *given, **_: given[0] if given and given[0] else as_it_is
decoder = importlib.import_module("src.zoo.{file}")
shapes = [[8, 12], [4, 6], [2, 3]]
query, boxes = torch.randn(2, 9, 64).double(), torch.rand(2, 9, 1, 4).double()
value = torch.randn(2, 126, 64).double()
if "dfine" in decoder.__name__:
    value = value.unflatten(-1, (4, 16)).permute(0, 2, 3, 1).split([96, 24, 6], dim=-1)
for options in {options}:
    module = decoder.MSDeformableAttention(embed_dim=64, num_heads=4, num_levels=3, **options)
    check(wake(module).double(), lambda module: module(query, boxes, value, shapes), operators=1)
"""
    packages.run(COMPARE + code, "torchvision")


@pytest.mark.slow
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
