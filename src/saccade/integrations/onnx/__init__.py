"""ONNX: what `torch.onnx.export` writes for the operator, and a session that runs it natively.

A call of saccade is one node `saccade::deformable_attention` of the exported program. The tables here
translate that node, in four ways which docs/onnx.md compares. Packages of onnx are imported when a table
or a session is made, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from saccade.checks import check_option
from saccade.integrations.onnx import gather, grid_sample, native, plugin
from saccade.integrations.onnx.call import make_call
from saccade.integrations.onnx.graph import PACKAGES, Value, need_packages
from saccade.integrations.onnx.native import session_options as session_options
from saccade.ops.registration import OPERATOR
from saccade.ops.schema import Arguments

Lowering = Literal["grid_sample", "gather", "plugin", "native"]


def translations(
    lowering: Lowering = "grid_sample",
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` is to write for the operator.

    Args:
        lowering: "grid_sample", one GridSample of ONNX per level; "gather", Gather and arithmetic with
            five axes at most; "plugin", one node of TensorRT's `MultiscaleDeformableAttnPlugin_TRT`;
            "native", one node that `session_options` runs on Saccade's own kernel.

    Returns:
        A `custom_translation_table` for `torch.onnx.export(..., dynamo=True)`. What a lowering cannot
        express is refused at the export; the message names the option, the reason, and which
        lowering can.

    Raises:
        ValueError: there is no such lowering.
        ModuleNotFoundError: onnx or onnxscript is not installed.

    Example:
        >>> import torch
        >>> from saccade.integrations import onnx as saccade_onnx
        >>> torch.onnx.export(                                                    # doctest: +SKIP
        ...     model, example, "model.onnx", dynamo=True,
        ...     custom_translation_table=saccade_onnx.translations("grid_sample"))
    """
    check_option("lowering", lowering, Lowering)
    need_packages(*PACKAGES)
    lower = _LOWERINGS[lowering]

    # The exporter needs a function with a name and a signature.
    def deformable_attention(*arguments: Any) -> Any:
        return lower(Arguments(*arguments))

    return {OPERATOR: deformable_attention}


_LOWERINGS: dict[str, Callable[[Arguments], Value]] = {
    "grid_sample": lambda arguments: grid_sample.lower(make_call(arguments)),
    "gather": lambda arguments: gather.lower(make_call(arguments)),
    "plugin": lambda arguments: plugin.lower(make_call(arguments)),
    "native": native.lower,
}
