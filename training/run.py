"""What a checkpoint says of its run, model and data set; a training run (`Run`), saved and resumed."""

import math
import time
from dataclasses import asdict, replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from data_sets import DATA_SETS, PICTURES, DataSet
from models import build_model_of
from runtime import checkpoint
from runtime.device import Runtime, machine
from runtime.errors import UserError
from runtime.files import writing
from training.optimizer import learning_rate, make_optimizer, set_learning_rate
from training.runs import UNKNOWN, RunConfig, RunName, config_of, describe_differences, saw_held_out
from utils import parse_log, seed_of

METRICS = ("loss", "ce", "kl", "top1", "top5")  # kl: the soft terms before weighting, whatever the loss


class RunFiles:
    """The files of a run: its checkpoint, its log, and the resume state while it is unfinished."""

    def __init__(self, config: RunName, options) -> None:
        if options.all and config.role == "teacher":  # shared by all --name folders
            options = replace(options, name=None)
        self.checkpoint = options.weights_folder / f"{config.stem}.pt"
        self.unfinished = options.weights_folder / f"{config.stem}.last.pt"
        self.log = options.plots_folder / f"{config.stem}.jsonl"


def describe_data(spec: DataSet) -> dict:
    """What a checkpoint says of its data set: all that is needed to use the model without the images."""
    words = {"classes": list(spec.classes), "mean": list(spec.mean), "std": list(spec.std)}
    return words | {"flip": spec.flip, "size": spec.size, "pictures": PICTURES.format(spec.size)}


def spec_of(content: dict) -> DataSet:
    """The data set as a checkpoint describes it: classes, normalisation, flip and size."""
    described = {name: tuple(content["data"][name]) for name in ("classes", "mean", "std")}
    config = config_of(content)
    return replace(DATA_SETS[config.dataset], **described, flip=config.flip, size=config.size)


def load_model(content: dict, runtime: Runtime, allowed_student: str | None = None) -> torch.nn.Module:
    """The model of a checkpoint, ready to evaluate; UserError if its weights don't fit or its code is not allowed."""
    config = config_of(content)
    if config.student and config.student != allowed_student:  # a checkpoint alone must not decide which code is run
        raise UserError(f"{content['path']} is a model of {config.student}: give --student {config.student} to use it")
    model = checkpoint.load_weights(build_model_of(config, runtime), content)
    return model.eval().requires_grad_(False)


def data_mismatch(content: dict, spec: DataSet) -> str:
    """Why a checkpoint's model can't be used on a data set (other classes or image size), or ""."""
    config, classes = config_of(content), content["data"]["classes"]
    if tuple(classes) != spec.classes:
        return f"has {len(classes)} classes ({', '.join(classes[:3])}, ...) that are not those of {spec.name}"
    if config.size != spec.size:
        return f"was trained on images of {config.size} x {config.size} pixels, not {spec.size} x {spec.size}"
    return ""


def training_images_mismatch(content: dict, name: RunName, spec: DataSet) -> str:
    """Why a checkpoint's training images forbid its use: other images, or some that `name` holds out; or ""."""
    config = config_of(content)
    if spec.fingerprint and config.images not in (spec.fingerprint, UNKNOWN):
        return f"was trained on other images than those of {spec.name} here"
    if spec.fingerprint and saw_held_out(config, name, spec.train_images):
        return f"was trained on images that --holdout {name.holdout} holds out"
    return ""


def require_finished(content: dict) -> dict:
    """The same checkpoint; UserError if other code saved it, or its run is unfinished."""
    config_of(content)
    if "metrics" not in content:
        raise UserError(f"{content['path']} is an unfinished run: rerun its command to finish it")
    return content


def require_same(content: dict, config: RunConfig) -> dict:
    """The same content; UserError if it is of another run than `config`, whose teacher may not be known yet."""
    kind = "a finished run" if "metrics" in content else "an unfinished run"
    ignoring = set() if config.teacher else {"teacher", "teacher_unknown"}
    if "metrics" not in content:  # another number of processes may resume it, and sync_bn needs several
        ignoring |= {"processes", "sync_bn"}
    found = config_of(content)
    if why := describe_differences(found, config, ignoring):
        how = "with --tto True, " if config.role == "teacher" else ""  # with --all, --name doesn't reach the teacher
        advice = f"{how}repeat its options, keep both with --name WORD, or replace it with --resume False (not --all)"
        if found.images != config.images:
            advice = "the images have changed, so give other --weights_path and --plots_path"
        raise UserError(f"{content['path']} is {kind} with {why}: {advice}")
    return content


def find_finished(config: RunConfig, options) -> dict | None:
    """The checkpoint of this run, None if it is unfinished or --resume False is given; UserError if of another run."""
    files = RunFiles(config, options)
    is_unfinished = files.unfinished.exists()
    if is_unfinished and options.all:
        require_same(checkpoint.load(files.unfinished), config)  # now, not when its turn comes
    if is_unfinished or not (options.resume and files.checkpoint.exists()):
        return None
    return require_same(checkpoint.load(files.checkpoint), config)


class Run:
    """Model, optimizer, log and position of one training on `count` images."""

    def __init__(self, config: RunConfig, runtime: Runtime, spec: DataSet, count: int, files: RunFiles | None) -> None:
        """UserError if the processes can't share a batch."""
        self.config, self.runtime, self.spec, self.files = config, runtime, spec, files
        world = runtime.world_size
        self.batch_size = min(config.batch_size, count) // world * world
        if config.batch_size % world or not self.batch_size:
            why = f"a batch of {min(config.batch_size, count)} can't be split over {world} processes"
            how = "train it first, with --tto True and" if config.role == "teacher" else "give"
            raise UserError(f"{config.stem}: {why}: {how} a --batch_size that is a multiple of {world}, or more images")
        self.steps_per_epoch = count // self.batch_size  # the last, smaller batch is left out
        self.total_steps = self.steps_per_epoch * config.num_epochs
        torch.default_generator.manual_seed(config.seed)  # of the initial weights; torch.manual_seed seeds GPUs, too
        self.model = build_model_of(config, runtime)
        if config.sync_bn:
            for module in self.model.modules():  # torch drops what a subclass adds, as timm's adds an activation
                if isinstance(module, _BatchNorm) and not type(module).__module__.startswith("torch."):
                    raise UserError(f"--sync_bn can't convert {type(module).__name__} of --student: leave it out")
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        # Not dynamic: else the kernels, and so the bits, depend on the batch sizes that this process compiled before.
        self.forward = torch.compile(self.model, dynamic=False) if config.compile else self.model
        if world > 1:
            self.forward = DistributedDataParallel(self.forward)
            self.forward.broadcast_buffers = False  # shared once, before an evaluation; torch deprecates the argument
        self.optimizer = make_optimizer(self.model, config, runtime.product_dtype)
        # Keeps small gradients from becoming zero in float16; skips a step whose gradients overflow.
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.log = ""  # a header, then one JSON line per epoch
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.begin_epoch(0)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, or of the last one if none is left."""
        step = min(self.epoch * self.steps_per_epoch + self.step, self.total_steps - 1)
        return learning_rate(step, self.total_steps, self.config.lr)

    @property
    def place(self) -> str:
        """The epoch and step in words."""
        step = f"epoch {self.epoch + 1}, step {self.step}/{self.steps_per_epoch}"
        return step if self.epoch < self.config.num_epochs else "the end of the last epoch"

    def begin_epoch(self, epoch: int) -> None:
        """Move to the first step of an epoch, counted from 0."""
        self.epoch, self.step, self.seconds = epoch, 0, 0.0
        dtype = torch.float32 if self.runtime.device.type == "mps" else torch.float64  # which MPS lacks
        self.totals = torch.zeros(len(METRICS), dtype=dtype, device=self.runtime.device)
        self.clock = time.monotonic()

    def seed_step(self) -> None:
        """Seed what the model draws (dropout) by seed, epoch, step and process, so that a resumed run repeats it."""
        seed = seed_of("step", self.config.seed, self.epoch, self.step, self.runtime.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices, which takes 30 times as long
        if self.runtime.device.type != "cpu":
            torch.get_device_module(self.runtime.device).manual_seed(seed)

    def backward_and_step(self, loss: torch.Tensor) -> None:
        """One step of the optimizer, down the gradient of a loss."""
        set_learning_rate(self.optimizer, self.lr)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def record(self, loss, ce, kl, correct, count: int) -> None:
        """Add a step to the epoch's sums: mean losses over `count` images and correct predictions, on the device."""
        self.totals += torch.stack((loss.detach() * count, ce * count, kl * count, *correct))
        self.step += 1
        self.count_time()

    def count_time(self) -> None:
        """Add the time since the last call to that of the epoch."""
        now = time.monotonic()
        self.seconds += min(now - self.clock, 3600.0)  # on Windows the clock goes on while a laptop sleeps
        self.clock = now

    def check_finite(self) -> None:
        """UserError if a loss of this epoch was NaN or infinite, which makes their sum so."""
        loss = self.totals[METRICS.index("loss")].item()
        if not math.isfinite(loss):
            what = f"the loss of {self.config.stem} is {loss:g} in epoch {self.epoch + 1}"
            how, more = ("--tto True ", "") if self.config.role == "teacher" else ("", " (--all: with --name WORD)")
            raise UserError(f"{what}: train it again with {how}--lr {self.config.lr / 10:.4g} --resume False{more}")

    def header(self) -> dict:
        """What a checkpoint and a log begin with."""
        return {"run": asdict(self.config), "machine": machine(self.runtime), "title": self.config.title}

    def state(self, **more) -> dict:
        """What a checkpoint holds: the header, the data set in words, and the weights."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        content = {"data": describe_data(self.spec), "epoch": self.epoch, "log": self.log, "model": weights}
        return self.header() | content | more

    def finished_state(self) -> dict:
        """What the checkpoint of the finished run holds: with the metrics of its last epoch, and its seconds."""
        _, lines = parse_log(self.log)
        seconds = sum(line["seconds"] for line in lines)
        return self.state(metrics=lines[-1][self.config.split], seconds=seconds)

    def write_log(self, text: str) -> None:
        """Make `text` the whole log, on disk too; UserError if that fails."""
        self.log = text
        if self.runtime.is_main:
            with writing(self.files.log) as temporary:
                temporary.write_text(text)

    def save_is_due(self) -> bool:
        """Whether the first process, which writes, should save: 1 s, and 100 times what a save takes, have passed."""
        return self.runtime.is_main and time.monotonic() - self.saved_at > max(1.0, 100 * self.save_seconds)

    def save(self) -> None:
        """Write the resume state, without generators and schedule: they follow from seed, epoch and step."""
        start = time.monotonic()
        totals = self.runtime.total(self.totals)
        if self.runtime.is_main:
            position = {"step": self.step, "seconds": self.seconds, "totals": totals}
            states = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            checkpoint.save(self.files.unfinished, self.state(**position, **states))
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def restore(self) -> None:
        """Continue where the resume state was saved; UserError if its run had other options, or it is damaged."""
        state = require_same(checkpoint.load(self.files.unfinished), self.config)
        checkpoint.load_weights(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        # The saved sums are those of all processes: each takes an equal share, so that the total stays the same.
        self.totals += (state["totals"] / self.runtime.world_size).to(self.totals)
        self.write_log(state["log"])  # whatever became of the file meanwhile
        before = config_of(state)
        changes = [describe_differences(before, self.config)] if before != self.config else []
        for name, value in machine(self.runtime).items():
            if state["machine"][name] != value:
                changes.append(f"{name} {state['machine'][name]}, not {value}")
        note = f"; it was saved with {'; '.join(changes)}: the result may differ" if changes else ""
        self.runtime.print(f"resuming {self.files.unfinished} at {self.place}{note}")
