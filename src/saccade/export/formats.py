"""What an exported program can be written as, and what runs the file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from saccade import doctor
from saccade.integrations.onnx import Lowering, session_options, translations
from saccade.integrations.exporter_logging import silence_exporters

Run = Callable[..., tuple[Tensor, ...]]
"""Tensors in, in the order of the program's inputs, tensors out."""
Format = Literal["onnx", "aoti", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "aoti": ".pt2", "torch": ".pt2"}

AOTI_OPTIONS: dict[str, Any] = {
    # What calls the kernels need not be optimised, which takes minutes.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # Exported with a batch of two, it runs with one: the check of inputs need not forbid that.
    "aot_inductor.check_lowerbound": False,
}
CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"
"""Set to 1 in the environment before the first run, a package refuses inputs of other dtypes and sizes than
it was compiled for; otherwise it computes wrong numbers from them, or reads beyond them."""


def write(
    program: ExportedProgram,
    path: Path,
    to: Format,
    lowering: Lowering,
    output_names: Sequence[str] | None = None,
    axes: Sequence[dict[int, str]] | None = None,
) -> None:
    """Writes the program, as `to` says; `lowering`, `output_names` and `axes` are of onnx alone.

    For torch the program loses its example inputs and the notes on where its lines stand, here too: they
    would be in the file.
    """
    if to == "onnx":
        write_onnx(program, path, lowering, output_names, axes)
        return
    with silence_exporters():
        if to == "torch":
            _forget_where_it_was_made(program)
            torch.export.save(program, path)
        else:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=AOTI_OPTIONS
            )


def write_onnx(
    program: ExportedProgram,
    path: Path,
    lowering: Lowering,
    output_names: Sequence[str] | None = None,
    axes: Sequence[dict[int, str]] | None = None,
) -> None:
    """Writes the program as ONNX.

    Args:
        program: of `torch.export.export`.
        path: the file.
        lowering: how the operator is expressed; see `saccade.integrations.onnx.translations`.
        output_names: otherwise as in the program, as the inputs' are.
        axes: the names of the dynamic axes of each input; otherwise those of the program's symbols.
    """
    with silence_exporters():
        written: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            # Its rules give two constants of Deformable DETR's decoder one name (onnxscript 0.7).
            optimize=False,
            custom_translation_table=translations(lowering),
            output_names=output_names,
            dynamic_shapes=None if axes is None else tuple(axes),
        )
        optimizer: Any = importlib.import_module("onnxscript").optimizer
        optimizer.fold_constants(written.model)
        optimizer.remove_unused_nodes(written.model)
        # Each node carries where its line is on this machine: two thirds of the file, and private.
        for node in written.model.graph.all_nodes():
            node.metadata_props.clear()
        written.save(str(path))


def runtimes(path: Path, to: Format, lowering: Lowering) -> dict[str, Run]:
    """Everything here that can run the file, by name and version."""
    if to == "torch":
        return {"torch.export": in_program(path)}
    if to == "aoti":
        return {"AOTInductor": in_package(path)}
    found = {f"ONNX Runtime {metadata.version('onnxruntime')}": in_onnxruntime(path, lowering)}
    if lowering in ("grid_sample", "gather") and doctor.installed("openvino"):
        found[f"OpenVINO {metadata.version('openvino').rsplit('.', 1)[0]}"] = in_openvino(path)
    return found


def in_program(path: Path) -> Run:
    """The program of torch.export, in torch."""
    program: Any = torch.export.load(path).module()
    return _tuples(program)


def in_package(path: Path) -> Run:
    """The package of AOTInductor, which checks its inputs."""
    os.environ.setdefault(CHECK_INPUTS, "1")
    return _tuples(torch._inductor.aoti_load_package(str(path)))


def in_onnxruntime(path: Path, lowering: Lowering) -> Run:
    """The file in ONNX Runtime on the CPU, with as many threads as torch has."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    if lowering in ("native", "plugin"):
        options = session_options(options)
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised as well
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = (tensor.contiguous().numpy() for tensor in tensors)
        feeds = dict(zip(names, arrays, strict=True))
        return tuple(torch.from_numpy(array) for array in session.run(None, feeds))

    return run


def in_openvino(path: Path) -> Run:
    """The file in OpenVINO on the CPU, in float32, with as many threads as torch has."""
    openvino: Any = importlib.import_module("openvino")
    # On processors with bfloat16 it would compute in that.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.compile_model(str(path), "CPU", options)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = model([tensor.contiguous().numpy() for tensor in tensors])
        return tuple(torch.from_numpy(found[output].copy()) for output in model.outputs)

    return run


def _forget_where_it_was_made(program: ExportedProgram) -> None:
    """Without the inputs it was exported with, somebody's picture, and the folders of this machine."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _tuples(run: Callable[..., Any]) -> Run:
    def in_tuples(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = run(*tensors)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return in_tuples
