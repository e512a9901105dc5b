"""Checkpoints, logs, images and models as train.py makes or leaves them, without the data and the training."""

import json
import shlex
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from config import TrainOptions, parse_train
from datasets import SIDE
from models import build_model
from runtime import checkpoint
from runtime.device import Runtime
from runtime.identity import Identity
from training.run import identity_of
from utils import Images

CPU = Runtime(torch.device("cpu"), None)
CLASSES = 10


def options_of(command: str = "") -> TrainOptions:
    """The options of `train.py COMMAND` in float32."""
    return parse_train(["--precision=fp32", *shlex.split(command)])


def facts_of(command: str = "", teacher: str = "", **changes) -> dict:
    """The facts of the identity of `train.py COMMAND`, run here in one process in float32, with `changes`.

    What is changed to None is left out.
    """
    options = options_of(command)
    facts = identity_of(options, options.spec, CPU, teacher).facts | changes
    return {name: value for name, value in facts.items() if value is not None or name not in changes}


def run_of(command: str = "", teacher: str = "", **changes) -> Identity:
    """The identity whose facts are `facts_of` these."""
    return Identity(facts_of(command, teacher, **changes))


def save_run(
    folder: Path,
    command: str = "",
    teacher: str = "",
    name: str = "",
    weights: int = 0,
    top1: float = 10.0,
    model: nn.Module | None = None,
    **changes,
) -> Path:
    """An untrained model, its weights drawn from the seed `weights`, as `train.py COMMAND` leaves a trained one."""
    options = options_of(command)
    torch.manual_seed(weights)
    content = {
        "identity": facts_of(command, teacher, **changes), "epoch": options.num_epochs,
        "versions": checkpoint.versions(), "model": (model or build_model(options.role)).state_dict(),
        "metrics": {"loss": 2.3, "top1": top1, "top5": 50.0},
    }  # fmt: skip
    path = folder / (name or options.checkpoint_path.name)
    checkpoint.save(path, content)
    return path


def format_1(kd: bool = False, **changes) -> dict:
    """What a run left before there was Muon."""
    options = {"seed": 42, "subset": None, "holdout": 0, "precision": "fp32", "num_epochs": 5, "batch_size": 128}
    options |= {"lr": 0.1, "head_lr": 1.0, "weight_decay": 5e-4, "views": 1, "sync_bn": False, "compile": False}
    options |= {"temp": [5.0], "alpha": 0.9, "cache_teacher": True} if kd else {}
    return {
        "format": 1, "role": "student", "architecture": "student_cnn/1", "num_classes": 10, "dataset": "cifar10",
        "kd": kd, "teacher": "1f3a" * 4 if kd else "", "options": options, "epoch": 5,
        "versions": {"torch": "2.11"}, "metrics": {"top1": 80.0, "top5": 99.0}, "model": {"weight": torch.zeros(3)},
    } | changes  # fmt: skip


def fingerprint_of(path: Path) -> str:
    """What a student says of the teacher in a file."""
    return checkpoint.fingerprint(checkpoint.load(path)["model"])


def write_log(path: Path, command: str = "", teacher: str = "", tops: tuple[float, ...] = (50.0,), **changes) -> None:
    """The log of `train.py COMMAND`, with a top-1 an epoch."""
    options = options_of(command)
    header = {"run": options.run_name, "evaluated_on": options.split, "identity": facts_of(command, teacher, **changes)}
    metrics = {"loss": 1.0, "ce": 1.0, "top1": 0.0, "top5": 90.0} | ({"kl": 0.5} if options.kd else {})
    lines = [
        {"epoch": i + 1, "train": metrics, options.split: {"loss": 1.1, "top1": top, "top5": 95.0}}
        for i, top in enumerate(tops)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (header, *lines)))


def random_images(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


FOLDER_CLASSES = ("$\\frac$ & x", "naïve chat", "日本")  # in the order of their names


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 50)) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def lay_out(root: Path, train: int = 20, test: int = 4) -> Path:
    """A folder of three classes with so many pictures each, all different, for --dataset folder."""
    for half, count in (("train", train), ("test", test)):
        for label, name in enumerate(FOLDER_CLASSES):
            for i in range(count):
                draw(root / half / name / f"{i}.png", seed=1000 * label + i + 500 * (half == "test"))
    return root


class TinyTeacher(nn.Module):
    """A stand-in with all that could be changed by mistake, batch norm and dropout, and a count of images seen."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Linear(4 * 15 * 15, num_classes)
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        self.seen.append(images)
        return self.classifier(self.features(images).flatten(1))


def tiny_student(num_classes: int = CLASSES) -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    parts = {"features": features, "flatten": nn.Flatten(), "classifier": nn.Linear(8, num_classes)}
    return nn.Sequential(OrderedDict(parts))
