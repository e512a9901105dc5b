"""The data sets that torchvision downloads."""

import inspect
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torchvision

from data_sets import DataSet
from data_sets.pictures import check_memory, square
from runtime.errors import UserError
from runtime.files import locked


def read_torchvision(spec: DataSet, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels and labels of "train" and "test" from torchvision, which downloads what is missing and checks its MD5."""
    dataset_class = getattr(torchvision.datasets, spec.source)
    if hasattr(dataset_class, "meta"):  # CIFAR's file of class names isn't needed: check a test file in its place
        name, md5 = dataset_class.test_list[0]
        meta = {"filename": name, "md5": md5, "key": "filenames"}
        dataset_class = type(spec.source, (dataset_class,), {"meta": meta})
    if folder.name == getattr(dataset_class, "base_folder", None):
        folder = folder.parent  # what was given is the data set's own folder
    by_split = "split" in inspect.signature(dataset_class).parameters
    arrays = {}
    for split in ("train", "test"):
        which = {"split": split} if by_split else {"train": split == "train"}
        try:
            try:
                found = dataset_class(folder, download=False, **which)
            except (OSError, RuntimeError):  # missing or incomplete
                with locked(folder / spec.source):  # two downloads at once would damage each other
                    found = dataset_class(folder, download=True, **which)
        except ImportError as error:  # SciPy
            raise UserError(f"{spec.source} needs another package: {error}") from error
        except (UserError, OSError, RuntimeError, EOFError, HTTPException) as error:  # a network, a disk, an archive
            url = getattr(dataset_class, "url", "its source")
            download = f"the download from {url} failed: {str(error) or type(error).__name__}"
            archive = f"put {dataset_class.filename} into {folder}, " if hasattr(dataset_class, "filename") else ""
            advice = f"rerun with a network, {archive}or give its folder with --data_path"
            raise UserError(f"no complete {spec.source} in {folder}, and {download}; {advice}") from error
        check_memory(len(found), spec.size)
        try:
            arrays[split] = as_arrays(found, spec.size)
        except OSError as error:  # a damaged picture
            raise UserError(f"can't read {spec.source} in {folder}: {error}; remove it to download it again") from error
    return arrays


def as_arrays(found: torchvision.datasets.VisionDataset, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, size, size, 3) uint8 and labels (N,) int64 of a data set of pictures and class numbers.

    Those of other shapes are shuffled (seed 0): some data sets are sorted by class, and --holdout takes the last ones.
    """
    pixels = getattr(found, "data", None)
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (size, size, 3):
        return np.ascontiguousarray(pixels), np.asarray(found.targets, dtype=np.int64)
    pixels, labels = np.empty((len(found), size, size, 3), np.uint8), np.empty(len(found), np.int64)
    for place, i in enumerate(np.random.default_rng(0).permutation(len(found)).tolist()):
        picture, labels[place] = found[i]
        pixels[place] = square(picture, size)
    return pixels, labels
