"""The benchmark: workloads of the right sizes, peers that agree, a clock that takes turns."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from saccade.__main__ import main
from saccade.benchmark import report
from saccade.benchmark.operator import (
    Figure,
    LeftOut,
    compare,
    grid_sample_call,
    saccade_call,
)
from saccade.benchmark.peers import GridSample, Peer, Saccade, all_peers, default_peers
from saccade.benchmark.plan import ENCODERS, FAMILY, committed_plan
from saccade.benchmark.timing import SLOW_ROUNDS, alternate, machine
from saccade.benchmark.workloads import WORKLOADS, draw

PEERS = all_peers()
BOTH = [PEERS["saccade"], PEERS["grid_sample"]]


def shrink(workload):
    """The same kind of call on a small map."""
    shapes = [tuple(max(1, size // 10) for size in shape) for shape in workload.shapes]
    queries = None if workload.num_queries is None else 20
    return workload._replace(shapes=shapes, num_queries=queries)


@pytest.fixture
def small(monkeypatch):
    """The registry with small maps, for the commands."""
    for name, workload in list(WORKLOADS.items()):
        monkeypatch.setitem(WORKLOADS, name, shrink(workload))


def run(*arguments):
    """The exit code of the command."""
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code


def test_sizes_are_those_of_the_detectors():
    assert WORKLOADS["detr-encoder"].num_positions == WORKLOADS["detr-encoder"].queries == 22223
    assert WORKLOADS["dino5-encoder"].num_positions == 89023
    assert WORKLOADS["bevformer-sca"].num_positions == 30825
    assert WORKLOADS["dfine-decoder"].points == [3, 6, 3]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("uniform", [False, True])
def test_peers_agree_on_every_workload(name, uniform):
    workload = shrink(WORKLOADS[name])
    inputs = draw(workload, dtype=torch.float32, uniform=uniform)
    found = saccade_call(workload)(*inputs[:3])
    assert found.shape == inputs.grad_output.shape
    torch.testing.assert_close(found, grid_sample_call(workload)(*inputs[:3]), rtol=1e-3, atol=1e-4)


PAIRS = [
    (name, case)
    for name in default_peers()
    for case in ("detr-decoder", "dfine-decoder", "plain-single-map")
    if name not in ("saccade", "torch.compile")
]


@pytest.mark.parametrize(
    ("name", "case"),
    # Compiling takes half a minute: one case.
    [*PAIRS, pytest.param("torch.compile", "rfdetr-nano", marks=pytest.mark.slow)],
)
def test_every_peer_computes_the_same_or_says_why_not(name, case):
    peer = PEERS[name]
    if reason := peer.missing():
        pytest.skip(reason)
    if name == "torch.compile" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    workload = shrink(WORKLOADS[case])
    for backward in (False,) if name == "torch.compile" else (False, True):
        found = list(compare(workload, [PEERS["saccade"], peer], backward=backward, seconds=0))
        refusal = peer.refusal(workload, backward=backward)
        other = next(row for row in found if row.peer == name)
        if refusal:
            assert other == LeftOut(found[0].setting, name, refusal)
        else:
            assert isinstance(other, Figure)
            assert other.ratio > 0


def test_peers_without_16_bit_values_compute_in_float32():
    workload = shrink(WORKLOADS["detr-decoder"])
    figures = list(compare(workload, BOTH, dtype=torch.bfloat16, backward=True, seconds=0))
    assert [figure.computes_in for figure in figures] == ["bfloat16", "float32"]
    assert {figure.setting.dtype for figure in figures} == {"bfloat16"}


def test_what_a_peer_cannot_do_is_shown_with_the_reason():
    lists, one = shrink(WORKLOADS["dfine-decoder"]), shrink(WORKLOADS["detr-decoder"])
    assert "one number of points" in PEERS["torch-ms-deform-attn"].refusal(lists, backward=False)
    assert PEERS["torch-ms-deform-attn"].refusal(one, backward=True) is None
    assert "backward" in PEERS["onnxruntime"].refusal(one, backward=True)

    class Absent(GridSample):
        name = "absent"
        modules = ("no_such_module",)

    class Broken(Peer):
        name = "broken"

        def prepare(self, workload, inputs):
            raise RuntimeError("first line\nsecond line")

    found = list(compare(one, [*BOTH, Absent(), Broken()], seconds=0))
    left = {row.peer: row.reason for row in found if isinstance(row, LeftOut)}
    assert left.keys() == {"absent", "broken"}
    assert left["absent"].startswith("no_such_module not installed: pip install")
    assert left["broken"] == "RuntimeError: first line"
    assert [row.peer for row in found if isinstance(row, Figure)] == ["saccade", "grid_sample"]


@pytest.mark.parametrize("part", ["output", "value", "locations", "weights"])
def test_compare_refuses_wrong_numbers(part):
    class Wrong(GridSample):
        name = "wrong"

        def prepare(self, workload, inputs):
            attend = super().prepare(workload, inputs)

            def wrong(value, locations, weights):
                value, locations, weights = (
                    skew(tensor) if part == name else tensor
                    for name, tensor in zip(
                        ("value", "locations", "weights"), (value, locations, weights), strict=True
                    )
                )
                return attend(value, locations, weights) * (1.01 if part == "output" else 1)

            return wrong

    class Skew(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return tensor.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * 1.01

    skew = Skew.apply
    workload = shrink(WORKLOADS["detr-decoder"])
    with pytest.raises(ArithmeticError, match=r"wrong and .* differ by .*, allowed"):
        list(compare(workload, [PEERS["saccade"], Wrong()], backward=True, seconds=0))


def test_ratios_are_of_the_times_and_instruction_sets_take_their_turns():
    isas = [name for name in default_peers() if name.startswith("cpu-")]
    workload = shrink(WORKLOADS["detr-decoder"])
    figures = list(compare(workload, [*BOTH, *(PEERS[name] for name in isas)], seconds=0))
    for figure in figures:
        expected = figure.milliseconds / figures[0].milliseconds
        assert figure.ratio == pytest.approx(expected, rel=1e-3)
    assert [figure.kernel for figure in figures[2:]] == isas
    assert Saccade().kernel() == machine()["backend"]


def test_alternate_takes_turns():
    calls = []
    names = ("first", "second")
    timings = alternate(
        {name: lambda name=name: calls.append(name) for name in names}, 0, least_rounds=3
    )
    assert set(calls) == set(names)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert len(turns) >= 2 * 3
    assert all(timing.rounds == 3 and timing.calls > 1 for timing in timings.values())


def test_slow_functions_take_part_in_fewer_rounds():
    calls = []
    timings = alternate(
        {name: lambda name=name: calls.append(name) for name in ("fast", "slow")},
        seconds=0,
        least_rounds=SLOW_ROUNDS + 2,
        first_seconds={"fast": 1e-3, "slow": 100.0},
    )
    assert timings["slow"].rounds == SLOW_ROUNDS
    assert calls.count("slow") == SLOW_ROUNDS - 1  # the call before counts as the first round
    assert timings["fast"].rounds == SLOW_ROUNDS + 2


def test_single_calls_are_not_preceded_by_another():
    calls = []
    alternate(
        {name: lambda name=name: calls.append(name) for name in ("first", "second")},
        seconds=0,
        least_rounds=3,
        turn_seconds=0,
        first_seconds={"first": 0, "second": 0},
    )
    assert calls[:2] == ["first", "second"]  # one each to begin with
    rounds = [calls[start : start + 2] for start in range(2, 8, 2)]
    assert len(calls) == 8
    assert all(sorted(one) == ["first", "second"] for one in rounds)


def test_nobody_always_follows_the_same_one():
    calls = []
    names = ("first", "second", "third")
    alternate(
        {name: lambda name=name: calls.append(name) for name in names},
        seconds=0,
        least_rounds=20,
        turn_seconds=0,
        first_seconds=dict.fromkeys(names, 0),
    )
    assert len(set(itertools.pairwise(calls[3:]))) > 6


def test_machine_names_what_a_figure_depends_on():
    assert {"processor", "torch", "saccade", "backend"} <= machine().keys()


def test_committed_plan_holds_what_the_documents_promise():
    plan = committed_plan()
    many = torch.get_num_threads()
    detectors = WORKLOADS.keys() - FAMILY
    for backward in (False, True):
        steps = [step for step in plan if step.backward == backward and not step.single_call]
        for uniform, dtype, threads, cases in (
            (False, torch.float32, many, detectors),
            (False, torch.float32, 1, detectors),
            (True, torch.float32, many, detectors),
            (False, torch.bfloat16, many, ENCODERS),
        ):
            found = [
                step
                for step in steps
                if (step.uniform, step.dtype, step.threads) == (uniform, dtype, threads)
            ]
            assert {step.workload for step in found} == set(cases)
            for step in found:
                assert step.peers[0] == "saccade"
                present = {name for name in default_peers() if name.startswith("cpu-")}
                assert {"grid_sample", "torch-ms-deform-attn"} | present <= set(step.peers)


def test_bench_command_with_every_option(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    file, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    code = run(
        *("bench", "--case", "rfdetr-nano", "--case", "dfine-decoder", "--backward"),
        *("--peer", "grid_sample", "--peer", "torch-ms-deform-attn", "--peer", "cpu-scalar"),
        *("--dtype", "float32", "--dtype", "bfloat16", "--threads", 1, "--seconds", 0),
        *("--locations", "uniform", "--json", file, "--plot", picture),
    )
    assert code == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "rfdetr-nano · forward + backward · bfloat16 · uniform · 1 thread\n" in printed
    assert "computes in float32" in printed
    assert "torch-ms-deform-attn" in printed
    found = report.read(file)
    report.write(found, tmp_path / "again.json")
    assert report.read(tmp_path / "again.json") == found
    assert (tmp_path / "again.json").read_text() == file.read_text()
    assert found.command == (
        "saccade bench --case rfdetr-nano --case dfine-decoder --peer grid_sample "
        "--peer torch-ms-deform-attn --peer cpu-scalar --dtype float32 --dtype bfloat16 "
        "--locations uniform --threads 1 --backward --seconds 0.0"
    )
    assert len({figure.setting for figure in found.figures}) == 2 * 2 * 2
    peers = {row.peer for row in [*found.figures, *found.left_out]}
    assert peers == {"saccade", "grid_sample", "torch-ms-deform-attn", "cpu-scalar"}
    assert not_blank(picture)


def not_blank(path):
    from matplotlib.image import imread

    picture = imread(path)
    return picture.shape[0] > 200 and picture[..., :3].std() > 0.02


def test_bench_command_lists_and_refuses(small, capsys):
    assert run("bench", "--list") == 0
    printed = capsys.readouterr().out
    assert "detr-encoder" in printed
    assert "onnxruntime" in printed
    for arguments, message in {
        ("--case", "nonsense"): "--case: expected one of detr-encoder, ",
        ("--peer", "nonsense"): "--peer: expected one of saccade, grid_sample",
        ("--dtype", "int8"): "--dtype: expected one of float32, bfloat16, float16, got int8",
        ("--locations", "zeros"): "--locations: expected one of model-like, uniform, got zeros",
        ("--full", "--threads", "1"): "--full: expected it without",
        ("--models", "--threads", "1"): "--models: expected it without",
    }.items():
        assert run("bench", *arguments) == 2
        assert message in capsys.readouterr().err


def test_bench_command_ends_with_1_on_wrong_numbers(small, monkeypatch, capsys):
    prepare = GridSample.prepare
    monkeypatch.setattr(
        GridSample,
        "prepare",
        lambda self, *given: lambda *tensors: prepare(self, *given)(*tensors) * 1.01,
    )
    options = ("--case", "rfdetr-nano", "--peer", "grid_sample", "--seconds", 0)
    assert run("bench", *options) == 1
    assert "wrong numbers: rfdetr-nano: output: grid_sample" in capsys.readouterr().err


def test_bench_command_says_what_it_cannot_write(small, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = ("--case", "rfdetr-nano", "--peer", "grid_sample", "--seconds", 0)
    assert run("bench", *options, "--plot", tmp_path / "bench.nonsense") == 2
    assert "error: cannot write" in capsys.readouterr().err
    assert run("bench", *options, "--json", tmp_path) == 2


def test_pages_hold_the_tables_of_the_committed_results(tmp_path):
    tables = pytest.importorskip("benchmarks.tables", reason="benchmarks/ is not in a wheel")
    rows = []
    for case in ("detr-encoder", "dfine-decoder"):
        for backward in (False, True):
            workload = shrink(WORKLOADS[case])
            rows += compare(workload, BOTH, backward=backward, seconds=0)
    report.write(report.results("saccade bench", rows), tmp_path / "cpu.json")
    page = "before\n<!-- figures: readme -->\nold\n<!-- end of figures -->\nafter\n"
    filled = tables.filled(page, tmp_path)
    assert "| D-FINE decoder | **" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert tables.filled(page.replace("readme", "models"), tmp_path) == page.replace(
        "readme", "models"
    )
    assert "**forward + backward**, float32" in tables.filled(
        page.replace("readme", "cpu"), tmp_path
    )
    for name in tables.PAGES:
        text = (tables.ROOT / name).read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{name}: run python -m benchmarks.tables --write"


def test_json_is_one_figure_a_line(tmp_path):
    found = compare(shrink(WORKLOADS["rfdetr-nano"]), BOTH, seconds=0)
    report.write(report.results("saccade bench", found), tmp_path / "bench.json")
    text = (tmp_path / "bench.json").read_text()
    assert json.loads(text)["figures"][1]["peer"] == "grid_sample"
    assert sum('"milliseconds"' in line for line in text.splitlines()) == 2


def test_floors_are_sums_of_what_was_measured():
    floors = pytest.importorskip("benchmarks.floors", reason="benchmarks/ is not in a wheel")
    if shutil.which("g++") is None:
        pytest.skip("benchmarks/floors.cpp is built with g++")
    parts = floors.measure(threads=1, repeats=1)
    kinds = (floors.COMPUTE, floors.BY_QUERIES, floors.TRAFFIC)
    named = {name for kind in kinds for names in kind.values() for name in names}
    assert parts.keys() == named | {"fresh_memory"}
    assert all(milliseconds > 0 for milliseconds in parts.values())
    found = floors.floors(dict.fromkeys(parts, 1.0))
    assert found["forward"] == 3  # three parts of traffic beside one of arithmetic
    assert found["forward, one after the other"] == 4
    assert found["forward + backward"] == 3 + 5
    assert found["forward + backward, one after the other"] == 4 + 7
    assert found["forward + backward, one after the other, by queries"] == 4 + 7
