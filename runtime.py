"""Where a run runs: device, precision, processes, the stop signal, the progress bar, a user's errors."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""


class Stopped(Exception):
    """The run was asked to stop by a signal; its number is the argument."""


class SaidElsewhere(Exception):
    """Another process has already shown the error that this one ends with; its exit code is the argument."""


def complain(text: str) -> int:
    """Print a user's error as one line on stderr; its exit code."""
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    return 2


def exit_code(main: Callable[[], None]) -> int:
    """Call `main`: 0, or after one line on stderr 2 for a UserError and 128 + its number for a stop signal.

    A device whose memory is full counts as a UserError. A reader of stdout that has gone ends it as SIGPIPE would,
    without a word.
    """
    try:
        main()
    except SaidElsewhere as error:
        return error.args[0]
    except UserError as error:
        return complain(str(error))
    except torch.OutOfMemoryError:
        return complain("not enough memory on the device: give train.py a smaller --batch_size, or --device cpu")
    except KeyboardInterrupt:
        print("stopped at once; a training goes on from its last save", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except Stopped as stop:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        return 128 + stop.args[0]
    except BrokenPipeError:  # the reader of stdout, perhaps `head`, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, a name that Windows lacks
    return 0


@dataclass
class StopSignal:
    """SIGINT and SIGTERM, noted when they come and acted on between two steps."""

    number: int = 0
    previous: dict = field(default_factory=dict)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.number and "LOCAL_RANK" not in os.environ:  # torchrun passes on each signal twice
            raise KeyboardInterrupt  # asked again: not at the next step, but now
        self.number = number


@dataclass(frozen=True)
class Runtime:
    """The device, the autocast type (None: float32) and this process's place among all."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def precision(self) -> str:
        """The word bf16 or fp32."""
        return "bf16" if self.autocast_dtype is torch.bfloat16 else "fp32"

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def agree(self, *numbers: float) -> list[float]:
        """The maximum of each number over all processes, so that all of them decide alike."""
        if self.world_size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in float64 on the CPU."""
        summed = values.detach().cpu().double()
        if self.world_size > 1:
            dist.all_reduce(summed)
        return summed

    def print(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers; each has batch norm statistics of its own without --sync_bn."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device: what follows may read a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def pick_device(name: str) -> torch.device:
    """The device of a --device word; UserError where it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available on this machine; try --device cpu")
    if kind != "cuda":
        return torch.device(name)
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1 if index else torch.cuda.device_count()
    if processes > devices:
        raise UserError(f"{processes} processes need a CUDA device each, --device {name} gives {devices}; try cpu")
    return torch.device("cuda", int(index or os.environ.get("LOCAL_RANK", 0)))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (elsewhere it is emulated, and slow)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


@contextlib.contextmanager
def start(device_name: str, precision: str, deterministic: bool = False):
    """Yield the Runtime of this process; under torchrun it joins and leaves the process group."""
    device = pick_device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means it
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
    bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
    dtype = torch.bfloat16 if bf16 else None
    if world_size == 1:
        yield Runtime(device, dtype)
        return
    store, rank, _ = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        yield Runtime(device, dtype, rank, world_size)
    except (UserError, Stopped) as error:
        # Every process ends with the same error: the first to come here speaks for all.
        if store.add("failed", 1) > 1:
            raise SaidElsewhere(2 if isinstance(error, UserError) else 128 + error.args[0]) from error
        raise
    except RuntimeError as error:
        # One that was waiting for a process that ended so has lost its peer: it has nothing to add.
        if store.add("failed", 0) > 0:
            raise SaidElsewhere(2) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def main_first(runtime: Runtime):
    """Let the first process do the block before the others: it downloads, they find."""
    if not runtime.is_main:
        runtime.barrier()
    yield
    if runtime.is_main:
        runtime.barrier()


def device_title(runtime: Runtime) -> str:
    """The device in words, with its precision."""
    if runtime.device.type == "cuda":
        return f"{torch.cuda.get_device_name(runtime.device)}, {runtime.precision}"
    return f"{runtime.device.type}, {torch.get_num_threads()} threads, {runtime.precision}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=int(seconds)))


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on any device (torch's SyncBatchNorm knows only CUDA)."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        moments = torch.stack((images.float().mean((0, 2, 3)), images.float().square().mean((0, 2, 3))))
        mean, square = SumOverProcesses.apply(moments) / dist.get_world_size()
        variance = square - mean.square()
        with torch.no_grad():
            count = images.numel() // images.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shape = (1, -1, 1, 1)
        output = images.float() * scale.view(shape) + (self.bias - mean * scale).view(shape)
        return output.to(images.dtype)


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch norm of `model` normalise over the global batch, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm
    return model


class Progress:
    """A tqdm bar an epoch on a terminal, plain lines elsewhere; silent on all ranks but the first."""

    def __init__(self, title: str, total: int, runtime: Runtime, initial: int = 0, seconds: float = 30.0) -> None:
        self.terminal = sys.stderr.isatty() and runtime.is_main
        self.silent = not runtime.is_main
        self.title, self.total, self.count = title, total, initial
        self.every = 0.5 if self.terminal else seconds
        self.shown_at = time.monotonic()
        self.bar = tqdm(total=total, initial=initial, desc=title, disable=not self.terminal, leave=False, unit="step")

    def step(self) -> bool:
        """Count a step; True where it is time to show numbers."""
        self.count += 1
        self.bar.update()
        return time.monotonic() - self.shown_at >= self.every

    def show(self, text: str) -> None:
        self.shown_at = time.monotonic()
        if self.terminal:
            self.bar.set_postfix_str(text)
        elif not self.silent:
            print(f"{self.title} {self.count}/{self.total} {text}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
