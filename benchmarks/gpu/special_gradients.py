"""Gradients around the operator: streams, graphs, compilers, checkpointing, DDP, huge tensors, races."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from benchmarks.gpu.gradient_truth import NAMES, truth_of_gradients
from benchmarks.gpu.gradients import (
    MODES,
    compare_gradients,
    draw_grad_output,
    gradients,
    on_device,
    worse,
)
from benchmarks.gpu.race import of_workload, race_checks
from benchmarks.gpu.results import reason_of
from benchmarks.gpu.special import LIMIT, NEEDS_GPU, Check, Found, compiled_call, with_first
from benchmarks.gpu.timing import Clock
from benchmarks.gpu.variants import Inputs, Variant, call, draw, laid_out
from saccade import reference
from saccade.arguments import Options, understand
from saccade.benchmark.operator import TOLERANCES
from saccade.benchmark.workloads import Workload

ALLOWED_OF_SECOND_DERIVATIVES = 1e-10
MAPS, POSITIONS, HEADS, HEAD_DIM = LIMIT // (64 * 64 * 8 * 32) + 5, 64 * 64, 8, 32


def special_gradient_checks(quick: bool = False) -> dict[str, Check]:
    """All of them by name, in the order in which they are done."""
    found = race_checks(quick)
    for form in NAMES:
        for mode in MODES:
            found[f"{form}: backward in a CUDA graph, replayed with other inputs, {mode}"] = (
                with_first(_graph, form, mode)
            )
        found |= {
            f"{form}: backward on a side stream": with_first(_side_stream, form),
            f"{form}: backward under autocast": with_first(_autocast, form),
            f"{form}: activation checkpointing": with_first(_checkpointed, form),
            f"{form}: second derivatives": with_first(_second_derivatives, form),
            f"{form}: backward on a GPU that is not the current one": with_first(_other_gpu, form),
        }
    found["DDP over one process"] = _ddp
    for mode in MODES:
        found[f"backward: infinite values and gradients, {mode}"] = with_first(_infinite, mode)
    for mode in MODES:
        found[f"backward: a map of more than 2^31 numbers, {mode}"] = with_first(_large_value, mode)
    found["backward: more than 2^31 coordinates and outputs"] = _many_looks
    for form in NAMES:
        found[f"{form}: torch.compile of forward and backward"] = with_first(_compiled, form)
    return found


class _Case:
    """A variant with its inputs, on the CPU and on the device."""

    def __init__(self, variant: Variant, seed: int, device: torch.device) -> None:
        self.variant = variant
        self.drawn, self.drawn_grad = draw(variant, seed), draw_grad_output(variant, seed)
        self.inputs = laid_out(variant, self.drawn, device)
        self.grad_output = on_device(self.drawn_grad, device)

    def leaves(self) -> list[Tensor]:
        """New ones on the same memory."""
        tensors = (self.inputs.value, *self.inputs.points)
        return [tensor.detach().requires_grad_() for tensor in tensors]

    def attend(self, library: Any) -> Callable[..., Tensor]:
        """The call as a function of its tensors."""
        return lambda value, *points: call(self.variant, Inputs(value, points, None), library)

    def right(self, found: dict[str, Tensor] | Sequence[Tensor]) -> tuple[float, float]:
        """Worst error and what was allowed there; raises ArithmeticError where it is more."""
        if not isinstance(found, dict):
            found = dict(zip(NAMES[self.variant.form], found, strict=True))
        expected = truth_of_gradients(self.variant, self.drawn, self.drawn_grad)
        return compare_gradients(found, expected)


def _graph(form: str, mode: str, device: torch.device, library: Any, seed: int) -> Found:
    """Forward and backward in one capture, replayed with other inputs; deterministic ones equal eager ones."""
    variant = Variant("bfloat16", form)
    static = _Case(variant, seed, device)
    grad_output = static.grad_output.contiguous()
    captured: list[dict[str, Tensor]] = []

    def run() -> None:
        captured.append(gradients(variant, static.inputs, grad_output, library))

    worst = (0.0, 0.0)
    with MODES[mode]():
        replay = Clock(device).graph([run])
        for number in range(3):
            other = _Case(variant, seed + 1 + number, device)
            grad_output.copy_(other.grad_output)
            static.inputs.value.copy_(other.inputs.value)
            for to, source in zip(static.inputs.points, other.inputs.points, strict=True):
                to.copy_(source)
            for output in captured[-1:]:  # the ones before are of the calls that warm up
                for gradient in output.values():
                    gradient.fill_(math.nan)
            replay()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            worst = worse(worst, other.right(captured[-1]))
            if mode == "deterministic":
                eager = gradients(variant, other.inputs, grad_output, library)
                for name, gradient in eager.items():
                    if not torch.equal(gradient, captured[-1][name]):
                        raise ArithmeticError(f"grad_{name} of a replay is not that of a call")
    return worst


def _side_stream(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """Inputs and grad_output are written on the stream of the call, late."""
    if device.type != "cuda":
        return NEEDS_GPU
    case = _Case(Variant("bfloat16", form), seed, device)
    late = case.inputs.map(lambda tensor: torch.full_like(tensor, math.nan))
    grad_output = torch.full_like(case.grad_output.contiguous(), math.nan)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        to = (late.value, *late.points, grad_output)
        sources = (case.inputs.value, *case.inputs.points, case.grad_output)
        for tensor, source in zip(to, sources, strict=True):
            tensor.copy_(source)
        found = gradients(case.variant, late, grad_output, library)
    stream.synchronize()
    return case.right(found)


def _autocast(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """The gradients come in the dtypes of their inputs, and as exact as without."""
    case = _Case(Variant("float32", form), seed, device)
    leaves = case.leaves()
    with torch.autocast(device.type, torch.bfloat16):
        output = case.attend(library)(*leaves)
    return case.right(torch.autograd.grad(output, leaves, case.grad_output))


def _checkpointed(form: str, device: torch.device, library: Any, seed: int) -> Found:
    case = _Case(Variant("bfloat16", form), seed, device)
    leaves = case.leaves()
    output = torch.utils.checkpoint.checkpoint(case.attend(library), *leaves, use_reentrant=False)
    return case.right(torch.autograd.grad(output, leaves, case.grad_output))


def _second_derivatives(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """In float64, against the reference on the CPU."""
    case = _Case(Variant("float64", form, head_dim=5, num_heads=3), seed, device)

    def found(library: Any, device: torch.device) -> list[Tensor]:
        numbers = torch.Generator().manual_seed(seed)
        tensors = (case.drawn.value, *case.drawn.points, case.drawn_grad)
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        output = case.attend(library)(*leaves[:-1])
        first = torch.autograd.grad(output, leaves[:-1], leaves[-1], create_graph=True)
        directions = [
            torch.randn(one.shape, generator=numbers, dtype=one.dtype).to(device) for one in first
        ]
        return list(torch.autograd.grad(first, leaves, directions))

    largest = 0.0
    expected = found(reference, torch.device("cpu"))
    for number, (got, want) in enumerate(zip(found(library, device), expected, strict=True)):
        error = float(((got.cpu() - want).abs().max() / want.abs().max()).nan_to_num(9.0))
        if error > ALLOWED_OF_SECOND_DERIVATIVES:
            raise ArithmeticError(f"the second derivative by input {number} is off by {error:.3g}")
        largest = max(largest, error)
    return largest, ALLOWED_OF_SECOND_DERIVATIVES


def _other_gpu(form: str, device: torch.device, library: Any, seed: int) -> Found:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return "not done: needs two GPUs"
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    case = _Case(Variant("bfloat16", form), seed, other)
    return case.right(gradients(case.variant, case.inputs, case.grad_output, library))


def _ddp(device: torch.device, library: Any, seed: int) -> Found:
    """Everything that the call reads is a parameter of a module under DDP."""
    if not torch.distributed.is_available():
        return "not done: this torch has no distributed part"
    case = _Case(Variant("float32"), seed, device)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given = nn.ParameterList([leaf.detach().clone() for leaf in case.leaves()])

        def forward(self) -> Tensor:
            return case.attend(library)(*self.given)

    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
    except Exception as error:  # no network, say: nothing that Saccade does
        return f"not done: {reason_of(error)}"
    try:
        layer = nn.parallel.DistributedDataParallel(Layer().to(device))
        layer().backward(case.grad_output)
        return case.right([parameter.grad for parameter in layer.parameters()])
    finally:
        torch.distributed.destroy_process_group()


def _compiled(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """Two numbers of queries, so that the second call has a graph of variable sizes."""
    worst = (0.0, 0.0)
    variant = Variant("float32", form)
    compiled = compiled_call(variant, library)
    for queries in ("prime", "many"):
        case = _Case(variant._replace(queries=queries), seed, device)
        leaves = case.leaves()
        output = compiled(*leaves)
        worst = worse(worst, case.right(torch.autograd.grad(output, leaves, case.grad_output)))
    torch._dynamo.reset()
    return worst


def _infinite(mode: str, device: torch.device, library: Any, seed: int) -> Found:
    """What is not finite reaches the numbers that it is an addend of, with weight 0 as NaN, and no others.

    A sum in order that is made of differences, or a product with a mask, would spread it.
    """
    numbers = torch.Generator().manual_seed(seed)
    shapes, spread = [(8, 8)], (1, 211, 1, 4)
    value = torch.randn(1, 64, 1, HEAD_DIM, generator=numbers)
    value[0, torch.randperm(64, generator=numbers)[:3]] = math.inf
    # Quarters of pixels, which no computing rounds: weights are exactly 0 in every precision.
    locations = torch.randint(-6, 36, (*spread, 2), generator=numbers) / 4
    weights = torch.rand(spread, generator=numbers)
    grad_output = torch.randn(1, 211, HEAD_DIM, generator=numbers)
    grad_output[0, 17], grad_output[0, 101, 5] = math.inf, math.nan

    given = (value, locations, weights, grad_output)
    *wide, wide_grad = (tensor.double() for tensor in given)
    # Written out: autograd through the reference gives points outside the map 0 times infinity.
    options = Options(shapes, 4, "linear", "zeros", "pixel", None)
    expected = reference.execute_backward(wide_grad, understand(*wide, options))
    worst = (0.0, 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        dtypes = (dtype, torch.float32, torch.float32, dtype)
        with MODES[mode]():
            *leaves, grad = (
                one.to(device, of, copy=True) for one, of in zip(given, dtypes, strict=True)
            )
            for leaf in leaves:
                leaf.requires_grad_()
            output = library.deformable_attention(
                leaves[0], shapes, *leaves[1:], num_points=4, coordinates="pixel"
            )
            found = torch.autograd.grad(output, leaves, grad)
        for name, gradient, want in zip(NAMES["plain"], found, expected, strict=True):
            got = gradient.cpu().double()
            for kind in (torch.isnan, torch.isinf):
                if not torch.equal(kind(got), kind(want)):
                    raise ArithmeticError(f"grad_{name}: {kind.__name__} holds in other places")
            finite = want.isfinite()
            error = float((got - want)[finite].abs().max())
            allowed = TOLERANCES[dtype] * float(want[finite].abs().max())
            if error > allowed:
                raise ArithmeticError(f"grad_{name} is off by {error:.3g}, allowed {allowed:.3g}")
            worst = worse(worst, (error, allowed))
    return worst


def _large_value(mode: str, device: torch.device, library: Any, seed: int) -> Found:
    """A value, and a gradient of it, whose numbers cannot be counted in 32 bits."""
    if device.type != "cuda":
        return NEEDS_GPU
    # The value and its gradient in bfloat16, sums in float32, and as much again for whatever else there is.
    if torch.cuda.mem_get_info(device)[0] < 16 * LIMIT:
        return f"not done: needs {16 * LIMIT / 1e9:.0f} GB of free memory"
    numbers = torch.Generator(device).manual_seed(seed)
    value = torch.empty(MAPS, POSITIONS, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    value.normal_(generator=numbers)
    of = {"generator": numbers, "device": device}
    locations = torch.rand(MAPS, 5, HEADS, 4, 2, **of)
    weights = torch.rand(MAPS, 5, HEADS, 4, **of)
    grad_output = torch.randn(MAPS, 5, HEADS * HEAD_DIM, dtype=torch.bfloat16, **of)
    with MODES[mode]():
        found = _gradients_of_large(library, [(64, 64)], value, locations, weights, grad_output)
    some = torch.tensor([0, 1, MAPS // 2, MAPS - 2, MAPS - 1], device=device)
    parts = (tensor[some].cpu() for tensor in (value, locations, weights, grad_output))
    return _some_right([(64, 64)], [gradient[some] for gradient in found], *parts)


def _many_looks(device: torch.device, library: Any, seed: int) -> Found:
    """As many coordinates, and numbers of the output, as 32 bits cannot count."""
    if device.type != "cuda":
        return NEEDS_GPU
    queries = LIMIT // (HEADS * 16 * 2) + 1009
    # Locations, weights, output, their gradients, in 16 bits; and the rest.
    if torch.cuda.mem_get_info(device)[0] < 20 * LIMIT:
        return f"not done: needs {20 * LIMIT / 1e9:.0f} GB of free memory"
    numbers = torch.Generator(device).manual_seed(seed)
    of = {"dtype": torch.bfloat16, "device": device, "generator": numbers}
    value = torch.randn(1, 256, HEADS, HEAD_DIM, **of)
    locations = torch.rand(1, queries, HEADS, 16, 2, **of)
    weights = torch.rand(1, queries, HEADS, 16, **of)
    grad_output = torch.randn(1, queries, HEADS * HEAD_DIM, **of)
    found = _gradients_of_large(library, [(16, 16)], value, locations, weights, grad_output)
    some = torch.tensor([0, queries // 3, queries // 2, queries - 20], device=device)
    some = (some[:, None] + torch.arange(20, device=device)).flatten()
    parts = (tensor[:, some].cpu() for tensor in (locations, weights, grad_output))
    # The value's gradient is a sum over all queries: only those of the points are compared.
    kept = [gradient[:, some] for gradient in found[1:]]
    return _some_right([(16, 16)], kept, value.cpu(), *parts)


def _gradients_of_large(
    library: Any, shapes: list[tuple[int, ...]], value: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    locations, weights, grad_output = others
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    points = weights.shape[-1]
    output = library.deformable_attention(leaves[0], shapes, *leaves[1:], num_points=points)
    found = torch.autograd.grad(output, leaves, grad_output)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return found


def _some_right(
    shapes: list[tuple[int, ...]],
    found: Sequence[Tensor],
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
) -> tuple[float, float]:
    """Some of the gradients against the definition: of all inputs, or of the points only."""
    batch_size, queries, heads, points = weights.shape
    head_dim = value.shape[3]
    workload = Workload("", "", shapes, queries, heads, head_dim, points, batch_size)
    variant = of_workload(workload, "bfloat16")
    expected = truth_of_gradients(variant, Inputs(value, (locations, weights), None), grad_output)
    names = NAMES["plain"][-len(found) :]
    return compare_gradients(dict(zip(names, found, strict=True)), expected)
