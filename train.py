"""Train a VGG19-BN teacher on CIFAR-10 and distil it into a small CNN (Hinton, Vinyals & Dean, 2014).

    python train.py --tto True             the teacher               -> weights/teacher.pt
    python train.py                        the student without KD    -> weights/student.pt
    python train.py --kd True --temp 5     the student with KD       -> weights/student_kd_t5.pt
    python train.py --all True             all of these, evaluated, in one table
    torchrun --nproc_per_node=2 train.py   any of these on two devices

A run that was stopped, killed or cut off goes on with the same command.
"""

import contextlib
import sys
import time
from dataclasses import replace

import config

if __name__ == "__main__":
    config.parse_train()  # --help and a wrong option answer here, before torch is imported

import torch

import checkpoint
import runtime as rt
from inference import load_model
from report import write_table
from run import METRICS, Run
from runtime import Progress, Runtime, Stopped, UserError
from teacher_cache import TeacherCache
from utils import Views, evaluate, find_logs, load_images, loss_terms, plot_comparison, plot_curves, topk_correct


def train_epoch(run: Run, views: Views, teacher: TeacherCache | None, stop: rt.StopSignal) -> None:
    """The rest of the run's current epoch; the sums of its metrics go to `run.totals`."""
    options, runtime = run.options, run.runtime
    order, view_of = views.plan(options.seed, run.epoch)
    run.clock = saved_at = time.monotonic()
    run.model.train()
    with Progress(f"epoch {run.epoch + 1}/{options.num_epochs}", run.steps, runtime, run.step) as progress:
        while run.step < run.steps:
            rows = order[run.step * run.batch_size : (run.step + 1) * run.batch_size]
            rows = rows[runtime.rank :: runtime.world_size]
            images, labels = views.batch(rows, view_of[rows])
            teacher_logits = teacher.logits(rows, view_of[rows], images) if teacher else None
            with runtime.autocast():
                logits = run.forward(images)
            loss, ce, kl = loss_terms(logits, teacher_logits, labels, options.temperature, options.alpha)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.scheduler.step()
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
    lr = run.scheduler.get_last_lr()[0]
    return f"loss {loss:.3f} top1 {100 * top1:.2f}% {speed:,.0f} img/s lr {lr:.4f} left {rt.duration(left)}"


def end_epoch(run: Run, teacher: TeacherCache | None, held_out, split: str, stop: rt.StopSignal) -> None:
    """Evaluate, append the epoch's JSON line and step to the next epoch."""
    options, runtime = run.options, run.runtime
    images = run.steps * run.batch_size
    means = dict(zip(METRICS, (runtime.total(run.totals) / images).tolist(), strict=True))
    line = {
        "epoch": run.epoch + 1,
        "train": percent(means if options.kd else {k: v for k, v in means.items() if k != "kl"}),
        split: percent(evaluate(run.model, held_out, options.spec, runtime, stop)),
        "lr": run.scheduler.get_last_lr()[0],
        "seconds": round(run.seconds, 3),
        "images_per_second": round(images / max(run.seconds, 1e-9), 1),
    }
    if teacher:
        line["teacher_cache_hits"] = teacher.hit_rate()
    if runtime.is_main:
        run.log.append(line)
    run.epoch += 1
    run.begin_epoch()
    hits = f", teacher cache hits {100 * line['teacher_cache_hits']:.1f}%" if teacher else ""
    runtime.print(
        f"epoch {line['epoch']}/{options.num_epochs}: train loss {line['train']['loss']:.4f} top1 "
        f"{line['train']['top1']:.2f}%, {split} loss {line[split]['loss']:.4f} top1 {line[split]['top1']:.2f}% "
        f"top5 {line[split]['top5']:.2f}%, {line['seconds']:.1f} s, {line['images_per_second']:,.0f} img/s{hits}",
    )


def percent(metrics: dict[str, float]) -> dict[str, float]:
    """Accuracies as percentages, the rest as it is."""
    return {name: 100 * value if name.startswith("top") else value for name, value in metrics.items()}


def load_teacher(options: config.TrainOptions, runtime: Runtime) -> tuple[torch.nn.Module, str]:
    """The teacher in evaluation mode, without gradients, and the fingerprint of its weights."""
    path = options.teacher_path
    if not path.exists():
        command = replace(options, tto=True, kd=False, seed=config.DEFAULT_SEED).command("train.py")
        raise UserError(f"no teacher {path}: train one with `{command}`")
    teacher, content = load_model(path, "teacher", options.dataset, options.spec, runtime.device)
    return teacher, checkpoint.fingerprint(content["model"])


def train(options: config.TrainOptions, runtime: Runtime, stop: rt.StopSignal) -> None:
    """One run from its options to its checkpoint, log and figures, going on with an unfinished one."""
    teacher, teacher_id = load_teacher(options, runtime) if options.kd else (None, "")
    with rt.main_first(runtime):
        images, held_out = load_images(options.spec, options.data_path, options.subset, options.holdout)
    views = Views(images.to(runtime.device), options.spec, options.views)
    held_out = held_out.to(runtime.device)
    split = "holdout" if options.holdout else "test"
    lock = checkpoint.locked(options.checkpoint_path) if runtime.is_main else contextlib.nullcontext()
    with lock:
        run = Run(options, runtime, views, teacher_id)
        begin(run, split, len(views))
        cache = make_cache(run, teacher, views) if options.kd else None
        try:
            while run.epoch < options.num_epochs:
                train_epoch(run, views, cache, stop)
                end_epoch(run, cache, held_out, split, stop)
                run.save()
        except Stopped:
            run.save()
            runtime.print(f"saved {options.resume_path} at epoch {run.epoch + 1}, step {run.step}/{run.steps}")
            raise
        if runtime.is_main:
            finish(run, split)
        runtime.barrier()


def begin(run: Run, split: str, count: int) -> None:
    """Restore an unfinished run, or start the log of a new one."""
    options, runtime = run.options, run.runtime
    checkpoint.make_folder(options.plots_path)
    exists = options.resume_path.exists()
    if options.resume == "True" and not exists:
        raise UserError(f"--resume True: there is no unfinished run {options.resume_path}; leave --resume out")
    runtime.barrier()
    if exists and options.resume != "False":
        run.restore()
        runtime.print(f"going on with {options.resume_path} at epoch {run.epoch + 1}, step {run.step}/{run.steps}")
        return
    chosen = ("num_epochs", "batch_size", "lr", "head_lr", "weight_decay", "seed")
    runtime.print(
        f"{options.run_name}: {count:,} images, {run.steps} steps an epoch, {runtime.device} "
        f"{runtime.precision}, " + ", ".join(f"{name} {getattr(options, name):g}" for name in chosen),
    )
    if runtime.is_main:
        checkpoint.keep_previous(options.checkpoint_path)
        header = {"run": options.run_name, "evaluated_on": split, "device": rt.device_title(runtime), **run.identity}
        header |= {"world_size": runtime.world_size, "versions": checkpoint.versions()}
        run.log.begin(header, keep_old=not exists)  # an unfinished run's is worth less than what was kept before
    run.save()


def make_cache(run: Run, teacher: torch.nn.Module, views: Views) -> TeacherCache:
    """The teacher behind its cache, whose file is named after everything its logits depend on."""
    options, spec = run.options, run.options.spec
    path = None
    if options.cache_teacher:
        pixels = {"pixels": views.padded}
        key = checkpoint.fingerprint(pixels, run.identity["teacher"], spec.mean, spec.std, options.precision)
        path = options.weights_path / f"{spec.prefix}teacher_{key}.cache"
    with rt.main_first(run.runtime):
        return TeacherCache(path, teacher, views, len(spec.classes), run.runtime)


def finish(run: Run, split: str) -> None:
    """Write the finished checkpoint and the figures, drop the resume state, say what to type next."""
    options = run.options
    metrics = checkpoint.read_log(options.log_path)[1][-1][split]
    checkpoint.save(options.checkpoint_path, run.state(metrics=metrics))
    figures = plot_curves(options.log_path, options.plots_path)
    if logs := find_logs(options.plots_path, options.dataset):
        figures.append(plot_comparison(logs, options.comparison_path))
    options.resume_path.unlink(missing_ok=True)
    print(f"saved {options.checkpoint_path}, {options.log_path} and {', '.join(path.name for path in figures)}")
    if not options.holdout:  # a trial, which test.py has no business with
        print(f"next: {options.command('test.py')}")


def main(argv: list[str] | None = None) -> int:
    """Run train.py with `argv` (None: the command line); the exit code."""
    options = config.parse_train(argv)
    return rt.exit_code(lambda: train_all(options))


def train_all(options: config.TrainOptions) -> None:
    """The run asked for, or with --all every run that is not finished yet, and then the table."""
    with rt.StopSignal() as stop, rt.start(options.device, options.precision, options.deterministic) as runtime:
        for run_options in options.runs():
            run_options = replace(run_options, precision=runtime.precision)
            if options.all and is_finished(run_options, runtime):
                runtime.print(f"{run_options.run_name}: finished before, kept")
            else:
                train(run_options, runtime, stop)
        if options.all and runtime.is_main:
            write_table(options)


def is_finished(options: config.TrainOptions, runtime: Runtime) -> bool:
    """Whether a finished checkpoint of these options, and for KD of the present teacher, is there.

    A teacher has to know the same images and to be trained as long: a better one is not to be trained again.
    """
    if options.resume == "False" or options.resume_path.exists() or not options.checkpoint_path.exists():
        return False
    found = checkpoint.load(options.checkpoint_path, role=options.role, dataset=options.dataset)
    wanted = options.result_options()
    if options.tto:
        same_images = all(found["options"][name] == wanted[name] for name in ("subset", "holdout"))
        return same_images and found["options"]["num_epochs"] >= wanted["num_epochs"]
    return found["options"] == wanted and found["teacher"] == (load_teacher(options, runtime)[1] if options.kd else "")


if __name__ == "__main__":
    sys.exit(main())
