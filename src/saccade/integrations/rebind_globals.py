"""Copies of functions in which some global names refer to other functions."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

# Decorators, and functions of the same file, are followed to this depth.
MAX_DEPTH = 4


def find_globals(function: Any, matches: Callable[[object], bool], depth: int = 0) -> Iterator[Any]:
    """The objects among the globals that a function uses for which `matches` is true.

    The search includes lambdas in the function, functions of the same file that it calls, and a
    decorated function, which is in a cell of its decorator's closure.
    """
    if type(function) is not FunctionType or depth > MAX_DEPTH:
        return
    for name in _global_names(function.__code__):
        target = function.__globals__.get(name)
        if matches(target):
            yield target
        elif _is_helper(target, function):
            yield from find_globals(target, matches, depth + 1)
    for cell in function.__closure__ or ():
        yield from find_globals(_get_content(cell), matches, depth + 1)


def rebind_globals(
    function: FunctionType,
    matches: Callable[[object], bool],
    replace: Callable[[Any], Any],
    depth: int = 0,
) -> FunctionType:
    """A copy of a function with `replace(target)` for each global `target` that matches.

    The globals of the file stay as they are, because every model of the process uses them. Their copy
    lacks `__name__`, by which torch.compile would look names up in the file itself. The code is copied
    too, because torch.compile keeps what it compiled by the code object.
    """

    def uses_match(target: Any) -> bool:
        return next(find_globals(target, matches, depth + 1), None) is not None

    def rebind(target: Any) -> Any:
        return rebind_globals(target, matches, replace, depth + 1)

    replaced = {}
    for name in _global_names(function.__code__):
        target = function.__globals__.get(name)
        if matches(target):
            replaced[name] = replace(target)
        elif _is_helper(target, function) and uses_match(target):
            replaced[name] = rebind(target)
    names: dict[str, Any] = function.__globals__
    if replaced:
        names = {key: value for key, value in names.items() if key != "__name__"} | replaced
    cells = [
        CellType(rebind(_get_content(cell))) if uses_match(_get_content(cell)) else cell
        for cell in function.__closure__ or ()
    ]
    copy = FunctionType(
        _copy_code(function.__code__),
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
    """Whether a function assigns to globals of its file; callers would not see that in a copy of the globals."""
    return any(
        instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
        for code in _iterate_codes(getattr(function, "__code__", None))
        for instruction in dis.get_instructions(code)
    )


def _is_helper(target: Any, function: FunctionType) -> bool:
    """Whether it is another function of the same file."""
    return (
        type(target) is FunctionType
        and target is not function
        and target.__globals__ is function.__globals__
    )


def _global_names(code: CodeType) -> dict[str, None]:
    return {name: None for part in _iterate_codes(code) for name in part.co_names}


def _iterate_codes(code: CodeType | None) -> Iterator[CodeType]:
    """The code, and the code of lambdas and comprehensions in it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _iterate_codes(constant)


def _copy_code(code: CodeType) -> CodeType:
    constants = (
        _copy_code(constant) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_consts=tuple(constants))


def _get_content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is still empty
        return None
