"""Random calls for the GPU kernels, and their results on these kernels and on the reference."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from conftest import _on_the_card
from helpers import TOLERANCE
from torch import Tensor

from saccade import reference
from saccade.call import Call, parse_call
from saccade.ops import gpu, schema

# Sizes and options whose every value a draw meets; smaller than any model's, for the interpreter's sake.
SMALL = {
    "shapes": [[(5,), (1,)], [(4, 5)], [(3, 4), (1, 2)], [(2, 3, 2), (1, 1, 3)]],
    "num_points": [1, 2, [1, 3], [4, 2], 5],
    "batch_size": [1, 1, 2],
    "num_queries": [1, 3, 5],
    "queries_per_map": [None, None, [2, 0, 3], [0, 0]],
    "num_heads": [1, 2],
    "shared_head": [False, False, True],
    "head_dim": [1, 3, 4, 8],
    "reference": ["none", "points", "boxes"],
    "softmax": [False, True],
    "num_references": [1, "levels", 3],
    "interpolation": ["linear", "linear", "nearest", "discrete"],
    "padding": ["zeros", "border", "border_height"],
    "coordinates": ["normalized", "normalized_corners", "pixel"],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "point_dtype": [None, None, torch.float16, torch.bfloat16, torch.float64],
    "kernel": ["queries", "points"],
    "summed": ["atomic", "sorted"],
}


def draw_options(seed: int, **fixed: Any) -> dict[str, Any]:
    """One value of each entry of `SMALL`, except for those that are fixed, such that they fit together."""
    generator = random.Random(seed)
    options = {name: generator.choice(values) for name, values in SMALL.items()} | fixed
    num_levels = len(options["shapes"])
    if isinstance(options["num_points"], int):
        options["num_points"] = [options["num_points"]] * num_levels
    options["num_points"] = options["num_points"][:num_levels]
    if options["queries_per_map"] is not None:
        options["batch_size"] = len(options["queries_per_map"])
    if options["num_references"] == "levels":
        options["num_references"] = num_levels
    if options["interpolation"] != "discrete" or len(options["shapes"][0]) != 2:
        options["padding"] = options["padding"].removesuffix("_height")
    if options["point_dtype"] is None:
        wide = options["dtype"] == torch.float64
        options["point_dtype"] = torch.float64 if wide else torch.float32
    return options


def draw_call(seed: int, **fixed: Any) -> Call:
    """A random call with the options of `draw_options`."""
    options = draw_options(seed, **fixed)
    generator = torch.Generator().manual_seed(seed)
    shapes, num_points = options["shapes"], options["num_points"]
    num_heads, spatial_dims = options["num_heads"], len(shapes[0])
    ragged = options["queries_per_map"]
    queries = (options["batch_size"], options["num_queries"]) if ragged is None else (sum(ragged),)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    value_heads = 1 if options["shared_head"] else num_heads
    positions = sum(map(math.prod, shapes))
    value = uniform(options["batch_size"], positions, value_heads, options["head_dim"]) - 0.5
    points = (*queries, num_heads, sum(num_points))
    size = 4.0 if options["coordinates"] == "pixel" else 1.0
    locations = (1.6 * uniform(*points, spatial_dims) - 0.3) * size
    weights = uniform(*points)
    reference_points = index = None
    if options["reference"] != "none":
        count = options["num_references"]
        reference_points = (1.6 * uniform(*queries, count, spatial_dims) - 0.3) * size
        if options["reference"] == "boxes":
            reference_points = torch.cat(
                (reference_points, 2 * torch.rand_like(reference_points)), -1
            )
        reference_points = reference_points.to(options["point_dtype"])
        index = [(7 * k + 1) % count for k in range(sum(num_points))]
        locations = 3 * (uniform(*points, spatial_dims) - 0.5)
    if options["softmax"]:
        weights = 6 * weights - 3
    return parse_call(
        value.to(options["dtype"]),
        shapes,
        locations.to(options["point_dtype"]),
        weights.to(options["point_dtype"]),
        reference_points=reference_points,
        softmax=options["softmax"],
        num_points=num_points,
        reference_index=index,
        queries_per_map=ragged,
        **{name: options[name] for name in ("interpolation", "padding", "coordinates")},
    )


def output_mask(call: Call) -> list[bool]:
    """Every gradient that the call has."""
    return [True, True, True, call.reference_points is not None]


def draw_grad_output(call: Call) -> Tensor:
    """A random gradient of the call's output."""
    batch_size, num_queries, num_heads = call.points.shape[:3]
    grad_output = torch.randn(batch_size, num_queries, num_heads * call.value.shape[3])
    return grad_output.to(call.value.dtype)


def run_kernels(call: Call, grad_output: Tensor, mask: list[bool] | None = None) -> list[Tensor]:
    """The output and the four gradients by the GPU kernels."""
    forward = _on_the_card(gpu.implementations()[0])
    output = forward(*schema.to_arguments(call))
    return [output, *run_backward_kernels(call, grad_output, mask or output_mask(call))]


def run_backward_kernels(call: Call, grad_output: Tensor, mask: list[bool]) -> list[Tensor]:
    """The four gradients by the GPU kernels."""
    backward = _on_the_card(gpu.implementations()[1])
    return list(backward(grad_output, *schema.to_arguments(call), mask))


def run_reference(call: Call, grad_output: Tensor, mask: list[bool] | None = None) -> list[Tensor]:
    """The same by the reference."""
    gradients = reference.execute_backward(grad_output, call, mask or output_mask(call))
    empty = call.value.new_empty(0)
    return [reference.execute(call), *(empty if one is None else one for one in gradients)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Each tensor is as exact as its dtype, computed in float32 at least."""
    names = ("output", "grad_value", "grad_points", "grad_weights", "grad_reference_points")
    for name, got, want in zip(names, actual, expected, strict=True):
        assert got.shape == want.shape, name
        assert want.numel() == 0 or got.dtype == want.dtype, name
        wide = all(tensor.dtype == torch.float64 for tensor in (actual[0], got))
        tolerance = TOLERANCE[torch.float64 if wide else torch.float32]
        if wide and name != "output":
            # Gradients are sums of more products, which the kernels add up in another order.
            tolerance *= 25
        # A result of 16 bits is rounded once, from sums that differ in the last places of float32.
        rtol = torch.finfo(got.dtype).eps if got.element_size() == 2 else 0
        scale = max(1.0, want.double().abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(
            got.double(), want.double(), rtol=rtol, atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
