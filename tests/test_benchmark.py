"""The benchmark: workloads of the right sizes, peers that agree, a clock that takes turns."""

from __future__ import annotations

import pytest
import torch

from saccade.__main__ import main
from saccade.benchmark.operator import compare, grid_sample_call, saccade_call
from saccade.benchmark.timing import alternate, machine
from saccade.benchmark.workloads import WORKLOADS, draw


def shrink(workload):
    """The same kind of call on a small map."""
    shapes = [(max(1, height // 10), max(1, width // 10)) for height, width in workload.shapes]
    queries = None if workload.num_queries is None else 20
    return workload._replace(shapes=shapes, num_queries=queries)


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


def test_compare_gives_both_directions_and_refuses_wrong_numbers(monkeypatch):
    workload = shrink(WORKLOADS["detr-decoder"])
    figures = list(compare(workload, seconds=0))
    assert [figure.direction for figure in figures] == ["forward", "forward + backward"]
    for figure in figures:
        assert figure.ratio == pytest.approx(figure.grid_sample_ms / figure.saccade_ms, rel=0.1)
    monkeypatch.setattr(
        "saccade.benchmark.operator.saccade_call",
        lambda _: lambda *tensors: saccade_call(workload)(*tensors) * 1.01,
    )
    with pytest.raises(ArithmeticError, match="differ"):
        next(compare(workload, seconds=0))


def test_alternate_takes_turns():
    calls = []
    names = ("first", "second")
    alternate({name: lambda name=name: calls.append(name) for name in names}, 0, least_rounds=3)
    assert set(calls) == set(names)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert len(turns) >= 2 * 3


def test_machine_names_what_a_figure_depends_on():
    assert {"processor", "torch", "saccade", "backend"} <= machine().keys()


def test_bench_command(capsys):
    with pytest.raises(SystemExit) as done:
        main(["bench", "rfdetr-nano", "--seconds", "0", "--threads", "1"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "rfdetr-nano          forward + backward" in printed
    with pytest.raises(SystemExit) as done:
        main(["bench", "nonsense"])
    assert done.value.code == 2
    assert "expected names from saccade bench --list, got nonsense" in capsys.readouterr().err
