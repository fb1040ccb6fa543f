"""What a call's kernels are compiled for and how they are launched; forward and backward share it.

A plan (`forward.ForwardPlan`, `backward.BackwardPlan`) holds everything that follows from a call's sizes,
dtypes, device and options. It is kept in `Call.plans`, so that later calls only launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saccade.backends.triton.tuning import Form, row_words
from saccade.call import Call

# Offsets are counted in 32 bits up to so many elements. A point beside a map may be as far from its beginning as
# the last pixel is, and more: a map of one line has a line above and one below.
MAX_INT32_ELEMENTS = (2**31 - 1) // 8
# Bytes of workspace. Maps are worked on together up to so many; a single map that takes more is summed up in
# order only under `torch.use_deterministic_algorithms`.
MAX_WORKSPACE_BYTES = 3 * 2**27
# Times that the reference point changes from one point to the next, up to which points are written out.
MAX_REFERENCE_CHANGES = 8


class Constants(NamedTuple):
    """What the kernels of a call are compiled for, in one constexpr argument.

    Triton's cache goes by the values: equal records share a compiled kernel.
    """

    REFERENCE: str
    """What the points are relative to: "none" (locations), "points" or "boxes"."""
    REFERENCE_INDEX: tuple[int, ...]
    NUM_REFERENCES: int
    SOFTMAX: bool
    INTERPOLATION: str
    PADDING: str
    COORDINATES: str
    SPATIAL_DIMS: int
    NUM_LEVELS: int
    NUM_CORNERS: int
    NUM_HEADS: int
    VALUE_HEADS: int
    HEAD_DIM: int
    HEAD_WORDS: int
    """Words of a head's row of the value."""
    PACKED_BF16: bool
    """Whether a word is two bfloat16; else it is one element."""
    NUM_POINTS: int
    LEVEL_POINTS: tuple[int, ...]
    """The number of points of each level."""
    LEVEL_OF_POINT: tuple[int, ...]
    POINTS_OF_LEVEL: tuple[int, ...]
    """For each point the number of points of its level."""
    USE_INT64_OFFSETS: bool
    """Whether offsets within a map, or within a block of queries, need 64 bits."""
    BLOCK_QUERIES: int
    BLOCK_POINTS: int
    BLOCK_CHANNELS: int
    """Words of a channel block."""
    NUM_CHANNEL_BLOCKS: int
    """Blocks in which a program reads a row, or a slice of it."""
    NUM_SLICES: int
    """Slices of a row too wide for one program."""
    POINTS_PER_STEP: int
    """Points whose code is written out one after the other; they divide those of each level."""
    GRAD_VALUE: str = "none"
    """How the gradient of the value is summed up: "none" (not at all), "atomic" or "sorted"."""
    GRAD_POINTS: bool = False
    GRAD_WEIGHTS: bool = False
    GRAD_LOCATIONS: bool = False
    """Whether the gradients of the locations are stored, for those of the reference points."""


class ReferenceConstants(NamedTuple):
    """What `sum_references_kernel` is compiled for; the fields of `Constants`, and blocks of its own."""

    REFERENCE: str
    REFERENCE_INDEX: tuple[int, ...]
    NUM_REFERENCES: int
    SPATIAL_DIMS: int
    NUM_HEADS: int
    NUM_POINTS: int
    POINTS_OF_LEVEL: tuple[int, ...]
    BLOCK_QUERIES: int
    BLOCK_POINTS: int


class PieceConstants(NamedTuple):
    """What `sum_pieces_kernel` is compiled for."""

    SPATIAL_DIMS: int
    NUM_CORNERS: int
    HEAD_DIM: int
    NUM_POINTS: int
    PIECE_POINTS: int
    BLOCK_PIECES: int
    BLOCK_CHANNELS: int
    NUM_SLICES: int


class RowConstants(NamedTuple):
    """What `sum_rows_kernel` is compiled for."""

    SPATIAL_DIMS: int
    NUM_CORNERS: int
    HEAD_DIM: int
    VALUE_HEADS: int
    NUM_LEVELS: int
    BLOCK_ROWS: int
    BLOCK_CHANNELS: int
    NUM_SLICES: int


def make_constants(call: Call, form: Form) -> Constants:
    """The constants of a call's kernels; the backward replaces the last four."""
    options = call.options
    num_points, spatial_dims = sum(options.num_points), options.spatial_dims
    reference, num_references, num_coordinates = "none", 1, 0
    reference_index: tuple[int, ...] = (0,)
    if call.reference_points is not None and options.reference_index is not None:
        *_, num_references, num_coordinates = call.reference_points.shape
        reference = "points" if num_coordinates == spatial_dims else "boxes"
        reference_index = options.reference_index
    _, num_positions, value_heads, head_dim = call.value.shape
    num_heads = call.points.shape[2]
    words, _ = row_words(call.value)
    levels = [level for level, count in enumerate(options.num_points) for _ in range(count)]
    reference_changes = sum(one != other for one, other in itertools.pairwise(reference_index))
    return Constants(
        REFERENCE=reference,
        REFERENCE_INDEX=reference_index,
        NUM_REFERENCES=num_references,
        SOFTMAX=options.softmax,
        INTERPOLATION=options.interpolation,
        PADDING=options.padding,
        COORDINATES=options.coordinates,
        SPATIAL_DIMS=spatial_dims,
        NUM_LEVELS=len(options.num_points),
        NUM_CORNERS=2**spatial_dims if options.interpolation == "linear" else 1,
        NUM_HEADS=num_heads,
        VALUE_HEADS=value_heads,
        HEAD_DIM=head_dim,
        HEAD_WORDS=words,
        PACKED_BF16=words < head_dim,
        NUM_POINTS=num_points,
        LEVEL_POINTS=options.num_points,
        LEVEL_OF_POINT=tuple(levels),
        POINTS_OF_LEVEL=tuple(options.num_points[level] for level in levels),
        USE_INT64_OFFSETS=max(
            num_positions * value_heads * head_dim,
            form.queries * num_heads * max(num_points * spatial_dims, head_dim),
            form.queries * num_references * num_coordinates,
        )
        > MAX_INT32_ELEMENTS,
        BLOCK_QUERIES=form.queries,
        BLOCK_POINTS=triton.next_power_of_2(num_points),
        BLOCK_CHANNELS=form.channels,
        NUM_CHANNEL_BLOCKS=form.channel_blocks,
        NUM_SLICES=form.slices,
        POINTS_PER_STEP=(
            1
            if reference_changes > MAX_REFERENCE_CHANGES
            else form.points_per_step(options.num_points, spatial_dims)
        ),
    )


class Kernel:
    """A kernel and its constants: what does not change from call to call."""

    def __init__(self, function: Any, constants: Any, num_warps: int = 4) -> None:
        self.function = function
        self.constants = constants
        # The definition rounds a position twice, and Triton's default has changed.
        self.options = {"enable_fp_fusion": False, "num_warps": num_warps, "num_stages": 1}
        self._compiled: dict[Hashable, Any] = {}

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(self.function.__name__)

    def start(
        self,
        num_programs: int,
        tensors: Sequence[Tensor],
        sizes: tuple[int, ...] | None,
        scalars: Sequence[int],
    ) -> None:
        """Launches the kernel on the device of the tensors, which has to be the current one."""
        if num_programs == 0:
            return
        arguments = (*tensors, *(() if sizes is None else (sizes,)), *scalars)
        # What Triton compiles another kernel for. To find the kernel takes it many times as long as to launch.
        key = (tensors[0].get_device(), *[tensor.data_ptr() % 16 == 0 for tensor in tensors])
        compiled = self._compiled.get(key)
        # Numbers beyond 32 bits are of another type.
        fits_int32 = max(scalars) < 2**31
        if compiled is not None and fits_int32:
            compiled[(num_programs, 1, 1)](*arguments, self.constants)
            return
        compiled = self.function[(num_programs,)](*arguments, C=self.constants, **self.options)
        # The interpreter compiles nothing.
        if compiled is not None and fits_int32:
            self._compiled[key] = compiled


class Launch(NamedTuple):
    """One launch: consecutive queries that read the maps from `first_map` on."""

    num_programs: int
    num_queries: int
    num_blocks: int
    first_map: int
    first_query: int

    def scalars(self, num_positions: int) -> tuple[int, ...]:
        """The arguments `forward.SCALARS` of the kernels."""
        return self.num_queries, self.num_blocks, num_positions, self.first_map, self.first_query


def make_launches(
    batch_size: int,
    num_queries: int,
    programs_per_block: int,
    block_queries: int,
    queries_per_map: Sequence[int] | None,
) -> list[Launch]:
    """One launch for a batch; one per map where each map has its own number of queries."""
    if queries_per_map is None:
        num_blocks = -(-num_queries // block_queries)
        num_programs = num_blocks * programs_per_block * batch_size
        launches = [Launch(num_programs, num_queries, num_blocks, 0, 0)]
    else:
        launches, first_query = [], 0
        for map_index, count in enumerate(queries_per_map):
            num_blocks = -(-count // block_queries)
            num_programs = num_blocks * programs_per_block
            launches.append(Launch(num_programs, count, num_blocks, map_index, first_query))
            first_query += count
    return [launch for launch in launches if launch.num_programs > 0]


class MapGroup(NamedTuple):
    """Maps that are worked on together, with their queries among those of all maps."""

    maps: slice
    queries: slice
    launches: list[Launch]
    """Counted from the first map and the first query of the group."""


def map_num_queries(call: Call) -> Sequence[int]:
    """The number of queries of each map."""
    if call.options.queries_per_map is not None:
        return call.options.queries_per_map
    return [call.points.shape[1]] * call.value.shape[0]


def group_maps(call: Call, block_queries: int, map_bytes: Sequence[int]) -> list[MapGroup]:
    """The maps in groups of one, or of more whose workspaces sum to at most MAX_WORKSPACE_BYTES."""
    batch_size = call.value.shape[0]
    _, num_queries, num_heads, _, _ = call.points.shape
    queries_per_map, counts = call.options.queries_per_map, map_num_queries(call)
    groups, first_map, first_query = [], 0, 0
    while first_map < batch_size:
        last_map, total_bytes = first_map + 1, map_bytes[first_map]
        while last_map < batch_size and total_bytes + map_bytes[last_map] <= MAX_WORKSPACE_BYTES:
            total_bytes += map_bytes[last_map]
            last_map += 1
        maps = slice(first_map, last_map)
        last_query = first_query + sum(counts[maps])
        launches = make_launches(
            last_map - first_map,
            num_queries,
            num_heads,
            block_queries,
            queries_per_map and queries_per_map[maps],
        )
        groups.append(MapGroup(maps, slice(first_query, last_query), launches))
        first_map, first_query = last_map, last_query
    return groups


def encode_sizes(spatial_shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes of the levels as the kernels take them, see `rule.level_size`."""
    return tuple(2 * size + 1 for shape in spatial_shapes for size in shape)


def as_current_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context manager in which the tensor's device is the current one; to check costs less than to enter."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def align_to_words(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that begins where a 32-bit word begins."""
    return tensor.clone() if tensor.data_ptr() % 4 else tensor


def make_readable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as kernels read them: contiguous.

    Raises:
        ValueError: the storage of a tensor was freed.
    """
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            raise ValueError(
                f"a tensor {list(tensor.shape)}: expected one with memory, its storage was freed"
            )
    return [tensor.contiguous() for tensor in tensors]


def call_tensors(call: Call) -> list[Tensor]:
    """value, points, weights and reference_points as kernels read them; without reference points, any
    tensor in their place.
    """
    reference_points = call.weights if call.reference_points is None else call.reference_points
    return make_readable((call.value, call.points, call.weights, reference_points))
