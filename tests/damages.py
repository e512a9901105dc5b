"""What tests put in the place of good files: damaged, hostile and foreign ones."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from made_up import content_of, run_of
from torch import nn

from runtime import checkpoint

QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"

Prepare = Callable[[Path], object]  # changes the folder of a test


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Hostile:
    """A pickle that makes a folder when a careless reader loads it."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def hostile(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "model": Hostile()}, path)


def checkpoint_of(command: str = "--tto", then: Prepare = lambda path: None, **more) -> Prepare:
    """Writes the checkpoint of `train.py COMMAND`, with weights that fit no model and `more` contents; damages it."""

    def prepare(path: Path) -> None:
        checkpoint.save(path, content_of(run_of(command), model=nn.Linear(100, 100)) | more)
        then(path)

    return prepare


# Each with a pattern of what is said of it.
DAMAGES = {
    "text": (lambda path: path.write_text("these are my notes\n"), "is damaged, or no file that torch.save wrote"),
    "hostile": (hostile, "is damaged"),
    "truncated": (checkpoint_of(then=lambda path: os.truncate(path, path.stat().st_size - 1)), "is damaged"),
    "bit flipped": (checkpoint_of(then=flip_bit), "is damaged"),
    "directory": (Path.mkdir, "can't read .*: Is a directory|is no folder of logits"),
    "a list": (lambda path: torch.save([1, 2, 3], path), "holds a list, not a checkpoint"),
    "bare weights": (
        lambda path: torch.save({"weight": torch.zeros(3)}, path), r"holds a state dict of 1 entries \(weight\)",
    ),
    "other format": (checkpoint_of(format=checkpoint.FORMAT + 1), "has format 4, this version reads format 3"),
}  # fmt: skip


# ------------------------------------------------------------------------------ files and folders


def link_data(folder: Path, cifar10: Path) -> Path:
    """The real files, as links, in `folder`/data."""
    batches = folder / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    for file in (cifar10 / batches.name).iterdir():
        (batches / file.name).symlink_to(file.resolve())
    return batches


def replace_batch(name: str, damage: Prepare) -> Callable[[Path, Path], None]:
    """Puts a damaged copy in the place of one file of the data, or nothing."""

    def prepare(folder: Path, cifar10: Path) -> None:
        file = link_data(folder, cifar10) / name
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        damage(file)

    return prepare


def file_as_folder(name: str) -> Prepare:
    return lambda folder: (folder / name).write_text("a file\n")


def folder_with_mode(name: str, mode: int) -> Prepare:
    return lambda folder: (folder / name).mkdir(mode=mode)


def in_weights(name: str, damage: Prepare) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / "weights").mkdir()
        damage(folder / "weights" / name)

    return prepare
