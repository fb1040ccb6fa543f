"""Opens files from elsewhere: regular files only, within bounds, without running what they contain.

What a reader is about to do is checked before it begins, from sizes and from the instructions of pickles;
see `pickle_bounds`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from saccade.integrations.checkpoints.pickle_bounds import Buffer, Limits, check_pickle

# Before torch.save wrote zip archives, its files began with this number, pickled by protocol 2.
LEGACY_START = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
ZIP_START = b"PK\x03\x04"
# The pickles of a legacy file: number, version, system, content, and keys of the storages that follow.
LEGACY_PICKLES = 5
# Configurations and lists of shards have less than a megabyte.
MAX_JSON_BYTES = 2**24
# A member takes about 5 µs to list.
OBJECTS_PER_MEMBER = 20

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class RefusedGlobalError(ValueError):
    """A pickle names a class or function that is not allowed.

    Attributes:
        name: its full name.
        can_be_allowed: `torch.serialization.safe_globals` can allow it.
    """

    def __init__(self, message: str, name: str, can_be_allowed: bool) -> None:
        super().__init__(message)
        self.name, self.can_be_allowed = name, can_be_allowed


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file for reading; pipes and devices, which may have no end, are refused.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: it is no regular file; the message names it and what it is.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    # A device may act when it is opened, hence the look before; the file can change until it is opened.
    _check_regular(path, os.stat(path))
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    try:
        _check_regular(path, os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: it is too large, no JSON, or not an object; the message names it.
    """
    with open_regular(path) as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes} bytes of JSON, got more")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def is_torch_file(file: IO[bytes]) -> bool:
    """Whether torch.save may have written the file; the position is at the beginning after it."""
    file.seek(0)
    start = file.read(len(LEGACY_START))
    file.seek(0)
    return start.startswith(ZIP_START) or start == LEGACY_START


def check_torch_file(file: IO[bytes], limits: Limits | None = None) -> None:
    """Checks a file of torch.save, in either of its formats, against the bounds.

    Raises:
        ValueError: a bound is exceeded, or the file is malformed.
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
        ValueError: the file is no regular file, exceeds a bound, or is malformed.
    """
    with open_regular(path) as file:
        return load_open_torch(file, path, allowed=allowed, limits=limits)


def load_open_torch(
    file: IO[bytes],
    path: str | os.PathLike[str],
    *,
    allowed: Sequence[Any] = (),
    limits: Limits | None = None,
) -> Any:
    """`load_torch` of a file that `open_regular` has opened; `path` is for messages."""
    # Where the caller allows a name already, it stays allowed.
    present = torch.serialization.get_safe_globals()
    try:
        check_torch_file(file, limits)
        with (
            torch.serialization.safe_globals([name for name in allowed if name not in present]),
            torch.sparse.check_sparse_tensor_invariants(),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types for broken files
        message = describe_error(error)
        named = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if named:
            raise RefusedGlobalError(
                f"{path}: expected tensors and plain values, got a pickled {named[1]}",
                named[1],
                named[2].startswith("was"),
            ) from None
        raise ValueError(f"{path}: {message}") from error


def describe_error(error: BaseException) -> str:
    """The first line of an error's message, after its type unless that is ValueError."""
    message = str(error).strip().partition("\n")[0][:500]
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"


@contextmanager
def map_file(file: IO[bytes]) -> Iterator[Buffer]:
    """The bytes of a file, of which only those that are touched are read."""
    if os.fstat(file.fileno()).st_size == 0:
        yield b""
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _check_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"{Path(path)}: expected a regular file, got {kind}")


def _check_archive(file: IO[bytes], data: Buffer, limits: Limits) -> None:
    """Checks a zip archive: its members in all, and the pickle."""
    count = _count_members(data)
    bound = limits.objects // OBJECTS_PER_MEMBER
    if count > bound:
        raise ValueError(f"expected at most {bound} members of a zip archive, got {count}")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    sizes = {member.filename: member.file_size for member in members}
    if len(sizes) != len(members):
        raise ValueError("expected members of different names in the zip archive, got a name twice")
    # torch.save does not compress. Members that are compressed or overlap claim more than the file has.
    total, bound = sum(sizes.values()), len(data) + limits.expansion
    if total > bound:
        raise ValueError(
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


def _count_members(data: Buffer) -> int:
    """The number of members of a zip archive, as its last record says it.

    Readers of zip archives differ where bytes follow that record. torch.save writes none.
    """
    end = bytes(data[-22:])
    if len(data) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise ValueError("expected a whole zip archive, got one without its end")
    count, size, offset = struct.unpack("<HII", end[10:20])
    locator = bytes(data[-42:-22])
    if locator[:4] == b"PK\x06\x07":
        (position,) = struct.unpack("<Q", locator[8:16])
        record = bytes(data[position : position + 56])
        if len(record) != 56 or record[:4] != b"PK\x06\x06":
            raise ValueError("expected a whole zip archive, got one without its directory")
        count, size, offset = struct.unpack("<QQQ", record[32:56])
    if size > len(data) or offset > len(data) - size:
        raise ValueError("expected a whole zip archive, got one without its directory")
    return int(count)


def _check_legacy(data: Buffer, limits: Limits) -> None:
    """Checks the pickles of a file from before 2020, and that all its storages are stored."""
    try:
        tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "surrogateescape")
    except tarfile.TarError:
        pass
    else:
        raise ValueError("expected a file of torch.save, got a tar archive")
    position, used = 0, set[str]()
    for _ in range(LEGACY_PICKLES):
        result = check_pickle(data, limits, position)
        position = result.end
        used |= result.storages.keys()
    stored = result.texts
    # torch leaves what is not stored as the memory was.
    for key in used - set(stored or ()):
        raise ValueError(f"expected the elements of storage {key[:40]!r} in the file, got none")
