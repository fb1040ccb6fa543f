"""The functions behind the compiled modules of DCNv3 and DCNv4, called as their users call them."""

from __future__ import annotations

import math

import pytest
import torch
from composition_helpers import with_gradients

import saccade
from saccade.integrations import dcn_extensions as dcn
from saccade.nn import DeformableConv

# kernel, stride, padding and dilation, height before width each; groups, channels of a group, scale.
NUMBERS = (3, 5, 2, 1, 1, 2, 1, 1, 2, 3, 0.5)
OPTIONS = {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "offset_scale": 0.5}


class DCNv3Function(torch.autograd.Function):
    """As InternImage writes it; before version 1.1, and in detrex, without remove_center."""

    @staticmethod
    def forward(ctx, input, offset, mask, *numbers):
        *ctx.numbers, ctx.im2col_step, ctx.remove_center = numbers
        ctx.save_for_backward(input, offset, mask)
        last = [] if ctx.remove_center is None else [ctx.remove_center]
        return dcn.dcnv3_forward(input, offset, mask, *ctx.numbers, ctx.im2col_step, *last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        last = [] if ctx.remove_center is None else [ctx.remove_center]
        arguments = [*ctx.saved_tensors, *ctx.numbers, grad_output.contiguous(), ctx.im2col_step]
        grad_input, grad_offset, grad_mask = dcn.dcnv3_backward(*arguments, *last)
        return grad_input, grad_offset, grad_mask, *[None] * 13


class DCNv4Function(torch.autograd.Function):
    """As DCNv4 writes it."""

    @staticmethod
    def forward(ctx, input, offset_mask, *numbers):
        *ctx.numbers, ctx.remove_center, ctx.softmax = numbers
        ctx.save_for_backward(input, offset_mask)
        return dcn.dcnv4_forward(
            input, offset_mask, *ctx.numbers, 256, ctx.remove_center, 8, 512, ctx.softmax
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_input, grad_offset_mask = dcn.dcnv4_backward(
            *ctx.saved_tensors, *ctx.numbers, 256, grad_output.contiguous(), ctx.remove_center,
            2, 256, ctx.softmax,
        )  # fmt: skip
        return grad_input, grad_offset_mask, *[None] * 13


class FlashDeformAttnFunction(torch.autograd.Function):
    """As DCNv4 writes it."""

    @staticmethod
    def forward(ctx, value, shapes, starts, sampling_loc_attn, im2col_step, num_points):
        ctx.im2col_step, ctx.num_points = im2col_step, num_points
        ctx.save_for_backward(value, shapes, starts, sampling_loc_attn)
        return dcn.flash_deform_attn_forward(
            value, shapes, starts, sampling_loc_attn, im2col_step, num_points, 8, 256
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_value, grad_sampling_loc_attn = dcn.flash_deform_attn_backward(
            *ctx.saved_tensors, grad_output.contiguous(), ctx.im2col_step, ctx.num_points, 2, 128
        )
        return grad_value, None, None, grad_sampling_loc_attn, None, None


def draw(dtype, remove_center=0, batch=3):
    """value, offsets [..., G, K, 2], modulation [..., G, K] on a map of 5 by 6."""
    size = (batch, 3, 6, 2, 15 - remove_center)
    value, offsets = torch.randn(batch, 5, 6, 6), torch.randn(*size, 2)
    return value.to(dtype), offsets.to(dtype), torch.randn(size).to(dtype)


def assert_equal(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("remove_center", [None, 0, 1])
def test_dcnv3(cpu_backend, remove_center, dtype):
    inputs = draw(dtype, remove_center or 0)
    removed = bool(remove_center)
    # A batch of 3, which the step of 2 does not divide.
    found = with_gradients(
        lambda v, o, m: DCNv3Function.apply(
            v, o.flatten(3), m.flatten(3), *NUMBERS, 2, remove_center
        ),
        inputs,
    )
    function = lambda *t: saccade.deformable_convolution(*t, remove_center=removed, **OPTIONS)  # noqa: E731
    assert_equal(found, with_gradients(function, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("remove_center", [0, 1])
def test_dcnv4(cpu_backend, remove_center, softmax, dtype):
    value, offsets, modulation = draw(dtype, remove_center)
    joined = torch.cat((offsets.flatten(4), modulation), 4).flatten(3)
    padding = -joined.shape[3] % 8
    # Columns that only fill up may hold anything.
    joined = torch.cat((joined, torch.full((3, 3, 6, padding), math.nan, dtype=dtype)), 3)
    output, grad_value, grad_joined = with_gradients(
        lambda v, o: DCNv4Function.apply(v, o, *NUMBERS, remove_center, softmax), (value, joined)
    )
    expected = with_gradients(
        lambda *tensors: saccade.deformable_convolution(
            *tensors, remove_center=bool(remove_center), softmax=softmax, **OPTIONS
        ),
        (value, offsets, modulation),
    )
    grad_offset = torch.cat((expected[2].flatten(4), expected[3]), 4).flatten(3)
    filling = torch.zeros(3, 3, 6, padding, dtype=dtype)
    grad_offset = torch.cat((grad_offset, filling), 3)
    assert_equal((output, grad_value, grad_joined), (*expected[:2], grad_offset))


# Sizes of the last axes, after batch, height and width.
V3_LAYOUTS = [
    ((2, 15, 2), (2, 15)),
    ((2, 30), (2, 15)),  # as DCNv4's scripts call DCNv3
    ((30, 2), (30,)),
    ((2, 5, 3, 2), (2, 5, 3)),
    ((10, 3, 2), (1, 30, 1)),
]


@pytest.mark.parametrize(("offset_axes", "mask_axes"), V3_LAYOUTS)
@pytest.mark.parametrize("places", [(3, 3, 6), (3, 18), (9, 6), (54,), (1, 54, 1)])
def test_dcnv3_takes_axes_joined_or_apart(offset_axes, mask_axes, places):
    value, offsets, modulation = draw(torch.float64)

    def run(value, offset, mask):
        return DCNv3Function.apply(value, offset, mask, *NUMBERS, 256, 0)

    usual = with_gradients(run, (value, offsets.flatten(3), modulation.flatten(3)))
    offset, mask = offsets.reshape(*places, *offset_axes), modulation.reshape(*places, *mask_axes)
    output, grad_value, grad_offset, grad_mask = with_gradients(run, (value, offset, mask))
    assert (grad_offset.shape, grad_mask.shape) == (offset.shape, mask.shape)
    gradients = grad_offset.reshape(3, 3, 6, 60), grad_mask.reshape(3, 3, 6, 30)
    assert_equal((output, grad_value, *gradients), usual)


def test_dcnv3_without_the_centre_takes_axes_joined_or_apart():
    value, offsets, modulation = draw(torch.float64, 1)
    usual = dcn.dcnv3_forward(
        value, offsets.flatten(3), modulation.flatten(3), *NUMBERS, 256, remove_center=True
    )
    apart = dcn.dcnv3_forward(value, offsets, modulation, *NUMBERS, 256, remove_center=1)
    assert torch.equal(apart, usual)


@pytest.mark.parametrize("places", [(3, 18, 1), (54, 1, 1), (1, 9, 6)])
def test_dcnv4_takes_places_joined(places):
    value, offsets, modulation = draw(torch.float64)
    joined = torch.cat((offsets.flatten(4), modulation, torch.zeros(3, 3, 6, 2, 3)), 4).flatten(3)

    def run(value, joined):
        return DCNv4Function.apply(value, joined, *NUMBERS, 0, True)

    output, grad_value, grad_joined = with_gradients(run, (value, joined.reshape(*places, -1)))
    assert grad_joined.shape == (*places, 96)
    usual = with_gradients(run, (value, joined))
    assert_equal((output, grad_value, grad_joined.reshape(joined.shape)), usual)


def test_backwards_take_a_gradient_with_axes_joined_or_apart():
    value, offsets, modulation = draw(torch.float64)
    grad_output = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    inputs = (value, offsets, modulation)
    expected = dcn.dcnv3_backward(*inputs, *NUMBERS, grad_output, 256)
    apart = grad_output.view(3, 18, 2, 3)
    assert_equal(dcn.dcnv3_backward(*inputs, *NUMBERS, apart, 256), expected)
    joined = torch.cat((offsets.flatten(4), modulation), 4).flatten(3)
    expected = dcn.dcnv4_backward(value, joined, *NUMBERS, 256, grad_output, 0, 2, 256, False)
    result = dcn.dcnv4_backward(value, joined, *NUMBERS, 256, apart, 0, 2, 256, False)
    assert_equal(result, expected)


SHAPES = torch.tensor([(5, 4), (2, 3)])
STARTS = torch.tensor([0, 20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_deform_attn(cpu_backend, dtype):
    value = torch.randn(3, 26, 2, 5).to(dtype)
    locations, logits = torch.rand(3, 7, 2, 2, 4, 2), torch.randn(3, 7, 2, 2, 4)
    joined = torch.cat((locations.flatten(3), logits.flatten(3)), 3).to(dtype)
    output, *gradients = with_gradients(
        lambda v, j: FlashDeformAttnFunction.apply(v, SHAPES, STARTS, j, 2, 4), (value, joined)
    )
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]

    # In float64 from the same numbers; what comes out is rounded to the dtype.
    def exactly(value, joined):
        points, weights = joined[..., :16].unflatten(3, (2, 4, 2)), joined[..., 16:].softmax(3)
        shapes = SHAPES.tolist()
        return saccade.deformable_attention(value, shapes, points, weights.unflatten(3, (2, 4)))

    expected = with_gradients(exactly, (value.double(), joined.double()))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 4e-2)
    for got, want in zip((output, *gradients), expected, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.slow
def test_gradients_are_those_of_the_functions():
    value, offsets, modulation = (tensor.double() for tensor in draw(torch.float32, batch=1))
    inputs = [value[:, :3, :4], offsets[:, :2, :4].flatten(3), modulation[:, :2, :4].flatten(3)]
    assert torch.autograd.gradcheck(
        lambda *tensors: DCNv3Function.apply(*tensors, *NUMBERS, 256, 0),
        [tensor.clone().requires_grad_() for tensor in inputs],
    )


def test_flash_deform_attn_takes_axes_joined_or_apart():
    value, points = torch.randn(3, 26, 2, 5), torch.randn(3, 7, 2, 24)
    run = lambda v, p: FlashDeformAttnFunction.apply(v, SHAPES, STARTS, p, 2, 4)  # noqa: E731
    output, grad_value, grad_points = with_gradients(run, (value, points.flatten(2)))
    assert grad_points.shape == (3, 7, 48)
    usual = with_gradients(run, (value, points))
    assert_equal((output, grad_value, grad_points.unflatten(2, (2, 24))), usual)
    grad_output = torch.randn(3, 7, 10)
    backward = [
        dcn.flash_deform_attn_backward(value, SHAPES, STARTS, points, gradient, 2, 4, 2, 128)
        for gradient in (grad_output, grad_output.view(3, 7, 2, 5))
    ]
    assert_equal(backward[1], backward[0])


def test_modules_run_on_the_functions():
    # What the authors' modules do around the function, on the layers of ours.
    module = DeformableConv(8, 2, form="dcnv4")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    feature_map = torch.randn(2, 5, 6, 8)
    numbers = (3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0)
    output = DCNv4Function.apply(
        module.value_proj(feature_map), module.offset_mask(feature_map), *numbers, 0, False
    )
    assert torch.equal(module.output_proj(output), module(feature_map))
    module = DeformableConv(8, 2, form="dcnv3")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = module.dw_conv(feature_map.permute(0, 3, 1, 2))
    mask = module.mask(features).unflatten(-1, (2, 9)).softmax(-1).flatten(3)
    output = DCNv3Function.apply(
        module.input_proj(feature_map), module.offset(features), mask, *numbers, 256, 0
    )
    torch.testing.assert_close(module.output_proj(output), module(feature_map))


def test_no_batch():
    value, offsets, modulation = draw(torch.float32, batch=0)
    assert dcn.dcnv3_forward(
        value, offsets.flatten(3), modulation.flatten(3), *NUMBERS, 256
    ).shape == (0, 3, 6, 6)
    joined = torch.randn(0, 7, 2, 24)
    values = torch.randn(0, 26, 2, 5)
    assert dcn.flash_deform_attn_forward(values, SHAPES, STARTS, joined, 64, 4, 8, 256).shape == (
        0,
        7,
        10,
    )


V3 = [draw(torch.float32)[0], *(tensor.flatten(3) for tensor in draw(torch.float32)[1:])]
JOINED = torch.cat(V3[1:], 3)
VALUE, POINTS = torch.randn(3, 26, 2, 5), torch.randn(3, 7, 2, 24)


def v3(value=V3[0], offset=V3[1], mask=V3[2], numbers=NUMBERS, remove_center=0):
    return dcn.dcnv3_forward(value, offset, mask, *numbers, 256, remove_center)


def v4(value=V3[0], joined=JOINED, softmax=False):
    return dcn.dcnv4_forward(value, joined, *NUMBERS, 256, 0, 8, 512, softmax)


def flash(value=VALUE, shapes=SHAPES, starts=STARTS, points=POINTS, num_points=4):
    return dcn.flash_deform_attn_forward(value, shapes, starts, points, 64, num_points, 8, 256)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: v3(V3[0][..., :4]), ValueError, r"input: expected \[batch, height, width, channels 6\], got"),
        (lambda: v3(offset=V3[1][:, :2]), ValueError, "offset: .*group 2, kernel_w 5, kernel_h 3, coordinates 2"),
        (lambda: v3(mask=V3[1]), ValueError, "mask: expected .*kernel_w 5, kernel_h 3"),
        (lambda: v3(offset=V3[1].movedim(3, 1)), ValueError, r"offset: expected .* got \[3, 60, 3, 6\]"),
        (lambda: v3(mask=V3[2].unflatten(3, (15, 2))), ValueError, r"mask: expected .* got \[3, 3, 6, 15, 2\]"),
        (lambda: v3(mask=V3[2].repeat(2, 1, 1, 1)), ValueError, r"mask: expected .* got \[6, 3, 6, 30\]"),
        (lambda: v3(mask=V3[2].int()), ValueError, "mask: expected one of torch.float32"),
        (lambda: v3(mask=V3[2].tolist()), TypeError, "mask: expected a Tensor, got list"),
        (lambda: v3(remove_center=2), ValueError, "remove_center: expected 0 or 1, got 2"),
        (lambda: v3(remove_center="False"), ValueError, "remove_center: expected 0 or 1, got 'False'"),
        (lambda: v3(numbers=(*NUMBERS[:9], "33", 1.0)), TypeError, "group_channels: expected an int, got '33'"),
        (lambda: v4(softmax="False"), ValueError, "softmax: expected 0 or 1, got 'False'"),
        (lambda: v4(joined=JOINED.flatten(1, 2)), ValueError, "offset_mask: expected .*width 6, columns., got"),
        (lambda: v4(joined=JOINED.unflatten(3, (2, 45))), ValueError, r"offset_mask: .* got \[3, 3, 6, 2, 45\]"),
        (lambda: v4(joined=JOINED.transpose(1, 2)), ValueError, r"offset_mask: .* got \[3, 6, 3, 90\]"),
        (lambda: v3(numbers=(*NUMBERS[:8], 0, 3, 1.0)), ValueError, "group: expected at least 1, got 0"),
        (lambda: v4(joined=JOINED[..., :80]), ValueError, "offset_mask: expected at least 90 columns, group 2"),
        (lambda: v4(V3[0][:, :4, :, :5]), ValueError, "value: expected .*channels 6"),
        (lambda: flash(starts=torch.tensor([0, 19])), ValueError, r"level_start_index: expected \[0, 20\].*\[0, 19\]"),
        (lambda: flash(starts=torch.tensor([20, 0])), ValueError, "level_start_index: expected"),
        (lambda: flash(starts=torch.tensor([0])), ValueError, r"level_start_index: expected \[0, 20\].*\[0\]"),
        (lambda: flash(shapes=SHAPES.flatten()), ValueError, r"spatial_shapes: expected \[any, 2\], got \[4\]"),
        (lambda: flash(shapes=SHAPES.tolist()), TypeError, "spatial_shapes: expected a Tensor, got list"),
        (lambda: flash(shapes=SHAPES.double()), ValueError, "spatial_shapes: expected .*integer"),
        (lambda: flash(num_points=3), ValueError, "sampling_loc_attn: expected .*columns 18"),
        (lambda: flash(points=POINTS.transpose(2, 3)), ValueError, r"sampling_loc_attn: .* \[3, 7, 24, 2\]"),
        (lambda: flash(value=VALUE[:, :25]), ValueError, "spatial_shapes: expected .*25"),
        (
            lambda: dcn.dcnv3_backward(*V3, *NUMBERS, torch.ones(3, 3, 6, 5), 256),
            ValueError,
            r"grad_output: expected \[3, 3, 6, 6\], the shape of the output, got \[3, 3, 6, 5\]",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_shapes_and_starts_are_read_back_together(monkeypatch):
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(1) or tolist(tensor))
    flash()
    assert len(read) == 1
