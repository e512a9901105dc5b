"""The teacher's logits of each view of the training images, computed once and shared: docs/teacher_logits.md."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from data_sets import DataSet
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError, reason
from runtime.files import load_arrays, save_arrays, write_json
from training.run import describe_data, load_model, mismatch
from training.runs import UNKNOWN, RunConfig, RunName
from utils import Images, Views, compute_logits, held_out_logits

VERSION = 1  # of the forward pass and the views: a change that alters logits gets a new number


class TeacherLogits:
    """A teacher in a checkpoint, or a folder of logits that somebody's model wrote."""

    def __init__(self, path: Path, spec: DataSet, runtime: Runtime, weights_path: Path, content: dict | None) -> None:
        """`content` is the teacher's checkpoint, None if `path` is a folder. UserError if it can't teach on `spec`."""
        self.path, self.spec, self.runtime, self.content, self.model = path, spec, runtime, content, None
        self.in_memory: dict[str, np.ndarray] = {}  # what can't be written
        self.view_seconds = 0.0  # to compute the logits of one view
        if content is None:
            self.folder = path
            self.fingerprint = self.key = read_description(path, spec)
        else:
            self.model = load_model(content, runtime)
            self.fingerprint = checkpoint.fingerprint(content["model"])
            if "epoch" in content:  # a guess until one is computed: the forward pass is a third of an epoch's work
                self.view_seconds = content["seconds"] / content["epoch"] / 3
            facts = (VERSION, self.fingerprint, spec.fingerprint, spec.mean, spec.std, spec.flip, runtime.precision)
            self.key = checkpoint.fingerprint({}, *facts)
            self.folder = weights_path / f"{path.stem}_logits_{self.key}"

    @property
    def title(self) -> str:
        """The path, and the seed of a teacher that train.py trained."""
        if self.is_unknown:
            return f"{self.path} ({'state dict' if self.content else 'logits'}: its training images are unknown)"
        return f"{self.path} (seed {self.content['run']['seed']})"

    @property
    def is_unknown(self) -> bool:
        """Whether it can't be known on which images the teacher was trained."""
        return self.content is None or self.content["run"]["images"] == UNKNOWN

    def missing(self, count: int) -> list[int]:
        """Of which of the first `count` views there are no logits."""
        names = {k: f"{k:02}.npz" for k in range(count)}
        return [k for k in names if names[k] not in self.in_memory and not (self.folder / names[k]).exists()]

    def check_views(self, count: int) -> None:
        """UserError if a folder of logits lacks one of the first `count` views, before hours of training."""
        missing = self.missing(count)
        if self.model is None and missing:
            raise UserError(
                f"{self.folder} lacks the logits of {len(missing)} of {count} views, the first is "
                f"{missing[0]:02}.npz: write them (docs/own.md), or give a smaller --views"
            )

    def of_view(self, k: int, views: Views, rows: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) float16 on the device: row i is training image i in its k-th view, for all i in `rows`."""
        count = int(rows.max()) + 1
        logits = self.read(f"{k:02}.npz", count)
        if logits is None:
            start = time.monotonic()
            logits = compute_logits(
                self.model, lambda some: views.images(some, k), count, len(self.spec.classes), self.runtime,
                title=f"teacher's logits of view {k}",
            )  # fmt: skip
            self.view_seconds = time.monotonic() - start
            logits = self.write(f"{k:02}.npz", logits)
        return torch.from_numpy(logits[:count]).to(self.runtime.device)

    def of_test_images(self, images: Images, holdout: int = 0) -> torch.Tensor:
        """Logits (N, C) float64 on the CPU of the first N test images, or with `holdout` of these held-out images.

        UserError if they have to be computed, and only a folder of logits was given.
        """
        if holdout:  # images that depend on --subset, too: not kept
            if self.model is None:
                raise UserError(f"{self.folder} has no logits of held-out images: give a checkpoint as --teacher")
            return held_out_logits(self.model, images, self.spec, self.runtime).half().double()
        logits = self.read("test.npz", len(images))
        if logits is None:
            logits = self.write("test.npz", held_out_logits(self.model, images, self.spec, self.runtime))
        return torch.from_numpy(logits[: len(images)]).double()

    def read(self, name: str, count: int) -> np.ndarray | None:
        """The first `count` logits of a file, float16; None if they have to be computed.

        UserError if that takes a model, and only the folder of logits was given.
        """
        path, logits = self.folder / name, self.in_memory.get(name)
        if logits is None or len(logits) < count:
            try:
                logits = read_logits(path, self.key, count, len(self.spec.classes))
            except ValueError as error:
                if self.model is None:
                    raise UserError(f"can't use {path}: {error}; write it again, or give another --teacher") from error
                logits = None
        missing = self.runtime.agree(logits is None)[0]  # of one process: then all compute
        return None if missing else logits

    def write(self, name: str, logits: torch.Tensor) -> np.ndarray:
        """Keep logits as float16, on disk or, where that fails, in memory; what was kept."""
        halves = logits.half().numpy()
        if not self.runtime.is_main:
            self.in_memory[name] = halves
            return halves
        try:
            write_logits(self.folder, name, halves, self.key)
            describe_logits(self.folder, self.spec, self.key)
        except UserError as error:
            if not self.in_memory:
                self.runtime.print(f"{error}; the teacher's logits stay in memory")
            self.in_memory[name] = halves
        return halves


def read_logits(path: Path, key: str, count: int, classes: int) -> np.ndarray:
    """Logits (N, classes) float16, N >= count, of a file; ValueError that says why not if it has none."""
    logits = load_arrays(path, key).get("logits", np.empty(0))
    if logits.dtype != np.float16 or logits.shape[1:] != (classes,):
        raise ValueError("its logits are not (images, classes) in float16")
    if len(logits) < count:
        raise ValueError(f"it has the logits of {len(logits)} images, not {count}")
    if not np.isfinite(logits).all():
        raise ValueError("it has logits that are not finite")
    return logits


def write_logits(folder: Path, name: str, logits: torch.Tensor | np.ndarray, key: str) -> None:
    """Write logits (N, C), a tensor as float16, to `folder`, atomically and with check sums; UserError if it fails."""
    logits = logits.half().numpy() if isinstance(logits, torch.Tensor) else logits
    save_arrays(folder / name, key, logits=logits)


def describe_logits(folder: Path, spec: DataSet, key: str) -> None:
    """Write what the logits in `folder` are of, unless it is there."""
    path = folder / "teacher.json"
    if not path.exists():
        content = {"key": key, "classes": list(spec.classes), "images": spec.fingerprint, "flip": spec.flip}
        write_json(path, content | {"version": VERSION})


def read_description(folder: Path, spec: DataSet) -> str:
    """The key of a folder of logits; UserError if it is none, or of other classes or images than `spec`."""
    path = folder / "teacher.json"
    try:
        content = json.loads(path.read_text())
        key, classes, images, flip = str(content["key"]), tuple(content["classes"]), content["images"], content["flip"]
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
    except OSError as error:
        raise UserError(f"{folder} is no folder of logits: can't read {path}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe logits for this version: see docs/own.md") from error
    if classes != spec.classes:
        raise UserError(f"{folder} has logits of {len(classes)} other classes: give another --teacher")
    if images != spec.fingerprint:
        raise UserError(f"{folder} has logits of other images than {spec.name} here: give another --teacher")
    if flip != spec.flip:
        raise UserError(f"{folder} has logits of views for --flip {flip}, not {spec.flip}: give another --teacher")
    return key


def teacher_path(student: RunName, options) -> Path:
    """The checkpoint of a student's teacher, or the folder of its logits; UserError if there is none."""
    name = student.teacher_name
    path = options.teacher or options.weights_path / f"{name.stem}.pt"
    if not path.exists():
        folders = options.folders("data_path", "skip_broken", "flip", "weights_path", "plots_path")
        train = name.command("train.py", **folders)
        raise UserError(f"no teacher {path}: train one with `{train}`, or name another one by --teacher")
    return path


def load_teacher(
    student: RunConfig, options, spec: DataSet, runtime: Runtime, content: dict | None = None
) -> TeacherLogits:
    """The teacher of a student, from its `content` if that was read before.

    UserError if there is none, or if it can't teach on `spec`, the data as it was read.
    """
    path = content["path"] if content else teacher_path(student, options)
    if content is None and not path.is_dir():
        content = read_teacher(path, student, spec)
    if content and (why := teacher_mismatch(content, student, spec)):
        raise UserError(f"the teacher {path} {why}: choose another one with --teacher or --weights_path")
    return TeacherLogits(path, spec, runtime, options.weights_path, content)


def read_teacher(path: Path, student: RunConfig, spec: DataSet) -> dict:
    """The teacher's checkpoint, of a plain state dict a made-up one; UserError if it is neither."""
    content = checkpoint.load_any(path)
    if isinstance(content, dict) and isinstance(content.get("classifier.weight"), torch.Tensor):
        return made_up_checkpoint(path, content, student, spec)
    return checkpoint.accept(content, path)


def made_up_checkpoint(path: Path, state: dict, student: RunConfig, spec: DataSet) -> dict:
    """A state dict with the teacher's keys as a checkpoint of a run of which nothing is known; UserError."""
    classes = len(state["classifier.weight"])
    if classes != len(spec.classes):
        raise UserError(f"the teacher {path} has {classes} classes, and {spec.name} has {len(spec.classes)}")
    unknown = {"images": UNKNOWN, "num_epochs": 0, "kd_weights": (), "ce_weight": 1.0, "student_layers": ""}
    unknown |= {"teacher": None, "teacher_unknown": False}
    run = replace(student, **asdict(student.teacher_name), **unknown)
    words = {"title": run.title, "data": describe_data(spec), "machine": {}, "log": "", "seconds": 0.0, "metrics": {}}
    return {"run": asdict(run), "model": state, "path": path} | words


def teacher_mismatch(content: dict, student: RunName, spec: DataSet) -> str:
    """Why a checkpoint can't teach a student on these images, in words, or nothing."""
    if "metrics" not in content:
        return "is an unfinished run"
    return "is a student" if content["run"]["role"] != "teacher" else mismatch(content, student, spec)
