"""Your own images, laid out as for torchvision's ImageFolder, decoded once and packed into a file (docs/own.md)."""

import hashlib
import importlib.util
import json
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL

from data_sets import SIDE
from data_sets.pictures import check_memory, read_picture
from runtime.errors import UserError
from runtime.files import load_arrays, save_arrays
from runtime.progress import Progress

VERSION = 2  # of the packed file: raise it with every change to its contents
LAYOUT = "--data_path must name a folder with train/<class>/<pictures> and, if you have one, test/<class>/<pictures>"
TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that exists is the test set
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir")  # left out, as are hidden files

File = tuple[str, int, Path]  # split, class number, path
Arrays = tuple[np.ndarray, np.ndarray]  # pixels (N, size, size, 3) uint8, labels (N,) int64


def read_folder(
    root: Path, skip_broken: bool = False, size: int = SIDE, show_progress: bool = True
) -> tuple[tuple[str, ...], dict[str, Arrays], list[str]]:
    """Class names, images of "train" and "test", and notes to print; UserError, OSError."""
    classes, files, notes = find_files(root)
    key = files_key(root, files, size)
    check_memory(len(files), size)
    packed = None
    with suppress(ValueError):  # missing, damaged or out of date
        packed = load_arrays(root / "packed.npz", key)
    if packed is None or (len(packed["errors"]) and not skip_broken):  # perhaps a drive failed for a moment
        packed = pack(files, size, show_progress)
        try:
            save_arrays(root / "packed.npz", key, **packed)
        except UserError as error:
            notes.append(f"{error}; the pictures will be decoded again next time")
    pixels, labels = packed["pixels"], packed["labels"]
    is_test, errors = packed["is_test"], packed["errors"]
    if len(errors) and not skip_broken:
        count = f"{len(errors):,} of {len(files):,} files"
        raise UserError(f"can't read {count}; --skip_broken True leaves them out: {'; '.join(errors[:3])}")
    if len(errors):
        notes.append(f"left out {len(errors):,} files that can't be read, the first: {errors[0]}")
    if not any(split == "test" for split, *_ in files):
        is_test = hold_out(labels)
        notes.append(f"no folder {root / 'test'}: a tenth of each class is held out for testing")
    images = {"train": (pixels[~is_test], labels[~is_test]), "test": (pixels[is_test], labels[is_test])}
    counts = np.bincount(labels[~is_test], minlength=len(classes))
    if not counts.all():
        raise UserError(f"{root / 'train' / classes[counts.argmin()]} has no picture that can be read: add some")
    if not is_test.any():
        raise UserError(f"no picture is left to test on: put some into {root / 'test'}/<class>")
    sizes = f"{counts.sum():,} training and {is_test.sum():,} test images of {len(classes):,} classes"
    return classes, images, [f"{root}: {sizes}", *notes]


def find_files(root: Path) -> tuple[tuple[str, ...], list[File], list[str]]:
    """The class names in order, all files, and notes; UserError if the layout is wrong, OSError."""
    train, notes = root / "train", []
    if not train.is_dir():
        parent = root.resolve().parent
        advice = f"; give {parent} instead" if parent / "train" == root.resolve() else ""
        raise UserError(f"no folder {train}: {LAYOUT}{advice}")
    found = {"train": files_by_class(train)}
    classes = tuple(sorted(found["train"]))
    if len(classes) < 2:
        raise UserError(f"{train} must have two or more class folders but has {', '.join(classes) or 'none'}: {LAYOUT}")
    test_folders = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    test = test_folders[0] if test_folders else None
    notes += [f"{folder} is not used: {test} is the test set" for folder in test_folders[1:]]
    if test:
        found["test"] = files_by_class(test)
        if test.name != "test":
            notes.append(f"no folder {root / 'test'}: {test} is the test set")
        if unknown := set(found["test"]) - set(classes):
            raise UserError(f"{test / min(unknown)} is not a class of {train}: rename or remove it")
        if not any(found["test"].values()):
            raise UserError(f"{test} has no <class>/<pictures>: add some, or remove it")
    if empty := [name for name in classes if not found["train"][name]]:
        raise UserError(f"{train / empty[0]} has no pictures: add some, or remove it")
    files = []
    for split, of_class in found.items():
        files += [(split, label, path) for label, name in enumerate(classes) for path in of_class.get(name, [])]
    return classes, files, notes


def listed(folder: Path) -> list[Path]:
    """What is in a folder, in order, unless it is hidden or the operating system's; OSError."""
    return [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.lower() not in SYSTEM_FILES]


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """All files below each subfolder, by the subfolder's name (NFC); UserError, OSError."""
    found: dict[str, list[Path]] = {}
    for path in listed(folder):
        if path.is_dir():
            found.setdefault(unicodedata.normalize("NFC", path.name), []).extend(files_below(path))
        elif not path.exists():
            raise UserError(f"{path} is a broken link: fix or remove it")
    return found


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """All files below a folder, links followed, in order; UserError if a link leads back, OSError."""
    real, files = folder.resolve(), []
    if real in above:
        raise UserError(f"{folder} is a link to a folder that contains it: remove the link")
    for path in listed(folder):
        files += files_below(path, (*above, real)) if path.is_dir() else [path]
    return files


def files_key(root: Path, files: list[File], size: int) -> str:
    """A hash of all that the packed images depend on: every file's state, the image size, and the decoder."""
    rows = []
    for split, label, path in files:
        rows.append([split, label, str(path.relative_to(root))])
        with suppress(OSError):  # unreadable files are reported later
            found = path.stat()
            rows[-1] += [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode]
    has_heif = importlib.util.find_spec("pillow_heif") is not None
    return hashlib.sha256(json.dumps([VERSION, PIL.__version__, has_heif, size, rows]).encode()).hexdigest()


def pack(files: list[File], size: int, show_progress: bool) -> dict[str, np.ndarray]:
    """Pixels (N, size, size, 3) uint8, labels (N,) and is_test (N,), and an error per broken file."""
    pixels, errors = np.empty((len(files), size, size, 3), np.uint8), []
    splits, labels, paths = zip(*files, strict=True)

    def read(i: int) -> str:
        try:
            pixels[i] = read_picture(paths[i], size)
        except UserError as error:
            return str(error)
        return ""

    progress = Progress("reading pictures", len(files), show_progress, unit="file")
    with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for error in pool.map(read, range(len(files))):  # if the loop is left early, the other files are cancelled
            errors.append(error)
            progress.step()
    order = [i for i in range(len(files)) if not errors[i]]
    # By a hash of the pixels, so that any prefix mixes the classes and renaming changes nothing.
    order.sort(key=lambda i: (hashlib.sha256(pixels[i]).digest(), labels[i]))
    return {
        "pixels": pixels[order],
        "labels": np.array([labels[i] for i in order], dtype=np.int64),
        "is_test": np.array([splits[i] == "test" for i in order], dtype=bool),
        "errors": np.array([error for error in errors if error], dtype=str),
    }


def hold_out(labels: np.ndarray) -> np.ndarray:
    """Which images (N,) are held out: the first tenth of each class, at least one if it has two or more."""
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        is_test[rows[: max(len(rows) // 10, int(len(rows) > 1))]] = True
    return is_test
