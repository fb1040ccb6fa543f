"""Writes an exported program in each format, and runs the file."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from saccade import doctor
from saccade.integrations.exporter_logging import silence_exporters
from saccade.integrations.onnx import Lowering, session_options, translations

Run = Callable[..., tuple[Tensor, ...]]
"""Takes tensors in the order of the program's inputs, and returns the outputs."""
Format = Literal["onnx", "aoti", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "aoti": ".pt2", "torch": ".pt2"}

AOTI_OPTIONS: dict[str, Any] = {
    # The code around the kernels need not be optimised, which would take minutes.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # A model that was exported with a batch of two also runs with one; the input check must allow it.
    "aot_inductor.check_lowerbound": False,
}
CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"
"""If this environment variable is 1 before the first run, a package rejects inputs of other dtypes and sizes
than it was compiled for. Otherwise it computes wrong numbers from them, or reads beyond their end."""


def write(
    program: ExportedProgram,
    path: Path,
    to: Format,
    lowering: Lowering,
    output_names: Sequence[str] | None = None,
    axes: Sequence[dict[int, str]] | None = None,
) -> None:
    """Writes the program in the format `to`; only onnx uses `lowering`, `output_names` and `axes`.

    For torch, the example inputs and the stack traces are removed from `program` itself, because
    `torch.export.save` would write them to the file.

    Raises:
        OSError: the file cannot be written.
    """
    if to == "onnx":
        write_onnx(program, path, lowering, output_names, axes)
        return
    # torch aborts the process where it cannot write an archive to a file, on a full disk for example.
    archive = io.BytesIO()
    with silence_exporters():
        if to == "torch":
            _remove_private_data(program)
            torch.export.save(program, archive)
        else:
            torch._inductor.aoti_compile_and_package(
                program, package_path=archive, inductor_configs=AOTI_OPTIONS
            )
    path.write_bytes(archive.getbuffer())


def write_onnx(
    program: ExportedProgram,
    path: Path,
    lowering: Lowering,
    output_names: Sequence[str] | None = None,
    axes: Sequence[dict[int, str]] | None = None,
) -> None:
    """Writes the program as ONNX.

    Args:
        program: a result of `torch.export.export`.
        path: the file to write.
        lowering: how the operator is expressed; see `saccade.integrations.onnx.translations`.
        output_names: names of the outputs; by default those of the program.
        axes: the names of the dynamic axes of each input; by default those of the program's symbols.
    """
    with silence_exporters():
        written: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            # The optimizer gives two constants of Deformable DETR's decoder one name (onnxscript 0.7).
            optimize=False,
            custom_translation_table=translations(lowering),
            output_names=output_names,
            dynamic_shapes=None if axes is None else tuple(axes),
        )
        optimizer: Any = importlib.import_module("onnxscript").optimizer
        optimizer.fold_constants(written.model)
        optimizer.remove_unused_nodes(written.model)
        # Each node carries its stack trace with paths of this machine: private, and two thirds of the file.
        for node in written.model.graph.all_nodes():
            node.metadata_props.clear()
        written.save(str(path))


def runtimes(path: Path, to: Format, lowering: Lowering) -> dict[str, Run]:
    """Returns every installed runtime that can run the file, by name and version."""
    if to == "torch":
        return {"torch.export": in_program(path)}
    if to == "aoti":
        return {"AOTInductor": in_package(path)}
    runs = {f"ONNX Runtime {metadata.version('onnxruntime')}": in_onnxruntime(path, lowering)}
    if lowering in ("grid_sample", "gather") and doctor.installed("openvino"):
        runs[f"OpenVINO {metadata.version('openvino').rsplit('.', 1)[0]}"] = in_openvino(path)
    return runs


def in_program(path: Path) -> Run:
    """Runs a program of torch.export in torch."""
    program: Any = torch.export.load(path).module()
    return _return_tuples(program)


def in_package(path: Path) -> Run:
    """Runs a package of AOTInductor, which then checks its inputs."""
    os.environ.setdefault(CHECK_INPUTS, "1")
    return _return_tuples(torch._inductor.aoti_load_package(str(path)))


def in_onnxruntime(path: Path, lowering: Lowering) -> Run:
    """Runs the file in ONNX Runtime on the CPU, with as many threads as torch uses."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    if lowering in ("native", "plugin"):
        options = session_options(options)
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # Errors are raised as well.
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = (tensor.contiguous().numpy() for tensor in tensors)
        feeds = dict(zip(names, arrays, strict=True))
        return tuple(torch.from_numpy(array) for array in session.run(None, feeds))

    return run


def in_openvino(path: Path) -> Run:
    """Runs the file in OpenVINO on the CPU, in float32, with as many threads as torch uses."""
    openvino: Any = importlib.import_module("openvino")
    # On processors with bfloat16, OpenVINO would compute in bfloat16.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.compile_model(str(path), "CPU", options)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = model([tensor.contiguous().numpy() for tensor in tensors])
        return tuple(torch.from_numpy(results[output].copy()) for output in model.outputs)

    return run


def _remove_private_data(program: ExportedProgram) -> None:
    """Removes the example inputs, which hold the user's image, and the paths of this machine."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _return_tuples(run: Callable[..., Any]) -> Run:
    def run_to_tuple(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = run(*tensors)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return run_to_tuple
