"""The operator as one node, which ONNX Runtime runs on Saccade's own kernel.

The kernel comes into ONNX Runtime by the Python operators of onnxruntime-extensions: a process with
Python and torch. What those operators do around the kernel is to copy every input and the output once.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.functional import deformable_attention
from saccade.integrations.onnx import plugin
from saccade.integrations.onnx.problem import (
    RefusedError,
    Size,
    Value,
    graph_of,
    need_packages,
)
from saccade.ops import registration

NAME = "native"
DOMAIN = "saccade"
SPINNING = "session.intra_op.allow_spinning"
_OPTIONS = ("num_points", "interpolation", "padding", "coordinates")


def lower(arguments: Sequence[Any]) -> Value:
    """One node saccade::DeformableAttention."""
    value, sizes, locations, weights, *options = arguments
    return _node("DeformableAttention", value, sizes, [locations, weights], options)


def lower_fused(arguments: Sequence[Any]) -> Value:
    """One node saccade::FusedDeformableAttention."""
    value, sizes, references, offsets, logits, index, *options = arguments
    points = [references, offsets, logits]
    return _node("FusedDeformableAttention", value, sizes, points, options, reference_index=index)


def _node(
    name: str,
    value: Value,
    sizes: list[Size],
    points: list[Value],
    options: Sequence[Any],
    **more: list[int],
) -> Value:
    graph = graph_of(value)
    if graph.double:
        raise RefusedError(NAME, "a float64 value", "its node is float32", "'gather'")
    *named, queries_per_map = options
    attributes = dict(zip(_OPTIONS, named, strict=True)) | more
    inputs = [
        graph.compute(value),
        graph.vector(sizes),
        *(graph.compute(tensor) for tensor in points),
        # Nothing stands for None: an input of a Python operator cannot be left out.
        graph.vector(queries_per_map or []),
    ]
    return graph.result(
        graph.node(
            DOMAIN,
            name,
            inputs,
            # Python operators have no lists among their attributes.
            {
                key: option if isinstance(option, str) else ",".join(map(str, option))
                for key, option in attributes.items()
            },
        ),
        value,
    )


def session_options(options: Any = None) -> Any:
    """ONNX Runtime's options for a session that runs the nodes of the lowering "native".

    It runs the node of the lowering "plugin" too, so that a file made for TensorRT can be tried out
    without a card.

    Args:
        options: an onnxruntime.SessionOptions to add to; None: a new one.

    Threads: the kernel has torch's (`torch.set_num_threads`), the rest of the graph the session's
    (`intra_op_num_threads`). They work by turns, so that the session's threads are told not to spin
    while they wait, unless the options say something about that.

    Returns:
        The onnxruntime.SessionOptions, with Saccade's operators registered.

    Raises:
        ModuleNotFoundError: onnxruntime or onnxruntime-extensions is not installed.
    """
    need_packages("onnxruntime", "onnxruntime_extensions")
    _register_operators()
    if options is None:
        options = importlib.import_module("onnxruntime").SessionOptions()
    try:
        options.get_session_config_entry(SPINNING)
    except RuntimeError:  # nothing was said
        options.add_session_config_entry(SPINNING, "0")
    options.register_custom_ops_library(
        importlib.import_module("onnxruntime_extensions").get_library_path()
    )
    return options


@functools.cache
def _register_operators() -> None:
    extensions = importlib.import_module("onnxruntime_extensions")
    kinds = extensions.PyCustomOpDef
    for name, operator, num_points, more in (
        ("DeformableAttention", registration.PLAIN_OPERATOR, 2, ()),
        ("FusedDeformableAttention", registration.FUSED_OPERATOR, 3, ("reference_index",)),
    ):
        tensors = [kinds.dt_float, kinds.dt_int64, *[kinds.dt_float] * num_points, kinds.dt_int64]
        extensions.onnx_op(
            op_type=f"{DOMAIN}::{name}",
            inputs=tensors,
            outputs=[kinds.dt_float],
            attrs=dict.fromkeys((*_OPTIONS, *more), kinds.dt_string),
        )(functools.partial(_or_nothing, functools.partial(_run, operator)))
    # TensorRT's node as well: a file that is meant for a card can be tried out here.
    shapes, positions = [kinds.dt_int32] * 2, [kinds.dt_float] * 2
    extensions.onnx_op(
        op_type=f"{plugin.DOMAIN}::{plugin.NAME}",
        inputs=[kinds.dt_float, *shapes, *positions],
        outputs=[kinds.dt_float],
        attrs=dict.fromkeys(plugin.ATTRIBUTES, kinds.dt_string),
    )(functools.partial(_or_nothing, _run_plugin))


def _or_nothing(run: Callable[..., _Result], *arguments: Any, **attributes: str) -> _Result:
    """What a node gives, and nothing where it cannot.

    An exception that leaves a Python operator ends the process. An empty output does not: the next
    node refuses its shape.
    """
    try:
        return run(*arguments, **attributes)
    except Exception as error:  # whatever the arguments of a broken file bring about
        logging.getLogger("saccade").error("a node of an ONNX graph gives nothing: %s", error)
        return _Result(torch.empty(0))


def _run_plugin(
    value: Any, shapes: Any, starts: Any, locations: Any, weights: Any, **_: str
) -> _Result:
    """What TensorRT's plugin computes, on Saccade's kernel."""
    value, locations, weights = map(torch.from_numpy, (value, locations, weights))
    ends = list(itertools.accumulate(height * width for height, width in shapes.tolist()))
    if starts.tolist() != [0, *ends[:-1]]:
        raise ValueError(f"level_start_index: expected {[0, *ends[:-1]]}, got {starts.tolist()}")
    with torch.inference_mode():
        output = deformable_attention(value, shapes.tolist(), locations, weights)
    return _Result(output.unflatten(-1, value.shape[2:]))


def _run(
    operator: Callable[..., Tensor],
    value: Any,
    sizes: Any,
    *tensors: Any,
    num_points: str,
    interpolation: str,
    padding: str,
    coordinates: str,
    reference_index: str | None = None,
) -> _Result:
    """What ONNX Runtime calls, with arrays that share no memory with it."""
    *points, queries_per_map = tensors
    index = [] if reference_index is None else [_ints(reference_index)]
    with torch.inference_mode():
        output = operator(
            torch.from_numpy(value),
            sizes.tolist(),
            *map(torch.from_numpy, points),
            *index,
            _ints(num_points),
            interpolation,
            padding,
            coordinates,
            queries_per_map.tolist() or None,
        )
    return _Result(output)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


class _Result:
    """The output as onnxruntime-extensions asks for it.

    It takes `shape` and `flatten().tolist()`, which of an array would be a Python float for each
    number; its C++ part copies an array just as well.
    """

    def __init__(self, output: Tensor) -> None:
        self.shape = tuple(output.shape)
        self._output = output

    def flatten(self) -> _Result:
        return self

    def tolist(self) -> Any:
        return self._output.numpy().reshape(-1)
