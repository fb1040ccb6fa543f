"""Which kernel computes a call: names, reasons, choices, a library that is missing or broken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS, NO_TRITON
from helpers import Case, assert_same, python, run

import saccade
from saccade.ops import contract, gpu, native


@pytest.mark.parametrize("name", BACKENDS)
def test_which_backend_names_kernel_and_reason(name):
    with saccade.use_backend(name):
        found = saccade.which_backend(torch.zeros(1))
    assert found.name == name
    assert found.reason


def test_which_backend_for_a_device_without_a_kernel():
    assert saccade.which_backend(torch.zeros(1, device="meta")).name == "reference"
    assert "meta" in saccade.which_backend(torch.zeros(1, device="meta")).reason


def test_use_backend_refuses_what_is_not_there_and_restores():
    before = saccade.which_backend()
    with pytest.raises(ValueError, match="name: expected one of reference, .*got 'cuda'"):
        saccade.use_backend("cuda").__enter__()
    with pytest.raises(ZeroDivisionError), saccade.use_backend("reference"):
        raise ZeroDivisionError
    assert saccade.which_backend() == before


def test_environment_chooses_the_instruction_set():
    if native.failure:
        pytest.skip(f"no native library: {native.failure}")
    code = "import saccade; print(saccade.which_backend())"
    for isa in native.available_isas():
        assert python(code, SACCADE_CPU_ISA=isa).stdout.startswith(f"cpu-{isa} (SACCADE_CPU_ISA")
    forced = "import saccade\nwith saccade.use_backend('reference'): print(saccade.which_backend())"
    assert python(forced, SACCADE_CPU_ISA="mmx").stdout.startswith("reference")
    wrong = python(code, SACCADE_CPU_ISA="mmx")
    assert wrong.returncode != 0
    assert "SACCADE_CPU_ISA: expected one of" in wrong.stderr


WITHOUT_LIBRARY = """
import torch, saccade
print(saccade.which_backend())
value, locations, weights = (
    torch.rand(*shape, requires_grad=True)
    for shape in ((1, 20, 2, 4), (1, 3, 2, 1, 4, 2), (1, 3, 2, 1, 4))
)
output = saccade.deformable_attention(value, [(4, 5)], locations, weights)
output.square().sum().backward()
expected = torch.autograd.grad(
    saccade.reference.deformable_attention(value, [(4, 5)], locations, weights).square().sum(),
    (value, locations, weights))
for leaf, want in zip((value, locations, weights), expected):
    torch.testing.assert_close(leaf.grad, want)
print(torch.ops.saccade.deformable_attention.default._schema)
"""


def test_without_the_binary_everything_works_and_says_why():
    done = python(WITHOUT_LIBRARY, SACCADE_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    backend, schema = done.stdout.splitlines()
    assert backend == "reference (SACCADE_DISABLE_NATIVE is set)"
    assert schema == "saccade::deformable_attention" + contract.SCHEMAS["deformable_attention"]


def test_a_binary_that_does_not_load_is_reported_not_raised(tmp_path):
    import shutil
    from pathlib import Path

    package = Path(saccade.__file__).parent
    shutil.copytree(package, tmp_path / "saccade", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "saccade" / "_native.so").write_bytes(b"not a library")
    done = python(WITHOUT_LIBRARY, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference (_native.so did not load into torch")
    assert done.stderr == ""


@pytest.fixture
def a_card(monkeypatch):
    """A machine that says it has a card, of a name and a compute capability."""

    def pretend(capability=(9, 0), triton=True, hip=None, driver=True, **environment):
        for function in (gpu.refusal_of_installation, gpu.refusal_of_card):
            function.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(torch.version, "hip", hip)
        if not triton:
            monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        active = SimpleNamespace(utils=None) if driver else SimpleNamespace()
        installed = SimpleNamespace(
            __version__="3.6.0", runtime=SimpleNamespace(driver=SimpleNamespace(active=active))
        )
        monkeypatch.setattr(gpu.importlib, "import_module", lambda name: installed)
        return gpu.refusal(torch.device("cuda", 0))

    yield pretend
    for function in (gpu.refusal_of_installation, gpu.refusal_of_card):
        function.cache_clear()


def test_why_a_call_on_a_card_does_not_get_the_gpu_kernel(a_card):
    assert "Card has compute capability 7.5, the GPU kernels need 8.0" in a_card((7, 5))
    assert "SACCADE_DISABLE_TRITON" in a_card(SACCADE_DISABLE_TRITON="1")
    assert "AMD" in a_card(SACCADE_DISABLE_TRITON="0", hip="6.4")
    assert "Triton is not installed" in a_card(triton=False)
    assert "no kernel for xpu" in gpu.refusal(torch.device("xpu"))


@pytest.mark.triton
@pytest.mark.skipif(NO_TRITON is not None, reason=f"no GPU kernels: {NO_TRITON}")
def test_a_card_gets_the_gpu_kernel(a_card, monkeypatch):
    assert a_card() is None
    assert "Triton cannot launch kernels here" in a_card(driver=False)
    monkeypatch.setattr(gpu, "OLDEST_TRITON", (99, 0))
    assert "Triton 3.6.0 is older than 99.0" in a_card()


def test_a_call_that_is_refused_runs_on_the_reference(monkeypatch):
    monkeypatch.setattr(gpu, "refusal", lambda device: "no reason")
    case = Case()
    inputs = case.draw()
    arguments = contract.arguments_of(case.understood(*inputs))
    grad_output = torch.randn(case.batch_size, case.num_queries, case.num_heads * case.head_dim)
    forward, backward = gpu.kernels(contract.PLAIN).values()
    found = forward(*arguments)
    gradients = backward(grad_output, *arguments, [True, True, False])
    with saccade.use_backend("reference"):
        expected = run(case, inputs, grad_output)
    assert_same([found, *gradients[:2]], expected[:3], 1e-6)
    assert gradients[2].numel() == 0


def test_transforms_that_only_the_reference_knows_are_named():
    with torch.autograd.forward_ad.dual_level():
        assert saccade.which_backend().name == "reference"
        assert "forward-mode" in saccade.which_backend().reason
