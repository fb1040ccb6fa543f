"""Opens files from elsewhere: regular files only, within bounds, without running what they contain.

What a reader is about to do is checked before it begins, from sizes and from the instructions of pickles;
see `pickle_bounds`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from saccade import files
from saccade.integrations.checkpoints.pickle_bounds import (
    BoundError,
    Buffer,
    ContentError,
    Limits,
    check_pickle,
)

# Before torch.save wrote zip archives, its files began with this number, pickled by protocol 2.
LEGACY_START = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
ZIP_START = b"PK\x03\x04"
# The pickles of a legacy file: number, version, system, content, and keys of the storages that follow.
LEGACY_PICKLES = 5
# What torch allows and checks while a file is read holds for the whole process.
_LOADING = threading.Lock()
# Configurations and lists of shards have less than a megabyte.
MAX_JSON_BYTES = 2**24
# The files of weights that `save_pretrained` writes, in the order in which transformers looks for them; in
# shards, an index beside them has their name and this ending.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
# A member takes as long to list as ten objects.
OBJECTS_PER_MEMBER = 10


class RefusedGlobalError(ValueError):
    """A pickle names a class or function that is not allowed.

    Attributes:
        name: its full name.
        can_be_allowed: `torch.serialization.safe_globals` can allow it.
    """

    def __init__(self, path: object, name: str, *, can_be_allowed: bool = False) -> None:
        super().__init__(
            f"{path}: expected tensors, arrays and plain values, got a pickled {name}. "
            "Restoring it would run code that the file names; nothing was run."
        )
        self.name, self.can_be_allowed = name, can_be_allowed


@contextmanager
def named_errors(path: object, expected: str) -> Iterator[None]:
    """Within it every error of a reader becomes a ValueError that names the file and what was expected."""
    try:
        yield
    except RefusedGlobalError:
        raise
    except ContentError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # readers raise errors of any type for a broken file
        raise ValueError(f"{path}: expected {expected}, got {_describe_error(error)}") from error


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file for reading; pipes and devices, which may have no end, are refused.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: it is not a regular file; the message names it and what it is.
    """
    try:
        return files.open_regular(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: it is too large, not JSON, or not an object; the message names it.
    """
    with open_regular(path) as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise BoundError(f"{path}: expected at most {max_bytes} bytes of JSON, got more")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def find_weights(folder: Path) -> list[Path]:
    """The files of the weights in a folder that `save_pretrained` wrote: one, shards, or none.

    Raises:
        OSError, ValueError: as `read_json`; or an index of shards names something else than files beside it.
    """
    for whole in WEIGHTS:
        if (folder / whole).exists():
            return [folder / whole]
        index = folder / (whole + INDEX)
        if index.exists():
            return [folder / shard for shard in _read_shard_names(index)]
    return []


def _read_shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map", {})
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for shard in shards:
        is_name = isinstance(shard, str) and Path(shard).name == shard and "\0" not in shard
        if not is_name or shard in ("", ".", ".."):
            raise ValueError(f"{index}: expected names of files beside it, got {shard!a:.60}")
    return sorted(set(shards))


def is_torch_file(file: IO[bytes]) -> bool:
    """Whether torch.save may have written the file; the position is at the beginning after it."""
    file.seek(0)
    start = file.read(len(LEGACY_START))
    file.seek(0)
    return start.startswith(ZIP_START) or start == LEGACY_START


def check_torch_file(file: IO[bytes], limits: Limits | None = None) -> None:
    """Checks a file of torch.save, in either of its formats, against the bounds.

    Raises:
        BoundError: a bound is exceeded.
        ValueError: the file is malformed.
    """
    limits = limits or Limits()
    if not is_torch_file(file):
        raise ValueError("expected a file of torch.save, got another one")
    with map_file(file) as data:
        if data[: len(ZIP_START)] == ZIP_START:
            _check_archive(file, data, limits)
        else:
            _check_legacy(data, limits)
    file.seek(0)


def load_torch(
    path: str | os.PathLike[str], *, allowed: Sequence[Any] = (), limits: Limits | None = None
) -> Any:
    """The content of a file of torch.save, on the CPU, checked before it is read.

    Args:
        path: the file.
        allowed: classes and functions that the file may name, beyond those that torch allows.
        limits: the bounds; by default `Limits()`.

    Raises:
        OSError: the file does not exist or cannot be opened.
        RefusedGlobalError: the file names a class or function that is not allowed.
        BoundError: the file exceeds a bound.
        ValueError: the file is not a regular file, or is malformed.
    """
    with open_regular(path) as file:
        return load_open_torch(file, path, allowed=allowed, limits=limits)


def load_open_torch(
    file: IO[bytes],
    path: str | os.PathLike[str],
    *,
    allowed: Sequence[Any] = (),
    limits: Limits | None = None,
    expected: str = "a file of torch.save",
) -> Any:
    """`load_torch` of a file that `open_regular` has opened; `path` and `expected` are for messages."""
    with named_errors(path, expected), _LOADING:
        check_torch_file(file, limits)
        # Where the caller allows a name already, it stays allowed.
        present = torch.serialization.get_safe_globals()
        try:
            with (
                torch.serialization.safe_globals([name for name in allowed if name not in present]),
                torch.sparse.check_sparse_tensor_invariants(),
            ):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
            if named is None:
                raise
            can_be_allowed = named[2].startswith("was")
            raise RefusedGlobalError(path, named[1], can_be_allowed=can_be_allowed) from None


def _describe_error(error: Exception) -> str:
    """The first line of an error's message, after its type."""
    message = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return f"{type(error).__name__}: {message.partition(chr(10))[0][:500]}"


@contextmanager
def map_file(file: IO[bytes]) -> Iterator[Buffer]:
    """The bytes of a file, of which only those that are touched are read."""
    if os.fstat(file.fileno()).st_size == 0:
        yield b""
        return
    try:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:  # Some network file systems map no files.
        file.seek(0)
        yield file.read()
        return
    with data:
        yield data


def _check_archive(file: IO[bytes], data: Buffer, limits: Limits) -> None:
    """Checks a zip archive: its members in all, and the pickle."""
    count = _bound_members(data)
    bound = limits.objects // OBJECTS_PER_MEMBER
    if count > bound:
        raise BoundError(
            f"expected at most {bound} members of a zip archive (objects / {OBJECTS_PER_MEMBER}), "
            f"got a directory for {count}"
        )
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    sizes = {member.filename: member.file_size for member in members}
    if len({name.lower() for name in sizes}) != len(members):
        raise ValueError("expected members of different names in the zip archive, got a name twice")
    # torch.save does not compress. Members that are compressed or overlap claim more than the file has.
    total, bound = sum(sizes.values()), len(data) + limits.expansion
    if total > bound:
        raise BoundError(
            f"expected members of at most {bound} bytes, {limits.expansion} (expansion) beyond the "
            f"file, got {total}"
        )
    # torch finds the pickle itself, so that this one and the one that torch unpickles are the same.
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    if "constants.pkl" in reader.get_all_records():
        raise ValueError("expected a file of torch.save, got a TorchScript archive")
    storages = check_pickle(reader.get_record("data.pkl"), limits).storages
    root = members[0].filename.partition("/")[0]
    for key in storages:
        if f"{root}/data/{key}" not in sizes:
            raise ValueError(f"expected the elements of storage {key[:40]!r} in the file, got none")


def _bound_members(data: Buffer) -> int:
    """How many members a zip archive can have, by the size of its directory.

    Readers of zip archives differ where bytes lie between the directory, the last record and the end of the
    file. torch.save writes none.
    """
    end = bytes(data[-22:])
    if len(data) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise ValueError("expected a whole zip archive, got one without its end")
    size, offset = struct.unpack("<II", end[12:20])
    position = len(data) - 22
    if bytes(data[-42:-38]) == b"PK\x06\x07":
        position = len(data) - 98
        record = bytes(data[-98:-42])
        if len(record) == 56 and record[:4] == b"PK\x06\x06":
            size, offset = struct.unpack("<QQ", record[40:56])
    if offset + size != position:
        raise ValueError("expected a whole zip archive, got one without its directory")
    return int(size) // 46  # a record of the directory has at least so many bytes


def _check_legacy(data: Buffer, limits: Limits) -> None:
    """Checks the pickles of a file from before 2020, and that all its storages are stored."""
    try:
        tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "surrogateescape")
    except tarfile.TarError:
        pass
    else:
        raise ValueError("expected a file of torch.save, got a tar archive")
    position, used = 0, dict[str, int]()
    for _ in range(LEGACY_PICKLES):
        result = check_pickle(data, limits, position)
        position = result.end
        used |= result.storages
    stored = result.texts
    # torch leaves what is not stored as the memory was.
    for key in used.keys() - set(stored or ()):
        raise ValueError(f"expected the elements of storage {key[:40]!r} in the file, got none")
