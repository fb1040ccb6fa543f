"""`patch` where it could go wrong in silence: what nearly is the operator, copies, hooks, compilation."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from test_patching import SHAPES, Attention, UsesFunction, core, counted_calls, sampled
from torch import nn

import saccade
from saccade.integrations.operators import make_replacement

COUNT = 0


def by_default(value, spatial_shapes, sampling_locations, attention_weights, method="cubic"):
    return sampled(value, spatial_shapes, sampling_locations, attention_weights)


def by_discrete_default(
    value, spatial_shapes, sampling_locations, attention_weights, num_points_list, method="discrete"
):
    options = {"discrete": {"interpolation": "discrete", "padding": "border"}}.get(method, {})
    return saccade.reference.deformable_attention(
        value,
        spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points=num_points_list,
        **options,
    )


def by_starts(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    levels = [
        value[:, start : start + height * width]
        for start, (height, width) in zip(
            level_start_index.tolist(), spatial_shapes.tolist(), strict=True
        )
    ]
    return sampled(torch.cat(levels, 1), spatial_shapes, sampling_locations, attention_weights)


class InPython(torch.autograd.Function):
    """It runs on the CPU, so that its numbers can be seen to be others."""

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
        return 2 * core(value, value_spatial_shapes, sampling_locations, attention_weights)


class OtherOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, spatial_shapes, sampling_locations, attention_weights):
        raise RuntimeError("Not implemented on the CPU")


class ReadsItsModule(nn.Module):
    def forward(self, value, spatial_shapes, sampling_locations, attention_weights):
        corners = getattr(self, "align_corners", False)
        return sampled(
            value, spatial_shapes, sampling_locations, attention_weights, align_corners=corners
        )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_default, "its method is 'cubic' by default, expected default"),
        (by_starts, "it reads where the levels start"),
        (InPython, "on a trial it gives other numbers"),
        (OtherOrder, r"it takes \(value, spatial_shapes, sampling_locations, attention_weights\)"),
        (ReadsItsModule.forward, "it reads 'align_corners' of its module"),
    ],
)
def test_nearly_the_operator(function, reason):
    assert isinstance(make_replacement(function), str)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(make_replacement(function))


def test_the_default_of_a_method_is_the_functions_own():
    replacement = make_replacement(by_discrete_default)
    assert replacement.methods.keys() == {"default", "discrete"}
    given = [torch.randn(1, 120, 2, 8), SHAPES, torch.rand(1, 5, 2, 6, 2), torch.rand(1, 5, 2, 6)]
    expected = by_discrete_default(*given, [3, 3])
    torch.testing.assert_close(replacement(*given, [3, 3]), expected)
    assert not replacement(*given, [3, 3], "default").allclose(expected)


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match="core: expected the argument sampling_locations, got none"):
        make_replacement(core)(torch.randn(1, 120, 2, 8), SHAPES, attention_weights=torch.ones(1))


class KeepsOtherMethod(Attention):
    def __init__(self):
        super().__init__()
        self.look = functools.partial(by_discrete_default, method="cubic")


class SetsGlobals(Attention):
    def forward(self, value):
        global COUNT
        COUNT += 1
        return core(self.rows(value), SHAPES, self.locations, self.weights)


class CallsParent(UsesFunction):
    def forward(self, value):
        return super().forward(value)


class InStaticMethod(Attention):
    @staticmethod
    def look(*given):
        return core(*given)

    def forward(self, value):
        return self.look(self.rows(value), SHAPES, self.locations, self.weights)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (KeepsOtherMethod, "its method is 'cubic', expected one of default, discrete"),
        (SetsGlobals, "its forward changes names of its file"),
        (CallsParent, "it is in UsesFunction.forward, which may be called past the module"),
        (InStaticMethod, "it is in InStaticMethod.look"),
    ],
)
def test_modules_that_are_left_alone_and_named(kind, reason):
    with pytest.raises(ValueError, match=reason):
        saccade.patch(kind())


class InLambda(Attention):
    def forward(self, value):
        return (lambda rows: core(rows, SHAPES, self.locations, self.weights))(self.rows(value))


class InMethod(Attention):
    def look(self, rows):
        return core(rows, SHAPES, self.locations, self.weights)

    def forward(self, value):
        return self.look(self.rows(value))


def helper(*given):
    return core(*given)


class InHelper(Attention):
    def forward(self, value):
        return helper(self.rows(value), SHAPES, self.locations, self.weights)


class OverridesParent(UsesFunction):
    """What its parent would have done does not matter."""

    def forward(self, value):
        return core(self.rows(value), SHAPES, self.locations, 2 * self.weights)


@pytest.mark.parametrize("kind", [InLambda, InMethod, InHelper, OverridesParent])
def test_places_around_the_forward(kind, monkeypatch):
    calls = counted_calls(monkeypatch)
    model, value = kind(), torch.randn(2, 120, 16)
    before, expected = dict(vars(model)), model(value)
    saccade.patch(model)
    calls.clear()
    torch.testing.assert_close(model(value), expected)
    assert len(calls) == 1
    helper(model.rows(value), SHAPES, model.locations, model.weights)
    assert len(calls) == 1
    saccade.unpatch(model)
    assert vars(model).keys() == before.keys()
    model(value)
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("order", ["patched first", "patched last", "patched when compiled"])
def test_compiled_models_do_not_share_what_was_compiled(order, monkeypatch):
    calls, value = counted_calls(monkeypatch), torch.randn(2, 120, 16)
    patched, other = UsesFunction(), UsesFunction()
    torch._dynamo.reset()
    # Traced by its first call, the operator is not counted by others.
    monkeypatch.setattr(
        "saccade.integrations.operators.deformable_attention",
        torch.compiler.disable(lambda *given, **options: calls.append(1) or core(*given)),
    )
    if order != "patched when compiled":
        saccade.patch(patched)
    compiled = {model: torch.compile(model, backend="eager") for model in (patched, other)}
    if order == "patched when compiled":
        compiled[patched](value)
        saccade.patch(patched)
    models = [other, patched] if order == "patched last" else [patched, other]
    calls.clear()
    for model in models:
        torch.testing.assert_close(compiled[model](value), model(value))
    assert len(calls) == 2  # the patched one, compiled and not
    saccade.unpatch(patched)
    compiled[patched](value)
    assert len(calls) == 2


def test_replicas_of_data_parallel_and_shallow_copies_have_their_own_parameters():
    model, value = UsesFunction(), torch.randn(2, 120, 16)
    before = dict(vars(model))
    saccade.patch(model)
    replica = model._replicate_for_data_parallel()
    for module in (replica, copy.deepcopy(model)):
        assert module.forward.__self__ is module
    # What torch.nn.parallel.replicate does next.
    replica.locations, replica.weights = model.locations.detach(), torch.zeros(2, 5, 2, 2, 3)
    assert not replica(value).any()
    assert model(value).any()
    saccade.unpatch(model)
    assert vars(model).keys() == before.keys()


def test_a_hook_that_came_after_patch_is_not_taken_away():
    model, value = UsesFunction(), torch.randn(2, 120, 16)
    saccade.patch(model)
    kept = model.forward
    model._old_forward = kept
    hooked = functools.partial(lambda module, *given: module._old_forward(*given), model)
    model.forward = functools.update_wrapper(hooked, kept)  # as accelerate does
    expected = model(value)
    assert "something else has taken the place of its forward" in saccade.unpatch(model).left[""]
    assert model.forward is hooked
    assert model._old_forward is kept
    assert torch.equal(model(value), expected)


def test_a_pickled_copy_keeps_nothing():
    model = UsesFunction()
    saccade.patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert saccade.unpatch(loaded).left == {"": "it was not patched"}
    assert vars(loaded).keys() == vars(UsesFunction()).keys()
