"""The glossary holds: words and phrases that were replaced do not come back.

`docs/glossary.md` has the words that are wanted. A rule below has a pattern, what to write in its place, and
the folders that it holds for. Names are matched whole, in code alone; phrases in comments, strings and pages.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("src", "csrc", "tests", "benchmarks")
PRODUCT = ("src", "csrc")
TRITON = ("src/saccade/backends/triton",)
PAGES = ("docs", "README.md", "CONTRIBUTING.md", "examples")
EVERYWHERE = (*CODE, *PAGES)
SUFFIXES = {".py", ".cpp", ".h", ".inl", ".md"}


class Rule(NamedTuple):
    pattern: str
    instead: str
    folders: tuple[str, ...]


NAMES = [
    Rule(r"understand_?\w*|understood", "parse_call, parse_…", CODE),
    Rule(r"(MOST|LEAST)_\w+", "MAX_…, MIN_…", CODE),
    Rule(r"(most|least)_(?!common)\w+", "max_…, min_…", CODE),
    Rule("attend_(queries|points)", "forward_…_kernel", EVERYWHERE),
    Rule(r"differentiate_\w+", "backward_…_kernel", EVERYWHERE),
    Rule("before_softmax", "grad_attention_weights", CODE),
    Rule("points_reversed", "points_backward, rule_backward", CODE),
    Rule(r"_?remember(ed)?(_\w+)?", "functools.lru_cache, or …_cache", CODE),
    Rule("key_of|as_ints|in_layout", "cache_key, to_ints, flatten_levels", CODE),
    Rule("FusedCall|FUSED|PLAIN", "Call: there is one operator", PRODUCT),
    Rule(r"of_\w+", "what it holds: elements_per_query, level_size", CODE),
    Rule(r"(?!state_dict_|(?:all|any|none|one)_)\w+_of", "a verb: get_…, find_…, make_…", CODE),
    Rule("found", "what it holds: size, module, shape; at worst `result`", PRODUCT),
    Rule("place|places", "offset, index", PRODUCT),
    Rule("numbers", "elements, channels, values", ("csrc", *TRITON)),
    Rule("wanted|told|said|judged?", "what it is: request, message, verdict", PRODUCT),
    Rule("given", "what it holds", PRODUCT),
    Rule("Claim|Finding|Attempt|Wanted|LeftOut", "Signature, CheckResult, Trial, Request, Skipped", CODE),
    Rule(r"\w*([Pp]eer|PEER|[Rr]ival|RIVAL)\w*", "baseline", ("src", "benchmarks")),
    Rule("meta_path", "a documented function, not a hook of the import system", ("src/saccade/ops",)),
    Rule("contract|keeping|rebinding|looked_drawing|argument_key", "see docs/glossary.md", CODE),
    Rule("Problem|problem", "Call, Plan", ("csrc",)),
    Rule(r"looks?|Look|num_looks|kLook\w*", "(query, head) pair", ("csrc", *TRITON)),
    Rule(r"Given\w*", "PointReader, inputs", ("csrc",)),
    Rule("Units?|units?", "Tile", ("csrc",)),
    Rule("heads_together|TOGETHER", "heads_per_tile", ("csrc", *TRITON)),
    Rule("own_grad_rows", "accumulates_per_head", ("csrc",)),
    Rule("in_place", "reads_in_place", ("csrc",)),
    Rule("items?", "batch_index", ("csrc",)),
    Rule("room|kRoom", "capacity", ("csrc",)),
    Rule("WIDE|PAIRS|MORE|NOTHING|PARTS|KIND", "USE_INT64_OFFSETS, HAS_REFERENCE, …", TRITON),
]  # fmt: skip

THINGS = (
    "level|call|point|row|head|query|thread|map|sample|picture|image|batch|pair|turn|look|case|block|"
    "cell|line|stage|step|tile|program|axis|channel|element"
)
COUNTED = (
    "points?|one|once|numbers?|rows?|queries|locations?|weights?|instructions?|barriers?|tensors?|shapes?|"
    "sizes?|tables?|kernels?|kinds?|keys?|bytes|ms|µs|milliseconds|seconds|GridSample|entr(?:y|ies)|times|objects?|scenes?"
)

PHRASES = [
    Rule(r"(?<![Tt]here\s)is no (?!longer\b|more\b|less\b|one\b|other\b)", "is not a", EVERYWHERE),
    Rule(r"if it is none\b", "the error, as a sentence", EVERYWHERE),
    Rule(r"who(ever)? asks\b", "the caller", EVERYWHERE),
    Rule(r"(brings?|brought|bringing)\b[^.;:,]{0,40}? along\b", "imports, needs, has", EVERYWHERE),
    Rule(r"(is|are|was|were|be|been) had\b", "is available, is", EVERYWHERE),
    Rule(r"no business of\b", "a plain sentence", EVERYWHERE),
    Rule(r'"""Of\b', "a sentence with a subject", CODE),
    # "Which kernel a call gets" is another thing than "one kernel a call".
    Rule(rf"({COUNTED}) an? ({THINGS})\b(?!\s+(?:is|has|\w+s)\b)", "per", EVERYWHERE),
    Rule(
        r"(peer|rival)s?\b",
        "baseline",
        ("src", "benchmarks", "docs", "README.md", "CONTRIBUTING.md"),
    ),
]

FILES = {
    "arguments.py": "call.py",
    "argument_key.py": "call.py",
    "contract.py": "schema.py",
    "entries.py": "state_dict_parts.py",
    "keeping.py": "results.py",
    "looked_drawing.py": "draw_sampling.py",
    "looking.py": "sampling_record.py",
    "points_reversed.py": "rule_backward.py",
    "quiet.py": "exporter_logging.py",
    "rebinding.py": "rebind_globals.py",
}


class Piece(NamedTuple):
    """An identifier, or a piece of prose: a comment of some lines, a string, a page."""

    line: int
    text: str
    is_name: bool


def python_pieces(text: str) -> Iterator[Piece]:
    prose = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    comment: list[str] = []
    last_line = first_line = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            if comment and line != last_line + 1:
                yield Piece(first_line, "\n".join(comment), False)
                comment = []
            first_line = first_line if comment else line
            comment.append(token.string.lstrip("# "))
            last_line = line
        elif token.type == tokenize.NAME:
            yield Piece(line, token.string, True)
        elif token.type in prose:
            yield Piece(line, token.string, False)
    if comment:
        yield Piece(first_line, "\n".join(comment), False)


CPP = re.compile(
    r'(?P<comment>(?://[^\n]*\n\s*)+|/\*.*?\*/)|(?P<string>"(?:\\.|[^"\\\n])*")|(?P<name>[A-Za-z_]\w*)',
    flags=re.DOTALL,
)


def cpp_pieces(text: str) -> Iterator[Piece]:
    for match in CPP.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        piece = re.sub("//+ ?", "", match[0]) if match["comment"] else match[0]
        yield Piece(line, piece, match["name"] is not None)


def page_pieces(text: str) -> Iterator[Piece]:
    # Tables of measurements come from the results; their names are those of the day they were taken.
    text = re.sub(r"<!-- (figures: \w+|matrix) -->.*?<!-- end", blank_lines, text, flags=re.DOTALL)
    yield Piece(1, text, False)
    for match in re.finditer(r"\w*_\w*", text):
        yield Piece(text.count("\n", 0, match.start()) + 1, match[0], True)


def blank_lines(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


READERS = {".py": python_pieces, ".md": page_pieces}


@cache
def files() -> tuple[str, ...]:
    paths = [ROOT / name for name in PAGES if (ROOT / name).is_file()]
    for folder in {*CODE, *PAGES}:
        paths += (path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return tuple(sorted(names - {"tests/test_glossary.py", "docs/glossary.md"}))


@cache
def one_pattern(rules: tuple[Rule, ...]) -> re.Pattern[str]:
    """A group for each rule; inner groups must not count."""
    patterns = (
        re.sub(r"(?<!\\)\((?!\?)", "(?:", rule.pattern.replace(" ", r"\s+")) for rule in rules
    )
    return re.compile("|".join(rf"(?<!\w)({pattern})" for pattern in patterns))


def retired(name: str) -> Iterator[str]:
    names = tuple(rule for rule in NAMES if name.startswith(rule.folders))
    phrases = tuple(rule for rule in PHRASES if name.startswith(rule.folders))
    text = (ROOT / name).read_text(encoding="utf-8")
    for piece in READERS.get(Path(name).suffix, cpp_pieces)(text):
        rules = names if piece.is_name else phrases
        pattern = one_pattern(rules)
        # Without indentation, so that a phrase may go over the end of a line.
        prose = re.sub(r"\n[ \t]+", "\n", piece.text)
        matches = [pattern.fullmatch(prose)] if piece.is_name else pattern.finditer(prose)
        for match in filter(None, matches if rules else ()):
            line = piece.line + prose.count("\n", 0, match.start())
            words = " ".join(match[0].split())
            yield f"{name}:{line}: {words!r}; write instead: {rules[match.lastindex - 1].instead}"


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*CODE, *PAGES])
def test_retired_words_stay_away(folder: str) -> None:
    names = [name for name in files() if name.startswith(folder)]
    assert names
    lines = [line for name in names for line in retired(name)]
    assert not lines, "words that docs/glossary.md replaced:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("rules", "retired_text"),
    [
        (NAMES, "understand_shapes"),
        (NAMES, "MOST_POINTS"),
        (NAMES, "found"),
        (NAMES, "of_query"),
        (NAMES, "size_of"),
        (NAMES, "before_softmax"),
        (PHRASES, "A missing library is no error."),
        (PHRASES, "the caller, or whoever asks"),
        (PHRASES, "It brings Triton along."),
        (PHRASES, "4 points a level"),
        (PHRASES, '"""Of a program."""'),
    ],
)
def test_each_kind_of_rule_finds_its_words(rules: list[Rule], retired_text: str) -> None:
    pattern = one_pattern(tuple(rules))
    assert pattern.fullmatch(retired_text) if rules is NAMES else pattern.search(retired_text)


def test_retired_files_stay_away() -> None:
    lines = [
        f"{name}: expected {FILES[Path(name).name]}"
        for name in files()
        if name.startswith(CODE) and Path(name).name in FILES
    ]
    assert not lines, "\n".join(lines)
