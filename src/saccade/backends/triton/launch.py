"""A call of an operator as launches of a kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


class Prepared(NamedTuple):
    """A kernel and its constants: all that does not change from call to call."""

    kernel: Any
    constants: dict[str, Any]
    compiled: dict[Hashable, _Compiled]
    """The compiled kernel, by what Triton compiles another one for: the device and the alignment."""

    def start(
        self,
        programs: int,
        tensors: Sequence[Tensor],
        sizes: Sequence[tuple[int, ...]],
        numbers: Sequence[int],
    ) -> None:
        """Launches the kernel on the device of the tensors, which has to be the current one."""
        if programs == 0:
            return
        key = (tensors[0].get_device(), *[tensor.data_ptr() % 16 == 0 for tensor in tensors])
        # What Triton does to find the kernel takes many times as long as the launch.
        compiled = self.compiled.get(key)
        # Numbers beyond 32 bits are of another type.
        small = max(numbers) < 2**31
        if compiled is not None and small:
            constants = compiled.constants_in_order
            compiled.kernel[(programs, 1, 1)](*tensors, *sizes, *numbers, *constants)
            return
        kernel = self.kernel[(programs,)](*tensors, *sizes, *numbers, **self.constants)
        # The interpreter compiles nothing.
        if kernel is not None and small:
            names = self.kernel.arg_names
            constants = tuple(self.constants[name] for name in names if name in self.constants)
            self.compiled[key] = _Compiled(kernel, constants)


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
    prepared: Prepared
    launches: list[Launch]
    sizes: tuple[int, ...]
    num_positions: int


# Of the tensors that say where the queries look, in both operators.
NAMES = {
    2: ("sampling_locations", "attention_weights"),
    3: ("reference_points", "sampling_offsets", "attention_logits"),
}

_remembered: dict[Hashable, Plan] = {}


def attend(*arguments: Any) -> Tensor:
    """`saccade::deformable_attention` on a GPU; the arguments are those of the operator."""
    value, shapes, locations, weights, *options = arguments
    key = key_of_call((value, locations, weights), shapes, options)
    found = _remembered.get(key)
    if found is None:
        call = understood(value, shapes, (locations, weights), options)
        found = remember(_remembered, key, plan(call))
    return run(found, value, locations, weights, weights)


def attend_fused(*arguments: Any) -> Tensor:
    """`saccade::fused_deformable_attention` on a GPU; the arguments are those of the operator."""
    value, shapes, references, offsets, logits, index, *options = arguments
    key = key_of_call((value, references, offsets, logits), shapes, [index, *options])
    found = _remembered.get(key)
    if found is None:
        call = understood(value, shapes, (references, offsets, logits), options, index)
        found = remember(_remembered, key, plan(call))
    return run(found, value, offsets, logits, references)


def key_of_call(
    tensors: Sequence[Tensor], shapes: Sequence[int], options: Sequence[Any]
) -> Hashable:
    """What a plan depends on."""
    return (
        *(tensor.shape for tensor in tensors),
        *(tensor.dtype for tensor in tensors),
        *(tensor.device for tensor in tensors),
        tuple(shapes),
        *(tuple(option) if isinstance(option, list) else option for option in options),
    )


def understood(
    value: Tensor,
    shapes: Sequence[int],
    tensors: Sequence[Tensor],
    options: Sequence[Any],
    reference_index: Sequence[int] | None = None,
) -> Call | FusedCall:
    """The operator's arguments, checked; `tensors` are those that say where the queries look."""
    if options[-1] is not None:
        # The public form of ragged calls has no axis for the batch.
        for name, tensor in zip(NAMES[len(tensors)], tensors, strict=True):
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
    batch_size, _, _, head_dim = call.value.shape
    _, num_queries, num_heads, _, _ = points_of(call).shape
    if form is None:
        form = tuning.choose("attend", *what_forms_go_by(call))
    return Plan(
        (*points_of(call).shape[:2], num_heads * head_dim),
        Prepared(form.kernel, constants_of(call, form), {}),
        launches_of(
            batch_size, num_queries, num_heads * form.slices, form.queries, call.queries_per_map
        ),
        sizes_of(call),
        call.value.shape[1],
    )


def points_of(call: Call | FusedCall) -> Tensor:
    """Locations or offsets."""
    return call.sampling_offsets if isinstance(call, FusedCall) else call.sampling_locations


def sizes_of(call: Call | FusedCall) -> tuple[int, ...]:
    """The sizes of the levels, as the kernels take them."""
    return tuple(2 * size + 1 for shape in call.spatial_shapes for size in shape)


def what_forms_go_by(call: Call | FusedCall) -> tuple[int, int, int, int, int, int]:
    """What `tuning.choose` is asked with."""
    *looks, num_points, axes = points_of(call).shape
    words, word_bytes = words_of(call.value)
    return (
        words, word_bytes, call.value.element_size(), num_points, axes, math.prod(looks)
    )  # fmt: skip


def constants_of(call: Call | FusedCall, form: Form) -> dict[str, Any]:
    """What kernels of forward and backward are compiled for."""
    kind, num_references, numbers = "given", 1, 0
    reference_index: tuple[int, ...] = (0,)
    if isinstance(call, FusedCall):
        *_, num_references, numbers = call.reference_points.shape
        kind = "points" if numbers == call.sampling_offsets.shape[-1] else "boxes"
        reference_index = tuple(call.reference_index)
    _, num_positions, value_heads, head_dim = call.value.shape
    *_, num_heads, num_points, axes = points_of(call).shape
    words, _ = words_of(call.value)
    changes = sum(one != other for one, other in itertools.pairwise(reference_index))
    return {
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
        **options_of_launch(form.warps),
    }


def options_of_launch(warps: int) -> dict[str, Any]:
    """What Triton takes beside a kernel's own constants."""
    # The definition rounds a position twice, and Triton's default has changed.
    return {"enable_fp_fusion": False, "num_warps": warps, "num_stages": 1}


def words_of(value: Tensor) -> tuple[int, int]:
    """The words that a row of the value is read in, and the bytes of one."""
    if value.dtype == torch.bfloat16 and value.shape[3] % 2 == 0:
        # In words of two numbers, which is an instruction less for each.
        return value.shape[3] // 2, 4
    return value.shape[3], value.element_size()


def launches_of(
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
    value, points, weights, references = ready((value, points, weights, references))
    if plan.prepared.constants["PAIRS"]:
        value = beginning_with_a_word(value)
    output = value.new_empty(plan.output_shape)
    with device_of(value):
        for programs, *numbers_of_queries, first_map, first_query in plan.launches:
            numbers = (*numbers_of_queries, plan.num_positions, first_map, first_query)
            tensors = (output, value, points, weights, references)
            plan.prepared.start(programs, tensors, (plan.sizes,), numbers)
    return output


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """The device of a tensor as the current one; asking costs less than entering it."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def beginning_with_a_word(tensor: Tensor) -> Tensor:
    """Numbers of 16 bits that can be read in words of two: those begin where words begin."""
    return tensor.clone() if tensor.data_ptr() % 4 else tensor


def ready(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as kernels read them: contiguous.

    Raises:
        ValueError: one has lost its memory.
    """
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            raise ValueError(
                f"a tensor {list(tensor.shape)}: expected one with memory, its storage was freed"
            )
    return [tensor.contiguous() for tensor in tensors]
