"""Loads a detector of transformers from a folder or from the Hugging Face hub.

Every command loads its model here. The files may come from anybody. Nothing in them runs as code, a
folder is loaded without the network, and whatever is wrong with them is a `ModelError`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from saccade import doctor
from saccade.integrations import checkpoints

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
WHOLE_PROCESSOR = "processor_config.json"
"""The file of a processor of images and text, which may hold the image processor's settings."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"

MAX_JSON_BYTES = 2**22
MAX_NUMBER = 2**20
"""The largest whole number in config.json."""
MAX_LABELS = 2**16
MAX_SIDE = 4096
"""The longest side of an image, in pixels, that a model may ask for."""
MAX_MODULES = 20_000
MAX_UNSAVED_ELEMENTS = 2**24
"""How many elements a model may have beyond those that its files can hold: buffers that it computes."""
MAX_REASON = 300
"""The length of another package's error message, in letters."""


class ModelError(Exception):
    """A model cannot be loaded or used; the message names the model and the reason."""


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
    path = os.path.expanduser(source)  # noqa: PTH111
    if os.path.isdir(path):  # noqa: PTH112
        return source, *_load(Path(path), source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(
            f"{_printable(source)} is neither a folder nor the id of a model (owner/name)"
        )
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
    return _printable(text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…")


def _printable(text: str) -> str:
    """Replaces control characters, and letters that no terminal can show."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# --- files ------------------------------------------------------------------------------------


def _download(source: str) -> Path:
    """Fetches a model's own files from the hub, and returns the folder in the hub's cache."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(source, allow_patterns=[*patterns]))

    with _quiet_transformers():
        try:
            folder = fetch(CONFIG, PROCESSOR, WHOLE_PROCESSOR, "model*.safetensors", f"*{INDEX}")
            if not list(folder.glob("*.safetensors")):
                folder = fetch("pytorch_model*.bin")
        except Exception as error:  # the hub's client raises errors of many types
            raise ModelError(f"cannot fetch {source}: {describe_error(error)}") from error
    return folder


def _check_files(folder: Path, name: str) -> int:
    """Checks what can be checked before transformers reads the files.

    Returns:
        The number of elements that the model may have.
    """
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
        raise ModelError(f"cannot load {name}: it has no image processor ({PROCESSOR})")
    for key, value in _iterate(settings):
        if isinstance(value, (int, float)) and not abs(value) <= MAX_SIDE:
            raise ModelError(
                f"cannot load {name}: expected numbers up to {MAX_SIDE} in its image processor's "
                f"settings, got {key} = {value}"
            )
    files = _find_weights(folder, name)
    for file in files:
        _check_weights_file(file, name)
    return 2 * sum(file.stat().st_size for file in files) + MAX_UNSAVED_ELEMENTS


def _check_config(config: dict[str, Any], name: str) -> None:
    _refuse_code(config, CONFIG, name)
    for key in ("configuration_files", "transformers_weights"):
        if config.get(key):
            raise ModelError(f"cannot load {name}: its {CONFIG} points to other files ({key})")
    for key, value in _iterate(config):
        limit = MAX_LABELS if key.endswith("num_labels") else MAX_NUMBER
        limit = MAX_SIDE if key.endswith(("image_size", "eval_size")) else limit
        if isinstance(value, int) and abs(value) > limit:
            raise ModelError(
                f"cannot load {name}: expected {key} up to {limit} in its {CONFIG}, got {value:.3g}"
            )


def _refuse_code(content: dict[str, Any], file: str, name: str) -> None:
    """Refuses settings that name code: of the folder, of another repository, or kernels of the hub."""
    for key, value in _iterate(content):
        if (key == "auto_map" and value) or (key.endswith("_implementation") and "/" in str(value)):
            raise ModelError(
                f"cannot load {name}: its {file} names code to run ({key}), and Saccade runs no code "
                "of models. If transformers has the model's class, remove this entry"
            )


def _find_weights(folder: Path, name: str) -> list[Path]:
    """Finds the files of the weights, in the order in which transformers looks for them."""
    for file in WEIGHTS:
        if (folder / file).exists():
            return [folder / file]
        index = folder / f"{file}{INDEX}"
        if index.exists():
            shards = _read_json(index, name).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
            ):
                raise ModelError(
                    f"cannot load {name}: expected the names of files beside it in {index.name}"
                )
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise ModelError(f"cannot load {name}: it has no weights ({' or '.join(WEIGHTS)})")


def _check_weights_file(file: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    _check_file(file, name)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass  # The header was read, and has the size of the file.
        else:
            checkpoints.load(file)  # A pickle is read within its limits first.
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelError(
            f"cannot load {name}: {file.name} is broken or incomplete: {describe_error(error)}"
        ) from error


def _check_file(file: Path, name: str) -> None:
    """Refuses pipes and devices, which may have no end."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise ModelError(f"cannot load {name}: {file.name}: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"cannot load {name}: expected {file.name} to be a regular file")


def _read_json(file: Path, name: str) -> dict[str, Any]:
    _check_file(file, name)
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"expected at most {MAX_JSON_BYTES} bytes")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot load {name}: {file.name}: {describe_error(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"cannot load {name}: expected a JSON object in {file.name}, got a "
            f"{type(content).__name__}"
        )
    return content


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
    name = _printable(name)
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
            raise ModelError(f"cannot load {name}: {_explain(error)}") from error
    _check_loaded(name, model, info)
    check_weights(name, model)
    if not callable(getattr(processor, "post_process_object_detection", None)):
        raise ModelError(
            f"cannot load {name}: its image processor is a {type(processor).__name__}, which is not "
            "for object detection"
        )
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
    kind = type(model).__name__
    if info["mismatched_keys"]:
        weight, shape, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"cannot load {name}: {len(info['mismatched_keys'])} weights do not have the shapes of "
            f"its {CONFIG}, among them {weight}: expected {list(expected)}, got {list(shape)}"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {kind}, among them {missing[0]}: it would "
            "detect at random"
        )
    layers = sorted(key for key in info["unexpected_keys"] if ".layers." in key)
    if layers:
        raise ModelError(
            f"{name} has {len(layers)} weights of layers that its {CONFIG} leaves out, among them "
            f"{layers[0]}: it would detect with a part of the model"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' messages, warnings and progress bars while a model is loaded."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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
                raise ModelError(
                    f"cannot load {name}: its {CONFIG} asks for more than {MAX_MODULES} modules"
                )

    def count_elements(module: nn.Module, tensor_name: str, tensor: Tensor | None) -> None:
        nonlocal elements
        if threading.get_ident() == thread and tensor is not None:
            elements += tensor.numel()
            if elements > max_elements:
                raise ModelError(
                    f"cannot load {name}: its {CONFIG} asks for {elements:.2g} weights or more, and "
                    "its files are too small for them"
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
