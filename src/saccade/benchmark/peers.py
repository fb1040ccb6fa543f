"""What the operator is measured against: each peer, what it lacks here, and how it is called.

A peer gets what its own users give it: its own layout of points, tensors prepared once, and float32
where it knows no 16-bit values. What it cannot do it says; nothing is left out in silence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

import saccade
from saccade.benchmark.workloads import Inputs, Workload
from saccade.doctor import installed
from saccade.integrations.exporter_logging import silence_exporters
from saccade.ops import native

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(value, sampling_locations, attention_weights) -> output, the points of all levels flat."""

# The oldest opset with GridSample is 16; torch's exporter begins at 18, 20 names the modes anew.
ONNX_OPSET = 20


class Peer(ABC):
    """One implementation of the operator."""

    name = ""
    about = ""
    modules: tuple[str, ...] = ()
    """What has to be installed."""
    install = "pip install 'saccade[bench]'"
    native_16_bit = False
    """Whether it takes 16-bit values with float32 locations; else it is given float32."""
    first_call_prepares = False
    """Whether its first call compiles, and says nothing about the others."""

    def missing(self) -> str | None:
        """Why it cannot run here at all, or None."""
        missing = [name for name in self.modules if not installed(name)]
        return f"{', '.join(missing)} not installed: {self.install}" if missing else None

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Why it cannot do this workload, or None."""
        return None

    @abstractmethod
    def prepare(self, workload: Workload, inputs: Inputs) -> Attend:
        """The function that is timed; what a user does once is done here."""

    def kernel(self) -> str:
        """What computes, for the record."""
        return self.name

    def within(self) -> AbstractContextManager[object]:
        """The context that its calls run in."""
        return nullcontext()


class Saccade(Peer):
    """This library, on the best instruction set or on a chosen one."""

    native_16_bit = True

    def __init__(self, backend: str | None = None) -> None:
        """`backend` as for `saccade.use_backend`; None, what a call gets by itself."""
        self.backend = backend
        self.name = backend or "saccade"
        self.about = f"Saccade on {backend}" if backend else "Saccade as it comes"

    def missing(self) -> str | None:
        """An instruction set that this processor or this build does not have."""
        known = [f"cpu-{isa}" for isa in native.available_isas()]
        if self.backend is None or self.backend in known:
            return None
        return f"this machine runs {', '.join(known) or 'no native kernel'}"

    def prepare(self, workload: Workload, inputs: Inputs) -> Attend:
        """The public function."""
        shapes, points = workload.shapes, workload.points

        def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return saccade.deformable_attention(
                value, shapes, locations, weights, num_points=points
            )

        return attend

    def kernel(self) -> str:
        """The name of the backend."""
        return self.backend or saccade.which_backend().name

    def within(self) -> AbstractContextManager[object]:
        """`use_backend`, for a whole turn: it takes no part in the time of a call."""
        return saccade.use_backend(self.backend) if self.backend else nullcontext()


class GridSample(Peer):
    """The code that detectors run on a CPU today, as transformers has it."""

    name = "grid_sample"
    about = (
        "transformers' own function, eager: Deformable DETR's, for lists of points D-FINE's; for "
        "signals and volumes the same in one and three dimensions"
    )
    modules: tuple[str, ...] = ("transformers",)

    def prepare(self, workload: Workload, inputs: Inputs) -> Attend:
        """The function of the model family that has this kind of points."""
        if workload.spatial_dims != 2:
            return _grid_sample_of_lines_or_volumes(workload)
        from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2
        from transformers.models.deformable_detr.modeling_deformable_detr import (
            MultiScaleDeformableAttention,
        )

        # D-FINE passes the list of shapes, which its annotation does not know.
        shapes: Any = [tuple(shape) for shape in workload.shapes]
        points = workload.points
        operator = MultiScaleDeformableAttention()
        shapes_tensor = torch.tensor(shapes)

        def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            value = value.expand(-1, -1, workload.num_heads, -1)
            if len(set(points)) > 1:
                found: Tensor = multi_scale_deformable_attention_v2(
                    value, shapes, locations, weights, points
                )
                return found
            by_level = (len(shapes), points[0])
            attended: Tensor = operator(
                value,
                shapes_tensor,
                shapes,
                None,
                locations.unflatten(3, by_level),
                weights.unflatten(3, by_level),
                64,
            )
            return attended

        return attend


def _grid_sample_of_lines_or_volumes(workload: Workload) -> Attend:
    """As projects write it that have no kernel: a call of grid_sample for each level.

    transformers' function in other dimensions. grid_sample knows images and volumes: a line is an
    image of height 1 to it.
    """
    shapes, points, heads = workload.shapes, workload.points, workload.num_heads
    is_line = workload.spatial_dims == 1

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        batch_size, _, _, head_dim = value.shape
        value = value.expand(-1, -1, heads, -1)
        grids = 2 * locations - 1
        if is_line:
            grids = torch.cat((grids, torch.zeros_like(grids)), -1)
        levels = zip(
            value.split([math.prod(shape) for shape in shapes], 1),
            shapes,
            grids.split(points, 3),
            strict=True,
        )
        sampled = [
            torch.nn.functional.grid_sample(
                level.flatten(2)
                .transpose(1, 2)
                .reshape(batch_size * heads, head_dim, *((1, *shape) if is_line else shape)),
                # [batch * heads, queries, points, 2] or [batch * heads, queries, points, 1, 3]
                grid.transpose(1, 2).flatten(0, 1).unflatten(2, (-1,) if is_line else (-1, 1)),
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            ).flatten(3)
            for level, shape, grid in levels
        ]
        flat_weights = weights.transpose(1, 2).reshape(batch_size * heads, 1, -1, sum(points))
        attended = (torch.cat(sampled, -1) * flat_weights).sum(-1)
        return attended.view(batch_size, heads * head_dim, -1).transpose(1, 2).contiguous()

    return attend


class CompiledGridSample(GridSample):
    """The same under torch.compile."""

    name = "torch.compile"
    about = "grid_sample under torch.compile, sizes fixed; compiles for up to a minute a case"
    first_call_prepares = True

    def prepare(self, workload: Workload, inputs: Inputs) -> Attend:
        """Compiled afresh for each case: what was compiled before would make the sizes dynamic."""
        torch._dynamo.reset()
        compiled: Attend = torch.compile(super().prepare(workload, inputs), dynamic=False)
        return compiled


class MSDeformAttn(Peer):
    """torch-ms-deform-attn, the kernel of Deformable DETR ported to the CPU with OpenMP."""

    name = "torch-ms-deform-attn"
    about = "C++ and OpenMP, from PyPI, compiled against the torch that is installed"
    modules = ("torch_ms_deform_attn",)
    install = "pip install --no-build-isolation --no-deps torch-ms-deform-attn"

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """Lists of points, signals and volumes."""
        if workload.spatial_dims != 2:
            return "knows two dimensions only"
        points = set(workload.points)
        return "takes one number of points for all levels" if len(points) > 1 else None

    def prepare(self, workload: Workload, inputs: Inputs) -> Attend:
        """Its `ms_deform_attn`; a shared head is expanded, as for grid_sample."""
        from torch_ms_deform_attn import ms_deform_attn

        shapes = torch.tensor([tuple(shape) for shape in workload.shapes])
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        by_level = (len(shapes), workload.points[0])

        def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            attended: Tensor = ms_deform_attn(
                value.expand(-1, -1, workload.num_heads, -1),
                shapes,
                starts,
                locations.unflatten(3, by_level),
                weights.unflatten(3, by_level),
            )
            return attended

        return attend


class OnnxRuntime(GridSample):
    """The grid_sample path exported by torch.onnx, in ONNX Runtime."""

    name = "onnxruntime"
    about = "grid_sample exported to ONNX (GridSample), ONNX Runtime on the CPU; forward only"
    modules = ("transformers", "onnx", "onnxscript", "onnxruntime")

    def refusal(self, workload: Workload, *, backward: bool) -> str | None:
        """The backward."""
        return "an exported graph has no backward" if backward else None

    def prepare(self, workload: Workload, inputs: Inputs) -> Attend:
        """A session on as many threads as torch has; tensors go in and out without a copy."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on turning after a call, at the cost of the peer whose turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            _exported(super().prepare(workload, inputs), inputs),
            options,
            providers=["CPUExecutionProvider"],
        )
        names = [given.name for given in session.get_inputs()]

        def attend(*tensors: Tensor) -> Tensor:
            arrays = (tensor.numpy() for tensor in tensors)
            found = session.run(None, dict(zip(names, arrays, strict=True)))
            return torch.from_numpy(found[0])

        return attend


def _exported(attend: Attend, inputs: Inputs) -> bytes:
    class Graph(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return attend(value, locations, weights)

    file = BytesIO()
    with silence_exporters():
        program: Any = torch.onnx.export(
            Graph(), tuple(inputs[:3]), dynamo=True, opset_version=ONNX_OPSET, verbose=False
        )
        program.save(file)
    return file.getvalue()


def all_peers() -> dict[str, Peer]:
    """Every peer by name, also those that cannot run here; Saccade is the first."""
    best = saccade.which_backend().name
    others = [f"cpu-{isa}" for isa in ("avx512", "avx2", "neon", "scalar")]
    peers = [
        Saccade(),
        GridSample(),
        CompiledGridSample(),
        MSDeformAttn(),
        OnnxRuntime(),
        *(Saccade(name) for name in others if name != best),
    ]
    return {peer.name: peer for peer in peers}


def default_peers() -> list[str]:
    """All but the instruction sets of other processors."""
    return [
        name
        for name, peer in all_peers().items()
        if not (isinstance(peer, Saccade) and peer.missing())
    ]
