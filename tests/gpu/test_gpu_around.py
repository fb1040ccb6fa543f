"""On a card: streams, graphs, compilers, autocast, checkpointing, DDP, a second card, memory, huge tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from gpu_cases import (
    GPU,
    Variant,
    assert_close,
    deterministic,
    draw,
    expected_results,
    run,
    run_both_ways,
)
from torch import nn

import saccade
from saccade import reference
from saccade.bench.operator import WORKLOADS
from saccade.bench.operator import draw as draw_workload

pytestmark = [*GPU, pytest.mark.parametrize("form", ["plain", "fused"])]

# In elements, where 32 bits with a sign end.
LIMIT = 2**31


class Drawn:
    """A random call: on the CPU with its expected results, and on the card."""

    def __init__(self, form, dtype="bfloat16", seed=0, device="cuda", **axes):
        self.variant = Variant(dtype, form, **axes)
        self.tensors, _, self.grad_output = draw(self.variant, seed)
        self.on_card = [tensor.to(device) for tensor in self.tensors]
        self.grad_on_card = self.grad_output.to(device)

    def run(self):
        return run_both_ways(self.variant, self.on_card, None, self.grad_on_card)

    def check(self, results):
        expected = expected_results(self.tensors, None, self.grad_output, self.variant)
        assert_close(results, expected, self.tensors)


def test_side_stream(form):
    """The inputs are written late on the stream of the call: a kernel elsewhere reads what was before."""
    call = Drawn(form)
    sources = [*call.on_card, call.grad_on_card]
    late = [torch.full_like(tensor, math.nan) for tensor in sources]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, source in zip(late, sources, strict=True):
            target.copy_(source)
        results = run_both_ways(call.variant, late[:-1], None, late[-1])
    stream.synchronize()
    call.check(results)


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_cuda_graph_replayed_with_other_inputs(form, mode):
    static = Drawn(form)
    stream = torch.cuda.Stream()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode == "deterministic", warn_only=True)
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles
            static.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = static.run()
        for seed in (1, 2, 3):
            other = Drawn(form, seed=seed)
            for target, source in zip(static.on_card, other.on_card, strict=True):
                target.copy_(source)
            static.grad_on_card.copy_(other.grad_on_card)
            for tensor in captured:
                tensor.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            other.check(captured)
            if mode == "deterministic":
                assert all(map(torch.equal, captured, other.run()))
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


def test_autocast_changes_nothing(form):
    call = Drawn(form, "float32")
    with torch.autocast("cuda", torch.bfloat16):
        results = call.run()
    call.check(results)


def test_compile_of_the_whole_graph(form):
    """Two numbers of queries, so that the second call has a graph of variable sizes."""
    torch._dynamo.reset()
    for queries in ("prime", "many"):
        call = Drawn(form, "float32", queries=queries)
        compiled = torch.compile(
            lambda *tensors: run(Variant("float32", form), list(tensors), None), fullgraph=True
        )
        leaves = [tensor.detach().requires_grad_() for tensor in call.on_card]
        output = compiled(*leaves)
        call.check([output.detach(), *torch.autograd.grad(output, leaves, call.grad_on_card)])


def test_activation_checkpointing(form):
    call = Drawn(form)
    leaves = [tensor.detach().requires_grad_() for tensor in call.on_card]
    output = torch.utils.checkpoint.checkpoint(
        lambda *tensors: run(call.variant, list(tensors), None), *leaves, use_reentrant=False
    )
    call.check([output.detach(), *torch.autograd.grad(output, leaves, call.grad_on_card)])


def test_second_derivatives(form):
    call = Drawn(form, "float64", head_dim=5, num_heads=3)

    def second(library, device):
        tensors = (*call.tensors, call.grad_output)
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        output = run(call.variant, leaves[:-1], None, library)
        first = torch.autograd.grad(output, leaves[:-1], leaves[-1], create_graph=True)
        return torch.autograd.grad(first, leaves, [torch.ones_like(one) for one in first])

    for result, truth in zip(second(saccade, "cuda"), second(reference, "cpu"), strict=True):
        scale = float(truth.abs().max())
        torch.testing.assert_close(result.cpu(), truth, rtol=0, atol=1e-10 * scale)


def test_distributed_data_parallel(form):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed part")
    call = Drawn(form, "float32")

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = nn.ParameterList([tensor.clone() for tensor in call.on_card])

        def forward(self):
            return run(call.variant, list(self.tensors), None)

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        layer = nn.parallel.DistributedDataParallel(Layer())
        output = layer()
        output.backward(call.grad_on_card)
        call.check([output.detach(), *(parameter.grad for parameter in layer.parameters())])
    finally:
        torch.distributed.destroy_process_group()


def test_a_card_that_is_not_the_current_one(form):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    call = Drawn(form, device=other)
    results = call.run()
    assert all(tensor.device == other for tensor in results)
    call.check(results)


def test_memory_of_an_encoder(form):
    """Beyond the results, forward and backward take as much as the value in float32, and some."""
    workload = WORKLOADS["detr-encoder"]
    inputs = [tensor.cuda() for tensor in draw_workload(workload, dtype=torch.bfloat16)]
    value, locations, weights, grad_output = inputs
    points = [locations, weights]
    if form == "fused":
        points = [locations[:, :, 0, :1], locations - 0.5, weights]
    names = {"plain": saccade.deformable_attention, "fused": saccade.fused_deformable_attention}
    leaves = [tensor.contiguous().requires_grad_() for tensor in (value, *points)]

    def both():
        output = names[form](leaves[0], workload.shapes, *leaves[1:], num_points=workload.points)
        return [output, *torch.autograd.grad(output, leaves, grad_output)]

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = both()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in results)
    peak = torch.cuda.max_memory_allocated() - before
    # An ordered sum may use a workspace of 384 MiB.
    assert peak <= kept + value.numel() * 4 + locations.numel() * 4 + (400 << 20)


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("many", ["maps", "queries"])
def test_more_than_32_bits_of_elements(form, many, mode):
    """The value, or locations and output, have more elements than 32 bits count; both ways."""
    maps = LIMIT // (64 * 64 * 8 * 32) + 5 if many == "maps" else 1
    queries = 5 if many == "maps" else LIMIT // (8 * 16 * 2) + 1009
    shapes, num_points = ([(64, 64)], 4) if many == "maps" else ([(16, 16)], 16)
    if torch.cuda.mem_get_info()[0] < 24 * LIMIT:
        pytest.skip(f"needs {24 * LIMIT / 1e9:.0f} GB of free memory")
    if many == "queries" and (mode == "deterministic" or form == "fused"):
        pytest.skip("the workspace would not fit beside the tensors")
    numbers = torch.Generator("cuda").manual_seed(0)
    of = {"dtype": torch.bfloat16, "device": "cuda", "generator": numbers}
    value = torch.empty(maps, math.prod(shapes[0]), 8, 32, dtype=torch.bfloat16, device="cuda")
    value.normal_(generator=numbers).requires_grad_()
    locations = torch.rand(maps, queries, 8, num_points, 2, **of)
    weights = torch.rand(maps, queries, 8, num_points, **of)
    points = [locations, weights]
    if form == "fused":
        points = [torch.rand(maps, queries, 1, 2, **of), 4 * locations - 2, weights]
    grad_output = torch.randn(maps, queries, 256, **of)
    points = [tensor.requires_grad_() for tensor in points]
    names = {"plain": "deformable_attention", "fused": "fused_deformable_attention"}

    def both(library, value, points, grad_output):
        leaves = [value, *points]
        function = getattr(library, names[form])
        output = function(value, shapes, *points, num_points=num_points)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]

    if mode == "deterministic":
        with deterministic():
            results = both(saccade, value, points, grad_output)
    else:
        results = both(saccade, value, points, grad_output)
    axis, size = (0, maps) if many == "maps" else (1, queries)
    chosen = torch.tensor([0, 1, size // 2, size - 2, size - 1], device="cuda")

    def choose(tensor):
        part = (
            tensor.detach()
            if tensor.shape[axis] != size
            else tensor.detach()[chosen if axis == 0 else (slice(None), chosen)]
        )
        return part.cpu()

    # The gradient of the value is a sum over all queries: it is compared only where maps are chosen.
    skipped = 1 if many == "queries" else None
    leaves = [choose(tensor).float().requires_grad_() for tensor in (value, *points)]
    expected = both(reference, leaves[0], leaves[1:], choose(grad_output).float())
    for index, (result, truth) in enumerate(zip(results, expected, strict=True)):
        if index != skipped:
            part, scale = choose(result).float(), float(truth.abs().max())
            torch.testing.assert_close(part, truth, rtol=2**-7, atol=1e-4 * scale)
