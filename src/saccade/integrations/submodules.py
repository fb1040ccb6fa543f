"""Finds, replaces and restores the operator in one submodule of a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from saccade.integrations.operators import (
    get_original,
    is_candidate,
    make_forward,
    make_replacement,
    mark,
)
from saccade.integrations.rebind_globals import find_globals, rebind_globals, sets_globals


class _Uses(NamedTuple):
    """Where the operator is in one submodule."""

    attributes: dict[str, Any]
    """Attributes of the module that are the function, or a partial call of it."""
    methods: dict[str, FunctionType]
    """Methods of the module that use the function as a global of their file."""
    unreachable: list[str]
    """Other methods that use it, which cannot be replaced on the module: `super()` calls them."""
    is_operator: bool
    """Whether the forward of the module is the operator itself."""


def _find_uses(module: nn.Module) -> _Uses:
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name != "forward" and _is_operator(getattr(value, "func", value))
    }
    methods, unreachable = {}, []
    for owner in type(module).__mro__:
        if owner is nn.Module:
            break
        for name, member in vars(owner).items():
            function = getattr(member, "__func__", member)
            if next(find_globals(function, _is_operator), None) is None:
                continue
            if member is inspect.getattr_static(type(module), name) and member is function:
                methods[name] = member
            elif member is not function or _is_called_by_subclass(module, owner, name):
                unreachable.append(f"{owner.__qualname__}.{name}")
    forward = type(module).forward
    is_operator = _is_operator(forward) and next(module.parameters(), None) is None
    return _Uses(attributes, methods, unreachable, is_operator)


def _is_called_by_subclass(module: nn.Module, owner: type, name: str) -> bool:
    """Whether a class calls a method of its parent class `owner` by `super()`, or by that class."""
    codes = (
        getattr(member, "__code__", None)
        for cls in type(module).__mro__
        for member in vars(cls).values()
    )
    return any(
        name in code.co_names
        and ("__class__" in code.co_freevars or owner.__name__ in code.co_names)
        for code in codes
        if code is not None
    )


def _is_operator(target: object) -> bool:
    """Whether the object may be the operator, or replaces it because its package is patched."""
    return is_candidate(target) or get_original(target) is not None


def patch_module(module: nn.Module) -> str | None:
    """Replaces the operator in one module.

    Returns:
        "" if the module now runs on Saccade, None if it does not use the operator, or the reason why it
        was left as it is.
    """
    _drop_class_methods(module)
    if _is_patched(module):
        return ""
    uses = _find_uses(module)
    if not any(uses):
        return None
    reason = _find_reason_against(module, uses)
    if reason:
        return reason
    for name, value in uses.attributes.items():
        setattr(module, name, _replace(value))
    methods: dict[str, Callable[..., Any]] = {
        name: mark(rebind_globals(method, _is_operator, _replace), method)
        for name, method in uses.methods.items()
    }
    if uses.is_operator:
        methods["forward"] = make_forward(_get_original_or_itself(type(module).forward))
    for name, function in methods.items():
        # Past torch's __setattr__, which registers parameters; and in __dict__, which copies take over.
        vars(module)[name] = MethodType(function, module)
    if methods and not uses.is_operator:
        vars(module)["_replicate_for_data_parallel"] = MethodType(_REPLICATE, module)
    return ""


def _replicate_for_data_parallel(self: Any) -> Any:
    """For torch.nn.DataParallel: binds the replaced methods to the replica and its parameters."""
    replica = type(self)._replicate_for_data_parallel(self)
    for name, value in vars(self).items():
        if type(value) is MethodType and get_original(value) is not None:
            vars(replica)[name] = MethodType(value.__func__, replica)
    return replica


_REPLICATE = mark(_replicate_for_data_parallel, nn.Module._replicate_for_data_parallel)


def unpatch_module(module: nn.Module) -> str | None:
    """Undoes `patch_module`; returns the same."""
    _drop_class_methods(module)
    if not _is_patched(module):
        operators = _list_operators(module, _find_uses(module))
        if not operators:
            return None
        by_package = all(get_original(operator) is not None for operator in operators)
        return "its package is patched, not this model" if by_package else "it was not patched"
    reason = ""
    for name, value in list(vars(module).items()):
        original = get_original(value)
        if original is None:
            continue
        if type(value) is not MethodType:
            setattr(module, name, original)
        elif value.__self__ is module and hasattr(type(module), name):
            del vars(module)[name]
        else:
            reason = f"something else has taken the place of its forward, and keeps it as {name}"
    return reason


def _is_patched(module: nn.Module) -> bool:
    return any(get_original(value) is not None for value in vars(module).values())


def _drop_class_methods(module: nn.Module) -> None:
    """Deletes attributes that are methods of the class: an unpickled copy of a patched model has them."""
    for name, value in list(vars(module).items()):
        if type(value) is MethodType and value.__self__ is module:
            member = inspect.getattr_static(type(module), name, None)
            if value.__func__ is member or value.__func__ is get_original(member):
                del vars(module)[name]


def _list_operators(module: nn.Module, uses: _Uses) -> list[Any]:
    """All operators that the module uses: functions, autograd functions, partial calls of them."""
    in_methods = [
        operator
        for method in uses.methods.values()
        for operator in find_globals(method, _is_operator)
    ]
    forward = [type(module).forward] if uses.is_operator else []
    return [*uses.attributes.values(), *in_methods, *forward]


def _find_reason_against(module: nn.Module, uses: _Uses) -> str:
    """Why the module has to be left as it is; "" if it can be patched."""
    if uses.unreachable:
        return f"it is in {', '.join(uses.unreachable)}, which may be called past the module"
    for name, method in uses.methods.items():
        if name in vars(module):
            return f"its {name} is not that of its class: something else has replaced it before"
        if sets_globals(method):
            return f"its {name} changes names of its file"
    if uses.is_operator and "forward" in vars(module):
        return "its forward is not that of its class: something else has replaced it before"
    module_method = getattr(module, "decoder_method", getattr(module, "method", None))
    for operator in _list_operators(module, uses):
        original = _get_original_or_itself(getattr(operator, "func", operator))
        replacement = make_replacement(original)
        if isinstance(replacement, str):
            return f"{original.__name__}: {replacement}"
        if "method" not in replacement.roles.values():
            continue
        setting = module_method
        if isinstance(operator, functools.partial):
            arguments = dict(zip(replacement.names, operator.args, strict=False))
            setting = (arguments | operator.keywords).get("method", setting)
        if setting not in (None, *replacement.methods):
            return f"its method is {setting!r}, expected one of {', '.join(replacement.methods)}"
    return ""


def _get_original_or_itself(target: Any) -> Any:
    original = get_original(target)
    return target if original is None else original


def _replace(target: Any) -> Any:
    """The replacement of a function, or of a partial call of one."""
    if get_original(target) is not None:
        return target
    if not isinstance(target, functools.partial):
        return make_replacement(target)
    return mark(functools.partial(_replace(target.func), *target.args, **target.keywords), target)
