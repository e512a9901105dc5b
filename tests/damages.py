"""Everything that is put in the place of a good file: damaged, hostile, another's."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from made_up import facts_of

from config import TrainOptions
from models import build_model
from runtime import checkpoint
from training.optimizer import make_optimizer

QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"

# ------------------------------------------------------------------------------ damaged files


def write_checkpoint(path: Path, command: str = "--tto", facts: dict | None = None, **changes) -> None:
    """A checkpoint of `train.py COMMAND` with other `facts` and `changes`; its weights are small and fit nothing."""
    identity = facts_of(command) | (facts or {})
    content = {"identity": identity, "epoch": 1, "versions": {}, "model": {"weight": torch.zeros(1000)}} | changes
    checkpoint.save(path, {name: value for name, value in content.items() if value is not None})


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
    torch.save({"format": checkpoint.FORMAT, "identity": facts_of("--tto"), "model": Hostile()}, path)


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


def torchscript(path: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("constants.pkl", b"", 0)
    writer.write_end_of_file()


def bare_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def bare_weights(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def described(facts: dict | None = None, command: str = "--tto", **changes) -> Callable[[Path], None]:
    return lambda path: write_checkpoint(path, command, facts, **changes)


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
    "TorchScript": (torchscript, "damaged or no checkpoint"),
    "a list": (bare_list, "damaged or no checkpoint"),
    "bare weights": (bare_weights, "damaged or no checkpoint"),
    "newer format": (described(format=checkpoint.FORMAT + 1), "format 3, this version reads up to 2"),
    "format of no sense": (described(format="x"), "format x"),
    "facts of no kind": (described(identity=3), "damaged or no checkpoint"),
    "facts that are missing": (described(identity={"role": "teacher"}), "damaged or no checkpoint"),
    "other role": (described({"role": "student"}), "holds role student"),
    "other data set": (described({"dataset": "digits"}), "holds dataset digits"),
    "other classes": (described({"num_classes": 100}), "holds num_classes 100"),
    "other architecture": (described({"architecture": "vgg19_bn/0"}), "holds architecture vgg19_bn/0"),
    "other weights": (described(), "does not fit the model VGG"),
    "weights that are none": (described(model={"features.0.weight": "x"}), "does not fit the model VGG"),
    "weights of no kind": (described(model=3), "does not fit the model VGG|damaged or no checkpoint"),
}


def resume_state(facts: dict | None = None, **changes) -> Callable[[Path], None]:
    """A resume state of the command QUICK, of a run with other `facts`, and with `changes`."""

    def prepare(path: Path) -> None:
        model = build_model("student", 10)
        optimizer = make_optimizer(model, TrainOptions().resolved(), torch.float32)
        state = {
            "model": model.state_dict(), "epoch": 0, "step": 0, "seconds": 0.0, "totals": torch.zeros(5),
            "log": "{}\n", "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        write_checkpoint(path, QUICK, facts, **state | changes)

    return prepare


def older_version(path: Path) -> None:
    """A resume state of the format before this one, which only said the options of its run."""
    names = ("role", "architecture", "num_classes", "dataset", "kd")
    facts = facts_of(QUICK)
    content = {"options": {"seed": 42, "lr": 0.1}, "teacher": "", "versions": {"torch": "2.9"}, "model": {}}
    torch.save({"format": 1, **{name: facts[name] for name in names}, **content}, path)


RESUME_DAMAGES = {name: DAMAGES[name] for name in ("text", "hostile", "truncated", "bit flipped", "empty", "directory")}
RESUME_DAMAGES |= {
    "of a teacher": (described(), "holds role teacher"),
    "finished checkpoint": (described(command=QUICK), "damaged|no unfinished run"),
    "other learning rate": (resume_state({"lr": 9.0}), "has lr 9.0, not 0.1.*: .*--resume False"),
    "other options": (
        resume_state({"num_epochs": 9, "subset": 50}), "subset 50, not 40; num_epochs 9, not 1.*--resume False",
    ),
    "another optimizer": (resume_state({"optimizer": "sgd/2"}), "optimizer sgd/2, not muon.*--resume False"),
    "the optimizer's older version": (resume_state({"optimizer": "muon"}), "older version of this .*--resume False"),
    "another teacher's": (
        resume_state({"teacher": "0123456789abcdef"}), "teacher 0123456789abcdef, not None.*--resume False",
    ),
    "optimizer of another model": (resume_state(optimizer={"state": {}, "param_groups": []}), "damaged"),
    "weights of another model": (resume_state(model={}), "does not fit the model StudentCNN"),
    "no optimizer": (resume_state(optimizer=None), "damaged"),
    "no log": (resume_state(log=None), "damaged"),
    "facts of no kind": (resume_state(identity=3), "damaged"),
    "an older version's": (older_version, "older version of this project.*--resume False"),
}  # fmt: skip

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
