"""Finished checkpoints evaluated side by side on the images of one data set."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from evaluation.inference import count_parameters, measure_cost
from evaluation.measures import bias_correction, fidelity, measure, measure_omitted
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from training.run import data_mismatch, load_model, spec_of, training_images_mismatch
from training.runs import RunConfig, RunName, config_of, is_baseline_of, row_labels
from training.teacher_logits import Teacher
from utils import Data, Images, logits_of

CORRECTED = ("top1", "top1_omitted", "top1_others", "per_class")


def as_trained(runtime: Runtime, run: RunConfig, precision: str = "auto") -> Runtime:
    """The runtime in the precision that a run was trained in, to repeat its logged accuracy; --precision overrides."""
    if precision != "auto" or run.precision == "bf16":
        return runtime  # --precision was given, or auto has chosen: bf16 only where it is fast
    return replace(runtime, precision=run.precision if runtime.device.type == "cuda" else "fp32")


def measure_checkpoint(
    model: torch.nn.Module, content: dict, images: Images, data: Data, runtime: Runtime
) -> tuple[torch.Tensor, dict]:
    """A checkpoint's logits (N, C) of images and their metrics; with omitted classes also top-1 on these and others."""
    run, spec, targets = config_of(content), spec_of(content), images.labels
    logits = logits_of(model, images, spec, runtime)
    numbers = measure(logits, targets)
    omitted = data.class_indices(run.omit).tolist()
    if omitted:
        numbers |= measure_omitted(logits, targets, omitted)
    if omitted and run.images == data.spec.fingerprint:  # the bias correction needs the student's training images
        train = data.train[: len(data.rows(run.subset, run.holdout))]  # all classes; a slice, as a copy may not fit
        offsets = bias_correction(logits_of(model, train, spec, runtime), train.labels, omitted)
        corrected = measure(logits + offsets, targets) | measure_omitted(logits + offsets, targets, omitted)
        numbers |= {f"corrected_{name}": corrected[name] for name in CORRECTED if name in corrected}
        numbers["bias"] = offsets[omitted].tolist()
    return logits, numbers


def measure_all(
    contents: list[dict], run_name: RunName, data: Data, runtime: Runtime, teacher: Teacher | None = None,
    cost: bool = False, allowed_student: str | None = None, precision: str = "auto",
) -> list[dict]:  # fmt: skip
    """The checkpoints that fit the data, each with its metrics as `measured`; the others are printed as left out.

    All are evaluated on the images that `run_name` is evaluated on. `teacher` is used only if it is a folder of
    logits. With `cost` all models are timed. `allowed_student` is the value of --student.
    """
    images = data.held_out(run_name.subset, run_name.holdout)
    runs = [config_of(content) for content in contents]
    runtime.check_same(data.spec.fingerprint, runs)
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    if teacher and teacher.model is None:  # a teacher with a model is among the checkpoints
        try:
            teachers[teacher.fingerprint] = teacher.test_logits(images, run_name.holdout)
        except UserError as error:  # a folder of logits may have none of the test images
            runtime.print(f"no student is compared with the teacher: {error}")
    for run, content in zip(runs, contents, strict=True):
        try:
            if why := data_mismatch(content, data.spec) or training_images_mismatch(content, run_name, data.spec):
                raise UserError(f"{content['path']} {why}")
            run_runtime = as_trained(runtime, run, precision)
            model = load_model(content, run_runtime, allowed_student)
            logits, numbers = measure_checkpoint(model, content, images, data, run_runtime)
            del numbers["confusion"]  # in no table, and large with many classes
        except UserError as error:
            prefix = "" if str(content["path"]) in str(error) else f"{content['path']}: "
            runtime.print(f"left out: {prefix}{error}")
            continue
        numbers |= {"parameters": count_parameters(model), "seconds": content["seconds"]}
        if run.role == "teacher":
            numbers["fingerprint"] = checkpoint.fingerprint(content["model"])
            teachers[numbers["fingerprint"]] = logits
        else:
            candidates = {run.teacher}  # fingerprints: the student is compared only if there is just one
            if not run.kd:  # the teachers of the KD students in its folder whose baseline it is, else all in the table
                folder = content["path"].parent
                in_folder = [other for other, c in zip(runs, contents, strict=True) if c["path"].parent == folder]
                candidates = {other.teacher for other in in_folder if is_baseline_of(run, other)} or set(teachers)
            if len(candidates) == 1 and candidates <= teachers.keys():
                (fingerprint,) = candidates
                numbers |= fidelity(logits, teachers[fingerprint], images.labels)
        if cost and runtime.is_main:
            numbers |= measure_cost(model, content["path"], run_runtime, run.size)
        shown.append(content | {"measured": numbers})
    return shown


def rows_of(contents: list[dict]) -> dict[str, list[dict]]:
    """Checkpoints by their row's label: those of a folder that differ in the seed alone share a row, copies do not."""
    rows: dict[tuple, list[dict]] = {}
    copies: Counter[tuple] = Counter()  # how often a run was found in a folder
    for content in contents:
        run, folder = config_of(content), Path(content["path"]).parent  # a folder of --name may come from other code
        row_key = replace(run, seed=0), folder, copies[run, folder]
        rows.setdefault(row_key, []).append(content)
        copies[run, folder] += 1
    by_label: dict[str, list[dict]] = {}
    labels = row_labels([run for run, *_ in rows])
    for label, row in zip(labels, rows.values(), strict=True):
        path = Path(row[0]["path"])
        full_label = f"{label}, {path.parent}" if labels.count(label) > 1 else label
        if full_label in by_label:  # a copy in the same folder
            full_label = f"{label}, {path}"
        by_label[full_label] = row
    return by_label
