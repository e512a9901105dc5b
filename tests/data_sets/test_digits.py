"""The drawn digits: balance, prefixes, fonts, what an image shows, and the cache."""

import numpy as np
import PIL
import pytest
from made_up import flip_bit
from PIL import Image

from data_sets import digits


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_ten_images_contain_each_class_once_and_fewer_are_a_prefix_of_more(split):
    pixels, labels = digits.make_digits(split, 200)
    assert pixels.shape == (200, 32, 32, 3) and pixels.dtype == np.uint8 and labels.dtype == np.int64
    blocks = labels.reshape(-1, 10)
    assert np.array_equal(np.sort(blocks, axis=1), np.tile(np.arange(10), (20, 1)))
    assert len(np.unique(blocks, axis=0)) == 20, "in varying order"
    for count in (0, 1, 37):
        few = digits.make_digits(split, count)
        assert np.array_equal(few[0], pixels[:count]) and np.array_equal(few[1], labels[:count])


def test_splits_and_seeds_share_no_image_and_splits_no_font(monkeypatch):
    assert not set(digits.FONTS["train"].split()) & set(digits.FONTS["test"].split())
    used, real = [], digits.ImageFont.truetype
    monkeypatch.setattr(digits.ImageFont, "truetype", lambda path, size: used.append(path.stem) or real(path, size))
    digits.make_digits("test", 0)
    assert used == digits.FONTS["test"].split()
    monkeypatch.setitem(digits.FONTS, "test", digits.FONTS["train"])  # the fonts must not be the only difference
    drawn = [digits.make_digits(split, 100, seed) for split, seed in (("train", 0), ("test", 0), ("train", 1))]
    assert len({image.tobytes() for pixels, _ in drawn for image in pixels}) == 300
    assert len({labels.tobytes() for _, labels in drawn}) == 3


def test_an_image_shows_its_label(monkeypatch):
    plain = dict.fromkeys(("NEIGHBOUR", "NOISE", "BLUR", "OFFSET", "ROTATION", "TINT"), 0)
    for name, value in (plain | {"HEIGHT": (26, 26), "STRETCH": (1, 1)}).items():
        monkeypatch.setattr(digits, name, value)
    pixels, labels = digits.make_digits("train", 200)
    grey = pixels.mean(axis=3).reshape(200, -1)
    grey = abs(grey - grey[:, :1])  # the digit, lighter or darker than the background
    assert grey.max(axis=1).mean() > 80, "most digits are clearly lighter or darker than the background"
    grey /= np.linalg.norm(grey, axis=1, keepdims=True)
    means = np.stack([grey[:100][labels[:100] == label].mean(axis=0) for label in range(10)])
    nearest = (grey[100:] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
    assert (nearest == labels[100:]).mean() > 0.9


def test_a_larger_image_shows_the_same_picture_and_noise_does_not_wrap_around(monkeypatch):
    noisy = digits.make_digits("train", 20)[0].astype(float)
    monkeypatch.setattr(digits, "NOISE", 0)
    small, large = (digits.make_digits("train", 20, size=size)[0].astype(float) for size in (32, 64))
    difference = large.reshape(20, 32, 2, 32, 2, 3).mean(axis=(2, 4)) - small
    assert abs(difference).mean() < 2 and abs(noisy - small).max() < 150, "levels of 255"


def test_the_labelled_digit_is_drawn_last_and_in_the_middle(monkeypatch):
    drawn, mask = [], Image.new("L", (32, 32))
    monkeypatch.setattr(digits, "place", lambda glyph, centre, *_: drawn.append((glyph, abs(centre).max())) or mask)
    monkeypatch.setattr(digits, "NEIGHBOUR", 1)
    digits.draw_image(["0123456789"], 7, np.random.default_rng(0), 32)
    assert len(drawn) == 5 and drawn[-1][0] == "7" and drawn[-1][1] <= 2
    assert min(distance for _, distance in drawn[:4]) >= 15


@pytest.mark.parametrize("is_damaged", [False, True])
def test_cached_images_are_drawn_again_only_if_the_file_is_damaged(is_damaged, tmp_path, monkeypatch):
    expected, calls, real = digits.cached_digits(tmp_path / "new", "train", 30), [], digits.make_digits
    (cache,) = (tmp_path / "new").iterdir()
    assert all(part in cache.name for part in ("train", "30", f"v{digits.VERSION}", PIL.__version__))
    if is_damaged:
        flip_bit(cache)
    monkeypatch.setattr(digits, "make_digits", lambda *rest, **more: calls.append(rest) or real(*rest, **more))
    for _ in range(2):
        images = digits.cached_digits(cache.parent, "train", 30)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(images, expected, strict=True))
        assert len(calls) == is_damaged and list(cache.parent.iterdir()) == [cache]
    (tmp_path / "file").touch()
    assert len(digits.cached_digits(tmp_path / "file", "train", 30)[0]) == 30, "no folder, no cache"
