"""Any picture as 32 x 32 RGB pixels: the one way in which files become images here."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datasets import SIDE
from runtime.errors import UserError, reason

SMALLEST = 8  # pixels along a side, below which a picture shows nothing


def square(picture: Image.Image) -> np.ndarray:
    """A picture's middle square (32, 32, 3) uint8: upright by its EXIF, what is transparent on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    picture = ImageOps.fit(picture.convert(mode), (SIDE, SIDE), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.array(picture)


@contextlib.contextmanager
def bombs_refused() -> Iterator[None]:
    """Let Pillow's warning of a picture that unpacks to very many pixels be an error; in all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_picture(path: Path, smallest: int = SMALLEST) -> np.ndarray:
    """The `square` of a picture in a file, within `bombs_refused`.

    UserError in one line where it is missing, no picture, below `smallest` pixels along a side, or of far too many.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if min(width, height) < smallest:
                raise UserError(f"{path} is {width} x {height} pixels: give at least {smallest} x {smallest}")
            picture.draft("RGB", (4 * SIDE, 4 * SIDE))  # a large JPEG is decoded at a fraction of its size
            return square(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise UserError(f"{path} has more than {limit:.0f} million pixels: make it smaller") from None
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no picture {path}: check its name") from None
    except Exception as error:  # noqa: BLE001 - a damaged picture fails in as many ways as there are formats
        why = reason(error) if isinstance(error, OSError) and error.errno else "damaged, or no picture"
        raise UserError(f"can't read {path} ({why}): give a PNG, JPEG or WebP file") from error
