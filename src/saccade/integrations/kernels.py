"""Saccade for models that take their kernels through Hugging Face's `kernels` package.

A model that is prepared for `kernels` names its layers; a mapping says which layer runs in place of each,
for each device. The mapping made here has Saccade for the layer `MultiScaleDeformableAttention`: the
installed package, and nothing from the hub. `kernels` is not imported here.
"""

from __future__ import annotations

from torch import Tensor, nn

from saccade.functional import deformable_attention

LAYER = "MultiScaleDeformableAttention"
# Saccade runs on every device of torch: by its own kernels, or by the reference.
DEVICES = ("cpu", "cuda", "rocm", "xpu", "mps", "npu")


class MultiScaleDeformableAttention(nn.Module):
    """The operator, with the forward of transformers' layer of this name.

    `kernels` does not allow a layer to have a constructor or members, except the two that state its
    capabilities.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Runs the operator with the shapes of the list, so that nothing is read back from a GPU.

        Args:
            value (Tensor[B, S, M, D]): the maps of all levels.
            value_spatial_shapes (Tensor[L, 2]): unused.
            value_spatial_shapes_list: `(height, width)` of each level.
            level_start_index (Tensor[L]): unused; levels follow each other.
            sampling_locations (Tensor[B, Q, M, L, K, 2]): normalized (x, y).
            attention_weights (Tensor[B, Q, M, L, K]): after the softmax.
            im2col_step: unused.

        Returns:
            Tensor[B, Q, M * D].
        """
        return deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )


class Layer:
    """The entry of a kernel mapping: it loads the class above, which is installed already."""

    def load(self) -> type[nn.Module]:
        """The class whose forward `kernels` puts into the model's layers."""
        return MultiScaleDeformableAttention

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layer)

    def __hash__(self) -> int:
        return hash(Layer)

    def __str__(self) -> str:
        return f"saccade, layer `{LAYER}`"


def mapping() -> dict[str, dict[str, Layer]]:
    """A mapping for `kernels.register_kernel_mapping` or `kernels.use_kernel_mapping`.

    Returns:
        For the layer's name and each device the layer to load.

    Example:
        >>> from saccade.integrations import kernels as saccade_kernels
        >>> saccade_kernels.mapping()["MultiScaleDeformableAttention"]["cpu"].load().has_backward
        True
        >>> import kernels                                                        # doctest: +SKIP
        >>> kernels.register_kernel_mapping(saccade_kernels.mapping())            # doctest: +SKIP
        >>> kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")    # doctest: +SKIP
    """
    return {LAYER: {device: Layer() for device in DEVICES}}
