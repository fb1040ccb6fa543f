"""Checks a pickle before it is unpickled: how deep, how large and how costly its objects would be.

A pickle is a program for a stack machine. `check_pickle` follows the program without making its objects:
each container is a node that knows how deep it is and how many objects a walk through it meets. Nothing
is imported, called, hashed or compared, and the time is linear in the number of instructions.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

# What can be scanned: bytes, or a file as `mmap.mmap`, which reads only the pages that are touched.
Buffer: TypeAlias = Any


@dataclass(frozen=True)
class Limits:
    """Bounds on what a file may make a reader do; each is large beside the files of real models.

    Attributes:
        objects: the objects that a walk through the content of a pickle meets. A tensor counts about 30,
            and an object that is referred to twice counts twice.
        depth: how deep containers lie within each other.
        expansion: bytes that may come into memory beyond the size of the file: by compressed members of
            an archive, by tensors that repeat their elements, or by entries that share them.

    Example:
        >>> from saccade.integrations import checkpoints
        >>> checkpoints.Limits(expansion=2**32)
        Limits(objects=5000000, depth=200, expansion=4294967296)
    """

    objects: int = 5_000_000
    depth: int = 200
    expansion: int = 2**28


class ContentError(ValueError):
    """A file is whole, and holds something that is refused."""


class BoundError(ContentError):
    """A file exceeds one of the bounds of `Limits`, or one that is fixed."""


class Pickle(NamedTuple):
    """What is known about a pickle that has been checked.

    Attributes:
        end: the position after its last byte.
        storages: the storages that it refers to, as numbers of elements by key.
        texts: the strings of its result, if that is a list of short strings.
    """

    end: int
    storages: dict[str, int]
    texts: list[str] | None


SHORT = 200  # longer strings are not kept; keys of storages and codecs are compared
# Integers and names beyond this many bytes are refused: Python prints no integer that is much longer.
LONGEST_INTEGER, LONGEST_NAME = 1024, 4096
# Python's hashes of strings are salted, and those of integers are not: many integers can be made to collide.
# Integers below this bound have hashes of their own. Of keys of other types there may be so many.
LARGEST_KEY, OTHER_KEYS = 2**60, 1000
# Objects that are walked for other calls than the last: each level of nested objects may walk what is below it.
WORK_FACTOR = 2
LARGEST_ITEM = 16  # bytes of an element, of any dtype

# Functions of torch that take what they are told for granted, or copy what may be huge. Tensor and storage
# classes are refused too: made by their sizes, they have whatever was in the memory as elements.
REFUSED_FUNCTIONS = {
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_wrapper_subclass",
}
TENSOR_FUNCTIONS = {
    f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor")
}
HASHING = {"builtins.set", "builtins.frozenset", "collections.Counter"}
# They iterate over their arguments. A tensor is iterated as one tensor for each element, however few bytes
# it has, so that only containers which the pickle itself fills may be arguments.
ITERATING = {*HASHING, "collections.OrderedDict", "torch.Size"}
# What they return has as many bytes as their argument, and may be copied as often as it is referred to.
BYTES_FUNCTIONS = {"_codecs.encode", "builtins.bytearray", "builtins.bytes"}


@dataclass(slots=True)
class _Node:
    """A value that a pickle makes.

    Attributes:
        kind: what it is: a container, or "call" for what a function returned.
        depth, size: how deep it is, and how many objects a walk through it meets.
        items: the elements of a tuple or list, the argument of torch.Size, or the size of a storage.
        name: the full name of a global, or of the function that was called.
        text: the bytes of long strings in it, outside of what functions returned.
        placed: it is an element of another value. A pickler fills a container before it places it, unless
            the container holds itself.
    """

    kind: str
    depth: int = 0
    size: int = 1
    items: Sequence[Any] = ()
    name: str = ""
    text: int = 0
    placed: bool = False


# Values on the stack: an int, a short string as bytes, a node, or None for any other leaf.
_Value: TypeAlias = "int | bytes | _Node | None"

_PAIR = -10  # two lines, beside pickletools' negative numbers for arguments of variable length
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
_STRINGS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TO_MARK = {"TUPLE": "tuple", "LIST": "list", "DICT": "dict", "FROZENSET": "set"}
_CALLS = {"REDUCE": 1, "NEWOBJ": 1, "NEWOBJ_EX": 2}
_CONTAINERS = {"tuple", "list", "dict", "set"}


def check_pickle(data: Buffer, limits: Limits, start: int = 0) -> Pickle:
    """Follows one pickle and checks it against the bounds.

    Args:
        data: the bytes that hold it.
        limits: the bounds.
        start: the position of its first byte.

    Raises:
        BoundError: a bound is exceeded.
        ValueError: the pickle is malformed; the message says where and how.
    """
    return _Scan(data, limits, start).run()


class _Scan:
    def __init__(self, data: Buffer, limits: Limits, start: int) -> None:
        self.data, self.limits, self.start = data, limits, start
        self.at = start
        self.stack: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.storages: dict[str, int] = {}
        self.work = self.other_keys = self.expansion = 0

    def run(self) -> Pickle:
        data, total, table = self.data, len(self.data), self._make_table()
        position, remaining = self.start, self.limits.objects
        while True:
            self.at = position
            if position >= total:
                raise self._error("STOP", "the end of the file")
            width, handler = table[data[position]]
            begin = position + 1
            if width >= 0:
                end = position = begin + width
            elif width == pickletools.UP_TO_NEWLINE:
                end = position = self._find_end_of_lines(begin, 1)
            elif width == _PAIR:
                end = position = self._find_end_of_lines(begin, 2)
            else:
                count = _LENGTH_BYTES[width]
                begin += count
                end = position = begin + int.from_bytes(data[begin - count : begin], "little")
            if end > total:
                raise self._error(f"an argument of {total - begin} bytes or less", f"{end - begin}")
            remaining -= 1
            if remaining < 0:
                raise self._exceeded("objects", self.limits.objects, "more")
            if handler is None:
                return Pickle(end, self.storages, self._get_texts(self._take()))
            handler(begin, end)

    def _make_table(self) -> list[tuple[int, Callable[[int, int], None] | None]]:
        """By instruction: the bytes of its argument, or how they are found, and what follows it."""
        groups: dict[str, Callable[[int, int], None]] = {
            **dict.fromkeys(_STRINGS, self._push_string),
            **dict.fromkeys(("BININT", "LONG1", "LONG4"), self._push_signed),
            **dict.fromkeys(("BININT1", "BININT2"), self._push_unsigned),
            **dict.fromkeys(("PROTO", "READONLY_BUFFER"), self._pass),
            **{name: partial(self._push_empty, kind) for name, kind in _EMPTY.items()},
            **{name: partial(self._push_tuple, count) for name, count in _TUPLES.items()},
            **{name: partial(self._push_marked, kind) for name, kind in _TO_MARK.items()},
            **{name: partial(self._push_call, count) for name, count in _CALLS.items()},
        }
        table: list[tuple[int, Callable[[int, int], None] | None]] = [(0, self._refuse)] * 256
        for opcode in pickletools.opcodes:
            name, width = opcode.name, opcode.arg.n if opcode.arg else 0
            own = getattr(self, "_op_" + name.lower(), self._push_leaf)
            width = _PAIR if name in ("GLOBAL", "INST") else width
            table[ord(opcode.code)] = (width, None if name == "STOP" else groups.get(name, own))
        return table

    # Groups of instructions. Each takes where its argument begins and ends.

    def _refuse(self, begin: int, end: int) -> None:
        raise self._error("an instruction of pickle", f"byte {self.data[self.at]}")

    def _pass(self, begin: int, end: int) -> None:
        """Does nothing: the instruction leaves the stack as it is."""

    def _push_leaf(self, begin: int, end: int) -> None:
        self.stack.append(None)

    def _push_string(self, begin: int, end: int) -> None:
        short = end - begin <= SHORT
        self.stack.append(self.data[begin:end] if short else _make_text(end - begin))

    def _push_signed(self, begin: int, end: int) -> None:
        if end - begin > LONGEST_INTEGER:
            raise self._exceeded("bytes of an integer", LONGEST_INTEGER, end - begin)
        self.stack.append(int.from_bytes(self.data[begin:end], "little", signed=True))

    def _push_unsigned(self, begin: int, end: int) -> None:
        self.stack.append(int.from_bytes(self.data[begin:end], "little"))

    def _push_empty(self, kind: str, begin: int, end: int) -> None:
        self.stack.append(_Node(kind))

    def _push_tuple(self, count: int, begin: int, end: int) -> None:
        self._push("tuple", self._take_last(count))

    def _push_marked(self, kind: str, begin: int, end: int) -> None:
        items = self._take_items()
        if kind in ("dict", "set"):
            self._check_keys(items[::2] if kind == "dict" else items)
        self._push(kind, items)

    def _push_call(self, count: int, begin: int, end: int) -> None:
        arguments = self._take_last(count)
        self._call(self._take(), arguments)

    # Instructions. Each takes where its argument begins and ends; the names are those of pickletools in lower case.

    def _op_frame(self, begin: int, end: int) -> None:
        length = int.from_bytes(self.data[begin:end], "little")
        if length > len(self.data) - end:
            raise self._error(f"a frame of {len(self.data) - end} bytes or less", str(length))

    def _op_mark(self, begin: int, end: int) -> None:
        self.marks.append(len(self.stack))

    def _op_pop_mark(self, begin: int, end: int) -> None:
        self._take_items()

    def _op_pop(self, begin: int, end: int) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self._take()

    def _op_dup(self, begin: int, end: int) -> None:
        self._repeat(self._top())

    def _op_put(self, begin: int, end: int) -> None:
        self._write_memo(self._parse_int(begin, end))

    def _op_binput(self, begin: int, end: int) -> None:
        self._write_memo(int.from_bytes(self.data[begin:end], "little"))

    _op_long_binput = _op_binput

    def _op_memoize(self, begin: int, end: int) -> None:
        self._write_memo(len(self.memo))

    def _op_get(self, begin: int, end: int) -> None:
        self._read_memo(self._parse_int(begin, end))

    def _op_binget(self, begin: int, end: int) -> None:
        self._read_memo(int.from_bytes(self.data[begin:end], "little"))

    _op_long_binget = _op_binget

    def _op_int(self, begin: int, end: int) -> None:
        self.stack.append(self._parse_int(begin, end))

    _op_long = _op_int

    def _op_string(self, begin: int, end: int) -> None:
        self.stack.append(None if end - begin <= SHORT else _make_text(end - begin))

    _op_unicode = _op_string

    def _op_float(self, begin: int, end: int) -> None:
        if end - begin > LONGEST_NAME:
            raise self._exceeded("bytes of a number", LONGEST_NAME, end - begin)
        self.stack.append(None)

    def _op_global(self, begin: int, end: int) -> None:
        self.stack.append(_Node("global", name=self._parse_name(begin, end)))

    def _op_stack_global(self, begin: int, end: int) -> None:
        name, module = self._take(), self._take()
        parts = [part if isinstance(part, bytes) else b"?" for part in (module, name)]
        self.stack.append(_Node("global", name=_join_name(*parts)))

    def _op_append(self, begin: int, end: int) -> None:
        item = self._take()
        self._fill(self._top(), [item])

    def _op_appends(self, begin: int, end: int) -> None:
        items = self._take_items()
        self._fill(self._top(), items)

    def _op_setitem(self, begin: int, end: int) -> None:
        value, key = self._take(), self._take()
        self._check_keys([key])
        self._fill(self._top(), [key, value], keep=False)

    def _op_setitems(self, begin: int, end: int) -> None:
        items = self._take_items()
        self._check_keys(items[::2])
        self._fill(self._top(), items, keep=False)

    def _op_additems(self, begin: int, end: int) -> None:
        items = self._take_items()
        self._check_keys(items)
        self._fill(self._top(), items)

    def _op_build(self, begin: int, end: int) -> None:
        state, target = self._take(), self._top()
        self._add_work(state)
        items = state.items if isinstance(state, _Node) else []
        name = target.name if isinstance(target, _Node) else ""
        if name.startswith(("torch._utils.", "torch.nn.parameter.")) or name.endswith("Tensor"):
            if len(self._get_arguments(state)) == 4:
                self._check_tensor(items)  # as the first versions of torch saved tensors
        # Other states become attributes: a dict, or a pair of dicts if there are slots. Classes elsewhere are
        # refused by their readers, take what numpy wrote, or are trusted by the caller.
        elif name.partition(".")[0] in ("", "torch", "collections", "argparse") and not all(
            map(_is_mapping, items if len(items) == 2 else [state])
        ):
            raise self._error("a dict of attributes", "another value")
        self._fill(target, [state], keep=False)

    def _op_inst(self, begin: int, end: int) -> None:
        self._call_items(_Node("global", name=self._parse_name(begin, end)), self._take_items())

    def _op_obj(self, begin: int, end: int) -> None:
        items = self._take_items()
        if not items:
            raise self._error("a class", "nothing")
        self._call_items(items[0], items[1:])

    def _op_binpersid(self, begin: int, end: int) -> None:
        identity = self._take()
        items = identity.items if isinstance(identity, _Node) else []
        # ("storage", the type, the key, the device, the number of elements), and in old files a view.
        key, numel = (items[2], items[4]) if len(items) > 4 else (None, None)
        if not isinstance(key, bytes) or not isinstance(numel, int):
            raise self._error("a reference to a storage", "another one")
        # A key stands for one storage, whose size is checked where it is read first.
        if self.storages.setdefault(key.decode("utf-8", "replace"), numel) != numel:
            raise self._error("one size of each storage", "two")
        self._push("storage", [identity])
        self._keep([numel])

    # What the instructions have in common.

    def _error(self, expected: str, got: str) -> ValueError:
        return ValueError(f"expected {expected}, got {got} at byte {self.at}")

    def _exceeded(self, what: str, bound: int, got: object) -> BoundError:
        return BoundError(self._error(f"at most {bound} {what}", str(got)))

    def _find_end_of_lines(self, begin: int, count: int) -> int:
        for _ in range(count):
            end = self.data.find(b"\n", begin)
            if end < 0:
                raise self._error("the end of a line", "the end of the file")
            begin = end + 1
        return begin

    def _parse_int(self, begin: int, end: int) -> int:
        if end - begin > LONGEST_INTEGER:
            raise self._exceeded("bytes of an integer", LONGEST_INTEGER, end - begin)
        text = bytes(self.data[begin:end]).strip()
        try:
            return int(text.rstrip(b"L"))
        except ValueError:
            raise self._error("an integer", ascii(text[:40])) from None

    def _parse_name(self, begin: int, end: int) -> str:
        if end - begin > LONGEST_NAME:
            raise self._exceeded("bytes of a name", LONGEST_NAME, end - begin)
        module, name, _ = bytes(self.data[begin:end]).split(b"\n")
        return _join_name(module, name)

    def _top(self) -> _Value:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self._error("a value on the stack", "none")
        return self.stack[-1]

    def _take(self) -> _Value:
        self._top()
        return self.stack.pop()

    def _take_last(self, count: int) -> list[_Value]:
        if len(self.stack) < count + (self.marks[-1] if self.marks else 0):
            raise self._error(f"{count} values on the stack", "fewer")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _take_items(self) -> list[_Value]:
        if not self.marks:
            raise self._error("a mark on the stack", "none")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _write_memo(self, index: int) -> None:
        # A pickler counts from 0 or 1, and each entry of the memo takes bytes of the file. The unpickler has
        # a table up to the largest index.
        bound = self.at - self.start + 1
        if not 0 <= index <= bound:
            raise self._exceeded("as the index of a memo, which are the bytes so far", bound, index)
        self.memo[index] = self._top()

    def _read_memo(self, index: int) -> None:
        if index not in self.memo:
            raise self._error("an index of the memo", str(index))
        self._repeat(self.memo[index])

    def _repeat(self, value: _Value) -> None:
        """Pushes a value that exists already. A function that takes long strings may copy them each time."""
        if isinstance(value, _Node):
            self._expand(value.text)
        self.stack.append(value)

    def _expand(self, count: int) -> None:
        self.expansion += count
        if self.expansion > self.limits.expansion:
            raise self._exceeded(
                "bytes beyond those of the file (expansion)", self.limits.expansion, self.expansion
            )

    def _push(self, kind: str, items: list[_Value], name: str = "") -> None:
        node = _Node(kind, name=name)
        self.stack.append(node)
        self._fill(node, items)

    def _keep(self, items: Sequence[_Value]) -> None:
        top = self.stack[-1]
        assert isinstance(top, _Node)
        top.items = items

    def _fill(self, node: _Value, items: list[_Value], *, keep: bool = True) -> None:
        """Places the items in the node, which becomes as deep and as large as they make it."""
        if not isinstance(node, _Node):
            raise self._error("a container", "another value")
        for item in items:
            if isinstance(item, _Node):
                item.placed = True
                node.depth = max(node.depth, item.depth + 1)
                node.size += item.size
                node.text += item.text if node.kind in _CONTAINERS else 0
        if node.placed:  # before, or by itself just now
            raise self._error("containers that do not hold themselves", "one that may")
        if node.depth > self.limits.depth:
            raise self._exceeded(
                "levels of nested containers (depth)", self.limits.depth, node.depth
            )
        node.size += len(items)
        if node.size > self.limits.objects:
            raise self._exceeded("objects", self.limits.objects, node.size)
        if keep and node.kind in ("tuple", "list"):
            if isinstance(node.items, list):
                node.items += items
            else:
                node.items = items

    def _add_work(self, value: _Value) -> None:
        if isinstance(value, _Node):
            self.work += value.size
        if self.work > self.limits.objects * WORK_FACTOR:
            raise self._exceeded("objects", self.limits.objects, "functions that walk more")

    def _check_keys(self, keys: Sequence[_Value]) -> None:
        for key in keys:
            is_text = isinstance(key, bytes) or _is_text(key)
            if is_text or (isinstance(key, int) and abs(key) < LARGEST_KEY):
                continue
            self._add_work(key)
            self.other_keys += 1
        if self.other_keys > OTHER_KEYS:
            raise self._exceeded("keys that are not strings or small integers", OTHER_KEYS, "more")

    def _call(self, function: _Value, arguments: list[_Value]) -> None:
        items = self._get_arguments(arguments[0])
        name = function.name if isinstance(function, _Node) and function.kind == "global" else ""
        for argument in arguments:
            self._add_work(argument)
        self._check_call(name, items)
        if name in BYTES_FUNCTIONS:
            self.stack.append(_make_text(items[0].text if items and _is_text(items[0]) else 0))
        else:
            self._push("call", [function, *arguments], name)
        if name == "torch.Size":
            self._keep(items)

    def _get_arguments(self, value: _Value) -> Sequence[Any]:
        if not isinstance(value, _Node) or value.kind != "tuple":
            raise self._error("a tuple of arguments", "another value")
        return value.items

    def _call_items(self, function: _Value, items: list[_Value]) -> None:
        self._push("tuple", items)
        self._call(function, [self._take()])

    def _check_call(self, name: str, items: Sequence[Any]) -> None:
        """Checks a call whose cost its arguments do not bound."""
        while name == "torch._tensor._rebuild_from_type_v2" and len(items) > 2:
            function, items = items[0], self._get_arguments(items[2])
            name = function.name if isinstance(function, _Node) else ""
        is_class = name.startswith("torch.") and name.endswith(("Tensor", "Storage"))
        if name in REFUSED_FUNCTIONS or (is_class and items):
            raise self._error("dense tensors with their elements", name)
        if name in ITERATING:
            self._check_iterables(name, items)
        elif name in BYTES_FUNCTIONS:
            if not all(isinstance(item, bytes) or _is_text(item) for item in items[:1]):
                raise self._error(f"{name} of bytes", "of another value")
            # Python writes bytes so. Other codecs take time that is quadratic in the length, or compress.
            if list(items[1:]) not in ([], [b"latin1"], [b"latin-1"]):
                raise self._error(f"{name} to latin1", "another codec")
        elif name in TENSOR_FUNCTIONS:
            self._check_tensor(items)
        elif name == "torch._utils._rebuild_sparse_tensor":
            self._get_arguments(items[1] if len(items) > 1 else None)

    def _check_iterables(self, name: str, items: Sequence[Any]) -> None:
        for item in items:
            if not isinstance(item, _Node) or item.kind not in _CONTAINERS:
                raise self._error(f"{name} of a container", "of another value")
            if name == "collections.OrderedDict":  # Python 2 wrote a list of lists of two.
                if not all(isinstance(pair, _Node) and len(pair.items) == 2 for pair in item.items):
                    raise self._error("pairs of a key and a value", "others")
                self._check_keys([pair.items[0] for pair in item.items])
            elif name in HASHING:
                self._check_keys(item.items)

    def _check_tensor(self, items: Sequence[Any]) -> None:
        """Checks that a tensor has no more elements than its storage, or few of them."""
        storage, sizes = (items[0], items[2]) if len(items) > 2 else (None, None)
        if isinstance(sizes, _Node) and sizes.kind == "call" and sizes.items:
            sizes = sizes.items[0]  # torch.Size of a tuple
        if not isinstance(storage, _Node) or not isinstance(sizes, _Node) or not storage.items:
            raise self._error("a storage, an offset, sizes and strides for a tensor", "others")
        elements = 1
        for size in sizes.items:
            if not isinstance(size, int) or size < 0:
                raise self._error("sizes of a tensor that are integers from 0 on", "others")
            elements = min(elements * size, 2**63)
        numel = storage.items[0] if storage.kind == "storage" else 0
        if elements > numel:
            self._expand((elements - numel) * LARGEST_ITEM)

    @staticmethod
    def _get_texts(value: _Value) -> list[str] | None:
        items = value.items if isinstance(value, _Node) and value.kind == "list" else None
        if items is None or not all(isinstance(item, bytes) for item in items):
            return None
        return [item.decode("utf-8", "replace") for item in items]


def _make_text(length: int) -> _Node:
    return _Node("text", text=length, placed=True)


def _is_text(value: object) -> bool:
    return isinstance(value, _Node) and value.kind == "text"


def _join_name(module: bytes, name: bytes) -> str:
    """The full name, in which the names of Python 2 are those of Python 3, as torch reads them."""
    names = module.decode("utf-8", "replace"), name.decode("utf-8", "replace")
    return ".".join(NAME_MAPPING.get(names, (IMPORT_MAPPING.get(names[0], names[0]), names[1])))


def _is_mapping(value: _Value) -> bool:
    """Whether a value is a dict, or nothing that could be iterated in its place."""
    dicts = ("dict", ""), ("call", "collections.OrderedDict")
    return not isinstance(value, _Node) or (value.kind, value.name) in dicts
