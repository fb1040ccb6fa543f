"""The JSON file that every part of the benchmark adds to, and what a part does when a call fails."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Results:
    """What has been found so far; each addition is on disk before the next measurement begins."""

    def __init__(self, path: Path, found: dict[str, Any] | None = None) -> None:
        """Goes on with the file at `path`, or begins it with `found`."""
        self.path = path
        self.found: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if found is None else found
        )
        if found is not None:
            self.save()

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The rows under `key`, so far."""
        rows: list[dict[str, Any]] = self.found.setdefault(key, [])
        return rows

    def add(self, key: str, *rows: Mapping[str, Any]) -> None:
        """Adds rows to the list under `key`."""
        self.rows(key).extend(dict(row) for row in rows)
        self.save()

    def put(self, key: str, value: Any) -> None:
        """Writes one value, in the place of the one before."""
        self.found[key] = value
        self.save()

    def save(self) -> None:
        """Writes the file whole, one row a line; a reader never sees half of it."""
        lines = []
        for key, value in self.found.items():
            if isinstance(value, list) and value:
                rows = ",\n".join(_text(row) for row in value)
                lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
            else:
                lines.append(f"{json.dumps(key)}: {_text(value)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(partial, self.path)


def _text(value: Any) -> str:
    return json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class DeviceLostError(RuntimeError):
    """The GPU refuses all further work in this process; a new process has to go on."""


class OutOfTimeError(RuntimeError):
    """The part has used up its time."""


class Deadline:
    """When a part has to be done."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        """Raises OutOfTimeError when fewer than `needed` seconds are left."""
        if self.left <= needed:
            raise OutOfTimeError


def reason_of(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:300]}"


def ensure_device(device: torch.device, error: BaseException) -> None:
    """After an error: whether the GPU still works. An illegal access ends all work of a process.

    Raises:
        DeviceLostError: it does not.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(8, device=device).sum().item()
    except Exception:
        raise DeviceLostError(reason_of(error)) from error


@contextmanager
def memory_given_back(device: torch.device) -> Iterator[None]:
    """Nothing stays in the allocator's hands after the block."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except Exception as error:
                ensure_device(device, error)
