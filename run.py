"""A training under way: what a checkpoint holds, what a resume brings back, how far the run is."""

import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import runtime as rt
from config import TrainOptions
from models import ARCHITECTURES, build_model
from runtime import Runtime, UserError
from utils import Views

METRICS = ("loss", "ce", "kl", "top1", "top5")
WARM_UP = 0.1  # fraction of all steps


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up, then linear decay to zero: a factor of the peak for step 0 <= step < total."""
    warm_up = max(int(total * WARM_UP), 1)
    return min((step + 1) / warm_up, (total - step) / max(total - warm_up, 1))


def make_optimizer(model: torch.nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay spares biases and batch norm (He et al., 2019, section 3.1).

    The last layer may learn at a rate of its own: its inputs are all positive, so that their steps add up.
    """
    groups = []
    for part, lr in ((model.features, options.lr), (model.classifier, options.lr * options.head_lr)):
        weights = [p for p in part.parameters() if p.ndim > 1]
        others = [p for p in part.parameters() if p.ndim <= 1]
        groups.append({"params": weights, "lr": lr, "weight_decay": options.weight_decay})
        groups.append({"params": others, "lr": lr, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True, fused=device.type != "mps")


class Run:
    """Model, optimizer, schedule, log and position of one training; `options` are resolved ones."""

    def __init__(self, options: TrainOptions, runtime: Runtime, views: Views, teacher_id: str) -> None:
        """UserError where the processes can't share a batch."""
        self.options, self.runtime = options, runtime
        world = runtime.world_size
        self.batch_size = min(options.batch_size, len(views)) // world * world
        if options.batch_size % world or not self.batch_size:
            raise UserError(f"{world} processes can't share batches of {options.batch_size}: give a multiple")
        self.steps = len(views) // self.batch_size  # of an epoch; its last, smaller batch is left out
        self.total_steps = self.steps * options.num_epochs
        torch.manual_seed(options.seed)  # of the initial weights
        self.model = build_model(options.role, len(options.spec.classes))
        self.model.to(runtime.device, memory_format=torch.channels_last)
        if options.sync_bn and world > 1:
            rt.sync_batch_norm(self.model)
        self.optimizer = make_optimizer(self.model, options, runtime.device)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(min(step, self.total_steps - 1), self.total_steps)
        )
        self.compiling = options.compile
        self.forward = torch.compile(self.model) if options.compile else self.model
        if world > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.log = checkpoint.RunLog(options.log_path)
        self.epoch = 0
        self.identity = {
            "role": options.role,
            "architecture": ARCHITECTURES[options.role],
            "num_classes": len(options.spec.classes),
            "dataset": options.dataset,
            "kd": options.kd,
            "options": options.result_options(),
            "teacher": teacher_id,
        }
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Set the epoch's counts to zero."""
        self.step, self.seconds = 0, 0.0
        dtype = torch.float32 if self.runtime.device.type == "mps" else torch.float64
        self.totals = torch.zeros(len(METRICS), dtype=dtype, device=self.runtime.device)
        self.losses = torch.zeros(self.steps, device=self.runtime.device)

    def record(self, loss, ce, kl, correct, count: int) -> None:
        """Count a step: its mean losses and its correct answers over `count` images; nothing waits for the device."""
        self.losses[self.step] = loss.detach()
        self.totals += torch.stack((loss.detach() * count, ce * count, kl * count, *correct))
        self.step += 1
        if self.compiling:
            self.runtime.print(f"compiled in {time.monotonic() - self.clock:.1f} s, which the epoch's time leaves out")
            self.compiling, self.clock = False, time.monotonic()
        else:
            self.count_time()

    def count_time(self) -> None:
        """Add the time since the last call to the epoch's."""
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

    def check_finite(self) -> None:
        """UserError that names the first step whose loss is NaN or infinite; what was saved before it stays."""
        bad = (~torch.isfinite(self.losses[: self.step])).nonzero()
        if len(bad):
            step = int(bad[0])
            lr = self.options.lr * learning_rate_factor(self.epoch * self.steps + step, self.total_steps)
            raise UserError(
                f"the loss is {self.losses[step].item()} at epoch {self.epoch + 1}, step {step + 1}, learning rate "
                f"{lr:.4g}: try --resume False with an --lr below {self.options.lr:g}"
            )

    def state(self, **more) -> dict:
        """What a checkpoint holds: all that is needed to use the weights and to trust them."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        return self.identity | {"epoch": self.epoch, "versions": checkpoint.versions(), "model": weights} | more

    def save(self) -> None:
        """Write the resume state. No generator is in it: order and views follow from seed and epoch."""
        totals = self.runtime.total(self.totals)
        if self.runtime.is_main:
            position = {"step": self.step, "seconds": self.seconds, "totals": totals, "log": self.log.text}
            engines = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
            checkpoint.save(self.options.resume_path, self.state(**position, **engines))

    def restore(self) -> None:
        """Go on where the resume state was saved; UserError where its run had other options, or it is damaged."""
        path = self.options.resume_path
        state = checkpoint.load(path, role=self.options.role, architecture=self.identity["architecture"])
        try:
            self.take_over(state, path)
        except UserError:
            raise
        except Exception as error:  # its parts are there and whole, but not a resume state's
            raise UserError(f"{path} is damaged or no unfinished run: give --resume False to start anew") from error

    def take_over(self, state: dict, path: Path) -> None:
        """Make a loaded resume state this run's own."""
        options = self.identity["options"]
        differing = [f"--{k} {v}, not {options.get(k)}" for k, v in state["options"].items() if v != options.get(k)]
        if state["teacher"] != self.identity["teacher"]:
            differing.append("another teacher")
        if differing:
            raise UserError(
                f"the unfinished run {path} has {'; '.join(differing)}: "
                "give the same options to go on with it, or --resume False to start anew"
            )
        checkpoint.load_weights(self.model, state, path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        if self.runtime.is_main:  # sums over all processes: one brings them back
            self.totals += state["totals"].to(self.totals)
            self.log.write(state["log"])
