"""Loads a detector of transformers from a folder or from the Hugging Face hub.

Every command loads its model here. The files may come from anybody. Nothing in them runs as code, a
folder is loaded without the network, and whatever is wrong with them is a `ModelError`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from saccade import doctor
from saccade.files import as_line
from saccade.integrations.checkpoints.untrusted import (
    INDEX,
    WEIGHTS,
    find_weights,
    load_torch,
    open_regular,
    read_json,
)

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
PROCESSOR = "preprocessor_config.json"
WHOLE_PROCESSOR = "processor_config.json"
"""The file of a processor of images and text, which may hold the image processor's settings."""

MAX_JSON_BYTES = 2**22
MAX_NUMBER = 2**20
"""The largest whole number in config.json."""
MAX_LABELS = 2**16
MAX_SIDE = 4096
"""The longest side of an image, in pixels, that a model may ask for."""
MAX_MODULES = 20_000
MAX_TENSORS = 100_000
"""The largest number of tensors in a file: transformers takes seconds for each hundred thousand."""
MAX_UNSAVED_ELEMENTS = 2**24
"""How many elements a model may have beyond those that its files can hold: buffers that it computes."""
MAX_MESSAGE = 400
"""The length of a message, in letters: files and other packages' errors may fill pages."""
_LAYER = re.compile(r"(?:en|de)coder\.layers\.\d+\..*(?:weight|bias)$")


class ModelError(Exception):
    """A model cannot be loaded or used; the message names the model and the reason, in one line."""

    def __init__(self, message: str) -> None:
        text = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
        super().__init__(as_line(text))


def load_model(source: str | None = None) -> tuple[str, nn.Module, Any]:
    """Loads an object detection model and its image processor.

    Args:
        source: a folder that `save_pretrained` wrote, or the id of a model on the Hugging Face hub;
            None means the model shipped with Saccade.

    Returns:
        The model's name in messages, the model and its image processor.

    Raises:
        ModelError: the model does not exist, is broken or incomplete, is larger than its limits, or
            would run code of its own.
    """
    if source is None:
        missing = doctor.missing_model_files()
        if missing:
            raise ModelError(
                f"this installation has no default model ({', '.join(missing)} missing in "
                f"{doctor.DEFAULT_MODEL}); choose one with --model"
            )
        return "saccade's digits", *_load(doctor.DEFAULT_MODEL, str(doctor.DEFAULT_MODEL))
    # Unlike pathlib's functions, these return for every string.
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return source, *_load(Path(path), source)
    # A file or a broken link of this name is a mistake, not an id to look up.
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or os.path.lexists(path):
        raise ModelError(f"{source[:100]} is neither a folder nor the id of a model (owner/name)")
    return source, *_load(_download(source), source)


def check_weights(name: str, model: nn.Module) -> None:
    """Raises ModelError if a weight is NaN or infinite."""
    for weight, parameter in model.named_parameters():
        # Types of one byte have scales of their own.
        if parameter.is_floating_point() and parameter.element_size() > 1:
            count = parameter.numel() - int(parameter.isfinite().sum())
            if count:
                raise ModelError(
                    f"{name} has weights that are not numbers: {count} of {parameter.numel()} "
                    f"elements of {weight} are NaN or infinite"
                )


def check_outputs(name: str, logits: Tensor, boxes: Tensor) -> None:
    """Raises ModelError if a query's scores or box are not numbers.

    Args:
        name: the model's name.
        logits: [B, Q, classes]; a score is the sigmoid or softmax of its logit. Single logits may be
            -inf, which means a score of 0.
        boxes: [B, Q, 4].
    """
    scored = logits.isfinite().any(-1) & ~(logits.isnan() | logits.isposinf()).any(-1)
    queries = scored & boxes.isfinite().all(-1)  # [B, Q]
    for index, is_number in enumerate(queries):
        if not bool(is_number.all()):
            image = f" of image {index}" if len(queries) > 1 else ""
            raise ModelError(
                f"the scores are not numbers: {name} gives NaN or infinite scores or boxes for "
                f"{int((~is_number).sum())} of {len(is_number)} queries{image}"
            )


def check_resized(name: str, processor: Any, size: tuple[int, int]) -> None:
    """Raises ModelError if an image processor would enlarge an image of (width, height) without limit."""
    settings = dict(getattr(processor, "size", None) or {})
    shorter, longer = settings.get("shortest_edge"), settings.get("longest_edge")
    if shorter and not longer and shorter**2 * max(size) > MAX_SIDE**2 * min(size):
        width, height = (side * shorter // min(size) for side in size)
        raise ModelError(
            f"{name} would read it at {width} x {height} pixels, and the limit is {MAX_SIDE**2} pixels"
        )


def describe_error(error: BaseException) -> str:
    """Describes another package's error in one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text


def _refusal(name: str, reason: str) -> ModelError:
    return ModelError(f"cannot load {name}: {reason}")


# --- files ------------------------------------------------------------------------------------


def _download(source: str) -> Path:
    """Fetches a model's own files from the hub, and returns the folder in the hub's cache."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(source, allow_patterns=[*patterns]))

    with _LOADING, _quiet_transformers():
        try:
            settings = (CONFIG, PROCESSOR, WHOLE_PROCESSOR, f"*{INDEX}")
            folder = fetch(*settings, "model.safetensors", "model-*.safetensors")
            if not list(folder.glob("model*.safetensors")):
                folder = fetch("pytorch_model.bin", "pytorch_model-*.bin")
        except Exception as error:  # the hub's client raises errors of many types
            raise _refusal(source, describe_error(error)) from error
    return folder


def _check_files(folder: Path, name: str) -> int:
    """Checks what can be checked before transformers reads the files.

    Returns:
        The number of elements that the model may have.
    """
    if (folder / ADAPTER).exists():
        # Where peft is installed, transformers reads more files, or the model that this file names.
        raise _refusal(name, f"it has an adapter ({ADAPTER}), expected weights with it merged in")
    _check_config(_read_json(folder / CONFIG, name), name)
    settings: Any = None
    for file in (WHOLE_PROCESSOR, PROCESSOR):
        if (folder / file).exists():
            content = _read_json(folder / file, name)
            _refuse_code(content, file, name)
            settings = settings or (
                content if file == PROCESSOR else content.get("image_processor")
            )
    if not settings:
        raise _refusal(name, f"it has no image processor ({PROCESSOR})")
    for key, value in _iterate(settings):
        if isinstance(value, (int, float)) and not abs(value) <= MAX_SIDE:
            raise _refusal(
                name,
                f"expected numbers up to {MAX_SIDE} in its image processor's settings, got "
                f"{key} = {value}",
            )
    weights = _find_weights(folder, name)
    for path in weights:
        _check_file(path, name)
    # An element takes a byte or more, and each is counted when it is made and when it is read.
    return 4 * sum(path.stat().st_size for path in weights) + MAX_UNSAVED_ELEMENTS


def _check_config(config: dict[str, Any], name: str) -> None:
    _refuse_code(config, CONFIG, name)
    for key in ("configuration_files", "transformers_weights"):
        if config.get(key):
            raise _refusal(name, f"its {CONFIG} points to other files ({key})")
    for key, value in _iterate(config):
        limit = MAX_LABELS if key.endswith("num_labels") else MAX_NUMBER
        limit = MAX_SIDE if key.endswith(("image_size", "eval_size")) else limit
        if isinstance(value, int) and abs(value) > limit:
            raise _refusal(name, f"expected {key} up to {limit} in its {CONFIG}, got {value}")


def _refuse_code(content: dict[str, Any], file: str, name: str) -> None:
    """Refuses settings that name code: of the folder, of another repository, or kernels of the hub."""
    for key, value in _iterate(content):
        if (key == "auto_map" and value) or (key.endswith("_implementation") and "/" in str(value)):
            raise _refusal(
                name,
                f"its {file} names code to run ({key}), and Saccade runs no code of models. If "
                "transformers has the model's class, remove this entry",
            )


def _find_weights(folder: Path, name: str) -> list[Path]:
    try:
        weights = find_weights(folder)
    except (OSError, ValueError) as error:
        raise _refusal(name, describe_error(error)) from error
    if not weights:
        raise _refusal(name, f"it has no weights ({' or '.join(WEIGHTS)})")
    return weights


def _check_file(file: Path, name: str) -> None:
    """Refuses a file that is incomplete, or that would run code."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".bin":
            load_torch(file)
        else:
            open_regular(file).close()
            # This reads the header, and compares what it says with the size of the file.
            with safe_open(file, framework="pt") as weights:
                count = len(weights.keys())
            if count > MAX_TENSORS:
                raise ValueError(
                    f"expected at most {MAX_TENSORS} tensors in {file.name}, got {count}"
                )
    except (OSError, ValueError) as error:
        raise _refusal(name, describe_error(error)) from error
    except SafetensorError as error:
        raise _refusal(name, f"{file.name} is broken or incomplete: {error}") from error


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(file, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise _refusal(name, describe_error(error)) from error


def _iterate(content: Any) -> Iterator[tuple[str, Any]]:
    """Yields each value at any depth after its key; elements of a list have the key of the list."""
    remaining = [("", content)]
    while remaining:
        key, value = remaining.pop()
        yield key, value
        if isinstance(value, dict):
            remaining.extend(value.items())
        elif isinstance(value, list):
            remaining.extend((key, element) for element in value)


# --- transformers -----------------------------------------------------------------------------

# While a model is loaded, settings of other packages are changed, which hold for the whole process.
_LOADING = threading.Lock()


def _load(folder: Path, name: str) -> tuple[nn.Module, Any]:
    max_elements = _check_files(folder, name)
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with _LOADING, _quiet_transformers(), _offline(), _limit_size(name, max_elements):
        try:
            # Weights of other shapes are reported below, where they can be named.
            model, info = AutoModelForObjectDetection.from_pretrained(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                weights_only=True,
                **options,
            )
            processor = AutoImageProcessor.from_pretrained(folder, **options)
        except ModelError:
            raise
        except Exception as error:  # foreign code on a foreign file raises errors of any type
            raise _refusal(name, _explain(error)) from error
    _check_loaded(name, model, info)
    check_weights(name, model)
    if not callable(getattr(processor, "post_process_object_detection", None)):
        kind = type(processor).__name__
        raise _refusal(name, f"its image processor is a {kind}, which is not for object detection")
    return model, processor


def _explain(error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return (
                f"its {CONFIG} takes a part of the model from the network (backbone), but a model "
                "is loaded from its own files only"
            )
        cause = cause.__cause__ or cause.__context__
    return describe_error(error)


def _check_loaded(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Refuses weights that are not those of the configuration."""
    mismatched, missing = sorted(info["mismatched_keys"]), sorted(info["missing_keys"])
    unused = sorted(key for key in info["unexpected_keys"] if _LAYER.search(key))
    if mismatched:
        weight, shape, expected = mismatched[0]
        raise _refusal(
            name,
            f"{len(mismatched)} weights do not have the shapes of its {CONFIG}, among them {weight}: "
            f"expected {list(expected)}, got {list(shape)}",
        )
    if missing:
        raise _refusal(
            name,
            f"it lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}: it "
            "would detect at random",
        )
    if unused:
        raise _refusal(
            name,
            f"its {CONFIG} leaves out layers that have {len(unused)} weights, among them {unused[0]}: "
            "it would detect with a part of the model",
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' messages, warnings and progress bars while a model is loaded."""
    from transformers.utils import logging as messages

    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.CRITICAL)  # errors are raised too
    messages.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Makes every request to the hub an error: transformers and timm make theirs through this package."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _limit_size(name: str, max_elements: int) -> Iterator[None]:
    """Stops this thread from building a model that is too large, whatever setting asks for it.

    Models are built without memory, on the meta device, and get memory when their weights are read.
    """
    thread = threading.get_ident()
    modules, elements = 0, 0

    def count_module(module: nn.Module, child_name: str, child: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > MAX_MODULES:
                raise _refusal(name, f"its {CONFIG} asks for more than {MAX_MODULES} modules")

    def count_elements(module: nn.Module, tensor_name: str, tensor: Tensor | None) -> None:
        nonlocal elements
        if threading.get_ident() == thread and tensor is not None:
            elements += tensor.numel()
            if elements > max_elements:
                raise _refusal(
                    name,
                    f"its {CONFIG} asks for {elements:.2g} weights or more, and its files are too "
                    "small for them",
                )

    handles = [
        hooks.register_module_module_registration_hook(count_module),
        hooks.register_module_parameter_registration_hook(count_elements),
        hooks.register_module_buffer_registration_hook(count_elements),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
