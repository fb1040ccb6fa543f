"""Reads pickles of numpy arrays without importing or running anything that they name.

detectron2 publishes models in such files, for example Mask2Former. numpy is not needed.
"""

from __future__ import annotations

import math
import pickle
import sys
from typing import IO, Any

import torch
from torch import Tensor

from saccade.integrations.checkpoints.pickle_bounds import ContentError
from saccade.integrations.checkpoints.untrusted import RefusedGlobalError


class ArrayReader(pickle.Unpickler):
    """Reads pickles of numpy arrays, as detectron2 publishes models (Mask2Former's are such files).

    Names in the pickle are never imported: the few names that numpy writes stand for the classes below,
    which keep shape, type and bytes. They all have `__setstate__`, so that a pickle cannot set attributes.
    """

    def __init__(self, file: IO[bytes], path: object) -> None:
        # Python 2 wrote bytes as text; latin1 restores each byte.
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module.replace("numpy._core.", "numpy.core."), name))
        if stand_in is None:
            raise RefusedGlobalError(self.path, f"{module}.{name}")
        return stand_in


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code
        self.order: object = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def __str__(self) -> str:
        order = self.order if self.order in ("<", ">") else ""
        return f"numpy's type {order}{self.code!s:.40}"

    def to_torch(self) -> torch.dtype:
        dtype = _TYPES.get(self.code) if isinstance(self.code, str) else None
        if dtype is None:
            raise ContentError(f"expected numbers of a type that torch has, got {self}")
        return dtype

    @property
    def is_swapped(self) -> bool:
        """Whether the bytes of each number are in the order that this machine does not have."""
        return self.order == (">" if sys.byteorder == "little" else "<")


class _Array:
    """Stands for numpy.ndarray, and for the function that begins one."""

    def __init__(self, *_: object) -> None:
        self.__setstate__((1, (0,), _Type("f4"), False, b""))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.type, self.column_major, self.content = state
        self.tensor: Tensor | None = None

    def to_tensor(self) -> Tensor:
        # An array with several names is one tensor.
        if self.tensor is None:
            self.tensor = self._make_tensor()
        return self.tensor

    def _make_tensor(self) -> Tensor:
        if not isinstance(self.type, _Type):
            raise ContentError("expected a numpy array with a type, got one without")
        dtype, shape = self.type.to_torch(), self.shape
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ContentError(f"expected the shape of a numpy array, got {type(shape).__name__}")
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        if not isinstance(content, bytes | bytearray):
            raise ContentError(f"expected a numpy array as bytes, got {type(content).__name__}")
        size = math.prod(shape) * dtype.itemsize
        if len(content) != size or len(shape) > MAX_DIMENSIONS:
            raise ContentError(
                f"expected {size} bytes for a numpy array of shape {shape[:MAX_DIMENSIONS]} and "
                f"{self.type}, got {len(content)}"
            )
        flat = torch.empty(0, dtype=dtype)
        if content:
            numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if self.type.is_swapped:
                width = dtype.itemsize // (2 if dtype.is_complex else 1)
                numbers = numbers.reshape(-1, width).flip(1).flatten()
            # A bool of torch is 0 or 1; another byte would count as true only sometimes.
            flat = numbers != 0 if dtype == torch.bool else numbers.view(dtype)
        if self.column_major:
            return flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1])
        return flat.reshape(shape)


class _BufferArray(_Array):
    """Stands for the function that makes an array, from protocol 5 on."""

    def __init__(self, content: Any, dtype: _Type, shape: Any, order: str) -> None:
        self.__setstate__((1, shape, dtype, order == "F", content))


class _Scalar(_Array):
    """Stands for the function that makes a scalar."""

    def __init__(self, dtype: _Type, content: Any) -> None:
        self.__setstate__((1, (), dtype, False, content))


class _Bytes:
    """Stands for _codecs.encode, by which protocol 2 writes bytes, and for the type bytes."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> Any:
        if encoding != "latin1":
            raise ContentError(f"expected bytes as text in latin1, got {encoding!s:.40}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        """Does nothing: this class has no instances."""


class _Dict(dict[Any, Any]):
    """Stands for OrderedDict; attributes such as a state dict's metadata are ignored."""

    def __setstate__(self, state: object) -> None:
        """Ignores the attributes."""


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _BufferArray,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("collections", "OrderedDict"): _Dict,
}


def get_stand_ins() -> list[tuple[type, str]]:
    """The stand-ins for numpy's names in files of torch.save, as `torch.serialization.safe_globals` takes them.

    There are none where the caller allows names of numpy, whose objects do not go with them.
    """
    for allowed in torch.serialization.get_safe_globals():
        name = allowed[1] if isinstance(allowed, tuple) else str(allowed.__module__)
        if name.partition(".")[0] == "numpy":
            return []
    return [
        (stand_in, f"{spelling}.{name}")
        for (module, name), stand_in in _STAND_INS.items()
        if module.startswith("numpy")
        for spelling in dict.fromkeys((module, module.replace("numpy.core.", "numpy._core.")))
    ]


_TYPES = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
# numpy's arrays have so many at most.
MAX_DIMENSIONS = 64


def to_plain(content: Any, depth: int, name: str = "") -> Any:
    """Nested mappings as plain dicts of plain tensors, to the depth in which `checkpoints.load` searches.

    A pickle can give attributes to mappings and tensors, which would hide their methods.

    Raises:
        ContentError: an array has a type that torch lacks, or does not have the bytes of its shape; the
            message names its entry.
    """
    if isinstance(content, _Array):
        try:
            return content.to_tensor()
        except ContentError as error:
            raise ContentError(f"{name}: {error}") from None
    if isinstance(content, Tensor) and vars(content):
        return Tensor.detach(content)
    if isinstance(content, dict) and depth >= 0:
        return {
            key: to_plain(value, depth - 1, f"{name}.{key!s:.200}" if name else f"{key!s:.200}")
            for key, value in dict.items(content)
        }
    return content
