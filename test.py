"""Evaluate what train.py left: accuracy, calibration, fidelity to the teacher, cost.

    python test.py --tto True              the teacher
    python test.py                         the student without KD
    python test.py --kd True --temp 5      the student with KD
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
    config.parse_test()  # --help and a wrong option answer here, before torch is imported

import numpy as np
import torch

import checkpoint
import inference
import report
import runtime as rt
from measures import fidelity, measure
from runtime import Runtime, UserError
from utils import Images, all_logits, load_images, run_title


def load(options: config.TestOptions, path: Path, role: str, runtime: Runtime) -> tuple[torch.nn.Module, dict]:
    """A model on the device and its checkpoint's content; UserError where it is missing or another's."""
    if not path.exists():
        raise UserError(f"no checkpoint {path}: make it with `{options.command('train.py')}`")
    return inference.load_model(path, role, options.dataset, options.spec, runtime.device)


def main_path(options: config.TestOptions) -> Path:
    """The checkpoint to evaluate; with --tto True, --teacher names it."""
    return options.teacher_path if options.tto and options.teacher else options.checkpoint_path


def as_trained(options: config.TestOptions, runtime: Runtime, content: dict) -> Runtime:
    """The runtime in which a checkpoint's log comes out again: float32, with --precision auto, if it was trained so."""
    if options.precision == "auto" and content["options"].get("precision") == "fp32":
        return replace(runtime, autocast_dtype=None)
    return runtime


def load_test_images(options: config.TestOptions, runtime: Runtime) -> tuple[Images, torch.Tensor]:
    """The test images on the device, and their labels on the CPU."""
    with rt.main_first(runtime):
        _, images = load_images(options.spec, options.data_path, options.subset)
    return images.to(runtime.device), images.labels


def evaluate(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the report of one checkpoint and write its figures and files."""
    path, spec = main_path(options), options.spec
    model, content = load(options, path, options.role, runtime)
    for folder in {options.plots_path, *(file.parent for file in (options.json, options.export) if file)}:
        checkpoint.make_folder(folder)  # what can't be written is said before an evaluation, not after it
    runtime = as_trained(options, runtime, content)
    images, labels = load_test_images(options, runtime)
    logits = all_logits(model, images, spec, runtime)
    numbers = measure(logits, labels)
    runtime.print(
        f"test loss {numbers['loss']:.4f} top1 {100 * numbers['top1']:.2f}% top5 {100 * numbers['top5']:.2f}%"
    )
    runtime.print(f"{path} on {options.dataset}, {rt.device_title(runtime)}\n")
    runtime.print(report.accuracy_text(numbers, spec.classes))

    teacher, extra = None, {}
    if not options.tto:
        if options.teacher_path.exists():
            teacher, extra, text = compare_with_teacher(options, runtime, content, images, logits)
            runtime.print(f"\n{text}")
        else:
            runtime.print(f"\nfidelity to the teacher: left out, there is no {options.teacher_path}")
    if not runtime.is_main:
        return
    cost = inference.measure_cost(model, path, runtime)
    teacher_cost = teacher and inference.measure_cost(teacher, options.teacher_path, runtime)
    runtime.print(f"\n{report.cost_text(cost, teacher_cost)}\n")
    title, stem = f"{run_title(content)} on {options.dataset}", options.plots_path / path.stem
    saved = [
        report.plot_confusion(numbers, spec.classes, f"{title}: confusion", Path(f"{stem}_confusion.png")),
        report.plot_reliability(logits, labels, f"{title}: reliability", Path(f"{stem}_reliability.png")),
    ]
    if options.json:
        values = {"checkpoint": str(path), "role": options.role, **numbers, **cost.medians(), **extra}
        saved.append(report.write_json(options.json, values))
    if options.export:
        difference = inference.export_model(model, options.export, spec)
        runtime.print(f"exported; reloaded, its logits differ by {difference:.1g} at most")
        saved.append(options.export)
    runtime.print(f"saved {', '.join(map(str, saved))}")


def compare_with_teacher(
    options: config.TestOptions, runtime: Runtime, content: dict, images: Images, logits: torch.Tensor
) -> tuple[torch.nn.Module, dict, str]:
    """The teacher, the student's fidelity to it, and the table; beside KD, the student without it as a control."""
    labels = images.labels.cpu()
    teacher, teacher_content = load(options, options.teacher_path, "teacher", runtime)
    teacher_logits = all_logits(teacher, images, options.spec, runtime)
    extra = fidelity(logits, teacher_logits, labels)
    columns = {"this student": extra}
    control = replace(options, kd=False).checkpoint_path
    if options.kd and control.exists():
        # Agreement grows with accuracy alone: what KD adds is seen beside the student that had no teacher.
        model, _ = load(options, control, "student", runtime)
        columns["without KD"] = fidelity(all_logits(model, images, options.spec, runtime), teacher_logits, labels)
    text = report.fidelity_text(columns)
    if options.kd and content.get("teacher") != checkpoint.fingerprint(teacher_content["model"]):
        text += f"\n{options.teacher_path} is not the teacher that this student learned from"
    return teacher, extra, text


def compare(options: config.TestOptions, runtime: Runtime) -> None:
    """Evaluate every finished checkpoint of the data set and publish their table; UserError where there is none."""
    found = {}
    if options.teacher:  # which may lie in another folder
        found[options.teacher] = checkpoint.load(options.teacher, role="teacher", dataset=options.dataset)
    read = [path.resolve() for path in found]
    paths = sorted(options.weights_path.glob(f"{options.spec.prefix}*.pt"))
    paths = [path for path in paths if not path.name.endswith(".last.pt") and path.resolve() not in read]
    found |= {path: checkpoint.load(path) for path in paths}
    found = {
        path: content
        for path, content in found.items()
        if content.get("dataset") == options.dataset and "metrics" in content and not content["options"].get("holdout")
    }
    if not found:
        raise UserError(
            f"no finished checkpoint of {options.dataset} in {options.weights_path}: "
            f"make them with `python train.py --all True --dataset {options.dataset}`"
        )
    images, labels = load_test_images(options, runtime)
    teacher_logits = None
    ordered = sorted(found.items(), key=lambda item: report.place_in_table(item[1]))
    for path, content in ordered:
        model, _ = load(options, path, content["role"], runtime)
        its_runtime = as_trained(options, runtime, content)
        logits = all_logits(model, images, options.spec, its_runtime)
        numbers = measure(logits, labels)
        if path.resolve() == options.teacher_path.resolve():
            teacher_logits = logits
        elif teacher_logits is not None:
            numbers |= fidelity(logits, teacher_logits, labels)
        content["metrics"] = {key: 100 * numbers[key] for key in ("top1", "top5")}
        if runtime.is_main:
            content["measured"] = numbers | inference.measure_cost(model, path, its_runtime).medians()
    if runtime.is_main:
        report.publish([content for _, content in ordered], options, "comparison")


def classify(options: config.TestOptions, runtime: Runtime) -> None:
    """Print the classes of pictures by the model and its teacher, and draw them."""
    pixels = np.stack([inference.read_picture(path) for path in options.image])
    paths = {options.role: main_path(options)}
    if not options.tto and options.teacher_path.exists():
        paths["teacher"] = options.teacher_path
    answers = {}
    for role, path in paths.items():
        model, content = load(options, path, role, runtime)
        answers[run_title(content)] = inference.classify(model, pixels, options.spec, runtime)
    if not runtime.is_main:
        return
    print(report.pictures_text(options.image, answers, options.spec.classes))
    shown = [path.name for path in options.image[: report.PICTURES_SHOWN]]
    figure = options.plots_path / f"{main_path(options).stem}_images.png"
    print(f"saved {report.plot_pictures(pixels, shown, answers, options.spec.classes, figure)}")


def main(argv: list[str] | None = None) -> int:
    """Run test.py with `argv` (None: the command line); the exit code."""
    options = config.parse_test(argv)
    return rt.exit_code(lambda: run(options))


def run(options: config.TestOptions) -> None:
    """The table of all checkpoints, the classes of pictures, or the report of one checkpoint."""
    task = compare if options.compare else classify if options.image else evaluate
    with rt.start(options.device, options.precision) as runtime:
        task(options, runtime)


if __name__ == "__main__":
    sys.exit(main())
