"""transformers' models on Saccade: the same numbers, and back again."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager

import helpers
import pytest
import torch
import transformers
from transformers import DeformableDetrForObjectDetection
from vision_helpers import random_detector, random_rt_detr

import saccade
from benchmarks.small_models import SMALL_MODELS
from saccade.integrations.operators import get_original


def scatter_parameters(model):
    """Away from the initial zeros, where every query would look at the same places."""
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs_and_gradients(model, pictures, mask=None):
    model.zero_grad()
    arguments = {"pixel_values": pictures} | ({} if mask is None else {"pixel_mask": mask})
    found = model(**arguments)
    (found.logits.square().mean() + found.pred_boxes.square().mean()).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return [found.logits.detach(), found.pred_boxes.detach()], gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "operators"),
    [
        (random_detector, 4),
        (lambda: random_detector(two_stage=True, two_stage_num_proposals=20), 4),
        (random_rt_detr, 2),
    ],
    ids=["deformable-detr", "two-stage", "rt-detr"],
)
def test_patched_model_gives_the_same_outputs_and_gradients(make, operators):
    # In float64: in float32 a location at the border of two cells may fall on either side of it, where
    # the gradient jumps.
    model = scatter_parameters(make()).double()
    pictures = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    mask = None
    if isinstance(model, DeformableDetrForObjectDetection):
        mask = torch.ones(2, 96, 128, dtype=torch.long)
        mask[1, :, 80:] = 0
    state = copy.deepcopy(model.state_dict())
    expected, expected_gradients = outputs_and_gradients(model, pictures, mask)
    report = saccade.patch(model)
    assert len(report.replaced) == operators
    assert not report.left
    found, gradients = outputs_and_gradients(model, pictures, mask)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert gradients.keys() == expected_gradients.keys()
    for name, want in expected_gradients.items():
        torch.testing.assert_close(gradients[name], want, rtol=1e-6, atol=1e-8, msg=name)
    assert model.state_dict().keys() == state.keys()


def attended(model, inputs):
    """The outputs of the attention modules, and those of the model that are finite numbers."""
    found = []
    modules = [
        module
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("multiscaledeformableattention")
    ]
    hooks = [
        module.register_forward_hook(
            lambda module, given, output: found.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for module in modules
    ]
    with torch.no_grad():
        output = model(**inputs)
    for hook in hooks:
        hook.remove()
    tensors = [tensor for tensor in output.values() if isinstance(tensor, torch.Tensor)]
    return found + [tensor.nan_to_num() for tensor in tensors if tensor.is_floating_point()]


@pytest.mark.slow
@pytest.mark.parametrize("name", helpers.some(SMALL_MODELS, 7))
def test_families_run_patched_and_go_back(name):
    detector = SMALL_MODELS[name]
    model, inputs = detector.build(), detector.inputs()
    other = detector.build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected = attended(model, inputs)
    assert min(tensor.std() for tensor in expected[:2]) > 1e-2  # far from the noise of float32
    report = saccade.patch(model)
    assert report.replaced
    assert not report.left
    assert saccade.patch(model) == report
    with counted_calls() as calls:
        found = attended(model, inputs)
        assert len(calls) == len(report.replaced)
        attended(other, inputs)
        attended(copy.deepcopy(model), inputs)
        assert len(calls) == 2 * len(report.replaced)  # the other model is left alone, a copy not
    for got, want in zip(found, expected, strict=True):
        atol = 1e-4 * float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=atol)
    assert saccade.unpatch(model).replaced == report.replaced
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    for got, want in zip(attended(model, inputs), expected, strict=True):
        assert torch.equal(got, want)


@contextmanager
def counted_calls():
    """The calls of the operator that the integration makes."""
    from saccade.integrations import operators as integration

    calls = []
    operator = integration.deformable_attention

    def counting(*given, **options):
        calls.append(given)
        return operator(*given, **options)

    integration.deformable_attention = counting
    try:
        yield calls
    finally:
        integration.deformable_attention = operator


def random_rt_detr_v2(method="default"):
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    torch.manual_seed(0)
    small = random_rt_detr().config
    sizes = (
        "hidden_dim in_channels ffn_dim attention_heads",
        "in_channels ffn_dim layers attention_heads",
    )
    names = [f"encoder_{name}" for name in sizes[0].split()]
    names += [f"decoder_{name}" for name in sizes[1].split()]
    names += ["d_model", "num_queries"]
    backbone = RTDetrResNetConfig(**{**small.backbone_config.to_dict(), "out_indices": None})
    config = RTDetrV2Config(
        backbone_config=backbone,
        num_denoising=0,
        decoder_method=method,
        **{name: getattr(small, name) for name in names},
    )
    return RTDetrV2ForObjectDetection(config).eval()


@pytest.mark.slow
def test_a_function_in_the_file_of_the_model_is_replaced_for_this_model_alone():
    model = scatter_parameters(random_rt_detr_v2()).double()
    pictures = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    expected, expected_gradients = outputs_and_gradients(model, pictures)
    saccade.patch(model)
    with counted_calls() as calls:
        found, gradients = outputs_and_gradients(model, pictures)
    assert len(calls) == 2
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    for name, want in expected_gradients.items():
        torch.testing.assert_close(gradients[name], want, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.slow
def test_discrete_sampling():
    model = scatter_parameters(random_rt_detr_v2("discrete")).double()
    pictures = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    expected, expected_gradients = outputs_and_gradients(model, pictures)
    saccade.patch(model)
    with counted_calls() as calls:
        found, gradients = outputs_and_gradients(model, pictures)
    assert len(calls) == 2
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    for name, want in expected_gradients.items():
        torch.testing.assert_close(gradients[name], want, rtol=1e-6, atol=1e-8, msg=name)


def test_a_method_that_nobody_knows_is_left_alone():
    model = random_rt_detr_v2()
    for module in model.modules():
        if hasattr(module, "method"):
            module.method = "cubic"
    with pytest.raises(
        ValueError, match="its method is 'cubic', expected one of default, discrete"
    ):
        saccade.patch(model)


@pytest.mark.parametrize("shapes", [[(8, 8), (4, 4)], [(5, 9), (3, 7)]], ids=["square", "wide"])
def test_discrete_rules_of_transformers_and_of_the_authors(shapes):
    from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2

    points = [4, 3]
    value = torch.randn(4, sum(h * w for h, w in shapes), 3, 8)
    locations, weights = torch.rand(4, 500, 3, 7, 2) * 1.6 - 0.3, torch.rand(4, 500, 3, 7)
    options = {"num_points": points, "interpolation": "discrete"}
    with torch.no_grad():
        found = saccade.deformable_attention(
            value, shapes, locations, weights, padding="border", **options
        )
    expected = multi_scale_deformable_attention_v2(
        value, shapes, locations, weights, points, "discrete"
    )
    torch.testing.assert_close(found, expected)
    # The authors' code clamps both axes to the height, which a map at least as wide as high survives.
    by_height = torch.zeros(4, 500, 3, 8)
    first_row = first_point = 0
    for (height, width), count in zip(shapes, points, strict=True):
        level = value[:, first_row : first_row + height * width].unflatten(1, (height, width))
        level_points = slice(first_point, first_point + count)
        cells = locations[:, :, :, level_points] * torch.tensor([width, height]) + 0.5
        cells = cells.to(torch.int64).clamp(0, height - 1)
        batch, head = torch.arange(4).view(4, 1, 1, 1), torch.arange(3).view(1, 1, 3, 1)
        read = level[batch, cells[..., 1], cells[..., 0], head]
        by_height += (weights[:, :, :, level_points, None] * read).sum(3)
        first_row += height * width
        first_point += count
    found = saccade.deformable_attention(
        value, shapes, locations, weights, padding="border_height", **options
    )
    torch.testing.assert_close(found, by_height.flatten(2))
    assert by_height.flatten(2).allclose(expected, atol=1e-5) == (shapes[0] == (8, 8))


@pytest.mark.slow
def test_a_patched_function_survives_torch_compile():
    model = random_rt_detr_v2()
    module = model.model.decoder.layers[0].encoder_attn
    saccade.patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend)
    value = torch.randn(1, 8 * 8 + 4 * 4 + 2 * 2, 32)
    shapes = [(8, 8), (4, 4), (2, 2)]
    arguments = {
        "hidden_states": torch.randn(1, 15, 32),
        "encoder_hidden_states": value,
        "reference_points": torch.rand(1, 15, 1, 4),
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": shapes,
    }
    with torch.no_grad():
        found, expected = compiled(**arguments), module(**arguments)
    torch.testing.assert_close(found[0], expected[0])
    assert any("saccade.deformable_attention" in code for code in graphs)
    assert not any("grid_sample" in code for code in graphs)


@pytest.mark.slow
def test_every_operator_of_the_installed_version_is_found_and_gives_the_same(monkeypatch):
    """All models, whatever they are called: the operator of each file, with all gradients."""
    monkeypatch.setattr(transformers.utils.logging.get_logger(), "warning", lambda *_: None)
    report = saccade.patch("transformers")
    try:
        assert not report.left
        assert saccade.patch("transformers") == report
        files = {name.split(".")[2] for name in report.replaced}
        assert files >= FAMILIES
        for name in report.replaced:
            check_operator(name)
    finally:
        assert saccade.unpatch("transformers").replaced == report.replaced
    assert saccade.unpatch("transformers").replaced == []


FAMILIES = {
    *("deformable_detr", "grounding_dino", "mm_grounding_dino", "lw_detr", "rf_detr", "rt_detr"),
    *("omdet_turbo", "rt_detr_v2", "d_fine", "mask2former", "oneformer"),
}


def check_operator(name):
    """The replacement, called as the model does, against what it replaced."""
    shapes, generator = [(9, 13), (5, 7)], torch.Generator().manual_seed(1)
    path, _, attribute = name.rpartition(".")
    owner = resolved(path)
    replaced = getattr(owner, attribute)
    original = get_original(replaced)
    inputs = [
        torch.randn(2, 9 * 13 + 5 * 7, 4, 8, generator=generator),
        torch.rand(2, 20, 4, 2, 3, 2, generator=generator) * 1.4 - 0.2,
        torch.rand(2, 20, 4, 2, 3, generator=generator),
    ]
    if attribute == "forward":
        before = [owner()]
        calls = [[[torch.tensor(shapes), shapes, torch.tensor([0, 9 * 13])], [64]]]
    elif attribute.endswith("_v2"):
        inputs[1:] = [inputs[1].flatten(3, 4), inputs[2].flatten(3, 4)]
        before, calls = [], [[[shapes], [[3, 3], method]] for method in ("default", "discrete")]
    else:
        before, calls = [], [[[shapes], []]]
    for between, after in calls:
        results = []
        for function in (original, replaced):
            value, locations, weights = (tensor.double().requires_grad_() for tensor in inputs)
            output = function(*before, value, *between, locations, weights, *after)
            output.square().sum().backward()
            results.append([output, value.grad, locations.grad, weights.grad])
        for expected, found in zip(*results, strict=True):
            if expected is None:  # discrete sampling has no gradient by location
                assert found is None or not found.any(), name
                continue
            torch.testing.assert_close(found, expected, msg=lambda message: f"{name}: {message}")


def resolved(path):
    if path in sys.modules:
        return sys.modules[path]
    outer, _, name = path.rpartition(".")
    return getattr(resolved(outer), name)


@pytest.mark.slow
def test_training_patched_and_not():
    """The same model, the same seed, the real losses."""
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = scatter_parameters(random_detector()).double().train()
        if patched:
            saccade.patch(model)
        pictures = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        labels = [
            {"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4).double() / 2 + 0.2}
            for _ in range(2)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        steps = []
        for _ in range(20 if helpers.ALL else 6):
            loss = model(pixel_values=pictures, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(torch.tensor(steps))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
