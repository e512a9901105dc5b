"""Your own images: picture files of every kind, what a folder of them becomes, and what is refused with what words."""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up import draw
from PIL import Image, PngImagePlugin

from data_sets import folder, pictures
from data_sets.folder import read_folder
from data_sets.pictures import read_picture, square
from runtime.errors import UserError

Y, X = np.mgrid[0:64, 0:64]
GREY = Image.fromarray((X * 4).astype(np.uint8))
COLOURS = Image.fromarray(np.stack([X * 4, Y * 4, 255 - X * 4], -1).astype(np.uint8))


def assert_rejected(path: Path, words: str) -> None:
    """Check that a file is refused in one line with its name and these words."""
    with pytest.raises(UserError, match=words) as error:
        read_picture(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [32, 48])
def test_a_picture_becomes_its_centre_square(tmp_path, size):
    wide = Image.new("RGB", (200, 100), "blue")
    wide.paste("red", (50, 0, 100, 100))
    wide.paste("lime", (100, 0, 150, 100))
    wide.save(tmp_path / "wide.png")
    pixels, half = read_picture(tmp_path / "wide.png", size=size), size // 2
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert (pixels[:, 2 : half - 2] == (255, 0, 0)).all() and (pixels[:, half + 2 : -2] == (0, 255, 0)).all()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert np.array_equal(square(noise, size), np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)))


def test_black_and_white_in_every_mode(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        for level in (0, 255):
            Image.new("RGB", (40, 50), (level,) * 3).convert(mode).save(tmp_path / "picture.tif")
            assert abs(read_picture(tmp_path / "picture.tif").astype(int) - level).max() <= 1


def test_pictures_are_turned_upright_by_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture in (("colour", COLOURS), ("16 bits", Image.fromarray((X * 1024).astype(np.uint16)))):
        picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"{name}.png", exif=exif)
        assert np.array_equal(read_picture(tmp_path / f"{name}.png"), square(picture))
    odd = struct.pack("<4sIH HHIHH HHII IQ", b"II*\0", 8, 2, 0x0112, 3, 1, 6, 0, 0x0131, 5, 1, 38, 0, 1)
    COLOURS.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "odd.png", exif=b"Exif\0\0" + odd)
    assert np.array_equal(read_picture(tmp_path / "odd.png"), square(COLOURS)), "the software's name is a fraction"
    for wrong in (b"no TIFF header", b"MM\0*\0\0"):
        COLOURS.save(tmp_path / "wrong.png", exif=b"Exif\0\0" + wrong)
        assert np.array_equal(read_picture(tmp_path / "wrong.png"), square(COLOURS))


def test_transparency_is_put_on_white(tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 32, 64))
    clear.save(tmp_path / "alpha.png")
    clear.save(tmp_path / "palette.gif")
    clear.convert("L").save(tmp_path / "grey.png", transparency=76)
    for name in ("alpha.png", "palette.gif", "grey.png"):
        pixels = read_picture(tmp_path / name)
        assert (pixels[:, :14] <= 2).all() and (pixels[:, 18:] >= 253).all(), name


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    COLOURS.resize((2048, 2048)).save(tmp_path / "large.jpg")
    monkeypatch.setattr(pictures, "square", lambda picture, size: picture.size)
    assert read_picture(tmp_path / "large.jpg") == (256, 256)
    assert read_picture(tmp_path / "large.jpg", 224) == (1024, 1024), "of 4 x 224 pixels or more"


def test_16_bit_grey_keeps_its_upper_8_bits_and_inverted_tiffs_come_out_right(tmp_path):
    for name in ("grey.png", "grey.tif", "grey.pgm", "grey.jp2"):
        Image.fromarray((X * 1024 + 255).astype(np.uint16)).save(tmp_path / name)
    GREY.save(tmp_path / "inverted 8.tif", tiffinfo={262: 0})  # Pillow inverts these itself
    Image.fromarray(((255 - X * 4) * 256).astype(np.uint16)).save(tmp_path / "inverted 16.tif", tiffinfo={262: 0})
    for path in tmp_path.iterdir():
        assert np.array_equal(read_picture(path), square(GREY)), path


def test_values_of_unknown_range_are_refused(tmp_path):
    Image.fromarray((X / 63).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((X * 4).astype(np.int32)).save(tmp_path / "32 bits.tif")
    Image.fromarray((X * 1000 - 32000).astype(np.uint16)).save(tmp_path / "signed 16 bits.tif", tiffinfo={339: 2})
    Image.fromarray((X * 64).astype(np.uint16)).save(tmp_path / "12 bits.tif")
    bits = [struct.pack("<HHII", 258, 3, 1, count) for count in (16, 12)]
    (tmp_path / "12 bits.tif").write_bytes((tmp_path / "12 bits.tif").read_bytes().replace(*bits))
    for name, mode in {"float": "F", "32 bits": "I", "signed 16 bits": "I", "12 bits": "I;16"}.items():
        assert_rejected(tmp_path / f"{name}.tif", f"mode {mode} has no known range of values")


def test_a_png_with_a_long_text_or_profile_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "a" * 2_000_000, zip=True)
    for options in ({"pnginfo": info}, {"icc_profile": bytes(2_000_000)}):
        COLOURS.save(tmp_path / "long.png", **options)
        assert np.array_equal(read_picture(tmp_path / "long.png"), square(COLOURS))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_may_lack_its_end_marker_but_no_image_data(tmp_path, options):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg", **options)
    data, path = (tmp_path / "whole.jpg").read_bytes(), tmp_path / "cut.jpg"
    path.write_bytes(data[:-2])
    assert np.array_equal(read_picture(path), read_picture(tmp_path / "whole.jpg"))
    for missing in (20, len(data) // 2):
        path.write_bytes(data[:-missing])
        assert_rejected(path, "damaged")


def test_an_iphone_photo_names_the_package_it_needs_and_is_read_with_it(tmp_path, monkeypatch):
    (tmp_path / "photo.heic").write_bytes(bytes(4) + b"ftypheic" + bytes(12))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.init()  # registers all formats, before the table is replaced
    monkeypatch.setattr(Image, "OPEN", {name: row for name, row in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name in Image.OPEN])
    assert_rejected(tmp_path / "photo.heic", "HEIC/HEIF pictures need another package: pip install .*pillow-heif")

    opener = ("HEIF", lambda file, name: COLOURS.copy(), lambda start: start[4:12] == b"ftypheic")
    package = SimpleNamespace(register_heif_opener=lambda: Image.register_open(*opener))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    assert np.array_equal(read_picture(tmp_path / "photo.heic"), square(COLOURS))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about tags
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.bmp", "a.tif", "a.webp", "a.avif", "a.jp2"])
def test_a_damaged_file_is_one_line_in_every_format(tmp_path, name):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for length in random.integers(len(data) - 100, size=20):
        (tmp_path / name).write_bytes(data[:length])
        assert_rejected(tmp_path / name, "damaged, or not a picture")
    for i in range(150):  # some of these decode
        flipped = bytearray(data)
        flipped[random.integers(300) if i % 3 else -random.integers(1, 20)] ^= 1 << random.integers(8)
        (tmp_path / name).write_bytes(flipped)
        with contextlib.suppress(UserError):
            read_picture(tmp_path / name)


# ---------------------------------------------------------------------------------------------- folders

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
    monkeypatch.setattr(folder, "read_picture", lambda path, size: names.append(path.name) or real(path, size))
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
    assert read_folder(root)[2][1:] == [f"{root / name} is not used: {test} is the test set"]
    assert len(contents(root)["test"]) == 1


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


def test_a_folder_that_cannot_be_written_to_is_read(root):
    (root / "packed.npz").mkdir()  # fails if a file of this name exists
    assert "; the pictures will be decoded again next time" in read_folder(root)[2][1]


def test_broken_files_are_named_and_counted_or_left_out(root, decoded, monkeypatch):
    before, bee = contents(root), root / "train" / "bee"
    (bee / "a.png").write_text("no picture")
    (bee / "b.png").symlink_to("nowhere.png")
    COLOURS.save(bee / "c.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    (bee / "d.png").write_text("no picture")
    decoded.clear()
    with pytest.raises(UserError, match="can't read 4 of 40 files; --skip_broken True leaves them out: ") as error:
        read_folder(root)
    why = {"a.png": "damaged, or not a picture", "b.png": "No such file", "c.png": "Image size (4096 pixels) exc"}
    assert all(f"{bee / name}: {words}" in str(error.value) for name, words in why.items())
    assert "d.png" not in str(error.value)
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
    "rm -r train/ant train/café": "train must have two or more class folders but has bee",
    "mkdir train/empty": "train/empty has no pictures: add some, or remove it",
    "mkdir test/dog": "test/dog is not a class of .*/train: rename or remove it",
    "rm -r test/*": "test has no <class>/<pictures>: add some, or remove it",
    "rm -r test train/*/[1-9].bmp": "no picture is left to test on: put some into .*/test/<class>",
    "ln -s raw/dog train/dog": "train/dog is a broken link",
    "ln -s .. train/ant/up": "up/ant is a link to a folder that contains it",
}


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(root, decoded, monkeypatch):
    monkeypatch.setattr("data_sets.pictures.available_memory", lambda: 1)
    with pytest.raises(UserError, match="images of 32 x 32 pixels need .* of memory"):
        read_folder(root)
    assert not decoded


@pytest.mark.parametrize("command", REFUSED)
def test_a_wrong_folder_is_one_line(command, root):
    subprocess.run(["sh", "-c", command], cwd=root, check=True)
    with pytest.raises(UserError, match=REFUSED[command]) as error:
        read_folder(root)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"no folder .*/train/train: {LAYOUT}.*; give {re.escape(str(root))} instead"):
        read_folder(root / "train")
