"""The operator in one submodule of a model: found, replaced, restored."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from saccade.integrations.operators import (
    as_forward,
    is_candidate,
    mark,
    original_of,
    replacement_of,
)
from saccade.integrations.rebinding import rebound, sets_globals, used_by


class _Carried(NamedTuple):
    """The operator as one submodule carries it."""

    kept: dict[str, Any]
    """Functions that the module keeps as attributes, or partial calls of them."""
    methods: dict[str, FunctionType]
    """Its methods that find the operator in their file."""
    hidden: list[str]
    """Where else it is: methods of classes above, which are called past the module."""
    itself: bool
    """Whether the module is nothing but the operator."""


def _carried(module: nn.Module) -> _Carried:
    kept = {
        name: found
        for name, found in vars(module).items()
        if name != "forward" and _is_operator(getattr(found, "func", found))
    }
    methods, hidden = {}, []
    for owner in type(module).__mro__:
        if owner is nn.Module:
            break
        for name, found in vars(owner).items():
            function = getattr(found, "__func__", found)
            if next(used_by(function, _is_operator), None) is None:
                continue
            if found is inspect.getattr_static(type(module), name) and found is function:
                methods[name] = found
            elif found is not function or _is_called_past(module, owner, name):
                hidden.append(f"{owner.__qualname__}.{name}")
    forward = type(module).forward
    itself = _is_operator(forward) and next(module.parameters(), None) is None
    return _Carried(kept, methods, hidden, itself)


def _is_called_past(module: nn.Module, owner: type, name: str) -> bool:
    """Whether a class calls the method of a class above by `super()`, or by that class."""
    codes = (
        getattr(found, "__code__", None)
        for kind in type(module).__mro__
        for found in vars(kind).values()
    )
    return any(
        name in code.co_names
        and ("__class__" in code.co_freevars or owner.__name__ in code.co_names)
        for code in codes
        if code is not None
    )


def _is_operator(found: object) -> bool:
    """Whether it may be the operator, or is in its place because its package is patched."""
    return is_candidate(found) or original_of(found) is not None


def patch_module(module: nn.Module) -> str | None:
    """Replaces the operator in one module.

    Returns:
        "" if it now runs on Saccade, None if it does not carry the operator, or why it was left alone.
    """
    _forget_methods_of_the_class(module)
    if _is_patched(module):
        return ""
    carried = _carried(module)
    if not any(carried):
        return None
    reason = _why_not(module, carried)
    if reason:
        return reason
    for name, found in carried.kept.items():
        setattr(module, name, _in_its_place(found))
    methods: dict[str, Callable[..., Any]] = {
        name: mark(rebound(method, _is_operator, _in_its_place), method)
        for name, method in carried.methods.items()
    }
    if carried.itself:
        methods["forward"] = as_forward(_original_or_itself(type(module).forward))
    for name, function in methods.items():
        # Below torch's own setattr, which has nothing to do here, and there for copies of the module.
        vars(module)[name] = MethodType(function, module)
    if methods and not carried.itself:
        vars(module)["_replicate_for_data_parallel"] = MethodType(_REPLICATE, module)
    return ""


def _replicate_for_data_parallel(self: Any) -> Any:
    """For torch.nn.DataParallel: methods of the replica's own, with its parameters."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name, found in vars(self).items():
        if type(found) is MethodType and original_of(found) is not None:
            vars(replica)[name] = MethodType(found.__func__, replica)
    return replica


_REPLICATE = mark(_replicate_for_data_parallel, nn.Module._replicate_for_data_parallel)


def unpatch_module(module: nn.Module) -> str | None:
    """Undoes `patch_module`; returns the same."""
    _forget_methods_of_the_class(module)
    if not _is_patched(module):
        operators = _operators(module, _carried(module))
        if not operators:
            return None
        by_package = all(original_of(found) is not None for found in operators)
        return "its package is patched, not this model" if by_package else "it was not patched"
    reason = ""
    for name, found in list(vars(module).items()):
        original = original_of(found)
        if original is None:
            continue
        if type(found) is not MethodType:
            setattr(module, name, original)
        elif found.__self__ is module and hasattr(type(module), name):
            del vars(module)[name]
        else:
            reason = f"something else has taken the place of its forward, and keeps it as {name}"
    return reason


def _is_patched(module: nn.Module) -> bool:
    return any(original_of(found) is not None for found in vars(module).values())


def _forget_methods_of_the_class(module: nn.Module) -> None:
    """A copy of a patched model, come back from a file, holds methods of its class as its own."""
    for name, found in list(vars(module).items()):
        if type(found) is MethodType and found.__self__ is module:
            of_class = inspect.getattr_static(type(module), name, None)
            if found.__func__ is of_class or found.__func__ is original_of(of_class):
                del vars(module)[name]


def _operators(module: nn.Module, carried: _Carried) -> list[Any]:
    """All that the module carries: functions, autograd functions, partial calls of them."""
    used = [found for method in carried.methods.values() for found in used_by(method, _is_operator)]
    itself = [type(module).forward] if carried.itself else []
    return [*carried.kept.values(), *used, *itself]


def _why_not(module: nn.Module, carried: _Carried) -> str:
    if carried.hidden:
        return f"it is in {', '.join(carried.hidden)}, which may be called past the module"
    for name, method in carried.methods.items():
        if name in vars(module):
            return f"its {name} is not that of its class: something else has replaced it before"
        if sets_globals(method):
            return f"its {name} changes names of its file"
    if carried.itself and "forward" in vars(module):
        return "its forward is not that of its class: something else has replaced it before"
    set_by_module = getattr(module, "decoder_method", getattr(module, "method", None))
    for found in _operators(module, carried):
        original = _original_or_itself(getattr(found, "func", found))
        replacement = replacement_of(original)
        if isinstance(replacement, str):
            return f"{original.__name__}: {replacement}"
        if "method" not in replacement.roles.values():
            continue
        chosen = set_by_module
        if isinstance(found, functools.partial):
            given = dict(zip(replacement.names, found.args, strict=False)) | found.keywords
            chosen = given.get("method", chosen)
        if chosen not in (None, *replacement.methods):
            return f"its method is {chosen!r}, expected one of {', '.join(replacement.methods)}"
    return ""


def _original_or_itself(found: Any) -> Any:
    original = original_of(found)
    return found if original is None else original


def _in_its_place(found: Any) -> Any:
    """A replacement of a function, or of a partial call of one."""
    if original_of(found) is not None:
        return found
    if not isinstance(found, functools.partial):
        return replacement_of(found)
    return mark(functools.partial(_in_its_place(found.func), *found.args, **found.keywords), found)
