"""Opening pictures: any common kind becomes 8-bit RGB, upright."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


class PictureError(Exception):
    """A picture that cannot be read; the message says why, without the path."""


def open_picture(path: Path) -> Image.Image:
    """Reads a picture as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent parts become white; 16-bit pictures keep their upper 8 bits; of several frames the
    first is read.

    Raises:
        PictureError: there is no such file, it is no picture, or it is broken.
    """
    if path.is_dir():
        raise PictureError("is a folder, not a picture")
    try:
        with Image.open(path) as picture:
            picture.load()
            upright: Image.Image = ImageOps.exif_transpose(picture)
            return _as_rgb(upright)
    except FileNotFoundError as error:
        raise PictureError("there is no such file") from error
    except PermissionError as error:
        raise PictureError("may not be read") from error
    except UnidentifiedImageError as error:
        raise PictureError("is not a picture that Pillow can read") from error
    except Exception as error:  # broken files make decoders raise nearly anything
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise PictureError(f"is broken: {reason}") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # 16-bit greyscale: convert("RGB") would clip everything above 255 to white.
        wide = picture.convert("I")
        return wide.point(lambda level: level * (1 / 257), "F").convert("L").convert("RGB")
    if picture.mode == "F":
        low, high = picture.getextrema()
        assert isinstance(low, float)
        assert isinstance(high, float)
        scale = 255 / (high - low) if high > low else 1.0
        return picture.point(lambda level: level * scale - low * scale).convert("L").convert("RGB")
    if picture.has_transparency_data:
        layers = picture.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB")
    return picture.convert("RGB")
