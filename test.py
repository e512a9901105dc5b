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

import sys
from dataclasses import replace
from pathlib import Path

import config

if __name__ == "__main__":
    config.answer_early(config.parse_test)  # --help and a wrong option answer here, before torch is imported

import numpy as np
import torch

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


def load(options: config.TestOptions, path: Path, role: str, runtime: Runtime) -> tuple[torch.nn.Module, dict]:
    """A model on the device and its checkpoint's content; UserError where it is missing or another's."""
    if not path.exists():
        raise UserError(
            f"no checkpoint {path} in {path.parent.absolute()}: make it with `{options.command('train.py')}`, "
            "or give its folder by --weights_path"
        )
    return inference.load_model(path, role, options.dataset, options.spec, runtime.device)


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


def load_held_out(options: config.TestOptions, runtime: Runtime) -> tuple[Images, torch.Tensor]:
    """The test images, or those that a holdout kept aside, on the device, and their labels on the CPU."""
    with main_first(runtime):
        (images,) = load_images(
            options.spec, options.data_path, options.split, subset=options.subset, holdout=options.holdout
        )
    return images.to(runtime.device), images.labels


def evaluate(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the report of one checkpoint and write its figures and files."""
    options, path = with_checkpoint(options)
    spec = options.spec
    model, content = load(options, path, options.role, runtime)
    run = content["identity"]
    teacher_path = None if options.tto else find_teacher(options)
    for folder in {options.plots_path, *(file.parent for file in (options.json, options.export) if file)}:
        make_folder(folder)  # what can't be written is said before an evaluation, not after it
    runtime = as_trained(options, runtime, run)
    images, labels = load_held_out(options, runtime)
    logits = all_logits(model, images, spec, runtime)
    numbers = measure(logits, labels)
    teacher, extra = None, {}
    fidelity_text = f"fidelity to the teacher: left out, there is no {options.teacher_path}"
    if teacher_path:
        teacher, extra, fidelity_text = compare_with_teacher(options, runtime, run, images, logits)
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
        difference = inference.export_model(model, options.export, spec)
        saved.append(f"{options.export}, whose logits differ by {difference:.1g} at most when it is loaded again")
    top1, top5 = (f"{name} {100 * numbers[name]:.2f}%" for name in ("top1", "top5"))
    print(f"{options.split} loss {numbers['loss']:.4f} {top1} {top5}")
    print(f"{path} on {options.dataset}, {device_title(runtime)}, {runtime.precision}\n")
    print(report.accuracy_text(numbers, spec.classes))
    print("" if options.tto else f"\n{fidelity_text}\n")
    print(f"{report.cost_text(cost, teacher_cost)}\n\nsaved {', '.join(map(str, saved))}")


def compare_with_teacher(
    options: config.TestOptions, runtime: Runtime, run: Identity, images: Images, logits: torch.Tensor
) -> tuple[torch.nn.Module, dict, str]:
    """The teacher, the student's fidelity to it, and the table; beside KD, the student without it as a control."""
    labels = images.labels.cpu()
    teacher, _ = load(options, options.teacher_path, "teacher", runtime)
    teacher_logits = all_logits(teacher, images, options.spec, runtime)
    extra = fidelity(logits, teacher_logits, labels)
    columns, notes = {"this student": extra}, []
    control = replace(options, kd=False).checkpoint_path
    if options.kd and control.exists():
        # Agreement grows with accuracy alone: what KD adds is seen beside the student that had no teacher.
        model, content = load(options, control, "student", runtime)
        if content["identity"].is_control_of(run):
            columns["without KD"] = fidelity(all_logits(model, images, options.spec, runtime), teacher_logits, labels)
        else:
            notes.append(f"{control} is not its control: it has {content['identity'].beside(run, DISTILLATION)}")
    if options.kd and run["teacher"] != checkpoint.fingerprint(teacher.state_dict()):
        notes.append(f"{options.teacher_path} is not the teacher that this student learned from")
    return teacher, extra, "\n".join([report.fidelity_text(columns), *notes])


def compare(options: config.TestOptions, runtime: Runtime) -> None:
    """Evaluate every finished checkpoint of these images and publish their table; UserError where there is none."""
    contents = find_checkpoints(options, runtime)
    nothing = UserError(
        f"no finished checkpoint of {options.dataset} in {options.weights_path.absolute()}: "
        f"make them with `python train.py --all True --dataset {options.dataset}`, or give --weights_path"
    )
    if not contents:
        raise nothing
    images, labels = load_held_out(options, runtime)
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    for content in contents:
        run, path = content["identity"], content["path"]
        try:
            model, _ = load(options, path, run["role"], runtime)
        except UserError as error:  # of another version, or of weights that are no such model's
            runtime.print(f"left out: {error}")
            continue
        shown.append(content)
        its_runtime = as_trained(options, runtime, run)
        logits = all_logits(model, images, options.spec, its_runtime)
        numbers = measure(logits, labels)
        if run["role"] == "teacher":
            teachers[checkpoint.fingerprint(model.state_dict())] = logits
        elif teacher := run["teacher"] if run["kd"] else next(iter(teachers), None):
            numbers |= fidelity(logits, teachers[teacher], labels) if teacher in teachers else {}
        content["metrics"] = {key: 100 * numbers[key] for key in ("top1", "top5")}
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
        teacher, named = inference.load_model(options.teacher, "teacher", options.dataset, options.spec, runtime.device)
        its_own = None, checkpoint.fingerprint(teacher.state_dict())
        students = [content for content in contents if content["identity"]["role"] == "student"]
        contents = [content for content in students if content["identity"]["teacher"] in its_own]
        contents.append(named | {"path": options.teacher})
    return sorted(contents, key=report.place_in_table)


def classify(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the classes of pictures by the model and its teacher, and draw them."""
    pixels = np.stack([inference.read_picture(path) for path in options.image])
    options, path = with_checkpoint(options)
    paths = {options.role: path}
    if not options.tto and (teacher_path := find_teacher(options)):
        paths["teacher"] = teacher_path
    answers = {}
    for role, model_path in paths.items():
        model, content = load(options, model_path, role, runtime)
        answers[content["identity"].title] = inference.classify(model, pixels, options.spec, runtime)
    if not runtime.is_main:
        return
    shown = [picture.name for picture in options.image[: figures.PICTURES_SHOWN]]
    figure = options.plots_path / f"{path.stem}_images.png"
    figures.plot_pictures(pixels, shown, answers, options.spec.classes, figure)
    print(f"{report.pictures_text(options.image, answers, options.spec.classes)}\nsaved {figure}")


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
