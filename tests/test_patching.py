"""`patch`: what it takes for the operator, what it leaves alone, and back again."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import saccade
from saccade.integrations.operators import make_replacement
from saccade.integrations.patching import PatchReport

SHAPES = [(8, 12), (4, 6)]


def sampled(value, shapes, locations, weights, *, align_corners=False, factor=1.0):
    """The operator by grid_sample, in words of this file: value [B, S, M, D]."""
    batch, _, heads, width = value.shape
    found, first = [], 0
    for index, (rows, columns) in enumerate(shapes):
        rows, columns = int(rows), int(columns)
        level = value[:, first : first + rows * columns].permute(0, 2, 3, 1)
        grid = 2 * locations[:, :, :, index].transpose(1, 2).flatten(0, 1) - 1
        found.append(
            nn.functional.grid_sample(
                level.reshape(batch * heads, width, rows, columns),
                grid,
                align_corners=align_corners,
            )
        )
        first += rows * columns
    looks = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None] * factor
    output = (torch.cat(found, dim=-1) * looks).sum(-1)
    return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def core(value, spatial_shapes, sampling_locations, attention_weights):
    return sampled(value, spatial_shapes, sampling_locations, attention_weights)


def core_with_levels(value, value_spatial_shapes, sampling_locations, attention_weights):
    joined = torch.cat(value, dim=-1).permute(0, 3, 1, 2)
    return sampled(joined, value_spatial_shapes, sampling_locations, attention_weights)


def core_with_channels(value, value_spatial_shapes, sampling_locations, attention_weights):
    rows = value.permute(0, 3, 1, 2)
    return sampled(rows, value_spatial_shapes, sampling_locations, attention_weights)


def core_with_corners(value, spatial_shapes, sampling_locations, attention_weights):
    return sampled(value, spatial_shapes, sampling_locations, attention_weights, align_corners=True)


def core_with_temperature(
    value, spatial_shapes, sampling_locations, attention_weights, temperature=2.0
):
    return sampled(value, spatial_shapes, sampling_locations, attention_weights, factor=temperature)


class Core(torch.autograd.Function):
    """As the forks have it; without their extension there is nothing that it could call."""

    @staticmethod
    def forward(
        ctx,
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        raise RuntimeError("Not implemented on the CPU")


def decorated(function):
    @functools.wraps(function)
    def wrapper(*positional, **named):
        return function(*positional, **named)

    return wrapper


class Attention(nn.Module):
    """An attention module as the packages write it; `look` is what differs from one to the other."""

    def __init__(self):
        super().__init__()
        self.value_proj = nn.Linear(16, 16)
        self.locations = nn.Parameter(torch.rand(2, 5, 2, 2, 3, 2))
        self.weights = nn.Parameter(torch.rand(2, 5, 2, 2, 3))

    def rows(self, value):
        return self.value_proj(value).unflatten(-1, (2, 8))


class UsesFunction(Attention):
    def forward(self, value):
        return core(self.rows(value), SHAPES, self.locations, self.weights)


class UsesDecorated(Attention):
    @decorated
    @decorated
    def forward(self, value):
        return core(self.rows(value), SHAPES, self.locations, attention_weights=self.weights)


class UsesLevels(Attention):
    def forward(self, value):
        levels = self.rows(value).permute(0, 2, 3, 1).split([96, 24], dim=-1)
        return core_with_levels(levels, SHAPES, self.locations, self.weights)


class UsesChannels(Attention):
    def forward(self, value):
        channels = self.rows(value).permute(0, 2, 3, 1).contiguous()
        return core_with_channels(channels, SHAPES, self.locations, self.weights.flatten(3))


class KeepsPartial(Attention):
    def __init__(self):
        super().__init__()
        self.look = functools.partial(core, attention_weights=self.weights)

    def forward(self, value):
        return self.look(self.rows(value), SHAPES, self.locations)


class UsesEither(Attention):
    """The autograd function on a GPU, the other one elsewhere."""

    def forward(self, value):
        rows = self.rows(value)
        if not value.is_cuda and value.dtype == torch.float32:
            return core(rows, SHAPES, self.locations, self.weights)
        shapes = torch.tensor(SHAPES)
        starts = torch.tensor([0, 96])
        return Core.apply(rows, shapes, starts, self.locations, self.weights, 64)


class UsesCorners(Attention):
    def forward(self, value):
        return core_with_corners(self.rows(value), SHAPES, self.locations, self.weights)


class UsesTemperature(Attention):
    def forward(self, value):
        return core_with_temperature(self.rows(value), SHAPES, self.locations, self.weights)


KNOWN = [
    UsesFunction,
    UsesDecorated,
    UsesLevels,
    UsesChannels,
    KeepsPartial,
    UsesEither,
]


@pytest.fixture
def calls(monkeypatch):
    return counted_calls(monkeypatch)


def counted_calls(monkeypatch):
    """The calls of the operator that replacements make."""
    from saccade.integrations import operators

    found = []

    def counting(*given, **options):
        found.append(given)
        return saccade.deformable_attention(*given, **options)

    monkeypatch.setattr(operators, "deformable_attention", counting)
    return found


def output_and_gradients(model, value):
    model.zero_grad()
    output = model(value)
    output.square().sum().backward()
    return [output.detach()] + [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(found, expected):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KNOWN)
def test_every_way_to_carry_the_operator(kind, calls):
    torch.manual_seed(0)
    model, other, value = nn.Sequential(kind()), kind(), torch.randn(2, 120, 16)
    before = [dict(vars(module)) for module in model.modules()]
    expected = output_and_gradients(model, value)
    report = saccade.patch(model)
    assert report == PatchReport(["0"], {})
    assert saccade.patch(model) == report
    calls.clear()
    assert_same(output_and_gradients(model, value), expected)
    assert len(calls) == 1
    other(value)
    assert len(calls) == 1
    assert_same(output_and_gradients(copy.deepcopy(model), value), expected)
    assert len(calls) == 2
    assert saccade.unpatch(model) == report
    after = [dict(vars(module)) for module in model.modules()]
    assert [set(found) for found in after] == [set(found) for found in before]
    for found, wanted in zip(after, before, strict=True):
        assert all(found[name] is wanted[name] for name in wanted)
    model(value)
    assert len(calls) == 2
    assert saccade.unpatch(model) == PatchReport([], {"0": "it was not patched"})


def test_an_autograd_function_is_replaced_by_its_arguments_alone(calls):
    model, value = UsesEither().double(), torch.randn(2, 120, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Not implemented on the CPU"):
        model(value)
    expected = core(model.rows(value), SHAPES, model.locations, model.weights)
    saccade.patch(model)
    calls.clear()
    torch.testing.assert_close(model(value), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (UsesCorners, "core_with_corners: on a trial it gives other numbers than saccade"),
        (
            UsesTemperature,
            r"core_with_temperature: it takes \(value, .*, temperature\), which is not",
        ),
    ],
)
def test_what_only_looks_like_the_operator_is_left_alone_and_named(kind, reason):
    model = nn.Sequential(UsesFunction(), kind())
    value = torch.randn(2, 120, 16)
    expected = model[1](value)
    report = saccade.patch(model)
    assert report.replaced == ["0"]
    assert torch.equal(model[1](value), expected)
    with pytest.raises(
        ValueError, match=f"target: expected .* got {kind.__name__} with : {reason}"
    ):
        saccade.patch(kind())
    assert f"left: 1: {report.left['1']}" in str(report)


def test_a_forward_that_something_else_has_replaced_is_left_alone():
    model = UsesFunction()
    model.forward = functools.partial(UsesFunction.forward, model)  # as hooks of accelerate do
    with pytest.raises(ValueError, match="something else has replaced it before"):
        saccade.patch(model)


def test_wrong_arguments_of_a_replacement():
    replacement = make_replacement(core)
    with pytest.raises(TypeError, match=r"core: expected the arguments \(value, spatial_shapes"):
        replacement(1, 2, 3, 4, 5)
    with pytest.raises(TypeError, match="0 by position and .'values'. by name"):
        replacement(values=1)


def test_a_pickled_model_comes_back_unpatched():
    model = nn.ModuleList([UsesFunction(), KeepsPartial(), UsesDecorated()])
    value = torch.randn(2, 120, 16)
    saccade.patch(model)
    expected = [module(value) for module in model]
    loaded = pickle.loads(pickle.dumps(model))
    assert_same([module(value) for module in loaded], expected)
    assert saccade.patch(loaded).replaced == ["0", "1", "2"]
    assert_same([module(value) for module in loaded], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UsesFunction, UsesDecorated, UsesLevels, KeepsPartial])
def test_a_patched_model_is_one_graph(kind):
    model, value = kind(), torch.randn(2, 120, 16)
    saccade.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same([compiled(value)], [model(value)])


@pytest.mark.slow
def test_targets_that_cannot_be_patched():
    with pytest.raises(
        TypeError, match="target: expected a torch.nn.Module, a package or the name"
    ):
        saccade.patch(1)
    with pytest.raises(ModuleNotFoundError):
        saccade.patch("a_package_that_nobody_wrote")
    with pytest.raises(ValueError, match="got package json with none"):
        saccade.patch("json")
    with pytest.raises(ValueError, match="got Linear with none"):
        saccade.patch(nn.Linear(1, 1))
