"""Maps with different numbers of queries: the operator, the modules, the errors."""

from __future__ import annotations

import pytest
import torch
from helpers import ALL, Case, assert_same, calls_on_native_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saccade
from saccade.nn import MultiScaleDeformableAttention, MultiViewDeformableAttention

COUNTS = [5, 0, 300, 1]
CASES = {
    "images": Case(batch_size=4),
    "heads-together": Case(batch_size=4, shapes=[(6, 7)], num_points=4, num_heads=8, head_dim=16),
    "shared-head": Case(batch_size=4, shared_head=True, num_points=[1, 2], padding="border"),
    "lines": Case(batch_size=4, shapes=[(13,), (4,)], head_dim=32),
    "volumes": Case(batch_size=4, shapes=[(2, 3, 4)], num_points=7, interpolation="nearest"),
    "bfloat16": Case(batch_size=4, dtype=torch.bfloat16, head_dim=20),
    "float64": Case(batch_size=4, dtype=torch.float64, coordinates="pixel"),
}


def draw(case, counts):
    value, locations, weights = case.with_(num_queries=max(1, sum(counts))).draw()
    return value, locations[0, : sum(counts)], weights[0, : sum(counts)]


def attend(case, counts, value, locations, weights):
    return saccade.deformable_attention(
        value, case.shapes, locations, weights, queries_per_map=counts, **case.options
    )


def map_by_map(case, counts, value, locations, weights):
    """Each map with its queries in a call of its own."""
    parts = zip(value.split(1), locations.split(counts), weights.split(counts), strict=True)
    return torch.cat([case.call(part[0], part[1][None], part[2][None])[0] for part in parts])


def run(function, case, counts, inputs, grad_output):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(case, counts, *leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def check_map_by_map(case, counts, inputs, results, grad_output):
    expected = run(map_by_map, case, counts, inputs, grad_output)
    # A query gives the same whatever stands beside it; how a cell's sum is split depends on the queries.
    for index in (0, 2, 3):
        assert torch.equal(results[index], expected[index])
    tolerance = 8e-3 if case.dtype == torch.bfloat16 else None
    assert_same(results[1:2], expected[1:2], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_every_map_has_its_queries(cpu_backend, name):
    case = CASES[name]
    inputs = draw(case, COUNTS)
    grad_output = torch.randn(sum(COUNTS), case.num_heads * case.head_dim).to(case.dtype)
    results = run(attend, case, COUNTS, inputs, grad_output)
    check_map_by_map(case, COUNTS, inputs, results, grad_output)


@pytest.mark.slow
def test_every_map_has_its_few_queries(backend):
    case, counts = Case(batch_size=4, num_points=1, num_heads=2), [2, 0, 7, 1]
    inputs = draw(case, counts)
    grad_output = torch.randn(sum(counts), case.num_heads * case.head_dim)
    results = run(attend, case, counts, inputs, grad_output)
    check_map_by_map(case, counts, inputs, results, grad_output)


def test_counts_of_every_kind_agree():
    case = CASES["images"]
    inputs = draw(case, COUNTS)
    expected = attend(case, COUNTS, *inputs)
    for counts in (tuple(COUNTS), torch.tensor(COUNTS), torch.tensor(COUNTS).int()):
        assert torch.equal(attend(case, counts, *inputs), expected)
    by_level = [tensor.unflatten(2, (2, 3)) for tensor in inputs[1:]]
    output = saccade.deformable_attention(inputs[0], case.shapes, *by_level, queries_per_map=COUNTS)
    assert torch.equal(output, expected)


def test_the_reference_itself_gives_the_shape_of_the_public_function():
    case = CASES["images"]
    inputs = draw(case, COUNTS)
    options = {**case.options, "queries_per_map": COUNTS}
    for module in (saccade, saccade.reference):
        output = module.deformable_attention(inputs[0], case.shapes, *inputs[1:], **options)
        assert output.shape == (sum(COUNTS), case.num_heads * case.head_dim)
    value, locations, weights = inputs
    references = torch.rand(sum(COUNTS), 1, case.spatial_dims)
    for module in (saccade, saccade.reference):
        output = module.fused_deformable_attention(
            value, case.shapes, references, locations, weights, **options
        )
        assert output.shape == (sum(COUNTS), case.num_heads * case.head_dim)


@pytest.mark.parametrize(("maps", "counts"), [(0, []), (3, [0, 0, 0]), (1, [0])])
def test_without_queries_or_maps(backend, maps, counts):
    case = Case(batch_size=maps)
    leaves = (
        [tensor.requires_grad_() for tensor in draw(case, counts)]
        if maps
        else [
            torch.zeros(0, 54, 3, 8, requires_grad=True),
            torch.zeros(0, 3, 6, 2, requires_grad=True),
            torch.zeros(0, 3, 6, requires_grad=True),
        ]
    )
    output = attend(case, counts, *leaves)
    assert output.shape == (0, 24)
    output.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.slow
def test_compile_with_a_changing_number_of_queries():
    torch.compiler.reset()
    case = CASES["images"]
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for counts in ([3, 4, 5, 6], [7, 0, 1, 2], [1, 20, 3, 4]):
        leaves = [tensor.requires_grad_() for tensor in draw(case, counts)]
        output, expected = compiled(case, counts, *leaves), attend(case, counts, *leaves)
        assert torch.equal(output, expected)
        gradients = (torch.autograd.grad(each.sum(), leaves) for each in (output, expected))
        assert all(map(torch.equal, *gradients))


@pytest.mark.slow
@settings(
    max_examples=300 if ALL else 40,
    deadline=None,
    derandomize=not ALL,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    counts=st.lists(st.integers(0, 280), max_size=6),
    spatial_dims=st.integers(1, 3),
    num_points=st.integers(1, 6),
    head_dim=st.sampled_from([1, 16, 33]),
    seed=st.integers(0, 2**16),
)
def test_any_counts(counts, spatial_dims, num_points, head_dim, seed):
    torch.manual_seed(seed)
    case = Case(
        shapes=[(3,) * spatial_dims, (4,) * spatial_dims], num_points=num_points, num_heads=2,
        batch_size=len(counts), head_dim=head_dim, dtype=torch.float64,
    )  # fmt: skip
    value = torch.randn(len(counts), sum(s**spatial_dims for s in (3, 4)), 2, head_dim).double()
    points = (sum(counts), 2, 2 * num_points)
    inputs = (value, torch.rand(*points, spatial_dims).double(), torch.rand(points).double())
    grad_output = torch.randn(sum(counts), 2 * head_dim).double()
    with saccade.use_backend("reference"):
        expected = run(attend, case, counts, inputs, grad_output)
    for backend, results in calls_on_native_backends(
        lambda: run(attend, case, counts, inputs, grad_output)
    ):
        assert_same(results, expected, backend=backend)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([5, 0, 300], ValueError, "queries_per_map: expected 4 numbers, one for each map"),
        ([5, 0, 300, 2], ValueError, "queries_per_map: expected .* that sum to 306"),
        ([-1, 6, 300, 1], ValueError, "queries_per_map: expected numbers of at least 0"),
        ([5.0, 0, 300, 1], TypeError, "queries_per_map: expected a sequence of int"),
        (306, TypeError, "queries_per_map: expected a sequence of int, got 306"),
        (torch.tensor(COUNTS).double(), TypeError, "queries_per_map: expected a sequence of int"),
        (torch.tensor([COUNTS]), TypeError, "queries_per_map: .* with one axis"),
    ],
)
def test_counts_that_do_not_fit(counts, error, message):
    case = CASES["images"]
    with pytest.raises(error, match=message):
        attend(case, counts, *draw(case, COUNTS))


def test_locations_with_a_batch_are_refused():
    case = CASES["images"]
    value, locations, weights = draw(case, COUNTS)
    with pytest.raises(ValueError, match=r"sampling_locations: expected 5 axes \[queries, heads"):
        attend(case, COUNTS, value, locations[None, None], weights[None, None])


def test_the_module_on_maps_with_their_own_queries():
    module = MultiScaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=[2, 3])
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    shapes, counts = [(6, 7), (3, 4)], [4, 0, 9]
    query, value = torch.randn(13, 32), torch.randn(3, 54, 32)
    reference = torch.rand(13, 2, 4)
    output, sampling = module(
        query, reference, value, shapes, queries_per_map=counts, return_sampling=True
    )
    for number, queries in ((0, slice(0, 4)), (2, slice(4, 13))):
        expected, seen = module(
            query[None, queries], reference[None, queries], value[number : number + 1], shapes,
            return_sampling=True,
        )  # fmt: skip
        torch.testing.assert_close(output[None, queries], expected)
        for got, want in zip(sampling, seen, strict=True):
            torch.testing.assert_close(got[None, queries], want)


def attend_view_by_view(module, query, reference, visible, value, shapes):
    """BEVFormer's computation: each view attends with the queries that it sees, view by view."""
    batch_size, num_views, _ = visible.shape
    heads, points = module.num_heads, sum(module.num_points)
    output = torch.zeros_like(query)
    for batch in range(batch_size):
        for view in range(num_views):
            seen = visible[batch, view].nonzero().flatten()
            queries = query[None, batch, seen]
            offsets = module.sampling_offsets(queries).view(1, -1, heads, points, 2)
            logits = module.attention_weights(queries).view(1, -1, heads, points)
            anchors = reference[batch, view, seen]
            index = [k % anchors.shape[1] for count in module.num_points for k in range(count)]
            sizes = [
                shape[::-1]
                for shape, n in zip(shapes, module.num_points, strict=True)
                for _ in range(n)
            ]
            locations = anchors[None, :, None, index] + offsets / torch.tensor(sizes)
            projected = module.value_proj(value[batch, view]).unflatten(-1, (heads, -1))
            attended = saccade.deformable_attention(
                projected[None], shapes, locations, logits.softmax(-1), num_points=module.num_points
            )
            output[batch, seen] += attended[0]
    if module.reduction == "mean":
        output = output / visible.sum(1).clamp(min=1)[..., None]
    return module.output_proj(output)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("anchors", [1, 4])
def test_views_are_added_where_they_see_a_query(reduction, anchors):
    shapes = [(6, 7), (3, 4)]
    module = MultiViewDeformableAttention(
        32, num_heads=4, num_levels=2, num_points=[4, 8], reduction=reduction
    )
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.3)
    query, value = torch.randn(2, 50, 32), torch.randn(2, 3, 54, 32)
    reference = torch.rand(2, 3, 50, anchors, 2)
    visible = torch.rand(2, 3, 50) < 0.4
    visible[:, :, 7] = False  # a query that no view sees
    visible[0, 1] = False  # a view that sees none
    reference[~visible] = torch.nan
    inputs = (query, reference, visible, value, shapes)
    output = module(*inputs)
    torch.testing.assert_close(output, attend_view_by_view(module, *inputs))
    assert torch.equal(output[0, 7], module.output_proj.bias)
    module.zero_grad()
    output.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    attend_view_by_view(module, *inputs).square().sum().backward()
    for got, parameter in zip(gradients, module.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-4)


def test_what_no_view_sees():
    module = MultiViewDeformableAttention(32, num_heads=4, num_levels=1, num_points=2)
    nothing = module(
        torch.randn(1, 5, 32), torch.rand(1, 2, 5, 1, 2), torch.zeros(1, 2, 5, dtype=torch.bool),
        torch.randn(1, 2, 42, 32), [(6, 7)],
    )  # fmt: skip
    assert torch.equal(nothing, module.output_proj.bias.expand(1, 5, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visible": torch.ones(1, 2, 5)}, "visible: expected torch.bool"),
        ({"visible": torch.ones(1, 3, 5, dtype=torch.bool)}, r"visible: expected \[1, 2, 5\]"),
        (
            {"reference_points": torch.rand(1, 2, 5, 2)},
            r"reference_points: expected \[1, 2, 5, 1, 2",
        ),
        ({"reference_points": torch.rand(1, 2, 5, 4, 4)}, "reference_points: expected"),
        ({"value": torch.randn(1, 42, 32)}, r"value: expected \[batch, views, positions, 32\]"),
        ({"value": torch.randn(2, 2, 42, 32)}, r"value: expected \[1, 2, 42, 32\]"),
        ({"spatial_shapes": [(42,)]}, "spatial_shapes: expected 1 levels"),
        (
            {"reference_points": torch.rand(1, 2, 5, 4, 2)},
            r"reference_points: expected a number of points that divides .* \[2\], got 4",
        ),
    ],
)
def test_errors_of_the_module_of_views_name_the_argument(change, message):
    module = MultiViewDeformableAttention(32, num_heads=4, num_levels=1, num_points=2)
    good = {
        "query": torch.randn(1, 5, 32),
        "reference_points": torch.rand(1, 2, 5, 1, 2),
        "visible": torch.ones(1, 2, 5, dtype=torch.bool),
        "value": torch.randn(1, 2, 42, 32),
        "spatial_shapes": [(6, 7)],
    }
    assert module(**good).shape == (1, 5, 32)
    with pytest.raises(ValueError, match=message):
        module(**{**good, **change})
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', got 'max'"):
        MultiViewDeformableAttention(32, reduction="max")


def test_views_are_added_in_the_dtype_of_the_queries():
    module = MultiViewDeformableAttention(32, num_heads=4, num_levels=1, num_points=2)
    torch.nn.init.ones_(module.value_proj.bias)
    torch.nn.init.zeros_(module.sampling_offsets.bias)
    module.output_proj = torch.nn.Identity()
    # The sum of 300 ones: in bfloat16 it would stop at 256.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(
            torch.zeros(1, 1, 32), torch.full((1, 300, 1, 1, 2), 0.5),
            torch.ones(1, 300, 1, dtype=torch.bool), torch.zeros(1, 300, 16, 32), [(4, 4)],
        )  # fmt: skip
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.ones(1, 1, 32))
