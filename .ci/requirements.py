"""Prints what an extra of pyproject.toml requires, the extras it names followed, one a line.

`pip install .[dev]` would do the same and build the package, which needs its build tools first.
"""

import re
import sys
from pathlib import Path


def extras(text: str) -> dict[str, list[str]]:
    """The table [project.optional-dependencies] (Python 3.10 has no TOML reader of its own)."""
    table = text.split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0]
    found = re.findall(r"^(\w+) = \[(.*?)\]$", table, flags=re.MULTILINE | re.DOTALL)
    return {name: re.findall(r'"([^"]+)"', listed) for name, listed in found}


def requirements(name: str, known: dict[str, list[str]]) -> list[str]:
    """What the extra `name` requires, without the package itself."""
    found: list[str] = []
    for requirement in known[name]:
        inner = re.fullmatch(r"saccade\[(\w+)\]", requirement)
        found += requirements(inner[1], known) if inner else [requirement]
    return found


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    print("\n".join(requirements(sys.argv[1], extras((root / "pyproject.toml").read_text()))))
