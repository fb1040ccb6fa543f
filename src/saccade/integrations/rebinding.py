"""A copy of a function that finds other functions under the names it uses."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

# How many decorators, or functions of the same file, around the operator are looked into.
MOST_LEVELS = 4


def used_by(function: Any, is_wanted: Callable[[object], bool], depth: int = 0) -> Iterator[Any]:
    """What a function finds among the globals of its file, as far as it is wanted.

    Looked into are lambdas in it, functions of the same file that it calls, and a decorated function,
    which lies in a cell of its decorator's.
    """
    if type(function) is not FunctionType or depth > MOST_LEVELS:
        return
    for name in _names(function.__code__):
        found = function.__globals__.get(name)
        if is_wanted(found):
            yield found
        elif _is_helper(found, function):
            yield from used_by(found, is_wanted, depth + 1)
    for cell in function.__closure__ or ():
        yield from used_by(_content(cell), is_wanted, depth + 1)


def rebound(
    function: FunctionType,
    is_wanted: Callable[[object], bool],
    replace: Callable[[Any], Any],
    depth: int = 0,
) -> FunctionType:
    """The same function, finding `replace(found)` wherever it found something that is wanted.

    The file's own names stay as they are, for they belong to every model of the process. The copy of
    them goes without `__name__`: torch.compile would look the names up in the file again. For its sake
    the code is a copy too: it keeps what it compiles by the code, and the globals are others.
    """

    def inside(found: Any) -> bool:
        return next(used_by(found, is_wanted, depth + 1), None) is not None

    def copied(found: Any) -> Any:
        return rebound(found, is_wanted, replace, depth + 1)

    replaced = {}
    for name in _names(function.__code__):
        found = function.__globals__.get(name)
        if is_wanted(found):
            replaced[name] = replace(found)
        elif _is_helper(found, function) and inside(found):
            replaced[name] = copied(found)
    names: dict[str, Any] = function.__globals__
    if replaced:
        names = {key: found for key, found in names.items() if key != "__name__"} | replaced
    cells = [
        CellType(copied(_content(cell))) if inside(_content(cell)) else cell
        for cell in function.__closure__ or ()
    ]
    copy = FunctionType(
        _copied_code(function.__code__),
        names,
        function.__name__,
        function.__defaults__,
        tuple(cells) if cells else None,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    copy.__dict__.update(function.__dict__)
    return copy


def sets_globals(function: Any) -> bool:
    """Whether a function changes names of its file, which a copy of them would not show."""
    return any(
        instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
        for code in _codes(getattr(function, "__code__", None))
        for instruction in dis.get_instructions(code)
    )


def _is_helper(found: Any, function: FunctionType) -> bool:
    return (
        type(found) is FunctionType
        and found is not function
        and found.__globals__ is function.__globals__
    )


def _names(code: CodeType) -> dict[str, None]:
    return {name: None for part in _codes(code) for name in part.co_names}


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """The code, and that of lambdas and comprehensions in it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _copied_code(code: CodeType) -> CodeType:
    constants = (
        _copied_code(constant) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_consts=tuple(constants))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
