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
from saccade.backends.triton.points_reversed import sum_references
from saccade.backends.triton.sorting import SumInOrder, cells_with_margins, fields_of_record
from saccade.backends.triton.tuning import Form

# Points, and cells, that are sorted at once, unless a single map has more: this bounds the memory.
MOST_SORTED = 2**22
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
        points = {"sampling_locations": locations, "attention_weights": weights}
        call = understood(value, shapes, points, options)
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
        points = {
            "reference_points": references,
            "sampling_offsets": offsets,
            "attention_logits": logits,
        }
        call = understood(value, shapes, points, options, index)
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
    if in_order is None:
        in_order = tuning.sums_in_order(math.prod(looks) * num_points)
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
    groups = _groups(call, form.queries, in_order=in_order)
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


def _groups(call: Call | FusedCall, block: int, *, in_order: bool) -> list[Group]:
    """The maps in groups; all in one where nothing is sorted."""
    batch_size, _, value_heads, _ = call.value.shape
    _, num_queries, num_heads, num_points, _ = points_of(call).shape
    per_map = call.queries_per_map
    counts = [num_queries] * batch_size if per_map is None else per_map
    cells = value_heads * cells_with_margins(call.spatial_shapes)
    sizes = [max(count * num_heads * num_points, cells) if in_order else 0 for count in counts]
    groups, first_map, first_query = [], 0, 0
    while first_map < batch_size:
        last_map, total = first_map + 1, sizes[first_map]
        while last_map < batch_size and total + sizes[last_map] <= MOST_SORTED:
            total += sizes[last_map]
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
    nothing = grad_output.new_empty(0)
    grad_value = nothing
    if wanted.value and plan.in_order is None:
        # Summed up in 32 bits, whatever the value's dtype.
        grad_value = torch.zeros_like(value, dtype=dtype)
    elif wanted.value:
        grad_value = torch.empty_like(value)
    grad_points = torch.empty_like(points) if wanted.points else nothing
    grad_weights = torch.empty_like(weights) if wanted.weights else nothing
    # Of the weights that logits stand for, and of the locations that are made of references.
    before_softmax, grad_locations = grad_weights, nothing
    if plan.fused and wanted.weights:
        before_softmax = torch.empty_like(weights, dtype=dtype)
    if wanted.references:
        grad_locations = torch.empty_like(points, dtype=dtype)
    tensors = (grad_points, before_softmax, grad_weights, grad_locations)
    inputs = (points, weights, references if plan.fused else weights)
    with device_of(value):
        for group in plan.groups:
            of_group = [_queries_of(tensor, group) for tensor in (*tensors, grad_output, *inputs)]
            _run_group(plan, group, grad_value, value, of_group)
        grad_references = nothing
        if plan.of_references is not None:
            grad_references = torch.empty_like(references)
            _sum_references(plan.of_references, grad_references, grad_locations, points)
    return grad_value.to(value.dtype), grad_references, grad_points, grad_weights


def _queries_of(tensor: Tensor, group: Group) -> Tensor:
    return tensor.flatten(0, 1)[group.queries] if tensor.dim() > 1 else tensor


def _run_group(
    plan: GradientPlan,
    group: Group,
    grad_value: Tensor,
    value: Tensor,
    of_group: Sequence[Tensor],
) -> None:
    *gradients, grad_output, points, weights, references = of_group
    keys = records = grad_output
    num_keys = 0
    if plan.wanted.value:
        grad_value = grad_value[group.maps]
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
                *(grad_output, value[group.maps], points, weights, references),
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
