"""Makes the attention modules of a checkpoint and loads their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.call import Interpolation, Padding
from saccade.integrations.checkpoints.geometry import (
    SCALES,
    find_geometry,
    find_setting,
    select_settings,
)
from saccade.integrations.checkpoints.state_dict_parts import (
    FIRST,
    LAYERS,
    Checkpoint,
    get_state_dict,
    group_entries,
    make_level_hint,
    select_parameters,
)
from saccade.integrations.operators import METHODS
from saccade.nn import MultiScaleDeformableAttention


class AttentionModules(dict[str, MultiScaleDeformableAttention]):
    """The modules by the prefix of their entries; `print` shows their sizes and the source of each size."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, dict[str, str]] = {}

    def __str__(self) -> str:
        lines = [f"modules of deformable attention: {len(self)}"]
        for prefix, module in self.items():
            counts = {
                "num_heads": module.num_heads,
                "num_levels": module.num_levels,
                "num_points": module.num_points,
            }
            described = ", ".join(
                f"{name}={count} ({self.sources[prefix][name]})" for name, count in counts.items()
            )
            lines.append(f"  {prefix or '(top)'}: embed_dim={module.embed_dim}, {described}")
        return "\n".join(lines)


def attention_modules(
    source: Checkpoint | Mapping[str, Tensor],
    config: object = None,
    *,
    prefix: str = "",
    num_heads: int | None = None,
    num_levels: int | None = None,
    num_points: int | Sequence[int] | None = None,
    interpolation: Interpolation | None = None,
    padding: Padding | None = None,
) -> AttentionModules:
    """The attention modules of a checkpoint, with copies of its weights.

    Shapes alone do not determine the numbers of heads, levels and points. They come from the buffers of
    RT-DETRv2 and D-FINE, the settings in the file or in `config`, and the arguments, which take
    precedence over the settings. Two of the three numbers are enough. Nothing is guessed: numbers that
    contradict the shapes or do not suffice are an error.

    Args:
        source: what `load` returned, or a state dict such as `model.state_dict()`.
        config: a transformers configuration, an `argparse.Namespace` or a mapping with the settings,
            instead of those of the file.
        prefix: only the modules under this name, such as "transformer.encoder".
        num_heads: heads M of each module.
        num_levels: levels L of each module.
        num_points: points of a head per level, one number or a list of L numbers.
        interpolation: as in `saccade.deformable_attention`; None: by the settings, else "linear".
        padding: the same; None: by the settings, else "zeros". What RT-DETRv2 and D-FINE call discrete
            is interpolation="discrete" with padding="border" in transformers, and "border_height" in
            the authors' code.

    Returns:
        AttentionModules: the modules by prefix, of the checkpoint's dtype, on its device. Their
        `value_padding_mask` is True for padding, as in the authors' code; transformers' mask is True
        for what to keep.

    Raises:
        TypeError: `source` is not a mapping, `config` has no settings, or a number is not an int.
        ValueError: entries are missing, unknown or do not fit; numbers contradict the shapes or are
            not known; nothing under `prefix` is attention. The message names the entry or argument.

    Example:
        >>> import saccade, torch
        >>> from saccade.integrations import checkpoints
        >>> attention = saccade.nn.MultiScaleDeformableAttention(64, num_heads=4, num_levels=2)
        >>> weights = torch.nn.ModuleDict({"cross_attn": attention}).state_dict()
        >>> modules = checkpoints.attention_modules(weights, num_heads=4, num_levels=2)
        >>> modules["cross_attn"].num_points
        [4, 4]
    """
    if isinstance(source, Checkpoint):
        config = source.config if config is None else config
    state_dict = get_state_dict(source)
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    settings = select_settings(config)
    groups = group_entries(state_dict)
    prefixes = list(groups)
    selected = [name for name in prefixes if not prefix or (name + ".").startswith(prefix + ".")]
    if not selected:
        raise ValueError(
            f"prefix: expected the beginning of one of {prefixes}, got {prefix!r}"
            if prefixes
            else f"source: expected entries that end in {FIRST}, got {len(state_dict)} others"
        )
    arguments = {"num_heads": num_heads, "num_levels": num_levels, "num_points": num_points}
    modules = AttentionModules()
    for name in selected:
        entries = groups[name]
        weights = select_parameters(name, entries, prefixes)
        geometry = find_geometry(
            name,
            len(weights["attention_weights.weight"]),
            next((entries[scale] for scale in SCALES if scale in entries), None),
            settings,
            arguments,
            partial(make_level_hint, state_dict, name),
        )
        options = _options(name, settings)
        options |= {"interpolation": interpolation} if interpolation is not None else {}
        options |= {"padding": padding} if padding is not None else {}
        offsets, logits = (len(weights[f"{layer}.weight"]) for layer in LAYERS[:2])
        try:
            # On this device parameters need neither memory nor random numbers; the entries replace them.
            with torch.device("meta"):
                module = MultiScaleDeformableAttention(
                    weights[FIRST].shape[1],
                    geometry.num_heads,
                    len(geometry.num_points),
                    geometry.num_points,
                    spatial_dims=offsets // logits,
                    **options,
                )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        copies = {entry: tensor.detach().clone() for entry, tensor in weights.items()}
        module.load_state_dict(copies, strict=True, assign=True)
        modules[name] = module
        modules.sources[name] = geometry.sources
    return modules


def _options(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options of a module, from the settings."""
    scale = find_setting("offset_scale", prefix, settings)
    if scale is not None and scale.value != 0.5:
        raise ValueError(
            f"{scale.source}: expected 0.5, the share of a box that Deformable DETR takes for "
            f"offsets, got {scale.value!r} for {prefix!r}"
        )
    method = find_setting("method", prefix, settings)
    if method is None:
        return {}
    if not isinstance(method.value, str) or method.value not in METHODS:
        raise ValueError(
            f"{method.source}: expected one of {', '.join(map(repr, METHODS))}, got "
            f"{method.value!r} for {prefix!r}"
        )
    return dict(METHODS[method.value][0])
