"""Evaluate what train.py left: accuracy, calibration, fidelity to the teacher, cost.

    python test.py --tto True              the teacher
    python test.py                         the student without KD
    python test.py --kd True --temp 5      the student with KD
    python test.py --checkpoint FILE       any checkpoint; what it is, it says itself
    python test.py --compare True          one table of all checkpoints found
    python test.py --image cat.png         the class of any picture, by student and teacher
    python test.py --json student.json     the report's numbers in a file, too
    python test.py --export student.pt2    the model as a program that runs without this project, too
    torchrun --nproc_per_node=2 test.py    any of these on two devices

The first line repeats the test loss and the accuracies of the training log's last line.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import config

if __name__ == "__main__":
    config.answer_early(config.parse_test)  # --help and a wrong option answer here, before torch is imported

import numpy as np
import torch

from datasets import DatasetSpec
from datasets.folder import read_folder
from datasets.pictures import bombs_refused, read_picture
from evaluation import figures, inference, report
from evaluation.measures import fidelity, measure
from models import ARCHITECTURES
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import UserError, exit_code
from runtime.files import make_folder
from runtime.identity import DISTILLATION, Identity
from runtime.processes import main_first, start
from utils import Images, all_logits, load_images


def load(
    options: config.TestOptions, path: Path, role: str, runtime: Runtime, classes: tuple[str, ...] | None = None
) -> tuple[torch.nn.Module, dict]:
    """A model on the device and its checkpoint's content; UserError where it is missing or another's.

    With `classes`, one of other classes is another's, too.
    """
    if not path.exists():
        raise UserError(
            f"no checkpoint {path} in {path.parent.resolve()}: make it with `{options.command('train.py')}`, "
            "or give its folder by --weights_path"
        )
    model, content = inference.load_model(path, role, options.dataset, runtime.device)
    if classes is not None and content["spec"].classes != classes:
        raise UserError(f"{path} knows the classes {told(content['spec'].classes)}, not {told(classes)}")
    return model, content


def told(classes: tuple[str, ...]) -> str:
    """The first classes, and how many there are."""
    return ", ".join(classes[:5]) + (f", ... ({len(classes)})" if len(classes) > 5 else "")


def with_checkpoint(options: config.TestOptions) -> tuple[config.TestOptions, Path]:
    """The checkpoint to evaluate, and the options completed by what a --checkpoint says of itself.

    With --tto True, --teacher names it. UserError where it is missing, damaged or of an unknown kind.
    """
    if options.checkpoint is None:
        return options, options.teacher if options.tto and options.teacher else options.checkpoint_path
    run = checkpoint.load(options.checkpoint)["identity"]
    if run["role"] not in ARCHITECTURES or run["dataset"] not in config.DATASETS:
        raise UserError(f"{options.checkpoint} holds a {run['role']} of {run['dataset']}, which this version knows not")
    facts = {name: run[name] for name in ("dataset", "seed", "subset", "kd")}
    facts |= {"tto": run["role"] == "teacher", "holdout": run["holdout"] or 0, "temp": (run["temp"] or 5.0,)}
    return replace(options, **facts), options.checkpoint


def find_teacher(options: config.TestOptions) -> Path | None:
    """The teacher to compare with, or None where none was left; UserError where --teacher names none."""
    if options.teacher_path.exists():
        return options.teacher_path
    if options.teacher:
        raise UserError(f"no teacher {options.teacher}: check its name, or leave --teacher out")
    return None


def as_trained(options: config.TestOptions, runtime: Runtime, run: Identity) -> Runtime:
    """The runtime in which a checkpoint's log comes out again: float32, with --precision auto, if it was trained so."""
    if options.precision == "auto" and run["precision"] == "fp32":
        return replace(runtime, autocast_dtype=None)
    return runtime


def load_held_out(options: config.TestOptions, runtime: Runtime) -> tuple[DatasetSpec, Images, list[str]]:
    """The data set as it is found, its test images, or those of a holdout, on the device, and what is to be said."""
    spec, notes = options.spec, []
    with main_first(runtime):
        if not spec.is_known:
            spec, notes = read_folder(options.data_path, spec.flip, options.skip_broken, runtime)
        (images,) = load_images(spec, options.data_path, options.split, subset=options.subset, holdout=options.holdout)
    return spec, images.to(runtime.device), notes


def compare_images(found: DatasetSpec, content: dict, path: Path) -> list[str]:
    """What is to be said where a checkpoint was trained on other images; UserError where they are of other classes."""
    if found.classes != content["spec"].classes:
        raise UserError(
            f"{path} knows the classes {told(content['spec'].classes)}, and there are {told(found.classes)}"
        )
    same = found.fingerprint == content["identity"]["images"]
    return [] if same else [f"{path} was trained on other images than there are now"]


def evaluate(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the report of one checkpoint and write its figures and files; an export needs no folder of images."""
    options, path = with_checkpoint(options)
    model, content = load(options, path, options.role, runtime)
    run, spec = content["identity"], content["spec"]
    teacher_path = None if options.tto else find_teacher(options)
    for folder in {options.plots_path, *(file.parent for file in (options.json, options.export) if file)}:
        make_folder(folder)  # what can't be written is said before an evaluation, not after it
    runtime = as_trained(options, runtime, run)
    there = options.spec.is_known or os.path.isdir(options.data_path / "train")
    if options.export and not options.json and not there:
        saved = export(model, options.export, spec) if runtime.is_main else ""
        return runtime.print(f"saved {saved}; not evaluated, for there is no {options.data_path / 'train'}")
    found, images, notes = load_held_out(options, runtime)
    notes += compare_images(found, content, path)
    labels, logits = images.labels.cpu(), all_logits(model, images, spec, runtime)
    numbers = measure(logits, labels)
    teacher, extra, fidelity_text = None, {}, f"fidelity to the teacher: left out, there is no {options.teacher_path}"
    if teacher_path:
        teacher, extra, fidelity_text = compare_with_teacher(options, runtime, content, images, logits)
    if not runtime.is_main:
        return
    cost = inference.measure_cost(model, path, runtime)
    teacher_cost = teacher and inference.measure_cost(teacher, teacher_path, runtime)
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
    print("" if options.tto else f"\n{fidelity_text}\n")
    print(f"{report.cost_text(cost, teacher_cost)}\n\nsaved {', '.join(map(str, saved))}")


def export(model: torch.nn.Module, path: Path, spec: DatasetSpec) -> str:
    """Export a model; the file and how exact it is, in words."""
    difference = inference.export_model(model, path, spec)
    return f"{path}, whose logits differ by {difference:.1g} at most when it is loaded again"


def compare_with_teacher(
    options: config.TestOptions, runtime: Runtime, student: dict, images: Images, logits: torch.Tensor
) -> tuple[torch.nn.Module, dict, str]:
    """The teacher, the student's fidelity to it, and the table; beside KD, the student without it as a control."""
    labels, run, classes = images.labels.cpu(), student["identity"], student["spec"].classes
    teacher, content = load(options, options.teacher_path, "teacher", runtime, classes)
    teacher_logits = all_logits(teacher, images, content["spec"], runtime)
    extra = fidelity(logits, teacher_logits, labels)
    columns, notes = {"this student": extra}, []
    control = replace(options, kd=False).checkpoint_path
    if options.kd and control.exists():
        # Agreement grows with accuracy alone: what KD adds is seen beside the student that had no teacher.
        model, content = load(options, control, "student", runtime, classes)
        if content["identity"].is_control_of(run):
            columns["without KD"] = fidelity(
                all_logits(model, images, content["spec"], runtime), teacher_logits, labels
            )
        else:
            notes.append(f"{control} is not its control: it has {content['identity'].beside(run, DISTILLATION)}")
    if options.kd and run["teacher"] != checkpoint.fingerprint(teacher.state_dict()):
        notes.append(f"{options.teacher_path} is not the teacher that this student learned from")
    return teacher, extra, "\n".join([report.fidelity_text(columns), *notes])


def compare(options: config.TestOptions, runtime: Runtime) -> None:
    """Evaluate every finished checkpoint of these images and publish their table; UserError where there is none."""
    contents = find_checkpoints(options, runtime)
    nothing = UserError(
        f"no finished checkpoint of {options.dataset} in {options.weights_path.resolve()}: "
        f"make them with `python train.py --all True --dataset {options.dataset}`, or give --weights_path"
    )
    if not contents:
        raise nothing
    found, images, notes = load_held_out(options, runtime)
    labels = images.labels.cpu()
    for note in notes:
        runtime.print(note)
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    for content in contents:
        run, path = content["identity"], content["path"]
        try:
            if other := compare_images(found, content, path):
                raise UserError(other[0])
            model, _ = load(options, path, run["role"], runtime)
        except UserError as error:  # of another version, or of weights that are no such model's
            runtime.print(f"left out: {error}")
            continue
        shown.append(content)
        its_runtime = as_trained(options, runtime, run)
        logits = all_logits(model, images, content["spec"], its_runtime)
        numbers = measure(logits, labels)
        if run["role"] == "teacher":
            teachers[checkpoint.fingerprint(model.state_dict())] = logits
        elif teacher := run["teacher"] if run["kd"] else next(iter(teachers), None):
            numbers |= fidelity(logits, teachers[teacher], labels) if teacher in teachers else {}
        content["metrics"] = {key: 100 * numbers[key] for key in report.TOPS if key in numbers}
        if runtime.is_main:
            content["measured"] = numbers | inference.measure_cost(model, path, its_runtime).medians()
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
    return sorted(contents, key=report.place_in_table)


def classify(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the classes of pictures by the model and its teacher, and draw them."""
    with bombs_refused():
        pixels = np.stack([read_picture(path) for path in options.image])
    options, path = with_checkpoint(options)
    paths, spec = {options.role: path}, None
    if not options.tto and (teacher_path := find_teacher(options)):
        paths["teacher"] = teacher_path
    answers = {}
    for role, model_path in paths.items():
        model, content = load(options, model_path, role, runtime, spec and spec.classes)
        spec = content["spec"]
        answers[content["identity"].title] = inference.classify(model, pixels, spec, runtime)
    if not runtime.is_main:
        return
    shown = [picture.name for picture in options.image[: figures.PICTURES_SHOWN]]
    figure = options.plots_path / f"{path.stem}_images.png"
    figures.plot_pictures(pixels, shown, answers, spec.classes, figure)
    print(f"{report.pictures_text(options.image, answers, spec.classes)}\nsaved {figure}")


def main(argv: list[str] | None = None) -> int:
    """Run test.py with `argv` (None: the command line); the exit code."""
    options = config.parse_test(argv)
    return exit_code(lambda: run(options))


def run(options: config.TestOptions) -> None:
    """The table of all checkpoints, the classes of pictures, or the report of one checkpoint."""
    task = compare if options.compare else classify if options.image else evaluate
    with start(options.device, options.precision) as runtime:
        task(options, runtime)


if __name__ == "__main__":
    sys.exit(main())
