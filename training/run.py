"""A training under way: what a checkpoint holds, what a resume brings back, how far the run is."""

import math
import time
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

from config import TrainOptions
from datasets import DatasetSpec
from models import ARCHITECTURES, build_model
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.log import RunLog
from runtime.processes import sync_batch_norm
from training.optimizer import VERSIONS, learning_rate, make_optimizer, set_learning_rate
from utils import Views

METRICS = ("loss", "ce", "kl", "top1", "top5")


def identity_of(options: TrainOptions, spec: DatasetSpec, runtime: Runtime, teacher_id: str = "") -> Identity:
    """All that shapes the result of a run with resolved options here, of the teacher with this fingerprint.

    `spec` is the data set's, of a folder as it was read.
    """
    role = options.role
    return Identity(
        {
            "role": role,
            "architecture": ARCHITECTURES[role],
            "num_classes": len(spec.classes),
            "dataset": options.dataset,
            **({"images": spec.fingerprint} if spec.fingerprint else {}),
            "kd": options.kd,
            **options.result_options(),
            "optimizer": VERSIONS[options.optimizer],
            **({"teacher": teacher_id} if options.kd else {}),
            "world_size": runtime.world_size,
            "torch": str(torch.__version__),
            "device": device_title(runtime),
        }
    )


class Run:
    """Model, optimizer, log and position of one training; `options` are resolved ones."""

    def __init__(self, options: TrainOptions, runtime: Runtime, views: Views, teacher_id: str = "") -> None:
        """UserError where the processes can't share a batch."""
        self.options, self.runtime, self.spec = options, runtime, views.spec
        world = runtime.world_size
        self.batch_size = min(options.batch_size, len(views)) // world * world
        if options.batch_size % world or not self.batch_size:
            raise UserError(f"{world} processes can't share batches of {options.batch_size}: give a multiple")
        self.steps = len(views) // self.batch_size  # of an epoch; its last, smaller batch is left out
        self.total_steps = self.steps * options.num_epochs
        torch.manual_seed(options.seed)  # of the initial weights
        self.model = build_model(options.role, len(self.spec.classes))
        self.model.to(runtime.device, memory_format=torch.channels_last)
        if options.sync_bn and world > 1:
            sync_batch_norm(self.model)
        self.optimizer = make_optimizer(self.model, options, runtime.autocast_dtype or torch.float32)
        self.compiling = options.compile
        self.forward = torch.compile(self.model) if options.compile else self.model
        if world > 1:
            self.forward = DistributedDataParallel(self.forward)
        self.log = RunLog(options.log_path)
        self.identity = identity_of(options, self.spec, runtime, teacher_id)
        self.begin_epoch(0)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, or of the last one where none is left."""
        step = min(self.epoch * self.steps + self.step, self.total_steps - 1)
        return learning_rate(step, self.total_steps, self.options.lr)

    def begin_epoch(self, epoch: int) -> None:
        """Stand before the first step of an epoch, counted from 0."""
        self.epoch, self.step, self.seconds = epoch, 0, 0.0
        dtype = torch.float32 if self.runtime.device.type == "mps" else torch.float64
        self.totals = torch.zeros(len(METRICS), dtype=dtype, device=self.runtime.device)
        self.losses = torch.zeros(self.steps, device=self.runtime.device)

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimizer, down the gradient of a loss."""
        set_learning_rate(self.optimizer, self.lr)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

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
            lr = learning_rate(self.epoch * self.steps + step, self.total_steps, self.options.lr)
            raise UserError(
                f"the loss is {self.losses[step].item()} at epoch {self.epoch + 1}, step {step + 1}, learning rate "
                f"{lr:.4g}: try a lower --lr, `{self.anew(lr=float(f'{self.options.lr / 10:.4g}'))}`"
            )

    def anew(self, **changes) -> str:
        """The command that starts this run anew, and no other of --all."""
        return replace(self.options, resume="False", **changes).command("train.py", every=True)

    def state(self, **more) -> dict:
        """What a checkpoint holds: all that is needed to use the weights and to trust them."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        described = {"identity": self.identity.facts, "epoch": self.epoch, "versions": checkpoint.versions()}
        described["data"] = self.spec.description()
        return {**described, "model": weights, **more}

    def save(self) -> None:
        """Write the resume state. No generator and no schedule is in it: they follow from seed, epoch and step."""
        totals = self.runtime.total(self.totals)
        if self.runtime.is_main:
            position = {"step": self.step, "seconds": self.seconds, "totals": totals, "log": self.log.text}
            state = self.state(**position, optimizer=self.optimizer.state_dict())
            checkpoint.save(self.options.resume_path, state)

    def restore(self) -> None:
        """Go on where the resume state was saved; UserError where its run had other options, or it is damaged."""
        path = self.options.resume_path
        state = checkpoint.load(path, role=self.options.role, architecture=self.identity["architecture"])
        before = state["identity"]
        if state["format"] < checkpoint.FORMAT or before["optimizer"] not in VERSIONS.values():
            raise UserError(
                f"the unfinished run {path} is of an older version of this project, which another recipe trains: "
                f"start it anew by `{self.anew()}`"
            )
        if not before.can_go_on_as(self.identity):
            command = "`python train.py --tto True`" if self.options.tto else "`python train.py`"  # which --all is not
            raise UserError(
                f"the unfinished run {path} has {before.beside(self.identity)}: give {command} "
                f"the same options to go on with it, or start it anew by `{self.anew()}`"
            )
        try:
            self.take_over(state)
        except UserError:
            raise
        except Exception as error:  # its parts are there and whole, but not a resume state's
            raise UserError(f"{path} is damaged or no unfinished run: start it anew by `{self.anew()}`") from error
        where = f"going on with {path} at epoch {self.epoch + 1}, step {self.step}/{self.steps}"
        if before.differing(self.identity):
            regrouped = before["world_size"] != self.identity["world_size"] and not self.options.sync_bn
            effect = "batch norm sees other batches" if regrouped else "the last bits may differ"
            where += f"; it had {before.beside(self.identity)}: {effect} from here"
        self.runtime.print(where)

    def take_over(self, state: dict) -> None:
        """Make a loaded resume state this run's own; an exception of any kind where it is none, and nothing written."""
        checkpoint.load_weights(self.model, state, self.options.resume_path)
        groups = self.optimizer.state_dict()["param_groups"]  # as the options say, whatever the file does
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"param_groups": groups})
        self.epoch, self.step, self.seconds = int(state["epoch"]), int(state["step"]), float(state["seconds"])
        # Sums over all processes then: each takes its share, so that they add up to the same.
        self.totals += (state["totals"] / self.runtime.world_size).to(self.totals)
        self.log.text = state["log"]
        whole = [
            self.epoch in range(self.options.num_epochs + 1),
            self.step in range(self.steps + 1),
            0 <= self.seconds < math.inf,
            self.totals.isfinite().all(),
            isinstance(self.log.header, dict),
            len([line[self.options.split]["top1"] for line in self.log.lines]) == self.epoch,
            *(value.shape == p.shape for p, values in self.optimizer.state.items() for value in values.values()),
        ]
        if not all(whole):
            raise ValueError
        if self.runtime.is_main:
            self.log.write(state["log"])
