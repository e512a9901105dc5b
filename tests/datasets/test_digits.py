"""The digits: their bytes, their balance, their splits and their cache."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damages import empty, flip_bit

from datasets import digits

# Of 200 images and labels of seed 0. Where one changes on purpose, digits.VERSION must be raised too.
PINNED = {
    "train": "9e005f71a5c84c397b6fba50772c692c79ef4154de19cdd4c330683baef298ba",
    "test": "91362a99b3932a677c8c5ca34efdee8b123a26fd748e987e8d932e0e108a5ccc",
}


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {split: digits.make_digits(split, 200) for split in ("train", "test")}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bytes_of_a_seed_are_pinned(drawn, split):
    assert digest(*drawn[split]) == PINNED[split]


def test_another_process_draws_the_same_bytes(drawn):
    script = (
        "import hashlib\nfrom datasets import digits\n"
        "images, labels = digits.make_digits('train', 200)\n"
        "print(hashlib.sha256(images.tobytes() + labels.astype('<i8').tobytes()).hexdigest())"
    )
    root = Path(digits.__file__).parent.parent
    output = subprocess.check_output([sys.executable, "-c", script], cwd=root, text=True)
    assert output.strip() == digest(*drawn["train"])


def test_another_seed_draws_other_images_in_another_order(drawn):
    images, labels = digits.make_digits("train", 200, seed=1)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in drawn["train"][0]}
    assert not np.array_equal(labels, drawn["train"][1])


def test_every_ten_in_a_row_hold_every_class_once_in_no_fixed_order(drawn):
    for _, labels in drawn.values():
        blocks = labels.reshape(-1, 10)
        assert np.array_equal(np.sort(blocks, axis=1), np.tile(np.arange(10), (20, 1)))
        assert len(np.unique(blocks, axis=0)) == 20


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("count", [0, 1, 10, 37, 100])
def test_fewer_are_a_prefix_of_more(drawn, split, count):
    images, labels = digits.make_digits(split, count)
    assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
    assert labels.shape == (count,) and labels.dtype == np.int64
    assert np.array_equal(images, drawn[split][0][:count])
    assert np.array_equal(labels, drawn[split][1][:count])


def test_the_batch_changes_no_byte(drawn, monkeypatch):
    monkeypatch.setattr(digits, "BATCH", 7)
    assert digest(*digits.make_digits("train", 200)) == digest(*drawn["train"])


def test_no_image_comes_twice_within_or_between_the_splits(drawn):
    images = np.concatenate([images for images, _ in drawn.values()])
    assert len({image.tobytes() for image in images}) == len(images) == 400


def test_the_splits_share_no_font():
    train, test = (fonts.split() for fonts in digits.SPLIT_FONTS.values())
    assert not set(train) & set(test)


def test_the_splits_draw_apart_even_with_the_same_fonts(drawn, monkeypatch):
    monkeypatch.setitem(digits.SPLIT_FONTS, "test", digits.SPLIT_FONTS["train"])
    images, labels = digits.make_digits("test", 200)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in drawn["train"][0]}
    assert not np.array_equal(labels, drawn["train"][1])


def test_every_glyph_is_its_own_and_fills_its_height_alone():
    fonts = " ".join(digits.SPLIT_FONTS.values()).split()
    masks = np.concatenate([digits._glyph_masks(font) for font in fonts])
    assert len({mask.tobytes() for mask in masks}) == len(masks) == 200
    assert masks.max() == 1
    rim = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], axis=1)
    assert not rim.any()
    heights = masks.any(axis=2).sum(axis=1)
    assert heights.min() > 0.9 * digits.CELL_HEIGHT and heights.max() <= digits.CELL_HEIGHT
    assert masks.mean(axis=(1, 2)).min() > 0.05 and masks.mean(axis=(1, 2)).max() < 0.5


def test_every_image_shows_something_and_its_class(drawn, monkeypatch):
    for images, _ in drawn.values():
        assert images.reshape(len(images), -1).std(axis=1).min() > 5
    # Once all is plain, a class's mean picture is the nearest to its other pictures.
    plain = dict.fromkeys(("NEIGHBOUR", "NOISE", "TURN", "OFFSET", "TINT"), 0)
    for name, value in {**plain, "HEIGHT": (26, 26), "STRETCH": (1, 1)}.items():
        monkeypatch.setattr(digits, name, value)
    images, labels = digits.make_digits("train", 200)
    grey = images.mean(axis=3).reshape(200, -1)
    grey = abs(grey - grey[:, :1])  # ink away from paper, whichever of the two is lighter
    grey /= np.linalg.norm(grey, axis=1, keepdims=True)
    means = np.stack([grey[:100][labels[:100] == k].mean(axis=0) for k in range(10)])
    found = (grey[100:] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
    assert (found == labels[100:]).mean() > 0.8


@pytest.mark.parametrize(("split", "count", "seed"), [("valid", 10, 0), ("train", -1, 0), ("train", 10, -1)])
def test_bad_arguments_are_refused(tmp_path, split, count, seed):
    with pytest.raises(ValueError, match="split must be train or test and count at least 0|non-negative"):
        digits.make_digits(split, count, seed)
    with pytest.raises(ValueError):
        digits.cached_digits(tmp_path, split, count, seed)


@pytest.fixture
def cache(tmp_path) -> Path:
    """The one file of a cache of the first 30 training images, in a folder that did not exist."""
    digits.cached_digits(tmp_path / "new" / "folder", "train", 30)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    return path


def assert_first_30(result, drawn) -> None:
    assert np.array_equal(result[0], drawn["train"][0][:30]) and result[0].dtype == np.uint8
    assert np.array_equal(result[1], drawn["train"][1][:30]) and result[1].dtype == np.int64


def test_the_cache_gives_the_same_and_draws_nothing(cache, drawn, monkeypatch):
    for part in ("train", "30", "seed0", f"v{digits.VERSION}"):
        assert part in cache.name
    monkeypatch.setattr(digits, "make_digits", lambda *_: pytest.fail("drawn again"))
    assert_first_30(digits.cached_digits(cache.parent, "train", 30), drawn)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_byte(path: Path) -> None:
    path.write_bytes(flip_bit(path.read_bytes()))


def other_seed(path: Path) -> None:
    images, labels = digits.make_digits("train", 30, seed=1)
    np.savez(path, images=images, labels=labels)


def other_shape(path: Path) -> None:
    np.savez(path, images=np.zeros((30, 28, 28), np.uint8), labels=np.load(path)["labels"])


def other_type(path: Path) -> None:
    np.savez(path, images=np.zeros((30, 32, 32, 3), np.float32), labels=np.load(path)["labels"])


def other_names(path: Path) -> None:
    np.savez(path, pictures=np.zeros(3))


@pytest.mark.parametrize(
    "spoil",
    [truncate, flip_a_byte, empty, other_seed, other_shape, other_type, other_names],
    ids=lambda spoil: spoil.__name__,
)
def test_a_cache_that_is_damaged_or_another_is_drawn_again(cache, drawn, spoil):
    good = cache.read_bytes()
    spoil(cache)
    spoiled = cache.read_bytes()
    assert spoiled != good
    assert_first_30(digits.cached_digits(cache.parent, "train", 30), drawn)
    assert cache.read_bytes() != spoiled
    assert_first_30([np.load(cache)[name] for name in ("images", "labels")], drawn)
    assert list(cache.parent.iterdir()) == [cache]


def test_a_folder_that_cannot_be_written_only_means_no_cache(tmp_path, drawn):
    (tmp_path / "file").write_text("in the way")
    assert_first_30(digits.cached_digits(tmp_path / "file", "train", 30), drawn)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, drawn, monkeypatch):
    def full_disk(file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    assert_first_30(digits.cached_digits(tmp_path, "train", 30), drawn)
    assert not list(tmp_path.iterdir())
