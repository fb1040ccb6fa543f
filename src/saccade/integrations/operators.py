"""The operator in other people's code: recognised by what it takes, and by its numbers.

Every package carries the same operator under another name: `ms_deform_attn_core_pytorch`,
`multi_scale_deformable_attn_pytorch`, `deformable_attention_core_func_v2`. A list of names would age.
What they take does not: a value, the shapes of its levels, sampling locations, attention weights. A
function that takes these is called once on a small random map; if Saccade gives the same numbers, in one
of the layouts in use, it can stand in for that function, and if not, it does not.
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

# What a parameter is for, by its name. Unlisted parameters make a function unknown.
_ROLES = {
    "value": "value",
    "value_spatial_shapes": "shapes",
    "spatial_shapes": "shapes",
    "input_spatial_shapes": "shapes",
    # The same on the host, as tuples: nothing is read back from a GPU.
    "value_spatial_shapes_list": "sizes",
    "value_spatial_shapes_hw": "sizes",
    "sampling_locations": "locations",
    "attention_weights": "weights",
    "num_points_list": "num_points",
    "method": "method",
    # Levels follow each other without gaps everywhere, so that where they start adds nothing.
    "level_start_index": "starts",
    "value_level_start_index": "starts",
    "input_level_start_index": "starts",
    # How the CUDA operator of 2020 divides its batch.
    "im2col_step": "step",
}
_OF_AUTOGRAD = ["value", "shapes", "starts", "locations", "weights", "step"]
_NEEDED = {"value", "shapes", "locations", "weights"}
# The methods of RT-DETRv2 and D-FINE, with the options of each that are in use: first those of transformers,
# which clamps each axis by itself, then those of the authors, who clamp both to the height.
METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "default": ({},),
    "discrete": (
        {"interpolation": "discrete", "padding": "border"},
        {"interpolation": "discrete", "padding": "border_height"},
    ),
}


def _from_channels(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2)


def _from_levels(value: list[Tensor]) -> Tensor:
    return torch.cat(list(value), dim=-1).permute(0, 3, 1, 2)


class Layout(NamedTuple):
    """How a function takes the value, and how Saccade's [B, S, M, D] is made from that."""

    name: str
    understood: Callable[[Any], Tensor]
    made: Callable[[Tensor, list[int]], Any]
    """From [B, S, M, D] and the sizes of the levels, for the trial."""


LAYOUTS = (
    Layout("[B, S, M, D]", lambda value: value, lambda value, sizes: value),
    Layout(
        "[B, M, D, S]", _from_channels, lambda value, sizes: value.permute(0, 2, 3, 1).contiguous()
    ),
    Layout(
        "one [B, M, D, H * W] a level",
        _from_levels,
        lambda value, sizes: list(value.permute(0, 2, 3, 1).split(sizes, dim=-1)),
    ),
)


class Replacement:
    """Saccade behind the signature of another package's operator, which it keeps as `saccade_original`.

    It is called as the original is: as a function, or by `apply` where the original is an autograd
    function.
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
        """The operator; takes what the original takes."""
        if len(positional) > len(self.names) or not named.keys() <= self.roles.keys():
            raise TypeError(
                f"{self.__name__}: expected the arguments ({', '.join(self.names)}), got "
                f"{len(positional)} by position and {sorted(named)} by name"
            )
        given = dict(zip(self.names, positional, strict=False)) | named
        found = dict(self.defaults)
        for name, argument in given.items():
            if argument is not None:
                found[self.roles[name]] = argument
        for role in _NEEDED:
            if role not in found and not (role == "shapes" and "sizes" in found):
                missing = ", ".join(name for name in self.names if self.roles[name] == role)
                raise TypeError(f"{self.__name__}: expected the argument {missing}, got none")
        method = found.get("method", "default")
        if method not in self.methods:
            raise ValueError(f"method: expected one of {', '.join(self.methods)}, got {method!r}")
        shapes: Any = found.get("sizes", found.get("shapes"))
        locations, weights = found["locations"], found["weights"]
        num_points = found.get("num_points")
        if num_points is None and locations.dim() == 5:
            # RF-DETR, while it is exported, has no axis for the levels.
            num_points = locations.shape[3] // len(shapes)
        if weights.dim() == 4 and locations.dim() == 6:
            # RF-DETR has none for them in the weights.
            weights = weights.reshape(locations.shape[:-1])
        return deformable_attention(
            self.layout.understood(found["value"]),
            shapes,
            locations,
            weights,
            num_points=num_points,
            **self.methods[method],
        )

    apply = __call__

    def __deepcopy__(self, memo: dict[int, Any]) -> Replacement:
        return self  # as functions do

    def __reduce__(self) -> Any:
        # A pickled model comes back as its package wrote it; `patch` is said once more.
        original = self.saccade_original
        return _in_file, (original.__module__, original.__qualname__)

    def __repr__(self) -> str:
        return f"<saccade for {self.__module__}.{self.__name__}>"


def _in_file(module: str, qualname: str) -> Any:
    """The function of a file, not what may stand in for it there."""
    found = functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    return original_of(found) or found


def mark(replacement: Any, original: Any) -> Any:
    """Notes on a function or a partial call what it stands in for."""
    # With itself: functools.wraps copies attributes to whatever is put around it.
    replacement.saccade_original = (replacement, original)
    return replacement


def original_of(found: object) -> Any:
    """What a replacement stands in for; None where nothing was replaced."""
    # By type(): some objects answer isinstance() with a warning or an import.
    kind = type(found)
    if kind is MethodType:
        return original_of(found.__func__)  # type: ignore[attr-defined]
    if kind is Replacement:
        return found.saccade_original  # type: ignore[attr-defined]
    if kind is FunctionType or kind is functools.partial:
        marked, original = getattr(found, "saccade_original", None) or (None, None)
        if marked is found:
            return original
    if kind is functools.partial and type(found.func) is Replacement:  # type: ignore[attr-defined]
        # Made by a module, while its package was patched.
        call: Any = found
        return functools.partial(call.func.saccade_original, *call.args, **call.keywords)
    return None


def is_candidate(found: object) -> bool:
    """Whether it may be the operator: something called with a value and sampling locations."""
    if original_of(found) is not None:
        return False
    names = _parameters(found)
    return "value" in names and any(name.startswith("sampling_loc") for name in names)


@functools.cache
def replacement_of(found: Callable[..., Any]) -> Replacement | str:
    """Saccade behind a function or an autograd function of another package, or why not.

    Args:
        found: a candidate.

    Returns:
        What can take its place; or a sentence that says what is unknown about it.
    """
    names = _parameters(found)
    unknown = [name for name in names if name not in _ROLES]
    roles = {name: _ROLES[name] for name in names if name in _ROLES}
    if unknown or not set(roles.values()) >= _NEEDED or len(set(roles.values())) < len(roles):
        return f"it takes ({', '.join(names)}), which is no operator that saccade knows"
    if not is_autograd_function(found):
        return _by_trial(found, roles)
    if list(roles.values()) != _OF_AUTOGRAD:
        return f"it takes ({', '.join(names)}), which is no operator that saccade knows"
    trial = _trial([2, 2]).arguments(roles, LAYOUTS[0], "default")
    try:
        with torch.no_grad():
            found.apply(*trial.values())  # type: ignore[attr-defined]
    except Exception:  # whatever a compiled extension does that is missing or wants a GPU
        # It cannot be tried. With these six arguments its kind has had this meaning since 2020.
        return Replacement(found, roles, LAYOUTS[0], {"default": {}})
    return _by_trial(found, roles)


def is_autograd_function(found: object) -> bool:
    return is_class(found) and issubclass(found, torch.autograd.Function)  # type: ignore[arg-type]


def is_class(found: object) -> bool:
    """Whether it is a class; by type(), for some objects answer isinstance() with a warning."""
    return issubclass(type(found), type)


def _parameters(found: object) -> list[str]:
    if is_autograd_function(found):
        names = list(inspect.signature(found.forward).parameters)  # type: ignore[attr-defined]
        return names[1:]  # without the context
    names = list(_signature(found).parameters) if type(found) is FunctionType else []
    return names[1:] if names[:1] == ["self"] else names


def _signature(found: Any) -> inspect.Signature:
    try:
        return inspect.signature(found)
    except (TypeError, ValueError):  # a decorator that went wrong; not what is looked for
        return inspect.Signature()


class _NoModule:
    """In the place of `self`: the operator has no use for its module."""

    def __getattribute__(self, name: str) -> Any:
        raise TypeError(f"it reads {name!r} of its module")


class _Trial(NamedTuple):
    """A small call: maps wider than high, points within and without, other counts on each level."""

    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    num_points: list[int]
    starts: list[int]

    def arguments(self, roles: dict[str, str], layout: Layout, method: str) -> dict[str, Any]:
        of_role = {
            "value": layout.made(self.value, [height * width for height, width in self.shapes]),
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
            of_role["locations"] = self.locations.unflatten(3, (2, 2))
            of_role["weights"] = self.weights.unflatten(3, (2, 2))
        return {name: of_role[role] for name, role in roles.items()}


def _trial(num_points: list[int]) -> _Trial:
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


def _by_trial(found: Callable[..., Any], roles: dict[str, str]) -> Replacement | str:
    """What stands in for a function, if in some layout and by some options it gives its numbers."""
    trial = _trial([3, 1] if "num_points" in roles.values() else [2, 2])
    theirs = _as_function(found)
    parameters = _signature(found).parameters
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
            arguments = trial.arguments(roles, layout, method)
            expected = _outcome(theirs, arguments)
            if not isinstance(expected, Tensor):
                failure = failure or expected
                continue
            for options in METHODS[method]:
                ours = Replacement(found, roles, layout, {method: options}, defaults)
                if _same(expected, _outcome(ours, arguments)):
                    methods[method] = options
                    break
        if methods:
            break
    if not methods:
        problem = f" (it failed with {failure})" if failure else ""
        return f"on a trial it gives other numbers than saccade in every known layout{problem}"
    if defaults.get("method", "default") not in methods:
        return f"its method is {defaults['method']!r} by default, expected {', '.join(methods)}"
    method = next(iter(methods))
    in_order = _outcome(theirs, trial.arguments(roles, layout, method))
    # As if the second level lay before the first: nobody should notice, or say that it is wrong.
    swapped = trial._replace(starts=[3 * 4, 0]).arguments(roles, layout, method)
    out_of_order = _outcome(theirs, swapped)
    if isinstance(out_of_order, Tensor) and not _same(in_order, out_of_order):
        return "it reads where the levels start, instead of one behind the other"
    return Replacement(found, roles, layout, methods, defaults)


def _as_function(found: Any) -> Callable[..., Any]:
    if is_autograd_function(found):
        return lambda **arguments: found.apply(*arguments.values())
    if next(iter(_signature(found).parameters), "") == "self":
        return functools.partial(found, _NoModule())
    return found  # type: ignore[no-any-return]


def _outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Tensor | str:
    """What a function gives, or how it fails: whatever another package does with a wrong layout."""
    try:
        with torch.no_grad():
            output = function(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return output if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _same(expected: Tensor | str, found: Tensor | str) -> bool:
    return (
        isinstance(expected, Tensor)
        and isinstance(found, Tensor)
        and expected.shape == found.shape
        and torch.allclose(expected.double(), found.double(), rtol=0, atol=1e-5)
    )


def as_forward(original: Any) -> Callable[..., Any]:
    """The forward of a module that is the operator."""
    replacement: Any = replacement_of(original)

    @functools.wraps(original)
    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        return replacement(*positional, **named)

    return mark(forward, original)  # type: ignore[no-any-return]
