"""Compiled modules under their own names: what downstream code calls, exactly as it calls it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import helpers
import packages
import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.function import once_differentiable

import saccade
from saccade.integrations import extensions

SHAPES = [(6, 4), (3, 2)]
MS_DEFORM = ["MultiScaleDeformableAttention", "mmcv._ext", "groundingdino._C", "detrex._C"]


@pytest.fixture(autouse=True)
def _nothing_stays_installed(monkeypatch):
    """Packages without their compiled modules, and everything as it was afterwards."""
    for name in ("mmcv", "groundingdino", "detrex", "DCNv4"):
        package = ModuleType(name)
        package.__path__ = []
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, package)
    finders, modules = list(sys.meta_path), dict(sys.modules)
    yield
    extensions.uninstall()
    assert sys.meta_path == finders
    for name in MS_DEFORM:
        assert sys.modules.get(name) is modules.get(name)


@pytest.fixture(params=MS_DEFORM)
def attend(request):
    """The function that downstream code makes of a module, differentiable."""
    extensions.install(request.param)
    module = importlib.import_module(request.param)
    return make_function(module, filled=request.param == "mmcv._ext")


def make_function(module, filled=False):
    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
            inputs = (value, shapes, starts, locations, weights)
            ctx.save_for_backward(*inputs)
            ctx.im2col_step = im2col_step
            if filled:
                return module.ms_deform_attn_forward(*inputs, im2col_step=im2col_step)
            return module.ms_deform_attn_forward(*inputs, im2col_step)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_output):
            inputs = ctx.saved_tensors
            if filled:
                gradients = [torch.zeros_like(inputs[at]) for at in (0, 3, 4)]
                nothing = module.ms_deform_attn_backward(
                    *inputs, grad_output.contiguous(), *gradients, im2col_step=ctx.im2col_step
                )
                assert nothing is None
            else:
                gradients = module.ms_deform_attn_backward(*inputs, grad_output, ctx.im2col_step)
            grad_value, grad_locations, grad_weights = gradients
            return grad_value, None, None, grad_locations, grad_weights, None

    return Attend.apply


def drawn(head_dim=4, batch_size=2, dtype=torch.float64, requires_grad=False):
    """value, shapes, starts, locations, weights."""
    shapes = torch.tensor(SHAPES)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    value = torch.rand(batch_size, 30, 2, head_dim).to(dtype)
    locations = torch.rand(batch_size, 3, 2, 2, 2, 2).to(dtype)
    weights = torch.rand(batch_size, 3, 2, 2, 2).to(dtype)
    for tensor in (value, locations, weights):
        tensor.requires_grad_(requires_grad)
    return value, shapes, starts, locations, weights


def outputs_and_gradients(attended, tensors, grad_output):
    return attended, *torch.autograd.grad(attended, tensors, grad_output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_library(attend, dtype):
    inputs = drawn(dtype=dtype, batch_size=3, requires_grad=True)
    value, _, _, locations, weights = inputs
    # Five pictures a launch would not divide three; and gradients of a sum have no memory of their own.
    for grad_output in (
        torch.randn(3, 8, 3, dtype=dtype).transpose(1, 2),
        torch.ones((), dtype=dtype).expand(3, 3, 8),
    ):
        found = outputs_and_gradients(attend(*inputs, 5), (value, locations, weights), grad_output)
        expected = outputs_and_gradients(
            saccade.deformable_attention(value, SHAPES, locations, weights),
            (value, locations, weights),
            grad_output,
        )
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, want)


def test_gradients_by_the_reference(attend):
    inputs = drawn(requires_grad=True)
    tensors = (inputs[0], *inputs[3:])
    grad_output = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = outputs_and_gradients(attend(*inputs, 64), tensors, grad_output)
    with saccade.use_backend("reference"):
        found = outputs_and_gradients(attend(*inputs, 64), tensors, grad_output)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


# Widths of the projects' kernels, and others. The whole matrix of the widest has 250 million elements: there
# all entries are tried with two products.
@pytest.mark.parametrize("head_dim", [3, *helpers.some([32, 64, 71, 1025], 1)])
def test_numerical_gradients(attend, head_dim):
    *inputs, locations, weights = drawn(head_dim, 1)
    weights = weights / weights.sum((-1, -2), keepdim=True)
    tensors = [tensor.requires_grad_() for tensor in (inputs[0], locations, weights)]
    assert gradcheck(attend, (*inputs, *tensors[1:], 2), fast_mode=head_dim > 3)


@pytest.mark.nightly
def test_the_whole_matrix_of_numerical_gradients(attend):
    *inputs, locations, weights = drawn(30, 1)
    tensors = [tensor.requires_grad_() for tensor in (inputs[0], locations, weights)]
    assert gradcheck(attend, (*inputs, *tensors[1:], 2))


def test_forward_is_that_of_grid_sample(attend):
    for dtype in (torch.float64, torch.float32):
        value, shapes, starts, locations, weights = drawn(dtype=dtype)
        expected = torch.zeros(2, 2, 4, 3, dtype=dtype)
        for level, (height, width) in enumerate(SHAPES):
            maps = value[:, starts[level] :][:, : height * width].permute(0, 2, 3, 1)
            read = torch.nn.functional.grid_sample(
                maps.reshape(4, 4, height, width),
                2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1,
                align_corners=False,
            )
            level_weights = weights[:, :, :, level].permute(0, 2, 1, 3)[:, :, None]
            expected += (read.view(2, 2, 4, 3, 2) * level_weights).sum(-1)
        found = attend(value, shapes, starts, locations, weights, 2)
        torch.testing.assert_close(found, expected.permute(0, 3, 1, 2).flatten(2))


def test_dtypes_may_differ():
    extensions.install("MultiScaleDeformableAttention")
    attend = make_function(importlib.import_module("MultiScaleDeformableAttention"))
    value, shapes, starts, locations, weights = drawn(dtype=torch.float32)
    inputs = value.half(), shapes.int(), starts, locations, weights.double()
    tensors = [inputs[at].requires_grad_() for at in (0, 3, 4)]
    output = attend(*inputs, 64)
    assert output.dtype == torch.float16
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]


def test_mmcv_fills_tensors_of_other_dtypes_and_refuses_other_shapes():
    extensions.install("mmcv._ext")
    ext = importlib.import_module("mmcv._ext")
    inputs = drawn()
    grad_output = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = [torch.full_like(inputs[at], 7) for at in (0, 3, 4)]
    ext.ms_deform_attn_backward(*inputs, grad_output, *expected, im2col_step=64)
    found = [torch.full_like(inputs[at], 7, dtype=torch.float32) for at in (0, 3, 4)]
    ext.ms_deform_attn_backward(
        **dict(zip(MMCV_BACKWARD, (*inputs, grad_output, *found), strict=True)), im2col_step=64
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.float())
    found[2] = torch.full((2, 3, 2, 4), 7.0)
    kept = found[0].clone()
    with pytest.raises(ValueError, match=r"grad_attn_weight: expected \[2, 3, 2, 2, 2\], got"):
        ext.ms_deform_attn_backward(*inputs, 2 * grad_output, *found, im2col_step=64)
    assert torch.equal(found[0], kept)


MMCV_BACKWARD = (
    "value",
    "value_spatial_shapes",
    "value_level_start_index",
    "sampling_locations",
    "attention_weights",
    "grad_output",
    "grad_value",
    "grad_sampling_loc",
    "grad_attn_weight",
)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({2: torch.tensor([0, 6])}, ValueError, r"start_index: expected \[0, 24\].* got \[0, 6\]"),
        ({2: torch.tensor([0])}, ValueError, r"start_index: expected \[0, 24\].* got \[0\]"),
        ({2: torch.tensor([0.0, 24])}, ValueError, "start_index: expected a tensor of integers"),
        ({2: [0, 24]}, TypeError, "start_index: expected a Tensor, got list"),
        ({2: torch.tensor([0, 24], device="meta")}, ValueError, "expected a tensor on cpu like"),
        ({1: torch.tensor([[6, 4, 1]])}, ValueError, r"spatial_shapes: expected \[any, 2\]"),
        ({1: torch.tensor([[3, 2], [6, 4]])}, ValueError, r"start_index: expected \[0, 6\]"),
        ({1: torch.tensor([[4, 4], [3, 2]]), 2: torch.tensor([0, 16])}, ValueError, "sum to 30"),
        ({3: torch.rand(2, 3, 2, 1, 2, 2)}, ValueError, "sampling_locations: expected"),
        ({4: torch.rand(2, 3, 2, 2, 3)}, ValueError, "attention_weights: expected"),
        ({4: torch.rand(2, 3, 2, 5)}, ValueError, "attention_weights: expected .*joined or apart"),
        ({5: torch.rand(2, 3, 4, 2).double()}, ValueError, "grad_output: expected .*joined or apart"),
        ({5: torch.rand(2, 3, 9).double()}, ValueError, r"grad_output: expected \[2, 3, 8\]"),
        ({5: torch.rand(2, 3, 8)}, ValueError, "grad_output: expected torch.float64"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changed, error, message):
    extensions.install("MultiScaleDeformableAttention")
    module = importlib.import_module("MultiScaleDeformableAttention")
    inputs = [*drawn(), torch.randn(2, 3, 8, dtype=torch.float64)]
    for index, argument in changed.items():
        inputs[index] = argument
    with pytest.raises(error, match=message):
        module.ms_deform_attn_backward(*inputs, 64)
    if 5 not in changed:
        with pytest.raises(error, match=message):
            module.ms_deform_attn_forward(*inputs[:5], 64)


@pytest.mark.parametrize("weights_axes", [(2, 3, 2, 4), (2, 3, 8), (48,)])
@pytest.mark.parametrize("gradient_axes", [(2, 3, 2, 4), (6, 8), (48,)])
def test_weights_and_gradients_take_axes_joined_or_apart(weights_axes, gradient_axes):
    """The compiled originals read both as numbers in a row."""
    extensions.install("MultiScaleDeformableAttention")
    module = importlib.import_module("MultiScaleDeformableAttention")
    inputs, grad_output = drawn(), torch.randn(2, 3, 8, dtype=torch.float64)
    joined = [*inputs[:4], inputs[4].reshape(weights_axes)]
    output = module.ms_deform_attn_forward(*inputs, 64)
    assert torch.equal(module.ms_deform_attn_forward(*joined, 64), output)
    expected = module.ms_deform_attn_backward(*inputs, grad_output, 64)
    gradients = module.ms_deform_attn_backward(*joined, grad_output.reshape(gradient_axes), 64)
    for gradient, tensor, right in zip(
        gradients, (*joined[:1], *joined[3:]), expected, strict=True
    ):
        assert gradient.shape == tensor.shape
        assert torch.equal(gradient.reshape(right.shape), right)


def test_every_way_to_import():
    names = [*MS_DEFORM, "DCNv4.ext", "DCNv3"]
    report = extensions.install(*names)
    assert [*report.installed] == names
    assert report.installed["mmcv._ext"][:2] == (
        "ms_deform_attn_forward",
        "ms_deform_attn_backward",
    )
    assert report.hidden == {}
    assert extensions.install(*names) == report
    for name in names:
        module = importlib.import_module(name)
        assert importlib.util.find_spec(name) is module.__spec__
        assert module.__spec__.loader is not None  # for mmcv and mmengine that is the test
        assert not hasattr(module, "__file__")
        assert {*report.installed[name]} <= {*dir(module)}
    import mmcv._ext
    import MultiScaleDeformableAttention
    from groundingdino import _C

    assert sys.modules["groundingdino"]._C is _C
    assert MultiScaleDeformableAttention.ms_deform_attn_forward is _C.ms_deform_attn_forward
    assert mmcv._ext.ms_deform_attn_backward is not _C.ms_deform_attn_backward
    with pytest.raises(AttributeError, match=r"groundingdino\._C: expected one of .* got 'nms'"):
        _ = _C.nms
    assert extensions.uninstall("groundingdino._C", "mmcv._ext") == [
        "groundingdino._C",
        "mmcv._ext",
    ]
    assert not hasattr(sys.modules["groundingdino"], "_C")
    assert importlib.util.find_spec("groundingdino._C") is None
    with pytest.raises(ImportError):
        importlib.import_module("groundingdino._C")
    assert extensions.uninstall("groundingdino._C") == []
    extensions.install("groundingdino._C")
    assert importlib.import_module("groundingdino._C") is _C


def test_what_mmcv_only_asks_for_is_there_and_raises():
    extensions.install("mmcv._ext")
    ext = importlib.import_module("mmcv._ext")
    assert all(hasattr(ext, name) for name in ("nms", "roi_align_forward", "softnms"))
    assert not hasattr(ext, "__wrapped__")
    with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms: Saccade provides ms_deform"):
        ext.nms(torch.rand(1, 4), torch.rand(1), iou_threshold=0.5, offset=0)
    assert "Saccade" in ext.get_compiler_version()


def test_names_that_nobody_knows():
    known = (
        "MultiScaleDeformableAttention, mmcv._ext, groundingdino._C, detrex._C, DCNv4.ext, DCNv3"
    )
    for names in ((), ("mmcv.ext",), (["DCNv3"],), ("DCNv3", "dcn")):
        with pytest.raises(ValueError, match=f"names: expected .* {known}, got"):
            extensions.install(*names)
    with pytest.raises(ValueError, match="names: expected some of"):
        extensions.uninstall("dcn")
    assert importlib.util.find_spec("DCNv3") is None


def test_a_compiled_module_is_hidden_or_left_alone(tmp_path, monkeypatch):
    file = tmp_path / "MultiScaleDeformableAttention.py"
    file.write_text("ms_deform_attn_forward = None")
    (tmp_path / "DCNv3").mkdir()  # a folder on the path is not a module
    monkeypatch.syspath_prepend(tmp_path)
    name = file.stem
    report = extensions.install(name, "DCNv3")
    assert report.hidden == {name: str(file)}
    assert importlib.import_module(name).ms_deform_attn_forward is not None
    extensions.uninstall()
    assert importlib.import_module(name).ms_deform_attn_forward is None
    try:
        with pytest.raises(
            RuntimeError, match=f"{name}: expected a module that is not imported yet"
        ):
            extensions.install("DCNv3", name)
        assert extensions.uninstall() == []
    finally:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "downstream"),
    [
        ("groundingdino._C", "groundingdino.models.GroundingDINO.ms_deform_attn"),
        ("detrex._C", "detrex.layers.dcn_v3"),
    ],
)
def test_downstream_code_that_went_on_without(name, downstream, monkeypatch):
    module = ModuleType(downstream)
    monkeypatch.setitem(sys.modules, downstream, module)
    with pytest.raises(RuntimeError, match=f"{name}: expected {downstream} not to be imported yet"):
        extensions.install(name)
    monkeypatch.delitem(sys.modules, downstream)
    extensions.install(name)
    module._C = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, downstream, module)
    assert extensions.install(name).installed  # this one has it


@pytest.mark.parametrize("name", ["DCNv4.ext", "DCNv3", "detrex._C"])
def test_convolutions(name):
    convolutions = pytest.importorskip("saccade.integrations.dcn_extensions")
    functions = extensions.install(name).installed[name]
    module = importlib.import_module(name)
    for function in functions:
        if not function.startswith("ms_deform"):
            assert getattr(module, function) is getattr(convolutions, function)


@pytest.mark.slow
def test_the_version_that_internimage_asks_for():
    code = """
import pkg_resources
from saccade.integrations import extensions
extensions.install("DCNv3")
assert float(pkg_resources.get_distribution("DCNv3").version) > 1.0
extensions.uninstall("DCNv3")
try:
    pkg_resources.get_distribution("DCNv3")
except pkg_resources.DistributionNotFound:
    print("gone")
"""
    assert packages.run(code, "pkg_resources") == "gone\n"


SCRIPT = """
import os, sys
import beside
import MultiScaleDeformableAttention as MSDA
from saccade.integrations import extensions
assert extensions.install("MultiScaleDeformableAttention")
print(__name__, *sys.argv[1:], MSDA.ms_deform_attn_forward.__name__)
"""


def run(*arguments, folder):
    command = [sys.executable, "-m", "saccade.integrations.extensions", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_script_runs_without_a_change(tmp_path, monkeypatch, capsys):
    source = str(importlib.util.find_spec("saccade").submodule_search_locations[0])
    monkeypatch.setenv("PYTHONPATH", source.removesuffix("saccade"))
    scripts = tmp_path / "tools"
    scripts.mkdir()
    (scripts / "main.py").write_text(SCRIPT)
    (scripts / "beside.py").write_text("")
    name = "MultiScaleDeformableAttention"
    done = run(name, "--", "tools/main.py", "--epochs", "1", folder=tmp_path)
    assert done.stdout == "__main__ --epochs 1 ms_deform_attn_forward\n", done.stderr
    done = run(name, "--", "-m", "main", "-x", folder=scripts)
    assert done.stdout == "__main__ -x ms_deform_attn_forward\n", done.stderr
    capsys.readouterr()
    for wrong, message in (
        (["DCNv5", "--", "main.py"], "names: expected some of"),
        ([name], "expected a script, or -m and a module, behind --"),
        (["--", "main.py"], "arguments are required: NAME"),
    ):
        with pytest.raises(SystemExit) as caught:
            extensions.main(wrong)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_import_installs_nothing_and_reads_no_files():
    code = (
        "import sys; before = list(sys.meta_path), set(sys.modules)\n"
        "import saccade\n"
        "assert 'saccade.integrations.extensions' not in sys.modules\n"
        "assert 'saccade.integrations.checkpoints' not in sys.modules\n"
        "import saccade.integrations.extensions\n"
        "assert all(type(f).__module__ != 'saccade.integrations.extensions' for f in sys.meta_path)\n"
        "assert not {'mmcv', 'DCNv3', 'MultiScaleDeformableAttention'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
