"""Writes the tables of the README and of docs/performance.md from the committed results.

`python -m benchmarks.tables` prints them, with `--write` it puts them between the marks
`<!-- figures: NAME -->` and `<!-- end of figures -->` of the pages. A test holds the two equal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.keeping import RESULTS
from saccade.benchmark.operator import Figure, Setting
from saccade.benchmark.report import Results, milliseconds, read, times

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/performance.md", "docs/gpu.md", "docs/integrations.md")
MARKED = re.compile(
    r"(<!-- figures: (?P<name>\w+) -->\n).*?(<!-- end of figures -->)", flags=re.DOTALL
)

# What the README shows, and what a reader calls it.
README_CASES = {
    "detr-encoder": "Deformable DETR encoder, 22,223 queries",
    "detr-decoder": "its decoder, 300 queries",
    "mask2former-encoder": "Mask2Former pixel decoder",
    "rtdetr-decoder": "RT-DETR decoder",
    "dfine-decoder": "D-FINE decoder",
    "rfdetr-large": "RF-DETR L",
    "bevformer-tsa": "BEVFormer temporal",
    "plain-single-map": "plain form, one shared map",
}
DIRECTIONS = ("forward", "forward + backward")
README_PEERS = ("grid_sample", "torch-ms-deform-attn")


def readme(results: Results) -> list[str]:
    """float32, model-like locations, all threads, warm: the ratios, and the times of the first peer."""
    threads = max(figure.setting.threads for figure in results.figures)
    by_key = _by_setting(results.figures)
    lines = [
        f"{_machine(results)}; {threads} threads, float32.\n",
        _row(["", *(f"{way}: {peer}" for way in DIRECTIONS for peer in README_PEERS)]),
        _row(["---"] * 5),
    ]
    for case, name in README_CASES.items():
        cells = [name]
        for way in DIRECTIONS:
            peers = by_key.get(Setting(case, way, "model-like", "float32", threads, "warm"), {})
            for index, peer in enumerate(README_PEERS):
                cells.append(_cell(peers, peer, with_times=index == 0))
        lines.append(_row(cells))
    return lines


def every(results: Results) -> list[str]:
    """A table for each kind of figure: Saccade's time, then the ratio to each peer."""
    by_key = _by_setting(results.figures)
    peers = [peer for peer in dict.fromkeys(figure.peer for figure in results.figures)]
    lines = [f"`{results.command}`, {results.date}: {_machine(results)}.\n"]
    kinds = dict.fromkeys(setting[1:] for setting in by_key)
    for kind in sorted(kinds, key=lambda kind: list(kinds).index((DIRECTIONS[0], *kind[1:]))):
        way, locations, dtype, threads, caches = kind
        here = [peer for peer in peers if any(s[1:] == kind and peer in by_key[s] for s in by_key)]
        lines += [
            f"**{way}**, {dtype}, {locations} locations, {threads} "
            f"thread{'' if threads == 1 else 's'}{'' if caches == 'warm' else ', single calls'}\n",
            _row(["workload", "Saccade", *(name for name in here if name != "saccade")]),
            _row(["---"] * (1 + len(here))),
        ]
        for setting, figures in by_key.items():
            if setting[1:] == kind:
                cells = [_cell(figures, peer) for peer in here if peer != "saccade"]
                own = milliseconds(figures["saccade"].milliseconds)
                lines.append(_row([setting.workload, own, *cells]))
        lines.append("")
    reasons = dict.fromkeys((left.peer, left.reason) for left in results.left_out)
    return lines + [f"- {peer}: {reason}." for peer, reason in reasons]


def models(found: dict) -> list[str]:
    """Whole models, eager against patched."""
    lines = [
        f"`{found['command']}`, {found['date']}: {_versions(found['machine'])}; "
        f"{found['threads']} threads.\n",
        _row(["model", "forward", "", "attention before", "after"]),
        _row(["---"] * 5),
    ]
    for row in found["models"]:
        name = f"{row['model']}, {row['input']}"
        if row["reason"]:
            lines.append(_row([name, f"– {row['reason']}", "", "", ""]))
            continue
        spent = f"{row['patched_ms'] / 1e3:.3g} against {row['eager_ms'] / 1e3:.3g} s"
        shares = [f"{row[key]:.0%}" for key in ("eager_share", "patched_share")]
        lines.append(_row([name, f"**{times(row['ratio'])}**", spent, *shares]))
    return lines


def drop_in(found: dict, packages: dict) -> list[str]:
    """Whole models of every package: how many submodules were replaced, and what that brings."""
    lines = [
        f"`{found['command']}` and `{packages['command']}`, {found['date']}: "
        f"{_versions(found['machine'])}; {found['threads']} threads.\n",
        _row(["from", "model", "replaced", "forward"]),
        _row(["---"] * 4),
    ]
    for home, rows in (("transformers", found["models"]), ("", packages["models"])):
        for row in rows:
            cells = [home or row["model"], row["input"]]
            if row["reason"]:
                lines.append(_row([*cells, "–", row["reason"]]))
                continue
            spent = f"{row['patched_ms'] / 1e3:.3g} against {row['eager_ms'] / 1e3:.3g} s"
            replaced = f"{row['attention_modules']} submodules"
            lines.append(_row([*cells, replaced, f"**{times(row['ratio'])}** {spent}"]))
    return lines


def fused(found: dict) -> list[str]:
    """Fused against unfused, ragged against padded: a row for each variant, both directions."""
    threads = max(row["threads"] for row in found["figures"])
    lines = [
        f"`{found['command']}`, {found['date']}: {_versions(found['machine'])}; {threads} threads, "
        "float32.\n",
        _row(["workload", "variant", *DIRECTIONS]),
        _row(["---"] * 4),
    ]
    by_key = {(row["workload"], row["variant"], row["direction"]): row for row in found["figures"]}
    for case, variant in dict.fromkeys(key[:2] for key in by_key):
        cells = []
        for way in DIRECTIONS:
            row = by_key[case, variant, way]
            cells.append(f"{milliseconds(row['milliseconds'])} ({times(row['ratio'])})")
        lines.append(_row([case, variant, *cells]))
    notes = dict.fromkeys(
        f"- {row['variant']}, {row['direction']}: {row['note']}."
        for row in found["figures"]
        if row["note"]
    )
    return [*lines, "", *notes]


def floors(found: dict, results: Results | None) -> list[str]:
    """The parts that detr-encoder cannot do without, their sums, and beside them what was measured."""
    columns = [key for key in found if key.startswith("threads ")]
    lines = [
        f"`{found['command']}`, {found['date']}; milliseconds, float32, detr-encoder.\n",
        _row(["", *(key.replace("threads ", "threads: ") for key in columns)]),
        _row(["---"] * (1 + len(columns))),
    ]
    for kind in ("parts", "floors"):
        for name in found[columns[0]][kind]:
            title = name.replace("_", " ") if kind == "parts" else f"**floor, {name}**"
            lines.append(_row([title, *(f"{found[key][kind][name]:.3g}" for key in columns)]))
    by_key = _by_setting(results.figures) if results else {}
    for way in DIRECTIONS:
        cells = []
        for key in columns:
            setting = Setting(
                "detr-encoder", way, "model-like", "float32", int(key.split()[1]), "warm"
            )
            figures = by_key.get(setting, {})
            cells.append(
                f"{figures['saccade'].milliseconds:.3g} (grid_sample: "
                f"{figures['grid_sample'].milliseconds:.4g})"
                if "grid_sample" in figures
                else "–"
            )
        lines.append(_row([f"measured, {way}", *cells]))
    return lines


def compiled(found: dict) -> list[str]:
    """Warp instructions a sample and registers of the GPU kernels of the forward, as compiled."""
    rows = [row for row in found["readings"] if row["value_gradient"] == "no"]
    return [*_about_compiled(found, "a sample"), *_compiled_rows(rows)]


def compiled_backward(found: dict) -> list[str]:
    """The same of the backward: the kernel of the points, in both modes, and those that sum in order."""
    lines = _about_compiled(found, "a sample, or a step of a piece or a row")
    ways = {"add": "atomic additions", "sort": "in order"}
    rows = [row for row in found["readings"] if row["value_gradient"] != "no"]
    summing = ("sum_pieces", "sum_rows")
    for way, title in ways.items():
        of_way = [row for row in rows if row["value_gradient"] == way]
        lines.append(f"\n**{title}**\n")
        lines += _compiled_rows([row for row in of_way if row["kernel"] not in summing])
    for kernel in summing:
        of_kernel = [row for row in rows if row["kernel"] == kernel and row["points"] == "given"]
        cells = [
            f"{row['case']} {row['dtype']} {row['per_sample']:.1f}, {row['registers']}, {row['spills']}"
            for row in of_kernel
            if row["case"] in ("detr-encoder", "medical-3d")
        ]
        lines.append(f"\n`{kernel}`: {'; '.join(cells)}.")
    return lines


def _about_compiled(found: dict, of: str) -> list[str]:
    return [
        f"`{found['command']}`, {found['target']}, Triton {found['triton']}. Warp instructions {of}, "
        "registers of a thread, spills.\n"
    ]


def _compiled_rows(readings: list[dict]) -> list[str]:
    kinds = {"given": "operator", "points": "fused"}
    heads = [f"{kinds[kind]}, {dtype}" for kind in kinds for dtype in ("fp32", "bf16")]
    lines = [_row(["workload", "kernel", *heads]), _row(["---"] * 6)]
    rows = {(row["case"], row["points"], row["dtype"]): row for row in readings}
    for case in dict.fromkeys(case for case, _, _ in rows):
        of_case = [rows[case, kind, dtype] for kind in kinds for dtype in ("fp32", "bf16")]
        cells = [f"{row['per_sample']:.1f}, {row['registers']}, {row['spills']}" for row in of_case]
        kernels = " / ".join(dict.fromkeys(f"`{row['kernel']}`" for row in of_case))
        lines.append(_row([case, kernels, *cells]))
    return lines


def _by_setting(figures: Iterable[Figure]) -> dict[Setting, dict[str, Figure]]:
    found: dict[Setting, dict[str, Figure]] = {}
    for figure in figures:
        found.setdefault(figure.setting, {})[figure.peer] = figure
    return found


def _cell(figures: dict[str, Figure], peer: str, *, with_times: bool = False) -> str:
    if peer not in figures:
        return "–"
    figure = figures[peer]
    ratio = times(figure.ratio)
    if not with_times:
        return ratio
    own = milliseconds(figures["saccade"].milliseconds).removesuffix(" ms")
    return f"**{ratio}** {own} against {milliseconds(figure.milliseconds)}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(results: Results) -> str:
    return _versions(results.machine)


def _versions(machine: dict[str, str]) -> str:
    return ", ".join(
        value if key in ("processor", "backend", "system") else f"{key} {value}"
        for key, value in machine.items()
    )


# The name of a mark, the file its figures are in, and what makes the table of it.
TABLES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "readme": ("cpu.json", lambda path: readme(read(path))),
    "cpu": ("cpu.json", lambda path: every(read(path))),
    "family": ("family.json", lambda path: every(read(path))),
    "fused": ("fused.json", lambda path: fused(json.loads(path.read_text()))),
    "compiled": ("gpu_compile.json", lambda path: compiled(json.loads(path.read_text()))),
    "compiled_backward": (
        "gpu_compile.json",
        lambda path: compiled_backward(json.loads(path.read_text())),
    ),
    "models": ("models.json", lambda path: models(json.loads(path.read_text()))),
    "drop_in": (
        "packages.json",
        lambda path: drop_in(
            json.loads(path.with_name("models.json").read_text()), json.loads(path.read_text())
        ),
    ),
    "floors": (
        "floors.json",
        lambda path: floors(
            json.loads(path.read_text()),
            read(path.with_name("cpu.json")) if path.with_name("cpu.json").exists() else None,
        ),
    ),
}


def filled(page: str, folder: Path = RESULTS) -> str:
    """The text of a page with the tables of the results in `folder`; one without a file stays."""

    def fill(found: re.Match[str]) -> str:
        file, make = TABLES[found["name"]]
        if not (folder / file).exists():
            return found[0]
        return found[1] + "\n".join(make(folder / file)) + "\n" + found[3]

    return MARKED.sub(fill, page)


def main() -> None:
    """Prints the tables, or writes them into the pages."""
    for name in PAGES if "--write" in sys.argv[1:] else ():
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written: {name}")
    if "--write" not in sys.argv[1:]:
        for file, make in TABLES.values():
            if (RESULTS / file).exists():
                print("\n".join(make(RESULTS / file)), "\n")


if __name__ == "__main__":
    main()
