"""Reads files of weights without running anything that they contain.

A pickle is a program, which `pickle.load` runs. Here torch's own restricted reader opens files of
`torch.save`, and `pickles` opens arrays.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.integrations.checkpoints.geometry import is_dense, select_settings
from saccade.integrations.checkpoints.pickle_bounds import BoundError, Limits, check_pickle
from saccade.integrations.checkpoints.pickles import ArrayReader, get_stand_ins, to_plain
from saccade.integrations.checkpoints.state_dict_parts import (
    FIRST,
    Checkpoint,
    attention_prefixes,
    group_entries,
)
from saccade.integrations.checkpoints.untrusted import (
    INDEX,
    WEIGHTS,
    RefusedGlobalError,
    find_weights,
    is_torch_file,
    load_open_torch,
    map_file,
    named_errors,
    open_regular,
    read_json,
)

# State dicts are searched in nested mappings to this depth: that of {"ema": {"module": ...}} is 2.
MAX_DEPTH = 4
OBJECTS_PER_TENSOR = 30  # of a pickle; a file of safetensors has the same bound on tensors
# Settings are numbers, names, and lists with an element per level. Longer ones are something else.
LONGEST_SETTING = 1000
EXPECTED = "a file that torch.save or safetensors wrote, or a pickle of arrays"


def load(
    path: str | PathLike[str], *, entry: str | None = None, limits: Limits | None = None
) -> Checkpoint:
    """The state dict of a file, read without running anything that the file contains.

    Args:
        path: a file of `torch.save` (.pth, .pt, .bin, .ckpt), of safetensors, a pickle of numpy
            arrays as detectron2 publishes them (.pkl), or a folder of transformers' `save_pretrained`,
            in one piece or in shards.
        entry: the path of the state dict, for files that hold several, such as "model" or "ema.module".
        limits: bounds on what the file may make the reader do; by default `Limits()`.

    Raises:
        OSError: the file does not exist, cannot be opened, or a folder has no weights; most often
            FileNotFoundError.
        ModuleNotFoundError: the file is a .safetensors file, and safetensors is not installed.
        ValueError: the file is broken, exceeds a bound or is not a regular file; it holds pickled objects
            (the message names them), no deformable attention, or several state dicts that differ.

    Safety:
        torch reads with `weights_only=True`, to which `argparse.Namespace` is added: the authors'
        files have one in `args`. Arrays and numbers of numpy are read without importing anything. All
        pickles and archives are checked against `limits` before they are read.

    Example:
        >>> import tempfile, torch, saccade
        >>> from saccade.integrations import checkpoints
        >>> attention = saccade.nn.MultiScaleDeformableAttention(64, num_heads=4)
        >>> weights = {f"encoder.{name}": tensor for name, tensor in attention.state_dict().items()}
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save({"model": weights, "args": {"nheads": 4, "enc_n_points": 4}}, file.name)
        ...     checkpoint = checkpoints.load(file.name)
        >>> checkpoint
        Checkpoint(config={'nheads': 4, 'enc_n_points': 4}, entry='model')
        >>> print(checkpoints.attention_modules(checkpoint))
        modules of deformable attention: 1
          encoder: embed_dim=64, num_heads=4 (nheads), num_levels=4 (shapes), num_points=[4, 4, 4, 4] (enc_n_points)
    """
    path, limits = Path(path), limits or Limits()
    if path.is_dir():
        content, settings, size = _read_folder(path, limits)
    else:
        (content, size), settings = _read_file(path, limits), None
    # A list, because keys with dots can give two state dicts the same path.
    candidates = [
        (name, tensors)
        for name, tensors in _iterate_state_dicts(content)
        if entry is None or name == entry
    ]
    if not candidates:
        expected = "a state dict" if entry is None else f"entry {entry!r}"
        raise ValueError(
            f"{path}: expected {expected} with entries that end in {FIRST}, got "
            f"{', '.join(map(_to_text, list(content)[:6]))} ({len(content)} in all)"
        )
    name, state_dict = candidates[0]
    attention = _collect_attention(state_dict)
    for other, tensors in candidates[1:]:
        if not _same_attention(attention, _collect_attention(tensors)):
            names = ", ".join(dict.fromkeys(repr(name) for name, _ in candidates))
            raise ValueError(
                f"entry: expected one of {names}, because {name!r} and {other!r} of {path} differ, "
                f"got {entry!r}"
            )
    _check_size(path, attention, size + limits.expansion)
    config = _collect_settings(content) if settings is None else select_settings(settings)
    return Checkpoint(state_dict, config, name)


def _iterate_state_dicts(
    content: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The mappings with entries of deformable attention, each after its path in the file."""
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if attention_prefixes(tensors):
        yield ".".join(path), tensors
    elif len(path) < MAX_DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _iterate_state_dicts(value, (*path, str(key)))


def _collect_attention(state_dict: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The entries of each attention module, by the ends of their names, in an order that copies share."""
    return [entries for _, entries in sorted(group_entries(state_dict).items(), key=lambda x: x[0])]


def _same_attention(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    """Whether both hold the same weights, under any prefixes: Lightning's files have them twice."""
    return len(one) == len(other) and all(
        first.keys() == second.keys()
        and all(_is_same(tensor, second[name]) for name, tensor in first.items())
        for first, second in zip(one, other, strict=True)
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type and have the same numbers, NaN among them."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not is_dense(one) or not is_dense(other):
        return False
    # Bytes are compared, because NaN differs from itself.
    first, second = (
        tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other)
    )
    return torch.equal(first, second)


def _check_size(path: Path, attention: list[dict[str, Tensor]], bound: int) -> None:
    """Refuses entries that share what the file has once so often that copies would fill the memory."""
    size = sum(
        tensor.numel() * tensor.element_size()
        for entries in attention
        for tensor in entries.values()
    )
    if size > bound:
        raise BoundError(
            f"{path}: expected attention weights of at most {bound} bytes, the file's and those of "
            f"limits.expansion, got {size}"
        )


def _to_text(key: object) -> str:
    """A key of a mapping for a message: short, and printable."""
    text = key if isinstance(key, str) and key.isprintable() else ascii(key)
    return text if len(text) <= 60 else text[:60] + "…"


def _collect_settings(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings beside the state dict, in entries of any name."""
    config: dict[str, Any] = {}
    for value in content.values():
        beside = vars(value) if isinstance(value, argparse.Namespace) else value
        for name, setting in select_settings(
            beside if isinstance(beside, Mapping) else None
        ).items():
            plain = _to_setting(setting)
            # Of two settings that contradict each other neither counts: None leaves the number open.
            config[name] = plain if config.get(name, plain) == plain else None
    return config


def _to_setting(setting: Any) -> Any:
    """A setting that is a number, a name or a list of them; None for anything else."""
    if isinstance(setting, Tensor):  # a number of numpy
        is_number = is_dense(setting) and setting.dim() == 0
        return setting.item() if is_number else None
    if isinstance(setting, list | tuple):
        plain = [_to_setting(element) for element in setting[:LONGEST_SETTING]]
        is_short = len(setting) <= LONGEST_SETTING
        flat = not any(isinstance(element, list) for element in plain)
        return plain if is_short and flat else None
    if isinstance(setting, str):
        return setting if len(setting) <= LONGEST_SETTING else None
    return setting if isinstance(setting, int | float) else None


def _read_folder(folder: Path, limits: Limits) -> tuple[dict[Any, Any], dict[str, Any], int]:
    """The weights and the configuration that transformers' `save_pretrained` wrote, and the bytes read."""
    config = folder / "config.json"
    settings = read_json(config) if config.exists() else {}
    files = find_weights(folder)
    if not files:
        expected = ", ".join(f"{name}, {name}{INDEX}" for name in WEIGHTS)
        raise FileNotFoundError(f"path: expected a folder with one of {expected}, got {folder}")
    state_dict: dict[Any, Any] = {}
    total = 0
    for file in files:
        content, size = _read_file(file, limits)
        state_dict |= content
        total += size
    return state_dict, settings, total


def _read_file(path: Path, limits: Limits) -> tuple[dict[Any, Any], int]:
    """The content of a file, a state dict or a mapping that has one somewhere, and the bytes read."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if path.suffix == ".safetensors":
            content: Any = _read_safetensors(path, limits)
        elif is_torch_file(file):
            try:
                # Many authors, those of Deformable DETR first, save their command line with the weights.
                # A Namespace holds values and does nothing. Best scores are often numbers of numpy.
                allowed = [argparse.Namespace, *get_stand_ins()]
                content = load_open_torch(
                    file, path, allowed=allowed, limits=limits, expected=EXPECTED
                )
            except RefusedGlobalError as error:
                if not error.can_be_allowed:
                    raise
                raise ValueError(str(error) + _ADVICE.format(error.name)) from None
        else:
            with named_errors(path, EXPECTED):
                with map_file(file) as data:
                    check_pickle(data, limits)
                content = ArrayReader(file, path).load()
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    with named_errors(path, EXPECTED):
        return to_plain(content, MAX_DEPTH), size


# Added for names that the caller may allow; torch refuses some names always.
_ADVICE = (
    " If you trust the file and {0}, allow it around the call by torch.serialization.safe_globals, or "
    "open the file yourself and give its state dict to attention_modules."
)


def _read_safetensors(path: Path, limits: Limits) -> dict[str, Tensor]:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            f"{path}: reading it needs safetensors, not installed here: pip install safetensors"
        )
    with named_errors(path, EXPECTED):
        with importlib.import_module("safetensors").safe_open(path, framework="pt") as file:
            count, bound = len(file.keys()), limits.objects // OBJECTS_PER_TENSOR
        if count > bound:
            raise BoundError(
                f"expected at most {bound} tensors (objects / {OBJECTS_PER_TENSOR}), got {count}"
            )
        state_dict: dict[str, Tensor] = importlib.import_module("safetensors.torch").load_file(path)
    return state_dict
