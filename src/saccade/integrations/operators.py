"""Recognises the operator in other packages by its parameters and its results.

Every package has the same operator under another name: `ms_deform_attn_core_pytorch`,
`multi_scale_deformable_attn_pytorch`, `deformable_attention_core_func_v2`. A list of names would age; the
parameters stay: a value, the shapes of its levels, sampling locations, attention weights. A function with
these parameters is called once on a small random map. Saccade replaces it if it gives the same result in
one of the layouts in use.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.functional import deformable_attention

# The role of a parameter, by its name. A function with another parameter is not recognised.
_ROLES = {
    "value": "value",
    "value_spatial_shapes": "shapes",
    "spatial_shapes": "shapes",
    "input_spatial_shapes": "shapes",
    # The shapes as tuples on the host, so that nothing is read back from a GPU.
    "value_spatial_shapes_list": "sizes",
    "value_spatial_shapes_hw": "sizes",
    "sampling_locations": "locations",
    "attention_weights": "weights",
    "num_points_list": "num_points",
    "method": "method",
    # Levels follow each other without gaps in every package: their start indices add nothing.
    "level_start_index": "starts",
    "value_level_start_index": "starts",
    "input_level_start_index": "starts",
    # How the CUDA operator of 2020 divides its batch.
    "im2col_step": "step",
}
_AUTOGRAD_ROLES = ["value", "shapes", "starts", "locations", "weights", "step"]
_REQUIRED_ROLES = {"value", "shapes", "locations", "weights"}
# The methods of RT-DETRv2 and D-FINE with their options: first those of transformers, which clamps each axis
# to its own size, then those of the authors' code, which clamps both to the height.
METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "default": ({},),
    "discrete": (
        {"interpolation": "discrete", "padding": "border"},
        {"interpolation": "discrete", "padding": "border_height"},
    ),
}


def _parse_channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2)


def _parse_levels(value: list[Tensor]) -> Tensor:
    return torch.cat(list(value), dim=-1).permute(0, 3, 1, 2)


class Layout(NamedTuple):
    """The form in which a function takes the value."""

    name: str
    parse: Callable[[Any], Tensor]
    """To Saccade's [B, S, M, D]."""
    make: Callable[[Tensor, list[int]], Any]
    """From [B, S, M, D] and the number of positions of each level, for the trial."""


LAYOUTS = (
    Layout("[B, S, M, D]", lambda value: value, lambda value, sizes: value),
    Layout(
        "[B, M, D, S]",
        _parse_channels_first,
        lambda value, sizes: value.permute(0, 2, 3, 1).contiguous(),
    ),
    Layout(
        "[B, M, D, H * W] per level",
        _parse_levels,
        lambda value, sizes: list(value.permute(0, 2, 3, 1).split(sizes, dim=-1)),
    ),
)


class Replacement:
    """Saccade with the signature of another package's operator.

    It is called as the original is: as a function, or by `apply` where the original is an autograd
    function. `saccade_original` is the original.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        roles: dict[str, str],
        layout: Layout,
        methods: dict[str, dict[str, Any]],
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self.saccade_original = original
        self.roles = roles
        self.defaults = defaults or {}
        self.names = list(roles)
        self.layout = layout
        self.methods = methods
        self.__name__ = getattr(original, "__name__", type(original).__name__)
        self.__module__ = original.__module__
        self.__doc__ = original.__doc__

    def __call__(self, *positional: Any, **named: Any) -> Tensor:
        """Runs the operator with the arguments of the original."""
        if len(positional) > len(self.names) or not named.keys() <= self.roles.keys():
            raise TypeError(
                f"{self.__name__}: expected the arguments ({', '.join(self.names)}), got "
                f"{len(positional)} by position and {sorted(named)} by name"
            )
        arguments = dict(self.defaults)
        for name, argument in (dict(zip(self.names, positional, strict=False)) | named).items():
            if argument is not None:
                arguments[self.roles[name]] = argument
        for role in _REQUIRED_ROLES:
            if role not in arguments and not (role == "shapes" and "sizes" in arguments):
                missing = ", ".join(name for name in self.names if self.roles[name] == role)
                raise TypeError(f"{self.__name__}: expected the argument {missing}, got none")
        method = arguments.get("method", "default")
        if method not in self.methods:
            raise ValueError(f"method: expected one of {', '.join(self.methods)}, got {method!r}")
        shapes: Any = arguments.get("sizes", arguments.get("shapes"))
        locations, weights = arguments["locations"], arguments["weights"]
        num_points = arguments.get("num_points")
        if num_points is None and locations.dim() == 5:
            # RF-DETR's locations lack the axis of the levels while the model is exported.
            num_points = locations.shape[3] // len(shapes)
        if weights.dim() == 4 and locations.dim() == 6:
            # RF-DETR's weights lack it always.
            weights = weights.reshape(locations.shape[:-1])
        return deformable_attention(
            self.layout.parse(arguments["value"]),
            shapes,
            locations,
            weights,
            num_points=num_points,
            **self.methods[method],
        )

    apply = __call__

    def __deepcopy__(self, memo: dict[int, Any]) -> Replacement:
        return self  # as for functions

    def __reduce__(self) -> Any:
        # An unpickled model is as its package wrote it; `patch` has to be called once more.
        original = self.saccade_original
        return _import_original, (original.__module__, original.__qualname__)

    def __repr__(self) -> str:
        return f"<saccade for {self.__module__}.{self.__name__}>"


def _import_original(module: str, qualname: str) -> Any:
    """The function of a file, or the original where a replacement has its name."""
    target = functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    return get_original(target) or target


def mark(replacement: Any, original: Any) -> Any:
    """Notes on a function or a partial call which original it replaces; returns it."""
    # The pair has the replacement itself too: functools.wraps copies attributes to other functions.
    replacement.saccade_original = (replacement, original)
    return replacement


def get_original(target: object) -> Any:
    """What a replacement replaces; None for anything else."""
    # By type(), because some objects answer isinstance() with a warning or an import.
    cls = type(target)
    if cls is MethodType:
        return get_original(target.__func__)  # type: ignore[attr-defined]
    if cls is Replacement:
        return target.saccade_original  # type: ignore[attr-defined]
    if cls is FunctionType or cls is functools.partial:
        marked, original = getattr(target, "saccade_original", None) or (None, None)
        if marked is target:
            return original
    if cls is functools.partial and type(target.func) is Replacement:  # type: ignore[attr-defined]
        # A module made this partial call while its package was patched.
        call: Any = target
        return functools.partial(call.func.saccade_original, *call.args, **call.keywords)
    return None


def is_candidate(target: object) -> bool:
    """Whether the object may be the operator: it has parameters for a value and sampling locations."""
    if get_original(target) is not None:
        return False
    names = _get_parameter_names(target)
    return "value" in names and any(name.startswith("sampling_loc") for name in names)


@functools.cache
def make_replacement(target: Callable[..., Any]) -> Replacement | str:
    """A replacement of a function or an autograd function of another package.

    Args:
        target: a candidate.

    Returns:
        The replacement; or a sentence that says why there is none.
    """
    names = _get_parameter_names(target)
    unknown = [name for name in names if name not in _ROLES]
    roles = {name: _ROLES[name] for name in names if name in _ROLES}
    refusal = f"it takes ({', '.join(names)}), which is not an operator that saccade knows"
    if unknown or not set(roles.values()) >= _REQUIRED_ROLES or len({*roles.values()}) < len(roles):
        return refusal
    if not is_autograd_function(target):
        return _replace_by_trial(target, roles)
    if list(roles.values()) != _AUTOGRAD_ROLES:
        return refusal
    trial = _make_trial([2, 2]).make_arguments(roles, LAYOUTS[0], "default")
    try:
        with torch.no_grad():
            target.apply(*trial.values())  # type: ignore[attr-defined]
    except Exception:  # the compiled extension is missing, or needs a GPU, with whatever error
        # It cannot be tried. These six arguments have had this meaning since 2020.
        return Replacement(target, roles, LAYOUTS[0], {"default": {}})
    return _replace_by_trial(target, roles)


def is_autograd_function(target: object) -> bool:
    return is_class(target) and issubclass(target, torch.autograd.Function)  # type: ignore[arg-type]


def is_class(target: object) -> bool:
    """Whether the object is a class; decided by type(), because some objects answer isinstance() with a warning."""
    return issubclass(type(target), type)


def _get_parameter_names(target: object) -> list[str]:
    if is_autograd_function(target):
        names = list(inspect.signature(target.forward).parameters)  # type: ignore[attr-defined]
        return names[1:]  # without the context
    names = list(_get_signature(target).parameters) if type(target) is FunctionType else []
    return names[1:] if names[:1] == ["self"] else names


def _get_signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # a decorator with a wrong signature, for example
        return inspect.Signature()


class _NoModule:
    """Stands for `self` in a trial: the operator must not read its module."""

    def __getattribute__(self, name: str) -> Any:
        raise TypeError(f"it reads {name!r} of its module")


class _Trial(NamedTuple):
    """A small call: maps wider than high, points inside and outside, other numbers of them per level."""

    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    num_points: list[int]
    starts: list[int]

    def make_arguments(self, roles: dict[str, str], layout: Layout, method: str) -> dict[str, Any]:
        by_role = {
            "value": layout.make(self.value, [height * width for height, width in self.shapes]),
            "shapes": torch.tensor(self.shapes, device="cpu"),
            "sizes": self.shapes,
            "locations": self.locations,
            "weights": self.weights,
            "num_points": self.num_points,
            "method": method,
            "starts": torch.tensor(self.starts, device="cpu"),
            "step": 64,
        }
        if "num_points" not in roles.values():
            by_role["locations"] = self.locations.unflatten(3, (2, 2))
            by_role["weights"] = self.weights.unflatten(3, (2, 2))
        return {name: by_role[role] for name, role in roles.items()}


def _make_trial(num_points: list[int]) -> _Trial:
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64, device="cpu")

    shapes = [(5, 7), (3, 4)]
    return _Trial(
        random(2, 5 * 7 + 3 * 4, 2, 3) - 0.5,
        shapes,
        random(2, 9, 2, 4, 2) * 1.6 - 0.3,
        random(2, 9, 2, 4),
        num_points,
        [0, 5 * 7],
    )


def _replace_by_trial(target: Callable[..., Any], roles: dict[str, str]) -> Replacement | str:
    """The replacement of a function whose result Saccade gives in some layout with some options."""
    trial = _make_trial([3, 1] if "num_points" in roles.values() else [2, 2])
    original = _as_function(target)
    parameters = _get_signature(target).parameters
    defaults = {
        role: parameters[name].default
        for name, role in roles.items()
        if role in ("method", "num_points")
        and parameters[name].default not in (None, inspect.Parameter.empty)
    }
    methods: dict[str, dict[str, Any]] = {}
    failure = ""
    for layout in LAYOUTS:
        for method in METHODS if "method" in roles.values() else ("default",):
            arguments = trial.make_arguments(roles, layout, method)
            expected = _run(original, arguments)
            if not isinstance(expected, Tensor):
                failure = failure or expected
                continue
            for options in METHODS[method]:
                ours = Replacement(target, roles, layout, {method: options}, defaults)
                if _is_same(expected, _run(ours, arguments)):
                    methods[method] = options
                    break
        if methods:
            break
    if not methods:
        reason = f" (it failed with {failure})" if failure else ""
        return f"on a trial it gives other numbers than saccade in every known layout{reason}"
    if defaults.get("method", "default") not in methods:
        return f"its method is {defaults['method']!r} by default, expected {', '.join(methods)}"
    method = next(iter(methods))
    in_order = _run(original, trial.make_arguments(roles, layout, method))
    # The start indices claim that the second level is before the first: the result must not change.
    swapped = trial._replace(starts=[3 * 4, 0]).make_arguments(roles, layout, method)
    out_of_order = _run(original, swapped)
    if isinstance(out_of_order, Tensor) and not _is_same(in_order, out_of_order):
        return "it reads where the levels start, instead of one behind the other"
    return Replacement(target, roles, layout, methods, defaults)


def _as_function(target: Any) -> Callable[..., Any]:
    if is_autograd_function(target):
        return lambda **arguments: target.apply(*arguments.values())
    if next(iter(_get_signature(target).parameters), "") == "self":
        return functools.partial(target, _NoModule())
    return target  # type: ignore[no-any-return]


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> Tensor | str:
    """The output of a function, or its error: a function may raise anything for a wrong layout."""
    try:
        with torch.no_grad():
            output = function(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return output if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _is_same(expected: Tensor | str, output: Tensor | str) -> bool:
    return (
        isinstance(expected, Tensor)
        and isinstance(output, Tensor)
        and expected.shape == output.shape
        and torch.allclose(expected.double(), output.double(), rtol=0, atol=1e-5)
    )


def make_forward(original: Any) -> Callable[..., Any]:
    """The replacement of a module's forward that is the operator."""
    replacement: Any = make_replacement(original)

    @functools.wraps(original)
    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        return replacement(*positional, **named)

    return mark(forward, original)  # type: ignore[no-any-return]
