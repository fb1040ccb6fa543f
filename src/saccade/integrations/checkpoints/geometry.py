"""How many heads, levels and points a module has: what its entries and the file's settings say.

The entries alone say only heads × points of all levels. Nothing is guessed: what they leave open comes
from the settings that many files carry, or from the caller, and every claim has to fit the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from saccade.checks import to_positive_int

# What the settings are called: on the authors' command lines (nheads, enc_n_points), in RF-DETR
# (ca_nheads; projector_scale has an item a level) and in transformers. {} stands for encoder or decoder,
# {:.3} for its first letters; what is special comes before what is general.
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
NUMBERS = ("num_heads", "num_levels", "num_points")
ROLES = ("encoder", "decoder")
SETTINGS = {name.format(role) for names in NAMES.values() for name in names for role in ROLES}

# The buffers of RT-DETRv2 and D-FINE, upstream and in transformers: 1 / K_l for each point.
SCALES = ("num_points_scale", "n_points_scale")


class Claim(NamedTuple):
    """A number, or a list of one a level, and who says so."""

    value: Any
    source: str


class Geometry(NamedTuple):
    """What a module is made with, and where each number came from."""

    num_heads: int
    num_points: list[int]
    sources: dict[str, str]


def joined(prefix: str, name: str) -> str:
    """The name of an entry; a module on top has no prefix."""
    return f"{prefix}.{name}" if prefix else name


def plain_settings(config: object) -> dict[str, Any]:
    """The settings that matter of a mapping, an `argparse.Namespace` or a transformers config."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        to_dict = getattr(config, "to_dict", None)
        found = to_dict() if callable(to_dict) else getattr(config, "__dict__", None)
        if not isinstance(found, Mapping):
            raise TypeError(
                "config: expected a mapping, an argparse.Namespace or a transformers configuration, "
                f"got {type(config).__name__}"
            )
        config = found
    return {name: value for name, value in config.items() if name in SETTINGS}


def find_setting(name: str, prefix: str, config: Mapping[str, Any]) -> Claim | None:
    """What the settings say about `name`, a key of NAMES, for the module at `prefix`."""
    # transformers' Mask2Former has its encoder within a decoder: the innermost counts. A module by itself
    # is neither; then both must agree.
    role = next((part for part in reversed(prefix.split(".")) if part in ROLES), None)
    for pattern in NAMES[name]:
        keys = [pattern.format(role) for role in ([role] if role else ROLES)]
        found = [Claim(config[key], key) for key in keys if config.get(key) is not None]
        if found:
            return found[0] if found[0].value == found[-1].value else None
    return None


def find_geometry(
    prefix: str,
    rows: int,
    scale: Tensor | None,
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
    hint: str = "",
) -> Geometry:
    """The geometry of the module at `prefix`.

    Args:
        prefix: its name, for messages and for its role.
        rows: rows of its attention_weights: heads × points of all levels.
        scale: its buffer of 1 / K_l, if it has one.
        config: the file's settings.
        arguments: NUMBERS as the caller gave them, or None; they go before the settings.
        hint: what else is known about the levels, for the message.

    Raises:
        ValueError: the claims contradict the shapes or each other, or leave the geometry open.
    """
    claims = _claims(prefix, config, arguments)
    levels, points = (claims[name].value for name in ("num_levels", "num_points"))
    if scale is not None:
        found = _points_of_scale(prefix, scale)
        claims["num_points"] = Claim(found, "its buffer")
        if points not in (None, found, found[0] if len(set(found)) == 1 else None):
            raise ValueError(
                f"num_points: expected {found}, as a buffer of {prefix!r} has it, got {points}"
            )
        points = found
    heads = claims["num_heads"].value
    misfit = ValueError(
        f"{joined(prefix, 'attention_weights.weight')}: expected num_heads × the points of all levels "
        f"as rows, with {_said(claims)}, got {rows}"
    )
    # A file may say anything; lists of that length are not made.
    if any(isinstance(number, int) and number > rows for number in (heads, levels, points)):
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
        raise ValueError(_question(prefix, rows, claims, hint))
    heads = heads or rows // max(1, sum(per_level))
    if heads * sum(per_level) != rows or levels not in (None, len(per_level)):
        raise misfit
    sources = {name: claim.source or "shapes" for name, claim in claims.items()}
    if claims["num_levels"].value is None and isinstance(points, list):
        sources["num_levels"] = sources["num_points"]
    return Geometry(heads, per_level, sources)


def _claims(
    prefix: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Claim]:
    """What is said about each of NUMBERS; nothing is Claim(None, "")."""
    claims = {}
    for name in NUMBERS:
        given = arguments.get(name)
        claim = find_setting(name, prefix, config) if given is None else Claim(given, "argument")
        if claim is None:
            claims[name] = Claim(None, "")
            continue
        value, label = claim.value, name if claim.source == "argument" else claim.source
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if name == "num_points" and is_list:
            value = [to_positive_int(label, count) for count in value]
        elif label == "projector_scale" and is_list:
            value = len(value)
        else:
            value = to_positive_int(label, value)
        claims[name] = Claim(value, claim.source)
    return claims


def _points_of_scale(prefix: str, scale: Tensor) -> list[int]:
    """The points of each level, from K_l times the number 1 / K_l, level after level."""
    numbers = scale.detach().double().flatten().tolist()
    counts: list[int] = []
    while sum(counts) < len(numbers):
        number = numbers[sum(counts)]
        count = round(1 / number) if 1e-6 < number <= 1 else 0
        if numbers[sum(counts) : sum(counts) + count] != [number] * count or not count:
            break
        counts.append(count)
    if not counts or sum(counts) != len(numbers):
        raise ValueError(
            f"{joined(prefix, SCALES[0])}: expected 1 / K for each of the K points of a level, level "
            f"after level, got {numbers}"
        )
    return counts


def _said(claims: Mapping[str, Claim]) -> str:
    return ", ".join(
        f"{name}={claim.value} ({claim.source})"
        for name, claim in claims.items()
        if claim.value is not None
    )


def _question(prefix: str, rows: int, claims: Mapping[str, Claim], hint: str) -> str:
    missing = [name for name in NUMBERS if claims[name].value is None]
    known = _said(claims)
    return (
        f"{' or '.join(missing)}: expected {'one' if known else 'two'} of them as an argument, "
        f"because the entries of {prefix!r} say only that heads × levels × points = {rows}"
        f"{', and ' + known if known else ''}; got None. Most models have num_heads=8, num_points=4 "
        f"and 3 or 4 levels{hint}"
    )
