"""Explains one query of a module that the user saved."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.checks import apply_value_padding_mask, parse_spatial_shapes
from saccade.nn import DeformableAttention, MultiScaleDeformableAttention
from saccade.sampling import Sampling
from saccade.vision.explain import Explanation, HeadParts, check, list_points, take_apart

Module = DeformableAttention | MultiScaleDeformableAttention

# Classes that a saved module may contain. Nothing else is unpickled, so no foreign code runs.
_ALLOWED = [DeformableAttention, MultiScaleDeformableAttention, torch.nn.Linear, set]


def load_module(path: Path) -> Module:
    """Loads a module that `torch.save(module, path)` wrote, without running foreign code.

    Raises:
        ValueError: the file is missing, is not a torch file, or holds an object other than a
            `saccade.nn.DeformableAttention` or `saccade.nn.MultiScaleDeformableAttention`.
    """
    loaded = _load("MODULE", path)
    if not isinstance(loaded, DeformableAttention | MultiScaleDeformableAttention):
        hint = " (a state dict? save the module itself)" if isinstance(loaded, dict) else ""
        raise ValueError(
            "MODULE: expected a saccade.nn.DeformableAttention or MultiScaleDeformableAttention "
            f"saved by torch.save(module, path), {path} holds a {type(loaded).__name__}{hint}"
        )
    return loaded.eval()


def load_inputs(path: Path, module: Module) -> dict[str, Any]:
    """Loads the keyword arguments of the module's forward that `torch.save(dict, path)` wrote.

    Raises:
        ValueError: the file is missing, is not a torch file, does not hold a dict, or its keys are
            not the arguments of the module's forward.
    """
    inputs = _load("INPUTS", path)
    signature = inspect.signature(module.forward)
    parameters = [name for name in signature.parameters if name != "return_sampling"]
    required = [
        name for name in parameters if signature.parameters[name].default is inspect.Parameter.empty
    ]
    if not isinstance(inputs, dict):
        raise ValueError(
            f"INPUTS: expected a dict with the arguments of {type(module).__name__}.forward "
            f"({', '.join(parameters)}), {path} holds a {type(inputs).__name__}"
        )
    inputs.pop("return_sampling", None)
    unknown = [str(name) for name in inputs if name not in parameters]
    missing = [name for name in required if name not in inputs]
    if unknown or missing:
        raise ValueError(
            f"INPUTS: expected the arguments of {type(module).__name__}.forward "
            f"({', '.join(parameters)}), {path} "
            + " and ".join(
                f"{verb} {', '.join(names)}"
                for verb, names in (("lacks", missing), ("has in addition", unknown))
                if names
            )
        )
    return inputs


def _load(name: str, path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"{name}: the file {path} does not exist")
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types for other files
        reason = str(error)
        if "Unsupported global" in reason or "GLOBAL" in reason:
            global_name = reason.partition("GLOBAL ")[2].partition(" ")[0]
            reason = (
                f"it contains {global_name or 'objects'} besides tensors and Saccade's modules, "
                "and is not opened because such a file can run any code"
            )
        else:
            reason = (
                "it was not written by torch.save "
                f"({reason.splitlines()[0] if reason else error!r})"
            )
        raise ValueError(f"{name}: cannot load {path}: {reason}") from error


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
        module: `saccade.nn.DeformableAttention` or `saccade.nn.MultiScaleDeformableAttention`.
        inputs: the keyword arguments of its forward, for example `query` [B, Q, C].
        query: index of the query, 0 <= query < Q.
        batch: index of the batch element.
        head: index of the head whose points are listed; the checks cover all heads.
        channel: index of the channel of the head's values that is shown.

    Returns:
        Explanation: its checks compare, for this query, the sums over the points of every head
        with the input of the module's output projection, and the projection of these sums with
        the module's output.

    Raises:
        ValueError: an index is out of range, the module refuses the inputs, or it reads lines or
            volumes, which cannot be explained yet.
    """
    if module.spatial_dims != 2:
        raise ValueError(f"module: expected spatial_dims 2, got {module.spatial_dims}")
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
    assert isinstance(sampling, Sampling)
    attended = recorded["attended"]
    value, shapes = _projected_value(module, inputs, recorded)
    batch_size, num_queries, num_heads = sampling.attention_weights.shape[:3]
    head_dim = value.shape[3]
    for name, index, size in (
        ("batch", batch, batch_size),
        ("query", query, num_queries),
        ("head", head, num_heads),
        ("channel", channel, head_dim),
    ):
        if not 0 <= index < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {index}")

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
