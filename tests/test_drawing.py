"""Drawings: markers lie on the right pixels of the original image, padding and resizing undone."""

from __future__ import annotations

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

from saccade.vision.detector import Detection, ImageResult  # noqa: E402
from saccade.vision.draw_sampling import (  # noqa: E402
    MAX_OBJECTS,
    View,
    draw_look,
    draw_looks,
    find_view,
)
from saccade.vision.drawing import MIN_LONGER_SIDE, colours, draw_detections  # noqa: E402
from saccade.vision.sampling_record import Frame, Look, Recording, find_frames, get_look  # noqa: E402


def detection(box, positions, weights=None, reference=None, score=0.9) -> Detection:
    """An object whose one head looked at `positions`."""
    positions = torch.tensor([positions], dtype=torch.float64)
    if weights is None:
        weights = [1 / positions.shape[1]] * positions.shape[1]
    look = Look(positions, torch.tensor([weights]), reference)
    return Detection("seven", 7, score, box, 3, look)


def marked(size: tuple[int, int], pixel: tuple[int, int]):
    """A black image with a white patch around one pixel."""
    image = Image.new("RGB", size)
    image.paste("white", (pixel[0] - 3, pixel[1] - 3, pixel[0] + 4, pixel[1] + 4))
    return image


def brightest(tensor: torch.Tensor) -> tuple[float, float]:
    """(x, y) of the centre of what is bright, in pixels of the tensor, 0 its edge."""
    bright = (tensor.mean(0) - tensor.mean(0).min()).clamp(min=0) ** 2
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in bright.shape), indexing="ij")
    return float((bright * x).sum() / bright.sum()), float((bright * y).sum() / bright.sum())


@pytest.fixture(scope="module")
def processor():
    return transformers.DeformableDetrImageProcessorPil(
        size={"shortest_edge": 120, "longest_edge": 160}
    )


def test_a_location_in_a_padded_batch_comes_back_to_its_pixel(processor) -> None:
    """The marker of each image is located in the tensor, and its location converted back."""
    pixels = [(200, 40), (20, 170), (60, 30)]
    images = [
        marked((320, 120), pixels[0]),
        marked((100, 210), pixels[1]),
        marked((90, 80), pixels[2]),
    ]
    inputs = processor(images=images, return_tensors="pt")
    height, width = inputs["pixel_values"].shape[-2:]
    frames = find_frames(
        [image.size for image in images], inputs["pixel_values"], inputs["pixel_mask"]
    )
    assert any(frame.window[2] < width for frame in frames)
    assert any(frame.window[3] < height for frame in frames)
    for index, (frame, pixel) in enumerate(zip(frames, pixels, strict=True)):
        # Zero in the normalized tensor is grey, brighter than black: make the padding black.
        values = inputs["pixel_values"][index]
        black = values.amin((1, 2))[:, None, None]
        values = torch.where(inputs["pixel_mask"][index].bool(), values, black)
        x, y = brightest(values)
        location = torch.tensor([x / width, y / height])
        recording = Recording(
            2,
            2,
            location.view(1, 1, 1, 1, 1, 2).expand(3, 1, 1, 1, 1, 2),
            torch.ones(3, 1, 1, 1, 1),
            location.view(1, 1, 2).expand(3, 1, 2),
        )
        look = get_look(recording, frame, index, 0)
        expected = (pixel[0] + 0.5, pixel[1] + 0.5)
        # Resizing by up to 2.1 moves the centre of what is bright by a part of a pixel.
        assert look.positions[0, 0].tolist() == pytest.approx(expected, abs=0.8)
        assert look.reference == pytest.approx(expected, abs=0.8)


def test_padding_on_the_left_and_above_is_undone_too() -> None:
    mask = torch.zeros(1, 40, 60)
    mask[0, 10:30, 20:60] = 1
    frame = find_frames([(80, 40)], torch.zeros(1, 3, 40, 60), mask)[0]
    assert frame == Frame((80, 40), (60, 40), (20, 10, 40, 20))
    corners = torch.tensor([[20 / 60, 10 / 40], [1.0, 30 / 40], [0.0, 0.0]])
    assert frame.to_image(corners).tolist() == [
        pytest.approx([0, 0], abs=1e-5),
        pytest.approx([80, 40]),
        pytest.approx([-40, -20]),
    ]


def test_a_mask_that_is_not_a_rectangle_is_rejected() -> None:
    mask = torch.ones(1, 4, 4)
    mask[0, 1, 1] = 0
    with pytest.raises(ValueError, match="one rectangle"):
        find_frames([(4, 4)], torch.zeros(1, 3, 4, 4), mask)
    with pytest.raises(ValueError, match="one rectangle"):
        find_frames([(4, 4)], torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))


def pixels_like(image, colour, tolerance=40):
    """(x, y) of all pixels of nearly a colour, as a float tensor [N, 2]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = flat.view(image.height, image.width, 3).int()
    near = (pixels - torch.tensor(colour)).abs().amax(-1) <= tolerance
    return near.nonzero().flip(-1).double()


@pytest.mark.parametrize("view", [View(0, 0, 4.0, (400, 320)), View(30, 20, 8.0, (320, 240))])
def test_a_point_is_drawn_where_it_is(view) -> None:
    image = Image.new("RGB", (100, 80), "white")
    shown = detection((35, 25, 45, 35), [(52.25, 40.5)], [0.4])
    drawing = draw_look(image, shown, view)
    assert drawing.size == view.size
    disc = pixels_like(drawing, (235, 178, 50))  # the first head's colour over white
    centre = disc.mean(0) + 0.5  # a pixel's centre
    expected = ((52.25 - view.left) * view.zoom, (40.5 - view.top) * view.zoom)
    assert centre.tolist() == pytest.approx(expected, abs=0.6)
    assert colours(1)[0] == (230, 159, 0)


def test_the_area_of_a_point_is_its_weight() -> None:
    image = Image.new("RGB", (100, 100), "white")
    shown = detection((0, 0, 5, 5), [(30, 50), (70, 50)], [0.8, 0.2])
    drawing = draw_look(image, shown, View(0, 0, 6.0, (600, 600)))
    disc = pixels_like(drawing, (235, 178, 50))
    left, right = int((disc[:, 0] < 300).sum()), int((disc[:, 0] > 300).sum())
    assert left / right == pytest.approx(4, rel=0.2)


def test_the_reference_point_and_the_box_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (100, 100), (0, 0, 160))
    shown = detection((20, 30, 60, 80), [(99, 99)], [0.0], reference=(40, 50))
    drawing = draw_look(image, shown, View(0, 0, 5.0, (500, 500)))
    white = pixels_like(drawing, (255, 255, 255), 20)
    low, high = white.min(0).values.tolist(), white.max(0).values.tolist()
    assert low == pytest.approx([100, 150], abs=1)
    assert high == pytest.approx([299, 399], abs=1)
    inner = white[((white - torch.tensor([200.0, 250.0])).abs() < 30).all(1)]
    assert (inner.mean(0) + 0.5).tolist() == pytest.approx([200, 250], abs=0.6)


def test_small_images_are_enlarged_and_boxes_with_them() -> None:
    image = Image.new("RGB", (160, 120))
    drawing = draw_detections(image, [detection((40, 30, 120, 90), [(0.0, 0.0)])])
    assert drawing.size == (640, 480)
    assert max(drawing.size) >= MIN_LONGER_SIDE
    colour = drawing.getpixel((160, 300))  # on the left side of the box
    assert sum(colour) > 200
    assert drawing.getpixel((300, 300)) == (0, 0, 0)
    assert draw_detections(Image.new("RGB", (2000, 900)), []).size == (2000, 900)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (160, 160)])
def test_images_of_any_shape_are_drawn(size) -> None:
    image = Image.new("RGB", size)
    boxes = [(0, 0, size[0], size[1]), (-50, -50, 5000, 5000), (-9, -9, -3, -3)]
    detections = [detection(box, [(0.5, 0.5), (1e6, -1e6), (float("nan"), 0.0)]) for box in boxes]
    assert draw_detections(image, detections).size[0] >= 1
    result = ImageResult(detections, Frame(size, size, (0, 0, *size)), 1, 2)
    assert draw_looks(image, result, 0.5).width >= 700


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 12, 30])
def test_looks_of_any_number_of_objects_are_drawn(count) -> None:
    image = Image.new("RGB", (160, 120))
    detections = [detection((10, 10, 60, 60), [(30, 30), (50, 50)], reference=(35, 35))] * count
    result = ImageResult(detections, Frame((160, 120), (160, 120), (0, 0, 160, 120)), 6, 6)
    drawing = draw_looks(image, result, 0.5)
    assert max(drawing.size) < 1800
    assert MAX_OBJECTS == 12


def test_a_view_holds_the_box_and_the_points_and_stays_inside() -> None:
    shown = detection((10, 10, 30, 30), [(20, 20), (60, 25), (-40, 20)], reference=(20, 20))
    view = find_view(shown, (400, 300), (400, 300))
    x0, y0, x1, y1 = view.window
    assert x0 >= 0
    assert y0 >= 0
    assert x0 <= 10
    assert y0 <= 10
    assert x1 >= 60
    assert y1 >= 30
    assert x1 - x0 < 200  # it is a part of the image, enlarged
    whole = find_view(detection((0, 0, 380, 290), [(20, 20)]), (400, 300), (400, 300))
    assert whole.window == pytest.approx((0, 0, 400, 300))
