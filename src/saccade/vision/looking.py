"""Where the queries of a detector looked: recorded from its decoder, in pixels of the picture."""

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
    """How one picture lies inside the resized and padded tensor that the model saw.

    All sizes are (width, height) in pixels. `placed` is (left, top, width, height) of the resized
    picture within the tensor; the rest of the tensor is padding.
    """

    picture: tuple[int, int]
    tensor: tuple[int, int]
    placed: tuple[int, int, int, int]

    def to_picture(self, locations: Tensor) -> Tensor:
        """Undoes padding and resizing.

        Args:
            locations (Tensor[..., 2]): (x, y), 0 and 1 the outer edges of the whole padded tensor.
                That is the unit of sampling locations in the Deformable-DETR family: the model has
                already multiplied its reference points with the valid ratios of the levels.

        Returns:
            Tensor[..., 2]: (x, y) in pixels of the original picture, where 0 is the left or upper
            edge of its first pixel and the width or height the far edge of its last.
        """
        left, top, width, height = self.placed
        exact = locations.double()
        tensor = exact.new_tensor(self.tensor)
        stretch = exact.new_tensor([self.picture[0] / width, self.picture[1] / height])
        return (exact * tensor - exact.new_tensor([left, top])) * stretch


def frames(
    pictures: Sequence[tuple[int, int]], pixel_values: Tensor, pixel_mask: Tensor | None
) -> list[Frame]:
    """The frame of each picture of a batch.

    Args:
        pictures: (width, height) of each original picture.
        pixel_values (Tensor[B, 3, H, W]): what the image processor made of them.
        pixel_mask (Tensor[B, H, W] or None): 1 where there is picture, 0 where padding, None: the
            pictures fill the tensor.

    Raises:
        ValueError: a mask is empty, or marks something else than one rectangle.
    """
    height, width = pixel_values.shape[-2:]
    if pixel_mask is None:
        return [Frame(size, (width, height), (0, 0, width, height)) for size in pictures]
    found = []
    for size, mask in zip(pictures, pixel_mask.bool(), strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if not len(rows) or int(mask.sum()) != len(rows) * len(columns):
            raise ValueError("pixel_mask: expected one rectangle of ones for each picture")
        placed = (int(columns[0]), int(rows[0]), len(columns), len(rows))
        found.append(Frame(size, (width, height), placed))
    return found


@dataclass(frozen=True)
class Recording:
    """What the cross attention of one decoder layer did in one forward pass."""

    layer: int
    """1 is the first."""
    num_layers: int
    sampling_locations: Tensor
    """[B, Q, M, L, K, 2], (x, y), normalized to the padded tensor."""
    attention_weights: Tensor
    """[B, Q, M, L, K]."""
    reference_points: Tensor | None
    """[B, Q, 2], (x, y) of the points or of the centres of the boxes, normalized as above."""


class Recorder:
    """Records the cross attention of a decoder layer while a `with` block runs the model.

    Args:
        model: a detector with transformers' `MultiScaleDeformableAttention` in its decoder.
        operators: names of these submodules, as `saccade.patch(model).replaced` lists them.
        layer: which decoder layer, 1 the first; None: the last.

    Raises:
        ValueError: the decoder has no such layer.
    """

    def __init__(
        self, model: nn.Module, operators: Sequence[str], layer: int | None = None
    ) -> None:
        names = decoder_operators(operators)
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
        self._attention = model.get_submodule(name.rpartition(".")[0])
        self._seen: dict[str, Any] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        self._seen.clear()
        self._hooks = [
            self._operator.register_forward_pre_hook(self._keep_operator, with_kwargs=True),
            self._attention.register_forward_pre_hook(self._keep_reference, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def recording(self) -> Recording:
        """What was recorded last.

        Raises:
            RuntimeError: the model has not run inside the `with` block.
        """
        if "sampling_locations" not in self._seen:
            raise RuntimeError("the model has not run inside this recorder's with block")
        reference = self._seen.get("reference_points")
        if reference is not None:
            # [B, Q, L or 1, 2 or 4]: the levels differ only by how their padding was rounded
            reference = reference[:, :, 0] if reference.dim() == 4 else reference
            reference = reference[..., :2].detach()
        return Recording(
            self._layer,
            self._num_layers,
            self._seen["sampling_locations"].detach(),
            self._seen["attention_weights"].detach(),
            reference,
        )

    def _keep_operator(
        self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        arguments = inspect.signature(type(module).forward).bind(module, *given, **named).arguments
        for name in ("sampling_locations", "attention_weights"):
            self._seen[name] = arguments[name]

    def _keep_reference(
        self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        arguments = inspect.signature(type(module).forward).bind(module, *given, **named).arguments
        reference = arguments.get("reference_points", named.get("reference_points"))
        self._seen["reference_points"] = reference if isinstance(reference, Tensor) else None


def decoder_operators(operators: Sequence[str]) -> list[str]:
    """The names among `operators` that belong to decoder layers, first layer first."""
    found = {}
    for name in operators:
        match = _DECODER_LAYER.search(name)
        if match:
            found[int(match.group(1))] = name
    return [found[layer] for layer in sorted(found)]


@dataclass(frozen=True)
class Look:
    """Where one query looked, over the original picture; P points a head, of all levels."""

    positions: Tensor
    """[M, P, 2] float64, (x, y) in pixels as `Frame.to_picture` gives them; also outside."""
    weights: Tensor
    """[M, P], sum to 1 over the points of a head."""
    reference: tuple[float, float] | None
    """The reference point in the same pixels."""


def look_of(recording: Recording, frame: Frame, batch: int, query: int) -> Look:
    """Where one query of one picture of the batch looked."""
    reference = None
    if recording.reference_points is not None:
        x, y = frame.to_picture(recording.reference_points[batch, query]).tolist()
        reference = (x, y)
    return Look(
        frame.to_picture(recording.sampling_locations[batch, query]).flatten(1, -2),
        recording.attention_weights[batch, query].flatten(1).to(torch.float32),
        reference,
    )
