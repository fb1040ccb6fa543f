"""`saccade doctor`: shows what is installed and what runs, and checks its results.

It needs torch only, and prints plain text.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import saccade
from saccade import backend, functional, reference
from saccade.call import Call, Padding, parse_call
from saccade.ops import native

_CLI = ("typer", "rich")
_EXPLAIN = (*_CLI, "matplotlib", "numpy")
_DETECT = (*_EXPLAIN, "transformers", "PIL", "safetensors", "scipy")
_ONNX = ("onnx", "onnxscript", "onnxruntime")
EXTRAS = {
    "cli": _CLI,
    "explain": _EXPLAIN,
    "detect": _DETECT,
    "bench": (*_EXPLAIN, "transformers", *_ONNX),
    "export": (*_DETECT, *_ONNX, "onnxruntime_extensions"),
}
"""The modules that each extra of the package installs, as far as the command line uses them."""

DEFAULT_MODEL = Path(__file__).resolve().parent / "vision" / "model"
EXAMPLE_IMAGE = DEFAULT_MODEL / "scene.png"
"""A held-out scene, which the default model was not trained on."""
DEFAULT_MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")

# Largest accepted difference from the reference, relative to the reference's largest element.
TOLERANCE = 1e-4


class CheckResult(NamedTuple):
    """One line of the report."""

    section: str
    name: str
    text: str
    ok: bool = True


def missing_modules(extra: str) -> list[str]:
    """Returns the modules of an extra (a key of `EXTRAS`) that are not installed."""
    return [name for name in EXTRAS[extra] if not installed(name)]


def missing_model_files() -> list[str]:
    """Returns the files of the default model that this installation lacks."""
    return [name for name in DEFAULT_MODEL_FILES if not (DEFAULT_MODEL / name).is_file()]


def run(write: Callable[[str], None] = print) -> int:
    """Examines this installation and writes a report, in a few seconds.

    Args:
        write: receives the report, line by line.

    Returns:
        The exit code: 0 if everything installed works, even if only the reference runs; 1 if a
        check fails: wrong numbers, or a native library that exists and does not load.
    """
    section, healthy = "", True
    for result in examine():
        if result.section != section:
            write(("\n" if section else "") + result.section)
            section = result.section
        healthy = healthy and result.ok
        mark = "  " if result.ok else "! "
        lines = result.text.splitlines() or [""]
        write(f"{mark}{result.name:<20} {lines[0]}")
        for line in lines[1:]:
            write(" " * 23 + line)
    write("")
    write("All checks passed." if healthy else "Some checks FAILED: see the lines marked with !")
    return 0 if healthy else 1


def examine() -> Iterator[CheckResult]:
    """Yields the results of the checks one by one."""
    yield from _versions()
    yield from _processor()
    yield from _library()
    yield from _gpus()
    yield from _self_check()
    yield from _installation()


def _versions() -> Iterator[CheckResult]:
    yield CheckResult("Versions", "saccade", saccade.__version__)
    yield CheckResult("Versions", "torch", torch.__version__)
    yield CheckResult("Versions", "Python", platform.python_version())
    yield CheckResult("Versions", "platform", f"{platform.system()} {platform.machine()}")


def _processor() -> Iterator[CheckResult]:
    yield CheckResult("Processor", "name", processor_name())
    yield CheckResult("Processor", "torch sees", torch.backends.cpu.get_cpu_capability())
    text = (
        f"{torch.get_num_threads()} (torch.set_num_threads changes it), {os.cpu_count()} processors"
    )
    yield CheckResult("Processor", "threads", text)


def processor_name() -> str:
    """Returns the processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _library() -> Iterator[CheckResult]:
    section = "Native library"
    yield CheckResult(section, "file", str(native.LIBRARY))
    if native.failure is None:
        yield CheckResult(section, "state", "loaded")
        yield CheckResult(section, "can run", ", ".join(native.available_isas()))
    else:
        # A missing or disabled library is a choice; one that does not load is a fault.
        disabled = os.environ.get("SACCADE_DISABLE_NATIVE", "0") not in ("", "0")
        broken = native.LIBRARY.exists() and not disabled
        yield CheckResult(section, "state", f"not loaded: {native.failure}", not broken)
    try:
        chosen = backend.which_backend()
    except RuntimeError as error:  # SACCADE_CPU_ISA names an instruction set that cannot run
        yield CheckResult(section, "backend", f"none: {_first_line(error)}", False)
        return
    yield CheckResult(section, "backend", f"{chosen.name}\n{chosen.reason}")


def _gpus() -> Iterator[CheckResult]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield CheckResult("GPU", "state", "torch detects none")
    for device in (torch.device("cuda", index) for index in range(count)):
        yield CheckResult("GPU", str(device), torch.cuda.get_device_name(device))
        chosen = backend.which_backend(torch.empty(0, device=device))
        yield CheckResult("GPU", "backend", f"{chosen.name}\n{chosen.reason}")


def _self_check() -> Iterator[CheckResult]:
    section = "Self check"
    try:
        output = _worked_example()
        text = "output 16.5, as expected" if output == 16.5 else f"output {output}, expected 16.5"
        yield CheckResult(section, "worked example", text, output == 16.5)
    except RuntimeError as error:
        yield CheckResult(section, "worked example", f"failed: {_first_line(error)}", False)
    kernels = [f"cpu-{isa}" for isa in native.available_isas()]
    if not kernels:
        yield CheckResult(section, "native", "nothing to compare: only the reference runs")
    for kernel in kernels:
        try:
            with backend.use_backend(kernel):
                errors = compare_with_reference()
        except (RuntimeError, ValueError) as error:
            yield CheckResult(section, kernel, f"failed: {_first_line(error)}", False)
            continue
        yield summarize_errors(kernel, errors)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        kernel = f"{backend.which_backend(torch.empty(0, device=device)).name} on {device}"
        try:
            # Different kernels run for few and for many queries.
            for num_queries in (50, 1500):
                errors = compare_with_reference(device, num_queries)
                yield summarize_errors(f"{kernel}, {num_queries} queries", errors)
        except Exception as error:  # compilers raise errors of any type
            yield CheckResult(section, kernel, f"failed: {_first_line(error)}", False)


def summarize_errors(kernel: str, errors: dict[str, float]) -> CheckResult:
    """Summarizes the relative errors of one kernel, which `errors` holds by the name of the result."""
    # A NaN, which differs from itself, counts as larger than any number.
    name, worst = max(errors.items(), key=lambda entry: (entry[1] != entry[1], entry[1]))
    passed = worst <= TOLERANCE
    verdict = "agrees with" if passed else "DISAGREES with"
    # The inputs are finite, so that NaN and infinity are faults even where the reference has them too.
    largest = f"largest relative error {worst:.1e}, in {name}"
    if not math.isfinite(worst):
        largest = f"NaN or infinity, in {name}"
    return CheckResult(
        "Self check",
        kernel,
        f"{verdict} the reference, forward and gradients\n{largest}",
        passed,
    )


def _worked_example() -> float:
    """Runs the worked example: one query, z(x, y) = 10 x + y on 4 x 4, points around (1.5, 1.5)."""
    value = (10.0 * torch.arange(4)[None, :] + torch.arange(4)[:, None]).view(1, 16, 1, 1)
    locations = torch.tensor([[2.0, 2], [1, 2], [2, 1], [1, 1]]).view(1, 1, 1, 1, 4, 2)
    weights = torch.full((1, 1, 1, 1, 4), 0.25)
    output = functional.deformable_attention(
        value, [(4, 4)], locations, weights, coordinates="pixel"
    )
    return float(output)


def compare_with_reference(
    device: torch.device | None = None, num_queries: int = 50
) -> dict[str, float]:
    """Compares the backend in use with the reference on small random calls.

    The calls cover images, lines and volumes, head sizes that fill vectors and others, sampling
    locations and offsets from reference points, attention weights and logits.

    Args:
        device: the device of the backend, by default the CPU; the reference runs on the CPU.
        num_queries: number of queries per call.

    Returns:
        For "output" and the gradient of each input the largest difference, relative to the largest
        element of the reference's result.
    """
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    images: list[tuple[int, ...]] = [(9, 7), (4, 5), (1, 3)]
    lines: list[tuple[int, ...]] = [(31,), (16,), (1,)]
    volumes: list[tuple[int, ...]] = [(4, 5, 6), (3, 1, 4), (1, 2, 1)]
    cases: list[tuple[list[tuple[int, ...]], int, Padding]] = [
        (images, 32, "zeros"),
        (images, 5, "zeros"),
        (images, 16, "border"),
        (lines, 32, "zeros"),
        (volumes, 32, "zeros"),
    ]
    for shapes, head_dim, padding in cases:
        total, dims = sum(math.prod(shape) for shape in shapes), len(shapes[0])
        points_shape = (2, num_queries, 3, 3, 4)
        value = torch.randn(2, total, 3, head_dim, generator=generator)
        # Some points are outside the map.
        locations = torch.rand(*points_shape, dims, generator=generator) * 1.4 - 0.2
        weights = torch.rand(points_shape, generator=generator)
        reference_points = torch.rand(2, num_queries, 3, 2 * dims, generator=generator)
        offsets = torch.randn(*points_shape, dims, generator=generator)
        logits = torch.randn(points_shape, generator=generator)
        grad_output = torch.randn(2, num_queries, 3 * head_dim, generator=generator)
        with_offsets = {"sampling_offsets": offsets, "reference_points": reference_points}
        for points in ({"sampling_locations": locations}, with_offsets):
            for last in ({"attention_weights": weights}, {"attention_logits": logits}):
                inputs = {"value": value, **points, **last}
                errors = _compute_errors(inputs, shapes, padding, grad_output, device)
                for name, error in errors.items():
                    if error != error or error > worst.get(name, -1.0):
                        worst[name] = error
    return worst


def _compute_errors(
    inputs: dict[str, Tensor],
    shapes: Sequence[tuple[int, ...]],
    padding: Padding,
    grad_output: Tensor,
    device: torch.device | None,
) -> dict[str, float]:
    """Returns the relative errors of one call's output and gradients, by name."""
    actual = _compute_results(functional.run, inputs, shapes, padding, grad_output, device)
    expected = _compute_results(reference.execute, inputs, shapes, padding, grad_output, None)
    return {
        name: float((actual[name] - result).abs().max() / result.abs().max())
        for name, result in expected.items()
    }


def _compute_results(
    execute: Callable[[Call], Tensor],
    inputs: dict[str, Tensor],
    shapes: Sequence[tuple[int, ...]],
    padding: Padding,
    grad_output: Tensor,
    device: torch.device | None,
) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    tensors = {name: leaf.to(device or "cpu") for name, leaf in leaves.items()}
    uses_offsets, uses_logits = "sampling_offsets" in inputs, "attention_logits" in inputs
    call = parse_call(
        tensors["value"],
        shapes,
        tensors["sampling_offsets" if uses_offsets else "sampling_locations"],
        tensors["attention_logits" if uses_logits else "attention_weights"],
        reference_points=tensors.get("reference_points"),
        softmax=uses_logits,
        padding=padding,
    )
    output = execute(call).cpu()
    output.backward(grad_output)
    results = {"output": output.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        results[f"the gradient of {name}"] = leaf.grad
    return results


def _installation() -> Iterator[CheckResult]:
    for extra in EXTRAS:
        missing = missing_modules(extra)
        text = f"missing: {', '.join(missing)}; pip install 'saccade[{extra}]'"
        yield CheckResult("Extras", extra, text if missing else "installed")
    for name in ("transformers", "matplotlib", "typer", "rich"):
        if installed(name):
            yield CheckResult("Extras", f"  {name}", _version(name))
    missing = missing_model_files()
    text = f"not in this installation ({', '.join(missing)} missing); saccade detect needs --model"
    yield CheckResult("Default model", "vision/model", text if missing else "present")


def installed(name: str) -> bool:
    """Whether a module can be imported; it is not imported."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
