"""Picture files of every kind: which are read and to which pixels, and which are refused with what words."""

import contextlib
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_sets import pictures
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
    COLOURS.save(tmp_path / "wrong.png", exif=b"Exif\0\0no TIFF header")
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


def test_other_files_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    (tmp_path / "text.png").write_text("no picture")
    COLOURS.save(tmp_path / "bomb.png")
    for name, words in {"text": "damaged, or not a picture", "bomb": "exceeds limit of 4000 pixels"}.items():
        assert_rejected(tmp_path / f"{name}.png", words)
    assert_rejected(tmp_path / "missing.png", "No such file")
