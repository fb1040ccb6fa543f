"""Records the sampling points of a detector's decoder, in pixels of the image."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_DECODER_LAYER = re.compile(r"(?:^|\.)decoder\.(?:layers?|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Frame:
    """The position of one image inside the resized and padded tensor that the model read."""

    image_size: tuple[int, int]
    """(width, height) of the original image."""
    tensor_size: tuple[int, int]
    """(width, height) of the tensor."""
    window: tuple[int, int, int, int]
    """(left, top, width, height) of the resized image within the tensor; the rest is padding."""

    def to_image(self, locations: Tensor) -> Tensor:
        """Converts locations in the tensor to positions in the original image.

        Args:
            locations (Tensor[..., 2]): (x, y), 0 and 1 the outer edges of the whole padded tensor.
                This is the unit of the sampling locations in the Deformable-DETR family: the model has
                already multiplied its reference points by the valid ratios of the levels.

        Returns:
            Tensor[..., 2]: (x, y) in pixels of the original image, where 0 is the left or upper
            edge of its first pixel and the width or height the far edge of its last.
        """
        left, top, width, height = self.window
        exact = locations.double()  # [..., 2]
        tensor_size = exact.new_tensor(self.tensor_size)  # [2]
        scale = exact.new_tensor([self.image_size[0] / width, self.image_size[1] / height])  # [2]
        return (exact * tensor_size - exact.new_tensor([left, top])) * scale


def find_frames(
    image_sizes: Sequence[tuple[int, int]], pixel_values: Tensor, pixel_mask: Tensor | None
) -> list[Frame]:
    """Finds the frame of each image of a batch.

    Args:
        image_sizes: (width, height) of each original image.
        pixel_values (Tensor[B, 3, H, W]): the output of the image processor.
        pixel_mask (Tensor[B, H, W] or None): 1 on the image, 0 on padding; None means that the
            images fill the tensor.

    Raises:
        ValueError: the ones of a mask do not form one rectangle.
    """
    height, width = pixel_values.shape[-2:]
    if pixel_mask is None:
        return [Frame(size, (width, height), (0, 0, width, height)) for size in image_sizes]
    frames = []
    for size, mask in zip(image_sizes, pixel_mask.bool(), strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if not len(rows) or int(mask.sum()) != len(rows) * len(columns):
            raise ValueError("pixel_mask: expected one rectangle of ones for each image")
        window = (int(columns[0]), int(rows[0]), len(columns), len(rows))
        frames.append(Frame(size, (width, height), window))
    return frames


@dataclass(frozen=True)
class Recording:
    """The inputs of the cross attention of one decoder layer in one forward pass."""

    layer: int
    """Number of the decoder layer; 1 is the first."""
    num_layers: int
    sampling_locations: Tensor
    """[B, Q, M, L, K, 2], (x, y), normalized to the padded tensor."""
    attention_weights: Tensor
    """[B, Q, M, L, K]."""
    reference_points: Tensor | None
    """[B, Q, 2], (x, y) of the points or of the centres of the boxes, normalized likewise."""


class Recorder:
    """Records the cross attention of a decoder layer while a `with` block runs the model.

    Args:
        model: a detector with transformers' `MultiScaleDeformableAttention` in its decoder.
        operators: names of these submodules, as `saccade.patch(model).replaced` lists them.
        layer: number of the decoder layer, 1 the first; None means the last.

    Raises:
        ValueError: the decoder has no such layer, no deformable attention, or one that computes its
            sampling points inside (RT-DETRv2, D-FINE).
    """

    def __init__(
        self, model: nn.Module, operators: Sequence[str], layer: int | None = None
    ) -> None:
        names = find_decoder_operators(operators)
        if not names:
            raise ValueError(
                f"model: {type(model).__name__} has no deformable attention in its decoder"
            )
        if layer is not None and not 1 <= layer <= len(names):
            raise ValueError(
                f"layer: expected 1 to {len(names)}, the decoder's layers, got {layer}"
            )
        self._layer = len(names) if layer is None else layer
        self._num_layers = len(names)
        name = names[self._layer - 1]
        self._operator = model.get_submodule(name)
        parameters = inspect.signature(type(self._operator).forward).parameters
        if not {"sampling_locations", "attention_weights"} <= parameters.keys():
            raise ValueError(
                f"model: {type(model).__name__} computes the sampling points of its decoder inside "
                f"{type(self._operator).__name__}, where they cannot be recorded"
            )
        self._attention = model.get_submodule(name.rpartition(".")[0])
        self._recorded: dict[str, Any] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        self._recorded.clear()
        self._hooks = [
            self._operator.register_forward_pre_hook(self._record_operator, with_kwargs=True),
            self._attention.register_forward_pre_hook(self._record_reference, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def recording(self) -> Recording:
        """Returns the last recording.

        Raises:
            RuntimeError: the model has not run inside the `with` block.
        """
        if "sampling_locations" not in self._recorded:
            raise RuntimeError("the model has not run inside this recorder's with block")
        reference = self._recorded.get("reference_points")
        if reference is not None:
            # [B, Q, L or 1, 2 or 4]; the levels differ only in how their padding was rounded.
            reference = reference[:, :, 0] if reference.dim() == 4 else reference
            reference = reference[..., :2].detach()
        return Recording(
            self._layer,
            self._num_layers,
            self._recorded["sampling_locations"].detach(),
            self._recorded["attention_weights"].detach(),
            reference,
        )

    def _record_operator(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        for name in ("sampling_locations", "attention_weights"):
            self._recorded[name] = arguments[name]

    def _record_reference(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        reference = arguments.get("reference_points", kwargs.get("reference_points"))
        self._recorded["reference_points"] = reference if isinstance(reference, Tensor) else None


def find_decoder_operators(operators: Sequence[str]) -> list[str]:
    """Returns the names among `operators` that belong to decoder layers, first layer first."""
    names = {}
    for name in operators:
        match = _DECODER_LAYER.search(name)
        if match:
            names[int(match.group(1))] = name
    return [names[layer] for layer in sorted(names)]


@dataclass(frozen=True)
class Look:
    """Where one query looked in the original image: P points per head, over all levels."""

    positions: Tensor
    """[M, P, 2] float64, (x, y) in pixels as `Frame.to_image` returns them; may lie outside."""
    weights: Tensor
    """[M, P]; the weights of a head sum to 1."""
    reference: tuple[float, float] | None
    """(x, y) of the reference point, in pixels of the original image."""


def get_look(recording: Recording, frame: Frame, batch_index: int, query: int) -> Look:
    """Returns where one query looked in one image of the batch."""
    reference = None
    if recording.reference_points is not None:
        x, y = frame.to_image(recording.reference_points[batch_index, query]).tolist()
        reference = (x, y)
    return Look(
        frame.to_image(recording.sampling_locations[batch_index, query]).flatten(1, -2),
        recording.attention_weights[batch_index, query].flatten(1).to(torch.float32),
        reference,
    )
