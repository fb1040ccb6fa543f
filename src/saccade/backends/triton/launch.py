"""A call of an operator as launches of a kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.argument_key import remember
from saccade.arguments import (
    Call,
    FusedCall,
    Options,
    understand,
    understand_fused,
    unflattened,
)
from saccade.backends.triton import tuning
from saccade.backends.triton.tuning import Form

# Numbers that places are counted in 32 bits up to. A point beside a map may be as far from its beginning
# as the last cell is, and more: a map of one line has a line above and one below.
_MOST_NUMBERS_OF_32_BITS = (2**31 - 1) // 8


class _Compiled(NamedTuple):
    kernel: Any
    constants_in_order: tuple[Any, ...]


class Launch(NamedTuple):
    """One launch: some queries in a row that read the maps from `first_map` on."""

    num_programs: int
    num_queries: int
    num_blocks: int
    first_map: int
    first_query: int


class Plan(NamedTuple):
    """What is found out from sizes, dtypes and options: everything but the tensors."""

    output_shape: tuple[int, ...]
    kernel: Any
    launches: list[Launch]
    sizes: tuple[int, ...]
    num_positions: int
    constants: dict[str, Any]
    compiled: dict[Hashable, Any]
    """The compiled kernel, by what Triton compiles another one for: the device and the alignment."""


_remembered: dict[Hashable, Plan] = {}


def attend(*arguments: Any) -> Tensor:
    """`saccade::deformable_attention` on a GPU; the arguments are those of the operator."""
    value, shapes, locations, weights, *options = arguments
    key = _key((value, locations, weights), shapes, options)
    found = _remembered.get(key)
    if found is None:
        points = {"sampling_locations": locations, "attention_weights": weights}
        found = remember(_remembered, key, plan(_understood(value, shapes, points, options)))
    return run(found, value, locations, weights, weights)


def attend_fused(*arguments: Any) -> Tensor:
    """`saccade::fused_deformable_attention` on a GPU; the arguments are those of the operator."""
    value, shapes, references, offsets, logits, index, *options = arguments
    key = _key((value, references, offsets, logits), shapes, [index, *options])
    found = _remembered.get(key)
    if found is None:
        points = {
            "reference_points": references,
            "sampling_offsets": offsets,
            "attention_logits": logits,
        }
        found = remember(_remembered, key, plan(_understood(value, shapes, points, options, index)))
    return run(found, value, offsets, logits, references)


def _key(tensors: Sequence[Tensor], shapes: Sequence[int], options: Sequence[Any]) -> Hashable:
    return (
        *(tensor.shape for tensor in tensors),
        *(tensor.dtype for tensor in tensors),
        *(tensor.device for tensor in tensors),
        tuple(shapes),
        *(tuple(option) if isinstance(option, list) else option for option in options),
    )


def _understood(
    value: Tensor,
    shapes: Sequence[int],
    points: dict[str, Tensor],
    options: Sequence[Any],
    reference_index: Sequence[int] | None = None,
) -> Call | FusedCall:
    """The operator's arguments, checked; `points` are its other tensors by name."""
    tensors = list(points.values())
    if options[-1] is not None:
        # The public form of ragged calls has no axis for the batch.
        for name, tensor in points.items():
            if tensor.dim() < 1 or tensor.shape[0] != 1:
                raise ValueError(
                    f"{name}: expected [1, queries of all maps, ...] with queries_per_map, "
                    f"got {list(tensor.shape)}"
                )
        tensors = [tensor[0] for tensor in tensors]
    *references, locations, weights = tensors
    named = Options(unflattened(shapes, locations.shape[-1]), *options)
    if not references:
        return understand(value, locations, weights, named)
    return understand_fused(value, references[0], locations, weights, named, reference_index)


def plan(call: Call | FusedCall, form: Form | None = None) -> Plan:
    """How a call is computed; by the table, unless a form is given."""
    value = call.value
    kind, num_references, numbers = "given", 1, 0
    reference_index: tuple[int, ...] = (0,)
    if isinstance(call, FusedCall):
        locations = call.sampling_offsets
        *_, num_references, numbers = call.reference_points.shape
        kind = "points" if numbers == locations.shape[-1] else "boxes"
        reference_index = tuple(call.reference_index)
    else:
        locations = call.sampling_locations
    batch_size, num_positions, value_heads, head_dim = value.shape
    *_, num_queries, num_heads, num_points, axes = locations.shape
    words, word_bytes = words_of(value)
    if form is None:
        looks = math.prod(locations.shape[:3])
        form = tuning.choose(words, word_bytes, value.element_size(), num_points, axes, looks)
    changes = sum(one != other for one, other in itertools.pairwise(reference_index))
    constants: dict[str, Any] = {
        "KIND": kind,
        "NUM_REFERENCES": num_references,
        "REFERENCE_INDEX": reference_index,
        "POINTS": num_points,
        "HEADS": num_heads,
        "VALUE_HEADS": value_heads,
        "HEAD_DIM": head_dim,
        "AXES": axes,
        "LEVELS": len(call.spatial_shapes),
        "INTERPOLATION": call.interpolation,
        "PADDING": call.padding,
        "COORDINATES": call.coordinates,
        "PAIRS": words < head_dim,
        # Within a map, and within a block of queries, places are counted in 32 bits where they fit.
        "WIDE": max(
            num_positions * value_heads * head_dim,
            form.queries * num_heads * max(num_points * axes, head_dim),
            form.queries * num_references * numbers,
        )
        > _MOST_NUMBERS_OF_32_BITS,
        **form.constants(call.num_points, changes, axes),
        # The definition rounds a position twice, and Triton's default has changed.
        "enable_fp_fusion": False,
        "num_warps": form.warps,
        "num_stages": 1,
    }
    return Plan(
        (*locations.shape[:2], num_heads * head_dim),
        form.kernel,
        _launches(
            batch_size, num_queries, num_heads * form.slices, form.queries, call.queries_per_map
        ),
        tuple(2 * size + 1 for shape in call.spatial_shapes for size in shape),
        num_positions,
        constants,
        {},
    )


def words_of(value: Tensor) -> tuple[int, int]:
    """The words that a row of the value is read in, and the bytes of one."""
    if value.dtype == torch.bfloat16 and value.shape[3] % 2 == 0:
        # In words of two numbers, which is an instruction less for each.
        return value.shape[3] // 2, 4
    return value.shape[3], value.element_size()


def _launches(
    batch_size: int,
    num_queries: int,
    of_block: int,
    block: int,
    queries_per_map: list[int] | None,
) -> list[Launch]:
    """One for a batch; one for each map where each has its own number of queries. `of_block` programs
    share a block of queries.
    """
    if queries_per_map is None:
        num_blocks = -(-num_queries // block)
        launches = [Launch(num_blocks * of_block * batch_size, num_queries, num_blocks, 0, 0)]
    else:
        launches, first_query = [], 0
        for number, count in enumerate(queries_per_map):
            num_blocks = -(-count // block)
            launches.append(Launch(num_blocks * of_block, count, num_blocks, number, first_query))
            first_query += count
    return [launch for launch in launches if launch.num_programs > 0]


def run(plan: Plan, value: Tensor, points: Tensor, weights: Tensor, references: Tensor) -> Tensor:
    """The output of a planned call; `references` may be any tensor where there are none."""
    given = (value, points, weights, references)
    if not all(tensor.data_ptr() for tensor in given):
        _check_storage(given)
    value, points, weights, references = (tensor.contiguous() for tensor in given)
    if plan.constants["PAIRS"] and value.data_ptr() % 4:
        # Words of two numbers have to begin where words begin.
        value = value.clone()
    output = value.new_empty(plan.output_shape)
    tensors = (output, value, points, weights, references)
    if value.is_cuda and value.get_device() != torch.cuda.current_device():
        with torch.cuda.device(value.device):
            _launch(plan, tensors)
    else:
        _launch(plan, tensors)
    return output


def _check_storage(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            raise ValueError(
                f"a tensor {list(tensor.shape)}: expected one with memory, its storage was freed"
            )


def _launch(plan: Plan, tensors: Sequence[Tensor]) -> None:
    key = (tensors[0].get_device(), *[tensor.data_ptr() % 16 == 0 for tensor in tensors])
    for programs, *numbers_of_queries, first_map, first_query in plan.launches:
        numbers = (*numbers_of_queries, plan.num_positions, first_map, first_query)
        # What Triton does to find the kernel takes many times as long as the launch.
        compiled = plan.compiled.get(key)
        if compiled is not None:
            constants = compiled.constants_in_order
            compiled.kernel[(programs, 1, 1)](*tensors, plan.sizes, *numbers, *constants)
            continue
        kernel = plan.kernel[(programs,)](*tensors, plan.sizes, *numbers, **plan.constants)
        # The interpreter compiles nothing. Numbers beyond 32 bits are of another type.
        if kernel is not None and max(numbers) < 2**31:
            names = plan.kernel.arg_names
            constants = tuple(plan.constants[name] for name in names if name in plan.constants)
            plan.compiled[key] = _Compiled(kernel, constants)
