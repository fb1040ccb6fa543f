"""Reads pickles of numpy arrays without importing or running anything that they name.

detectron2 publishes models in such files, for example Mask2Former. numpy is not needed.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

import torch
from torch import Tensor


class RefusedError(Exception):
    """A pickle names something that is not allowed here; the message has the name."""


class ArrayReader(pickle.Unpickler):
    """Reads pickles of numpy arrays, as detectron2 publishes models (Mask2Former's are such files).

    Names in the pickle are never imported: the few names that numpy writes stand for the classes below,
    which keep shape, type and bytes. They all have `__setstate__`, so that a pickle cannot set attributes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        # Python 2 wrote bytes as text; latin1 restores each byte.
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module.replace("numpy._core.", "numpy.core."), name))
        if stand_in is None:
            raise RefusedError(f"{module}.{name}")
        return stand_in


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def to_torch(self) -> torch.dtype:
        dtype = _TYPES.get(self.code)
        if dtype is None or (self.order == ">" and dtype.itemsize > 1):
            raise RefusedError(f"array of numpy's type {self.order}{self.code}")
        return dtype


class _Array:
    """Stands for numpy.ndarray, and for the function that begins one."""

    def __init__(self, *_: object) -> None:
        self.__setstate__((1, (0,), _Type("f4"), False, b""))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.type, self.column_major, self.content = state

    def to_tensor(self) -> Tensor:
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        if not isinstance(content, bytes | bytearray) or not isinstance(self.type, _Type):
            raise RefusedError("numpy array of objects")
        dtype, shape = self.type.to_torch(), tuple(self.shape)
        flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0)
        if self.column_major:
            return flat.to(dtype).reshape(shape[::-1]).permute(*range(len(shape))[::-1])
        return flat.to(dtype).reshape(shape)


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
            raise RefusedError(f"_codecs.encode to {encoding}")
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
_TYPES = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
}


def to_tensors(content: Any, depth: int = 4) -> Any:
    """The arrays of nested mappings as tensors, to the depth in which `checkpoints.load` searches."""
    if isinstance(content, _Array):
        return content.to_tensor()
    if isinstance(content, dict) and depth:
        return {name: to_tensors(value, depth - 1) for name, value in content.items()}
    return content
