"""The teacher's logits of each view of the training images, computed once and shared: docs/teacher_logits.md."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_sets import DataSet
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.files import load_arrays, save_arrays, write_json
from training.run import data_mismatch, describe_data, load_model, require_finished, training_images_mismatch
from training.runs import UNKNOWN, RunConfig, RunName
from utils import Images, Views, compute_logits, fingerprint_views, logits_of


class Teacher:
    """A teacher: a checkpoint, or a folder with the logits of any model (`model` and `content` are then None)."""

    def __init__(self, path: Path, spec: DataSet, runtime: Runtime, weights_path: Path, content: dict | None) -> None:
        """`content` is the teacher's checkpoint, None if `path` is a folder. UserError if it can't teach on `spec`."""
        self.path, self.spec, self.runtime, self.content, self.model = path, spec, runtime, content, None
        self.images_unknown = content is None or content["run"]["images"] == UNKNOWN  # those that it was trained on
        if content is None:
            self.folder = path
            self.fingerprint = self.key = read_key(path, spec)
        else:
            self.model = load_model(content, runtime)
            self.fingerprint = checkpoint.fingerprint(content["model"])
            facts = (self.fingerprint, spec.fingerprint, spec.mean, spec.std, spec.flip, runtime.precision)
            self.key = checkpoint.fingerprint({}, fingerprint_views(), *facts)
            self.folder = weights_path / f"{path.stem}_logits_{self.key}"

    @property
    def title(self) -> str:
        """The path, and how train.py trained the teacher."""
        if self.images_unknown:
            return f"{self.path} (its training images are unknown)"
        run, top1 = self.content["run"], self.content["metrics"]["top1"]
        return f"{self.path} (seed {run['seed']}, num_epochs {run['num_epochs']}, {top1:.2f}% top-1)"

    def added_to(self, config: RunConfig) -> RunConfig:
        """A copy of a run with KD that names this teacher; a run without KD as it is."""
        return replace(config, teacher=self.fingerprint, teacher_unknown=self.images_unknown) if config.kd else config

    def check_views(self, count: int) -> None:
        """UserError if a folder lacks the logits of one of the first `count` views, or they are damaged."""
        if self.model is not None:
            return
        for k in range(count):
            try:
                self.cached(f"{k:02}.npz", 1, None)
            except UserError as error:
                raise UserError(f"{error}, or --views {k}" if k else str(error)) from error

    def view_logits(self, k: int, views: Views, rows: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) float16 on the device: row i is training image i in its k-th view, for all i in `rows`."""
        count, classes = int(rows.max()) + 1, len(self.spec.classes)
        images_of, title = partial(views.images, k=k), f"teacher's logits of view {k}"
        compute = partial(compute_logits, self.model, images_of, count, classes, self.runtime, title)
        return self.cached(f"{k:02}.npz", count, compute).to(self.runtime.device)

    def test_logits(self, images: Images, holdout: int = 0) -> torch.Tensor:
        """Logits (N, C) float16 on the CPU of test or held-out images; UserError if a folder of logits lacks them."""
        if holdout and self.model is None:
            raise UserError(f"{self.folder} has no logits of held-out images: give a checkpoint as --teacher")
        compute = partial(logits_of, self.model, images, self.spec, self.runtime)
        if holdout:  # not cached, as they depend on --subset, too, but rounded as if they were
            return compute().half()
        return self.cached("test.npz", len(images), compute)

    def cached(self, name: str, count: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The first `count` logits, float16, read, or computed and stored; UserError if a folder lacks them."""
        path = self.folder / name
        try:
            logits = read_logits(path, self.key, count, len(self.spec.classes))
        except ValueError as error:
            if self.model is None:
                advice = "write it (docs/own.md), or give another --teacher"
                raise UserError(f"can't use {path}: {error}; {advice}") from error
            logits = None
        if self.runtime.agree(logits is None)[0]:  # if one process lacks them, all compute
            logits = compute().half()
            try:
                if self.runtime.is_main:
                    write_logits(self.folder, name, logits, self.spec, self.key)
            except UserError as error:
                print(f"{error}; the teacher's logits are not stored", flush=True)
        return logits[:count]


def read_logits(path: Path, key: str, count: int, classes: int) -> torch.Tensor:
    """Logits (N, classes) float16, N >= count, of a file; ValueError with the reason if they can't be used."""
    logits = load_arrays(path, key).get("logits", np.empty(0))
    if logits.dtype != np.float16 or logits.shape[1:] != (classes,) or not np.isfinite(logits).all():
        raise ValueError("its logits are not finite float16 of shape (images, classes)")
    if len(logits) < count:
        raise ValueError(f"it has the logits of {len(logits)} images, not {count}")
    return torch.from_numpy(logits)


def write_logits(folder: Path, name: str, logits: torch.Tensor, spec: DataSet, key: str) -> None:
    """Write logits (N, C) as float16, with checksums, and what describes their images; UserError if that fails."""
    save_arrays(folder / name, key, logits=logits.half().numpy())
    write_json(folder / "teacher.json", {"key": key} | describe_images(spec))


def describe_images(spec: DataSet) -> dict:
    """What must match between logits and the data they are used for."""
    return {"classes": list(spec.classes), "images": spec.fingerprint, "flip": spec.flip, "views": fingerprint_views()}


def read_key(folder: Path, spec: DataSet) -> str:
    """The key of a folder of logits; UserError if it is no such folder, or its images are not those of `spec`."""
    path = folder / "teacher.json"
    try:
        content = json.loads(path.read_text())
        key = str(content["key"])
        others = [name for name, value in describe_images(spec).items() if content[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing, or describes no logits for this version: see docs/own.md") from error
    if others:
        what = f"other data than {spec.name} here (other {', other '.join(others)})"
        raise UserError(f"{folder} has logits of {what}: write them again (docs/own.md), or give another --teacher")
    return key


def teacher_path(student: RunName, options) -> Path:
    """The path of a student's teacher; UserError if none is named and none was trained."""
    name = student.teacher_name
    path = options.teacher or options.teacher_file(name.stem)
    if not (options.teacher or path.exists()):
        changed = options.changed("data_path", "skip_broken", "flip", "device", "weights_path", "plots_path")
        train = name.command("train.py", **changed)
        raise UserError(f"no teacher {path}: train one with `{train}`, or name another with --teacher")
    return path


def load_teacher(student: RunConfig, options, spec: DataSet, runtime: Runtime) -> Teacher:
    """A student's teacher, read from a checkpoint, a state dict or a folder of logits; UserError if it does not fit."""
    path, content = teacher_path(student, options), None
    if not path.is_dir():
        content = checkpoint.load(path, or_state_dict=bool(options.teacher))
        if "run" not in content:
            content = complete_state_dict(content, student, spec)
        if require_finished(content)["run"]["role"] == "student":
            why = "is a student"
        else:
            why = data_mismatch(content, spec) or training_images_mismatch(content, student, spec)
        if why:
            raise UserError(f"the teacher {path} {why}: give another --teacher, or --weights_path and --plots_path")
    return Teacher(path, spec, runtime, options.weights_path, content)


def complete_state_dict(content: dict, student: RunConfig, spec: DataSet) -> dict:
    """A checkpoint of an unknown run, made from a plain state dict with the teacher's keys."""
    no_kd = {"kd_weights": (), "ce_weight": 1.0, "student_layers": "", "teacher": None, "teacher_unknown": False}
    run = replace(student, **asdict(student.teacher_name), **no_kd, images=UNKNOWN, num_epochs=0)
    header = {"run": asdict(run), "title": run.title, "data": describe_data(spec), "machine": {}}
    return content | header | {"log": "", "seconds": 0.0, "metrics": {}}
