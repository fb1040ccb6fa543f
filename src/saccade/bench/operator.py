"""The operator beside what is installed: workloads, baselines, the comparison of results, and timing.

A baseline gets what its own users give it: its own layout of points, tensors prepared once, and float32
where it does not take 16-bit values. A baseline that cannot run or cannot do a workload says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import saccade
from saccade import reference
from saccade.call import parse_call
from saccade.timing import TURN_SECONDS, alternate

# (value, sampling_locations, attention_weights) -> output; the points of all levels are flat.
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]  # what was measured, by name

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
METHOD = (
    "all in one process, taking turns, on the same random tensors; medians of the rounds, after the "
    "results were compared with the definition in float64; ratio = the baseline's time / Saccade's"
)
OFFSET_PIXELS = 4.0  # the spread of locations around their reference point
NUM_COMPARED_QUERIES = 64
# The largest difference allowed, relative to the largest element of the expected result.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# A location closer to a pixel's centre than float32 can tell has its gradient from either side.
MAX_SHARE_ON_EDGES = 2e-3


class Workload(NamedTuple):
    """The sizes in which a model uses the operator."""

    name: str
    source: str
    shapes: Sequence[tuple[int, ...]]
    num_queries: int | None = None  # None: every position of the feature maps is a query
    num_heads: int = 8
    head_dim: int = 32
    num_points: int | Sequence[int] = 4
    batch_size: int = 1
    shared_head: bool = False

    @property
    def num_positions(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def spatial_dims(self) -> int:
        return len(self.shapes[0])

    @property
    def queries(self) -> int:
        return self.num_positions if self.num_queries is None else self.num_queries

    @property
    def points(self) -> list[int]:
        number = self.num_points
        return [number] * len(self.shapes) if isinstance(number, int) else list(number)


_DETR = [(100, 167), (50, 84), (25, 42), (13, 21)]
_REAL_TIME = [(80, 80), (40, 40), (20, 20)]
_CAMERAS = [(116, 200), (58, 100), (29, 50), (15, 25)]
_VOLUMES = [(16, 15, 39), (8, 8, 20), (4, 4, 10)]

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("detr-encoder", "Deformable DETR R50, 800 x 1333", _DETR),
        Workload("detr-decoder", "Deformable DETR R50, 800 x 1333", _DETR, 300),
        Workload("dino-decoder", "DINO and Grounding DINO, 4 scales", _DETR, 900),
        Workload("dino5-encoder", "DINO, 5 scales", [(200, 334), *_DETR]),
        Workload("mask2former-encoder", "Mask2Former, 1024²", [(32, 32), (64, 64), (128, 128)]),
        Workload("rtdetr-decoder", "RT-DETR R50, 640²", _REAL_TIME, 300),
        Workload("dfine-decoder", "D-FINE, DEIMv2", _REAL_TIME, 300, num_points=[3, 6, 3]),
        Workload("rfdetr-nano", "RF-DETR N", [(24, 24)], 300, 16, 16, 2),
        Workload("rfdetr-large", "RF-DETR L", [(44, 44)], 300, 16, 16, 2),
        Workload("rfdetr-issue-1385", "roboflow/rf-detr #1385", [(48, 48)], 1300, 16, 16, 2),
        Workload("bevformer-tsa", "BEVFormer base, temporal", [(200, 200)], batch_size=2),
        Workload("bevformer-sca", "BEVFormer base, 6 cameras", _CAMERAS, 9675, 8, 32, 8, 6),
        Workload("tadtr-1d", "TadTR, temporal", [(128,)]),
        Workload("medical-3d", "transoar, large", _VOLUMES, num_heads=36),
        Workload("plain-single-map", "the plain form", [(64, 64)], head_dim=256, shared_head=True),
    )
}
DEFAULT_WORKLOADS = ("detr-encoder", "detr-decoder", "rtdetr-decoder", "rfdetr-large")


class Inputs(NamedTuple):
    """Tensors of one call."""

    value: Tensor  # [B, S, M or 1, D]
    sampling_locations: Tensor  # [B, Q, M, P, N]
    attention_weights: Tensor  # [B, Q, M, P]
    grad_output: Tensor  # [B, Q, M * D]


def draw(workload: Workload, *, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs of a workload; the value and the gradient of the output have the dtype.

    Locations are near the query's own position, in decoders near a random one.
    """
    random = torch.Generator().manual_seed(seed)
    batch_size, queries, heads = workload.batch_size, workload.queries, workload.num_heads
    rows = (workload.num_positions, 1 if workload.shared_head else heads)
    value = torch.randn(batch_size, *rows, workload.head_dim, generator=random)
    levels = zip(workload.shapes, workload.points, strict=True)
    sizes = torch.tensor([shape[::-1] for shape, count in levels for _ in range(count)]).float()
    shape = (batch_size, queries, heads, len(sizes), workload.spatial_dims)
    offsets = torch.randn(shape, generator=random) * (OFFSET_PIXELS / sizes)
    locations = reference_points(workload, random)[:, None, None] + offsets
    logits = torch.randn(shape[:-1], generator=random)
    grad_output = torch.randn(batch_size, queries, heads * workload.head_dim, generator=random)
    return Inputs(value.to(dtype), locations, logits.softmax(-1), grad_output.to(dtype))


def reference_points(workload: Workload, random: torch.Generator) -> Tensor:
    """[Q, N], normalized: cell centres where each position is a query, else random positions."""
    if workload.num_queries is not None:
        return torch.rand(workload.queries, workload.spatial_dims, generator=random)
    centres = []
    for shape in workload.shapes:
        axes = torch.meshgrid(*((torch.arange(size) + 0.5) / size for size in shape), indexing="ij")
        # A location is (x, y), a shape is (H, W).
        centres.append(torch.stack(axes[::-1], -1).flatten(0, -2))
    return torch.cat(centres)


class Baseline(NamedTuple):
    """One implementation of the operator."""

    name: str
    prepare: Callable[[Workload], Function]
    """Makes the function that is timed, or raises ImportError or NotImplementedError with the reason."""
    package: str = "'saccade[bench]'"
    takes_16_bits: bool = False
    """Whether it takes 16-bit values with float32 locations; otherwise it gets float32."""


def saccade_function(workload: Workload) -> Function:
    """The public function, on the backend that a call gets by itself."""
    shapes, points = workload.shapes, workload.points

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return saccade.deformable_attention(value, shapes, locations, weights, num_points=points)

    return run


def grid_sample_function(workload: Workload) -> Function:
    """The code that detectors run on a CPU today, as transformers has it."""
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    if workload.spatial_dims != 2:
        raise NotImplementedError("transformers has it for images only")
    # D-FINE passes the list of shapes, which its annotation does not know.
    shapes: Any = [tuple(shape) for shape in workload.shapes]
    shapes_tensor = torch.tensor(shapes)
    operator = MultiScaleDeformableAttention()

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        output: Tensor
        if len(set(workload.points)) > 1:
            output = multi_scale_deformable_attention_v2(
                value, shapes, locations, weights, workload.points
            )
        else:
            value, locations, weights = with_levels(workload, value, locations, weights)
            output = operator(value, shapes_tensor, shapes, None, locations, weights, 64)
        return output

    return run


def with_levels(workload: Workload, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layout of Deformable DETR: points have an axis for levels, and a shared head is expanded."""
    value, locations, weights = tensors
    by_level = (len(workload.shapes), workload.points[0])
    value = value.expand(-1, -1, workload.num_heads, -1)
    return value, locations.unflatten(3, by_level), weights.unflatten(3, by_level)


def ms_deform_attn_function(workload: Workload) -> Function:
    """The kernel of Deformable DETR, ported to the CPU with OpenMP."""
    from torch_ms_deform_attn import ms_deform_attn

    if workload.spatial_dims != 2 or len(set(workload.points)) > 1:
        raise NotImplementedError("takes images, and one number of points for all levels")
    shapes = torch.tensor([tuple(shape) for shape in workload.shapes])
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)

    def run(*tensors: Tensor) -> Tensor:
        value, locations, weights = with_levels(workload, *tensors)
        output: Tensor = ms_deform_attn(value, shapes, starts, locations, weights)
        return output

    return run


MS_DEFORM_ATTN = "--no-build-isolation --no-deps torch-ms-deform-attn"
BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("saccade", saccade_function, takes_16_bits=True),
        Baseline("grid_sample", grid_sample_function),
        Baseline("torch-ms-deform-attn", ms_deform_attn_function, MS_DEFORM_ATTN),
    )
}


def compare(
    workload: Workload,
    baselines: Sequence[Baseline],
    *,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    seconds: float = 1.0,
    turn_seconds: float = TURN_SECONDS,
) -> list[Row]:
    """Times one direction of a workload; results are compared with the reference first.

    A row has the times of a baseline in milliseconds and its ratio, its time divided by that of the first,
    Saccade; or the reason why there are none, and `is_wrong` where its results differ from the reference.
    """
    inputs = draw(workload, dtype=dtype)
    float32 = Inputs(*(tensor.float() for tensor in inputs))
    truth = Truth(workload, inputs, backward)
    direction = "forward + backward" if backward else "forward"
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for baseline in baselines:
        row: Row = {"workload": workload.name, "direction": direction, "dtype": str(dtype)[6:]}
        row |= {"threads": torch.get_num_threads(), "baseline": baseline.name}
        rows[baseline.name] = row
        own_inputs = inputs if baseline.takes_16_bits else float32
        try:
            run = timed_call(baseline.prepare(workload), own_inputs, backward)
            truth.check(baseline.name, run())
        except Exception as error:
            if baseline is baselines[0]:
                raise
            hint = f": pip install {baseline.package}" if isinstance(error, ImportError) else ""
            row |= {"reason": describe_error(error) + hint}
            row |= {"is_wrong": True} if isinstance(error, ArithmeticError) else {}
            continue
        row["computes_in"] = str(own_inputs.value.dtype)[6:]
        runs[baseline.name] = run
    timings = alternate(runs, seconds, turn_seconds=turn_seconds)
    own_time = timings[baselines[0].name].milliseconds
    for name, timing in timings.items():
        ratio = float(f"{timing.milliseconds / own_time:.4g}")
        rows[name] |= {"ratio": ratio, **timing._asdict()}
    return list(rows.values())


def describe_error(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    line = next(iter(str(error).splitlines()), "")
    has_reason = isinstance(error, (NotImplementedError, ArithmeticError))
    return line if has_reason else f"{type(error).__name__}: {line}"


def timed_call(
    function: Function, inputs: Inputs, backward: bool
) -> Callable[[], Sequence[Tensor]]:
    """The call that is timed; it returns the output, or the output and the three gradients."""
    tensors = [tensor.detach().requires_grad_(backward) for tensor in inputs[:3]]

    def run() -> Sequence[Tensor]:
        with torch.set_grad_enabled(backward):
            output = function(*tensors)
        grads = torch.autograd.grad(output, tensors, inputs.grad_output) if backward else ()
        return (output.detach(), *grads)

    return run


class Truth:
    """The reference in float64 for some of the queries; all queries are alike.

    The gradient of the value depends on all queries: it is compared with that of the first baseline.
    """

    def __init__(self, workload: Workload, inputs: Inputs, backward: bool) -> None:
        self.tolerance = TOLERANCES[inputs.value.dtype]
        self.queries = slice(None, None, -(-workload.queries // NUM_COMPARED_QUERIES))
        value, *others = (tensor.double() for tensor in inputs)
        locations, weights, grad_output = (tensor[:, self.queries] for tensor in others)
        call = parse_call(value, workload.shapes, locations, weights, num_points=workload.points)
        self.expected: dict[str, Tensor | None] = {"output": reference.execute(call)}
        if backward:
            gradients = reference.execute_backward(grad_output, call, (False, True, True, False))
            names = ("grad_value", "grad_locations", "grad_weights")
            self.expected |= dict(zip(names, gradients, strict=False))

    def check(self, baseline: str, results: Sequence[Tensor]) -> None:
        """Compares the output and the gradients, where they differ with an ArithmeticError."""
        for name, result in zip(self.expected, results, strict=True):
            result = result.float() if name == "grad_value" else result[:, self.queries].double()
            expected = self.expected[name]
            if expected is None:
                expected = self.expected[name] = result
            allowed = self.tolerance * expected.abs().max()
            errors = (result - expected).abs()
            share = (~(errors <= allowed)).double().mean()  # a NaN is wrong
            if share > (MAX_SHARE_ON_EDGES if name == "grad_locations" else 0):
                raise ArithmeticError(
                    f"wrong {name}: {baseline} is off by {errors.max():.2g}, allowed {allowed:.2g}"
                )
