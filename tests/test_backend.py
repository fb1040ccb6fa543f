"""Which kernel computes a call: names, reasons, choices, a library that is missing or broken."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from helpers import python

import saccade
from saccade.ops import contract, native


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
