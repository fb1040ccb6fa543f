"""Reads the two files of `saccade explain`: a saved module, and the arguments of its forward.

A file can put anything into the attributes of a pickled module: other methods, hooks, sizes that fit no
tensor. So the file's own objects are never used. Its classes are unpickled as records, and a new module
is made from the numbers and tensors in them, which are checked one by one.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saccade.checks import VALUE_DTYPES, format_shape
from saccade.integrations.checkpoints.untrusted import RefusedGlobalError, load_torch
from saccade.nn import DeformableAttention, MultiScaleDeformableAttention

Module = DeformableAttention | MultiScaleDeformableAttention


class _Record:
    """Stands for an object of a file: its attributes, of which none is called."""

    __slots__ = ("attributes",)
    name: ClassVar[str]

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}

    def get(self, name: str) -> object:
        """An attribute, or None."""
        return getattr(self, "attributes", {}).get(name)


class _LinearRecord(_Record):
    __slots__ = ()
    name = "torch.nn.modules.linear.Linear"


class _SingleMapRecord(_Record):
    __slots__ = ()
    name = f"{DeformableAttention.__module__}.{DeformableAttention.__qualname__}"


class _MultiScaleRecord(_Record):
    __slots__ = ()
    name = (
        f"{MultiScaleDeformableAttention.__module__}.{MultiScaleDeformableAttention.__qualname__}"
    )


_RECORDS = (_LinearRecord, _SingleMapRecord, _MultiScaleRecord)
_LARGEST_SIZE = 2**31 - 1
_LAYERS = ("sampling_offsets", "attention_weights", "reference_points", "value_proj", "output_proj")


def load_module(path: Path) -> Module:
    """Loads a module that `torch.save(module, path)` wrote, without running what the file contains.

    Args:
        path: the file.

    Returns:
        A new module of the class in the file, with its settings and weights, in evaluation mode.

    Raises:
        ValueError: the file is missing, is not a file of torch.save, exceeds the bounds on files from
            elsewhere, or holds an object other than a `saccade.nn.DeformableAttention` or
            `saccade.nn.MultiScaleDeformableAttention`, or one that lacks a part. The message begins
            with MODULE, and names the file or the part.
    """
    loaded = _load("MODULE", path)
    if not isinstance(loaded, _SingleMapRecord | _MultiScaleRecord):
        hint = " (a state dict? save the module itself)" if isinstance(loaded, dict) else ""
        raise ValueError(
            "MODULE: expected a saccade.nn.DeformableAttention or MultiScaleDeformableAttention "
            f"saved by torch.save(module, path), {path} holds a {_kind(loaded)}{hint}"
        )
    try:
        return _make_module(loaded)
    except (TypeError, ValueError) as error:
        # The start of the message: a text in the file can be long.
        raise ValueError(f"MODULE: {path}: {str(error)[:500]}") from error


def load_inputs(path: Path, module: Module) -> dict[str, Any]:
    """Loads the keyword arguments of the module's forward that `torch.save(dict, path)` wrote.

    Args:
        path: the file.
        module: the module whose forward takes them.

    Returns:
        The arguments by name, without `return_sampling`; their tensors are plain and on the CPU.

    Raises:
        ValueError: the file is missing, is not a file of torch.save, exceeds the bounds on files from
            elsewhere, does not hold a dict, its keys are not the arguments of the module's forward, or
            an argument is of another kind. The message begins with INPUTS, and names the file or the
            argument.
    """
    inputs = _load("INPUTS", path)
    signature = inspect.signature(type(module).forward)
    parameters = [name for name in signature.parameters if name not in ("self", "return_sampling")]
    required = [
        name for name in parameters if signature.parameters[name].default is inspect.Parameter.empty
    ]
    if not isinstance(inputs, dict):
        raise ValueError(
            f"INPUTS: expected a dict with the arguments of {type(module).__name__}.forward "
            f"({', '.join(parameters)}), {path} holds a {_kind(inputs)}"
        )
    inputs = {name: value for name, value in inputs.items() if name != "return_sampling"}
    unknown = [_format_key(name) for name in inputs if name not in parameters]
    missing = [name for name in required if name not in inputs]
    if unknown or missing:
        raise ValueError(
            f"INPUTS: expected the arguments of {type(module).__name__}.forward "
            f"({', '.join(parameters)}), {path} "
            + " and ".join(
                f"{verb} {', '.join(names[:10])}"
                for verb, names in (("lacks", missing), ("has in addition", unknown))
                if names
            )
        )
    return {name: _to_plain(f"INPUTS: {name}", value) for name, value in inputs.items()}


def _load(name: str, path: Path) -> object:
    try:
        return load_torch(path, allowed=[(record, record.name) for record in _RECORDS])
    except RefusedGlobalError as error:
        raise ValueError(
            f"{name}: cannot load {path}: it contains {error.name} besides tensors and Saccade's "
            "modules, and is not opened because such a file can run any code"
        ) from error
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _format_key(key: object) -> str:
    return key[:60] if isinstance(key, str) else f"a key of type {type(key).__name__}"


def _to_plain(name: str, value: object) -> object:
    """The value of an argument, if it is a tensor without what a file can attach to one."""
    if isinstance(value, Tensor):
        return _to_plain_tensor(name, value)
    if isinstance(value, list | tuple):
        return [_to_plain(name, item) for item in value]
    if value is not None and not isinstance(value, int):
        raise ValueError(f"{name}: expected a tensor, integers or None, got {_kind(value)}")
    return value


def _to_plain_tensor(name: str, tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.is_meta:
        raise ValueError(f"{name}: expected numbers, got a meta tensor, which has none")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "a quantized tensor" if tensor.is_quantized else tensor.layout
        raise ValueError(f"{name}: expected a dense (strided) tensor, got {kind}")
    # A pickled tensor can have attributes that hide its methods; this one has none.
    return Tensor.detach(tensor)


def _make_module(record: _SingleMapRecord | _MultiScaleRecord) -> Module:
    """A new module with the settings and weights of a record."""
    weights = _read_weights(record)
    embed_dim, num_heads = _read_size(record, "embed_dim"), _read_size(record, "num_heads")
    spatial_dims = _read_size(record, "spatial_dims")
    num_points = record.get("num_points")
    if not isinstance(num_points, list) or not all(type(count) is int for count in num_points):
        raise ValueError(f"num_points: expected a list of ints, got {_describe(num_points)}")
    if not num_points or min(num_points) < 1 or max(num_points) > _LARGEST_SIZE:
        raise ValueError(
            f"num_points: expected 1 to {_LARGEST_SIZE} for each level, got {_describe(num_points)}"
        )
    # The file bounds all sizes before a module is made from them.
    points = num_heads * sum(num_points)
    attended = embed_dim if "value_proj.weight" in weights else num_heads * embed_dim
    sizes = {
        "sampling_offsets": (points * spatial_dims, embed_dim),
        "attention_weights": (points, embed_dim),
        "output_proj": (embed_dim, attended),
    }
    if isinstance(record, _MultiScaleRecord) or "value_proj.weight" in weights:
        sizes["value_proj"] = (embed_dim, embed_dim)
    if isinstance(record, _SingleMapRecord) and "reference_points.weight" in weights:
        sizes["reference_points"] = (spatial_dims, embed_dim)
    _check_weights(sizes, weights)
    options: dict[str, Any] = {
        "spatial_dims": spatial_dims,
        "interpolation": record.get("interpolation"),
        "padding": record.get("padding"),
    }
    module: Module
    if isinstance(record, _MultiScaleRecord):
        module = MultiScaleDeformableAttention(
            embed_dim, num_heads, len(num_points), num_points, **options
        )
    else:
        if len(num_points) != 1:
            raise ValueError(f"num_points: expected one level, got {len(num_points)}")
        module = DeformableAttention(
            embed_dim,
            num_heads,
            num_points[0],
            value_projection="value_proj" in sizes,
            predict_reference_points="reference_points" in sizes,
            **options,
        )
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def _read_size(record: _Record, name: str) -> int:
    size = record.get(name)
    if type(size) is not int:
        raise ValueError(f"{name}: expected an int, got {_describe(size)}")
    if not 1 <= size <= _LARGEST_SIZE:
        raise ValueError(f"{name}: expected 1 to {_LARGEST_SIZE}, got {_describe(size)}")
    return size


def _describe(value: object) -> str:
    """The value as an error message shows it: short, whatever a file holds."""
    if value is None:
        return "none"
    return f"{value!r:.60}" if isinstance(value, int | str | list) else _kind(value)


def _kind(value: object) -> str:
    """The name of a value's class, of a record that of the class in the file."""
    return value.name.rpartition(".")[2] if isinstance(value, _Record) else type(value).__name__


def _read_weights(record: _Record) -> dict[str, Tensor]:
    """The weights and biases of the layers that a module has."""
    layers = record.get("_modules")
    weights = {}
    for layer_name in _LAYERS:
        layer = layers.get(layer_name) if isinstance(layers, dict) else None
        if layer is None:
            continue
        if not isinstance(layer, _LinearRecord):
            raise ValueError(f"{layer_name}: expected a torch.nn.Linear, got {_describe(layer)}")
        parameters = layer.get("_parameters")
        for name in ("weight", "bias"):
            tensor = parameters.get(name) if isinstance(parameters, dict) else None
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{layer_name}.{name}: expected a Tensor, got {_describe(tensor)}")
            weights[f"{layer_name}.{name}"] = _to_plain_tensor(f"{layer_name}.{name}", tensor)
    return weights


def _check_weights(sizes: dict[str, tuple[int, int]], weights: dict[str, Tensor]) -> None:
    """Raises unless the weights are those of layers with these sizes, outputs and inputs."""
    expected: dict[str, list[int]] = {}
    for layer_name, (outputs, inputs) in sizes.items():
        expected[f"{layer_name}.weight"] = [outputs, inputs]
        expected[f"{layer_name}.bias"] = [outputs]
    for name in {**expected, **weights}:
        shape = _describe(expected.get(name))
        if name not in weights:
            raise ValueError(f"{name}: expected {shape}, got none")
        if name not in expected or list(weights[name].shape) != expected[name]:
            raise ValueError(f"{name}: expected {shape}, got {format_shape(weights[name])}")
        if weights[name].dtype not in VALUE_DTYPES:
            raise ValueError(
                f"{name}: expected one of {', '.join(map(str, VALUE_DTYPES))}, "
                f"got {weights[name].dtype}"
            )
