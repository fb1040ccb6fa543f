"""Checks that a list of variants does not reach: real workloads, streams, graphs, compilers, huge tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import saccade
from benchmarks.gpu.checks import allowed_error, checked, compare, poison, truth
from benchmarks.gpu.results import Deadline, Results, memory_given_back
from benchmarks.gpu.timing import Clock
from benchmarks.gpu.variants import Inputs, Variant, call, draw, laid_out
from saccade import reference
from saccade.benchmark.operator import TOLERANCES, Truth
from saccade.benchmark.workloads import WORKLOADS
from saccade.benchmark.workloads import draw as draw_workload

Found = tuple[float, float] | tuple[float, float, str] | str | None
"""Error and allowance, and a note; or why it was not done; None: right, and there is no number to it."""
Check = Callable[[torch.device, Any, int], Found]

NEEDS_GPU = "not done: needs a GPU"
# In elements, where 32 bits with a sign end.
LIMIT = 2**31


def special_checks(quick: bool = False) -> dict[str, Check]:
    """All of them by name, in the order in which they are done."""
    found: dict[str, Check] = {}
    for form in ("plain", "fused"):
        found |= {
            f"{form}: side stream": with_first(_side_stream, form),
            f"{form}: CUDA graph, replayed with other inputs": with_first(_graph, form),
            f"{form}: under autocast": with_first(_autocast, form),
            f"{form}: a GPU that is not the current one": with_first(_other_gpu, form),
        }
    found["infinite values"] = _infinite_values
    found["a map of more than 2^31 numbers"] = _large_value
    found["more than 2^31 coordinates and outputs"] = _many_looks
    for form in ("plain", "fused"):
        found[f"{form}: torch.compile, the whole graph"] = with_first(_compiled, form)
    names = ("detr-encoder", "dfine-decoder") if quick else WORKLOADS
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            found[f"workload {name}, {str(dtype)[6:]}"] = with_first(_workload, name, dtype)
    return found


def check_special(
    results: Results,
    device: torch.device,
    deadline: Deadline,
    seed: int,
    *,
    checks: Mapping[str, Check],
    library: Any = saccade,
) -> None:
    """Does those that the results do not have yet; each is a row of the results."""
    done = {row["name"] for row in results.rows("checks")}
    for name, check in checks.items():
        if name in done:
            continue
        deadline.check(1.0)
        results.put("doing", {"key": "checks", "name": name})
        with memory_given_back(device):
            results.add("checks", checked(name, device, check, device, library, seed))


def with_first(check: Callable[..., Found], *first: Any) -> Check:
    """The check with its first arguments given."""
    return lambda device, library, seed: check(*first, device, library, seed)


def _right(variant: Variant, drawn: Inputs, found: Tensor) -> tuple[float, float]:
    expected = truth(variant, drawn)
    allowed = allowed_error(variant, expected)
    return compare(found, expected, drawn.value.dtype, allowed), allowed


def _side_stream(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """The inputs are written on the stream of the call, late: a kernel elsewhere reads what was before."""
    if device.type != "cuda":
        return NEEDS_GPU
    variant = Variant("bfloat16", form)
    drawn = draw(variant, seed)
    inputs = laid_out(variant, drawn, device)
    late = inputs.map(lambda tensor: torch.full_like(tensor, math.nan))
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(20_000_000)
        for to, source in zip(
            (late.value, *late.points), (inputs.value, *inputs.points), strict=True
        ):
            to.copy_(source)
        found = call(variant, late, library)
    stream.synchronize()
    return _right(variant, drawn, found)


def _graph(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """One capture, replayed three times with other inputs and a poisoned output."""
    if device.type != "cuda":
        return NEEDS_GPU
    variant = Variant("bfloat16", form)
    inputs = laid_out(variant, draw(variant, seed), device)
    outputs: list[Tensor] = []
    with torch.no_grad():
        replay = Clock(device).graph([lambda: outputs.append(call(variant, inputs, library))])
        output = outputs[-1]  # the ones before are of the calls that warm up
        result = (0.0, 0.0)
        for number in range(3):
            drawn = draw(variant, seed + 1 + number)
            inputs.value.copy_(drawn.value)
            for to, source in zip(inputs.points, drawn.points, strict=True):
                to.copy_(source)
            output.fill_(math.nan)
            replay()
            torch.cuda.synchronize(device)
            result = max(result, _right(variant, drawn, output))
    return result


def _autocast(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """The operator computes what it is given: autocast changes nothing about it."""
    variant = Variant("float32", form)
    drawn = draw(variant, seed)
    inputs = laid_out(variant, drawn, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        found = call(variant, inputs, library)
    return _right(variant, drawn, found)


def _other_gpu(form: str, device: torch.device, library: Any, seed: int) -> Found:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return "not done: needs two GPUs"
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    variant = Variant("bfloat16", form)
    drawn = draw(variant, seed)
    with torch.no_grad():
        found = call(variant, laid_out(variant, drawn, other), library)
    if found.device != other:
        raise ArithmeticError(f"the result is on {found.device}, expected {other}")
    return _right(variant, drawn, found)


def compiled_call(variant: Variant, library: Any) -> Callable[..., Tensor]:
    """The call of a variant as a whole graph, of value and points."""
    torch._dynamo.reset()
    shapes, options = variant.shapes, variant.options
    prefix = {"plain": "", "fused": "fused_"}[variant.form]
    function = getattr(library, f"{prefix}deformable_attention")

    @torch.compile(fullgraph=True)
    def compiled(value: Tensor, *points: Tensor) -> Tensor:
        attended: Tensor = function(value, shapes, *points, **options)
        return attended

    return compiled


def _compiled(form: str, device: torch.device, library: Any, seed: int) -> Found:
    """Two numbers of queries, so that the second call has a graph of variable sizes."""
    variant = Variant("float32", form)
    compiled = compiled_call(variant, library)
    result = (0.0, 0.0)
    for queries in ("prime", "many"):
        variant = variant._replace(queries=queries)
        drawn = draw(variant, seed)
        inputs = laid_out(variant, drawn, device)
        with torch.no_grad():
            result = max(result, _right(variant, drawn, compiled(inputs.value, *inputs.points)))
    torch._dynamo.reset()
    return result


def _infinite_values(device: torch.device, library: Any, seed: int) -> Found:
    """An infinity reaches the points that read its cell, with weight 0 as NaN, and no others."""
    numbers = torch.Generator().manual_seed(seed)
    shapes, spread = [(8, 8)], (1, 211, 1, 1, 4)
    value = torch.randn(1, 64, 1, 32, generator=numbers)
    value[0, torch.randperm(64, generator=numbers)[:6]] = math.inf
    # Quarters of pixels, which no computing rounds: weights are exactly 0 in every precision.
    locations = torch.randint(-6, 36, (*spread, 2), generator=numbers) / 4
    weights = torch.rand(spread, generator=numbers)
    expected = reference.deformable_attention(
        value.double(), shapes, locations.double(), weights.double(), coordinates="pixel"
    )
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        rounded = value.to(dtype).to(device)
        with torch.no_grad():
            found = (
                library.deformable_attention(
                    rounded, shapes, locations.to(device), weights.to(device), coordinates="pixel"
                )
                .cpu()
                .double()
            )
        for kind in (torch.isnan, torch.isinf):
            if not torch.equal(kind(found), kind(expected)):
                raise ArithmeticError(f"{kind.__name__} holds in other places than it should")
        finite = expected.isfinite()
        worst = max(worst, float((found - expected)[finite].abs().max()))
    allowed = TOLERANCES[torch.bfloat16] * float(expected[expected.isfinite()].abs().max())
    if worst > allowed:
        raise ArithmeticError(f"off by {worst:.3g}, allowed {allowed:.3g}")
    return worst, allowed


def _large_value(device: torch.device, library: Any, seed: int) -> Found:
    """Maps whose numbers cannot be counted in 32 bits, with a sign and without where memory allows."""
    if device.type != "cuda":
        return NEEDS_GPU
    shapes, of_a_map = [(64, 64)], 64 * 64 * 8 * 32
    free = torch.cuda.mem_get_info(device)[0]
    # The value in bfloat16, and half as much again for whatever else there is.
    maps = next(
        (n for n in (2 * LIMIT // of_a_map + 5, LIMIT // of_a_map + 5) if 3 * n * of_a_map < free),
        0,
    )
    if not maps:
        return f"not done: needs {3 * LIMIT / 1e9:.0f} GB of free memory"
    numbers = torch.Generator(device).manual_seed(seed)
    value = torch.empty(maps, 64 * 64, 8, 32, dtype=torch.bfloat16, device=device)
    value.normal_(generator=numbers)
    locations = torch.rand(maps, 5, 8, 1, 4, 2, generator=numbers, device=device)
    weights = torch.rand(maps, 5, 8, 1, 4, generator=numbers, device=device)
    with torch.no_grad():
        found = library.deformable_attention(value, shapes, locations, weights)
    some = (0, 1, maps // 2, maps - 2, maps - 1)
    parts = (
        torch.cat([tensor[one : one + 1] for one in some])
        for tensor in (found, value, locations, weights)
    )
    return _some_right(shapes, *parts)


def _many_looks(device: torch.device, library: Any, seed: int) -> Found:
    """As many coordinates, and numbers of the output, as 32 bits cannot count."""
    if device.type != "cuda":
        return NEEDS_GPU
    queries = LIMIT // (8 * 16 * 2) + 1009
    if torch.cuda.mem_get_info(device)[0] < 10 * LIMIT:
        return f"not done: needs {10 * LIMIT / 1e9:.0f} GB of free memory"
    shapes = [(16, 16)]
    numbers = torch.Generator(device).manual_seed(seed)
    of = {"dtype": torch.bfloat16, "device": device, "generator": numbers}
    value = torch.randn(1, 256, 8, 32, **of)
    locations = torch.rand(1, queries, 8, 1, 16, 2, **of)
    weights = torch.rand(1, queries, 8, 1, 16, **of)
    with torch.no_grad():
        found = library.deformable_attention(value, shapes, locations, weights)
    some = (0, queries // 3, queries // 2, queries - 20)
    found, locations, weights = (
        torch.cat([tensor[:, one : one + 20] for one in some], 1)
        for tensor in (found, locations, weights)
    )
    return _some_right(shapes, found, value, locations, weights)


def _some_right(
    shapes: list[tuple[int, ...]], found: Tensor, value: Tensor, locations: Tensor, weights: Tensor
) -> tuple[float, float]:
    """Some of the results of a 16-bit call against the definition."""
    expected = reference.deformable_attention(
        value.cpu().double(), shapes, locations.cpu().double(), weights.cpu().double()
    )
    allowed = 2 * float((expected.to(found.dtype).double() - expected).abs().max()) + 1e-4
    return compare(found, expected, value.dtype, allowed), allowed


def _workload(
    name: str, dtype: torch.dtype, device: torch.device, library: Any, seed: int
) -> Found:
    """A workload of the registry: every number is written, and 64 queries are right."""
    workload = WORKLOADS[name]
    inputs = draw_workload(workload, dtype=dtype, uniform=False, seed=seed)
    expected = Truth(workload, inputs, False)
    tensors = [tensor.to(device) for tensor in inputs[:3]]
    numbers = workload.batch_size * workload.queries * workload.num_heads * workload.head_dim
    with torch.no_grad():
        poison(numbers, dtype, device)
        found = library.deformable_attention(
            tensors[0], workload.shapes, *tensors[1:], num_points=workload.points
        )
    if bool(found.isnan().any()):
        raise ArithmeticError("there are NaN: never written, or read from nowhere")
    found = found.cpu()
    expected.check("saccade", (found,))
    wanted = expected.expected["output"]
    error = float((found[:, expected.queries].double() - wanted).abs().max())
    return error, TOLERANCES[dtype] * float(wanted.abs().max())
