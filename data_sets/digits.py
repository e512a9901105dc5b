"""Ten classes of drawn RGB digits: a data set that needs no download.

Like SYN DIGITS (Ganin and Lempitsky, ICML 2015, arXiv:1409.7495): digits of varying font, size, position, rotation
and colour, with neighbours at the edges, blur and noise. The label is the digit in the middle, drawn over the others.
The test fonts do not occur in training. The bytes depend on the versions of Pillow and NumPy.
"""

from contextlib import suppress
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_sets import SIDE
from runtime.errors import UserError
from runtime.files import load_arrays, save_arrays

VERSION = 3  # part of the cache's file names: raise it with every change to the images
FONTS = {
    "train": "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique "
    "DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-BoldItalic "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic cmb10 cmr10",
    "test": "DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSerif-Italic STIXGeneralBolIta cmss10 cmtt10",
}
# The difficulty, in pixels of a 32 x 32 image and in levels of 255; a pair is the range of a uniform distribution.
HEIGHT, STRETCH = (16, 26), (0.7, 1.3)  # of a digit; its width is multiplied by STRETCH
ROTATION = 23  # degrees, at most
OFFSET = 2  # of the labelled digit from the image's centre, at most, along each axis
NEIGHBOUR = 0.75  # probability of another digit at each of the four edges
NEIGHBOUR_DISTANCE, NEIGHBOUR_ALONG = (15, 21), (-8, 8)  # of its centre, towards the edge and along it
ALIKE = 0.4  # probability that the neighbours share the labelled digit's font and colour
BACKGROUND, CONTRAST = (10, 120), (50, 150)  # grey level, and a digit's difference from it
TINT = 45  # of each colour channel, at most
BLUR, NOISE = 1.2, 20  # largest standard deviations, in pixels and in levels


def make_digits(split: str, count: int, seed: int = 0, size: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, S, S, 3) uint8, labels (count,) int64: each ten have every class; a smaller count is a prefix."""
    stream = list(FONTS).index(split)
    fonts = [Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in FONTS[split].split()]
    glyphs = [draw_glyphs(ImageFont.truetype(font, 100)) for font in fonts]
    blocks = [np.random.default_rng([stream, seed, 0, i]).permutation(10) for i in range(-(-count // 10))]
    labels = np.array(blocks, dtype=np.int64).reshape(-1)[:count]
    pixels = np.empty((count, size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        pixels[i] = draw_image(glyphs, label, np.random.default_rng([stream, seed, 1, i]), size)
    return pixels, labels


def cached_digits(folder: Path, split: str, count: int, size: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """`make_digits` with seed 0, kept in a file in `folder` if that can be written."""
    larger = "" if size == SIDE else f"_size{size}"
    path = folder / f"digits_v{VERSION}_pillow{PIL.__version__}_{split}_{count}{larger}.npz"
    with suppress(ValueError):  # missing or damaged: then the images are drawn again
        stored = load_arrays(path, path.stem)
        return stored["pixels"], stored["labels"]
    pixels, labels = make_digits(split, count, size=size)
    with suppress(UserError):
        save_arrays(path, path.stem, pixels=pixels, labels=labels)
    return pixels, labels


def draw_glyphs(font: ImageFont.FreeTypeFont) -> list[Image.Image]:
    """A font's ten digits as grey pictures without margins."""
    glyphs = []
    for digit in "0123456789":
        glyph = Image.new("L", (200, 200))
        ImageDraw.Draw(glyph).text((50, 50), digit, fill=255, font=font)
        glyphs.append(glyph.crop(glyph.getbbox()))
    return glyphs


def draw_image(glyphs: list[list[Image.Image]], label: int, random: np.random.Generator, size: int) -> np.ndarray:
    """One image (size, size, 3) uint8 of a label, the same at each size; `glyphs` are indexed by font and digit."""
    alike = random.random() < ALIKE
    grey = random.uniform(*BACKGROUND)
    image = Image.new("RGB", (size, size), tint(grey, random))
    font, colour = random.integers(len(glyphs)), digit_colour(grey, random)
    for edge in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        if random.random() < NEIGHBOUR:
            distance, along = random.uniform(*NEIGHBOUR_DISTANCE), random.uniform(*NEIGHBOUR_ALONG)
            centre = distance * np.array(edge) + along * np.array(edge[::-1])
            other_font, other_colour = random.integers(len(glyphs)), digit_colour(grey, random)
            glyph = glyphs[font if alike else other_font][random.integers(10)]
            image.paste(colour if alike else other_colour, mask=place(glyph, centre, random, size))
    image.paste(colour, mask=place(glyphs[font][label], random.uniform(-OFFSET, OFFSET, 2), random, size))
    image = image.filter(ImageFilter.GaussianBlur(BLUR * random.random() ** 0.5 * size / SIDE))
    noisy = np.asarray(image) + random.normal(0, random.uniform(0, NOISE), (size, size, 3))
    return noisy.round().clip(0, 255).astype(np.uint8)


def digit_colour(background: float, random: np.random.Generator) -> tuple[int, ...]:
    """A random colour that is darker or lighter than a background's grey level; darker more often on a light one."""
    contrast = random.uniform(*CONTRAST)
    return tint(background + (-contrast if random.uniform(0, 255) < background else contrast), random)


def tint(grey: float, random: np.random.Generator) -> tuple[int, ...]:
    """A random RGB colour near a grey level."""
    return tuple((grey + random.uniform(-TINT, TINT, 3)).clip(0, 255).astype(int).tolist())


def place(glyph: Image.Image, centre: np.ndarray, random: np.random.Generator, size: int) -> Image.Image:
    """A glyph's mask (size, size), grey, `centre` from the image's centre, of random height, stretch and rotation."""
    zoom = glyph.height / random.uniform(*HEIGHT)
    angle = np.deg2rad(random.uniform(-ROTATION, ROTATION))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.array([[zoom / random.uniform(*STRETCH)], [zoom]]) * rotation  # from a 32 x 32 image to glyph
    x, y = np.array(glyph.size) / 2 - matrix @ (centre + SIDE / 2)
    (a, b), (c, d) = matrix * (SIDE / size) / 2  # four samples per pixel, then averaged
    return glyph.transform((2 * size, 2 * size), Image.Transform.AFFINE, (a, b, x, c, d, y)).reduce(2)
