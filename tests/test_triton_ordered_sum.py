"""The gradient of the value, summed up by the GPU kernels in an order that is always the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import FEW_PAIRS, NO_TRITON, ON_A_CARD, WITH_TRITON, gpu_plans, summing, table
from triton_helpers import assert_close, draw_call, draw_grad_output, run_kernels, run_reference

from saccade.call import parse_call

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import backward_plan, ordered_sum, plan, tuning


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def programs_in_another_order(seed: int) -> Iterator[None]:
    """A card runs the programs of a kernel in whatever order; the interpreter is made to."""
    if ON_A_CARD:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    go_to = builder.set_grid_idx
    generator = torch.Generator().manual_seed(seed)
    orders: dict[int, list[int]] = {}

    def elsewhere(x: int, y: int, z: int) -> None:
        programs = builder.grid_dim[0]
        if x == 0:
            orders[programs] = torch.randperm(programs, generator=generator).tolist()
        go_to(orders[programs][x], y, z)

    builder.set_grid_idx = elsewhere
    try:
        yield
    finally:
        del builder.set_grid_idx


FLOAT64 = {"dtype": torch.float64, "point_dtype": torch.float64}
FLOAT32 = {"dtype": torch.float32, "point_dtype": torch.float32, "interpolation": "linear"}
ONE_MAP = {"batch_size": 1, "queries_per_map": None, "num_heads": 1}
CALLS = {
    "locations": {**ONE_MAP, "shapes": [(3, 3)], "num_queries": 40, "reference": "none"},
    "shared-head": {
        **ONE_MAP,
        "shapes": [(4,)],
        "num_heads": 2,
        "shared_head": True,
        "num_queries": 16,
    },
    "ragged": {"shapes": [(2, 3)], "queries_per_map": [10, 0, 12], "num_points": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernel", FEW_PAIRS)
def test_bitwise_equal_in_whatever_order_programs_run(name, kernel, monkeypatch):
    call = draw_call(1, **FLOAT32, **CALLS[name])
    grad_output = draw_grad_output(call)
    # Not by the table: torch's own switch requires the order.
    with table(monkeypatch, few_pairs=FEW_PAIRS[kernel], many_samples=2**62):
        with deterministic():
            first = run_kernels(call, grad_output)
            with programs_in_another_order(2):
                again = run_kernels(call, grad_output)
            assert all(map(torch.equal, again, first))
        assert gpu_plans()[-1].ordered_sum is not None
    assert_close(first, run_reference(call, grad_output))


@pytest.mark.slow
@pytest.mark.skipif(ON_A_CARD, reason="a card may keep to the same order by chance")
def test_additions_to_memory_do_depend_on_the_order(monkeypatch):
    # Else the test above could not fail.
    call = draw_call(1, **FLOAT32, **CALLS["locations"])
    grad_output = draw_grad_output(call)
    with table(monkeypatch, few_pairs=2**62, many_samples=2**62):
        first = run_kernels(call, grad_output)
        with programs_in_another_order(1):
            again = run_kernels(call, grad_output)
        assert gpu_plans()[-1].ordered_sum is None
    assert not torch.equal(again[1], first[1])
    assert_close(again, first)


@pytest.fixture
def in_order(monkeypatch):
    with table(monkeypatch, few_pairs=-1, **summing("sorted")):
        yield


def check(call):
    grad_output = draw_grad_output(call)
    actual = run_kernels(call, grad_output)
    assert_close(actual, run_reference(call, grad_output))
    return actual


@pytest.mark.parametrize(
    ("shapes", "coordinates"),
    [([(1,), (3,)], "pixel"), ([(1, 1), (2, 3)], "normalized"), ([(2, 1, 2)], "pixel")],
)
def test_more_points_of_a_cell_than_are_summed_at_once(in_order, shapes, coordinates):
    call = draw_call(
        2, **FLOAT64, **ONE_MAP, shapes=shapes, num_queries=100, num_points=1, head_dim=3,
        reference="none", coordinates=coordinates, interpolation="linear",
    )  # fmt: skip
    call.points[:, ::2] = call.points[:, :1]
    assert ordered_sum.PIECE_POINTS < 50
    check(call)


def test_points_in_the_margin_and_outside(in_order):
    # Each combination of such coordinates.
    steps = torch.tensor([-0.5, 0.0, 0.5, 1.5, 2.0, 2.5, -1.0, 3.0, -7.0, 1e30])
    call = draw_call(
        3, **FLOAT64, **ONE_MAP, shapes=[(3, 3)], num_queries=len(steps) ** 2, num_points=1,
        head_dim=1, reference="none", coordinates="pixel", interpolation="linear",
    )  # fmt: skip
    call.points.copy_(torch.cartesian_prod(steps, steps).view(call.points.shape))
    check(call)


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [None, [2, 0, 5, 1]])
@pytest.mark.parametrize("max_bytes", [1, 9_000])
def test_maps_in_groups(in_order, ragged, max_bytes, monkeypatch):
    monkeypatch.setattr(plan, "MAX_WORKSPACE_BYTES", max_bytes)
    call = draw_call(
        4, **FLOAT64, batch_size=4, queries_per_map=ragged, num_queries=2, shapes=[(4, 5)],
        interpolation="linear", num_points=2, num_heads=2, head_dim=8,
    )  # fmt: skip
    with deterministic():
        check(call)
    groups = [group.maps for group in gpu_plans()[-1].groups]
    assert len(groups) == 4 if max_bytes == 1 else 1 < len(groups) < 4
    assert [maps.start for maps in groups[1:]] == [maps.stop for maps in groups[:-1]]


def test_rows_wider_than_a_program_takes(in_order, monkeypatch):
    monkeypatch.setattr(ordered_sum, "MAX_BLOCK_CHANNELS", 4)
    check(draw_call(5, **FLOAT64, **ONE_MAP, head_dim=11, num_queries=3, interpolation="linear"))


def test_a_map_that_no_point_reads_gets_zeros(in_order):
    call = draw_call(
        6,
        **FLOAT32,
        **ONE_MAP,
        num_queries=3,
        reference="none",
        coordinates="pixel",
        padding="zeros",
    )
    call.points.add_(30)
    assert (check(call)[1] == 0).all()


def planned(num_samples, num_cells):
    """The plan for a call with such numbers of points and cells, without memory."""
    value = torch.empty(1, num_cells - 1, 1, 8, device="meta")
    locations = torch.empty(1, num_samples, 1, 1, 1, device="meta")
    call = parse_call(value, [(num_cells - 1,)], locations, locations[..., 0], num_points=1)
    return backward_plan(call, (True, True, True, False))


def test_many_points_of_few_cells_are_summed_in_order_by_themselves(monkeypatch):
    many, per_cell = (tuning._table()[name] for name in ("many_samples", "many_samples_per_cell"))
    few_cells = many // per_cell
    assert planned(many, few_cells).ordered_sum is not None
    assert planned(many - 1, few_cells).ordered_sum is None
    assert planned(many, few_cells + 1).ordered_sum is None
    # Where that takes too much memory, only if the order is required.
    monkeypatch.setattr(plan, "MAX_WORKSPACE_BYTES", 2**20)
    assert planned(many, few_cells).ordered_sum is None
    with deterministic():
        assert planned(many, few_cells).ordered_sum is not None


def test_the_workspace_has_the_size_that_is_planned_with(in_order, monkeypatch):
    allocated = []
    new_empty = torch.Tensor.new_empty

    def counted(self, *arguments, **options):
        result = new_empty(self, *arguments, **options)
        allocated.append(result.nbytes)
        return result

    call = draw_call(
        7, **FLOAT32, **ONE_MAP, shapes=[(9, 9)], num_queries=40, num_points=2, head_dim=8,
        reference="none",
    )  # fmt: skip
    grad_output = draw_grad_output(call)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", counted)
        output = run_kernels(call, grad_output)[0]
    expected = ordered_sum.workspace_bytes(80, 100, 4, 8, 2, 4)
    # Keys, records and sums; what torch's sort and search return is not counted here.
    by_torch = 80 * (4 + 8) + 100 * 24 + (80 // ordered_sum.PIECE_POINTS + 80) * 16
    assert expected == sum(allocated) - output.nbytes + by_torch
