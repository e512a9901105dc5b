"""Finished checkpoints evaluated side by side on the images of one data set."""

import contextlib
from collections import Counter
from dataclasses import replace

import torch

from evaluation.inference import count_parameters, measure_cost, medians
from evaluation.measures import bias_correction, fidelity, measure, measure_omitted
from runtime import checkpoint
from runtime.device import PRECISIONS, Runtime
from runtime.errors import UserError
from training.run import load_model, mismatch, spec_of
from training.runs import RunConfig, RunName, labels, run_from
from training.teacher_logits import TeacherLogits
from utils import Data, Images, held_out_logits

TOPS = {"top1": "top-1", "top5": "top-5"}
CORRECTED = ("top1", "top1_omitted", "top1_others", "per_class")


def as_trained(runtime: Runtime, run: RunConfig, precision: str = "auto") -> Runtime:
    """The runtime in which a checkpoint repeats its log, with --precision auto; in 16 bits only where that is fast."""
    if precision != "auto" or run.precision == "bf16":
        return runtime
    has_fp16 = runtime.device.type == "cuda"
    return replace(runtime, autocast_dtype=PRECISIONS[run.precision] if has_fp16 else None)


def measure_checkpoint(
    model: torch.nn.Module, content: dict, images: Images, data: Data, runtime: Runtime
) -> tuple[torch.Tensor, dict]:
    """The logits (N, C) of a checkpoint for the images to evaluate it on, and all that these say.

    Where classes were omitted also top-1 on these and on others, as it is and after the bias correction, which is left
    out without the training images of the student.
    """
    run, spec, labels = run_from(content["run"]), spec_of(content), images.labels
    logits = held_out_logits(model, images, spec, runtime)
    numbers = measure(logits, labels)
    omitted = data.numbers_of(run.omit).tolist()
    if omitted:
        numbers |= measure_omitted(logits, labels, omitted)
    if omitted and run.images == data.spec.fingerprint:
        train = data.train[: len(data.rows(run.subset, run.holdout))]  # all classes; a view, for a copy may not fit
        offsets = bias_correction(held_out_logits(model, train, spec, runtime), train.labels, omitted)
        corrected = measure(logits + offsets, labels) | measure_omitted(logits + offsets, labels, omitted)
        numbers |= {f"corrected_{name}": corrected[name] for name in CORRECTED if name in corrected}
        numbers["bias"] = offsets[omitted].tolist()
    return logits, numbers


def measure_all(
    contents: list[dict],
    name: RunName,
    data: Data,
    runtime: Runtime,
    teacher: TeacherLogits | None = None,
    cost: bool = False,
    student: str | None = None,
    precision: str = "auto",
) -> list[dict]:
    """The checkpoints, teachers first, that fit the data, each with what is `measured` of it; the others are named.

    All are evaluated on the test or held-out images of the run `name`. A student is compared with its own teacher, if
    that is `teacher` or among them, and one without KD with the first. With `cost` they are timed, too. `student` is
    the --student that was typed. Stopped if a signal came.
    """
    images = data.held_out(name.subset, name.holdout)
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    if teacher and teacher.model is None:  # a teacher with a model is among the checkpoints
        with contextlib.suppress(UserError):  # a folder of logits may have none of the test images
            teachers[teacher.fingerprint] = teacher.of_test_images(images, name.holdout)
    for content in contents:
        run = run_from(content["run"])
        try:
            if why := mismatch(content, name, data.spec):
                raise UserError(f"{content['path']} {why}")
            in_training = as_trained(runtime, run, precision)
            model = load_model(content, in_training, student)
        except UserError as error:
            runtime.print(f"left out: {error}")
            continue
        logits, numbers = measure_checkpoint(model, content, images, data, in_training)
        numbers["parameters"] = count_parameters(model)
        if run.role == "teacher":
            teachers[checkpoint.fingerprint(content["model"])] = logits
        elif (its_teacher := run.teacher if run.kd else next(iter(teachers), None)) in teachers:
            numbers |= fidelity(logits, teachers[its_teacher], images.labels)
        numbers["seconds"] = content["seconds"]
        if cost and runtime.is_main:
            numbers |= medians(measure_cost(model, content["path"], in_training, run.size))
        shown.append(content | {"measured": numbers})
    return shown


def rows_of(contents: list[dict]) -> dict[str, list[dict]]:
    """Checkpoints by the label of their row: those that differ in the seed alone share one, copies of a run do not."""
    rows: dict[tuple[RunConfig, int], list[dict]] = {}
    copies: Counter[RunConfig] = Counter()
    for content in contents:
        run = run_from(content["run"])
        rows.setdefault((replace(run, seed=0), copies[run]), []).append(content)
        copies[run] += 1
    found: dict[str, list[dict]] = {}
    for name, row in zip(labels([run for run, _ in rows]), rows.values(), strict=True):
        found[f"{name}, {row[0]['path']}" if name in found else name] = row
    return found
