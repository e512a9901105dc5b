"""Evaluate what train.py left: accuracy, calibration, fidelity to the teacher, cost.

    python test.py --tto True              the teacher
    python test.py                         the student without KD
    python test.py --kd True --temp 5      the student with KD
    python test.py --checkpoint FILE       any checkpoint; what it is, it says itself
    python test.py --compare True          one table of all checkpoints found
    python test.py --image cat.png         the class of any picture, by student and teacher
    python test.py --tto True --soften 1 5 20    what a temperature does to the teacher's probabilities
    python test.py --json student.json     the report's numbers in a file, too
    python test.py --export student.pt2    the model as a program that runs without this project, too
    torchrun --nproc_per_node=2 test.py    any of these on two devices

In the precision that it was trained with, the first line repeats the training log's last one.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import config

if __name__ == "__main__":
    config.answer_early(config.parse_test)  # --help and a wrong option answer here, before torch is imported

import numpy as np
import torch

from datasets import DatasetSpec
from datasets.folder import find_dataset
from datasets.pictures import bombs_refused, read_picture
from evaluation import figures, inference, report
from evaluation.comparison import as_trained, check_classes, compare_images, load_held_out, logits_of, measure_all
from evaluation.measures import fidelity, measure
from models import ARCHITECTURES
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import UserError, exit_code
from runtime.files import make_folder
from runtime.identity import DISTILLATION, Identity
from runtime.processes import start
from utils import Images


def load(options: config.TestOptions, path: Path, role: str, runtime: Runtime) -> tuple[torch.nn.Module, dict]:
    """A model on the device and its checkpoint's content; UserError where it is missing or another's."""
    if not path.exists():
        if path == options.teacher:
            raise UserError(f"there is no teacher {path}: check its name, or leave --teacher out")
        made = options if role == options.role else options.of_teacher
        raise UserError(
            f"no checkpoint {path} in {path.parent.absolute()}: make it with `{made.command('train.py')}`, "
            "or give its folder by --weights_path"
        )
    return inference.load_model(path, role, options.dataset, runtime.device)


def with_checkpoint(options: config.TestOptions) -> tuple[config.TestOptions, Path]:
    """The checkpoint to evaluate, and the options completed by what a --checkpoint says of itself.

    With --tto True, --teacher names it. UserError where it is missing, damaged or of an unknown kind, or where it is a
    teacher and --teacher names one to compare it with.
    """
    if options.checkpoint is None:
        return options, options.teacher if options.tto and options.teacher else options.checkpoint_path
    run = checkpoint.load(options.checkpoint)["identity"]
    if run["role"] not in ARCHITECTURES or run["dataset"] not in config.DATASETS:
        raise UserError(f"{options.checkpoint} holds a {run['role']} of {run['dataset']}, which this version knows not")
    if options.teacher and run["role"] == "teacher":
        raise UserError(f"{options.checkpoint} is a teacher, which is compared with none: leave --teacher out")
    facts = {name: run[name] for name in ("dataset", "seed", "subset", "kd")}
    facts |= {"tto": run["role"] == "teacher", "holdout": run["holdout"] or 0}
    facts["temp"] = (run["temp"] or config.USUAL_TEMP,)
    return replace(options, **facts), options.checkpoint


@contextlib.contextmanager
def left_out_unless_named(options: config.TestOptions, tell: Callable[[str], None]) -> Iterator[None]:
    """A UserError about the teacher ends the block, and `tell` says it; where --teacher names it, it is raised."""
    try:
        yield
    except UserError as error:
        if options.teacher:
            raise
        tell(f"the teacher is left out: {error}")


def evaluate(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the report of one checkpoint and write its figures and files; an export needs no folder of images."""
    options, path = with_checkpoint(options)
    model, content = load(options, path, options.role, runtime)
    run, spec = content["identity"], content["spec"]
    files = [file for file in (options.json, options.export) if file and not report.is_written_through(file)]
    for file in files:
        make_folder(file.parent)
    there = options.spec.is_known or os.path.isdir(options.data_path / "train")
    if options.export and not options.json and not there:
        saved = export(model, options.export, spec) if runtime.is_main else ""
        return runtime.print(f"saved {saved}; not evaluated, for there is no {options.data_path / 'train'}")
    found, notes = find_dataset(options.spec, options.data_path, options.skip_broken, runtime)
    images = load_held_out(options, found, runtime)
    notes += compare_images(options, found, content, path)
    labels, logits = images.labels.cpu(), logits_of(model, content, images, options, runtime)
    numbers = measure(logits, labels)
    teacher, extra, fidelity_text = None, {}, ""
    if not options.tto:
        with left_out_unless_named(options, notes.append):
            teacher, extra, fidelity_text = compare_with_teacher(options, runtime, content, found, images, logits)
    if not runtime.is_main:
        return
    runtime = as_trained(options, runtime, run)
    cost = inference.measure_cost(model, path, runtime)
    teacher_cost = teacher and inference.measure_cost(teacher, options.teacher_path, runtime)
    title, stem = f"{run.title} on {options.dataset}", options.plots_path / path.stem
    saved = [
        figures.plot_confusion(numbers, spec.classes, f"{title}: confusion", Path(f"{stem}_confusion.png")),
        figures.plot_reliability(logits, labels, f"{title}: reliability", Path(f"{stem}_reliability.png")),
    ]
    if options.json:
        values = {"checkpoint": str(path), "role": options.role, **numbers, **cost.medians(), **extra}
        saved.append(report.write_json(options.json, values))
    if options.export:
        saved.append(export(model, options.export, spec))
    tops = " ".join(f"{name} {100 * numbers[name]:.2f}%" for name in report.TOPS if name in numbers)
    print(f"{options.split} loss {numbers['loss']:.4f} {tops}")
    print("\n".join([f"{path} on {options.dataset}, {device_title(runtime)}, {runtime.precision}", *notes, ""]))
    print(report.accuracy_text(numbers, spec.classes))
    print(f"\n{fidelity_text}\n" if fidelity_text else "")
    print(f"{report.cost_text(cost, teacher_cost)}\n\nsaved {', '.join(map(str, saved))}")


def export(model: torch.nn.Module, path: Path, spec: DatasetSpec) -> str:
    """Export a model; the file and how exact it is, in words."""
    difference = inference.export_model(model, path, spec)
    return f"{path}, whose logits differ by {difference:.1g} at most when it is loaded again"


def compare_with_teacher(
    options: config.TestOptions,
    runtime: Runtime,
    student: dict,
    found: DatasetSpec,
    images: Images,
    logits: torch.Tensor,
) -> tuple[torch.nn.Module, dict, str]:
    """The teacher, the student's fidelity to it, and the table; beside KD, the student without it as a control."""
    labels, run = images.labels.cpu(), student["identity"]
    teacher, content = load(options, options.teacher_path, "teacher", runtime)
    notes = compare_images(options, found, content, options.teacher_path)
    teacher_logits = logits_of(teacher, content, images, options, runtime)
    extra = fidelity(logits, teacher_logits, labels)
    columns = {"this student": extra}
    control = replace(options, kd=False).checkpoint_path
    if options.kd and control.exists():
        # Agreement grows with accuracy alone: what KD adds is seen beside the student that had no teacher.
        try:
            its_logits = logits_of_control(options, runtime, control, run, images)
            columns["without KD"] = fidelity(its_logits, teacher_logits, labels)
        except UserError as error:
            notes.append(f"left out: {error}")
    if options.kd and run["teacher"] != checkpoint.fingerprint(teacher.state_dict()):
        notes.append(f"{options.teacher_path} is not the teacher that this student learned from")
    return teacher, extra, "\n".join([report.fidelity_text(columns), *notes])


def logits_of_control(
    options: config.TestOptions, runtime: Runtime, path: Path, run: Identity, images: Images
) -> torch.Tensor:
    """The logits of the student without KD beside a run with it; UserError where it is damaged or no control of it."""
    model, content = load(options, path, "student", runtime)
    its_run = content["identity"]
    if not its_run.is_control_of(run):
        raise UserError(f"{path} is not its control: it has {its_run.beside(run, DISTILLATION)}")
    return logits_of(model, content, images, options, runtime)


def compare(options: config.TestOptions, runtime: Runtime) -> None:
    """Evaluate every finished checkpoint of these images and publish their table; UserError where there is none."""
    contents = find_checkpoints(options, runtime)
    command = options.command("train.py").replace("train.py", "train.py --all True", 1)
    nothing = UserError(
        f"no finished checkpoint of {options.dataset} in {options.weights_path.absolute()}: "
        f"make them with `{command}`, or give --weights_path"
    )
    if not contents:
        raise nothing
    found, notes = find_dataset(options.spec, options.data_path, options.skip_broken, runtime)
    for note in notes:
        runtime.print(note)
    shown = measure_all(contents, found, options, runtime, cost=True)
    if not shown:
        raise nothing
    if runtime.is_main:
        report.publish(shown, options, "comparison")


def find_checkpoints(options: config.TestOptions, runtime: Runtime) -> list[dict]:
    """The finished checkpoints of these images, each with its path, teachers first.

    With --teacher, that one and, of the students with KD, its own. What is none of ours is named and left out.
    """
    contents = []
    for path in sorted(options.weights_path.glob(f"{options.spec.prefix}*.pt")):
        if not path.name.endswith(".last.pt"):
            try:
                contents.append(checkpoint.load(path) | {"path": path})
            except UserError as error:
                runtime.print(f"left out: {error}")
    images = options.dataset, options.holdout
    contents = [c for c in contents if (c["identity"]["dataset"], c["identity"]["holdout"] or 0) == images]
    contents = [content for content in contents if "metrics" in content]
    if options.teacher:
        teacher, named = inference.load_model(options.teacher, "teacher", options.dataset, runtime.device)
        its_own = None, checkpoint.fingerprint(teacher.state_dict())
        students = [content for content in contents if content["identity"]["role"] == "student"]
        contents = [content for content in students if content["identity"]["teacher"] in its_own]
        contents.append(named | {"path": options.teacher})
    return sorted(contents, key=lambda content: content["identity"].place)


def read_pictures(options: config.TestOptions, runtime: Runtime) -> tuple[np.ndarray, list[str]]:
    """The pictures (B, 32, 32, 3) of --image, or the first test images of four classes, and what they are called."""
    if options.image:
        with bombs_refused():
            return np.stack([read_picture(path) for path in options.image]), [path.name for path in options.image]
    found, _ = find_dataset(options.spec, options.data_path, options.skip_broken, runtime)
    images = load_held_out(options, found, runtime)
    labels = images.labels.tolist()
    rows = sorted(labels.index(label) for label in set(labels))[:4]
    return images.pixels[rows].cpu().numpy(), [f"{found.classes[labels[row]]} ({options.split} {row})" for row in rows]


def classify(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the classes of pictures by the model and its teacher, and draw them.

    With --soften, by the model alone, at several temperatures.
    """
    options, path = with_checkpoint(options)
    pixels, names = read_pictures(options, runtime)
    models = [load(options, path, options.role, runtime)]
    spec = models[0][1]["spec"]
    if not (options.tto or options.soften):
        with left_out_unless_named(options, runtime.print):
            teacher, content = load(options, options.teacher_path, "teacher", runtime)
            check_classes(spec.classes, content, options.teacher_path)
            models.append((teacher, content))
    answers = {}
    for model, content in models:
        for temp in options.soften or (1.0,):
            title = content["identity"].title + (f", T = {config.plain(temp)}" if options.soften else "")
            answers[title] = inference.classify(model, pixels, content["spec"], runtime, temp)
    if not runtime.is_main:
        return
    figure = options.plots_path / f"{path.stem}_{'softened' if options.soften else 'images'}.png"
    figures.plot_pictures(pixels, names[: figures.PICTURES_SHOWN], answers, spec.classes, figure)
    told_names = [str(picture) for picture in options.image or names]
    print(f"{report.pictures_text(told_names, answers, spec.classes)}\nsaved {figure}")


def main(argv: list[str] | None = None) -> int:
    """Run test.py with `argv` (None: the command line); the exit code."""
    options = config.parse_test(argv)
    return exit_code(lambda: run(options))


def run(options: config.TestOptions) -> None:
    """The table of all checkpoints, the classes of pictures, or the report of one checkpoint."""
    task = compare if options.compare else classify if options.image or options.soften else evaluate
    make_folder(options.plots_path)  # what can't be written is said before an evaluation, not after it
    with start(options.device, options.precision) as runtime:
        task(options, runtime)


if __name__ == "__main__":
    sys.exit(main())
