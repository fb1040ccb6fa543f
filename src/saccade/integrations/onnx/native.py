"""The operator as one node, which ONNX Runtime runs on Saccade's own kernel.

The Python operators of onnxruntime-extensions call the kernel, in a process with Python and torch. They
copy every input and the output once.
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
from saccade.integrations.onnx.graph import RefusedError, Value, make_graph, need_packages
from saccade.ops.registration import OPERATOR
from saccade.ops.schema import Arguments

LOWERING = "native"
DOMAIN = "saccade"
NAME = "DeformableAttention"
ATTRIBUTES = (
    "reference_index", "softmax", "num_points", "interpolation", "padding", "coordinates"
)  # fmt: skip
SPINNING = "session.intra_op.allow_spinning"


def lower(arguments: Arguments) -> Value:
    """One node saccade::DeformableAttention, with the operator's own arguments."""
    graph = make_graph(arguments.value)
    if graph.double:
        raise RefusedError(LOWERING, "a float64 value", "its node is float32", "'gather'")
    # An input of a Python operator cannot be left out: an empty tensor stands for None.
    inputs = [
        graph.to_compute_dtype(arguments.value),
        graph.vector(arguments.spatial_shapes),
        graph.to_compute_dtype(arguments.points),
        graph.to_compute_dtype(arguments.weights),
        graph.floats([])
        if arguments.reference_points is None
        else graph.to_compute_dtype(arguments.reference_points),
        graph.vector(arguments.queries_per_map or []),
    ]
    attributes = {name: _to_text(getattr(arguments, name)) for name in ATTRIBUTES}
    output = graph.node(DOMAIN, NAME, inputs, attributes)
    return graph.to_dtype_like(output, arguments.value)


def _to_text(option: str | bool | Sequence[int] | None) -> str:
    """An option as an attribute: those of Python operators are strings here, and cannot be lists."""
    if isinstance(option, str | bool):
        return str(option)
    return ",".join(map(str, option or []))


def _to_ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def session_options(options: Any = None) -> Any:
    """ONNX Runtime's options for a session that runs the nodes of the lowering "native".

    The session runs the node of the lowering "plugin" too, so that a file made for TensorRT can be tried
    out without a card.

    Args:
        options: an onnxruntime.SessionOptions to add to; None: a new one.

    Threads: the kernel has torch's (`torch.set_num_threads`), the rest of the graph the session's
    (`intra_op_num_threads`). They work by turns, so that the session's threads are set not to spin
    while they wait, unless the options set that already.

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
    except RuntimeError:  # the caller left it open
        options.add_session_config_entry(SPINNING, "0")
    options.register_custom_ops_library(
        importlib.import_module("onnxruntime_extensions").get_library_path()
    )
    return options


@functools.cache
def _register_operators() -> None:
    extensions = importlib.import_module("onnxruntime_extensions")
    kinds = extensions.PyCustomOpDef
    floats, int32, int64, text = kinds.dt_float, kinds.dt_int32, kinds.dt_int64, kinds.dt_string
    for run, domain, name, inputs, attributes in (
        (_run, DOMAIN, NAME, [floats, int64, floats, floats, floats, int64], ATTRIBUTES),
        # TensorRT's node as well: a file that is meant for a card can be tried out here.
        (_run_plugin, plugin.DOMAIN, plugin.NAME, [floats, int32, int32, floats, floats],
         plugin.ATTRIBUTES),
    ):  # fmt: skip
        extensions.onnx_op(
            op_type=f"{domain}::{name}",
            inputs=inputs,
            outputs=[floats],
            attrs=dict.fromkeys(attributes, text),
        )(functools.partial(_run_or_log, run))


def _run_or_log(run: Callable[..., _Result], *arguments: Any, **attributes: str) -> _Result:
    """The output of a node, or an empty one where it fails, after the error was logged.

    An exception that leaves a Python operator ends the process. An empty output does not: the next
    node refuses its shape.
    """
    try:
        return run(*arguments, **attributes)
    except Exception as error:  # a broken file can cause any of them
        logging.getLogger("saccade").error("a node of an ONNX graph gives nothing: %s", error)
        return _Result(torch.empty(0))


def _run_plugin(
    value: Any, shapes: Any, starts: Any, locations: Any, weights: Any, **_: str
) -> _Result:
    """The node of TensorRT's plugin, computed by Saccade's kernel."""
    value, locations, weights = map(torch.from_numpy, (value, locations, weights))
    ends = list(itertools.accumulate(height * width for height, width in shapes.tolist()))
    if starts.tolist() != [0, *ends[:-1]]:
        raise ValueError(f"level_start_index: expected {[0, *ends[:-1]]}, got {starts.tolist()}")
    with torch.inference_mode():
        output = deformable_attention(value, shapes.tolist(), locations, weights)
    return _Result(output.unflatten(-1, value.shape[2:]))


def _run(
    value: Any,
    spatial_shapes: Any,
    points: Any,
    weights: Any,
    reference_points: Any,
    queries_per_map: Any,
    *,
    reference_index: str,
    softmax: str,
    num_points: str,
    interpolation: Any,
    padding: Any,
    coordinates: Any,
) -> _Result:
    """The node of the lowering "native"; ONNX Runtime passes arrays that share no memory with it."""
    has_reference = reference_index != ""
    arguments = Arguments(
        value=torch.from_numpy(value),
        spatial_shapes=spatial_shapes.tolist(),
        points=torch.from_numpy(points),
        weights=torch.from_numpy(weights),
        reference_points=torch.from_numpy(reference_points) if has_reference else None,
        reference_index=_to_ints(reference_index) if has_reference else None,
        softmax=softmax == str(True),
        num_points=_to_ints(num_points),
        interpolation=interpolation,
        padding=padding,
        coordinates=coordinates,
        queries_per_map=queries_per_map.tolist() or None,
    )
    with torch.inference_mode():
        return _Result(OPERATOR(*arguments))


class _Result:
    """The output in the form that onnxruntime-extensions reads.

    It reads `shape` and `flatten().tolist()`, which would make a Python float of every element of an
    array; its C++ part copies an array just as well.
    """

    def __init__(self, output: Tensor) -> None:
        self.shape = tuple(output.shape)
        self._output = output

    def flatten(self) -> _Result:
        return self

    def tolist(self) -> Any:
        return self._output.numpy().reshape(-1)
