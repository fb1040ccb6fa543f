"""What `test_downstream` runs in processes of their own: unmodified code of others on the extensions."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from saccade.integrations import extensions

SHAPES = torch.tensor([[6, 8], [3, 4]])
STARTS = torch.tensor([0, 48])
STEPS = 20


def bare_package(name, path=()):
    """A package without its `__init__`, which would import much that these tests do not need."""
    package = ModuleType(name)
    package.__path__ = [*map(str, path)]
    sys.modules[name] = package


def lift_cuda():
    """Code that insists on a GPU runs on the CPU."""
    to = torch.Tensor.to

    def stay(self, *given, **options):
        there = any(str(each).startswith("cuda") for each in given)
        return self if there else to(self, *given, **options)

    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.to = stay


@contextmanager
def taken_for_a_gpu(*flags):
    """Modules that call their extension on a GPU only call it for tensors on the CPU."""
    torch.Tensor.is_cuda = property(lambda self: True)
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    for module in flags:
        module.IS_CUDA_AVAILABLE = True
    try:
        yield
    finally:
        del torch.Tensor.is_cuda
        torch.cuda.is_available = available
        for module in flags:
            module.IS_CUDA_AVAILABLE = False


@contextmanager
def counted(module):
    """The calls of the module's functions; a test without any would compare a thing with itself."""
    calls = []
    originals = {
        name: getattr(module, f"ms_deform_attn_{name}") for name in ("forward", "backward")
    }

    def counting(name):
        def call(*given, **options):
            calls.append(name)
            return originals[name](*given, **options)

        return call

    for name in originals:
        setattr(module, f"ms_deform_attn_{name}", counting(name))
    yield calls
    for name, original in originals.items():
        setattr(module, f"ms_deform_attn_{name}", original)


def trained(make, run):
    """The losses of a few steps of gradient descent from the same start."""
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs, target = torch.randn(2, 60, 32), torch.randn(2, 60, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, foreach=False)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (run(model, inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def assert_trains_alike(extension, make, run, with_extension, without):
    """The same losses through the extension as through the project's own Python."""
    with counted(importlib.import_module(extension)) as calls, with_extension():
        found = trained(make, run)
    assert calls.count("forward") == calls.count("backward") >= STEPS, calls
    calls.clear()
    with without():
        expected = trained(make, run)
    assert not calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[-1] < 0.98 * found[0], found
    print(f"losses {found[0]:.4f} to {found[-1]:.4f}, {(found - expected).abs().max():.1e} apart")


# --- Deformable-DETR, DINO, Mask2Former: MultiScaleDeformableAttention ------------------------------


def run_checks(operators):
    """Their models/ops/test.py: the checks as they are, on other devices and up to the same widths."""
    lift_cuda()
    extensions.install("MultiScaleDeformableAttention")
    sys.path.insert(0, operators)
    checks = runpy.run_path(f"{operators}/test.py", run_name="upstream")
    checks["check_forward_equal_with_pytorch_double"]()
    checks["check_forward_equal_with_pytorch_float"]()
    check = checks["check_gradient_numerical"]
    for channels in (30, 32, 64, 71, 1025, 2048, 3096):
        if channels > 71:
            # The whole matrix of 3096 channels would take 37 GB.
            fast = functools.partial(torch.autograd.gradcheck, fast_mode=True)
            check.__globals__["gradcheck"] = fast
        check(channels)


@contextmanager
def own_python(functions, module):
    """The module's attention computed by the project's own function for debugging."""

    def apply(value, shapes, starts, locations, weights, im2col_step):
        return functions.ms_deform_attn_core_pytorch(value, shapes, locations, weights)

    original = module.MSDeformAttnFunction
    module.MSDeformAttnFunction = SimpleNamespace(apply=apply)
    yield
    module.MSDeformAttnFunction = original


@contextmanager
def nothing_changed():
    yield


def train_module(operators):
    """Their MSDeformAttn."""
    extensions.install("MultiScaleDeformableAttention")
    sys.path.insert(0, str(Path(operators).parent))
    modules = importlib.import_module("ops.modules.ms_deform_attn")
    functions = importlib.import_module("ops.functions.ms_deform_attn_func")
    points = torch.rand(2, 60, 2, 2)

    def run(model, inputs):
        return model(inputs, points, inputs, SHAPES, STARTS)

    assert_trains_alike(
        "MultiScaleDeformableAttention",
        lambda: modules.MSDeformAttn(32, 2, 4, 3),
        run,
        nothing_changed,
        lambda: own_python(functions, modules),
    )


def train_encoder(repository):
    """Deformable-DETR's own encoder, two layers."""
    extensions.install("MultiScaleDeformableAttention")
    # Its util.misc does not import with today's torchvision.
    misc = ModuleType("util.misc")
    misc.inverse_sigmoid = torch.logit
    sys.modules["util.misc"] = misc
    bare_package("util")
    bare_package("models", [f"{repository}/models"])
    transformer = importlib.import_module("models.deformable_transformer")
    modules = importlib.import_module("models.ops.modules.ms_deform_attn")
    functions = importlib.import_module("models.ops.functions.ms_deform_attn_func")

    def make():
        layer = transformer.DeformableTransformerEncoderLayer(32, 64, 0.0, "relu", 2, 4, 3)
        return transformer.DeformableTransformerEncoder(layer, 2)

    def run(model, inputs):
        return model(inputs, SHAPES, STARTS, torch.ones(2, 2, 2))

    assert_trains_alike(
        "MultiScaleDeformableAttention",
        make,
        run,
        nothing_changed,
        lambda: own_python(functions, modules),
    )


# --- InternImage: DCNv3 -------------------------------------------------------------------------------


def run_dcnv3_checks(operators):
    """Its ops_dcnv3/test.py, all checks but that of the time a picture of 512 takes on a GPU."""
    lift_cuda()
    extensions.install("DCNv3")
    sys.path.insert(0, operators)
    checks = runpy.run_path(f"{operators}/test.py", run_name="upstream")
    checks["check_forward_equal_with_pytorch_double"]()
    checks["check_forward_equal_with_pytorch_float"]()
    for channels in (1, 16, 30, 32, 64, 71, 1025):
        checks["check_backward_equal_with_pytorch_double"](channels)
        checks["check_backward_equal_with_pytorch_float"](channels)


# --- mmcv, Grounding DINO, detrex: their own Python on a CPU, the extension on a GPU ----------------


def train_like_mmcv(extension, module, **names):
    """Their MultiScaleDeformableAttention."""
    points = torch.rand(2, 60, 2, 2)

    def make():
        return module.MultiScaleDeformableAttention(
            num_heads=4, num_levels=2, num_points=3, batch_first=True, **names
        )

    def run(model, inputs):
        return model(
            inputs,
            value=inputs,
            reference_points=points,
            spatial_shapes=SHAPES,
            level_start_index=STARTS,
        )

    def with_extension():
        flags = [module] if hasattr(module, "IS_CUDA_AVAILABLE") else []
        return taken_for_a_gpu(*flags)

    assert_trains_alike(extension, make, run, with_extension, nothing_changed)


def train_file(extension, file, downstream):
    """The file alone: its package imports detectron2, or transformers of long ago."""
    extensions.install(extension)
    bare_package(extension.partition(".")[0])
    spec = importlib.util.spec_from_file_location(downstream, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[downstream] = module
    spec.loader.exec_module(module)
    assert extensions.install(extension).installed
    train_like_mmcv(extension, module, embed_dim=32)


def train_mmcv():
    """The attention module of the mmcv that is installed."""
    extensions.install("mmcv._ext")
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    train_like_mmcv("mmcv._ext", module, embed_dims=32, dropout=0.0)
