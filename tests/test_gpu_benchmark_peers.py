"""`python -m benchmarks.gpu`: what the peers are given, and how they are timed."""

from __future__ import annotations

import itertools
import math
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch

import saccade

pytest.importorskip("benchmarks.gpu", reason="benchmarks/ is not in a wheel")

from benchmarks.gpu import peers, speed, timing
from benchmarks.gpu.goals import COLD, EAGER, SINGLE, WARM
from benchmarks.gpu.packing import by_level, packed_for_dcnv4
from benchmarks.gpu.results import Deadline, Results
from benchmarks.gpu.timing import Clock
from saccade.benchmark.workloads import WORKLOADS, Workload, draw

CPU = torch.device("cpu")
SMALL = Workload("small", "", [(6, 9), (3, 5)], 13, num_heads=2, head_dim=8, batch_size=2)


def emulated(value, shapes, starts, locations, weights):
    """The contract of upstream's op and all that copy it, level by level from where each starts."""
    assert value.is_contiguous() and locations.is_contiguous() and weights.is_contiguous()  # noqa: PT018
    assert shapes.dtype == starts.dtype == torch.int64
    total = 0
    for level, (height, width) in enumerate(shapes.tolist()):
        first = int(starts[level])
        total = total + saccade.reference.deformable_attention(
            value[:, first : first + height * width],
            [(height, width)],
            locations[:, :, :, level, None],
            weights[:, :, :, level, None],
        )
    return total


class Applied:
    """Stands for a torch.autograd.Function."""

    def __init__(self, function):
        self.apply = function


def upstream(value, shapes, starts, locations, weights, step):
    assert step == 64
    assert value.dtype == locations.dtype == weights.dtype
    return emulated(value, shapes, starts, locations, weights)


def upstream_backward(value, shapes, starts, locations, weights, grad_output, step):
    assert grad_output.is_contiguous()
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        output = upstream(leaves[0], shapes, starts, *leaves[1:], step)
    return torch.autograd.grad(output, leaves, grad_output)


def dcnv4(value, shapes, starts, packed, step, points):
    """As FlashDeformAttn's kernel reads its tensor: of a head 2·L·K places, then L·K logits."""
    assert value.dtype == packed.dtype == torch.float16
    assert packed.is_contiguous()
    levels = len(shapes)
    batch_size, queries, heads, size = packed.shape
    assert size == levels * points * 3
    flat = packed.reshape(-1).float()
    locations = torch.empty(batch_size, queries, heads, levels, points, 2)
    logits = torch.empty(batch_size, queries, heads, levels * points)
    for number, look in enumerate(itertools.product(*map(range, (batch_size, queries, heads)))):
        of_head = flat[number * size : (number + 1) * size]
        locations[look] = of_head[: 2 * levels * points].view(levels, points, 2)
        logits[look] = of_head[2 * levels * points :]
    weights = logits.softmax(-1).unflatten(-1, (levels, points))
    return emulated(value.float(), shapes, starts, locations, weights.contiguous()).half()


def deformops(value, shapes, starts, locations, weights, /):
    assert weights.dtype == value.dtype
    assert locations.dtype == torch.float32
    return emulated(value.float(), shapes, starts, locations, weights.float()).to(value.dtype)


def rziga(image, shapes, places, weights, padding, align_corners):
    assert (padding, align_corners) == ("zeros", False)
    assert image.dtype == places.dtype in (torch.float16, torch.float32)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    found = emulated(image.float(), shapes, starts, places.float(), weights.float())
    return found.to(image.dtype).unflatten(2, (-1, image.shape[3]))


def mach9(value, shapes, locations, weights, clamp_grid=True):
    assert not clamp_grid
    shapes = shapes.long()
    return emulated(value, shapes, shapes.prod(1).cumsum(0) - shapes.prod(1), locations, weights)


UPSTREAM_HALVES = {
    "ms_deform_attn_forward": upstream,
    "ms_deform_attn_backward": upstream_backward,
}
# The peer, the modules that stand for it, and how far it may be off with bfloat16 values.
EMULATED = {
    "upstream": (peers.Upstream, {"MultiScaleDeformableAttention": UPSTREAM_HALVES}, 1e-5),
    "mmcv": (
        peers.Mmcv,
        {"mmcv.ops.multi_scale_deform_attn": {"MultiScaleDeformableAttnFunction": Applied(upstream)}},
        2e-2,
    ),
    "hub": (
        peers.HubKernel,
        {"kernels": {"get_kernel": lambda name, version: SimpleNamespace(**UPSTREAM_HALVES)}},
        9e-2,
    ),
    "old hub": (
        peers.HubKernel,
        {"kernels": {"get_kernel": lambda name: SimpleNamespace(**UPSTREAM_HALVES)}},
        9e-2,
    ),
    "dcnv4": (peers.DCNv4, {"DCNv4": {"FlashDeformAttnFunction": Applied(dcnv4)}}, 2e-2),
    "deformops": (peers.Deformops, {"deformops.registry": {"msda": deformops}}, 2e-2),
    "rziga": (
        peers.MsdaTriton,
        {
            "msda_triton": {"multiscale_deformable_attention": None},
            "msda_triton.frontend": {"triton_multiscale_deformable_attention": rziga},
        },
        2e-2,
    ),
    "roulbac": (
        peers.MsdaTriton,
        {"msda_triton": {"multi_scale_deformable_attention": lambda *given: upstream(*given, 64)}},
        9e-2,
    ),
    "mach9robotics": (peers.MsdaTriton, {"msda_triton": {"msda2d_fwd": mach9}}, 9e-2),
    "torch-ms-deform-attn": (
        peers.TorchMSDeformAttn, {"torch_ms_deform_attn": {"ms_deform_attn": emulated}}, 1e-5
    ),
    "saccade": (peers.Saccade, {}, 1e-2),
    "fused": (peers.SaccadeFused, {}, 1e-2),
    "grid_sample": (peers.GridSample, {}, 9e-2),
}  # fmt: skip


def emulated_peer(name, monkeypatch):
    """The peer, its modules replaced, and how far it may be off with bfloat16 values."""
    make, modules, allowed = EMULATED[name]
    for module, names in modules.items():
        stand_in = ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
        for parent in itertools.accumulate(module.split(".")[:-1], lambda a, b: f"{a}.{b}"):
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or ModuleType(parent))
    return make(), allowed


@pytest.mark.parametrize("shared_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EMULATED)
def test_a_peer_is_given_what_its_layout_asks_for(name, dtype, shared_head, monkeypatch):
    peer, allowed = emulated_peer(name, monkeypatch)
    assert peer.missing() is None
    workload = SMALL._replace(shared_head=shared_head, batch_size=1)
    if name == "dcnv4" and dtype == torch.float32:
        assert peer.refusal(workload, dtype) == "computes in float16 only"
        return
    assert peer.refusal(workload, dtype) is None
    inputs = draw(workload, dtype=dtype, uniform=False, seed=2)
    expected = saccade.reference.deformable_attention(
        inputs.value.double(),
        workload.shapes,
        *(tensor.double() for tensor in inputs[1:3]),
        num_points=4,
    )
    with torch.no_grad():
        found = peer.prepare(workload, inputs)()
    assert found.shape == expected.shape
    assert found.dtype == peer.computes_in(dtype)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else allowed)


def test_points_lie_as_dcnv4_reads_them():
    inputs = draw(SMALL, dtype=torch.float32, uniform=True)
    given = by_level(SMALL, inputs, torch.float32)
    packed = packed_for_dcnv4(given, torch.float32)
    assert packed.shape == (2, 13, 2, 2 * 4 * 3)
    assert packed[1, 5, 1, :4].tolist() == given.locations[1, 5, 1, 0, :2].flatten().tolist()
    assert packed[1, 5, 1, 16 + 5].exp().item() == pytest.approx(
        given.weights[1, 5, 1, 1, 1].item(), rel=1e-5
    )
    assert given.starts.tolist() == [0, 54]


def test_what_a_peer_cannot_do_has_a_reason():
    bf16 = torch.bfloat16
    assert "two dimensions" in peers.Mmcv().refusal(WORKLOADS["tadtr-1d"], bf16)
    assert "one number of points" in peers.Upstream().refusal(WORKLOADS["dfine-decoder"], bf16)
    flash = peers.DCNv4()
    assert "4 or 8 points" in flash.refusal(WORKLOADS["rfdetr-nano"], bf16)
    assert flash.refusal(WORKLOADS["detr-encoder"], bf16) is None
    # 2 · 13 queries in blocks of 26: the second map's queries would be read beyond the first's.
    assert "next" in flash.refusal(SMALL, bf16)
    assert peers.GridSample().refusal(WORKLOADS["medical-3d"], bf16) is None
    for peer in peers.all_peers().values():
        reason = peer.missing()
        assert reason is None or "install" in reason


class Wrong(peers.Saccade):
    name = "wrong"

    def prepare(self, workload, inputs):
        call = super().prepare(workload, inputs)
        return lambda: call() * math.nan


class Broken(peers.Saccade):
    name = "broken"

    def prepare(self, workload, inputs):
        raise RuntimeError("no kernel image\nis available")


class OwnWrong(Wrong):
    name = "saccade fused"


class OwnBroken(Broken):
    name = "saccade other"


class NoGraph(peers.Saccade):
    name = "no graph"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "detr-encoder", SMALL._replace(name="detr-encoder"))
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(timing, "TURN_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "EAGER_SECONDS", 1e-4)


def test_a_wrong_peer_is_flagged_and_a_broken_one_left_out(tiny, tmp_path, monkeypatch):
    graph = Clock.graph

    def refusing(clock, calls, *, keep=False):
        if "NoGraph" in repr(calls[0]):
            raise RuntimeError("operation not permitted when stream is capturing")
        return graph(clock, calls, keep=keep)

    class Call:
        def __init__(self, call):
            self.call = call

        def __call__(self):
            return self.call()

        def __repr__(self):
            return "NoGraph"

    prepare = peers.Saccade.prepare
    monkeypatch.setattr(NoGraph, "prepare", lambda *given: Call(prepare(*given)))
    monkeypatch.setattr(Clock, "graph", refusing)
    results = Results(tmp_path / "gpu.json", {})
    setting = speed.Setting("detr-encoder", 2, "float32")
    given = [peers.Saccade(), Wrong(), Broken(), NoGraph(), peers.DCNv4(), OwnWrong(), OwnBroken()]
    speed.measure_setting(results, Clock(CPU), setting, given, seed=1)
    rows = {row["peer"]: row for row in results.rows("figures")}
    assert rows.keys() == {"saccade", "wrong", "no graph", "saccade fused"}
    assert rows["saccade"]["exact"]
    assert not rows["wrong"]["exact"]
    assert rows["wrong"]["times"].keys() == {COLD, WARM, SINGLE, EAGER}
    assert rows["no graph"]["times"].keys() == {SINGLE, EAGER}
    for row in rows.values():
        for way, ratio in row["ratios"].items():
            own = rows["saccade"]["times"][way]["median"]
            assert ratio == pytest.approx(row["times"][way]["median"] / own, rel=1e-3)
    left = {row["peer"]: row["reason"] for row in results.rows("left_out")}
    assert left["broken"] == "RuntimeError: no kernel image"
    assert "not permitted" in left["no graph"]
    assert left["DCNv4 FlashDeformAttn"] == "computes in float16 only"
    # Saccade's own failures are failed checks.
    names = [row["name"] for row in results.rows("checks") if not row["ok"]]
    assert [name.split(", ")[0] for name in names] == [
        "timed: saccade other",
        "timed: saccade fused",
    ]


def test_time_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    results = Results(
        tmp_path / "gpu.json", {"crashed": [{"peer": "grid_sample", "reason": "boom"}]}
    )
    everyone = {"saccade": peers.Saccade(), "grid_sample": peers.GridSample()}
    monkeypatch.setattr(speed, "all_peers", lambda: everyone)
    monkeypatch.setattr(speed, "host_times", lambda *given: {"no_grad": {"plain": 1.0}})
    results.put("skipped", ["detr-encoder, batch 8, float32, model-like"])
    speed.measure_speed(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    found = {(row["batch_size"], row["dtype"]) for row in results.rows("figures")}
    assert found == {(1, "float32"), (1, "bfloat16"), (8, "bfloat16")}
    assert results.found["peers"] == {"saccade": "here 0.1.0", "grid_sample": "boom"}
    before = len(results.rows("figures"))

    def no_memory(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "input_sets", no_memory)
    results.put("figures", results.rows("figures")[2:])
    speed.measure_speed(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    assert results.rows("left_out")[-1]["reason"] == "OutOfMemoryError: CUDA out of memory"
    assert "detr-encoder, float32, model-like" in results.rows("skipped")
    before = len(results.rows("figures"))
    speed.measure_speed(results, CPU, Deadline(60), 1, cases=["detr-encoder"], quick=True)
    assert len(results.rows("figures")) == before


def test_a_graph_that_cannot_be_captured_leaves_the_current_stream_as_it_was(monkeypatch):
    """With stand-ins for what only a GPU has."""

    class Stream:
        def __init__(self, device=None):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

        record = wait = synchronize = lambda self: None

    class Event(Stream):
        def __init__(self, enable_timing):
            assert enable_timing

        def elapsed_time(self, other):
            return 2.0

    class Graph(Stream):
        replay = lambda self: "replayed"  # noqa: E731

    default, now = Stream(), []
    now.append(default)

    @contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()  # not where the block raises, as in torch's own

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", now.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: on("capturing"))
    clock, calls = Clock(torch.device("cuda")), []
    assert clock.seconds(lambda: None) == pytest.approx(2e-3)
    assert clock.graph([lambda: calls.append(now[-1])], keep=True)() == "replayed"
    assert calls[-1] == "capturing"
    assert len(calls) == 2

    def refuse():
        if now[-1] == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        clock.graph([refuse])
    assert now[-1] is default


def test_medians_and_quarters_in_turns(monkeypatch):
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    samples = {"a": iter([9.0, *(1e-6 * n for n in range(1, 16))]), "b": iter([2e-3] * 16)}
    found = timing.in_turns({name: given.__next__ for name, given in samples.items()})
    assert found["a"] == (8.0, 4.0, 12.0, 15, 1)
    assert found["b"].median == 2000
    assert timing.summary([3e-6]) == (3.0, 3.0, 3.0, 1, 1)


def test_host_times_and_the_card_on_a_cpu(monkeypatch):
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    found = speed.host_times(Clock(CPU), CPU)
    assert {name for calls in found.values() for name in calls} == {
        "a multiplication",
        "plain",
        "fused",
    }
    assert found["no_grad"]["plain"] > 0
    assert timing.card(CPU)["torch"] == torch.__version__
    assert timing.l2_bytes(CPU) == 0
