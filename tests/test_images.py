"""Image files: which formats are read and how, and what is refused before it takes memory or time."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
from PIL import features  # noqa: E402

from saccade.vision.images import FORMATS, ImageError, open_image  # noqa: E402

RED, WHITE = (255, 0, 0), (255, 255, 255)


def png(width: int, height: int) -> bytes:
    """A PNG file whose header alone is right."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def test_no_reader_is_used_that_starts_a_program(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    assert Image.open(path).format == "EPS"
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ImageError, match=r"is not an image that can be read \(PNG, JPEG"):
        open_image(path)


@pytest.mark.parametrize(
    "start",
    [
        b"\xff\xd8\xff\xe0\0\x02",  # JPEG, then no marker
        b"GIF89a\1\0\1\0\0\0\0",  # then no block
        b"P6 9 #",  # PPM with a comment
    ],
)
def test_a_header_without_end_is_refused(tmp_path, monkeypatch, start) -> None:
    monkeypatch.setattr("saccade.vision.images._MAX_READS", 1000)
    path = tmp_path / "x.png"
    path.write_bytes(start)
    os.truncate(path, 2**20)
    with pytest.raises(ImageError, match="is broken: it has too many parts, or a header without"):
        open_image(path)


@pytest.mark.parametrize("name", FORMATS)
def test_the_content_decides_about_the_format(tmp_path, name) -> None:
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(name)
    if feature and not features.check(feature):
        pytest.skip(f"this Pillow was built without {name}")
    Image.new("RGB", (16, 8), RED).save(tmp_path / "x.txt", format=name)
    image = open_image(tmp_path / "x.txt")
    assert (image.mode, image.size) == ("RGB", (16, 8))
    assert max(abs(a - b) for a, b in zip(image.getpixel((3, 3)), RED, strict=True)) <= 3


def test_a_large_image_is_refused_by_its_header(tmp_path) -> None:
    (tmp_path / "x.png").write_bytes(png(13370, 13370))
    with pytest.raises(ImageError, match=r"has 178\.8 megapixels.*at most 100.*--max-megapixels"):
        open_image(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    with pytest.raises(ImageError, match="megapixels: expected at most 100"):
        open_image(tmp_path / "x.png")
    Image.new("L", (1001, 1000)).save(tmp_path / "y.png")
    with pytest.raises(ImageError, match=r"has 1\.0 megapixels: expected at most 1,"):
        open_image(tmp_path / "y.png", max_megapixels=1)
    assert open_image(tmp_path / "y.png", max_megapixels=2).size == (1001, 1000)


def test_the_limit_replaces_that_of_pillow(tmp_path, monkeypatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "x.png").size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_frame_that_is_larger_than_its_image_is_refused(tmp_path) -> None:
    """The header of this GIF file says 4 x 4; its first frame is 60000 x 60000."""
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, 60000, 60000, 0) + b"\x02\x02\x44\x01\x00;"
    (tmp_path / "x.gif").write_bytes(b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + frame)
    with pytest.raises(ImageError, match="3600.0 megapixels"):
        open_image(tmp_path / "x.gif")


def test_a_file_that_is_too_large_is_not_read(tmp_path) -> None:
    """Pillow's reader of WebP begins by reading the whole file."""
    (tmp_path / "x.webp").write_bytes(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
    os.truncate(tmp_path / "x.webp", 2**35)
    with pytest.raises(ImageError, match=r"is a file of 34360 MB: expected at most 16 bytes per"):
        open_image(tmp_path / "x.webp")


def test_a_progressive_image_of_very_many_scans_is_not_decoded(tmp_path) -> None:
    """A scan of 100 megapixels takes 140 bytes and 60 ms."""
    path = tmp_path / "x.jpg"
    Image.new("L", (64, 64), 128).save(path, progressive=True)
    content = path.read_bytes()
    scan = content[content.rfind(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + 400 * scan + content[-2:])
    assert open_image(path).getpixel((3, 3)) == (128, 128, 128)
    path.write_bytes(content[:-2] + 600 * scan + content[-2:])
    with pytest.raises(ImageError, match=r"it has 606 scans: expected at most 500"):
        open_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_every_orientation(tmp_path, orientation, suffix) -> None:
    """The corner that is the upper left one of the upright image is white."""
    corners = {
        1: (0, 0),
        2: (1, 0),
        3: (1, 1),
        4: (0, 1),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }
    x, y = corners[orientation]
    image = Image.new("RGB", (32, 16))
    image.paste("white", (16 * x, 8 * y, 16 * x + 16, 8 * y + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    upright = open_image(tmp_path / f"x.{suffix}")
    assert upright.size == ((32, 16) if orientation <= 4 else (16, 32))
    assert min(upright.getpixel((3, 3))) > 250
    assert max(upright.getpixel((upright.width - 4, upright.height - 4))) < 5


def test_exif_data_that_cannot_be_parsed_states_no_orientation(tmp_path) -> None:
    garbage = b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"
    Image.new("RGB", (16, 8), RED).save(tmp_path / "x.jpg", exif=garbage)
    assert open_image(tmp_path / "x.jpg").size == (16, 8)


def grey_levels(array, path) -> list[int]:
    Image.fromarray(np.asarray(array)).save(path)
    return list(open_image(path).convert("L").tobytes())


def test_values_that_are_not_bytes(tmp_path) -> None:
    wide = np.array([[0, 255], [256, 65535]])
    for suffix in ("png", "tif"):
        assert grey_levels(wide.astype(np.uint16), tmp_path / f"x.{suffix}") == [0, 0, 1, 255]
    assert grey_levels(wide.astype(np.int32), tmp_path / "x.tif") == [0, 0, 1, 255]
    wider = np.array([[-(2**31), 2**31 - 1], [0, 0]], np.int32)
    assert grey_levels(wider, tmp_path / "x.tif") == [0, 255, 127, 127]
    floats = np.array([[-3e38, 3e38], [0, 0]], np.float32)
    assert grey_levels(floats, tmp_path / "x.tif") == [0, 255, 127, 127]
    for value in (np.nan, np.inf):
        with pytest.raises(ImageError, match="not finite numbers"):
            grey_levels(np.array([[0, value]], np.float32), tmp_path / "x.tif")


def test_palettes_transparency_and_other_colours(tmp_path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    palette.save(tmp_path / "half.png", transparency=bytes([255, 128]))
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    colours = {
        "opaque.png": RED, "clear.png": WHITE, "half.png": (255, 127, 127), "grey.png": WHITE,
        "cmyk.tif": RED,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name: open_image(tmp_path / name).getpixel((1, 1)) for name in colours} == colours


@pytest.mark.parametrize("suffix", ["gif", "png", "tif"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, "blue")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / f"x.{suffix}").getpixel((1, 1)) == RED


def test_files_that_hold_no_pixels(tmp_path) -> None:
    (tmp_path / "x.png").write_bytes(png(0, 5))
    with pytest.raises(ImageError, match="is not an image|has 0 x 5 pixels"):
        open_image(tmp_path / "x.png")
    (tmp_path / "x.ppm").write_bytes(b"P6 0 5 255\n")
    with pytest.raises(ImageError, match="is not an image|has 0 x 5 pixels|is broken"):
        open_image(tmp_path / "x.ppm")


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/dev/zero", "is a device"), (".", "is a folder"), ("no.png", "does not exist")],
)
def test_what_is_not_a_regular_file(path, reason) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(Path(path))
