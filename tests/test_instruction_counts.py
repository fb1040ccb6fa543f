"""How many instructions the kernels take: a slip in speed shows without a clock.

valgrind counts two small calls on the AVX2 kernels (it runs no AVX-512), forward and backward, one
call each and nothing around it; the same numbers every time on any x86-64 machine, loaded or not.
Instructions are not time: caches and AVX-512 are for the benchmark.

After the kernels changed for good, record again what this prints, from the repository's root:

    .venv/bin/python tests/test_instruction_counts.py
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from test_native_library import build, check, tool

# Counted with g++ of this major version. Another compiler counts otherwise (clang 14: 0.8 to 0.9
# of it), so it gets a wider margin.
RECORDED_WITH = "12"
RECORDED = {
    ("encoder", "forward"): 4_229_578,
    ("encoder", "backward"): 14_794_055,
    ("decoder", "forward"): 529_034,
    ("decoder", "backward"): 2_090_717,
}
MARGIN, MARGIN_OF_ANOTHER_COMPILER = 1.10, 1.30
# Fewer than this part of what is recorded: an improvement, whose loss the bound would not notice.
STALE = 0.7


def build_program(directory: Path) -> tuple[Path, str]:
    """The counting program, built as the library is, and the major version of its compiler."""
    tool("valgrind")
    compiler = tool("g++")
    if "x86_64" not in check(compiler, "-dumpmachine"):
        pytest.skip("x86-64 only: the counts are those of the AVX2 kernels")
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    program = build(compiler, directory / "count_instructions", "-O3", "-fPIC")
    return program, check(compiler, "-dumpversion").strip().partition(".")[0]


def count(program: Path, case: str, direction: str) -> int:
    done = check(
        tool("valgrind"), "--tool=callgrind", "--callgrind-out-file=/dev/null", "--log-fd=1",
        "--toggle-collect=counted", program, "avx2", case, direction,
    )  # fmt: skip
    found = re.search(r"Collected : (\d+)", done)
    assert found, done
    return int(found[1])


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[Path, str]:
    return build_program(tmp_path_factory.mktemp("count"))


@pytest.mark.parametrize(("case", "direction"), RECORDED, ids=["-".join(name) for name in RECORDED])
def test_instructions_of_a_small_call(program, case, direction):
    path, version = program
    found, recorded = count(path, case, direction), RECORDED[case, direction]
    margin = MARGIN if version == RECORDED_WITH else MARGIN_OF_ANOTHER_COMPILER
    again = "to record again: python tests/test_instruction_counts.py"
    assert found <= margin * recorded, (
        f"{found} instructions, {found / recorded:.2f} of the {recorded} recorded: at most "
        f"{margin} allowed. If the kernels became faster all the same, {again}"
    )
    assert found >= STALE * recorded, (
        f"{found} instructions, {found / recorded:.2f} of the {recorded} recorded: the bound has "
        f"become too loose to hold the improvement; {again}"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        built, compiler_version = build_program(Path(directory))
        print(f'RECORDED_WITH = "{compiler_version}"\nRECORDED = {{')
        for name in RECORDED:
            print(f'    ("{name[0]}", "{name[1]}"): {count(built, *name):_},')
        print("}")
