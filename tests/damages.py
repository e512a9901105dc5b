"""Everything that is put in the place of a good file: damaged, hostile, another's."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from config import parse_train
from models import ARCHITECTURES, build_model
from runtime import checkpoint
from training.optimizer import make_optimizer

QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"
DIGITS_OPTIONS = parse_train(QUICK.split()).result_options()

# ------------------------------------------------------------------------------ damaged files


def write_checkpoint(path: Path, role: str = "teacher", **changes) -> None:
    """A checkpoint whose description fits the role, with `changes`; its weights are small and fit nothing."""
    content = {
        "role": role, "architecture": ARCHITECTURES[role], "num_classes": 10, "dataset": "cifar10", "kd": False,
        "options": {}, "teacher": "", "epoch": 1, "versions": {}, "model": {"weight": torch.zeros(1000)},
    }  # fmt: skip
    checkpoint.save(path, content | changes)


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def text(path: Path) -> None:
    path.write_text("these are my notes\n")


class Hostile:
    """A pickle that makes a file when a careless reader loads it."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def hostile(path: Path) -> None:
    torch.save({"format": 1, "role": "teacher", "options": {}, "model": Hostile()}, path)


def hostile_old_style(path: Path) -> None:
    torch.save({"model": Hostile()}, path, _use_new_zipfile_serialization=False)


def truncated(path: Path) -> None:
    write_checkpoint(path)
    os.truncate(path, path.stat().st_size // 2)


def short_by_one(path: Path) -> None:
    write_checkpoint(path)
    os.truncate(path, path.stat().st_size - 1)


def bit_flipped(path: Path) -> None:
    write_checkpoint(path)
    path.write_bytes(flip_bit(path.read_bytes()))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.mkdir()


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


def bare_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def bare_weights(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def described(**changes) -> Callable[[Path], None]:
    return lambda path: write_checkpoint(path, **changes)


DAMAGES = {
    "text": (text, "damaged or no checkpoint"),
    "hostile": (hostile, "damaged or no checkpoint"),
    "hostile old style": (hostile_old_style, "damaged or no checkpoint"),
    "truncated": (truncated, "damaged or no checkpoint"),
    "short by one byte": (short_by_one, "damaged or no checkpoint"),
    "bit flipped": (bit_flipped, "damaged or no checkpoint"),
    "empty": (empty, "damaged or no checkpoint"),
    "directory": (directory, "is a directory"),
    "another zip": (other_zip, "damaged or no checkpoint"),
    "a list": (bare_list, "damaged or no checkpoint"),
    "bare weights": (bare_weights, "damaged or no checkpoint"),
    "newer format": (described(format=checkpoint.FORMAT + 1), "format 2, this version reads up to 1"),
    "format of no sense": (described(format="x"), "format x"),
    "other role": (described(role="student"), "holds role student"),
    "other data set": (described(dataset="digits"), "holds dataset digits"),
    "other classes": (described(num_classes=100), "holds num_classes 100"),
    "other architecture": (described(architecture="vgg19_bn/0"), "holds architecture vgg19_bn/0"),
    "other weights": (described(), "does not fit the model VGG"),
    "weights that are none": (described(model={"features.0.weight": "x"}), "does not fit the model VGG"),
    "weights of no kind": (described(model=3), "does not fit the model VGG|damaged or no checkpoint"),
}


def resume_state(**changes) -> Callable[[Path], None]:
    """A resume state of the command QUICK, with `changes`."""

    def prepare(path: Path) -> None:
        model = build_model("student", 10)
        optimizer = make_optimizer(model, parse_train(["--dataset=digits"]), torch.device("cpu"))
        state = {
            "dataset": "digits", "options": DIGITS_OPTIONS, "model": model.state_dict(), "epoch": 0, "step": 0,
            "seconds": 0.0, "totals": torch.zeros(5), "log": "{}\n", "optimizer": optimizer.state_dict(),
            "scheduler": {"lr_lambdas": [None]},
        }  # fmt: skip
        state |= changes
        write_checkpoint(path, "student", **{k: v for k, v in state.items() if v is not None})

    return prepare


RESUME_DAMAGES = {name: DAMAGES[name] for name in ("text", "hostile", "truncated", "bit flipped", "empty", "directory")}
RESUME_DAMAGES |= {
    "of a teacher": (described(role="teacher"), "holds role teacher"),
    "finished checkpoint": (described(role="student", options=DIGITS_OPTIONS), "damaged|no unfinished run"),
    "other learning rate": (resume_state(options=DIGITS_OPTIONS | {"lr": 9.0}), "--lr 9.0, not 0.*--resume False"),
    "other options": (
        resume_state(options=DIGITS_OPTIONS | {"num_epochs": 9, "subset": 50}),
        "--subset 50, not 40; --num_epochs 9, not 1.*--resume False",
    ),
    "another teacher's": (resume_state(teacher="0123456789abcdef"), "another teacher.*--resume False"),
    "optimizer of another model": (resume_state(optimizer={"state": {}, "param_groups": []}), "damaged"),
    "weights of another model": (resume_state(model={}), "does not fit the model StudentCNN"),
    "no optimizer": (resume_state(optimizer=None), "damaged"),
    "no log": (resume_state(log=None), "damaged"),
    "options of no kind": (resume_state(options=3), "damaged"),
}

# ------------------------------------------------------------------------------ data


def link_data(folder: Path, cifar10: Path) -> Path:
    """The real files, as links, in `folder`/data."""
    batches = folder / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    for file in (cifar10 / batches.name).iterdir():
        (batches / file.name).symlink_to(file.resolve())
    return batches


def replace_batch(name: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path, Path], None]:
    """Put a changed copy in the place of one file of the data, or nothing."""

    def prepare(folder: Path, cifar10: Path) -> None:
        file = link_data(folder, cifar10) / name
        content = file.read_bytes()
        file.unlink()
        if change:
            file.write_bytes(change(content))

    return prepare


def file_as_folder(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("a file\n")


def folder_with_mode(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).mkdir(mode=mode)


def in_weights(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "weights").mkdir()
        damage(folder / "weights" / name)

    return prepare
