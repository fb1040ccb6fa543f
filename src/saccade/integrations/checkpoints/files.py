"""Reads files of weights without running anything that they contain.

A pickle is a program, which `pickle.load` runs. Here torch's own restricted reader opens files of
`torch.save`, and `pickles` opens arrays.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from saccade.integrations.checkpoints.geometry import select_settings
from saccade.integrations.checkpoints.pickles import ArrayReader, RefusedError, to_tensors
from saccade.integrations.checkpoints.state_dict_parts import (
    FIRST,
    Checkpoint,
    attention_prefixes,
    get_entries,
)

# Before torch.save wrote zip archives, its files began with this number, pickled.
LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
# State dicts are searched in nested mappings to this depth: that of {"ema": {"module": ...}} is 2.
MAX_DEPTH = 4
INDEX = ".index.json"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


def load(path: str | PathLike[str], *, entry: str | None = None) -> Checkpoint:
    """The state dict of a file, read without running anything that the file contains.

    Args:
        path: a file of `torch.save` (.pth, .pt, .bin, .ckpt), of safetensors, a pickle of numpy
            arrays as detectron2 publishes them (.pkl), or a folder of transformers' `save_pretrained`,
            in one piece or in shards.
        entry: the path of the state dict, for files that hold several, such as "model" or "ema.module".

    Raises:
        FileNotFoundError: the file does not exist, or a folder has no weights.
        ModuleNotFoundError: the file is a .safetensors file, and safetensors is not installed.
        ValueError: the file holds pickled objects (the message names them), no deformable attention,
            or several state dicts that differ.

    Safety:
        torch reads with `weights_only=True`, to which `argparse.Namespace` is added: the authors'
        files have one in `args`. Pickles of arrays are read without importing anything.

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
    path = Path(path)
    content, settings = _read_folder(path) if path.is_dir() else (_read_file(path), None)
    candidates = dict(_iterate_state_dicts(content))
    if entry is not None:
        candidates = {name: tensors for name, tensors in candidates.items() if name == entry}
    if not candidates:
        expected = "a state dict" if entry is None else f"entry {entry!r}"
        raise ValueError(
            f"{path}: expected {expected} with entries that end in {FIRST}, got "
            f"{', '.join(map(str, list(content)[:6]))} ({len(content)} in all)"
        )
    name, state_dict = next(iter(candidates.items()))
    for other, tensors in candidates.items():
        if not _same_attention(state_dict, tensors):
            raise ValueError(
                f"entry: expected one of {', '.join(map(repr, candidates))}, because {name!r} and "
                f"{other!r} of {path} differ, got None"
            )
    config = _collect_settings(content) if settings is None else select_settings(settings)
    return Checkpoint(state_dict, config, name)


def _iterate_state_dicts(
    content: Mapping[Any, Any], name: str = ""
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The mappings with entries of deformable attention, each after its path in the file."""
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if attention_prefixes(tensors):
        yield name, tensors
    elif name.count(".") < MAX_DEPTH - 1:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _iterate_state_dicts(value, f"{name}.{key}" if name else str(key))


def _same_attention(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same weights, under any prefixes: Lightning's files have them twice."""
    both = [
        [
            tensor
            for prefix in attention_prefixes(each)
            for tensor in get_entries(each, prefix).values()
        ]
        for each in (one, other)
    ]
    return len(both[0]) == len(both[1]) and all(
        first.dtype == second.dtype and torch.equal(first, second)
        for first, second in zip(*both, strict=True)
    )


def _collect_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings beside the state dict, in entries of any name."""
    config: dict[str, Any] = {}
    for value in content.values():
        beside = vars(value) if isinstance(value, argparse.Namespace) else value
        for name, number in select_settings(
            beside if isinstance(beside, Mapping) else None
        ).items():
            # Of two settings that contradict each other neither counts: None leaves the number open.
            config[name] = number if config.get(name, number) == number else None
    return config


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the configuration that transformers' `save_pretrained` wrote."""
    config = folder / "config.json"
    settings = json.loads(config.read_text("utf-8")) if config.exists() else {}
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return dict(_read_file(folder / name)), settings
        index = folder / (name + INDEX)
        if not index.exists():
            continue
        state_dict: dict[str, Tensor] = {}
        for shard in sorted(
            set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
        ):
            if Path(shard).name != shard:
                raise ValueError(f"{index}: expected names of files beside it, got {shard!r}")
            state_dict |= _read_file(folder / shard)
        return state_dict, settings
    expected = ", ".join(f"{name}, {name}{INDEX}" for name in FOLDER_FILES)
    raise FileNotFoundError(f"path: expected a folder with one of {expected}, got {folder}")


def _read_file(path: Path) -> Mapping[str, Any]:
    """The content of a file: a state dict, or a mapping that has one somewhere."""
    with path.open("rb") as file:
        by_torch = zipfile.is_zipfile(file) or LEGACY_MAGIC in _first_bytes(file)
        file.seek(0)
        try:
            if path.suffix == ".safetensors":
                content = _read_safetensors(path)
            elif by_torch:
                content = _read_by_torch(file)
            else:
                content = to_tensors(ArrayReader(file).load())
        except ModuleNotFoundError:
            raise
        except RefusedError as error:
            raise ValueError(_refusal(path, str(error))) from None
        except Exception as error:  # both readers raise any error for a broken file
            message = str(error).strip()
            named = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", message)
            if named:
                advice = _ADVICE.format(named[1]) if named[2].startswith("was") else ""
                raise ValueError(_refusal(path, named[1]) + advice) from None
            raise ValueError(
                f"{path}: expected a file that torch.save or safetensors wrote, or a pickle of "
                f"arrays, got {type(error).__name__}: {message.partition(chr(10))[0]}"
            ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


# Added for names that the caller may allow; torch refuses some names always.
_ADVICE = (
    " If you trust the file and {0}, allow it around the call by torch.serialization.safe_globals, or "
    "open the file yourself and give its state dict to attention_modules."
)


def _first_bytes(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(32)


def _refusal(path: Path, name: str) -> str:
    return (
        f"{path}: expected tensors, arrays and plain values, got a pickled {name}. "
        "Restoring it would run code that the file names; nothing was run."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            f"{path}: reading it needs safetensors, not installed here: pip install safetensors"
        )
    state_dict: dict[str, Tensor] = importlib.import_module("safetensors.torch").load_file(path)
    return state_dict


def _read_by_torch(file: IO[bytes]) -> Any:
    # Many authors, those of Deformable DETR first, save their command line with the weights. A Namespace
    # holds values and does nothing. Where the caller allows it already, it stays allowed.
    allowed = torch.serialization.get_safe_globals()
    missing: list[Any] = [] if argparse.Namespace in allowed else [argparse.Namespace]
    with torch.serialization.safe_globals(missing):
        return torch.load(file, map_location="cpu", weights_only=True)
