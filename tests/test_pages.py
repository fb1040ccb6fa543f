"""The pages: every link leads somewhere, every page can be reached, the README can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "examples")
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

CODE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
FIGURES = re.compile(r"<!-- (?:figures|matrix).*?<!-- end of [^>]*>", flags=re.DOTALL)
MAX_WORDS = 35


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file that each link of a page leads to, and the heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"\w+:", target):
            path, _, heading = target.partition("#")
            yield (page.parent / path).resolve() if path else page, heading


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target, heading in links(ROOT / name):
        assert target.exists(), f"{name}: there is no {target}"
        if heading and target.suffix == ".md":
            assert heading in headings(target), f"{name}: {target.name} has no heading #{heading}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            todo += [target for target, _ in links(page)]
    assert not [name for name in NAMES if ROOT / name not in reached]


def sentences(text: str) -> Iterator[str]:
    for block in re.split(
        r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\|", FIGURES.sub("", CODE.sub("", text))
    ):
        block = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block)
        block = re.sub(r"`[^`]*`", "CODE", " ".join(block.split()))
        yield from re.split(r"(?<=[.!?])[)*_\"]*\s+(?=[^a-z])", block)


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_short(name: str) -> None:
    for sentence in sentences((ROOT / name).read_text(encoding="utf-8")):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        assert len(words) <= MAX_WORDS, f"{name}: {len(words)} words: {sentence}"


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_headers(name: str) -> None:
    for line in re.findall(r"^(\|.*)\n\|[\s:|-]+$", (ROOT / name).read_text(), flags=re.MULTILINE):
        assert line.strip("| "), f"{name}: a table has an empty header"
