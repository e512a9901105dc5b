"""Train a VGG19-BN teacher on CIFAR-10 and distil it into a small CNN (Hinton, Vinyals & Dean, 2014).

    python train.py --tto True             the teacher               -> weights/teacher.pt
    python train.py                        the student without KD    -> weights/student.pt
    python train.py --kd True --temp 5     the student with KD       -> weights/student_kd_t5.pt
    python train.py --all True             train and evaluate all of these, with one table
    torchrun --nproc_per_node=2 train.py   any of these on two devices

Rerun the same command to resume a run that was interrupted.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - older versions fail further down
    print("train.py: error: this needs Python 3.10 or later", file=sys.stderr)
    sys.exit(2)

import contextlib
import json
import time
from dataclasses import replace
from datetime import timedelta

from config import TrainOptions, parse_train
from runtime.cli import answer_early

if __name__ == "__main__":
    answer_early(parse_train)  # --help and a wrong option answer here, before torch is imported

import torch

from data_sets import DataSet
from evaluation.comparison import measure_all
from evaluation.measures import softness
from evaluation.report import softness_text
from evaluation.results import publish
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import Stopped, StopSignal, UserError, exit_code, leave
from runtime.files import locked, remove
from runtime.processes import start
from runtime.progress import Progress
from training.losses import training_loss
from training.recipes import RECIPE_FIELDS
from training.run import METRICS, Run, RunFiles, find_finished, require_same
from training.runs import RunConfig, name_of, plan
from training.teacher_logits import TeacherLogits, load_teacher, teacher_path
from utils import Data, Images, Views, epoch_order, epoch_view, evaluate, load_images, plot_curves, topk_correct


def train_epoch(run: Run, views: Views, rows: torch.Tensor, k: int, teacher_logits: torch.Tensor | None) -> None:
    """Finish the current epoch on image rows (N,) in their k-th views; teacher_logits[i] are of image i."""
    config, runtime = run.config, run.runtime
    order = epoch_order(rows, config.seed, run.epoch).to(views.storage)
    run.model.train()
    run.clock = time.monotonic()  # untimed: the teacher's logits
    with Progress(f"epoch {run.epoch + 1}/{config.num_epochs}", run.steps, runtime.is_main, run.step) as progress:
        while run.step < run.steps:
            first = run.step * run.batch_size
            batch_rows = order[first : first + run.batch_size][runtime.rank :: runtime.world_size]  # of this process
            images = views.images(batch_rows, k).contiguous(memory_format=runtime.memory_format)
            batch_rows = batch_rows.to(runtime.device)  # for MPS, views are made on the CPU
            labels = views.labels[batch_rows]
            batch_teacher_logits = teacher_logits[batch_rows] if config.kd else None
            run.seed_step()
            with runtime.autocast():
                logits = run.forward(images)
            loss, ce, kl = training_loss(logits, batch_teacher_logits, labels, config)
            run.update(loss)
            run.record(loss, ce, kl, topk_correct(logits, labels), len(labels))
            progress.step(lambda: progress_text(run))
            save_or_stop(run)
    run.check_finite()


def save_or_stop(run: Run) -> None:
    """Save the resume state if that is due; Stopped if a signal came to any process."""
    if run.runtime.world_size > 1 and run.step % 4 and run.step < run.steps:
        return  # several processes, which wait for one another here, agree after every 4th step
    signal_number, save = run.runtime.agree(run.runtime.stop.number, run.save_is_due())
    if signal_number or save:
        run.check_finite()
    if signal_number:
        raise Stopped(int(signal_number))
    if save:
        run.save()


def progress_text(run: Run) -> str:
    """Loss, top-1, speed, learning rate and time left for the whole run, as shown while it runs; UserError if NaN."""
    run.check_finite()
    seen = run.step * run.batch_size / run.runtime.world_size  # by this process
    means = dict(zip(METRICS, (run.totals / seen).tolist(), strict=True))
    speed = run.step * run.batch_size / run.seconds
    steps_left = run.total_steps - run.epoch * run.steps - run.step
    left = timedelta(seconds=int(steps_left * run.batch_size / speed))
    return f"loss {means['loss']:.3f} top1 {100 * means['top1']:.2f}% {speed:,.0f} img/s lr {run.lr:.4f} left {left}"


def end_epoch(run: Run, held_out: Images, softened: dict, epochs_after: int) -> None:
    """Evaluate, log (with `softened`) and print the epoch, begin the next; `epochs_after` are those of later runs."""
    config, runtime = run.config, run.runtime
    count = run.steps * run.batch_size  # images
    train = percent(dict(zip(METRICS, (runtime.total(run.totals) / count).tolist(), strict=True)))
    run.count_time()  # total() has synchronised
    test = percent(evaluate(run.model, held_out, run.spec, runtime))
    epoch_seconds = run.seconds + time.monotonic() - run.clock  # with the evaluation
    if not config.kd:
        del train["kl"]
    if "top5" not in test:
        del train["top5"]
    speed = round(count / max(run.seconds, 1e-9), 1)
    line = {"epoch": run.epoch + 1, "train": train, config.split: test, "lr": run.lr, **softened}
    line |= {"seconds": round(run.seconds, 3), "images_per_second": speed}
    run.write_log(f"{run.log}{json.dumps(line)}\n")
    top5 = f" top5 {test['top5']:.2f}%" if "top5" in test else ""
    ce = f" ce {train['ce']:.4f}" if config.kd else ""  # without KD, and on test images, it is the loss
    left = timedelta(seconds=int((config.num_epochs - run.epoch - 1 + epochs_after) * epoch_seconds))
    all_left = f", about {left} left for all runs" if epochs_after else ""
    runtime.print(
        f"epoch {run.epoch + 1}/{config.num_epochs}: train loss {train['loss']:.4f}{ce} top1 {train['top1']:.2f}%, "
        f"{config.split} loss {test['loss']:.4f} top1 {test['top1']:.2f}%{top5}, "
        f"{run.seconds:.1f} s, {speed:,.0f} img/s{all_left}"
    )
    run.begin_epoch(run.epoch + 1)


def percent(metrics: dict[str, float]) -> dict[str, float]:
    """Accuracies as percentages, the rest as it is."""
    return {name: 100 * value if name.startswith("top") else value for name, value in metrics.items()}


def train_run(
    config: RunConfig, data: Data, teacher: TeacherLogits | None, options, runtime: Runtime, epochs_after: int
) -> dict:
    """Do one run, new or resumed, and write its checkpoint, log and figures; the checkpoint's content."""
    views, files = Views(data.train, data.spec, runtime.device), RunFiles(config, options)
    rows = data.rows(config.subset, config.holdout, config.omit, config.student_images)
    held_out = data.held_out(config.subset, config.holdout)
    with locked(files.checkpoint) if runtime.is_main else contextlib.nullcontext():
        run = Run(config, runtime, data.spec, len(rows), files)
        begin(run, len(rows), options.resume)
        while run.epoch < config.num_epochs:
            k = epoch_view(config.views, config.flip, config.seed, run.epoch)
            try:
                teacher_logits, softened = None, {}
                if config.kd:
                    teacher_logits = teacher.view_logits(k, views, rows)
                    softened["teacher"] = softness(teacher_logits[rows], config.temp)
                    if run.epoch == 0:
                        text = softness_text(softened["teacher"], config.temp, config.num_classes)
                        runtime.print(f"the teacher at {text}")
                train_epoch(run, views, rows, k, teacher_logits)
                end_epoch(run, held_out, softened, epochs_after)
                save_or_stop(run)
            except Stopped:
                run.save()
                runtime.barrier()  # if the first process fails to save, that is told and not the stop
                runtime.print(f"saved {files.resume} at {run.place}")
                raise
        content = run.finished_state()
        if runtime.is_main:
            checkpoint.save(files.checkpoint, content)
            figures = plot_curves(files.log, files.log.parent)
            remove(files.resume)
            print(f"saved {files.checkpoint}, {files.log} and {', '.join(path.name for path in figures)}")
        runtime.barrier()
    return content | {"path": files.checkpoint}


def begin(run: Run, count: int, resume: bool) -> None:
    """Restore an unfinished run, or start the log of a new one on `count` images."""
    config, runtime = run.config, run.runtime
    exists = runtime.agree(run.files.resume.exists())[0]  # of all, before the first process writes or removes it
    if exists and resume:
        run.restore()
        return runtime.barrier()  # before the first process can finish and remove what the others read
    recipe = ", ".join(f"{name} {getattr(config, name)}" for name in ("optimizer", *RECIPE_FIELDS, "seed"))
    runtime.print(f"{config.stem}: {count:,} images, {run.steps} steps per epoch, {device_title(runtime)}, {recipe}")
    if runtime.is_main:
        remove(run.files.resume)  # of the run that --resume False replaces
    run.write_log(json.dumps(run.header() | {"split": config.split}) + "\n")


def train_all(options: TrainOptions) -> None:
    """Train the run that the options name, or with --all every unfinished run, and then write the table."""
    with StopSignal() as stop, start(options.device, options.precision, options.deterministic, stop) as runtime:
        data, runs = prepare(options, runtime)
        finished = {run.stem: find_finished(run, options) for run in runs}
        if options.all:
            runtime.print(f"{len(runs)} runs, {sum(map(bool, finished.values()))} of them finished")
        teacher, contents = None, []
        for i, planned in enumerate(runs):
            if teacher is None and planned.role == "student" and (options.kd or options.all):
                teacher = prepare_teacher(runs[i:], finished, options, data.spec, runtime)
                contents = [teacher.content] if teacher.content else []
            run = teacher.record_in(planned) if teacher else planned
            content = finished[run.stem] or find_finished(run, options)  # which may have finished meanwhile
            runtime.check_same(run, bool(content))
            if content:
                advice = "" if options.all else "; --resume False trains it again"
                ended = f"already finished ({content['metrics']['top1']:.2f}% top-1), skipping"
                runtime.print(f"{run.stem}: {ended}{advice}")
            else:
                later = runs[i + 1 :] if teacher else []  # a teacher's epochs take longer than the students'
                epochs_after = sum(other.num_epochs for other in later if not finished[other.stem])
                content = train_run(run, data, teacher, options, runtime, epochs_after)
            contents.append(content)
        if options.all:
            shown = measure_all(contents, runs[-1], data, runtime, teacher, student=options.student)
            if runtime.is_main:
                publish(shown, options.table_folder)
        else:
            runtime.print(f"evaluate it with `{runs[-1].command('test.py', **options.changed())}`")


def prepare_teacher(
    students: list[RunConfig], finished: dict, options, spec: DataSet, runtime: Runtime
) -> TeacherLogits:
    """The teacher of all students, read from its file; UserError if one does not fit it."""
    teacher = load_teacher(students[0], options, spec, runtime)
    teacher.check_views(students[0].views)
    runtime.print(f"the teacher is {teacher.title}")
    for student in students:
        if finished[student.stem]:  # check all now, not each when its turn comes
            require_same(finished[student.stem], teacher.record_in(student))
    return teacher


def prepare(options: TrainOptions, runtime: Runtime) -> tuple[Data, list[RunConfig]]:
    """The images and the plan of runs; UserError for options that can't work, before any training."""
    if options.sync_bn and runtime.device.type != "cuda":
        raise UserError("--sync_bn True needs CUDA devices: leave it out")
    if options.kd:
        teacher_path(name_of(options), options)  # fail before a download
    if options.precision == "auto" and runtime.device.type == "cuda" and runtime.precision == "fp32":
        runtime.print("this card has no fast bf16 and trains in fp32; try --precision fp16")
    data = load_images(options.dataset, options.data_path, runtime, options.flip, options.skip_broken, options.size)
    runtime.print(*data.notes)
    runs = plan(options, data.spec, runtime.precision, runtime.world_size)
    if options.all and not options.teacher and options.teacher_file(runs[0].stem).exists():
        runs = runs[1:]  # an existing teacher is used, whatever its recipe
    if len(data.spec.classes) == 2 and any(run.loss == "ls" for run in runs):
        raise UserError("--loss ls standardises two logits to 1 and -1, which teaches nothing: leave it out")
    counts = [len(data.rows(run.subset, run.holdout, run.omit, run.student_images)) for run in runs]  # all are checked
    if options.all or options.student:  # make a student, to fail before the teacher is trained and not after it
        model = Run(runs[-1], runtime, data.spec, counts[-1], RunFiles(runs[-1], options)).model
        layers = checkpoint.fingerprint({}, [(name, tuple(t.shape)) for name, t in model.state_dict().items()])
        runs = [replace(run, student_layers=layers) if run.student else run for run in runs]
    return data, runs


def main(argv: list | None = None) -> int:
    """Run train.py with `argv` (None: the command line); the exit code."""
    options = parse_train(argv)
    return exit_code(lambda: train_all(options))


if __name__ == "__main__":
    leave(main())
