"""Random calls with infinities, NaN and huge numbers, exactly on borders, and their truth as loops."""

from __future__ import annotations

import math
import random

import torch
from helpers import read_corners
from torch import Tensor
from triton_helpers import draw_call, draw_options

from saccade.call import Call

INF, NAN = math.inf, math.nan
# Products of three of the large ones do not overflow; one, as a location, overflows as a position.
ELEMENTS = [INF, -INF, NAN, 0.0, 0.0, 1e80, -1e80]
COORDINATES = [INF, -INF, NAN, 1.7e308, -1.7e308, 1e80, 0.0]
# Distances from a border in pixels: on it, on the centres beside it, and a little off.
STEPS = [-2, -1.5, -1, -0.5, -1e-17, 0, 1e-17, 0.5, 1, 1.5]


def draw_odd_call(seed: int) -> tuple[Call, Tensor]:
    """A call in float64 and the gradient of its output, both with elements that are not finite."""
    fixed = {"dtype": torch.float64, "point_dtype": torch.float64}
    options = draw_options(seed, **fixed)
    call = draw_call(seed, **fixed)
    generator = random.Random(seed)
    batch_size, num_queries, num_heads = call.points.shape[:3]
    grad_output = torch.zeros(
        batch_size, num_queries, num_heads * call.value.shape[3], dtype=torch.float64
    )
    for tensor in (call.value, call.weights, grad_output):
        # Small whole numbers, so that sums are the same in every order.
        tensor[:] = _fill(tensor, generator, lambda: generator.randint(-3, 3))
    # Some calls have few such elements, so that one of them decides what a result is.
    rates = generator.choice([[0, 0, 0.02], [0, 0, 0.1, 0.3]])
    elements = ELEMENTS
    if call.options.softmax:
        elements = [-INF, -1e80] if generator.random() < 0.7 else [INF, NAN, -INF, 1e80]
    call.weights[:] = _spoil(call.weights, generator, elements, generator.choice(rates))
    for tensor in (call.value, grad_output):
        tensor[:] = _spoil(tensor, generator, ELEMENTS, generator.choice(rates))
    shapes = options["shapes"]
    if call.reference_points is None:
        levels = [shape for shape, count in zip(shapes, call.options.num_points, strict=True)
                  for _ in range(count)]  # fmt: skip
        for point, shape in enumerate(levels):
            for axis, size in enumerate(reversed(shape)):
                column = call.points[:, :, :, point, axis]
                column[:] = _fill(
                    column, generator, lambda size=size: _border(call, size, generator)
                )
    else:
        shape = generator.choice(shapes)
        for axis, size in enumerate(reversed(shape)):
            column = call.reference_points[..., axis]
            column[:] = _fill(column, generator, lambda size=size: _border(call, size, generator))
        call.points[:] = _fill(
            call.points, generator, lambda: generator.choice([-1, -0.5, 0, 0.5, 1])
        )
        odd = _spoil(call.reference_points, generator, COORDINATES, generator.choice(rates))
        call.reference_points[:] = odd
    call.points[:] = _spoil(call.points, generator, COORDINATES, generator.choice(rates))
    return call, grad_output


def _fill(tensor: Tensor, generator: random.Random, draw) -> Tensor:
    return torch.tensor([float(draw()) for _ in range(tensor.numel())]).double().view(tensor.shape)


def _spoil(tensor: Tensor, generator: random.Random, elements: list[float], rate: float) -> Tensor:
    drawn = [
        generator.choice(elements) if generator.random() < rate else number
        for number in tensor.flatten().tolist()
    ]
    return torch.tensor(drawn, dtype=torch.float64).view(tensor.shape)


def _border(call: Call, size: int, generator: random.Random) -> float:
    """A coordinate beside the first or the last of `size` pixels."""
    pixel = generator.choice([0, size - 1]) + generator.choice(STEPS)
    if call.options.coordinates == "normalized":
        return (pixel + 0.5) / size
    if call.options.coordinates == "normalized_corners":
        return pixel / max(size - 1, 1)
    return pixel


def true_results(call: Call, grad_output: Tensor) -> list[Tensor]:
    """The output and the gradients of value, points, weights and reference points, by Python floats.

    It is docs/definition.md number by number, and shares no code with saccade.
    """
    options = call.options
    batch_size, num_queries, num_heads = call.points.shape[:3]
    head_dim = call.value.shape[3]
    output = torch.zeros_like(grad_output)
    grad_value, grad_points, grad_weights = (
        torch.zeros_like(tensor) for tensor in (call.value, call.points, call.weights)
    )
    references = call.reference_points
    grad_references = torch.zeros_like(
        call.value[:0, 0, 0, 0] if references is None else references
    )
    counts = options.queries_per_map or [num_queries] * batch_size
    map_of_query = [index for index, count in enumerate(counts) for _ in range(count)]
    for row, map_index in enumerate(map_of_query):
        b, q = (0, row) if options.queries_per_map is not None else divmod(row, num_queries)
        for m in range(num_heads):
            head = m if call.value.shape[2] > 1 else 0
            grad = grad_output[b, q, m * head_dim : (m + 1) * head_dim].tolist()
            weights = call.weights[b, q, m].tolist()
            if options.softmax:
                weights = _softmax(weights)
            sums, slopes_of_weights = [0.0] * head_dim, []
            point = first_row = 0
            for shape, count in zip(options.spatial_shapes, options.num_points, strict=True):
                for _ in range(count):
                    location, chain = _locate(call, b, q, m, point, shape, count)
                    attention = weights[point]
                    sampled, grad_weight = [0.0] * head_dim, 0.0
                    grad_location = [0.0] * len(shape)
                    for index, weight, slopes in read_corners(options, shape, location):
                        position = first_row
                        for i, stride in zip(index, _strides(shape), strict=True):
                            position += i * stride
                        values = call.value[map_index, position, head].tolist()
                        dot = _dot(grad, values)
                        grad_weight += weight * dot
                        for n, slope in enumerate(slopes):
                            grad_location[n] += slope * (attention * dot)
                        for d in range(head_dim):
                            sampled[d] += weight * values[d]
                            grad_value[map_index, position, head, d] += weight * attention * grad[d]
                    for d in range(head_dim):
                        sums[d] += attention * sampled[d]
                    slopes_of_weights.append(grad_weight)
                    _reverse(
                        call, b, q, m, point, grad_location, chain, grad_points, grad_references
                    )
                    point += 1
                first_row += math.prod(shape)
            if options.softmax:
                mean = sum(a * slope for a, slope in zip(weights, slopes_of_weights, strict=True))
                slopes_of_weights = [
                    a * (slope - mean) for a, slope in zip(weights, slopes_of_weights, strict=True)
                ]
            grad_weights[b, q, m] = torch.tensor(slopes_of_weights, dtype=torch.float64)
            output[b, q, m * head_dim : (m + 1) * head_dim] = torch.tensor(
                sums, dtype=torch.float64
            )
    return [output, grad_value, grad_points, grad_weights, grad_references]


def _dot(one: list[float], other: list[float]) -> float:
    return sum((a * b for a, b in zip(one, other, strict=True)), start=0.0)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _softmax(logits: list[float]) -> list[float]:
    if any(map(math.isnan, logits)) or math.isinf(max(logits)):
        return [NAN] * len(logits)
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def _locate(call: Call, b: int, q: int, m: int, point: int, shape: tuple[int, ...], count: int):
    """The location of a point, and per axis what its offset is multiplied by: a step and a size."""
    numbers = call.points[b, q, m, point].tolist()
    if call.reference_points is None:
        return numbers, None
    reference = call.reference_points[b, q, call.options.reference_index[point]].tolist()
    boxes = len(reference) > len(shape)
    location, chain = [], []
    for n, size in enumerate(reversed(shape)):
        pixels = {"normalized": size, "normalized_corners": size - 1, "pixel": 1}
        pixels = pixels[call.options.coordinates]
        step = 0.5 / count if boxes else 1 / pixels if pixels else 0.0
        box = reference[len(shape) + n] if boxes else 1.0
        location.append(reference[n] + numbers[n] * step * box)
        chain.append((step, box))
    return location, chain if all(map(math.isfinite, location)) else None


def _reverse(call, b, q, m, point, grad_location, chain, grad_points, grad_references) -> None:
    """From the gradient of a location to those of offset and reference point."""
    for n, grad in enumerate(grad_location):
        if call.reference_points is None:
            grad_points[b, q, m, point, n] = grad
        elif chain is not None:  # else the point takes no part
            step, box = chain[n]
            reference = grad_references[b, q, call.options.reference_index[point]]
            grad_points[b, q, m, point, n] = grad * step * box
            reference[n] += grad
            if len(reference) > len(grad_location):
                offset = float(call.points[b, q, m, point, n])
                reference[len(grad_location) + n] += grad * step * offset
