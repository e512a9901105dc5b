"""Evaluate what train.py trained: accuracy, calibration, agreement with the teacher, cost.

    python test.py --tto True              the teacher
    python test.py                         the student without KD
    python test.py --kd True --temp 5      the student with KD
    python test.py --checkpoint FILE       any checkpoint; its settings are read from the file
    python test.py --compare True          one table of all checkpoints of a data set
    python test.py --image cat.png         classify a picture with the student and its teacher
    python test.py --tto True --soften 1 5 20    the teacher's probabilities at these temperatures
    torchrun --nproc_per_node=2 test.py    any of these on two devices

In the precision of the training, the first line of the report repeats the loss and accuracy of the log's last line.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - older versions fail further down
    print("test.py: error: this needs Python 3.10 or later", file=sys.stderr)
    sys.exit(2)

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from config import TestOptions, parse_test
from runtime.cli import answer_early, format_number

if __name__ == "__main__":
    answer_early(parse_test)  # --help and option errors exit here, before torch is imported

import torch

from data_sets import DataSet
from data_sets.pictures import read_picture
from evaluation import figures, inference, report, results
from evaluation.comparison import as_trained, measure_all, measure_checkpoint
from evaluation.measures import fidelity, softness
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import UserError, exit_code, leave
from runtime.files import make_folder, write_json
from runtime.processes import start
from training.run import data_mismatch, load_model, require_finished, spec_of, training_images_mismatch
from training.runs import RunConfig, RunName, config_of, name_of, row_order
from training.teacher_logits import Teacher, load_teacher
from utils import Images, load_images, logits_of

PUBLISHED = Path(__file__).resolve().parent / "results"


def find_checkpoint(options: TestOptions, runtime: Runtime) -> dict:
    """The checkpoint that the options name, or the published one of that name; UserError if it can't be evaluated."""
    name = name_of(options)
    path = options.checkpoint or (options.teacher if options.tto else None)
    if path is None:
        path = options.teacher_file(name.stem) if options.tto else options.weights_folder / f"{name.stem}.pt"
        published = PUBLISHED / options.dataset / path.name
        if not path.exists() and published.exists() and not options.changed("weights_path", "name"):
            runtime.print(f"{path} does not exist: evaluating the published {published}")
            path = published
        elif not path.exists():
            train = name.command("train.py", **options.changed())
            raise UserError(f"no checkpoint {path}: train it with `{train}`, or name its folder with --weights_path")
    content = require_finished(checkpoint.load(path))
    run = config_of(content)
    if options.checkpoint and options.student and not run.student:
        raise UserError(f"{path} is not a student of your own: leave --student out")
    if options.checkpoint and options.teacher and run.role == "teacher":
        raise UserError(f"{path} is a teacher: leave --teacher out")
    if not options.checkpoint and (run.role, run.teacher_name) != (name.role, name.teacher_name):
        raise UserError(f"{path} contains {run.stem}, not {name.stem}: give --checkpoint {path} to evaluate it anyway")
    return content


def find_teacher(run: RunConfig, options, spec: DataSet, runtime: Runtime, tell: Callable) -> Teacher | None:
    """A student's teacher, or None; problems are passed to `tell`, or raised as UserError if --teacher was given."""
    try:
        teacher = load_teacher(run, options, spec, runtime) if run.role == "student" else None
    except UserError as error:
        if options.teacher:
            raise
        tell(f"not compared with the teacher: {error}")
        return None
    if teacher and run.kd and teacher.model and run.teacher != teacher.fingerprint:  # a folder has a key in its place
        tell(f"{teacher.path} is not the teacher that this student learned from")
    return teacher


def evaluate(options: TestOptions, runtime: Runtime) -> None:
    """Print the report of one checkpoint and write its figures."""
    content = find_checkpoint(options, runtime)
    run, path = config_of(content), content["path"]
    runtime = as_trained(runtime, run, options.precision)
    model = load_model(content, runtime, options.student)
    data = load_images(run.dataset, options.data_path, runtime, run.flip, options.skip_broken, size=run.size)
    if why := data_mismatch(content, data.spec):
        raise UserError(f"{path} {why}")
    notes = list(data.notes)
    if why := training_images_mismatch(content, run, data.spec):
        notes.append(f"{path} {why}")
    images = data.held_out(run.subset, run.holdout)
    logits, numbers = measure_checkpoint(model, content, images, data, runtime)
    fidelity_numbers = {}
    teacher = find_teacher(run, options, data.spec, runtime, notes.append)
    if teacher:
        try:
            fidelity_numbers = fidelity(logits, teacher.test_logits(images, run.holdout), images.labels)
        except UserError as error:  # a folder of logits may have none of these images
            notes.append(f"not compared with the teacher: {error}")
    if not runtime.is_main:
        return
    cost = inference.measure_cost(model, path, runtime, run.size)
    teacher_cost = None
    if teacher and teacher.model:  # which a folder of logits lacks
        teacher_cost = inference.measure_cost(teacher.model, teacher.path, runtime, run.size)
    title, classes = f"{run.title} on {run.dataset}", data.spec.classes
    saved = [figures.plot_confusion(numbers, classes, f"{title}: confusion", figure_path(path, options, "confusion"))]
    reliability = figure_path(path, options, "reliability")
    saved.append(figures.plot_reliability(logits, images.labels, f"{title}: reliability", reliability))
    if "bias" in numbers:
        saved.append(figures.plot_omitted([content | {"measured": numbers}], figure_path(path, options, "omitted")))
    if options.json:
        values = {"checkpoint": str(path), "role": run.role, "run": asdict(run), **numbers, **cost, **fidelity_numbers}
        values |= {"notes": notes, "device": device_title(runtime), "precision": runtime.precision}
        saved.append(write_json(options.json, values))
    tops = " ".join(f"{name} {100 * numbers[name]:.2f}%" for name in report.TOPS if name in numbers)
    print(f"{run.split} loss {numbers['loss']:.4f} {tops}")
    print(f"{path} on {run.dataset}, {device_title(runtime)}, {runtime.precision}", *notes, "", sep="\n")
    print(report.accuracy_text(numbers, classes))
    if run.omit:
        print(f"\n{report.bias_text(numbers, run.omit)}")
    print(f"\n{report.fidelity_text(fidelity_numbers)}\n" if fidelity_numbers else "")
    print(report.cost_text(cost, teacher_cost))
    print(f"\nsaved {', '.join(map(str, saved))}")


def figure_path(path: Path, options: TestOptions, name: str) -> Path:
    """A checkpoint's figure in --plots_path, in the subfolder that the checkpoint has in --weights_path."""
    folder, weights = path.parent.resolve(), options.weights_path.resolve()
    subfolder = folder.relative_to(weights) if folder.is_relative_to(weights) else Path()
    return options.plots_path / subfolder / f"{path.stem}_{name}.png"


def export(options: TestOptions, runtime: Runtime) -> None:
    """Export the model of one checkpoint, for which no images are needed."""
    content = find_checkpoint(options, runtime)
    model = load_model(content, runtime, options.student)
    if runtime.is_main:
        difference = inference.export_model(model, options.export, content["data"])
        print(f"saved {options.export} of {content['path']} (reloaded, its logits differ by at most {difference:.1g})")


def compare(options: TestOptions, runtime: Runtime) -> None:
    """Evaluate all finished checkpoints of the data set and write their table; UserError if there is none."""
    name = name_of(options)
    data = load_images(options.dataset, options.data_path, runtime, skip_broken=options.skip_broken, size=options.size)
    runtime.print(*data.notes)
    contents = find_checkpoints(options, name, runtime)
    shown = measure_all(
        contents, name, data, runtime, cost=True, allowed_student=options.student, precision=options.precision
    )
    if not shown:
        command = name.command("train.py", all=True, **options.changed())
        where = f"{options.dataset} in {options.weights_folder}"
        raise UserError(f"no finished checkpoint of {where}: train some with `{command}`, or give --weights_path")
    if runtime.is_main:
        results.write_table(shown, options.plots_folder / f"comparison_{options.dataset}{name.images_suffix}")


def find_checkpoints(options: TestOptions, name: RunName, runtime: Runtime) -> list[dict]:
    """The finished checkpoints on the images of `name`, in a table's order."""
    contents, paths = [], {*options.weights_folder.rglob("*.pt")}
    own, shared = (folder / f"{name.teacher_name.stem}.pt" for folder in (options.weights_folder, options.weights_path))
    if paths and own not in paths and shared.exists():  # alone it would make a table for a --name that was mistyped
        paths.add(shared)
    for path in sorted(paths):
        if path.name.endswith(".last.pt") or path.name.startswith("."):  # macOS keeps ._student.pt on foreign disks
            continue
        try:
            content = require_finished(checkpoint.load(path))
            if config_of(content).teacher_name == name.teacher_name:  # then the images are the same
                contents.append(content)
        except UserError as error:
            runtime.print(f"left out: {error}")
    return sorted(contents, key=lambda content: row_order(config_of(content)))


def classify(options: TestOptions, runtime: Runtime) -> None:
    """Classify pictures with the model and its teacher, or with --soften the model at each T; print and draw this."""
    contents = [find_checkpoint(options, runtime)]
    run, spec = config_of(contents[0]), spec_of(contents[0])
    images, rows, names = read_pictures(options, contents[0], runtime)
    if options.teacher and options.teacher.is_dir():
        raise UserError(f"{options.teacher} holds logits, not a model: give a checkpoint")
    if not options.soften and (teacher := find_teacher(run, options, spec, runtime, runtime.print)):
        contents.append(teacher.content)
    probabilities = {}  # (B, C) of the pictures, by the title of each model, or of the model at each temperature
    for content in contents:
        model_run = config_of(content)
        model_runtime = as_trained(runtime, model_run, options.precision)
        model = load_model(content, model_runtime, options.student)
        logits = logits_of(model, images, spec_of(content), model_runtime)
        if options.soften:
            runtime.print(f"over {len(images):,} images:")
            for temp in options.soften:
                runtime.print(report.softness_text(softness(logits, temp), temp, len(spec.classes)))
                probabilities[f"{model_run.title}, T = {format_number(temp)}"] = (logits[rows] / temp).softmax(1)
        else:
            probabilities[model_run.title] = logits[rows].softmax(1)
    if runtime.is_main:
        path = figure_path(contents[0]["path"], options, "softened" if options.soften else "images")
        shown = names[: figures.PICTURES_SHOWN]
        figures.plot_pictures(images.pixels[rows].numpy(), shown, probabilities, spec.classes, path)
        left_out = f" (the first {len(shown)})" if len(shown) < len(names) else ""
        print(f"{report.pictures_text(names, probabilities, spec.classes)}\nsaved {path}{left_out}")


def read_pictures(options: TestOptions, content: dict, runtime: Runtime) -> tuple[Images, list[int], list[str]]:
    """The images of --image, or the test images; the rows to show, all or one of each of four classes; their names."""
    run = config_of(content)
    if options.image:
        pixels = torch.stack([torch.tensor(read_picture(path, run.size)) for path in options.image])
        labels = torch.zeros(len(pixels), dtype=torch.int64)  # not known, not used
        return Images(pixels, labels), list(range(len(pixels))), list(map(str, options.image))
    data = load_images(run.dataset, options.data_path, runtime, skip_broken=options.skip_broken, size=run.size)
    if why := data_mismatch(content, data.spec):
        raise UserError(f"{content['path']} {why}")
    runtime.print(*data.notes)
    images = data.held_out(run.subset, run.holdout)
    labels = images.labels.tolist()
    rows = sorted(labels.index(label) for label in set(labels))[:4]
    return images, rows, [f"{data.spec.classes[labels[row]]} ({run.split} {row})" for row in rows]


def main(argv: list | None = None) -> int:
    """Run test.py with `argv` (None: the command line); return the exit code."""
    options = parse_test(argv)
    return exit_code(lambda: run_task(options))


def run_task(options: TestOptions) -> None:
    """The table of all checkpoints, the classes of pictures, the export or the report of one checkpoint."""
    if options.compare:
        task = compare
    elif options.image or options.soften:
        task = classify
    elif options.export:
        task = export
    else:
        task = evaluate
    with start(options.device, options.precision) as runtime:
        make_folder(options.export.parent if options.export else options.plots_folder)  # fail before the evaluation
        if options.json:
            make_folder(options.json.parent)
        task(options, runtime)


if __name__ == "__main__":
    leave(main())
