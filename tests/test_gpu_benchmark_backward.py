"""`python -m benchmarks.gpu`: how the backward is timed, and a training step."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_gpu_benchmark_gradients import Changed
from test_gpu_benchmark_peers import EMULATED, SMALL, emulated_peer

pytest.importorskip("benchmarks.gpu", reason="benchmarks/ is not in a wheel")

from benchmarks.gpu import backward, peers, speed, timing, training
from benchmarks.gpu.goals import COLD, DETERMINISTIC, EAGER, FILLING, SINGLE, WARM
from benchmarks.gpu.results import Deadline, OutOfTimeError, Results
from benchmarks.gpu.timing import Clock
from saccade.benchmark.workloads import WORKLOADS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setitem(WORKLOADS, "detr-encoder", SMALL._replace(name="detr-encoder"))
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "EAGER_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EMULATED)
def test_gradients_of_a_peer_are_those_of_its_own_layout(name, dtype, shared_head, monkeypatch):
    peer, allowed = emulated_peer(name, monkeypatch)
    setting = speed.Setting("detr-encoder", 1, dtype)
    workload = SMALL._replace(shared_head=shared_head)
    monkeypatch.setitem(WORKLOADS, "detr-encoder", workload)
    if peer.refusal(setting.case(), getattr(torch, dtype)):
        return
    inputs = setting.draw(2)
    truth = backward.Truth(setting, inputs, CPU)
    runs = backward.runs_of(peer, setting, inputs, inputs.grad_output, nullcontext)
    if dtype == "float32":
        allowed = 1e-5
    elif allowed == 9e-2:  # positions in bfloat16: beyond a grid line the gradient is another one
        allowed = 0.6
    forward, alone, both = (run() for run in runs)
    assert not forward.requires_grad
    assert alone[0].dtype == peer.computes_in(getattr(torch, dtype))
    for found in (alone, both, runs[1]()):  # the graph is kept
        assert truth.error(found) <= allowed
    assert truth.error((alone[0] * 1.7, *alone[1:])) > 0.65
    assert truth.error((alone[0] * torch.nan, *alone[1:])) == float("inf")


class Wrong(peers.Saccade):
    name = "wrong"

    def parts(self, workload, inputs):
        function, tensors = super().parts(workload, inputs)
        return lambda value, *points: function(
            Changed.apply(value, lambda gradient: 1.1 * gradient), *points
        ), tensors


class NoBackward(peers.Saccade):
    name = "no backward"

    def parts(self, workload, inputs):
        function, tensors = super().parts(workload, inputs)
        return lambda *given: function(*given).detach(), tensors


class OwnWrong(Wrong):
    name = "saccade fused"


class NoGraph(peers.Saccade):
    name = "no graph"


def test_backward_is_timed_in_both_modes_beside_its_peers(tmp_path, monkeypatch):
    replayed = backward.replayed

    def refusing(clock, contenders, *, warm):
        found, refused = replayed(
            clock, {n: runs for n, runs in contenders.items() if n != "no graph"}, warm=warm
        )
        return found, refused | {n: "capturing" for n in contenders if n == "no graph"}

    monkeypatch.setattr(backward, "replayed", refusing)
    results = Results(tmp_path / "gpu.json", {})
    setting = speed.Setting("detr-encoder", 2, "float32")
    given = [peers.Saccade(), Wrong(), NoBackward(), NoGraph(), peers.DCNv4(), OwnWrong()]
    backward.measure_setting(results, Clock(CPU), setting, given, seed=1)
    rows = {row["peer"]: row for row in results.rows("backward")}
    assert rows.keys() == {
        *("saccade", DETERMINISTIC, FILLING, "wrong", "no graph", "saccade fused")
    }
    own = rows["saccade"]
    assert own["exact"]
    assert own["times"].keys() == own["forward"].keys() == {COLD, WARM, SINGLE}
    assert own["both"].keys() == {COLD, EAGER}
    assert rows[DETERMINISTIC]["ratios"].keys() == {COLD, WARM, SINGLE}
    assert rows["no graph"]["times"].keys() == {SINGLE}
    assert not rows["wrong"]["exact"]
    assert all("forward" not in row for name, row in rows.items() if name != "saccade")
    left = {row["peer"]: row["reason"] for row in results.rows("left_out")}
    assert left["no backward"].startswith("backward: RuntimeError: element 0 of tensors")
    assert left["no graph"] == "backward: not in a graph: capturing"
    names = [row["name"] for row in results.rows("checks") if not row["ok"]]
    assert names == ["timed: saccade fused, backward, detr-encoder, batch 2, float32, model-like"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_backward_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "all_peers", lambda: {"saccade": peers.Saccade()})
    results = Results(tmp_path / "gpu.json", {})
    # What was skipped forward is not skipped backward.
    results.put(
        "skipped",
        [
            "detr-encoder, float32, model-like",
            "backward: detr-encoder, batch 8, float32, model-like",
        ],
    )
    backward.measure_backward(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    found = {(row["batch_size"], row["dtype"]) for row in results.rows("backward")}
    assert found == {(1, "float32"), (1, "bfloat16"), (8, "bfloat16")}
    before = len(results.rows("backward"))
    backward.measure_backward(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    assert len(results.rows("backward")) == before
    results.put("backward", [])
    with pytest.raises(OutOfTimeError):
        backward.measure_backward(results, CPU, Deadline(-1), 1, quick=True)
    assert results.found["backward_cut"].startswith("not timed from here on: backward: detr-enc")


def test_forwards_run_on_the_stream_that_captures(monkeypatch):
    """With stand-ins for what only a GPU has: a backward runs where its forward ran."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    class Graph(Stream):
        replay = lambda self: None  # noqa: E731

    now, seen = [Stream()], []

    @contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: on(stream))
    clock = Clock(torch.device("cuda"))
    with clock.on_its_stream():
        seen.append(now[-1])
        clock.graph([lambda: seen.append(now[-1])])
    assert seen == [clock.stream] * 3
    assert len(now) == 1


def test_peak_memory_is_only_known_of_a_gpu():
    assert backward.peak_bytes(CPU, lambda: None) is None


@pytest.mark.slow
def test_a_training_step_is_measured_and_what_is_not_finite_is_found(tmp_path, monkeypatch):
    results = Results(tmp_path / "gpu.json", {})
    training.measure_training(results, CPU, Deadline(20), 1, small=True)
    (row,) = Results(results.path).rows("training")
    assert (row["reason"], row["steps"], row["not_finite_at"]) == ("", training.SMALL_STEPS, None)
    assert row["against"] == "the unpatched model"
    assert row["ratio"] == pytest.approx(row["before"]["median"] / row["after"]["median"], rel=1e-3)
    training.measure_training(results, CPU, Deadline(-1), 1, small=True)  # it is done

    # Another time the first of many steps is not finite, and there is time for no more than that.
    step, losses = training.Trained.step, []

    def spoiled(self, batch):
        losses.append(step(self, batch))
        return losses[-1] * (torch.nan if results.rows("training") else 1.0)

    monkeypatch.setattr(training.Trained, "step", spoiled)
    results.put("training", [])
    training.measure_training(results, CPU, Deadline(20), 1, small=True)
    (row,) = results.rows("training")
    assert (row["steps"], row["not_finite_at"]) == (1, 1)
    (check,) = results.rows("checks")
    assert not check["ok"]

    def no_scipy(self, batch):
        raise ImportError("requires the scipy library\nbut it was not found")

    monkeypatch.setattr(training.Trained, "step", no_scipy)
    results.put("training", [])
    training.measure_training(results, CPU, Deadline(20), 1, small=True)
    assert results.rows("training")[0]["reason"] == "ImportError: requires the scipy library"
