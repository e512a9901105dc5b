"""Finished checkpoints evaluated side by side on the images of one data set."""

import contextlib
from dataclasses import replace

import torch

from evaluation.inference import count_parameters, measure_cost
from evaluation.measures import fidelity, measure
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.signals import StopSignal
from training.run import load_model, mismatch, spec_of
from training.runs import RunConfig, labels, run_from, same_row
from training.teacher_logits import TeacherLogits
from utils import Data, Images, held_out_logits

TOPS = {"top1": "top-1", "top5": "top-5"}


def as_trained(runtime: Runtime, run: RunConfig, precision: str = "auto") -> Runtime:
    """The runtime in which a checkpoint repeats its log: float32, with --precision auto, if it was trained so."""
    return replace(runtime, autocast_dtype=None) if precision == "auto" and run.precision == "fp32" else runtime


def logits_of(
    model: torch.nn.Module, content: dict, images: Images, runtime: Runtime, stop: StopSignal | None = None
) -> torch.Tensor:
    """The logits (N, C) of a checkpoint's model, normalised as in its training; see `compute_logits`."""
    return held_out_logits(model, images, spec_of(content), runtime, stop)


def measure_all(
    contents: list[dict],
    data: Data,
    runtime: Runtime,
    teacher: TeacherLogits | None = None,
    stop: StopSignal | None = None,
    cost: bool = False,
    student: str | None = None,
) -> list[dict]:
    """The checkpoints, teachers first, that fit the data, each with what is `measured` of it; the others are named.

    A student is compared with its own teacher, if that is `teacher` or among them, and one without KD with the first.
    With `cost` they are timed, too. `student` is the --student that was typed. Stopped if a signal came.
    """
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    if teacher and teacher.model is None and contents:  # a teacher with a model is among the checkpoints
        first = run_from(contents[0]["run"])
        with contextlib.suppress(UserError):  # a folder of logits may have none of the test images
            logits = teacher.of_test_images(data.held_out(first.subset, first.holdout), first.holdout, stop)
            teachers[teacher.fingerprint] = logits
    for content in contents:
        run = run_from(content["run"])
        images = data.held_out(run.subset, run.holdout)
        try:
            if why := mismatch(content, run, data.spec):
                raise UserError(f"{content['path']} {why}")
            model = load_model(content, runtime, student)
        except UserError as error:
            runtime.print(f"left out: {error}")
            continue
        in_training = as_trained(runtime, run)
        logits = logits_of(model, content, images, in_training, stop)
        numbers = measure(logits, images.labels) | {"parameters": count_parameters(model)}
        if run.role == "teacher":
            teachers[checkpoint.fingerprint(content["model"])] = logits
        elif (its_teacher := run.teacher if run.kd else next(iter(teachers), None)) in teachers:
            numbers |= fidelity(logits, teachers[its_teacher], images.labels)
        numbers["seconds"] = content["seconds"]
        if cost and runtime.is_main:
            numbers |= measure_cost(model, content["path"], in_training, run.size).medians()
        shown.append(content | {"measured": numbers})
    return shown


def rows_of(contents: list[dict]) -> dict[str, list[dict]]:
    """Checkpoints by the label of their row: those that differ in the seed alone share one, copies of a run do not."""
    rows: list[list[dict]] = []
    for content in contents:
        run = run_from(content["run"])
        others = ([run_from(other["run"]) for other in row] for row in rows)
        fits = (same_row(row[0], run) and run.seed not in {other.seed for other in row} for row in others)
        place = next((i for i, fit in enumerate(fits) if fit), None)
        if place is None:
            rows.append([content])
        else:
            rows[place].append(content)
    names = labels([run_from(row[0]["run"]) for row in rows])
    for i, row in enumerate(rows):
        if names[i] in names[:i]:
            names[i] += f", {row[0]['path']}"
    return dict(zip(names, rows, strict=True))
