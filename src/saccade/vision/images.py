"""Opening image files: any common format becomes 8-bit RGB, turned upright."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from saccade.files import open_regular
from saccade.vision import MAX_MEGAPIXELS

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""The formats that are read, by Pillow's names. A file's content decides, not its name.

Pillow's other readers are left out: EPS starts Ghostscript, and the rest is rarely used or tested.
"""
_MAX_BYTES_PER_PIXEL = 16  # in a file: four channels of 32 bits
# A progressive JPEG file is decoded scan by scan. Each passes over the whole image, for some hundred bytes of
# the file. Encoders write about ten.
_MAX_SCANS = 500
_MAX_READS = 10**6  # A PNG file of 100 megapixels in small chunks takes about 200,000.
# Pillow's limit and the filters of warnings are variables of the process.
_LOCK = threading.Lock()


class ImageError(Exception):
    """An image cannot be read; the message states the reason, without the path."""


def open_image(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Reads an image as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent parts become white, and of several frames the first is read. Values of 16 bits keep
    their upper 8 bits. Wider integers and floats are stretched, so that the smallest becomes black
    and the largest white.

    Args:
        path: a regular file in one of the `FORMATS`; AVIF needs a Pillow that was built with it.
        max_megapixels: the largest width times height, in millions of pixels. A small file can hold
            a large image, and `detect` takes about 14 bytes of memory per pixel.

    Raises:
        ImageError: the file is missing, is not an image, is too large, or is broken.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise ImageError("does not exist") from error
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ImageError(str(error)) from error
    size = os.fstat(file.fileno()).st_size
    if size > _MAX_BYTES_PER_PIXEL * max_megapixels * 1e6:
        file.close()
        raise ImageError(
            f"is a file of {size / 1e6:.0f} MB: expected at most {_MAX_BYTES_PER_PIXEL} bytes per "
            f"pixel of --max-megapixels, {max_megapixels:g}"
        )
    try:
        with _CountingReader(file.detach()) as reader, _LOCK, _limit_pixels(max_megapixels):
            return _read(reader)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"(\d+) pixels", str(error))
        count = f"{int(pixels[1]) / 1e6:.1f}" if pixels else "more"
        raise ImageError(
            f"has {count} megapixels: expected at most {max_megapixels:g}, the limit that "
            "--max-megapixels sets"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"is not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise errors of many types for broken files
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise ImageError(f"is broken: {reason}") from error


class _CountingReader(io.BufferedReader):
    """A file with a bounded number of reads: Pillow looks for the next marker of some formats byte by byte."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise ValueError("it has too many parts, or a header without end")
        return super().read(size)


@contextlib.contextmanager
def _limit_pixels(max_megapixels: float) -> Iterator[None]:
    """Makes Pillow refuse larger images, frames and tiles, and silences its other warnings."""
    previous = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = int(max_megapixels * 1e6)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def _read(file: io.BufferedReader) -> Image.Image:
    Image.init()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        if 0 in image.size:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        if image.info.get("progressive"):
            _check_scans(file)
        image.load()
        # Data that cannot be parsed states no orientation.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return _convert_to_rgb(image)


def _check_scans(file: io.BufferedReader) -> None:
    file.seek(0)
    chunks = iter(lambda: file.read(2**20), b"")
    scans = sum(chunk.count(b"\xff\xda") for chunk in chunks)  # the marker that starts a scan
    if scans > _MAX_SCANS:
        raise ValueError(f"it has {scans} scans: expected at most {_MAX_SCANS}")


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and _fits_16_bits(image)):
        # convert("RGB") would clip everything above 255 to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        floats = image.convert("F")
        if not np.isfinite(np.asarray(floats)).all():
            raise ValueError("some of its values are not finite numbers")
        low, high = floats.getextrema()
        assert isinstance(low, float)
        assert isinstance(high, float)
        scale = 255 / (high - low) if high > low else 1.0
        return floats.point(lambda level: level * scale - low * scale).convert("L").convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        page = Image.new("RGB", layers.size, "white")
        page.paste(layers, mask=layers)
        return page
    return image.convert("RGB")


def _fits_16_bits(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool(values.min() >= 0 and values.max() < 2**16)
