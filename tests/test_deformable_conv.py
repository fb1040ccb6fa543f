"""Deformable convolution: loops, identities, gradients, the modules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from composition_helpers import assert_all_close, with_gradients
from conftest import TRITON, WITH_TRITON, use
from helpers import TOLERANCE, some

from saccade import deformable_convolution
from saccade.nn import DeformableConv

# One rounding of the result: half of the last bit.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

CASES = {
    "dcnv3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": (2, 1), "padding": 1},
    "pads": {"kernel_size": 3, "padding": (0, 2)},
    "dilation": {"kernel_size": (3, 2), "padding": (2, 1), "dilation": (2, 3)},
    "even": {"kernel_size": (2, 4), "padding": (1, 2), "stride": (1, 2)},
    "no-centre": {"kernel_size": (3, 5), "padding": (1, 2), "remove_center": True},
    "scale": {"kernel_size": 3, "padding": 1, "offset_scale": 0.5, "dilation": 2},
    "large-scale": {"kernel_size": 5, "padding": 2, "offset_scale": 2, "remove_center": True},
    "point": {"kernel_size": 1},
}


def pair(number):
    return number if isinstance(number, tuple) else (number, number)


def sizes(options, height, width):
    """H', W', K, counted: one window after the other as long as it fits."""
    kernel, dilation = pair(options["kernel_size"]), pair(options.get("dilation", 1))
    stride, padding = pair(options.get("stride", 1)), pair(options.get("padding", 0))
    counts = []
    for size, points, step, move, pad in zip(
        (height, width), kernel, dilation, stride, padding, strict=True
    ):
        starts = range(-pad, size + pad, move)
        counts.append(sum(start + step * (points - 1) < size + pad for start in starts))
    return *counts, kernel[0] * kernel[1] - bool(options.get("remove_center"))


def draw(options, dtype=torch.float64, batch=2, height=5, width=6, groups=2, channels=6):
    rows, columns, points = sizes(options, height, width)
    other = torch.float64 if dtype == torch.float64 else torch.float32
    size = (batch, rows, columns, groups, points)
    return (
        torch.randn(batch, height, width, channels, dtype=torch.float64).to(dtype),
        (torch.randn(*size, 2, dtype=torch.float64) * 1.5).to(other),
        torch.randn(size, dtype=torch.float64).to(other),
    )


def loops(
    value, offsets, modulation, *, kernel_size, stride=1, padding=0, dilation=1, offset_scale=1.0,
    remove_center=False, softmax=False,
):  # fmt: skip
    """The convolution point by point, in float64."""
    value, offsets, modulation = value.double(), offsets.double(), modulation.double()
    kernel, stride = pair(kernel_size), pair(stride)
    padding, dilation = pair(padding), pair(dilation)
    batch, rows, columns, groups, _ = modulation.shape
    height, width, channels = value.shape[1:]
    output = torch.zeros(batch, rows, columns, channels, dtype=torch.float64)
    window = [
        (column, row)
        for column in range(kernel[1])
        for row in range(kernel[0])
        if not (remove_center and (row, column) == (kernel[0] // 2, kernel[1] // 2))
    ]
    half = [step * (size - 1) // 2 for size, step in zip(kernel, dilation, strict=True)]
    for b, row, column, group in itertools.product(*map(range, (batch, rows, columns, groups))):
        group_channels = slice(group * channels // groups, (group + 1) * channels // groups)
        weights = modulation[b, row, column, group]
        weights = weights.softmax(0) if softmax else weights
        centre = (
            column * stride[1] - padding[1] + half[1],
            row * stride[0] - padding[0] + half[0],
        )
        for k, (right, down) in enumerate(window):
            dx, dy = (float(number) for number in offsets[b, row, column, group, k])
            x = centre[0] + offset_scale * (right * dilation[1] - half[1] + dx)
            y = centre[1] + offset_scale * (down * dilation[0] - half[0] + dy)
            left, top = math.floor(x), math.floor(y)
            for xi, yi in itertools.product((left, left + 1), (top, top + 1)):
                if 0 <= xi < width and 0 <= yi < height:
                    share = (1 - abs(x - xi)) * (1 - abs(y - yi)) * float(weights[k])
                    output[b, row, column, group_channels] += (
                        share * value[b, yi, xi, group_channels]
                    )
    return output


def assert_it_is_its_loops(options, dtype, **sizes):
    inputs = draw(options, dtype, **sizes)
    output = deformable_convolution(*inputs, **options)
    assert output.dtype == dtype
    assert output.is_contiguous()
    # A position is a whole number of pixels and a fraction: slopes multiply the error of its last bit.
    assert_all_close([output], [loops(*inputs, **options)], 10 * TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "softmax"), some(itertools.product(CASES, (False, True)), 10))
def test_the_convolution_is_its_loops(cpu_backend, name, softmax):
    options = {**CASES[name], "softmax": softmax}
    for dtype in (torch.float32, torch.float64):
        assert_it_is_its_loops(options, dtype, batch=2 if dtype == torch.float32 else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "softmax", "dtype"),
    some(itertools.product(CASES, (False, True), (torch.float32, torch.float64)), 6),
)
@pytest.mark.parametrize("gpu", [pytest.param(TRITON, marks=WITH_TRITON)])
def test_the_convolution_is_its_loops_on_the_gpu_kernels(gpu, name, softmax, dtype):
    options = {**CASES[name], "softmax": softmax}
    with use(gpu):
        assert_it_is_its_loops(options, dtype, batch=1, height=5, width=5)


@pytest.mark.parametrize(("groups", "channels"), [(1, 1), (3, 3), (1, 7), (5, 35), (4, 64)])
def test_groups_and_odd_channels(groups, channels):
    options = CASES["dcnv3"]
    inputs = draw(options, batch=1, height=3, width=4, groups=groups, channels=channels)
    output = deformable_convolution(*inputs, **options)
    assert_all_close([output], [loops(*inputs, **options)], 10 * TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", list(CASES))
def test_without_offsets_it_is_a_sum_over_the_window(name):
    options = dict(CASES[name])
    scale = options.pop("offset_scale", 1)
    value, offsets, modulation = draw(options, height=13, width=14)
    output = deformable_convolution(value, offsets * 0, torch.ones_like(modulation), **options)
    kernel = torch.ones(6, 1, *pair(options["kernel_size"]), dtype=torch.float64)
    if options.pop("remove_center", False):
        kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2] = 0
    plain = {name: options.get(name, 1) for name in ("stride", "dilation")}
    expected = F.conv2d(
        value.permute(0, 3, 1, 2), kernel, padding=options.get("padding", 0), groups=6, **plain
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(output, expected)
    # The whole pattern is scaled: offsets that undo it bring the same points back.
    if scale == 1:
        return
    ys, xs = (
        (torch.arange(size) - size // 2) * step * (1 / scale - 1)
        for size, step in zip(kernel.shape[2:], pair(plain["dilation"]), strict=True)
    )
    undo = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), -1).flatten(0, 1).double()
    undo = undo[kernel[0, 0].T.flatten() > 0].expand_as(offsets)
    inputs = (value, undo, torch.ones_like(modulation))
    torch.testing.assert_close(deformable_convolution(*inputs, **CASES[name]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [False, True], ids=["modulation", "softmax"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (2, 1), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": (1, 3), "padding": (0, 2), "dilation": 2, "remove_center": True},
        {"kernel_size": 2, "offset_scale": 0.5},
    ],
    ids=["stride", "no-centre", "scale"],
)
def test_gradients(cpu_backend, options, softmax):
    options = {**options, "softmax": softmax}
    inputs = draw(options, batch=1, height=3, width=3, channels=2)
    assert torch.autograd.gradcheck(
        lambda *tensors: deformable_convolution(*tensors, **options),
        [tensor.requires_grad_() for tensor in inputs],
    )


@pytest.mark.parametrize(
    ("dtype", "softmax", "other"),
    some(itertools.product(ROUNDING, (False, True), (torch.float32, None)), 4),
)
def test_16_bit_is_rounded_once(backend, dtype, softmax, other):
    # Columns beyond 256, whose halves 16 bits cannot tell apart.
    options = {"kernel_size": 2, "stride": (1, 37), "offset_scale": 0.5, "softmax": softmax}
    value, offsets, modulation = draw(options, dtype, batch=1, height=3, width=300, channels=4)
    offsets, modulation = offsets.to(other or dtype), modulation.to(other or dtype)
    function = lambda v, o, m: deformable_convolution(v, o, m, **options)  # noqa: E731
    output, *gradients = with_gradients(function, (value, offsets, modulation))
    expected = with_gradients(function, [t.double() for t in (value, offsets, modulation)])[0]
    assert output.dtype == dtype
    assert ((output - expected).abs() <= ROUNDING[dtype] * expected.abs() + 1e-3).all()
    expected_dtypes = [dtype, offsets.dtype, modulation.dtype]
    assert [gradient.dtype for gradient in gradients] == expected_dtypes


@pytest.mark.parametrize("softmax", [False, True], ids=["modulation", "softmax"])
def test_no_batch_and_points_far_outside(cpu_backend, softmax):
    options = {**CASES["dcnv3"], "softmax": softmax}
    function = lambda v, o, m: deformable_convolution(v, o, m, **options)  # noqa: E731
    results = with_gradients(function, draw(options, batch=0))
    assert [list(tensor.shape) for tensor in results[:2]] == [[0, 5, 6, 6]] * 2
    value, offsets, modulation = draw(options)
    for number in (math.inf, math.nan, -1e30):
        results = with_gradients(function, (value, offsets * 0 + number, modulation))
        assert not any(tensor.any() for tensor in results)


def test_strides_do_not_matter():
    options = {**CASES["stride"], "softmax": True}
    inputs = draw(options, torch.float32)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    expected = deformable_convolution(*inputs, **options)
    assert torch.equal(deformable_convolution(*strided, **options), expected)


@pytest.mark.slow
def test_a_compiler_sees_one_graph():
    options = {**CASES["stride"], "softmax": True}
    inputs = draw(options, torch.float32)
    expected = deformable_convolution(*inputs, **options)
    compiled = torch.compile(deformable_convolution, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*inputs, **options), expected)
    inputs = draw(options, torch.float32, height=8, width=9, batch=3)
    assert torch.equal(compiled(*inputs, **options), deformable_convolution(*inputs, **options))


# --- the modules ---------------------------------------------------------------------------------

V3_KEYS = [
    "dw_conv.0.weight", "dw_conv.0.bias", "dw_conv.1.1.weight", "dw_conv.1.1.bias",
    "offset.weight", "offset.bias", "mask.weight", "mask.bias",
    "input_proj.weight", "input_proj.bias", "output_proj.weight", "output_proj.bias",
]  # fmt: skip
V4_KEYS = [
    "offset_mask.weight", "offset_mask.bias",
    "value_proj.weight", "value_proj.bias", "output_proj.weight", "output_proj.bias",
]  # fmt: skip
CENTRE_KEYS = ["center_feature_scale_proj_weight", "center_feature_scale_proj_bias"]
DW_KEYS = ["offset_mask_dw.weight", "offset_mask_dw.bias"]
MODULES = {
    "v3": ({}, V3_KEYS),
    "v3-h": (
        {"depthwise_kernel_size": 5, "center_feature_scale": True, "remove_center": True},
        V3_KEYS + CENTRE_KEYS,
    ),
    "v3-stride": ({"stride": 2, "kernel_size": 5, "center_feature_scale": True}, V3_KEYS + CENTRE_KEYS),
    "v4": ({"form": "dcnv4", "output_bias": False}, V4_KEYS[:-1]),
    "v4-dw": (
        {"form": "dcnv4", "depthwise_kernel_size": 3, "center_feature_scale": True, "padding": 0},
        V4_KEYS + CENTRE_KEYS + DW_KEYS,
    ),
    "v4-bare": ({"form": "dcnv4", "pointwise": False, "remove_center": True}, V4_KEYS[:2]),
}  # fmt: skip


def randomized(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_have_the_keys_of_the_authors_modules(name):
    options, keys = MODULES[name]
    module = DeformableConv(16, 4, **options)
    assert sorted(module.state_dict()) == sorted(keys)
    shapes = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    points = 4 * (options.get("kernel_size", 3) ** 2 - bool(options.get("remove_center")))
    if "offset.weight" in keys:
        assert shapes["offset.weight"] == [points * 2, 16]
        assert shapes["mask.bias"] == [points]
    else:
        assert shapes["offset_mask.weight"] == [{36: 112, 32: 96}[points], 16]
    if CENTRE_KEYS[0] in keys:
        assert [shapes[key] for key in CENTRE_KEYS] == [[4, 16], [4]]
    # Zeros from which all points rest, as the authors start.
    for key in [
        *CENTRE_KEYS,
        "offset.weight",
        "mask.bias",
        "offset_mask.weight",
        "value_proj.bias",
    ]:
        assert not module.state_dict().get(key, torch.zeros(1)).any()
    if "output_proj.weight" in keys:
        assert 0.9 < module.output_proj.weight.abs().max() / math.sqrt(6 / 32) <= 1


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_by_their_layers(cpu_backend, name):
    options, _ = MODULES[name]
    module = randomized(DeformableConv(8, 2, offset_scale=0.5, **options))
    feature_map = torch.randn(2, 7, 6, 8)
    value, features = feature_map, feature_map.permute(0, 3, 1, 2)
    v3, bare = options.get("form") != "dcnv4", not options.get("pointwise", True)
    if not bare:
        value = (module.input_proj if v3 else module.value_proj)(value)
    if v3:
        features = module.dw_conv[0](features).permute(0, 2, 3, 1)
        features = F.gelu(module.dw_conv[1][1](features))
    else:
        features = (module.offset_mask_dw or torch.nn.Identity())(features).permute(0, 2, 3, 1)
    stride, padding = (
        options.get("stride", 1),
        options.get("padding", options.get("kernel_size", 3) // 2),
    )
    inset = options.get("kernel_size", 3) // 2 - padding
    under = lambda pixels: pixels[:, inset : 7 - inset : stride, inset : 6 - inset : stride]  # noqa: E731
    features = under(features)
    if v3:
        offsets = module.offset(features).unflatten(-1, (2, -1, 2))
        modulation = module.mask(features).unflatten(-1, (2, -1)).softmax(-1)
    else:
        number = module.window.num_points
        both = module.offset_mask(features)[..., : 2 * 3 * number].unflatten(-1, (2, -1))
        offsets, modulation = (
            both[..., : 2 * number].unflatten(-1, (-1, 2)),
            both[..., 2 * number :],
        )
    geometry = {key: options.get(key, 3) for key in ("kernel_size",)} | {
        key: options[key] for key in ("stride", "remove_center") if key in options
    }
    output = deformable_convolution(
        value, offsets, modulation, padding=padding, offset_scale=0.5, **geometry
    )
    if options.get("center_feature_scale"):
        source = features if v3 else output
        share = source @ module.center_feature_scale_proj_weight.T
        share = (share + module.center_feature_scale_proj_bias).sigmoid()
        share = share[..., None].expand(*share.shape, 4).flatten(-2)
        output = output * (1 - share) + under(value) * share
    expected = output if bare else module.output_proj(output)
    torch.testing.assert_close(module(feature_map), expected, rtol=1e-5, atol=1e-5)


class Block(torch.nn.Module):
    """A block of InternImage: norm, convolution, norm, two linear layers, each added."""

    def __init__(self, channels, **options):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(channels), torch.nn.LayerNorm(channels)
        self.dcn = DeformableConv(channels, 4, **options)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(channels, 2 * channels), torch.nn.GELU(), torch.nn.Linear(2 * channels, channels)
        )  # fmt: skip

    def forward(self, feature_map):
        feature_map = feature_map + self.dcn(self.norm1(feature_map))
        return feature_map + self.mlp(self.norm2(feature_map))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", ["dcnv3", "dcnv4"])
def test_a_block_learns(form, autocast):
    block = Block(16, form=form, center_feature_scale=True)
    feature_map, target = torch.randn(2, 8, 7, 16), torch.randn(2, 8, 7, 16)
    optimizer, losses = torch.optim.Adam(block.parameters(), lr=1e-2), []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = block(feature_map)
        loss = (output.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in block.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_of_other_dtypes_and_no_batch(dtype):
    for form in ("dcnv3", "dcnv4"):
        module = DeformableConv(8, 2, form=form, center_feature_scale=True).to(dtype)
        assert module(torch.randn(1, 5, 4, 8, dtype=dtype)).dtype == dtype
        assert module(torch.randn(0, 5, 4, 8, dtype=dtype)).shape == (0, 5, 4, 8)


VALUE, OFFSETS, MODULATION = draw({"kernel_size": 3})


def convolved(value=VALUE, offsets=OFFSETS, modulation=MODULATION, **options):
    return deformable_convolution(value, offsets, modulation, **{"kernel_size": 3, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convolved(VALUE[0]), ValueError, r"value: expected \[batch, height, width, channels\], got"),
        (lambda: convolved(VALUE[:, :2]), ValueError, r"value: expected a height of at least 3 .*got \[2, 2,"),
        (lambda: convolved(VALUE[..., :5]), ValueError, "sampling_offsets: expected .*divides the 5 .*got 2"),
        (lambda: convolved(VALUE.long()), ValueError, "value: expected one of .*int64"),
        (lambda: convolved(padding=1), ValueError, r"sampling_offsets: expected \[batch 2, height 5, width 6,"),
        (lambda: convolved(remove_center=True), ValueError, "sampling_offsets: .*points 8, coordinates 2"),
        (lambda: convolved(modulation=MODULATION[..., 0]), ValueError, "modulation: expected .*points 9"),
        (lambda: convolved(modulation=MODULATION.to("meta")), ValueError, "modulation: .* on cpu .* meta"),
        (lambda: convolved(kernel_size=0), ValueError, r"kernel_size: expected \(height, width\) of at least 1"),
        (lambda: convolved(stride=(1, 2, 3)), ValueError, "stride: expected .*got \\(1, 2, 3\\)"),
        (lambda: convolved(padding=-1), ValueError, "padding: expected .*at least 0, got -1"),
        (lambda: convolved(dilation=1.5), TypeError, "dilation: expected an int or \\(height, width\\)"),
        (lambda: convolved(offset_scale="1"), TypeError, "offset_scale: expected a number, got '1'"),
        (lambda: convolved(kernel_size=1, remove_center=True), ValueError, "kernel_size: expected more than"),
        (lambda: DeformableConv(8, 3), ValueError, "num_groups: expected a divisor of embed_dim 8, got 3"),
        (lambda: DeformableConv(8, form="dcnv2"), ValueError, "form: expected one of 'dcnv3', 'dcnv4', got"),
        (lambda: DeformableConv(8, padding=2), ValueError, r"padding: expected at most \(1, 1\).*got 2"),
        (lambda: DeformableConv(8, 4, 2, remove_center=True), ValueError, "kernel_size: expected odd .*got 2"),
        (lambda: DeformableConv(8, depthwise_kernel_size=4), ValueError, "depthwise_kernel_size: expected odd"),
        (lambda: DeformableConv(8)(VALUE.float()), ValueError, r"feature_map: expected \[batch, .*, 8\], got"),
        (lambda: DeformableConv(8, 4, 5, padding=0)(torch.ones(1, 4, 9, 8)), ValueError, "feature_map: .*height"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
