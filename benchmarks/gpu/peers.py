"""What Saccade is measured against on a GPU: whatever is installed of what others have written.

None of their code is here: an adapter imports the peer when it is asked for, and gives it what its own
users do, prepared outside the clock. Signatures and layouts are those of the peers' sources.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import saccade
from benchmarks.gpu.packing import by_level, halves_joined, packed_for_dcnv4
from benchmarks.gpu.results import reason_of
from saccade.benchmark import peers as cpu_peers
from saccade.benchmark.workloads import Inputs, Workload

SACCADE = "saccade"
UPSTREAM = "upstream CUDA"
# How many maps the CUDA op of 2020 takes at once; batches up to this, or multiples of it.
IM2COL_STEP = 64
HUB_REPOSITORY = "kernels-community/deformable-detr"
AUTHORS = {
    "multiscale_deformable_attention": "rziga",
    "multi_scale_deformable_attention": "roulbac",
    "msda2d_fwd": "mach9robotics",
}

Parts = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
"""A function that autograd knows, and the tensors that it takes: the value first, gradients by all."""


class GpuPeer(ABC):
    """One implementation on the GPU."""

    name = ""
    module = ""
    """What has to be importable."""
    distribution = ""
    install = ""
    spatial_dims: tuple[int, ...] = (2,)
    lists_of_points = False

    def load(self) -> Any:
        """What is called, imported now; raises ImportError or whatever else stands in the way."""
        return importlib.import_module(self.module)

    def missing(self) -> str | None:
        """Why it cannot run here, and how to get it, or None."""
        try:
            self.load()
        except Exception as error:  # an extension of another torch fails in any way
            return f"{reason_of(error)}; install: {self.install}"
        return None

    def version(self) -> str:
        """Of the package, where there is one."""
        try:
            return metadata.version(self.distribution or self.module.partition(".")[0])
        except (metadata.PackageNotFoundError, ValueError):
            return ""

    def refusal(self, workload: Workload, dtype: torch.dtype) -> str | None:
        """Why it cannot do this workload, or None."""
        if workload.spatial_dims not in self.spatial_dims:
            return "knows two dimensions only"
        if len(set(workload.points)) > 1 and not self.lists_of_points:
            return "takes one number of points for all levels"
        return None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the values it is given for values in `dtype`."""
        return torch.float32

    @abstractmethod
    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """The function that is timed, and its tensors, prepared; inputs are on the device."""

    def prepare(self, workload: Workload, inputs: Inputs) -> Callable[[], Tensor]:
        """The call that is timed."""
        function, tensors = self.parts(workload, inputs)
        return lambda: function(*tensors)


class Saccade(GpuPeer):
    """This library, locations and weights given."""

    name = SACCADE
    module = "saccade"
    spatial_dims = (1, 2, 3)
    lists_of_points = True

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """As it is asked."""
        return dtype

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """The public function."""
        shapes, points = workload.shapes, workload.points

        def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return saccade.deformable_attention(
                value, shapes, locations, weights, num_points=points
            )

        return attend, tuple(inputs[:3])


class SaccadeFused(Saccade):
    """The same work from reference points, offsets and logits."""

    name = "saccade fused"

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """References in the middle of the map, offsets from there, and logits that give the weights."""
        shapes, points = workload.shapes, workload.points
        device = inputs.value.device
        sizes = torch.tensor(
            [shape[::-1] for shape, k in zip(shapes, points, strict=True) for _ in range(k)],
            dtype=torch.float32,
            device=device,
        )
        locations = inputs.sampling_locations
        references = torch.full(
            (*locations.shape[:2], 1, workload.spatial_dims), 0.5, device=device
        )
        offsets, logits = (locations - 0.5) * sizes, inputs.attention_weights.log()

        def attend(value: Tensor, *given: Tensor) -> Tensor:
            return saccade.fused_deformable_attention(value, shapes, *given, num_points=points)

        return attend, (inputs.value, references, offsets, logits)


class GridSample(GpuPeer):
    """The grid_sample path as transformers writes it, which is what its models run by default."""

    name = "grid_sample"
    module = "transformers"
    install = "pip install 'transformers>=5'"
    spatial_dims = (1, 2, 3)
    lists_of_points = True

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """All tensors in the value's dtype, locations too: grid_sample takes no two."""
        return dtype

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """transformers' own function."""
        attend = cpu_peers.GridSample().prepare(workload, inputs)
        dtype = inputs.value.dtype
        locations, weights = (tensor.to(dtype) for tensor in inputs[1:3])
        return attend, (inputs.value, locations, weights)


class Upstream(GpuPeer):
    """The CUDA op of Deformable DETR, which DINO and Mask2Former compile too."""

    name = UPSTREAM
    module = "MultiScaleDeformableAttention"
    install = "compile models/ops of github.com/fundamentalvision/Deformable-DETR, then --peer-path"

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """The two halves of the extension; they know float32 and float64 only."""
        given = by_level(workload, inputs, torch.float32)
        return given.with_levels(halves_joined(self.load(), IM2COL_STEP))


class Mmcv(GpuPeer):
    """mmcv's CUDA op; 16-bit calls are float16, with positions in float16 too."""

    name = "mmcv CUDA"
    module = "mmcv.ops.multi_scale_deform_attn"
    distribution = "mmcv"
    install = "mim install mmcv, or compile it: MMCV_WITH_OPS=1 pip install mmcv"

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """It has no bfloat16."""
        return torch.float32 if dtype == torch.float32 else torch.float16

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """Its autograd function, which makes points of the value's dtype; here they are so already."""
        function = self.load().MultiScaleDeformableAttnFunction
        given = by_level(workload, inputs, self.computes_in(inputs.value.dtype))
        return given.with_levels(lambda *tensors: function.apply(*tensors, IM2COL_STEP))


class HubKernel(GpuPeer):
    """The kernel that transformers' models take from the hub when `kernels` is installed and they are told to."""

    name = "hub kernel"
    module = "kernels"
    install = (
        'pip install kernels, then once: python -c "import kernels; '
        f"kernels.get_kernel('{HUB_REPOSITORY}', version=1)\""
    )

    def __init__(self) -> None:
        self._kernel: Any = None

    def load(self) -> Any:
        """The kernel, from the hub's cache on this machine."""
        if self._kernel is None:
            get_kernel = importlib.import_module("kernels").get_kernel
            try:
                self._kernel = get_kernel(HUB_REPOSITORY, version=1)
            except TypeError:  # before versions of kernels had numbers
                self._kernel = get_kernel(HUB_REPOSITORY)
        return self._kernel

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """Newer builds know 16 bits, with points in the same dtype."""
        return dtype

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """The two halves, as upstream's."""
        given = by_level(workload, inputs, inputs.value.dtype)
        return given.with_levels(halves_joined(self.load(), IM2COL_STEP))


class TorchMSDeformAttn(GpuPeer):
    """torch-ms-deform-attn from PyPI, upstream's kernels as a package; float32."""

    name = "torch-ms-deform-attn"
    module = "torch_ms_deform_attn"
    install = "pip install --no-build-isolation --no-deps torch-ms-deform-attn"

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """Its function."""
        given = by_level(workload, inputs, torch.float32)
        return given.with_levels(self.load().ms_deform_attn)


class DCNv4(GpuPeer):
    """FlashDeformAttn of DCNv4: float16, the softmax inside."""

    name = "DCNv4 FlashDeformAttn"
    module = "DCNv4"
    install = "compile DCNv4_op of github.com/OpenGVLab/DCNv4, then --peer-path"

    def refusal(self, workload: Workload, dtype: torch.dtype) -> str | None:
        """What its kernels are not made for."""
        if dtype == torch.float32:
            return "computes in float16 only"
        if len(workload.shapes) > 5 or not set(workload.points) <= {4, 8}:
            return "takes 4 or 8 points on at most 5 levels"
        if workload.head_dim % 8:
            return "takes heads of a multiple of 8 numbers"
        threads = workload.num_heads * workload.head_dim // 8  # of a query; 512 of a block at most
        looks = workload.batch_size * workload.queries
        block = max((n for n in range(1, 65) if looks % n == 0 and n * threads <= 512), default=1)
        if workload.queries % block:
            return "its blocks would reach from one map into the next, beyond its memory"
        return super().refusal(workload, dtype)

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """Always."""
        return torch.float16

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """Its autograd function (value, shapes, starts, points and logits, step, number of points)."""
        function = self.load().FlashDeformAttnFunction
        given = by_level(workload, inputs, torch.float16, torch.float32)
        packed = packed_for_dcnv4(given, torch.float16)
        points, (shapes, starts) = workload.points[0], given[1:3]

        def attend(value: Tensor, packed: Tensor) -> Tensor:
            attended: Tensor = function.apply(value, shapes, starts, packed, IM2COL_STEP, points)
            return attended

        return attend, (given.value, packed)


class Deformops(GpuPeer):
    """deformops from PyPI: Triton."""

    name = "deformops"
    module = "deformops.registry"
    install = "pip install deformops (Python 3.12 or newer)"

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """As it is asked; locations may stay in float32."""
        return dtype

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """Its functional form on the backend it chooses; weights in the value's dtype, which it asks for."""
        function, dtype = self.load().msda, inputs.value.dtype
        given = by_level(workload, inputs, dtype)
        locations = by_level(workload, inputs, dtype, torch.float32).locations
        return given._replace(locations=locations).with_levels(function)


class MsdaTriton(GpuPeer):
    """Three projects are called msda-triton and share a module's name; which one it is shows in its names."""

    name = "msda-triton"
    module = "msda_triton"
    install = (
        "pip install . in a clone of github.com/rziga/msda-triton (or roulbac/…, mach9robotics/…)"
    )

    def author(self) -> str:
        """Whose it is."""
        module = self.load()
        for name, author in AUTHORS.items():
            if hasattr(module, name):
                return author
        raise ImportError("none of the projects that are known by this name")

    def missing(self) -> str | None:
        """Also when the module is of another project."""
        reason = super().missing()
        if reason is None:
            try:
                self.author()
            except ImportError as error:
                reason = f"{error}; install: {self.install}"
        return reason

    def version(self) -> str:
        """With the author."""
        return f"{self.author()} {super().version()}".strip()

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """rziga's knows float16 as its only 16 bits."""
        return torch.float16 if dtype.itemsize == 2 and self.author() == "rziga" else dtype

    def parts(self, workload: Workload, inputs: Inputs) -> Parts:
        """All tensors in one dtype. rziga's public function would hide a failure behind grid_sample."""
        module, author = self.load(), self.author()
        given = by_level(workload, inputs, self.computes_in(inputs.value.dtype))
        if author == "roulbac":
            return given.with_levels(module.multi_scale_deformable_attention)
        if author == "mach9robotics":
            # Its advice: shapes on the host; by default it moves locations.
            on_host = given.shapes.int().cpu()
            return given.with_levels(
                lambda value, _, __, *points: module.msda2d_fwd(
                    value, on_host, *points, clamp_grid=False
                )
            )
        attend = importlib.import_module("msda_triton.frontend")
        forward = attend.triton_multiscale_deformable_attention
        return given.with_levels(
            lambda value, shapes, _, *points: forward(
                value, shapes, *points, "zeros", False
            ).flatten(2)
        )


def all_peers() -> dict[str, GpuPeer]:
    """Every peer by name, Saccade first, also those that are not here."""
    peers: list[GpuPeer] = [
        Saccade(),
        SaccadeFused(),
        Upstream(),
        Mmcv(),
        HubKernel(),
        DCNv4(),
        Deformops(),
        MsdaTriton(),
        TorchMSDeformAttn(),
        GridSample(),
    ]
    return {peer.name: peer for peer in peers}
