"""Your own images, as torchvision's ImageFolder lays them out: DIR/train/<class>/*, DIR/test/<class>/*.

The pictures are decoded once: their pixels are packed into DIR/packed.npz, which is made anew when a file came, went or
changed. Order, split and fingerprint follow from the pixels, not from the files' names or order: the first N images are
of all classes, and a renamed file changes nothing. Files and folders whose names begin with a dot are passed over.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets import DATASETS, PICTURES, SIDE, DatasetSpec, scaled
from datasets.pictures import bombs_refused, read_picture
from runtime.device import Runtime
from runtime.errors import Stopped, UserError, reason
from runtime.files import writing
from runtime.processes import main_first
from runtime.progress import Progress
from runtime.signals import StopSignal

KEPT_ASIDE = 10  # without DIR/test, one image of so many is kept aside
File = tuple[str, int, str]  # its half ("train" or "test"), its class's number, its path


def find_dataset(
    spec: DatasetSpec, root: Path, skip_broken: bool, runtime: Runtime, stop: StopSignal | None = None
) -> tuple[DatasetSpec, list[str]]:
    """A data set's row; of a folder, which has to be read for it, with its images and what is to be said of them.

    Raises what `read_folder` raises.
    """
    if spec.is_known:
        return spec, []
    with main_first(runtime):
        return read_folder(root, spec.flip, skip_broken, runtime, stop)


def read_folder(
    root: Path, flip: bool, skip_broken: bool, runtime: Runtime, stop: StopSignal | None = None
) -> tuple[DatasetSpec, list[str]]:
    """The data set below `root`, its pixels and labels in it, and what is to be said of it, a line each.

    UserError where it is not laid out so or a picture can't be read, Stopped where a signal came.
    """
    try:
        classes, files = find_files(root)
        key = listing_key(root, files)
    except OSError as error:
        raise UserError(f"can't read {error.filename or root}: {reason(error)}") from error
    path, notes = root / "packed.npz", []
    packed = load_packed(path, key)
    if packed is None:
        packed = pack(files, skip_broken, runtime, stop) | {"key": np.array(key)}
        try:
            with writing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **packed)
        except UserError as error:
            notes.append(f"{error}; the packed images are not kept")
    if len(packed["broken"]):
        first = str(packed["broken"][0])
        if not skip_broken:
            raise UserError(f"{first}; --skip_broken True goes on without it")
        notes.append(f"{root}: left out {len(packed['broken']):,} files that can't be read, the first: {first}")
    has_test = any(half == "test" for half, *_ in files)
    halves = split(packed, len(classes), has_test)
    refuse_empty(root, classes, halves["train"][1])
    if not len(halves["test"][1]):
        raise UserError(f"no picture is left to test on: put some into {root / 'test'}")
    sizes = f"{len(halves['train'][1]):,} training and {len(halves['test'][1]):,} test images"
    aside = "" if has_test else f"; there is no {root / 'test'}: a tenth of each class is kept aside to test on"
    return describe(classes, halves, flip), [f"{root}: {sizes} of {len(classes)} classes{aside}", *notes]


# ---------------------------------------------------------------------------------------------- files


def find_files(root: Path) -> tuple[list[str], list[File]]:
    """The classes, which are those of DIR/train in the order of their names, and all files; UserError, OSError."""
    train, test = root / "train", root / "test"
    if not os.path.isdir(train):
        raise UserError(f"no folder {train}: --data_path names a folder that holds train/<class>/<pictures>")
    classes = class_names(train)
    if len(classes) < 2:
        only = f"only {classes[0]}" if classes else "none"
        raise UserError(f"{train} has to have a folder a class, two or more, and has {only}")
    halves = {"train": train}
    if os.path.isdir(test):
        halves["test"] = test
        if strangers := set(class_names(test)) - set(classes):
            raise UserError(f"{test / min(strangers)} is a class that {train} has not")
    files = []
    for half, folder in halves.items():
        for label, name in enumerate(classes):
            if half == "train" or os.path.isdir(folder / name):
                files += [(half, label, path) for path in walk(str(folder / name))]
    refuse_empty(root, classes, np.array([label for half, label, _ in files if half == "train"], dtype=np.int64))
    if "test" in halves and files[-1][0] == "train":
        raise UserError(f"{test} has no picture: put some in, or remove it")
    return classes, files


def class_names(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, as ImageFolder has them."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The paths of all files below a folder, links followed; UserError where a link leads back, OSError."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a link to a folder that it lies in: take it out")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from walk(entry.path, (*above, real))
            else:
                yield entry.path


def refuse_empty(root: Path, classes: list[str], labels: np.ndarray) -> None:
    """UserError where a class has no image among training labels (N,)."""
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        raise UserError(f"{root / 'train' / classes[int(counts.argmin())]} has no picture: put some in, or remove it")


def listing_key(root: Path, files: list[File]) -> str:
    """A hash of the name, size, time and mode of every file, and of how pictures are read."""
    rows = []
    for half, label, path in files:
        with suppress(OSError):  # what can't be asked can't be read either: that is said later
            found = os.stat(path)
            rows.append((half, label, os.path.relpath(path, root), found.st_size, found.st_mtime_ns, found.st_mode))
    return hashlib.sha256(json.dumps([PICTURES, len(files), rows]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- pixels


def load_packed(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What `read_folder` wrote, or None where it is missing, damaged, or of other files."""
    with suppress(Exception), np.load(path) as stored:  # a damaged file raises nearly anything
        if str(stored["key"]) == key:
            return dict(stored)
    return None


def pack(files: list[File], skip_broken: bool, runtime: Runtime, stop: StopSignal | None) -> dict[str, np.ndarray]:
    """Pixels (N, 32, 32, 3) uint8, labels (N,) and is_test (N,) in an order that the pixels give, and what is broken.

    UserError at the first broken file where they are not to be skipped, Stopped where a signal came.
    """
    pixels, errors = np.empty((len(files), SIDE, SIDE, 3), np.uint8), []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with bombs_refused(), Progress("reading pictures", len(files), runtime.is_main, unit="file") as progress:
            for error in pool.map(lambda i: read_into(pixels[i], files[i][2]), range(len(files))):
                if error and not skip_broken:
                    raise UserError(f"{error}; --skip_broken True goes on without it")
                if stop and stop.number:
                    raise Stopped(stop.number)
                errors.append(error)
                if progress.step():
                    progress.show("")
    finally:
        pool.shutdown(cancel_futures=True)
    order = [i for i in range(len(files)) if not errors[i]]
    order.sort(key=lambda i: (hashlib.sha256(pixels[i]).digest(), files[i][1]))
    return {
        "pixels": pixels[order],
        "labels": np.array([files[i][1] for i in order], dtype=np.int64),
        "is_test": np.array([files[i][0] == "test" for i in order], dtype=bool),
        "broken": np.array([error for error in errors if error], dtype=str),
    }


def read_into(pixels: np.ndarray, path: str) -> str:
    """Put a file's picture into pixels (32, 32, 3); what is wrong with it, or nothing."""
    try:
        if not os.path.isfile(path):  # a pipe, say, would be waited for
            raise UserError(f"{path} is no file")
        pixels[:] = read_picture(Path(path), smallest=1)
    except UserError as error:
        return str(error)
    return ""


def split(packed: dict[str, np.ndarray], count: int, has_test: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels and labels of each half; without a test set, a tenth of each of `count` classes and at least one of two.

    It is the first tenth by the hash of the pixels: of equal pictures hardly one is in each half, and where pictures
    are added, hardly one changes sides.
    """
    labels, is_test = packed["labels"], packed["is_test"]
    if not has_test:
        for label in range(count):
            (rows,) = np.nonzero(labels == label)
            is_test[rows[: max(len(rows) // KEPT_ASIDE, len(rows) > 1)]] = True
    return {
        half: (packed["pixels"][chosen], labels[chosen]) for half, chosen in (("train", ~is_test), ("test", is_test))
    }


def describe(classes: list[str], halves: dict[str, tuple[np.ndarray, np.ndarray]], flip: bool) -> DatasetSpec:
    """The row of the table that these images are."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    for pixels, labels in halves.values():
        digest.update(pixels)
        digest.update(labels)
    pixels = halves["train"][0]
    levels = np.arange(256) / 255
    shares = [np.bincount(pixels[..., i].ravel(), minlength=256) / pixels[..., i].size for i in range(3)]
    mean = [float(share @ levels) for share in shares]
    std = [float(np.sqrt(share @ (levels - middle) ** 2)) for share, middle in zip(shares, mean, strict=True)]
    row = DATASETS["folder"]
    return replace(
        row,
        classes=tuple(classes),
        mean=tuple(mean),
        std=tuple(max(value, 1 / 255) for value in std),  # pictures of one colour have none
        recipes={kind: scaled(recipe, len(pixels)) for kind, recipe in row.recipes.items()},
        train_images=len(pixels),
        flip=flip,
        fingerprint=digest.hexdigest()[:16],
        halves=halves,
    )
