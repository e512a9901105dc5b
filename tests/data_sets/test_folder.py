"""Your own images: what a folder of pictures becomes, when it is decoded again, and what is refused."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up import draw
from PIL import Image

from data_sets import folder
from data_sets.folder import read_folder
from data_sets.pictures import square
from runtime.errors import Stopped, UserError

CLASSES = ("ant", "bee", "café")  # in the Unicode form NFC


def contents(root: Path, **options) -> dict[str, set]:
    """The images of each split, with their labels."""
    images = read_folder(root, **options)[1]
    return {split: set(zip(map(bytes, pixels), labels, strict=True)) for split, (pixels, labels) in images.items()}


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with 10 training and 2 test images of each class."""
    for label, name in enumerate(CLASSES):
        for i in range(12):
            draw(tmp_path / "my pictures" / ("test" if i > 9 else "train") / name / f"{i}.bmp", seed=100 * label + i)
    return tmp_path / "my pictures"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that were decoded."""
    names, real = [], folder.read_picture
    monkeypatch.setattr(folder, "read_picture", lambda path, **more: names.append(path.name) or real(path, **more))
    return names


@pytest.mark.parametrize("size", [32, 40])
def test_a_folder_becomes_classes_and_images(root, size):
    classes, images, notes = read_folder(root, size=size)
    assert classes == CLASSES and notes == [f"{root}: 30 training and 6 test images of 3 classes"]
    for split, count in (("train", 10), ("test", 2)):
        pixels, labels = images[split]
        assert pixels.shape == (3 * count, size, size, 3) and pixels.dtype == np.uint8 and labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [count] * 3
    assert set(images["train"][1][:12]) == {0, 1, 2}, "the first images are of all classes"
    assert (square(Image.open(root / "train/bee/3.bmp"), size).tobytes(), 1) in contents(root, size=size)["train"]


def test_names_and_their_order_do_not_matter(root):
    shutil.rmtree(root / "test")
    before = read_folder(root)[1]
    for i, path in enumerate(sorted(root.glob("train/*/*.bmp"))):
        (path.parent / "sub").mkdir(exist_ok=True)
        path.rename(Path(path.parent, "sub" * (i % 2), f"renamed {i * 7 % 30}.bmp"))
    for split, images in read_folder(root)[1].items():
        assert all(np.array_equal(a, b) for a, b in zip(images, before[split], strict=True))


def test_system_files_are_left_out_and_links_followed_and_unicode_forms_are_one_class(root):
    before = contents(root)
    for name in (".ipynb_checkpoints", "__MACOSX", "bee/.trash", "bee/__MACOSX", "@eaDir"):
        draw(root / "train" / name / "x.bmp", seed=1000)
    for name in (".DS_Store", "bee/.DS_Store", "bee/Thumbs.db", "bee/desktop.ini", "notes.txt"):
        (root / "train" / name).write_text("x")
    (root / "test" / "café").rename(root / "test" / "cafe\u0301")
    (root / "train" / "cafe\u0301").symlink_to(root.parent / "elsewhere")
    (root.parent / "elsewhere").mkdir()
    (root / "train" / "café" / "3.bmp").rename(root.parent / "elsewhere" / "3.bmp")
    assert read_folder(root)[0] == CLASSES and contents(root) == before


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_the_test_set_only_without_a_test_folder(root, name):
    before, test = contents(root), root / "test"
    test.rename(root / name)
    assert read_folder(root)[2][1:] == [f"no folder {test}: {root / name} is the test set"]
    assert contents(root) == before
    draw(test / "ant" / "0.bmp", seed=1000)
    assert not read_folder(root)[2][1:] and len(contents(root)["test"]) == 1


def test_without_a_test_folder_a_tenth_of_each_class_is_held_out(root):
    shutil.rmtree(root / "test")
    for i in range(10, 20):
        draw(root / "train" / "ant" / f"{i}.bmp", seed=1000 + i)
    _, images, notes = read_folder(root)
    assert np.bincount(images["test"][1]).tolist() == [2, 1, 1] and len(images["train"][1]) == 36
    assert not contents(root)["train"] & contents(root)["test"] and "a tenth of each class is held out" in notes[1]
    for name, rest in (("ant", 1), ("bee", 2)):  # of one image none is held out, of two one
        for path in list((root / "train" / name).iterdir())[rest:]:
            path.unlink()
    assert np.bincount(read_folder(root)[1]["test"][1]).tolist() == [0, 1, 1]


def test_pictures_are_decoded_again_only_after_a_change_or_damage(root, decoded, monkeypatch):
    before = contents(root)
    assert contents(root) == before and len(decoded) == 36
    file, packed = root / "train" / "ant" / "3.bmp", root / "packed.npz"

    def replace() -> None:  # at the same size and time
        state = file.stat()
        draw(file, seed=1000)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    for change in (replace, lambda: draw(file, seed=1001), lambda: file.rename(root / "train" / "bee" / "new.bmp")):
        decoded.clear()
        change()
        assert contents(root) != before and len(decoded) == 36
        before = contents(root)
    for damaged in (packed.read_bytes()[:5000], b"", packed.read_bytes()[::-1]):
        decoded.clear()
        packed.write_bytes(damaged)
        assert contents(root) == contents(root) == before and len(decoded) == 36
    assert read_folder(root, size=16)[1]["train"][0].shape[1] == 16
    monkeypatch.setattr(folder.importlib.util, "find_spec", lambda name: name)  # pillow_heif was installed
    read_folder(root, size=16)
    assert len(decoded) == 3 * 36


def test_nothing_is_kept_after_a_signal_or_where_it_cannot_be_written(root):
    with pytest.raises(Stopped, match="15"):
        read_folder(root, stop=SimpleNamespace(number=15))
    (root / "packed.npz").mkdir()  # fails if a file of this name exists
    assert "; the pictures will be decoded again next time" in read_folder(root)[2][1]


def test_broken_files_are_named_and_counted_or_left_out(root, decoded):
    before, bee = contents(root), root / "train" / "bee"
    for name in ("a.png", "c.png", "d.png"):
        (bee / name).write_text("no picture")
    (bee / "b.png").symlink_to("nowhere.png")
    decoded.clear()
    with pytest.raises(UserError, match="can't read 4 of 40 files; --skip_broken True leaves them out: ") as error:
        read_folder(root)
    assert [f"{bee / name}:" in str(error.value) for name in ("a.png", "b.png", "c.png", "d.png")] == [1, 1, 1, 0]
    assert f"left out 4 files that can't be read, the first: {bee}/a.png" in read_folder(root, skip_broken=True)[2][1]
    assert contents(root, skip_broken=True) == before and len(decoded) == 40
    with pytest.raises(UserError):
        read_folder(root)
    assert len(decoded) == 80, "a drive may have failed for a moment"
    for path in bee.glob("?.bmp"):
        path.unlink()
    with pytest.raises(UserError, match="bee has no picture that can be read"):
        read_folder(root, skip_broken=True)


LAYOUT = "--data_path must name a folder with train/<class>/<pictures>"
REFUSED = {  # by what is done to the folder
    "rm -r train": f"no folder .*/train: {LAYOUT}",
    "rm -r train/ant train/café": "train must have two or more class folders and has bee",
    "mkdir train/empty": "train/empty has no pictures: add some, or remove it",
    "mkdir test/dog": "test/dog is not a class of .*/train: rename or remove it",
    "rm -r test/*": "test has no <class>/<pictures>: add some, or remove it",
    "rm -r test train/*/[1-9].bmp": "no picture is left to test on: put some into .*/test/<class>",
    "ln -s .. train/ant/up": "up/ant is a link to a folder that contains it",
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_wrong_folder_is_one_line(command, root):
    subprocess.run(["sh", "-c", command], cwd=root, check=True)
    with pytest.raises(UserError, match=REFUSED[command]) as error:
        read_folder(root)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"no folder .*/train/train: {LAYOUT}.*; give {root} instead"):
        read_folder(root / "train")
