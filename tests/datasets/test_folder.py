"""Your own images: what a folder of pictures becomes, when it is read anew, and what is refused."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line
from made_up import CPU, draw, lay_out
from made_up import FOLDER_CLASSES as CLASSES
from PIL import Image

from datasets import CIFAR_RECIPES, Recipe, folder, scaled
from datasets.folder import read_folder
from runtime.errors import Stopped, UserError
from runtime.signals import StopSignal
from utils import load_images


def read(root: Path, flip: bool = True, skip_broken: bool = False, **more):
    return read_folder(root, flip, skip_broken, CPU, **more)


def held(spec) -> dict[str, set]:
    """The images of each half, with their labels."""
    return {half: set(zip(map(bytes, pixels), labels.tolist(), strict=True))
            for half, (pixels, labels) in spec.halves.items()}  # fmt: skip


@pytest.fixture
def root(tmp_path) -> Path:
    return lay_out(tmp_path / "my pictures")


# ---------------------------------------------------------------------------------------------- what it becomes


def test_a_folder_says_what_a_row_of_the_table_says(root):
    spec, (note,) = read(root)
    assert spec.classes == CLASSES and spec.flip and spec.train_images == 60 and len(spec.fingerprint) == 16
    assert note == f"{root}: 60 training and 12 test images of 3 classes"
    train, test = load_images(spec, root, "train", "test")
    assert train.pixels.shape == (60, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert sorted(train.labels.tolist()) == sorted([0, 1, 2] * 20) and len(test) == 12
    values = train.pixels.double() / 255
    assert spec.mean == pytest.approx(values.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert spec.std == pytest.approx(values.std((0, 1, 2), correction=0).tolist(), abs=1e-12)
    assert set(train[:12].labels.tolist()) == {0, 1, 2}, "the first ones are of all classes"
    assert not read(root, flip=False)[0].flip


def test_one_colour_can_be_normalised(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (9, 9)).save(tmp_path / "train" / name / f"{i}.png")
    spec, _ = read(tmp_path)
    assert min(spec.std) > 0


def test_pictures_of_any_size_and_mode(tmp_path):
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")
    for label, value in (("dark", 0), ("light", 255)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for i, mode in enumerate(modes):
            picture = Image.new("RGB", (3 + 10 * i, 70 - 5 * i), (value,) * 3)
            if mode in ("I", "F", "I;16"):
                shape, kind = picture.size[::-1], {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
                picture = Image.fromarray(np.full(shape, value * (256 if mode != "F" else 1), kind))
            elif mode == "LAB":
                picture = Image.merge("LAB", [Image.new("L", picture.size, level) for level in (value, 128, 128)])
            else:
                picture = picture.convert(mode)
            assert picture.mode == mode
            picture.save(tmp_path / "train" / label / f"{i}.tiff")
    spec, _ = read(tmp_path)
    for pixels, labels in spec.halves.values():
        assert np.abs(pixels.astype(int) - 255 * labels[:, None, None, None]).max() <= 5


def test_what_lies_deeper_counts_and_what_is_hidden_does_not(root):
    before = read(root)[0]
    draw(root / "train" / CLASSES[0] / "more" / "and more" / "x.png", seed=7)
    draw(root / "train" / ".ipynb_checkpoints" / "x.png", seed=8)
    draw(root / "train" / CLASSES[1] / ".trash" / "x.png", seed=9)
    (root / "train" / CLASSES[1] / ".DS_Store").write_text("x")
    (root / "train" / "notes.txt").write_text("x")
    elsewhere = root.parent / "elsewhere"
    draw(elsewhere / "y.png", seed=10)
    (root / "train" / CLASSES[2] / "linked").symlink_to(elsewhere)
    spec = read(root)[0]
    assert spec.classes == CLASSES and spec.train_images == 62 and held(spec)["train"] > held(before)["train"]


def test_names_and_their_order_change_nothing(root, tmp_path):
    other = tmp_path / "other"
    for half in ("train", "test"):
        for name in CLASSES:
            for i, path in enumerate(sorted((root / half / name).iterdir(), reverse=True)):
                target = other / half / name / f"{'sub/' * (i % 2)}{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    spec, again = read(root)[0], read(other)[0]
    assert spec.fingerprint == again.fingerprint and spec == again
    for half in ("train", "test"):
        assert all(np.array_equal(a, b) for a, b in zip(spec.halves[half], again.halves[half], strict=True))
    for half in ("train", "test"):
        (other / half / CLASSES[2]).rename(other / half / "中国")
    assert read(other)[0].fingerprint != spec.fingerprint


# ---------------------------------------------------------------------------------------------- kept aside


def test_without_a_test_folder_a_tenth_of_each_class_is_kept_aside(root):
    whole = held(read(root)[0])["train"]
    shutil.rmtree(root / "test")
    for i in range(9):
        draw(root / "train" / CLASSES[0] / f"more{i}.png", seed=77 + i)
    spec, (note,) = read(root)
    parts = held(spec)
    assert "63 training and 6 test images" in note and "test: a tenth of each class is kept aside" in note
    assert [sum(label == i for _, label in parts["test"]) for i in range(3)] == [2, 2, 2]
    assert not parts["train"] & parts["test"] and parts["train"] | parts["test"] > whole
    for i, path in enumerate(sorted((root / "train" / CLASSES[1]).iterdir())):
        path.rename(path.with_name(f"renamed{(7 * i) % 20}.png"))
    assert held(read(root)[0]) == parts, "it does not hang on names"


def test_of_two_pictures_one_is_kept_aside_and_of_one_none(tmp_path):
    for name, count in (("a", 1), ("b", 2), ("c", 9)):
        for i in range(count):
            draw(tmp_path / "train" / name / f"{i}.png", seed=ord(name) + i)
    spec, _ = read(tmp_path)
    assert np.bincount(spec.halves["test"][1]).tolist() == [0, 1, 1]
    for name in "bc":
        shutil.rmtree(tmp_path / "train" / name)
    draw(tmp_path / "train" / "b" / "0.png", seed=3)
    with pytest.raises(UserError, match="no picture is left to test on"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------------- read once


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that were decoded."""
    names = []

    def read_into(pixels, path, real=folder.read_into):
        names.append(Path(path).name)
        return real(pixels, path)

    monkeypatch.setattr(folder, "read_into", read_into)
    return names


def test_pictures_are_decoded_once_and_anew_where_a_file_changed(root, decoded):
    spec = read(root)[0]
    assert len(decoded) == 72
    again = read(root)[0]
    assert len(decoded) == 72 and again == spec and held(again) == held(spec)
    file = root / "train" / CLASSES[0] / "3.png"
    changes = (
        lambda: draw(file, seed=12345),
        lambda: draw(file.with_name("new.png"), seed=12346),
        lambda: file.unlink(),
        lambda: file.with_name("4.png").rename(root / "train" / CLASSES[1] / "moved.png"),
    )
    prints = {spec.fingerprint}
    for change in changes:
        decoded.clear()
        change()
        prints.add(read(root)[0].fingerprint)
        assert len(decoded) > 60
    assert len(prints) == 5
    file = root / "train" / CLASSES[0] / "5.png"
    for change in (lambda: os.utime(file), lambda: file.chmod(file.stat().st_mode ^ 0o010)):
        decoded.clear()
        change()
        assert read(root)[0].fingerprint in prints and decoded, "the same pixels are the same images"


@pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b"", lambda b: b.replace(b"\x00\x00", b"\x01\x01")])
def test_a_damaged_packed_file_is_made_anew(damage, root, decoded):
    spec = read(root)[0]
    packed = root / "packed.npz"
    packed.write_bytes(damage(packed.read_bytes()))
    decoded.clear()
    again = read(root)[0]
    assert again == spec and held(again) == held(spec) and len(decoded) == 72


def test_a_folder_that_can_not_be_written_is_read_all_the_same(root, monkeypatch, decoded):
    def writing(path):
        raise UserError(f"can't write into {path.parent}: permission denied; give another folder")

    monkeypatch.setattr(folder, "writing", writing)
    for _ in range(2):
        spec, notes = read(root)
        assert spec.train_images == 60 and len(notes) == 2
        assert "permission denied" in notes[1] and "packed images are not kept" in notes[1]
    assert len(decoded) == 2 * 72 and not (root / "packed.npz").exists()


def test_a_signal_stops_the_reading(root):
    with pytest.raises(Stopped):
        read(root, stop=StopSignal(number=15))
    assert not list(root.glob("packed*"))


# ---------------------------------------------------------------------------------------------- what is refused


def broken_files(cat: Path) -> dict[str, str]:
    """Files that are no pictures in a class's folder, and what is said of each."""
    (cat / "text.png").write_text("no picture")
    (cat / "notes.txt").write_text("no picture either")
    (cat / "empty.png").touch()
    (cat / "cut.png").write_bytes((cat / "0.png").read_bytes()[:500])
    Image.new("1", (20_000, 5_000)).save(cat / "bomb.png")
    (cat / "astray.png").symlink_to("nowhere.png")
    (cat / "circle.png").symlink_to("circle2.png")
    (cat / "circle2.png").symlink_to("circle.png")
    os.mkfifo(cat / "pipe.png")
    words = {"bomb.png": "million pixels", "pipe.png": "is no file", "astray.png": "is no file"}
    names = ("text.png", "notes.txt", "empty.png", "cut.png", *words)
    return {name: words.get(name, "no picture") for name in names}


def test_a_file_that_is_no_picture_is_named_or_left_out_and_counted(root):
    cat = root / "train" / CLASSES[1]
    good = held(read(root)[0])
    kept = root.parent / "kept"
    said = broken_files(cat)
    kept.mkdir()
    for name in ("circle.png", "circle2.png"):
        (cat / name).unlink()
    spec, notes = read(root, skip_broken=True)
    assert held(spec) == good and len(notes) == 2
    assert f"left out {len(said)} files that can't be read, the first: " in notes[1]
    with pytest.raises(UserError, match="--skip_broken True goes on"):
        read(root)  # now that all is packed
    for name in said:
        (cat / name).rename(kept / name)
    for name, words in said.items():
        (kept / name).rename(cat / name)
        with pytest.raises(UserError) as error:
            read(root)
        assert words in str(error.value) and str(cat / name) in str(error.value), name
        (cat / name).rename(kept / name)


def empty_class(root: Path) -> None:
    (root / "train" / "empty").mkdir()


def unreadable(path: str):
    return lambda root: (root / path).chmod(0)


def link(target: str, *where: str):
    return lambda root: root.joinpath(*where).symlink_to(target)


def two_links(root: Path) -> None:
    (root / "train" / CLASSES[0] / "there").symlink_to(root / "train" / CLASSES[1])
    (root / "train" / CLASSES[1] / "back").symlink_to(root / "train" / CLASSES[0])


def one_class(root: Path) -> None:
    for name in CLASSES[1:]:
        shutil.rmtree(root / "train" / name)


REFUSED = {
    "no folder": (shutil.rmtree, "no folder .*train: --data_path names a folder"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "no folder .*train: --data_path names a folder"),
    "no class": (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "a folder a class.*none"),
    "one class": (one_class, "a folder a class, two or more, and has only"),
    "an empty class": (empty_class, "train/empty has no picture"),
    "a class only in test": (lambda root: draw(root / "test" / "dog" / "0.png", 0), "test/dog is a class that .*train"),
    "a link loop": (link("..", "train", CLASSES[0], "up"), "up/.* is a link to a folder that it lies in|up is a link"),
    "a link to itself": (link("self", "train", "self"), "symbolic links|no picture"),
    "two links": (two_links, "is a link to a folder that it lies in"),
    "an unreadable class": (unreadable(f"train/{CLASSES[2]}"), f"can't read .*{CLASSES[2]}: permission denied"),
    "an unreadable train": (unreadable("train"), "can't read .*train: permission denied"),
    "an unreadable file": (unreadable(f"train/{CLASSES[2]}/3.png"), "3.png .permission denied.*--skip_broken"),
    "a text": (lambda root: (root / "train" / CLASSES[0] / "a.png").write_text("x"), "a.png .*no picture"),
    "an empty test": (lambda root: [shutil.rmtree(path) for path in (root / "test").iterdir()], "test has no picture"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_folder_is_one_line(name, root, tmp_path, forked):
    prepare, tells = REFUSED[name]
    prepare(root)
    done = forked("train.py", "--dataset=folder", f"--data_path={root}", "--device=cpu", folder=tmp_path, tiny=True)
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)
    assert_one_line(done, tells)
    assert not (tmp_path / "weights").exists() and not list(root.glob("packed*"))


# ---------------------------------------------------------------------------------------------- its recipe


def test_a_recipe_is_a_number_of_images_seen_within_bounds():
    teacher = CIFAR_RECIPES["teacher", "muon"]
    assert scaled(teacher, 50_000) == teacher
    for images in (12_500, 20_000, 100_000, 200_000):
        epochs = scaled(teacher, images).num_epochs
        assert epochs * images == pytest.approx(16 * 50_000, rel=0.03)
    epochs = {images: scaled(teacher, images).num_epochs for images in (2, 5_000, 1_000_000)}
    assert epochs == {2: 64, 5_000: 64, 1_000_000: 4}
    sizes = {images: scaled(teacher, images).batch_size for images in (2, 2_048, 4_095, 4_096, 16_384, 10**6)}
    assert sizes == {2: 32, 2_048: 32, 4_095: 32, 4_096: 64, 16_384: 256, 10**6: 256}
    small = scaled(Recipe(num_epochs=60, lr=0.05, batch_size=128, views=16), 10**6)
    assert (small.batch_size, small.views, small.lr, small.num_epochs) == (128, 16, 0.05, 15)
