"""Finds the numbers of heads, levels and points of a module, from its entries and the file's settings.

The entries determine only the product of heads and points of all levels. Nothing is guessed: the rest comes
from settings in the file or from the caller, and every number has to fit the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.checks import to_positive_int

# Names of the settings: on the authors' command lines (nheads, enc_n_points), in RF-DETR (ca_nheads;
# projector_scale has one element per level) and in transformers. {} stands for encoder or decoder, {:.3} for
# its first letters; specific names come before general ones.
NAMES = {
    "num_heads": (
        "{}_cross_attention_heads",
        "{}_attention_heads",
        "{}_num_heads",
        "ca_nheads",
        "nheads",
        "num_attention_heads",
    ),
    "num_levels": ("{}_n_levels", "num_feature_levels", "projector_scale"),
    "num_points": ("{}_n_points", "{}_num_points", "{:.3}_n_points"),
    "method": ("{}_method",),
    "offset_scale": ("{}_offset_scale",),
}
COUNTS = ("num_heads", "num_levels", "num_points")
ROLES = ("encoder", "decoder")
SETTINGS = {name.format(role) for names in NAMES.values() for name in names for role in ROLES}

# The buffers of RT-DETRv2 and D-FINE, upstream and in transformers: 1 / K_l for each point.
SCALES = ("num_points_scale", "n_points_scale")


class Setting(NamedTuple):
    """A number, or a list with one per level, and the source that states it."""

    value: Any
    source: str


class Geometry(NamedTuple):
    """The numbers that a module is made with, and the source of each."""

    num_heads: int
    num_points: list[int]
    sources: dict[str, str]


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers at hand: not sparse, nested or quantized, and not on "meta"."""
    return is_strided(tensor) and not tensor.is_meta


def is_strided(tensor: Tensor) -> bool:
    """Whether the elements of a tensor are plain numbers at strides, on any device."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


def describe_shape(tensor: Tensor) -> str:
    """The shape for a message, or the layout where there is no single shape."""
    if tensor.is_nested:
        return "nested"
    return str(list(tensor.shape)) + ("" if is_strided(tensor) else f" {tensor.layout}")


def join_name(prefix: str, name: str) -> str:
    """The full name of an entry; a module on top has no prefix."""
    return f"{prefix}.{name}" if prefix else name


def select_settings(config: object) -> dict[str, Any]:
    """The known settings of a mapping, an `argparse.Namespace` or a transformers configuration."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        to_dict = getattr(config, "to_dict", None)
        mapping = to_dict() if callable(to_dict) else getattr(config, "__dict__", None)
        if not isinstance(mapping, Mapping):
            raise TypeError(
                "config: expected a mapping, an argparse.Namespace or a transformers configuration, "
                f"got {type(config).__name__}"
            )
        config = mapping
    return {name: value for name, value in config.items() if name in SETTINGS}


def find_setting(name: str, prefix: str, config: Mapping[str, Any]) -> Setting | None:
    """The setting `name`, a key of NAMES, for the module at `prefix`; None if there is none."""
    # transformers' Mask2Former has its encoder within a decoder: the innermost role counts. A module without
    # a role needs settings of both roles that agree.
    role = next((part for part in reversed(prefix.split(".")) if part in ROLES), None)
    for pattern in NAMES[name]:
        keys = [pattern.format(role) for role in ([role] if role else ROLES)]
        settings = [Setting(config[key], key) for key in keys if config.get(key) is not None]
        if settings:
            return settings[0] if _agree(settings[0].value, settings[-1].value) else None
    return None


def _agree(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):  # arrays compare to arrays
        return False


def find_geometry(
    prefix: str,
    rows: int,
    scale: Tensor | None,
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
    make_hint: Callable[[], str] = str,
) -> Geometry:
    """The geometry of the module at `prefix`.

    Args:
        prefix: the module's name, for messages and for its role.
        rows: rows of its attention_weights: heads × points of all levels.
        scale: its buffer of 1 / K_l, if it has one.
        config: the file's settings.
        arguments: COUNTS from the caller, or None; they take precedence over the settings.
        make_hint: makes a text of what else is known about the levels, for the message.

    Raises:
        ValueError: the numbers contradict the shapes or each other, or do not determine the geometry.
    """
    settings = _collect_settings(prefix, config, arguments)
    levels, points = (settings[name].value for name in ("num_levels", "num_points"))
    if scale is not None:
        counts = _parse_scale(prefix, scale, rows)
        settings["num_points"] = Setting(counts, "its buffer")
        if points not in (None, counts, counts[0] if len(set(counts)) == 1 else None):
            raise ValueError(
                f"num_points: expected {counts}, as a buffer of {prefix!r} has it, got {points}"
            )
        points = counts
    heads = settings["num_heads"].value
    misfit = ValueError(
        f"{join_name(prefix, 'attention_weights.weight')}: expected num_heads × the points of all "
        f"levels as rows, with {_describe(settings)}, got {rows}"
    )
    # Numbers in a file can be huge: no list of such a length is made.
    if any(isinstance(count, int) and count > rows for count in (heads, levels, points)):
        raise misfit
    if isinstance(points, list):
        per_level = points
    elif levels and points:
        per_level = [points] * levels
    elif heads and levels:
        per_level = [rows // (heads * levels)] * levels
    elif heads and points:
        per_level = [points] * (rows // (heads * points))
    else:
        raise ValueError(_describe_missing(prefix, rows, settings, make_hint()))
    heads = heads or rows // max(1, sum(per_level))
    if heads * sum(per_level) != rows or levels not in (None, len(per_level)):
        raise misfit
    sources = {name: setting.source or "shapes" for name, setting in settings.items()}
    if settings["num_levels"].value is None and isinstance(points, list):
        sources["num_levels"] = sources["num_points"]
    return Geometry(heads, per_level, sources)


def _collect_settings(
    prefix: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Setting]:
    """The setting for each of COUNTS; Setting(None, "") where there is none."""
    settings = {}
    for name in COUNTS:
        setting = find_setting(name, prefix, config)
        if arguments.get(name) is not None:
            setting = Setting(arguments[name], "argument")
        if setting is None:
            settings[name] = Setting(None, "")
            continue
        value, label = setting.value, name if setting.source == "argument" else setting.source
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if name == "num_points" and is_list:
            value = [to_positive_int(label, count) for count in value]
        elif label == "projector_scale" and is_list:
            value = len(value)
        else:
            value = to_positive_int(label, value)
        settings[name] = Setting(value, setting.source)
    return settings


def _parse_scale(prefix: str, scale: Tensor, rows: int) -> list[int]:
    """The number of points per level, from K_l times the number 1 / K_l, level after level."""
    expected = (
        f"{join_name(prefix, SCALES[0])}: expected 1 / K for each of the K points of a level, level "
        "after level"
    )
    if not is_dense(scale) or not scale.is_floating_point() or scale.numel() > rows:
        raise ValueError(
            f"{expected}, of {rows} rows at most, got {scale.dtype} {describe_shape(scale)}"
        )
    shares = scale.detach().double().flatten().tolist()
    counts: list[int] = []
    total = 0
    while total < len(shares):
        share = shares[total]
        count = round(1 / share) if 1e-6 < share <= 1 else 0
        if shares[total : total + count] != [share] * min(count, len(shares) + 1) or not count:
            break
        counts.append(count)
        total += count
    if not counts or total != len(shares):
        raise ValueError(f"{expected}, got {str(shares)[:200]}")
    return counts


def _describe(settings: Mapping[str, Setting]) -> str:
    return ", ".join(
        f"{name}={setting.value} ({setting.source})"
        for name, setting in settings.items()
        if setting.value is not None
    )


def _describe_missing(prefix: str, rows: int, settings: Mapping[str, Setting], hint: str) -> str:
    missing = [name for name in COUNTS if settings[name].value is None]
    known = _describe(settings)
    return (
        f"{' or '.join(missing)}: expected {'one' if known else 'two'} of them as an argument, "
        f"because the entries of {prefix!r} say only that heads × levels × points = {rows}"
        f"{', and ' + known if known else ''}; got None. Most models have num_heads=8, num_points=4 "
        f"and 3 or 4 levels{hint}"
    )
