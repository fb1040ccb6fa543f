"""How many instructions the kernels take: a slip in speed shows without a clock.

valgrind counts two small calls on the AVX2 kernels (it runs no AVX-512), forward and backward, one
call each and nothing around it; the same numbers every time on any x86-64 machine, loaded or not.
Instructions are not time: caches and AVX-512 are for the benchmark.

After a change of the kernels that is an improvement, record what this prints, from the repository's
root:

    .venv/bin/python tests/test_instruction_counts.py
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from test_native_library import build_program, check, tool

# Counted with g++ of this major version. Other compilers differ (clang 14 takes 0.8 to 0.9 of the
# instructions) and get a wider margin.
RECORDED_WITH = "12"
RECORDED = {
    ("encoder", "forward"): 4_229_578,
    ("encoder", "backward"): 14_794_055,
    ("decoder", "forward"): 529_034,
    ("decoder", "backward"): 2_090_717,
}
MARGIN, MARGIN_OF_ANOTHER_COMPILER = 1.10, 1.30
# Below this part of what is recorded the bound would not notice the loss of an improvement.
STALE = 0.7


@functools.lru_cache
def build_counter() -> tuple[Path, str]:
    """The counting program, built as the library is, and the major version of its compiler."""
    tool("valgrind")
    compiler = tool("g++")
    if "x86_64" not in check(compiler, "-dumpmachine"):
        pytest.skip("x86-64 only: the counts are those of the AVX2 kernels")
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    version = check(compiler, "-dumpversion").strip().partition(".")[0]
    return build_program("count_instructions"), version


def count(case: str, direction: str) -> int:
    printed = check(
        tool("valgrind"), "--tool=callgrind", "--callgrind-out-file=/dev/null", "--log-fd=1",
        "--toggle-collect=counted", build_counter()[0], "avx2", case, direction,
    )  # fmt: skip
    match = re.search(r"Collected : (\d+)", printed)
    assert match, printed
    return int(match[1])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "direction"), RECORDED, ids=["-".join(name) for name in RECORDED])
def test_instructions_of_a_small_call(case, direction):
    counted, recorded = count(case, direction), RECORDED[case, direction]
    is_recorded_compiler = build_counter()[1] == RECORDED_WITH
    margin = MARGIN if is_recorded_compiler else MARGIN_OF_ANOTHER_COMPILER
    again = "to record again: python tests/test_instruction_counts.py"
    assert counted <= margin * recorded, (
        f"{counted} instructions, {counted / recorded:.2f} of the {recorded} recorded: at most "
        f"{margin} allowed. If the kernels became faster all the same, {again}"
    )
    assert counted >= STALE * recorded, (
        f"{counted} instructions, {counted / recorded:.2f} of the {recorded} recorded: the bound "
        f"has become too loose to hold the improvement; {again}"
    )


if __name__ == "__main__":
    print(f'RECORDED_WITH = "{build_counter()[1]}"\nRECORDED = {{')
    for name in RECORDED:
        print(f'    ("{name[0]}", "{name[1]}"): {count(*name):_},')
    print("}")
