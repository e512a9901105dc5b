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
    answer_early(parse_train)  # --help and option errors exit here, before torch is imported

import torch

from data_sets import DataSet
from evaluation.comparison import measure_all
from evaluation.measures import softness
from evaluation.report import softness_text
from evaluation.results import write_table
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import Stopped, UserError, exit_code, leave
from runtime.files import locked, remove
from runtime.processes import start
from runtime.progress import Progress
from training.losses import training_loss
from training.recipes import RECIPE_FIELDS
from training.run import METRICS, Run, RunFiles, find_finished, require_same
from training.runs import RunConfig, name_of, plan
from training.teacher_logits import Teacher, load_teacher, teacher_path
from utils import Data, Images, Views, epoch_order, epoch_view, evaluate, load_images, plot_curves, topk_correct


def train_epoch(run: Run, views: Views, rows: torch.Tensor, k: int, teacher_logits: torch.Tensor | None) -> None:
    """Train the rest of the current epoch on the k-th views of images `rows` (N,); teacher_logits[i] are image i's."""
    config, runtime = run.config, run.runtime
    batches = epoch_order(rows, config.seed, run.epoch).to(views.storage).split(run.batch_size)
    run.model.train()
    run.clock = time.monotonic()  # what came before (the teacher's logits) is not timed
    title = f"epoch {run.epoch + 1}/{config.num_epochs}"
    with Progress(title, run.steps_per_epoch, runtime.is_main, run.step) as progress:
        while run.step < run.steps_per_epoch:
            batch_rows = batches[run.step][runtime.rank :: runtime.world_size]  # of this process
            images = views.images(batch_rows, k).contiguous(memory_format=runtime.memory_format)
            labels = views.labels[batch_rows]
            batch_teacher_logits = teacher_logits[batch_rows] if config.kd else None
            run.seed_step()
            with runtime.autocast():
                logits = run.forward(images)
            loss, ce, kl = training_loss(logits, batch_teacher_logits, labels, config)
            run.backward_and_step(loss)
            run.record(loss, ce, kl, topk_correct(logits, labels), len(labels))
            save_or_stop(run)  # before printing, which fails if Ctrl-C has also ended a `tee`
            progress.step(lambda: progress_text(run))
    run.check_finite()


def save_or_stop(run: Run) -> None:
    """Save the resume state if due; raise Stopped (train_run then saves) if any process received a signal."""
    if run.runtime.world_size > 1 and run.step % 4 and run.step < run.steps_per_epoch:
        return  # processes wait for one another below, so several agree only after every 4th step
    signal_number, save = run.runtime.agree(run.runtime.stop.number, run.save_is_due())
    if signal_number or save:
        run.check_finite()  # a state with NaN must not replace an earlier one
    if signal_number:
        raise Stopped(int(signal_number))
    if save:
        run.save()


def progress_text(run: Run) -> str:
    """Loss, top-1, speed, learning rate and time left for the whole run, as shown while it runs; UserError if NaN."""
    run.check_finite()
    seen = run.step * run.batch_size / run.runtime.world_size  # by this process
    loss, _, _, top1, _ = (run.totals / seen).tolist()  # of METRICS
    speed = run.step * run.batch_size / run.seconds
    steps_left = run.total_steps - run.epoch * run.steps_per_epoch - run.step
    left = timedelta(seconds=int(steps_left * run.batch_size / speed))
    return f"loss {loss:.3f} top1 {100 * top1:.2f}% {speed:,.0f} img/s lr {run.lr:.4f} left {left}"


def end_epoch(run: Run, held_out: Images, teacher_softness: dict | None, later_epochs: int) -> None:
    """Evaluate, log and print the epoch, begin the next; `later_epochs` are the epochs of all later runs."""
    config, runtime = run.config, run.runtime
    seen = run.steps_per_epoch * run.batch_size  # images, by all processes
    means = [total / seen for total in runtime.total(run.totals).tolist()]
    run.count_time()  # after total(), which waits for the device
    train = percent(dict(zip(METRICS, means, strict=True)))
    test = percent(evaluate(run.model, held_out, run.spec, runtime))
    epoch_seconds = run.seconds + time.monotonic() - run.clock  # with the evaluation
    if "top5" not in test:
        del train["top5"]
    speed = round(seen / max(run.seconds, 1e-9), 1)
    line = {"epoch": run.epoch + 1, "train": train, config.split: test, "lr": run.lr, "teacher": teacher_softness}
    if not config.kd:
        del train["kl"], line["teacher"]
    line |= {"seconds": round(run.seconds, 3), "images_per_second": speed}
    run.write_log(f"{run.log}{json.dumps(line)}\n")
    top5 = f" top5 {test['top5']:.2f}%" if "top5" in test else ""
    ce = f" ce {train['ce']:.4f}" if config.kd else ""  # without KD, and on test images, it is the loss
    left = timedelta(seconds=int((config.num_epochs - run.epoch - 1 + later_epochs) * epoch_seconds))
    all_left = f", about {left} left for all runs" if later_epochs else ""
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
    config: RunConfig, data: Data, teacher: Teacher | None, options: TrainOptions, runtime: Runtime, later_epochs: int
) -> dict:
    """Do one run, new or resumed, and write its checkpoint, log and figures; return the checkpoint's content."""
    files = RunFiles(config, options)
    with locked(files.checkpoint) if runtime.is_main else contextlib.nullcontext():
        runtime.barrier()  # fails if the first process has no lock; in DDP's constructor the others would wait for it
        views = Views(data.train, data.spec, runtime.device)
        rows = data.rows(config.subset, config.holdout, config.omit, config.student_images)
        held_out = data.held_out(config.subset, config.holdout)
        run = Run(config, runtime, data.spec, len(rows), files)
        restore_or_begin(run, len(rows), options.resume)
        while run.epoch < config.num_epochs:
            k = epoch_view(config.views, config.flip, config.seed, run.epoch)
            try:
                teacher_logits = teacher_softness = None
                if config.kd:
                    teacher_logits = teacher.view_logits(k, views, rows)
                    teacher_softness = softness(teacher_logits[rows[:50_000]], config.temp)  # all may not fit
                    if run.epoch == 0:
                        text = softness_text(teacher_softness, config.temp, config.num_classes)
                        runtime.print(f"the teacher at {text}")
                train_epoch(run, views, rows, k, teacher_logits)
                end_epoch(run, held_out, teacher_softness, later_epochs)
                save_or_stop(run)
            except Stopped:
                run.save()
                runtime.barrier()  # if the first process fails to save, that error is reported, not the stop
                runtime.print(f"saved {files.unfinished} at {run.place}")
                raise
        content = run.finished_state()
        if runtime.is_main:
            figures = plot_curves(files.log, files.log.parent)
            checkpoint.save(files.checkpoint, content)
            remove(files.unfinished)
            print(f"saved {files.checkpoint}, {files.log} and {', '.join(path.name for path in figures)}")
        runtime.barrier()
    return content | {"path": files.checkpoint}


def restore_or_begin(run: Run, count: int, resume: bool) -> None:
    """Restore an unfinished run, or start the log of a new one on `count` images."""
    config, runtime = run.config, run.runtime
    exists = runtime.agree(run.files.unfinished.exists())[0]  # in any process; all look before the first can change it
    if exists and resume:
        run.restore()
        runtime.barrier()  # before the first process can finish and remove what the others read
        return
    recipe = ", ".join(f"{name} {getattr(config, name)}" for name in ("optimizer", *RECIPE_FIELDS, "seed"))
    size = f"{count:,} images, {run.steps_per_epoch} steps per epoch"
    runtime.print(f"{config.stem}: {size}, {device_title(runtime)}, {recipe}")
    run.write_log(json.dumps(run.header() | {"split": config.split}) + "\n")


def train_all(options: TrainOptions) -> None:
    """Train the run that the options name, or with --all every unfinished run, and then write the table."""
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(start(options.device, options.precision, options.deterministic))
        data, configs = prepare(options, runtime)
        stack.enter_context(runtime.stop)  # until here a signal ends the process at once: there is nothing to save
        finished = {config.stem: find_finished(config, options) for config in configs}
        if options.all:
            runtime.print(f"{len(configs)} runs, {sum(map(bool, finished.values()))} of them finished")
        teacher, contents = None, []
        for i, config in enumerate(configs):
            if teacher is None and config.role == "student" and (options.kd or options.all):
                teacher = prepare_teacher(configs[i:], finished, options, data.spec, runtime)
                contents = [teacher.content] if teacher.content else []  # replaces the one just trained, if any
            config = teacher.added_to(config) if teacher else config
            content = finished[config.stem] or find_finished(config, options)  # by another command meanwhile
            runtime.check_same(config, bool(content))
            if content:
                advice = "" if options.all else "; --resume False trains it again"
                ended = f"already finished ({content['metrics']['top1']:.2f}% top-1), skipping"
                runtime.print(f"{config.stem}: {ended}{advice}")
            else:
                epochs_are_alike = teacher and len(options.student_images or ()) < 2  # a teacher's take longer, too
                later = configs[i + 1 :] if epochs_are_alike else []
                later_epochs = sum(other.num_epochs for other in later if not finished[other.stem])
                content = train_run(config, data, teacher, options, runtime, later_epochs)
            contents.append(content)
        if options.all:
            shown = measure_all(contents, configs[-1], data, runtime, teacher, allowed_student=options.student)
            if runtime.is_main:
                write_table(shown, options.table_folder)
        else:
            runtime.print(f"evaluate it with `{configs[-1].command('test.py', **options.changed())}`")


def prepare_teacher(students: list[RunConfig], finished: dict, options, spec: DataSet, runtime: Runtime) -> Teacher:
    """All students' teacher, read from its file; UserError if a finished student learned from another."""
    teacher = load_teacher(students[0], options, spec, runtime)
    teacher.check_views(students[0].views)
    runtime.print(f"the teacher is {teacher.title}")
    for student in students:
        if finished[student.stem]:  # check all now, not each when its turn comes
            require_same(finished[student.stem], teacher.added_to(student))
    return teacher


def prepare(options: TrainOptions, runtime: Runtime) -> tuple[Data, list[RunConfig]]:
    """The images and the plan of runs; UserError for options that can't work, before any training."""
    if options.sync_bn and runtime.device.type != "cuda":
        raise UserError("--sync_bn True needs CUDA devices: leave it out")
    if options.kd:
        teacher_path(name_of(options), options)  # fail before a download
    if options.precision == "auto" and runtime.device.type == "cuda" and runtime.precision == "fp32":
        runtime.print("this GPU has no fast bf16, so training uses fp32; try --precision fp16")
    data = load_images(options.dataset, options.data_path, runtime, options.flip, options.skip_broken, options.size)
    runtime.print(*data.notes)
    configs = plan(options, data.spec, runtime.precision, runtime.world_size)
    if options.all and not options.teacher and options.teacher_file(configs[0].stem).exists():
        configs = configs[1:]  # an existing teacher is used, whatever its recipe
    if len(data.spec.classes) == 2 and any(config.loss == "ls" for config in configs):
        raise UserError("--loss ls standardises two logits to 1 and -1, which teaches nothing: leave it out")
    counts = [len(data.rows(c.subset, c.holdout, c.omit, c.student_images)) for c in configs]  # UserError if too few
    if options.all or options.student:  # make a student, to fail before the teacher is trained and not after it
        model = Run(configs[-1], runtime, data.spec, counts[-1], files=None).model
        layers = checkpoint.fingerprint({}, [(name, tuple(t.shape)) for name, t in model.state_dict().items()])
        configs = [replace(config, student_layers=layers) if config.student else config for config in configs]
    return data, configs


def main(argv: list | None = None) -> int:
    """Run train.py with `argv` (None: the command line); return the exit code."""
    options = parse_train(argv)
    return exit_code(lambda: train_all(options))


if __name__ == "__main__":
    leave(main())
