"""The parts of a state dict that belong to deformable attention, recognised by their parameters."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saccade.integrations.checkpoints.geometry import SCALES, describe_shape, is_strided, join_name

FIRST = "sampling_offsets.weight"
LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
ENTRIES = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a file that `load` has read.

    Attributes:
        state_dict: the tensors by name.
        config: the settings for the numbers of heads, levels and points, where the file has them (in the
            authors' `args`, or transformers' config.json).
        entry: the path of the state dict in the file, such as "model" or "ema.module"; "" on top.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any]
    entry: str = ""


def attention_prefixes(source: Checkpoint | Mapping[str, Tensor]) -> list[str]:
    """The prefixes of the entries that belong to deformable attention, in the order of the file.

    Names that are not strings and values that are not tensors are passed over.

    Raises:
        TypeError: `source` is neither a Checkpoint nor a mapping.

    Example:
        >>> import saccade, torch
        >>> from saccade.integrations import checkpoints
        >>> attention = saccade.nn.MultiScaleDeformableAttention(64, num_heads=4)
        >>> checkpoints.attention_prefixes(torch.nn.ModuleDict({"cross_attn": attention}).state_dict())
        ['cross_attn']
    """
    return [
        name.removesuffix(FIRST).removesuffix(".")
        for name, tensor in get_state_dict(source).items()
        if isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (name == FIRST or name.endswith("." + FIRST))
    ]


def state_dict_of(source: Checkpoint | Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of one module under the names of `saccade.nn.MultiScaleDeformableAttention`.

    A module that you made yourself loads them strictly:
    `module.load_state_dict(state_dict_of(...))`.

    Args:
        source: what `load` returned, or a state dict.
        prefix: one of `attention_prefixes`.

    Returns:
        The eight tensors, which are not copies.

    Raises:
        TypeError: `source` is neither a Checkpoint nor a mapping, or `prefix` is not a string.
        ValueError: an entry is missing, unknown, of another shape, or not a dense tensor of floating
            point; the message names it.
    """
    state_dict = get_state_dict(source)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    return select_parameters(
        prefix, get_entries(state_dict, prefix), attention_prefixes(state_dict)
    )


def get_state_dict(source: Checkpoint | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint, or the mapping itself."""
    state_dict = source.state_dict if isinstance(source, Checkpoint) else source
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"source: expected a Checkpoint or a mapping of tensors, got {type(source).__name__}"
        )
    return state_dict


def select_parameters(
    prefix: str, entries: Mapping[str, Tensor], prefixes: list[str]
) -> dict[str, Tensor]:
    """The eight parameters among the entries of a module, after their names and shapes are checked."""
    _check_names(prefix, entries, prefixes)
    _check_shapes(prefix, entries)
    return {name: entries[name] for name in ENTRIES}


def get_entries(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under the prefix, by the rest of their names."""
    start = join_name(prefix, "")
    return {
        name.removeprefix(start): tensor
        for name, tensor in state_dict.items()
        if isinstance(name, str) and isinstance(tensor, Tensor) and name.startswith(start)
    }


def group_entries(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The entries under each of `attention_prefixes`, by the rest of their names, in one pass."""
    names = sorted(
        name
        for name, tensor in state_dict.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    )
    groups = {}
    for prefix in attention_prefixes(state_dict):
        start = join_name(prefix, "")
        first = bisect.bisect_left(names, start)
        # "/" follows ".": what begins with the prefix and a dot stands together.
        last = bisect.bisect_left(names, f"{prefix}/") if prefix else len(names)
        groups[prefix] = {name.removeprefix(start): state_dict[name] for name in names[first:last]}
    return groups


def make_level_hint(state_dict: Mapping[str, Tensor], prefix: str) -> str:
    """A part of an error message: the number of rows of a level embedding.

    The rows may belong to other levels than the module's, so that the number is only mentioned.
    """
    entries = []
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        if not is_strided(tensor) or not tensor.dim():
            continue
        parent, _, last = name.rpartition(".")
        if last in ("level_embed", "level_embeds") and (
            not parent or (prefix + ".").startswith(parent + ".")
        ):
            entries.append(name)
    if not entries:
        return ""
    entry = max(entries, key=len)
    return f" ({entry} has {len(state_dict[entry])} rows, perhaps one per level)"


def _check_names(prefix: str, entries: Mapping[str, Tensor], prefixes: list[str]) -> None:
    if FIRST not in entries:
        raise ValueError(f"prefix: expected one of {prefixes}, got {prefix!r}")
    missing = [name for name in ENTRIES if name not in entries]
    if missing:
        absent = {layer for layer in LAYERS[2:] if f"{layer}.weight" not in entries}
        reason = ""
        if len(absent) == 2:
            reason = (
                ": its value comes projected, as in D-FINE. The operator for it is "
                "saccade.fused_deformable_attention; transformers' model runs on Saccade after "
                "saccade.patch(model)"
            )
        elif absent == {"output_proj"}:
            reason = (
                ": BEVFormer's spatial attention keeps it one level up; its module is "
                "saccade.nn.MultiViewDeformableAttention"
            )
        raise ValueError(
            f"{prefix or 'top'}: expected the entries {', '.join(ENTRIES)}, got none for "
            f"{', '.join(missing)}{reason}"
        )
    unknown = [name for name in entries if name not in (*ENTRIES, *SCALES)]
    if unknown:
        raise ValueError(
            f"{prefix or 'top'}: expected only {', '.join(ENTRIES)} and {' or '.join(SCALES)}, got "
            f"{', '.join(unknown)} too: what the module does with it is not known here"
        )


def _check_shapes(prefix: str, entries: Mapping[str, Tensor]) -> None:
    for name in ENTRIES:
        if not is_strided(entries[name]):
            raise ValueError(
                f"{join_name(prefix, name)}: expected a dense tensor of floating point, got "
                f"{entries[name].dtype} {describe_shape(entries[name])}"
            )
    weight = entries[FIRST]
    rows = len(entries["attention_weights.bias"]) if entries["attention_weights.bias"].dim() else 0
    embed_dim = weight.shape[-1] if weight.dim() == 2 else 0
    spatial_dims = len(weight) // rows if weight.dim() and rows else 2
    sizes = {
        "sampling_offsets": rows * (spatial_dims if spatial_dims in (1, 2, 3) else 2),
        "attention_weights": rows,
        "value_proj": embed_dim,
        "output_proj": embed_dim,
    }
    for name in ENTRIES:
        layer, _, kind = name.rpartition(".")
        shape = [sizes[layer], embed_dim] if kind == "weight" else [sizes[layer]]
        if list(entries[name].shape) != shape or not entries[name].is_floating_point():
            raise ValueError(
                f"{join_name(prefix, name)}: expected floating point {shape}, by embed_dim={embed_dim} and "
                f"{rows} rows of attention_weights, got {entries[name].dtype} {list(entries[name].shape)}. "
                "Queries and values must have embed_dim channels, before and after value_proj "
                "(value_proj_ratio=1 in mmcv)"
            )
