"""Which kernel computes a call: names, reasons, choices, a library that is missing or broken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS, NATIVE_BACKENDS
from fused_helpers import COMBINATIONS
from helpers import Case, assert_same, python, run, some

import saccade
from saccade import reference
from saccade.ops import gpu, native, schema
from saccade.ops.registration import BACKWARD_OPERATOR, OPERATOR


@pytest.mark.parametrize("name", BACKENDS)
def test_which_backend_names_kernel_and_reason(name):
    with saccade.use_backend(name):
        backend = saccade.which_backend(torch.zeros(1))
    assert backend.name == name
    assert backend.reason


def test_which_backend_for_a_device_without_a_kernel():
    assert saccade.which_backend(torch.zeros(1, device="meta")).name == "reference"
    assert "meta" in saccade.which_backend(torch.zeros(1, device="meta")).reason


def test_use_backend_refuses_an_unknown_name_and_restores():
    before = saccade.which_backend()
    with pytest.raises(ValueError, match="name: expected one of reference, .*got 'cuda'"):
        saccade.use_backend("cuda").__enter__()
    with pytest.raises(ZeroDivisionError), saccade.use_backend("reference"):
        raise ZeroDivisionError
    assert saccade.which_backend() == before


@pytest.fixture
def reference_calls(monkeypatch):
    """A list that grows with the calls of the reference kernels."""
    calls = []

    def count(name):
        function = getattr(reference, name)

        def counted(*arguments, **options):
            calls.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(reference, name, counted)

    count("execute")
    count("execute_backward")
    return calls


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_reference_is_chosen_in_the_dispatcher(reference_calls, name):
    case = COMBINATIONS[name]
    call = case.parse(*case.draw())
    arguments = schema.to_arguments(call)
    mask = [True, True, True, call.reference_points is not None]
    with saccade.use_backend("reference"):
        output = OPERATOR(*arguments)
        assert reference_calls == ["execute"]
        gradients = BACKWARD_OPERATOR(torch.ones_like(output), *arguments, mask)
        assert reference_calls == ["execute", "execute_backward"]
        case.call(*case.draw())
        assert reference_calls == ["execute", "execute_backward", "execute"]
    torch.testing.assert_close(OPERATOR(*arguments), output)
    others = BACKWARD_OPERATOR(torch.ones_like(output), *arguments, mask)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other)
    assert native.failure or len(reference_calls) == 3


@pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}")
@pytest.mark.filterwarnings("error")
def test_a_backward_runs_on_the_backend_in_force_when_it_runs(reference_calls):
    case = COMBINATIONS["boxes-logits"]
    leaves = [tensor.requires_grad_() for tensor in case.draw()]
    with saccade.use_backend("reference"):
        output = case.call(*leaves)
    outside = torch.autograd.grad(output.sum(), leaves)
    assert reference_calls == ["execute"]
    output = case.call(*leaves)
    assert reference_calls == ["execute"]
    with saccade.use_backend("reference"):
        inside = torch.autograd.grad(output.sum(), leaves)
    assert reference_calls == ["execute", "execute_backward"]
    for gradient, want in zip(outside, inside, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}")
@pytest.mark.filterwarnings("error")
def test_backends_nest(reference_calls):
    case = Case()
    inputs = case.draw()
    before = saccade.which_backend()
    other = NATIVE_BACKENDS[-1]

    def runs(name):
        del reference_calls[:]
        case.call(*inputs)
        used_reference = bool(reference_calls)
        return saccade.which_backend().name == name and used_reference == (name == "reference")

    with saccade.use_backend("reference"):
        assert runs("reference")
        with saccade.use_backend("reference"):
            assert runs("reference")
        assert runs("reference")
        with saccade.use_backend(other):
            assert runs(other)
            with pytest.raises(ZeroDivisionError), saccade.use_backend("reference"):
                raise ZeroDivisionError if runs("reference") else AssertionError
            assert runs(other)
        assert runs("reference")
    assert saccade.which_backend() == before
    with saccade.use_backend(other):
        with saccade.use_backend("reference"):
            assert runs("reference")
        assert runs(other)
    assert runs(before.name)
    assert saccade.which_backend() == before


@pytest.mark.slow
def test_environment_chooses_the_instruction_set():
    if native.failure:
        pytest.skip(f"no native library: {native.failure}")
    code = "import saccade; print(saccade.which_backend())"
    for isa in some(native.available_isas(), 1):
        assert python(code, SACCADE_CPU_ISA=isa).stdout.startswith(f"cpu-{isa} (SACCADE_CPU_ISA")
    forced = (
        "import saccade\nwith saccade.use_backend('reference'): print(saccade.which_backend())\n"
    )
    wrong = python(forced + code, SACCADE_CPU_ISA="mmx")
    assert wrong.stdout.startswith("reference")
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


@pytest.mark.slow
def test_without_the_binary_everything_works_and_says_why():
    process = python(WITHOUT_LIBRARY, SACCADE_DISABLE_NATIVE="1")
    assert process.returncode == 0, process.stderr
    backend, printed_schema = process.stdout.splitlines()
    assert backend == "reference (SACCADE_DISABLE_NATIVE is set)"
    assert printed_schema == "saccade::deformable_attention" + schema.SCHEMAS[schema.FORWARD]


@pytest.mark.slow
def test_a_binary_that_does_not_load_is_reported_not_raised(tmp_path):
    import shutil
    from pathlib import Path

    package = Path(saccade.__file__).parent
    shutil.copytree(package, tmp_path / "saccade", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "saccade" / "_native.so").write_bytes(b"not a library")
    process = python(WITHOUT_LIBRARY, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("reference (_native.so did not load into torch")
    assert process.stderr == ""


@pytest.fixture
def card(monkeypatch):
    """A machine that reports a card with a name and a compute capability."""

    def pretend(capability=(9, 0), triton=True, hip=None, driver=True, **environment):
        for function in (gpu.installation_refusal, gpu.card_refusal):
            function.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(torch.version, "hip", hip)
        spec = object() if triton else None
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(gpu, "implementations", lambda: None)
        monkeypatch.setenv("SACCADE_DISABLE_TRITON", "0")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        active = SimpleNamespace(utils=None) if driver else SimpleNamespace()
        installed = SimpleNamespace(
            __version__="3.6.0", runtime=SimpleNamespace(driver=SimpleNamespace(active=active))
        )
        monkeypatch.setattr(gpu.importlib, "import_module", lambda name: installed)
        return gpu.refusal(torch.device("cuda", 0))

    yield pretend
    for function in (gpu.installation_refusal, gpu.card_refusal):
        function.cache_clear()


def test_why_a_call_on_a_card_does_not_get_the_gpu_kernel(card):
    assert "Card has compute capability 7.5, the GPU kernels need 8.0" in card((7, 5))
    assert "SACCADE_DISABLE_TRITON" in card(SACCADE_DISABLE_TRITON="1")
    assert "AMD" in card(SACCADE_DISABLE_TRITON="0", hip="6.4")
    assert "Triton is not installed" in card(triton=False)
    assert "no kernel for xpu" in gpu.refusal(torch.device("xpu"))


def test_a_card_gets_the_gpu_kernel(card, monkeypatch):
    assert card() is None
    assert "Triton cannot launch kernels here" in card(driver=False)
    monkeypatch.setattr(gpu, "MIN_TRITON", (99, 0))
    assert "Triton 3.6.0 is older than 99.0" in card()


def test_a_refused_call_runs_on_the_reference(monkeypatch):
    monkeypatch.setattr(gpu, "refusal", lambda device: "no reason")
    gpu._kernels.cache_clear()
    case = Case()
    inputs = case.draw()
    arguments = schema.to_arguments(case.parse(*inputs))
    grad_output = torch.randn(case.batch_size, case.num_queries, case.num_heads * case.head_dim)
    output = gpu.forward(*arguments)
    gradients = gpu.backward(grad_output, *arguments, [True, True, False, False])
    gpu._kernels.cache_clear()
    with saccade.use_backend("reference"):
        expected = run(case, inputs, grad_output)
    assert_same([output, *gradients[:2]], expected[:3], 1e-6)
    assert [gradient.shape for gradient in gradients[2:]] == [(0,), (0,)]


def test_blocks_of_two_threads_may_overlap():
    default = saccade.which_backend()
    first, second = saccade.use_backend("reference"), saccade.use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert saccade.which_backend().name == "reference"
    second.__exit__(None, None, None)
    assert saccade.which_backend() == default


@pytest.mark.slow
def test_a_direct_call_keeps_the_tangent():
    case = Case(dtype=torch.float64)
    value, locations, weights = case.draw()
    arguments = schema.to_arguments(case.parse(value, locations, weights))
    tangent = torch.randn_like(value)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, tangent)
        output = OPERATOR(*arguments._replace(value=dual))
        result = torch.autograd.forward_ad.unpack_dual(output).tangent
    # The operator is linear in the value.
    torch.testing.assert_close(result, OPERATOR(*arguments._replace(value=tangent)))


def test_transforms_that_only_the_reference_supports_are_named():
    with torch.autograd.forward_ad.dual_level():
        assert saccade.which_backend().name == "reference"
        assert "forward-mode" in saccade.which_backend().reason
