"""Checkpoints, logs, images and models as train.py makes or leaves them, without its training; damaged files."""

import json
import os
import shlex
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from config import parse_train
from data_sets import DATA_SETS, SIDE, DataSet
from models import build_model
from runtime import checkpoint
from runtime.device import Runtime
from training.run import describe_data
from training.runs import RunConfig, plan
from utils import Images

CPU = Runtime(torch.device("cpu"))
CLASSES = 10
TEACHER, STUDENT, KD = "Teacher (VGG19 with BN)", "Student (w/o KD)", "Student (with KD, Temp = 5)"  # titles


def cells(text: str) -> list[list[str]]:
    """The rows of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def runs_of(command: str = "", spec: DataSet | None = None, **changes) -> list[RunConfig]:
    """The plan of `train.py COMMAND`, in one process in float32, with `changes`."""
    options = parse_train(["--precision=fp32", *shlex.split(command)])
    spec = spec or replace(DATA_SETS[options.dataset], fingerprint="a" * 16, train_images=50_000)
    return [replace(run, **changes) for run in plan(options, spec, "fp32", 1)]


def run_of(command: str = "", **changes) -> RunConfig:
    """The only run of `train.py COMMAND`, with `changes`; a student with KD has a made-up teacher."""
    (run,) = runs_of(command)
    return replace(run, **({"teacher": "b" * 16} if run.kd else {}) | changes)


def content_of(
    run: RunConfig, tops: tuple[float, ...] = (10.0,), model: nn.Module | None = None, weights: int = 0
) -> dict:
    """What a checkpoint of a run holds, with weights drawn from a seed and one test top-1 (%) per epoch."""
    torch.manual_seed(weights)
    spec = DATA_SETS[run.dataset]
    metrics = {"loss": 1.0, "ce": 1.0, "top1": 0.0, "top5": 90.0} | ({"kl": 0.5} if run.kd else {})
    header = {"run": asdict(run), "machine": {"torch": "2.14", "device": "a CPU"}, "title": run.title}
    lines, softened = [header | {"split": run.split}], {"teacher": {"entropy": 1.0}} if run.kd else {}
    for i, top1 in enumerate(tops):
        held_out = {"loss": 1.1, "top1": top1, "top5": 95.0}
        lines.append({"epoch": i + 1, "train": metrics, run.split: held_out, "lr": 0.1, "seconds": 1.0} | softened)
    log = "".join(f"{json.dumps(line)}\n" for line in lines)
    model = model or build_model(run.role, run.num_classes)
    described = {"data": describe_data(spec), "epoch": len(tops), "log": log, "metrics": held_out, "seconds": 1.0}
    return header | described | {"model": model.state_dict()}


def flip_bit(path: Path, place: int | None = None) -> None:
    """Flip a bit in the middle of a file, or at a place."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def damaged(path: Path) -> None:
    """A checkpoint, a bit of it flipped."""
    checkpoint.save(path, {"model": {"weight": torch.zeros(10_000)}})
    flip_bit(path)


class Hostile:
    """A pickle that makes a folder when a careless reader loads it."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def hostile(path: Path) -> None:
    torch.save({"run": {}, "model": Hostile()}, path)


def random_images(count: int, seed: int = 0, size: int = SIDE) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


def draw(path: Path, seed: int) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


class TinyTeacher(nn.Module):
    """A stand-in with all that could be changed by mistake, batch norm and dropout, and a count of images seen."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.features.append(nn.AdaptiveAvgPool2d(15))  # which changes nothing at 32 x 32
        self.classifier = nn.Linear(4 * 15 * 15, num_classes)
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        self.seen.append(images)
        return self.classifier(self.features(images).flatten(1))


def tiny_student(num_classes: int = CLASSES) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    parts = {"features": nn.Sequential(*layers), "flatten": nn.Flatten(), "classifier": nn.Linear(8, num_classes)}
    return nn.Sequential(OrderedDict(parts))
