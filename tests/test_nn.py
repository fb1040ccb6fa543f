"""The modules: shapes, keys, initialisation, masks, autocast, gradients, reconstruction."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from conftest import TRITON, WITH_TRITON, use

import saccade
from saccade.nn import DeformableAttention, MultiScaleDeformableAttention
from saccade.sampling import directions

SHAPES = [(6, 7), (3, 4)]


def multi_scale(**options):
    return MultiScaleDeformableAttention(
        **{"embed_dim": 32, "num_heads": 4, "num_levels": 2, "num_points": 3, **options}
    )


def multi_scale_inputs(coordinates=2, levels=1, dtype=torch.float32):
    return {
        "query": torch.randn(2, 11, 32, dtype=dtype),
        "reference_points": torch.rand(2, 11, levels, coordinates, dtype=dtype),
        "value": torch.randn(2, 54, 32, dtype=dtype),
        "spatial_shapes": SHAPES,
    }


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_state_dict_has_the_keys_of_the_family():
    expected = {
        f"{layer}.{kind}"
        for layer in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        for kind in ("weight", "bias")
    }
    assert set(multi_scale().state_dict()) == expected
    assert set(DeformableAttention(32).state_dict()) == expected | {
        "reference_points.weight",
        "reference_points.bias",
    }


@pytest.mark.slow
def test_transformers_layer_and_module_exchange_weights_and_agree():
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrMultiscaleDeformableAttention as TransformersLayer,
    )

    config = DeformableDetrConfig(d_model=32, num_feature_levels=2)
    layer = randomize(TransformersLayer(config, num_heads=4, n_points=3))
    module = multi_scale()
    module.load_state_dict(layer.state_dict())
    mask = torch.rand(2, 54) < 0.3
    for coordinates in (2, 4):
        inputs = multi_scale_inputs(coordinates, levels=2)
        expected, _ = layer(
            inputs["query"],
            attention_mask=~mask,
            encoder_hidden_states=inputs["value"],
            reference_points=inputs["reference_points"],
            spatial_shapes=torch.tensor(SHAPES),
            spatial_shapes_list=SHAPES,
        )
        output = module(**inputs, value_padding_mask=mask)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_initialisation_looks_in_the_directions_of_the_paper():
    module = multi_scale(num_heads=8, num_points=[2, 3])
    offsets = module.sampling_offsets.bias.view(8, 5, 2)
    assert (module.sampling_offsets.weight == 0).all()
    assert (module.attention_weights.weight == 0).all()
    assert (module.attention_weights.bias == 0).all()
    torch.testing.assert_close(
        offsets[0, :, 0], torch.tensor([1.0, 2, 1, 2, 3])
    )  # points of head 0
    torch.testing.assert_close(
        offsets[2, :, 1], torch.tensor([1.0, 2, 1, 2, 3])
    )  # head 2 looks down
    torch.testing.assert_close(
        offsets[1, 0], torch.tensor([1.0, 1.0])
    )  # diagonals reach the square
    assert offsets[:, 0].abs().amax(-1).allclose(torch.ones(8))
    bound = math.sqrt(6 / 64)
    assert module.value_proj.weight.abs().max() <= bound
    assert module.output_proj.bias.abs().max() == 0


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("levels", [1, 2])
def test_sampling_reconstructs_the_output(cpu_backend, coordinates, levels):
    module = randomize(multi_scale(num_points=[2, 3]))
    inputs = multi_scale_inputs(coordinates, levels)
    output, sampling = module(**inputs, return_sampling=True)
    value = module.value_proj(inputs["value"]).view(2, 54, 4, 8)
    attended = saccade.deformable_attention(
        value,
        SHAPES,
        sampling.sampling_locations,
        sampling.attention_weights,
        num_points=[2, 3],
    )
    torch.testing.assert_close(module.output_proj(attended), output)
    torch.testing.assert_close(sampling.attention_weights.sum(-1), torch.ones(2, 11, 4))
    assert torch.equal(module(**inputs), output)


@pytest.mark.parametrize("value_projection", [True, False])
def test_single_map_module_by_the_equation(cpu_backend, value_projection):
    module = randomize(
        DeformableAttention(12, num_heads=3, num_points=2, value_projection=value_projection)
    )
    query, feature_map = torch.randn(2, 5, 12), torch.randn(2, 4, 6, 12)
    output, sampling = module(query, feature_map, return_sampling=True)
    assert sampling.reference_points.shape == (2, 5, 1, 2)
    torch.testing.assert_close(
        sampling.sampling_locations,
        sampling.reference_points[:, :, None]
        + sampling.sampling_offsets / torch.tensor([6.0, 4.0]),
    )
    # Equation 2: sum over heads of W_m [sum over points of A * W'_m x(p)].
    maps = feature_map if module.value_proj is None else module.value_proj(feature_map)
    grid = 2 * sampling.sampling_locations.flatten(2, 3) - 1
    read = torch.nn.functional.grid_sample(maps.permute(0, 3, 1, 2), grid, align_corners=False)
    read = read.permute(0, 2, 3, 1).unflatten(2, (3, 2))  # [B, Q, M, K, C]
    heads = (sampling.attention_weights[..., None] * read).sum(3)
    if value_projection:
        heads = torch.stack([heads[:, :, m, 4 * m : 4 * m + 4] for m in range(3)], 2)
    torch.testing.assert_close(output, module.output_proj(heads.flatten(2)))


MODULES = {
    "points": lambda: (multi_scale(), multi_scale_inputs()),
    "boxes": lambda: (multi_scale(), multi_scale_inputs(4, 2)),
    "single-map": lambda: (
        DeformableAttention(32, num_heads=4),
        {"query": torch.randn(2, 5, 32), "feature_map": torch.randn(2, 6, 7, 32)},
    ),
    "plain-form": lambda: (
        DeformableAttention(
            32, num_heads=2, value_projection=False, predict_reference_points=False
        ),
        {
            "query": torch.randn(2, 5, 32),
            "feature_map": torch.randn(2, 6, 7, 32),
            "reference_points": torch.rand(2, 5, 2),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_gradient_and_learns(cpu_backend, name, autocast):
    module, inputs = MODULES[name]()
    randomize(module)
    target = torch.randn_like(inputs["query"])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for step in range(5 if cpu_backend == "reference" else 20):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output, sampling = module(**inputs, return_sampling=True)
        assert sampling.sampling_locations.dtype == torch.float32
        loss = (output.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for parameter_name, parameter in module.named_parameters():
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.isfinite().all(), parameter_name
                assert parameter.grad.abs().max() > 0, parameter_name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not math.isnan(losses[-1])


def output_and_gradients(module, inputs, autocast):
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = module(**inputs)
    output.float().square().sum().backward()
    return [output, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "autocast"), helpers.some([(name, flag) for name in MODULES for flag in (0, 1)], 3)
)
@pytest.mark.parametrize("gpu", [pytest.param(TRITON, marks=WITH_TRITON)])
def test_the_gpu_kernels_give_the_modules_the_same_gradients(gpu, name, autocast):
    module, inputs = MODULES[name]()
    randomize(module)
    for key in ("query", "reference_points"):  # few queries: the interpreter is slow
        if key in inputs:
            inputs[key] = inputs[key][:, :3]
    expected = output_and_gradients(module, inputs, bool(autocast))
    with use(gpu):
        actual = output_and_gradients(module, inputs, bool(autocast))
    tolerance = 2e-2 if autocast else 1e-4
    for result, truth in zip(actual, expected, strict=True):
        error = (result - truth).abs().max()
        assert error <= tolerance * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_other_dtypes(dtype):
    module = multi_scale().to(dtype)
    output, sampling = module(**multi_scale_inputs(dtype=dtype), return_sampling=True)
    assert output.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sampling.sampling_locations.dtype == sampling.attention_weights.dtype == wide


def test_padding_mask_of_the_single_map_module():
    module = randomize(DeformableAttention(32))
    query, feature_map = torch.randn(1, 5, 32), torch.randn(1, 6, 7, 32)
    mask = torch.zeros(1, 6, 7, dtype=torch.bool)
    mask[:, :, 4:] = True
    changed = feature_map.clone()
    changed[:, :, 4:] = 1e3
    assert torch.equal(
        module(query, feature_map, value_padding_mask=mask),
        module(query, changed, value_padding_mask=mask),
    )


@pytest.mark.parametrize("shapes", [[(9,), (5,)], [(3, 4, 5), (2, 2, 3)]], ids=["lines", "volumes"])
@pytest.mark.parametrize("boxes", [False, True])
def test_lines_and_volumes(shapes, boxes):
    dims = len(shapes[0])
    module = multi_scale(spatial_dims=dims)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    positions = sum(math.prod(shape) for shape in shapes)
    query, value = torch.randn(2, 11, 32), torch.randn(2, positions, 32)
    reference_points = torch.rand(2, 11, 1, dims * (2 if boxes else 1))
    output, sampling = module(query, reference_points, value, shapes, return_sampling=True)
    offsets = module.sampling_offsets(query).view(2, 11, module.num_heads, -1, dims)
    per_level = offsets.split(module.num_points, 3)
    centre = reference_points[:, :, None, :, :dims]
    expected = [
        centre + offset * (0.5 / count) * reference_points[:, :, None, :, dims:]
        if boxes
        else centre + offset / torch.tensor(shape[::-1])
        for offset, count, shape in zip(per_level, module.num_points, shapes, strict=True)
    ]
    torch.testing.assert_close(sampling.sampling_locations, torch.cat(expected, 3))
    attended = saccade.deformable_attention(
        module.value_proj(value).unflatten(-1, (module.num_heads, -1)),
        shapes,
        sampling.sampling_locations,
        sampling.attention_weights,
        num_points=module.num_points,
    )
    assert torch.equal(output, module.output_proj(attended))


@pytest.mark.parametrize("value_projection", [False, True])
@pytest.mark.parametrize("shape", [(9,), (3, 4, 5)], ids=["line", "volume"])
def test_a_single_line_or_volume(shape, value_projection):
    module = DeformableAttention(
        32, num_heads=4, spatial_dims=len(shape), value_projection=value_projection
    )
    query, feature_map = torch.randn(2, 5, 32), torch.randn(2, *shape, 32)
    mask = torch.zeros(2, *shape, dtype=torch.bool)
    mask[..., 2:] = True
    changed = feature_map.clone()
    changed[..., 2:, :] = 1e3
    output = module(query, feature_map, value_padding_mask=mask)
    assert output.shape == (2, 5, 32)
    assert torch.equal(output, module(query, changed, value_padding_mask=mask))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_first_directions():
    assert directions(3, 1).flatten().tolist() == [1, -1, 1]
    torch.testing.assert_close(
        directions(4, 2), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0
    )
    for count in (1, 2, 8, 36):
        sphere = directions(count, 3)
        assert sphere.abs().amax(-1).eq(1).all()
        lines = torch.nn.functional.normalize(sphere, dim=-1)
        if count > 1:
            # Evenly: no two closer than a good part of what as many can have at best.
            cosine = (lines @ lines.T).fill_diagonal_(-1).max()
            assert cosine.clamp(-1, 1).acos() > 0.6 * math.sqrt(4 * math.pi / count)
    offsets = multi_scale(spatial_dims=3).sampling_offsets.bias.view(-1, 6, 3)
    torch.testing.assert_close(offsets[:, 2], 3 * offsets[:, 0])
    assert offsets[:, 0].abs().amax(-1).eq(1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_scale(num_heads=5), "num_heads: expected a divisor of embed_dim 32, got 5"),
        (lambda: multi_scale(num_points=[1, 2, 3]), "num_points: expected 2 numbers"),
        (lambda: multi_scale(num_points=0), "num_points: expected at least 1"),
        (lambda: multi_scale(padding="wrap"), "padding: expected one of"),
        (
            lambda: DeformableAttention(32, spatial_dims=4),
            "spatial_dims: expected 1, 2 or 3, got 4",
        ),
        (lambda: multi_scale(spatial_dims=0), "spatial_dims: expected at least 1, got 0"),
        (lambda: DeformableAttention(30), "num_heads: expected a divisor of embed_dim 30"),
        (
            lambda: multi_scale()(**{**multi_scale_inputs(), "query": torch.zeros(2, 11, 31)}),
            r"query: expected \[batch, queries, 32\], got \[2, 11, 31\]",
        ),
        (
            lambda: multi_scale()(**{**multi_scale_inputs(), "spatial_shapes": [(6, 9)]}),
            r"spatial_shapes: expected 2 levels \(num_levels\) of 2 sizes .*, got \[\(6, 9\)\]",
        ),
        (
            lambda: multi_scale()(**{**multi_scale_inputs(), "spatial_shapes": [(42,), (12,)]}),
            r"spatial_shapes: expected 2 levels \(num_levels\) of 2 sizes .*, got \[\(42,\), \(12,\)\]",
        ),
        (
            lambda: multi_scale()(**multi_scale_inputs(coordinates=3)),
            r"reference_points: expected \[2, 11, 1 or 2, 2 or 4\], got \[2, 11, 1, 3\]",
        ),
        (
            lambda: DeformableAttention(32, predict_reference_points=False)(
                torch.zeros(1, 5, 32), torch.zeros(1, 6, 7, 32)
            ),
            "reference_points: expected a tensor",
        ),
        (
            lambda: DeformableAttention(32)(torch.zeros(1, 5, 32), torch.zeros(1, 42, 32)),
            r"feature_map: expected \[batch, height, width, 32\], got \[1, 42, 32\]",
        ),
        (
            lambda: DeformableAttention(32, spatial_dims=1)(
                torch.zeros(1, 5, 32), torch.zeros(1, 6, 7, 32)
            ),
            r"feature_map: expected \[batch, width, 32\], got \[1, 6, 7, 32\]",
        ),
        (
            lambda: DeformableAttention(32, spatial_dims=3)(
                torch.zeros(1, 5, 32), torch.zeros(1, 2, 6, 7, 32), torch.zeros(1, 5, 2)
            ),
            r"reference_points: expected \[1, 5, 3\] or \[1, 5, 6\], got \[1, 5, 2\]",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SINGLE = {"query": torch.zeros(1, 5, 32), "feature_map": torch.zeros(1, 6, 7, 32)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_scale(num_points=4.0), "num_points: expected an int or a sequence"),
        (lambda: multi_scale(num_points=[2.5, 1]), "num_points: expected an int or a sequence"),
        (lambda: multi_scale(num_points=True), "num_points: expected an int or a sequence"),
        (lambda: multi_scale(num_levels=0), "num_levels: expected at least 1, got 0"),
        (lambda: multi_scale(embed_dim=0), "embed_dim: expected at least 1, got 0"),
        (lambda: multi_scale(num_heads=4.0), "num_heads: expected an int, got 4.0"),
        (
            lambda: DeformableAttention(32, 0, value_projection=False),
            "num_heads: expected at least 1",
        ),
        (lambda: DeformableAttention(32, 8, [4]), r"num_points: expected an int, got \[4\]"),
        (
            lambda: multi_scale()(**{**multi_scale_inputs(), "reference_points": None}),
            "reference_points: expected a Tensor, got NoneType",
        ),
        (
            lambda: multi_scale()(**{**multi_scale_inputs(), "value": torch.zeros(1, 54, 32)}),
            r"value: expected a batch of 2 as in query, got \[1, 54, 32\]",
        ),
        (
            lambda: DeformableAttention(32)(**SINGLE, reference_points=torch.zeros(1, 5, 1, 2)),
            r"reference_points: expected \[1, 5, 2\] or \[1, 5, 4\], got \[1, 5, 1, 2\]",
        ),
        (
            lambda: DeformableAttention(32)(
                **SINGLE, value_padding_mask=torch.zeros(1, 7, 6, dtype=torch.bool)
            ),
            r"value_padding_mask: expected \[1, 6, 7\], got \[1, 7, 6\]",
        ),
        (
            lambda: DeformableAttention(32)(SINGLE["query"], torch.zeros(1, 0, 7, 32)),
            r"feature_map: expected \[1, 1, 7, 32\], got \[1, 0, 7, 32\]",
        ),
    ],
)
def test_more_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
