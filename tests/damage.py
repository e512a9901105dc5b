"""What tests put in the place of good files: damaged, hostile and foreign ones."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from runtime import checkpoint

QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"


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


def damaged(name: str) -> Callable[[Path], None]:
    """Lets a test write a checkpoint, a bit of it flipped, into the folder of the checkpoints."""

    def prepare(folder: Path) -> None:
        checkpoint.save(folder / "weights" / name, {"model": {"weight": torch.zeros(10_000)}})
        flip_bit(folder / "weights" / name)

    return prepare


def link_data(folder: Path, cifar10: Path) -> Path:
    """The real files, as links, in `folder`/data."""
    batches = folder / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    for file in (cifar10 / batches.name).iterdir():
        (batches / file.name).symlink_to(file.resolve())
    return batches
