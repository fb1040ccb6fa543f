"""A copy of a function that finds other functions under the names it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

# How many decorators around a forward are looked into.
MOST_DECORATORS = 4


def used_by(function: Any, is_wanted: Callable[[object], bool], depth: int = 0) -> Iterator[Any]:
    """What a function finds among the globals of its file, as far as it is wanted.

    A decorated function is looked into: it lies in a cell of its decorator's.
    """
    if not isinstance(function, FunctionType) or depth > MOST_DECORATORS:
        return
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if is_wanted(found):
            yield found
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
    them goes without `__name__`: torch.compile would look the names up in the file again. The code is a
    copy as well: torch.compile keeps what it compiled by code, and would run it with the names of another
    copy, or in a model that is not patched.
    """
    replaced = {
        name: replace(found)
        for name in function.__code__.co_names
        if is_wanted(found := function.__globals__.get(name))
    }
    names: dict[str, Any] = function.__globals__
    if replaced:
        names = {key: found for key, found in names.items() if key != "__name__"} | replaced
    cells = [
        CellType(rebound(content, is_wanted, replace, depth + 1))
        if next(used_by(content := _content(cell), is_wanted, depth + 1), None) is not None
        else cell
        for cell in function.__closure__ or ()
    ]
    copy = FunctionType(
        function.__code__.replace(),
        names,
        function.__name__,
        function.__defaults__,
        tuple(cells) if cells else None,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    copy.__dict__.update(function.__dict__)
    return copy


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
