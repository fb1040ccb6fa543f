"""The gradient of the value, summed up by the GPU kernels in an order that is always the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import NO_TRITON, ON_A_CARD, WITH_TRITON, summing, table
from fused_helpers import FusedCase
from helpers import Case, assert_same
from test_triton_backward import draw, everything, expected

pytestmark = WITH_TRITON
if NO_TRITON is None:
    from saccade.backends.triton import backward, sorting, tuning


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


CASES = {
    "plain": Case(shapes=[(5, 5), (2, 2)], num_queries=70, num_heads=2, batch_size=1),
    "shared-head": Case(shapes=[(4, 4)], num_queries=20, num_heads=4, shared_head=True),
    "fused-ragged": FusedCase(batch_size=3, queries_per_map=[30, 0, 40], num_heads=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("few_looks", [-1, 2**62], ids=["queries", "points"])
def test_bitwise_equal_in_whatever_order_programs_run(case, few_looks, monkeypatch):
    case = case.with_(dtype=torch.float32)
    inputs, grad_output = draw(case)
    # Without the rule of the table: torch's own switch is what asks for it.
    with table(monkeypatch, few_looks=few_looks, many_samples=2**62):
        with deterministic():
            first = everything(case, inputs, grad_output)
            for seed in range(3):
                with programs_in_another_order(seed):
                    again = everything(case, inputs, grad_output)
                assert all(map(torch.equal, again, first))
        assert all(plan.in_order is not None for plan in backward._remembered.values())
    assert_same(first, expected(case, inputs, grad_output), 1e-5)


@pytest.mark.skipif(ON_A_CARD, reason="a card may keep to the same order by chance")
def test_additions_to_memory_do_depend_on_the_order(monkeypatch):
    # Else the test above could not fail.
    case = CASES["shared-head"]
    inputs, grad_output = draw(case)
    with table(monkeypatch, few_looks=2**62, many_samples=2**62):
        first = everything(case, inputs, grad_output)
        with programs_in_another_order(1):
            again = everything(case, inputs, grad_output)
        assert all(plan.in_order is None for plan in backward._remembered.values())
    assert not torch.equal(again[1], first[1])
    assert_same(again, first, 1e-5)


@pytest.fixture
def in_order(monkeypatch):
    with table(monkeypatch, few_looks=-1, **summing("in-order")):
        yield


@pytest.mark.parametrize("coordinates", ["normalized", "pixel"])
@pytest.mark.parametrize("shapes", [[(1,), (3,)], [(1, 1), (2, 3)], [(2, 1, 2)]])
def test_more_points_of_a_cell_than_are_summed_at_once(in_order, shapes, coordinates):
    case = Case(
        shapes=shapes, num_queries=150, num_heads=1, batch_size=1, num_points=1, head_dim=3,
        coordinates=coordinates, dtype=torch.float64,
    )  # fmt: skip
    (value, locations, weights), grad_output = draw(case)
    locations[:, ::2] = locations[:, :1]
    inputs = (value, locations, weights)
    assert sorting.LENGTH < 75 / 2
    found = everything(case, inputs, grad_output)
    assert_same(found, expected(case, inputs, grad_output), 1e-13)


@pytest.mark.parametrize("location", [-0.5, 0.0, 0.5, 1.5, 2.0, 2.5, -1.0, 3.0, -7.0, 1e30])
def test_points_in_the_margin_and_outside(in_order, location):
    case = Case(
        shapes=[(3, 3)], num_queries=5, num_heads=1, batch_size=1, num_points=1, head_dim=2,
        coordinates="pixel", dtype=torch.float64,
    )  # fmt: skip
    (value, locations, weights), grad_output = draw(case)
    for axis in (0, 1):
        moved = locations.clone()
        moved[..., axis] = location
        found = everything(case, (value, moved, weights), grad_output)
        assert_same(found, expected(case, (value, moved, weights), grad_output), 1e-13)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch_size=5, num_queries=3, dtype=torch.float64),
        FusedCase(
            batch_size=5, queries_per_map=[2, 0, 9, 1, 4], references="levels", dtype=torch.float64
        ),
    ],
    ids=["batch", "ragged"],
)
@pytest.mark.parametrize("most", [1, 60_000, 100_000])
def test_maps_in_groups(in_order, case, most, monkeypatch):
    monkeypatch.setattr(backward, "MOST_WORKSPACE", most)
    inputs, grad_output = draw(case)
    with deterministic():
        found = everything(case, inputs, grad_output)
    (plan,) = backward._remembered.values()
    groups = [group.maps for group in plan.groups]
    assert 1 < len(groups) <= 5
    assert [maps.start for maps in groups[1:]] == [maps.stop for maps in groups[:-1]]
    assert_same(found, expected(case, inputs, grad_output), 1e-13)


def test_rows_wider_than_a_program_takes(in_order, monkeypatch):
    monkeypatch.setattr(sorting, "MOST_CHANNELS", 4)
    case = Case(head_dim=11, num_queries=9, num_heads=2, dtype=torch.float64)
    inputs, grad_output = draw(case)
    found = everything(case, inputs, grad_output)
    assert_same(found, expected(case, inputs, grad_output), 1e-13)


def test_a_map_that_nobody_looks_at_gets_zeros(in_order):
    case = Case(spread=40.0, num_queries=3, num_points=1)
    (value, locations, weights), grad_output = draw(case)
    locations += 3
    found = everything(case, (value, locations, weights), grad_output)
    assert (found[1] == 0).all()


def planned(samples, cells):
    """The plan for a call with such numbers of points and cells, without tensors."""
    case = Case(shapes=[(cells - 1,)], num_heads=1, num_points=1, batch_size=1)
    value = torch.empty(1, cells - 1, 1, 8, device="meta")
    locations = torch.empty(1, samples, 1, 1, 1, device="meta")
    call = case.understood(value, locations, locations[..., 0])
    wanted = backward.Wanted(True, False, True, True)
    grad_output = torch.empty(1, samples, 8, device="meta")
    return backward.gradient_plan(call, wanted, grad_output)


def test_many_points_of_few_cells_are_summed_in_order_without_being_asked(monkeypatch):
    many, of_a_cell = (tuning._table()[name] for name in ("many_samples", "many_samples_of_a_cell"))
    few_cells = many // of_a_cell
    assert planned(many, few_cells).in_order is not None
    assert planned(many - 1, few_cells).in_order is None
    assert planned(many, few_cells + 1).in_order is None
    # Where that takes too much memory, only if it is asked for.
    monkeypatch.setattr(backward, "MOST_WORKSPACE", 2**20)
    assert planned(many, few_cells).in_order is None
    with deterministic():
        assert planned(many, few_cells).in_order is not None


def test_the_workspace_is_what_it_is_said_to_be(in_order, monkeypatch):
    allocated = []
    new_empty = torch.Tensor.new_empty

    def counted(self, *arguments, **options):
        found = new_empty(self, *arguments, **options)
        allocated.append(found.nbytes)
        return found

    case = Case(shapes=[(9, 9)], num_queries=80, num_heads=1, batch_size=1, num_points=2)
    inputs, grad_output = draw(case)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", counted)
        output = everything(case, inputs, grad_output)[0]
    said = sorting.workspace(160, 100, 4, 8, 2, 4)
    # Keys, records and sums; what torch's sort and search give back is said, not counted here.
    torchs_own = 160 * (4 + 8) + 100 * 24 + (160 // sorting.LENGTH + 100) * 16
    assert said == sum(allocated) - output.nbytes + torchs_own
