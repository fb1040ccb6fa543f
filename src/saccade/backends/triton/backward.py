"""A call of a backward operator as launches of kernels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from saccade.argument_key import remember
from saccade.arguments import Call, FusedCall
from saccade.backends.triton import tuning
from saccade.backends.triton.gradient_kernels import differentiate_queries
from saccade.backends.triton.launch import (
    Launch,
    Prepared,
    beginning_with_a_word,
    constants_of,
    device_of,
    key_of_call,
    launches_of,
    options_of_launch,
    points_of,
    ready,
    sizes_of,
    understood,
    what_forms_go_by,
)
from saccade.backends.triton.points_reversed import fields_of_record, sum_references
from saccade.backends.triton.sorting import SumInOrder, cells_with_margins, workspace
from saccade.backends.triton.tuning import Form

# Bytes of workspace. Maps are worked on together up to so many; a single map that takes more is summed up in
# order only where that is asked for.
MOST_WORKSPACE = 3 * 2**27
# Of the kernel that sums up the gradients of reference points.
QUERIES_OF_REFERENCES = 32
MOST_POINTS_OF_REFERENCES = 16


class Group(NamedTuple):
    """Maps that are worked on together, with their queries among those of all maps."""

    maps: slice
    queries: slice
    launches: list[Launch]
    """Counted from the first map and the first query of the group."""


class Wanted(NamedTuple):
    """Which gradients a call is asked for."""

    value: bool
    references: bool
    points: bool
    weights: bool


class GradientPlan(NamedTuple):
    """What is found out from sizes, dtypes and options: everything but the tensors."""

    prepared: Prepared
    groups: list[Group]
    sizes: tuple[int, ...]
    num_positions: int
    wanted: Wanted
    fused: bool
    compute_dtype: torch.dtype
    in_order: SumInOrder | None
    """How the gradient of the value is summed up, where not by atomic additions."""
    of_references: Prepared | None


_remembered: dict[Hashable, GradientPlan] = {}


def differentiate(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`saccade::deformable_attention_backward` on a GPU; the arguments are those of the operator."""
    value, shapes, locations, weights, *options, output_mask = arguments
    mask = Wanted(output_mask[0], False, *output_mask[1:])
    key = _key(grad_output, (value, locations, weights), shapes, options, mask)
    found = _remembered.get(key)
    if found is None:
        call = understood(value, shapes, (locations, weights), options)
        found = remember(_remembered, key, gradient_plan(call, mask, grad_output))
    grad_value, _, grad_locations, grad_weights = run(
        found, grad_output, value, locations, weights, weights
    )
    return grad_value, grad_locations, grad_weights


def differentiate_fused(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`saccade::fused_deformable_attention_backward` on a GPU; the arguments are those of the operator."""
    value, shapes, references, offsets, logits, index, *options, output_mask = arguments
    mask = Wanted(*output_mask)
    tensors = (value, references, offsets, logits)
    key = _key(grad_output, tensors, shapes, [index, *options], mask)
    found = _remembered.get(key)
    if found is None:
        call = understood(value, shapes, (references, offsets, logits), options, index)
        found = remember(_remembered, key, gradient_plan(call, mask, grad_output))
    return run(found, grad_output, value, offsets, logits, references)


def _key(
    grad_output: Tensor,
    tensors: Sequence[Tensor],
    shapes: Sequence[int],
    options: Sequence[Any],
    wanted: Wanted,
) -> Hashable:
    in_order = torch.are_deterministic_algorithms_enabled()
    return (key_of_call((grad_output, *tensors), shapes, options), wanted, in_order)


def gradient_plan(
    call: Call | FusedCall,
    wanted: Wanted,
    grad_output: Tensor,
    form: Form | None = None,
    *,
    in_order: bool | None = None,
) -> GradientPlan:
    """How the gradients of a call are computed; by the table, unless a form is given."""
    value = call.value
    num_positions, head_dim = value.shape[1], value.shape[3]
    *looks, num_points, _axes = points_of(call).shape
    _check_grad_output(grad_output, value, (*looks[:2], looks[2] * head_dim))
    if form is None:
        form = tuning.choose("differentiate", *what_forms_go_by(call))
    of_maps = _workspace_of_maps(call)
    if in_order is None:
        cells = value.shape[0] * value.shape[2] * cells_with_margins(call.spatial_shapes)
        in_order = (
            tuning.sums_in_order(math.prod(looks) * num_points, cells)
            and max(of_maps, default=0) <= MOST_WORKSPACE
        )
    in_order = wanted.value and (in_order or torch.are_deterministic_algorithms_enabled())
    fused = isinstance(call, FusedCall)
    shared = constants_of(call, form)
    constants = {
        **shared,
        "VALUE_GRADIENT": "sort" if in_order else "add" if wanted.value else "no",
        "GRAD_POINTS": wanted.points,
        "GRAD_WEIGHTS": wanted.weights,
        "GRAD_LOCATIONS": wanted.references,
    }
    of_references = None
    if wanted.references:
        of_references = _prepared_for_references(cast(FusedCall, call), shared)
    groups = _groups(call, form.queries, of_maps if in_order else [0] * len(of_maps))
    summed = None
    if in_order:
        most_maps = max((group.maps.stop - group.maps.start for group in groups), default=0)
        summed = SumInOrder.of(shared, call.spatial_shapes, most_maps)
    return GradientPlan(
        Prepared(form.kernel, constants, {}),
        groups,
        sizes_of(call),
        num_positions,
        wanted,
        fused,
        torch.float64 if value.dtype == torch.float64 else torch.float32,
        summed,
        of_references,
    )


def _check_grad_output(grad_output: Tensor, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(grad_output.shape) != shape:
        raise ValueError(f"grad_output: expected {list(shape)}, got {list(grad_output.shape)}")
    if grad_output.dtype != value.dtype:
        raise ValueError(
            f"grad_output: expected the dtype of value, {value.dtype}, got {grad_output.dtype}"
        )
    if grad_output.device != value.device:
        raise ValueError(
            f"grad_output: expected a tensor on {value.device} like value, got {grad_output.device}"
        )


def _workspace_of_maps(call: Call | FusedCall) -> list[int]:
    """Bytes for each map, if its gradient is summed up in order."""
    _, _, value_heads, head_dim = call.value.shape
    *_, num_heads, num_points, axes = points_of(call).shape
    cells = value_heads * cells_with_margins(call.spatial_shapes)
    corners = 2**axes if call.interpolation == "linear" else 1
    number_bytes = max(call.value.element_size(), 4)
    return [
        workspace(count * num_heads * num_points, cells, corners, head_dim, axes, number_bytes)
        for count in _queries_of_maps(call)
    ]


def _queries_of_maps(call: Call | FusedCall) -> list[int]:
    if call.queries_per_map is not None:
        return call.queries_per_map
    return [points_of(call).shape[1]] * call.value.shape[0]


def _groups(call: Call | FusedCall, block: int, of_maps: Sequence[int]) -> list[Group]:
    """The maps in groups whose workspaces, as listed for each map, are small together."""
    batch_size = call.value.shape[0]
    _, num_queries, num_heads, _, _ = points_of(call).shape
    per_map, counts = call.queries_per_map, _queries_of_maps(call)
    groups, first_map, first_query = [], 0, 0
    while first_map < batch_size:
        last_map, total = first_map + 1, of_maps[first_map]
        while last_map < batch_size and total + of_maps[last_map] <= MOST_WORKSPACE:
            total += of_maps[last_map]
            last_map += 1
        maps = slice(first_map, last_map)
        last_query = first_query + sum(counts[maps])
        launches = launches_of(
            last_map - first_map, num_queries, num_heads, block, per_map and per_map[maps]
        )
        groups.append(Group(maps, slice(first_query, last_query), launches))
        first_map, first_query = last_map, last_query
    return groups


def _prepared_for_references(call: FusedCall, shared: dict[str, Any]) -> Prepared:
    points_of_point = [count for count in call.num_points for _ in range(count)]
    names = ("KIND", "REFERENCE_INDEX", "NUM_REFERENCES", "POINTS", "HEADS", "AXES")
    constants = {
        **{name: shared[name] for name in names},
        "POINTS_OF_POINT": tuple(points_of_point),
        "QUERIES": QUERIES_OF_REFERENCES,
        "BLOCK": min(triton.next_power_of_2(len(points_of_point)), MOST_POINTS_OF_REFERENCES),
        **options_of_launch(4),
    }
    return Prepared(sum_references, constants, {})


def run(
    plan: GradientPlan,
    grad_output: Tensor,
    value: Tensor,
    points: Tensor,
    weights: Tensor,
    references: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of value, references, points and weights; an empty tensor for those not wanted.

    `references` may be any tensor where there are none.
    """
    grad_output, value, points, weights, references = ready(
        (grad_output, value, points, weights, references)
    )
    if plan.prepared.constants["PAIRS"]:
        grad_output, value = beginning_with_a_word(grad_output), beginning_with_a_word(value)
    wanted, dtype = plan.wanted, plan.compute_dtype
    unused = grad_output  # in the place of what a kernel does not touch
    grad_value = grad_points = grad_weights = before_softmax = grad_locations = unused
    if wanted.value and plan.in_order is None:
        # Summed up in 32 bits, whatever the value's dtype.
        grad_value = torch.zeros_like(value, dtype=dtype)
    elif wanted.value:
        grad_value = torch.empty_like(value)
    if wanted.points:
        grad_points = torch.empty_like(points)
    if wanted.weights:
        grad_weights = before_softmax = torch.empty_like(weights)
        if plan.fused and plan.prepared.kernel is differentiate_queries:
            # Of the weights that logits stand for.
            before_softmax = torch.empty_like(weights, dtype=dtype)
    if wanted.references:
        grad_locations = torch.empty_like(points, dtype=dtype)
    tensors = (
        *(grad_points, before_softmax, grad_weights, grad_locations, grad_output),
        *(points, weights, references),
    )
    with device_of(value):
        for group in plan.groups:
            if len(plan.groups) == 1:
                _run_group(plan, group, grad_value, value, tensors)
                break
            _run_group(
                plan,
                group,
                grad_value[group.maps] if wanted.value else unused,
                value[group.maps],
                [tensor.flatten(0, 1)[group.queries] for tensor in tensors],
            )
        grad_references = references.new_empty(0)
        if plan.of_references is not None:
            grad_references = torch.empty_like(references)
            _sum_references(plan.of_references, grad_references, grad_locations, points)
    return (
        grad_value.to(value.dtype) if wanted.value else value.new_empty(0),
        grad_references,
        grad_points if wanted.points else points.new_empty(0),
        grad_weights if wanted.weights else weights.new_empty(0),
    )


def _run_group(
    plan: GradientPlan,
    group: Group,
    grad_value: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
) -> None:
    *gradients, grad_output, points, weights, references = tensors
    keys = records = grad_output
    num_keys = 0
    if plan.in_order is not None:
        num_keys = plan.in_order.num_keys(grad_value)
        keys = grad_output.new_empty(weights.numel(), dtype=plan.in_order.dtype_of_keys)
        fields = fields_of_record(points.shape[-1])
        records = grad_output.new_empty((weights.numel(), fields), dtype=plan.compute_dtype)
    for programs, *numbers_of_queries, first_map, first_query in group.launches:
        plan.prepared.start(
            programs,
            (
                *(grad_value, *gradients, keys, records),
                *(grad_output, value, points, weights, references),
            ),
            (plan.sizes,),
            (*numbers_of_queries, plan.num_positions, first_map, first_query, num_keys),
        )
    if plan.in_order is not None:
        plan.in_order.run(grad_value, grad_output, keys, records, plan.sizes)


def _sum_references(
    prepared: Prepared, grad_references: Tensor, grad_locations: Tensor, offsets: Tensor
) -> None:
    num_queries = grad_references.shape[0] * grad_references.shape[1]
    blocks = -(-num_queries // prepared.constants["QUERIES"])
    tensors = (grad_references, grad_locations, offsets)
    prepared.start(blocks * prepared.constants["NUM_REFERENCES"], tensors, (), (num_queries,))
