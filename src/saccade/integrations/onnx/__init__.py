"""ONNX: what `torch.onnx.export` writes for the operators, and a session that runs it natively.

A call of saccade is one node of the exported program, `saccade::deformable_attention` or
`saccade::fused_deformable_attention`. The tables here say what becomes of it, in four ways:
docs/onnx.md compares them. Nothing of onnx is imported before a table or a session is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from saccade.checks import check_option
from saccade.integrations.onnx import gather, grid_sample, native, plugin
from saccade.integrations.onnx.native import session_options as session_options
from saccade.integrations.onnx.problem import PACKAGES, Problem, Value, fused, need_packages, plain
from saccade.ops import registration

Lowering = Literal["grid_sample", "gather", "plugin", "native"]


def translations(
    lowering: Lowering = "grid_sample",
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` is to write for the operators.

    Args:
        lowering: "grid_sample", one GridSample of ONNX a level; "gather", Gather and arithmetic with
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
    of_plain, of_fused = _LOWERINGS[lowering]

    # Functions with a name and a signature: the exporter looks at both.
    def deformable_attention(*arguments: Any) -> Any:
        return of_plain(arguments)

    def fused_deformable_attention(*arguments: Any) -> Any:
        return of_fused(arguments)

    return {
        registration.PLAIN_OPERATOR: deformable_attention,
        registration.FUSED_OPERATOR: fused_deformable_attention,
    }


_Translation = Callable[[Sequence[Any]], Value]


def _by_arithmetic(lower: Callable[[Problem], Value]) -> tuple[_Translation, _Translation]:
    """For a lowering that begins with locations and weights, in both operators."""
    return (lambda arguments: lower(plain(arguments)), lambda arguments: lower(fused(arguments)))


_LOWERINGS: dict[str, tuple[_Translation, _Translation]] = {
    "grid_sample": _by_arithmetic(grid_sample.lower),
    "gather": _by_arithmetic(gather.lower),
    "plugin": _by_arithmetic(plugin.lower),
    "native": (native.lower, native.lower_fused),
}
