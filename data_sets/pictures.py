"""Pictures of any size and format as square RGB pixels: every file becomes an image here."""

import contextlib
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from data_sets import SIDE, padding
from runtime.errors import UserError
from runtime.files import UNREADABLE

SMALLEST = 8  # pixels along a side; a smaller picture shows nothing
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
# Pictures that Pillow alone may not read, by bytes 4 to 11 of the file.
FORMATS = {b"ftyp" + brand: "HEIC/HEIF" for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")}
FORMATS |= {b"ftypavif": "AVIF", b"ftypavis": "AVIF"}


def square(picture: Image.Image, size: int = SIDE) -> np.ndarray:
    """A picture's centre square (size, size, 3) uint8: upright by its EXIF, transparency on white; see `eight_bits`."""
    tiff_tags = getattr(picture, "tag_v2", {})
    picture.load()
    with contextlib.suppress(SyntaxError, ValueError):  # EXIF that can't be read gives no orientation
        picture.getexif()  # is kept: the orientation is read, and other tags, which may be wrong, are not encoded again
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


def read_picture(path: Path, smallest: int = SMALLEST, size: int = SIDE) -> np.ndarray:
    """The `square` of a picture file; UserError if it is damaged, huge or too small."""
    try:
        if not path.is_file():  # opening a pipe would block
            raise UserError("not an existing file")
        with open(path, "rb") as file:
            try:
                return decode(file, smallest, size)
            except OSError:
                file.seek(0)
                if file.read(2) != b"\xff\xd8":  # not a JPEG
                    raise
                return decode(add_jpeg_end(file), smallest, size)
    except (UserError, Image.DecompressionBombError) as error:
        why = str(error)
    except UNREADABLE as error:  # permission denied, say
        why = getattr(error, "strerror", None) or "damaged, or not a picture that Pillow can read"
    raise UserError(f"{path}: {why}")


def decode(file: BinaryIO, smallest: int, size: int) -> np.ndarray:
    """The `square` of an open picture file; raises as Pillow does, and UserError."""
    with open_picture(file) as picture:
        width, height = picture.size
        if min(width, height) < smallest:
            raise UserError(f"{width} x {height} pixels: the picture must have at least {smallest} x {smallest}")
        picture.draft("RGB", (4 * size, 4 * size))  # a large JPEG is decoded at a fraction of its size
        return square(picture, size)


def open_picture(file: BinaryIO) -> Image.Image:
    """Image.open, with pillow_heif for iPhone photos (HEIC); UserError if they need it and it is not installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(4)
        name = FORMATS.get(file.read(8))
        if name is None or (name == "AVIF" and features.check("avif")):
            raise
    try:
        import pillow_heif
    except ImportError:
        raise UserError(f"{name} pictures need another package: pip install --upgrade pillow pillow-heif") from None
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
    """UserError if the memory that images need, padded copy included, is not there."""
    needed, available = 3 * images * (size**2 + (size + 2 * padding(size)) ** 2), available_memory()
    if needed > available:
        what = f"{images:,} images of {size} x {size} pixels need {needed / 1e9:.1f} GB of memory"
        raise UserError(f"{what}, and {available / 1e9:.1f} GB are free: give a smaller --size, or fewer images")


def available_memory() -> float:
    """Bytes of available memory on Linux; infinite elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[0])
    return math.inf
