"""Pictures of any size and format as square RGB pixels: every file becomes an image here."""

import contextlib
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from data_sets import SIDE, padding
from runtime.errors import UserError
from runtime.files import UNREADABLE

LARGEST_TEXT = 64 * 2**20  # bytes of a PNG's text or colour profile; Pillow's limit of 1 MiB rejects valid files
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
HEIC = (b"ftyphe", b"ftypmif1", b"ftypmsf1")  # from byte 4 of a file


def square(picture: Image.Image, size: int = SIDE) -> np.ndarray:
    """A picture's centre square (size, size, 3) uint8: upright by its EXIF, transparency on white; see `eight_bits`."""
    tiff_tags = getattr(picture, "tag_v2", {})
    picture.load()
    with contextlib.suppress(*UNREADABLE):  # EXIF that can't be read gives no orientation
        picture.getexif()  # cached for exif_transpose; other tags, which may be invalid, are dropped, not encoded again
    picture.info.pop("exif", None)
    picture.info.pop("Raw profile type exif", None)
    picture = eight_bits(ImageOps.exif_transpose(picture), picture.format, tiff_tags)
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    picture = ImageOps.fit(picture.convert(mode), (size, size), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.array(picture)


def eight_bits(picture: Image.Image, file_format: str | None, tiff_tags: Mapping[int, Any]) -> Image.Image:
    """A picture with at most 8 bits per channel; UserError if the range of its values is unknown."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    if picture.mode.startswith("I;16"):
        known = file_format in (None, "PNG", "JPEG2000") or tiff_tags.get(BITS_PER_SAMPLE) == (16,)
    else:  # Pillow scales PPM to 16 bits, and older versions read 16-bit PNG files in mode I
        known = picture.mode == "I" and file_format in ("PNG", "PPM")
    if not known:
        raise UserError(f"mode {picture.mode} has no known range of values: save the picture with 8 bits per channel")
    grey = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    # Pillow inverts TIFF files in which 0 is white only up to 8 bits.
    return ImageOps.invert(grey) if tiff_tags.get(PHOTOMETRIC) == 0 else grey


def read_picture(path: Path, size: int = SIDE) -> np.ndarray:
    """The `square` of a picture file; UserError if it is missing, damaged or huge."""
    PngImagePlugin.MAX_TEXT_CHUNK = LARGEST_TEXT
    try:
        with open(path, "rb") as file:
            try:
                return decode(file, size)
            except OSError:
                file.seek(0)
                if file.read(2) != b"\xff\xd8":  # not a JPEG
                    raise
                return decode(add_jpeg_end(file), size)
    except (UserError, Image.DecompressionBombError) as error:
        why = str(error)
    except UNREADABLE as error:  # no such file, say
        why = getattr(error, "strerror", None) or "damaged, or not a picture that Pillow can read"
    raise UserError(f"{path}: {why}")


def decode(file: BinaryIO, size: int) -> np.ndarray:
    """The `square` of an open picture file; raises as Pillow does, and UserError."""
    with open_picture(file) as picture:
        picture.draft("RGB", (4 * size, 4 * size))  # a large JPEG is decoded at a fraction of its size
        return square(picture, size)


def open_picture(file: BinaryIO) -> Image.Image:
    """Image.open, with pillow_heif for iPhone photos (HEIC); UserError if they need it and it is not installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(4)
        if not file.read(8).startswith(HEIC):
            raise
    try:
        import pillow_heif
    except ImportError:
        raise UserError("HEIC/HEIF pictures need another package: pip install --upgrade pillow pillow-heif") from None
    pillow_heif.register_heif_opener()
    return Image.open(file)


def add_jpeg_end(file: BinaryIO) -> BinaryIO:
    """A JPEG file with an end marker added, as browsers read it; OSError if more than the marker is missing."""
    file.seek(0)
    data = file.read()
    # Other bytes in front of the marker change the pixels only if image data is missing.
    filled = [io.BytesIO(data + filler + b"\xff\xd9") for filler in (b"", b"\x55" * 64)]
    if Image.open(filled[0]).tobytes() != Image.open(filled[1]).tobytes():
        raise OSError("image data is missing")
    return filled[0]


def check_memory(images: int, size: int) -> None:
    """UserError if there is too little memory for the images and their padded copy."""
    needed, available = 3 * images * (size**2 + (size + 2 * padding(size)) ** 2), available_memory()
    if needed > available:
        what = f"{images:,} images of {size} x {size} pixels need {needed / 1e9:.1f} GB of memory"
        raise UserError(f"{what}, and {available / 1e9:.1f} GB are free: give a smaller --size, or remove images")


def available_memory() -> float:
    """Bytes of available memory on Linux; infinite elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[0])
    return math.inf
