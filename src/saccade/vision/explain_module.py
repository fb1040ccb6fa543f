"""Explains one query of a module that the user saved."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from saccade.checks import (
    VALUE_DTYPES,
    apply_value_padding_mask,
    check_floating,
    check_tensor,
    parse_spatial_shapes,
)
from saccade.nn import DeformableAttention, MultiScaleDeformableAttention
from saccade.sampling import Sampling
from saccade.vision.explain import (
    Explanation,
    HeadParts,
    check,
    list_points,
    take_apart,
)

Module = DeformableAttention | MultiScaleDeformableAttention

MAX_POINTS = 2**26
"""A call that is explained has at most so many points of all queries and heads."""


def explain_module(
    module: Module,
    inputs: dict[str, Any],
    *,
    query: int = 0,
    batch: int = 0,
    head: int = 0,
    channel: int = 0,
) -> Explanation:
    """Explains one query of a module, for one head.

    Args:
        module: `saccade.nn.DeformableAttention` or `saccade.nn.MultiScaleDeformableAttention`, in
            any dtype, in training or evaluation mode.
        inputs: the keyword arguments of its forward, for example `query` [B, Q, C], in the dtype and
            on the device of the module.
        query: index of the query, 0 <= query < Q.
        batch: index of the batch element.
        head: index of the head whose points are listed; the checks cover all heads.
        channel: index of the channel of the head's values that is shown.

    Returns:
        Explanation: its checks compare, for this query, the sums over the points of every head
        with the input of the module's output projection, and the projection of these sums with
        the module's output.

    Raises:
        TypeError: the module is of another class, or an argument is of the wrong kind.
        ValueError: an index is out of range, the module lacks a layer or refuses the inputs, or it
            reads lines or volumes, which cannot be explained yet.
    """
    _check_module(module)
    _check_inputs(module, inputs)
    _check_index("batch", batch, inputs["query"].shape[0])
    _check_index("query", query, inputs["query"].shape[1])
    _check_index("head", head, module.num_heads)
    recorded: dict[str, Tensor] = {}
    hooks = [module.output_proj.register_forward_hook(_record(recorded, "attended"))]
    if module.value_proj is not None:
        hooks.append(module.value_proj.register_forward_hook(_record(recorded, "value")))
    try:
        with torch.no_grad():
            output, sampling = module(**inputs, return_sampling=True)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(sampling, Sampling):
        raise TypeError(
            "module: expected a forward that returns a Sampling with return_sampling, got "
            f"{type(sampling).__name__}"
        )
    attended = recorded["attended"]
    value, shapes = _projected_value(module, inputs, recorded)
    num_queries, num_heads = sampling.attention_weights.shape[1:3]
    head_dim = value.shape[3]
    _check_index("channel", channel, head_dim)

    def take_head_apart(head: int) -> HeadParts:
        return take_apart(
            value[batch, :, head if value.shape[2] > 1 else 0],
            shapes,
            sampling.sampling_locations[batch, query, head],
            module.num_points,
            interpolation=module.interpolation,
            padding=module.padding,
        )

    weights = sampling.attention_weights[batch, query]  # [M, P]
    every_head = [take_head_apart(index) for index in range(num_heads)]
    sums = torch.cat(
        [weights[index].to(parts.read) @ parts.read for index, parts in enumerate(every_head)]
    )
    with torch.no_grad():
        projected = module.output_proj(sums.to(attended.dtype))
    shown_value = value[batch, :, head if value.shape[2] > 1 else 0, channel]
    position = head * head_dim + channel
    return Explanation(
        subject=(
            f"{type(module).__name__}: query {query} of {num_queries}, batch element {batch}, "
            f"head {head} of {num_heads}"
        ),
        spatial_shapes=shapes,
        coordinates="normalized",
        interpolation=module.interpolation,
        padding=module.padding,
        reference=[
            tuple(float(coordinate) for coordinate in reference)
            for reference in sampling.reference_points[batch, query].tolist()
        ],
        points=list_points(
            every_head[head],
            sampling.sampling_offsets[batch, query, head],
            sampling.sampling_locations[batch, query, head],
            weights[head],
            module.num_points,
            channel,
        ),
        maps=[
            level.reshape(shape)
            for level, shape in zip(
                shown_value.split([height * width for height, width in shapes]), shapes, strict=True
            )
        ],
        channel=channel,
        num_channels=head_dim,
        by_hand=float(sums[position]),
        library=float(attended[batch, query, position]),
        checks=[
            check("sums of all heads, the module's attended value", sums, attended[batch, query]),
            check("their output projection, the module's output", projected, output[batch, query]),
        ],
    )


def _check_module(module: object) -> None:
    """Raises unless the module is one that can be explained and has all its layers."""
    if not isinstance(module, DeformableAttention | MultiScaleDeformableAttention):
        raise TypeError(
            "module: expected a saccade.nn.DeformableAttention or MultiScaleDeformableAttention, "
            f"got {type(module).__name__}"
        )
    for name in ("sampling_offsets", "attention_weights", "output_proj"):
        if not isinstance(getattr(module, name, None), nn.Module):
            raise TypeError(f"module: expected a layer {name}, got none")
    for name in ("spatial_dims", "num_heads", "num_points", "interpolation", "padding"):
        if not hasattr(module, name):
            raise TypeError(f"module: expected an attribute {name}, got none")
    if not hasattr(module, "value_proj"):
        raise TypeError("module: expected a layer value_proj, or None in its place, got neither")
    if module.spatial_dims != 2:
        raise ValueError(f"module: expected spatial_dims 2, got {module.spatial_dims}")
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"module: expected numbers in {name}, got a meta tensor, which has none"
            )


def _check_inputs(module: Module, inputs: dict[str, Any]) -> None:
    """Raises unless the inputs fit the layers in dtype and device; the module checks their shapes."""
    if not isinstance(inputs, dict):
        raise TypeError(f"inputs: expected a dict, got {type(inputs).__name__}")
    if inputs.get("queries_per_map") is not None:
        raise ValueError(
            "queries_per_map: expected none, because queries [T, C] cannot be explained yet"
        )
    map_name = "value" if isinstance(module, MultiScaleDeformableAttention) else "feature_map"
    map_layer = module.output_proj if module.value_proj is None else module.value_proj
    for name, layer in (("query", module.sampling_offsets), (map_name, map_layer)):
        if name not in inputs:
            raise ValueError(f"inputs: expected the argument {name}, got none")
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            check_floating(name, inputs[name], (weight.dtype,), weight.device)
        else:
            check_tensor(name, inputs[name])
    query = inputs["query"]
    reference_points = inputs.get("reference_points")
    if isinstance(reference_points, Tensor):
        check_floating("reference_points", reference_points, VALUE_DTYPES, query.device)
    if query.dim() != 3:
        raise ValueError(f"query: expected [batch, queries, channels], got {list(query.shape)}")
    num_points = query.shape[0] * query.shape[1] * module.num_heads * sum(module.num_points)
    if num_points > MAX_POINTS:
        raise ValueError(
            f"query: expected at most {MAX_POINTS} points of all queries and heads, got {num_points}"
        )


def _check_index(name: str, index: object, size: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"{name}: expected an int, got {index!r}")
    if not 0 <= index < size:
        expected = f"0 to {size - 1}" if size else "inputs that have one"
        raise ValueError(f"{name}: expected {expected}, got {index}")


def _record(recorded: dict[str, Tensor], name: str) -> Any:
    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recorded[name] = inputs[0] if name == "attended" else output

    return hook


def _projected_value(
    module: Module, inputs: dict[str, Any], recorded: dict[str, Tensor]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Returns the value that the operator read, [B, S, M or 1, D], and its spatial shapes."""
    if isinstance(module, MultiScaleDeformableAttention):
        shapes = parse_spatial_shapes(inputs["spatial_shapes"])
        flat = recorded["value"]
    else:
        feature_map = inputs["feature_map"]
        shapes = [tuple(feature_map.shape[1:3])]
        flat = recorded.get("value", feature_map.flatten(1, 2))
    heads = 1 if module.value_proj is None else module.num_heads
    value = flat.unflatten(-1, (heads, -1))
    mask = inputs.get("value_padding_mask")
    return (value if mask is None else apply_value_padding_mask(value, mask.flatten(1))), shapes
