"""What tests put in the place of good files: damaged, hostile and foreign ones."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from made_up import content_of, run_of
from torch import nn

from runtime import checkpoint

QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"

Prepare = Callable[[Path], object]  # changes a file, or the folder of a test


def flip_bit(path: Path, place: int | None = None) -> None:
    """Flip a bit in the middle of a file, or at a place."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


class Hostile:
    """A pickle that makes a folder when a careless reader loads it."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def hostile(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "model": Hostile()}, path)


def in_weights(name: str, write: Prepare) -> Prepare:
    """Lets `write` make a file of that name in the folder of the checkpoints."""

    def prepare(folder: Path) -> None:
        (folder / "weights").mkdir()
        write(folder / "weights" / name)

    return prepare


def checkpoint_of(command: str, then: Prepare = lambda path: None) -> Prepare:
    """Writes the checkpoint of `train.py COMMAND`, with weights that fit no model, and damages it."""

    def prepare(path: Path) -> None:
        checkpoint.save(path, content_of(run_of(command), model=nn.Linear(100, 100)))
        then(path)

    return prepare


def link_data(folder: Path, cifar10: Path) -> Path:
    """The real files, as links, in `folder`/data."""
    batches = folder / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    for file in (cifar10 / batches.name).iterdir():
        (batches / file.name).symlink_to(file.resolve())
    return batches
