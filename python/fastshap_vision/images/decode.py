"""Image files as pixels: upright, 8 bits, greyscale or RGB. What a file does not say is refused, not guessed."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

#: Formats whose whole numbers of more than 8 bits, Pillow's mode "I", always range from 0 to 65535.
_SIXTEEN_BITS = ("PNG", "PPM")


def suffixes() -> frozenset[str]:
    """The endings, ".png" and the like, of all files that Pillow reads by itself."""
    endings = Image.registered_extensions()  # which loads every plugin
    readers = {name: reader for name, (reader, _) in Image.OPEN.items() if not _is_stub(reader)}
    return frozenset(suffix for suffix, name in endings.items() if name in readers)


def _is_stub(reader: object) -> bool:
    """Whether Pillow knows the format but leaves the reading to others (HDF5, GRIB)."""
    return isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)


class TooManyPixels(ValueError):
    """An image with more pixels than asked for."""


def decode(
    source: str | Path | IO[bytes], mode: str, *, formats: tuple[str, ...] | None = None, pixels: int | None = None
) -> Image.Image:
    """Reads an image as a viewer shows it; of several frames or pages, the first.

    It is turned as its EXIF data say. What is transparent becomes white. 16 bits become 8 (value / 257, rounded).
    Floats are pixels from 0 to 1; others are refused, and so are whole numbers of 32 bits, whose range no file says.
    Other modes (palettes, CMYK) are as Pillow converts them; colour profiles are not applied.

    Args:
        source: a path, or an open file.
        mode: "L" (greyscale) or "RGB".
        formats: Pillow's names of those that are read; None for all.
        pixels: the largest number, which is checked before they are decoded; None for Pillow's own limit.

    Raises:
        ValueError: for a file that is no image, is damaged or of an unknown range; it says why, the caller says where.
        TooManyPixels: for an image that is too large.
        FileNotFoundError: for a path without a file.
    """
    try:
        with Image.open(source, formats=formats) as image:
            if pixels is not None and image.width * image.height > pixels:
                raise TooManyPixels(f"{image.width} × {image.height} pixels are more than {pixels}")
            image.load()
            return as_viewed(image, mode)
    except (FileNotFoundError, MemoryError, TooManyPixels):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"{error}") from error
    except UnidentifiedImageError as error:
        raise ValueError("Pillow knows no such format") from error
    except Exception as error:  # Pillow's decoders raise errors of any kind on damaged files
        raise ValueError(f"{error}" or type(error).__name__) from error


def as_viewed(image: Image.Image, mode: str) -> Image.Image:
    """An open image as `decode` reads it; the image itself where nothing has to change.

    Raises:
        ValueError: for pixels of an unknown range.
    """
    viewed = _without_transparency(_eight_bits(_upright(image), image.format))
    return viewed if viewed.mode == mode else viewed.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image  # which would copy it
    except Exception:  # damaged EXIF data, which say nothing, on an image that is whole
        return image


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Greyscale of 16 bits or floats as 8 bits; others as they are."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in _SIXTEEN_BITS):
        pixels = np.asarray(image) / 257
    elif image.mode == "F":
        pixels = np.asarray(image) * 255
        if not (pixels.min() >= 0 and pixels.max() <= 255):  # NaN is neither
            raise ValueError("its floats are not all from 0 to 1. Scale them, or save it with 8 or 16 bits")
    elif image.mode == "I":
        raise ValueError("its whole numbers of 32 bits have no known range. Save it with 8 or 16 bits")
    else:
        return image
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _without_transparency(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def read_image(path: str | Path, mode: str) -> Image.Image:
    """An image file as "L" or "RGB"."""
    try:
        return decode(path, mode)
    except FileNotFoundError:
        raise ValueError(f"there is no image {str(path)!r}. Check the path.") from None
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is not an image that can be read: {error}. Replace it, or take it out of the data."
        ) from error
