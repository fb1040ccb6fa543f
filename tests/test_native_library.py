"""The native code itself: guard pages, sanitizers, other processors and compilers, cached plans."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import helpers
import pytest
import torch

import saccade
from saccade.ops import native

ROOT = Path(__file__).resolve().parent.parent
KERNELS = [path.stem for path in sorted((ROOT / "csrc").glob("isa_*.cpp"))]
PLAIN = ["plan", "plan_cache", "dispatch"]  # compiled for the baseline of the processor family

FLAGS = ["-std=c++17", "-ffp-contract=off", "-w", "-Wno-psabi", "-I", str(ROOT / "csrc")]
AS_THE_LIBRARY = ["-O3", "-fPIC"]


def tool(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"{' or '.join(names)} is not installed")


def check(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_objects(
    compiler: str, directory: Path, flags: list[str], names: list[str]
) -> list[Path]:
    """Compiles sources of `csrc/` and returns the objects."""
    objects = [directory / f"{name}.o" for name in names]
    for target in objects:
        source = ROOT / f"csrc/{target.stem}.cpp"
        check(compiler, *FLAGS, *flags, "-c", source, "-o", target)
    return objects


def link(
    compiler: str, directory: Path, flags: list[str], program: str, objects: list[Path]
) -> Path:
    """Compiles a program of `tests/native/` and links it with objects of `csrc/`."""
    target = directory / program
    source = ROOT / f"tests/native/{program}.cpp"
    check(compiler, *FLAGS, *flags, source, *objects, "-pthread", "-o", target)
    return target


@functools.lru_cache
def build_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="saccade-native-")


@functools.lru_cache
def library_objects() -> list[Path]:
    """The kernels, compiled by g++ as the library is; unlike the library, with all their symbols."""
    directory = Path(build_directory().name)
    return compile_objects(tool("g++"), directory, AS_THE_LIBRARY, [*PLAIN, *KERNELS])


def build_program(program: str) -> Path:
    """A program of `tests/native/`, with the kernels as they are in the library."""
    directory = Path(build_directory().name)
    return link(tool("g++"), directory, AS_THE_LIBRARY, program, library_objects())


@pytest.mark.slow
def test_kernels_agree_with_loops_and_stay_within_their_tensors():
    printed = check(build_program("check_kernels"), "300" if helpers.ALL else "50")
    for isa in native.available_isas():
        assert f"{isa} float32" in printed


@pytest.mark.slow
def test_another_compiler_agrees(tmp_path):
    """Clang compiles one instruction set (under `make test-all`, every one) of the same program."""
    compiler = tool("clang++")
    isas = native.available_isas() if helpers.ALL else native.available_isas()[-1:]
    names = [f"isa_{isa}" for isa in isas]
    flags = ["-O2"] if helpers.ALL else ["-O1"]
    replaced = compile_objects(compiler, tmp_path, flags, names)
    kept = [path for path in library_objects() if path.stem not in names]
    program = link(compiler, tmp_path, flags, "check_kernels", [*replaced, *kept])
    for isa in isas:
        assert f"{isa} float64" in check(program, "100" if helpers.ALL else "20", isa)


@pytest.mark.slow
def test_vector_instructions_stay_in_their_kernels():
    """Code for an instruction set that a processor may lack lies only in the kernels dispatched to."""
    objdump = tool("objdump")
    if "x86_64" not in check(tool("g++"), "-dumpmachine"):
        pytest.skip("x86-64 only")
    objects = {path.stem: path for path in library_objects()}
    for isa, registers in (("scalar", r"%[yz]mm"), ("avx2", r"%zmm|%k[1-7]"), ("avx512", None)):
        for symbol, code in disassemble(objdump, objects[f"isa_{isa}"]):
            if f"saccade::{isa}::" in symbol:
                if registers:
                    assert not re.search(registers, code), f"{symbol} of isa_{isa} uses {registers}"
            else:
                assert not re.search(r"%[yz]mm|%k[1-7]", code), f"{symbol} of isa_{isa} is not ours"
    for name in PLAIN:
        for symbol, code in disassemble(objdump, objects[name]):
            assert not re.search(r"%[yz]mm|%k[1-7]", code), f"{symbol} of {name}"


def disassemble(objdump: str, path: Path) -> list[tuple[str, str]]:
    """Symbols and their instructions."""
    text = check(objdump, "-d", "-C", "--no-show-raw-insn", path)
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("names", [("g++",), ("clang++",)], ids=["gcc", "clang"])
def test_sanitizers_find_nothing(tmp_path, names):
    compiler = tool(*names)
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = compile_objects(compiler, tmp_path, flags, [*PLAIN, *KERNELS])
    printed = check(link(compiler, tmp_path, flags, "check_kernels", objects), "150")
    for isa in native.available_isas():
        assert f"{isa} float32" in printed


@pytest.mark.slow
def test_neon_under_emulation(tmp_path):
    compiler = tool("aarch64-linux-gnu-g++")
    emulator = tool("qemu-aarch64", "qemu-aarch64-static")
    flags = ["-O2", "-static"] if helpers.ALL else ["-O1", "-static"]
    objects = compile_objects(compiler, tmp_path, flags, [*PLAIN, "isa_neon"])
    # It is linked, but not run.
    objects += compile_objects(compiler, tmp_path, ["-O0"], ["isa_scalar"])
    program = link(compiler, tmp_path, flags, "check_kernels", objects)
    printed = check(emulator, program, "100" if helpers.ALL else "20", "neon")
    assert "neon float32" in printed
    assert "neon float64" in printed


@pytest.mark.slow
def test_equal_calls_share_a_plan_and_others_do_not(tmp_path):
    compiler = tool("g++", "clang++")
    objects = compile_objects(compiler, tmp_path, ["-O0"], ["plan", "plan_cache"])
    check(link(compiler, tmp_path, ["-O0"], "check_plans", objects))


@pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}")
def test_calls_by_turns_give_what_the_reference_gives_for_each():
    """The plan that a call finds is that of its own sizes, options and number of threads."""
    points, weights = 1.4 * torch.rand(2, 5, 3, 4, 2) - 0.2, torch.rand(2, 5, 3, 4)
    values = {head_dim: torch.randn(2, 42, 3, head_dim) for head_dim in (4, 8)}
    last = ("normalized", None)  # coordinates, queries_per_map
    grid = itertools.product(values, ([6, 7], [7, 6]), (False, True), ("zeros", "border"))
    calls = [
        (
            values[head_dim],
            shape,
            points,
            weights,
            None,
            None,
            softmax,
            [4],
            "linear",
            padding,
            *last,
        )
        for head_dim, shape, softmax, padding in grid
    ]
    operator = torch.ops.saccade.deformable_attention
    with saccade.use_backend("reference"):
        expected = [operator(*call) for call in calls]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            for call, output in zip(calls, expected, strict=True):
                torch.testing.assert_close(operator(*call), output, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}")
def test_the_library_names_no_path_and_needs_only_torch():
    dynamic = check(tool("readelf"), "-d", native.LIBRARY)
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    allowed = r"lib(torch|torch_cpu|stdc\+\+|gcc_s|m|c|c10)\.so.*|ld-linux.*"
    assert all(re.fullmatch(allowed, library) for library in needed), needed


@pytest.mark.skipif(native.failure is not None, reason=f"no native library: {native.failure}")
def test_messages_of_the_library_say_what_came():
    value, points, weights = (
        torch.rand(1, 6, 1, 4),
        torch.rand(1, 2, 1, 3, 2),
        torch.rand(1, 2, 1, 3),
    )

    def call(grad_output=None, mask=(True, True, True, False), index=None, num_points=3):
        arguments = (value, [2, 3], points, weights, None, index, False, [num_points], "linear",
                     "zeros", "normalized", None)  # fmt: skip
        if grad_output is None:
            return torch.ops.saccade.deformable_attention(*arguments)
        return torch.ops.saccade.deformable_attention_backward(grad_output, *arguments, list(mask))

    for arguments, message in (
        (
            (torch.rand(1, 2, 4).double(),),
            "grad_output: expected the dtype of value, Float, got Double",
        ),
        ((torch.rand(1, 2, 4), (True,) * 4), "output_mask: expected False .*, got True"),
        ((torch.rand(1, 2, 4), (True,)), "output_mask: expected 4 entries, got 1"),
        ((None, (), [0, 0, 0]), "reference_index: expected None .*, got a list"),
        ((None, (), None, 0), "num_points: expected 1 to 2147483647 for each level, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
