"""Ten classes of 32 x 32 RGB digits, drawn on the fly: a data set for a machine that can download nothing.

In the manner of SYN DIGITS (Ganin and Lempitsky, ICML 2015, arXiv:1409.7495): a digit of any font, size,
place, turn and colour, neighbours cut off by the edges, blur and noise. The label is the digit in the middle,
which lies over the others. The splits share no font: what is tested is reading faces never seen.

The bytes depend on the arguments, the constants below, the digits' outlines in the font files that matplotlib
ships (in font units, unhinted: the files' own integers, whatever the FreeType) and PCG64's raw stream, which
NumPy keeps from version to version. The rest is integer arithmetic, and float64 sums, products and quotients
element by element, which IEEE 754 rounds alike on every processor: no sine, no BLAS, no float reduction.
"""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib import ft2font, get_data_path

from datasets import SIDE

VERSION = 2  # names the cache's files: raise it with every change that alters the bytes
SPLIT_FONTS = {  # those that matplotlib shipped before 3.11 too
    "train": "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Oblique "
    "DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-BoldItalic "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic cmb10 cmr10",
    "test": "DejaVuSans-BoldOblique DejaVuSansMono-Bold DejaVuSerif-Italic STIXGeneralBolIta cmss10 cmtt10",
}

# The difficulty, in pixels and in levels of 255; a pair is the range of a uniform draw.
HEIGHT, STRETCH = (16, 26), (0.7, 1.3)  # stretched in width alone
TURN = 0.2  # the tangent of half the largest rotation: 0.2 is 23 degrees
OFFSET = 2  # of the labelled digit's centre from the image's, at most, along each axis
NEIGHBOUR = 0.75  # the probability of another digit at an edge, for each of the four
NEIGHBOUR_DISTANCE, NEIGHBOUR_ALONG = (15, 21), (-8, 8)  # of its centre, towards the edge and along it
ALIKE = 0.4  # the probability that the neighbours share the labelled digit's font and colour
PAPER, CONTRAST = (10, 120), (50, 150)  # the background's grey, and a digit's difference from it
TINT = 45  # each channel's departure from its grey, at most
BLUR_PASSES = 3  # of a [1 2 1] / 4 filter along both axes, of which each image takes its own share
NOISE = 20  # the largest standard deviation of an image's noise

SAMPLES, BATCH = 2, 25  # samples along a pixel's side; images drawn at once, for speed alone
CELL, CELL_HEIGHT = 96, 88  # a glyph's mask and the glyph in it
EDGES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # the labelled digit's, then its neighbours'


def make_digits(split: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 and labels (count,) int64 of "train" or "test", after arXiv:1409.7495.

    Every ten images in a row, from the first, hold each class once, and fewer images are a prefix of more.
    ValueError for another split, a negative count or a negative seed.
    """
    labels, bits = _draw_labels(split, count, seed), [_bits(split, k, seed) for k in (1, 2, 3)]
    masks = np.stack([_glyph_masks(font) for font in SPLIT_FONTS[split].split()])
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for start in range(0, count, BATCH):
        images[start : start + BATCH] = _draw_images(masks, labels[start : start + BATCH], *bits)
    return images, labels


def cached_digits(folder: str | Path, split: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As `make_digits`, and kept in `folder`, which is made; where it cannot be written, nothing is kept."""
    labels = _draw_labels(split, count, seed)
    path = Path(folder, f"digits_v{VERSION}_{split}_{count}_seed{seed}.npz")
    # A damaged file raises nearly anything, and the cure is always to draw again.
    with suppress(Exception), np.load(path) as stored:
        images, fits = stored["images"], np.array_equal(stored["labels"], labels)
        if fits and images.shape == (count, SIDE, SIDE, 3) and images.dtype == np.uint8:
            return images, labels
    images, labels = make_digits(split, count, seed)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as scratch:  # on the same disk, so that the move is atomic
            np.savez(Path(scratch, path.name), images=images, labels=labels)
            os.replace(Path(scratch, path.name), path)
    return images, labels


def _bits(split: str, stream: int, seed: int) -> np.random.PCG64:
    # The seed goes last: however long, it cannot run into the words that keep splits and streams apart.
    return np.random.PCG64([list(SPLIT_FONTS).index(split), stream, seed])


def _draw_labels(split: str, count: int, seed: int) -> np.ndarray:
    if split not in SPLIT_FONTS or count < 0:
        raise ValueError(f"split must be train or test and count at least 0, not {split!r} and {count}")
    words = _bits(split, 0, seed).random_raw((-(-count // 10), 10))
    return np.argsort(words, axis=1, kind="stable").reshape(-1)[:count].astype(np.int64)


def _uniform(words: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * ((words >> 11) * 2.0**-53)


def _draw_images(masks: np.ndarray, labels: np.ndarray, *bits: np.random.PCG64) -> np.ndarray:
    # An image is a row of each stream, whatever the number of images drawn.
    shapes = (len(EDGES), 14), (7,), (SIDE * SIDE * 3 // 2,)
    digits, scene, noise = (b.random_raw((len(labels), *s)) for b, s in zip(bits, shapes, strict=True))
    alike = _uniform(scene[:, :1], 0, 1) < ALIKE
    font, digit = (digits[..., 0] % len(masks)).astype(np.int32), (digits[..., 1] % 10).astype(np.int32)
    font, digit[:, 0] = np.where(alike, font[:, :1], font), labels
    centre = EDGES * _uniform(digits[..., 2:3], *NEIGHBOUR_DISTANCE)
    centre += (EDGES == 0) * _uniform(digits[..., 3:5], *NEIGHBOUR_ALONG)
    centre[:, 0] = _uniform(digits[:, 0, 3:5], -OFFSET, OFFSET)
    cover = _place(masks, font * 10 + digit, centre, digits[..., 5:8])
    cover[:, 1:] *= (_uniform(digits[:, 1:, 8], 0, 1) < NEIGHBOUR)[..., None, None]

    grey, contrast = _uniform(scene[:, 1:2], *PAPER), _uniform(digits[..., 9], *CONTRAST)
    ink = grey + np.where(_uniform(digits[..., 10], 0, 255) < grey, -contrast, contrast)
    ink = np.clip(ink[..., None] + _uniform(digits[..., 11:14], -TINT, TINT), 0, 255)
    ink = np.where(alike[..., None], ink[:, :1], ink)[:, :, None, None]
    paper = np.clip(grey + _uniform(scene[:, 2:5], -TINT, TINT), 0, 255)[:, None, None]
    image = np.tile(paper, (1, SIDE, SIDE, 1))
    for k in (1, 2, 3, 4, 0):  # the labelled digit last, so that no neighbour hides it
        image += (ink[:, k] - image) * cover[:, k, ..., None]

    share = _uniform(scene[:, 5], 0, 0.25)[:, None, None, None]
    before, after = np.maximum(np.arange(SIDE) - 1, 0), np.minimum(np.arange(SIDE) + 1, SIDE - 1)
    for axis in (1, 2) * BLUR_PASSES:
        image += (image.take(before, axis) + image.take(after, axis) - 2 * image) * share
    # Four random bytes add up to a number that is all but normal, of mean 510 and standard deviation 147.8.
    grain = noise.astype("<u8").view(np.uint8).reshape(-1, 4, SIDE, SIDE, 3).sum(1, np.int64) - 510
    image += grain * _uniform(scene[:, 6], 0, NOISE / 147.8)[:, None, None, None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _place(masks: np.ndarray, glyph: np.ndarray, centre: np.ndarray, words: np.ndarray) -> np.ndarray:
    """How much of each pixel, 0..1, each glyph covers once stretched, turned and moved to its centre."""
    zoom = CELL_HEIGHT / _uniform(words[..., 0:1], *HEIGHT)
    squeeze = zoom / _uniform(words[..., 1:2], *STRETCH)
    half = _uniform(words[..., 2:3], -TURN, TURN)  # its tangent gives an angle's sine and cosine as quotients
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    points = (np.arange(SIDE * SAMPLES) + 0.5) / SAMPLES - SIDE / 2
    x, y = points - centre[..., :1], points - centre[..., 1:]

    def cells(along_x: np.ndarray, along_y: np.ndarray) -> np.ndarray:  # summed in 65536ths of a cell
        along_x, along_y = (np.rint(part * 65536).astype(np.int32) for part in (along_x + CELL / 2, along_y))
        return np.clip(along_x[..., None, :] + along_y[..., None] >> 16, 0, CELL - 1)  # a mask's rim is empty

    row = cells(-sine * zoom * x, cosine * zoom * y)
    column = cells(cosine * squeeze * x, sine * squeeze * y)
    inside = masks.reshape(-1)[(glyph[..., None, None] * CELL + row) * CELL + column]
    return sum(inside[..., i::SAMPLES, j::SAMPLES] for i, j in np.ndindex(SAMPLES, SAMPLES)) / SAMPLES**2


def _glyph_masks(name: str) -> np.ndarray:
    """A font's ten digits, centred and of one height: 1 inside and 0 outside, (10, CELL, CELL) uint8."""
    font = ft2font.FT2Font(str(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")))
    font.set_size(font.units_per_EM, 72)  # one pixel a font unit
    # matplotlib 3.10 renamed the flag.
    flag = ft2font.LoadFlags.NO_HINTING if hasattr(ft2font, "LoadFlags") else ft2font.LOAD_NO_HINTING
    masks = []
    for digit in "0123456789":
        font.load_char(ord(digit), flags=flag)
        masks.append(_fill(*font.get_path()))
    return np.stack(masks)


def _fill(vertices: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The inside, by the nonzero rule, of an outline of lines and of TrueType's quadratic curves."""
    vertices[codes == 79] = vertices[codes == 1]  # matplotlib's codes: 1 moves, 2 draws, 3 curves, 79 closes
    line, curve = np.flatnonzero((codes == 2) | (codes == 79)), np.flatnonzero(codes == 3)[::2]
    t = np.arange(9)[:, None, None] / 8  # eight straight pieces a curve: in eighths the points are exact
    bent = (1 - t) ** 2 * vertices[curve - 1] + 2 * t * (1 - t) * vertices[curve] + t**2 * vertices[curve + 1]
    starts = np.concatenate([vertices[line - 1], bent[:-1].reshape(-1, 2)])
    ends = np.concatenate([vertices[line], bent[1:].reshape(-1, 2)])

    low, high, rows = starts.min(axis=0), starts.max(axis=0), np.arange(CELL) + 0.5
    scale = CELL_HEIGHT / (high - low).max() * np.array([1, -1])  # fonts count y upwards
    starts, ends = ((points - (low + high) / 2) * scale + CELL / 2 for points in (starts, ends))
    piece, row = np.nonzero((starts[:, 1:] <= rows) != (ends[:, 1:] <= rows))
    (x, y), (step_x, step_y) = starts[piece].T, (ends - starts)[piece].T
    column = np.ceil(x + (rows[row] - y) * step_x / step_y - 0.5).astype(np.int64)
    winding = np.zeros((CELL, CELL), np.int64)
    np.add.at(winding, (row, column), np.where(step_y > 0, 1, -1))
    return (np.cumsum(winding, axis=1) != 0).astype(np.uint8)
