"""The native code itself: sanitizers, other processors under emulation, what instructions it holds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from saccade.ops import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "csrc/problem.cpp",
    *sorted((ROOT / "csrc").glob("dispatch.cpp")),
    *sorted((ROOT / "csrc").glob("isa_*.cpp")),
]


def tool(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"{' or '.join(names)} is not installed")


def build(compiler: str, target: Path, *flags: str) -> Path:
    """Builds the program of tests/native that `target` is named after, with the kernels."""
    command = [compiler, "-std=c++17", "-ffp-contract=off", "-w", "-I", ROOT / "csrc", *flags]
    program = ROOT / f"tests/native/{target.name}.cpp"
    done = subprocess.run(
        [*command, program, *SOURCES, "-o", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def check(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_read_or_write_out_of_bounds(tmp_path):
    compiler = tool("g++", "clang++")
    sanitize = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(compiler, tmp_path / "check_kernels", *sanitize)
    printed = check(program, "150")
    for isa in native.available_isas():
        assert f"{isa} float32" in printed


def test_neon_under_emulation(tmp_path):
    compiler = tool("aarch64-linux-gnu-g++")
    emulator = tool("qemu-aarch64", "qemu-aarch64-static")
    program = build(compiler, tmp_path / "check_kernels", "-O2", "-static")
    printed = check(emulator, program, "60")
    assert "neon float32" in printed
    assert "neon float64" in printed


def test_another_compiler_agrees(tmp_path):
    compiler = tool("clang++")
    assert "float64" in check(build(compiler, tmp_path / "check_kernels", "-O2"), "100")


def test_vector_instructions_stay_in_their_kernels():
    """Code for an instruction set that a processor may lack lies only in the kernels dispatched to."""
    objdump = tool("objdump")
    compiler = tool("g++")
    # Each object compiled as the library is, so that symbols are still there to be told apart.
    for isa, registers in (("scalar", r"%[yz]mm"), ("avx2", r"%zmm|%k[1-7]"), ("avx512", None)):
        listing = disassemble(objdump, compiler, ROOT / f"csrc/isa_{isa}.cpp")
        for symbol, code in listing:
            if f"saccade::{isa}::" in symbol:
                if registers:
                    assert not re.search(registers, code), f"{symbol} of isa_{isa} uses {registers}"
            else:
                assert not re.search(r"%[yz]mm|%k[1-7]", code), f"{symbol} of isa_{isa} is not ours"
    for source in ("problem", "dispatch"):
        for symbol, code in disassemble(objdump, compiler, ROOT / f"csrc/{source}.cpp"):
            assert not re.search(r"%[yz]mm|%k[1-7]", code), f"{symbol} of {source}"


def disassemble(objdump: str, compiler: str, source: Path) -> list[tuple[str, str]]:
    import tempfile

    if "x86_64" not in check(compiler, "-dumpmachine"):
        pytest.skip("x86-64 only")
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        check(
            compiler, "-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-w",
            "-I", ROOT / "csrc", "-c", source, "-o", file.name,
        )  # fmt: skip
        text = check(objdump, "-d", "-C", "--no-show-raw-insn", file.name)
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_the_library_names_no_path_and_needs_only_torch():
    if native.failure:
        pytest.skip(f"no native library: {native.failure}")
    dynamic = check(tool("readelf"), "-d", native.LIBRARY)
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    allowed = r"lib(torch|torch_cpu|stdc\+\+|gcc_s|m|c|c10)\.so.*|ld-linux.*"
    assert all(re.fullmatch(allowed, library) for library in needed), needed
