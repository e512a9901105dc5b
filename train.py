"""Train a VGG19-BN teacher on CIFAR-10 and distil it into a small CNN (Hinton, Vinyals & Dean, 2014).

    python train.py --tto True             the teacher               -> weights/teacher.pt
    python train.py                        the student without KD    -> weights/student.pt
    python train.py --kd True --temp 5     the student with KD       -> weights/student_kd_t5.pt
    python train.py --all True             all of these, evaluated, in one table
    torchrun --nproc_per_node=2 train.py   any of these on two devices

A run that was stopped, killed or cut off goes on with the same command.
"""

import contextlib
import os
import sys
import time
from dataclasses import replace

import config

if __name__ == "__main__":
    config.answer_early(config.parse_train)  # --help and a wrong option answer here, before torch is imported

import torch

from datasets import DatasetSpec
from datasets.folder import find_dataset
from evaluation.comparison import measure_all
from evaluation.figures import find_logs, plot_comparison
from evaluation.inference import load_model
from evaluation.report import publish
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import Stopped, UserError, exit_code
from runtime.files import keep_previous, locked, make_folder
from runtime.processes import main_first, start
from runtime.progress import Progress, duration
from runtime.signals import StopSignal
from training.losses import loss_terms
from training.run import METRICS, Run, identity_of
from training.teacher_cache import TeacherCache
from utils import Views, evaluate, load_images, plot_curves, topk_correct


def train_epoch(run: Run, views: Views, teacher: TeacherCache | None, stop: StopSignal) -> None:
    """The rest of the run's current epoch; the sums of its metrics go to `run.totals`."""
    options, runtime = run.options, run.runtime
    order, view_of = views.plan(options.seed, run.epoch)
    loss_options = options.loss_function, options.temperature, options.kd_weight, options.ce_weight
    run.clock = saved_at = time.monotonic()
    run.model.train()
    with Progress(f"epoch {run.epoch + 1}/{options.num_epochs}", run.steps, runtime.is_main, run.step) as progress:
        while run.step < run.steps:
            rows = order[run.step * run.batch_size : (run.step + 1) * run.batch_size]
            rows = rows[runtime.rank :: runtime.world_size]
            images, labels = views.batch(rows, view_of[rows])
            teacher_logits = teacher.logits(rows, view_of[rows], images) if teacher else None
            with runtime.autocast():
                logits = run.forward(images)
            loss, ce, kl = loss_terms(logits, teacher_logits, labels, *loss_options)
            run.update(loss)
            run.record(loss, ce, kl, topk_correct(logits, labels), len(rows))

            show = progress.step()
            save_due = time.monotonic() - saved_at > options.save_seconds
            stopped, save_due = runtime.agree(stop.number, save_due)
            if show or save_due or stopped or run.step == run.steps:
                run.check_finite()
            if show and run.seconds:  # compiling is no part of the epoch's time
                progress.show(running_text(run))
            if stopped:
                raise Stopped(int(stopped))
            if save_due:
                run.save()
                saved_at = time.monotonic()
    run.count_time()  # the device was waited for


def running_text(run: Run) -> str:
    """Loss, top-1, speed, learning rate and time left for the whole run, as shown while it runs."""
    seen = run.step * run.batch_size / run.runtime.world_size
    loss, top1 = (run.totals[[0, 3]] / seen).tolist()
    speed = run.step * run.batch_size / run.seconds
    left = (run.total_steps - run.epoch * run.steps - run.step) * run.batch_size / speed
    return f"loss {loss:.3f} top1 {100 * top1:.2f}% {speed:,.0f} img/s lr {run.lr:.4f} left {duration(left)}"


def end_epoch(run: Run, teacher: TeacherCache | None, held_out, stop: StopSignal) -> None:
    """Evaluate, append the epoch's JSON line and step to the next epoch."""
    options, runtime = run.options, run.runtime
    images = run.steps * run.batch_size
    means = dict(zip(METRICS, (runtime.total(run.totals) / images).tolist(), strict=True))
    held = percent(evaluate(run.model, held_out, run.spec, runtime, stop))
    without = {"kl": not options.kd, "top5": "top5" not in held}
    line = {
        "epoch": run.epoch + 1,
        "train": percent({name: value for name, value in means.items() if not without.get(name)}),
        options.split: held,
        "lr": run.lr,
        "seconds": round(run.seconds, 3),
        "images_per_second": round(images / max(run.seconds, 1e-9), 1),
    }
    if teacher:
        line["teacher_cache_hits"] = teacher.hit_rate()
    if runtime.is_main:
        run.log.append(line)
    run.begin_epoch(run.epoch + 1)
    train = line["train"]
    top5 = f" top5 {held['top5']:.2f}%" if "top5" in held else ""
    hits = f", teacher cache hits {100 * line['teacher_cache_hits']:.1f}%" if teacher else ""
    runtime.print(
        f"epoch {line['epoch']}/{options.num_epochs}: train loss {train['loss']:.4f} top1 {train['top1']:.2f}%, "
        f"{options.split} loss {held['loss']:.4f} top1 {held['top1']:.2f}%{top5}, "
        f"{line['seconds']:.1f} s, {line['images_per_second']:,.0f} img/s{hits}",
    )


def percent(metrics: dict[str, float]) -> dict[str, float]:
    """Accuracies as percentages, the rest as it is."""
    return {name: 100 * value if name.startswith("top") else value for name, value in metrics.items()}


def load_teacher(options: config.TrainOptions, spec: DatasetSpec, runtime: Runtime) -> tuple[torch.nn.Module, str]:
    """The teacher in evaluation mode, without gradients, and the fingerprint of its weights.

    UserError where there is none, or where it can't teach on `spec`, the data set as it was read.
    """
    path = options.teacher_path
    remedy = f"train one with `{replace(options.of_teacher, resume='auto').command('train.py', every=True)}`"
    if options.teacher:
        remedy = f"give another --teacher, or leave it out and {remedy}"
    if not path.exists():
        raise UserError(f"no teacher {path}: {remedy}")
    teacher, content = load_model(path, "teacher", options.dataset, runtime.device)
    if why := unfit(content, options, spec):
        raise UserError(f"the teacher {path} was trained {why}: {remedy}")
    return teacher, checkpoint.fingerprint(teacher.state_dict())


def unfit(content: dict, options: config.TrainOptions, spec: DatasetSpec) -> str:
    """Why the teacher of a checkpoint can't teach on these images, in words, or none."""
    run = content["identity"]
    if run["images"] != spec.fingerprint:
        return f"on other images than {options.data_path} holds now"
    if content["spec"].description() != spec.description():
        return "with other classes, another normalisation or another --flip"
    if run.has_seen_holdout(options.subset, options.holdout, spec.train_images):
        return f"on images that --holdout {options.holdout} keeps aside"
    return ""


def train(
    options: config.TrainOptions,
    spec: DatasetSpec,
    runtime: Runtime,
    stop: StopSignal,
    teacher: torch.nn.Module | None,
    teacher_id: str,
) -> None:
    """One run from its options to its checkpoint, log and figures, going on with an unfinished one."""
    with main_first(runtime):
        images, held_out = load_images(
            spec, options.data_path, "train", options.split, subset=options.subset, holdout=options.holdout
        )
    views = Views(images.to(runtime.device), spec, options.views)
    held_out = held_out.to(runtime.device)
    with locked(options.checkpoint_path) if runtime.is_main else contextlib.nullcontext():
        run = Run(options, runtime, views, teacher_id)
        begin(run, len(views))
        cache = make_cache(run, teacher, views) if options.kd else None
        try:
            while run.epoch < options.num_epochs:
                train_epoch(run, views, cache, stop)
                end_epoch(run, cache, held_out, stop)
                run.save()
        except Stopped:
            run.save()
            runtime.print(f"saved {options.resume_path} at epoch {run.epoch + 1}, step {run.step}/{run.steps}")
            raise
        if runtime.is_main:
            finish(run)
        runtime.barrier()


def begin(run: Run, count: int) -> None:
    """Restore an unfinished run, or start the log of a new one."""
    options, runtime = run.options, run.runtime
    make_folder(options.plots_path)
    exists = options.resume_path.exists()
    if options.resume == "True" and not exists:
        raise UserError(f"--resume True: there is no unfinished run {options.resume_path}; leave --resume out")
    runtime.barrier()
    if exists and options.resume != "False":
        run.restore()
        return runtime.barrier()  # before the first process can finish and remove what the others read
    chosen = ", ".join(f"{name} {run.identity[name]}" for name in ("optimizer", *config.RECIPE_OPTIONS, "seed"))
    runtime.print(
        f"{options.run_name}: {count:,} images, {run.steps} steps an epoch, {run.identity['device']}, "
        f"{runtime.precision}, {chosen}"
    )
    if runtime.is_main:
        header = {"run": options.run_name, "evaluated_on": options.split, "identity": run.identity.facts}
        header["versions"] = checkpoint.versions()
        run.log.begin(header, keep_old=not exists)  # an unfinished run's is worth less than what was kept before
        keep_previous(options.checkpoint_path)
    run.save()


def make_cache(run: Run, teacher: torch.nn.Module, views: Views) -> TeacherCache:
    """The teacher behind its cache, whose file is named after everything its logits depend on."""
    options, spec = run.options, run.spec
    path = None
    if options.cache_teacher:
        pixels = {"pixels": views.padded} | ({} if views.allowed is None else {"views": views.allowed})
        facts = [run.identity[name] for name in ("teacher", "precision", "torch", "device")]
        key = checkpoint.fingerprint(pixels, spec.mean, spec.std, *facts)
        path = options.weights_path / f"{spec.prefix}teacher_{key}.cache"
    with main_first(run.runtime):
        return TeacherCache(path, teacher, views, len(spec.classes), run.runtime)


def finish(run: Run) -> None:
    """Write the finished checkpoint and the figures, drop the resume state, say what to type next."""
    options = run.options
    lines = run.log.lines
    seconds = sum(line["seconds"] for line in lines)
    checkpoint.save(options.checkpoint_path, run.state(metrics=lines[-1][options.split], seconds=seconds))
    figures = plot_curves(options.log_path, options.plots_path)
    images = run.identity["images"]
    if logs := find_logs(options.plots_path, options.dataset, options.subset, options.holdout, images):
        figures.append(plot_comparison(logs, options.comparison_path))
    options.resume_path.unlink(missing_ok=True)
    print(f"saved {options.checkpoint_path}, {options.log_path} and {', '.join(path.name for path in figures)}")
    print(f"next: {options.command('test.py')}")


def main(argv: list[str] | None = None) -> int:
    """Run train.py with `argv` (None: the command line); the exit code."""
    options = config.parse_train(argv)
    goes_on = replace(options, resume="auto").command("train.py", every=True)
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        goes_on = goes_on.replace("python", f"torchrun --nproc_per_node={processes}", 1)
    return exit_code(lambda: train_all(options), goes_on)


def train_all(options: config.TrainOptions) -> None:
    """The run asked for, or with --all every run that is not finished yet, and then the table."""
    with StopSignal() as stop, start(options.device, options.precision, options.deterministic) as runtime:
        spec, notes = find_dataset(options.spec, options.data_path, options.skip_broken, runtime, stop)
        for note in notes:
            runtime.print(note)
        teacher, teacher_id = None, ""
        for run_options in options.runs(spec):
            run_options = replace(run_options, precision=runtime.precision)
            if run_options.kd and teacher is None:  # one for all students
                teacher, teacher_id = load_teacher(options, spec, runtime)
            if options.all and is_finished(run_options, spec, runtime, teacher_id):
                runtime.print(f"{run_options.run_name}: finished before, kept")
            else:
                train(run_options, spec, runtime, stop, teacher, teacher_id)
        if options.all:
            paths = [run.checkpoint_path for run in options.runs(spec)]
            contents = [checkpoint.load(path) | {"path": path} for path in paths]
            contents = measure_all(contents, spec, options, runtime, stop)
            if runtime.is_main:
                publish(contents, options, "results")


def is_finished(options: config.TrainOptions, spec: DatasetSpec, runtime: Runtime, teacher_id: str) -> bool:
    """Whether the very run of these options is finished; of the teacher, which --all does not shape, any that fits."""
    path = options.checkpoint_path
    if options.resume == "False" or options.resume_path.exists() or not path.exists():
        return False
    content = checkpoint.load(path, role=options.role, dataset=options.dataset)
    if options.tto:
        return not unfit(content, options, spec)
    return content["identity"] == identity_of(options, spec, runtime, teacher_id)


if __name__ == "__main__":
    sys.exit(main())
