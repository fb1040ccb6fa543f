"""Opening image files: any common format becomes 8-bit RGB, turned upright."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(Exception):
    """An image cannot be read; the message states the reason, without the path."""


def open_image(path: Path) -> Image.Image:
    """Reads an image as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparent parts become white; 16-bit images keep their upper 8 bits; of several frames the
    first is read.

    Raises:
        ImageError: the file is missing, is not an image, or is broken.
    """
    if path.is_dir():
        raise ImageError("is a folder, not an image")
    try:
        with Image.open(path) as image:
            image.load()
            upright: Image.Image = ImageOps.exif_transpose(image)
            return _convert_to_rgb(upright)
    except FileNotFoundError as error:
        raise ImageError("does not exist") from error
    except PermissionError as error:
        raise ImageError("cannot be read: permission denied") from error
    except UnidentifiedImageError as error:
        raise ImageError("is not an image that Pillow can read") from error
    except Exception as error:  # decoders raise errors of many types for broken files
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise ImageError(f"is broken: {reason}") from error


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit greyscale: convert("RGB") would clip everything above 255 to white.
        wide = image.convert("I")
        return wide.point(lambda level: level * (1 / 257), "F").convert("L").convert("RGB")
    if image.mode == "F":
        low, high = image.getextrema()
        assert isinstance(low, float)
        assert isinstance(high, float)
        scale = 255 / (high - low) if high > low else 1.0
        return image.point(lambda level: level * scale - low * scale).convert("L").convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")
