"""What Saccade is measured against: each baseline, why it cannot run here, and how it is called.

A baseline gets what its own users give it: its own layout of points, tensors prepared once, and float32
where it does not take 16-bit values. A baseline that cannot run or cannot do a workload says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import saccade
from saccade.bench.workloads import Inputs, Workload
from saccade.doctor import installed

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(value, sampling_locations, attention_weights) -> output; the points of all levels are flat."""


class Baseline(ABC):
    """One implementation of the operator."""

    name = ""
    about = ""
    modules: tuple[str, ...] = ()
    """What has to be installed."""
    install = "pip install 'saccade[bench]'"
    takes_16_bits = False
    """Whether it takes 16-bit values with float32 locations; otherwise it gets float32."""

    def missing(self) -> str | None:
        """Why it cannot run here at all, or None."""
        missing = [name for name in self.modules if not installed(name)]
        return f"{', '.join(missing)} not installed: {self.install}" if missing else None

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Why it cannot do this workload, or None."""
        return None

    @abstractmethod
    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """The function that is timed; what a user does once is done here."""

    def kernel(self) -> str:
        """What computes, for the record."""
        return self.name

    def context(self) -> AbstractContextManager[object]:
        """Context manager in which this baseline's calls run (for example, a backend)."""
        return nullcontext()


class Saccade(Baseline):
    """This library, on the backend that a call gets by itself."""

    name = "saccade"
    about = "Saccade as it comes"
    takes_16_bits = True

    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """The public function."""
        shapes, points = workload.shapes, workload.points

        def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return saccade.deformable_attention(
                value, shapes, locations, weights, num_points=points
            )

        return run

    def kernel(self) -> str:
        """The name of the backend."""
        return saccade.which_backend().name


class GridSample(Baseline):
    """The code that detectors run on a CPU today, as transformers has it."""

    name = "grid_sample"
    about = (
        "transformers' own functions: Deformable DETR's, for different points per level D-FINE's"
    )
    modules: tuple[str, ...] = ("transformers",)

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Refuses signals and volumes."""
        return None if workload.spatial_dims == 2 else "transformers has it for images only"

    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """The function of the model family that has this kind of points."""
        from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2
        from transformers.models.deformable_detr.modeling_deformable_detr import (
            MultiScaleDeformableAttention,
        )

        # D-FINE passes the list of shapes, which its annotation does not know.
        shapes: Any = [tuple(shape) for shape in workload.shapes]
        points = workload.points
        operator = MultiScaleDeformableAttention()
        shapes_tensor = torch.tensor(shapes)

        def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            value = value.expand(-1, -1, workload.num_heads, -1)
            output: Tensor
            if len(set(points)) > 1:
                output = multi_scale_deformable_attention_v2(
                    value, shapes, locations, weights, points
                )
                return output
            by_level = (len(shapes), points[0])
            locations = locations.unflatten(3, by_level)
            weights = weights.unflatten(3, by_level)
            output = operator(value, shapes_tensor, shapes, None, locations, weights, 64)
            return output

        return run


class MSDeformAttn(Baseline):
    """torch-ms-deform-attn, the kernel of Deformable DETR ported to the CPU with OpenMP."""

    name = "torch-ms-deform-attn"
    about = "C++ and OpenMP, from PyPI, compiled against the torch that is installed"
    modules = ("torch_ms_deform_attn",)
    install = "pip install --no-build-isolation --no-deps torch-ms-deform-attn"

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Refuses different points per level, signals and volumes."""
        if workload.spatial_dims != 2:
            return "takes images only"
        return (
            "takes one number of points for all levels" if len(set(workload.points)) > 1 else None
        )

    def prepare(self, workload: Workload, inputs: Inputs | None = None) -> Function:
        """Its `ms_deform_attn`; a shared head is expanded, as for grid_sample."""
        from torch_ms_deform_attn import ms_deform_attn

        shapes = torch.tensor([tuple(shape) for shape in workload.shapes])
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        by_level = (len(shapes), workload.points[0])

        def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            value = value.expand(-1, -1, workload.num_heads, -1)
            locations, weights = locations.unflatten(3, by_level), weights.unflatten(3, by_level)
            output: Tensor = ms_deform_attn(value, shapes, starts, locations, weights)
            return output

        return run


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline for baseline in (Saccade(), GridSample(), MSDeformAttn())
}
