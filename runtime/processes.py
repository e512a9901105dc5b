"""One process, or several under torchrun: how they begin, end, and normalise over one batch."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn

from runtime.device import Runtime, has_fast_bf16, pick_device
from runtime.errors import SaidElsewhere, Stopped, UserError
from runtime.memory import keep_freed_memory, limit_memory


def process_count() -> int:
    """How many processes torchrun started; UserError where that is no number."""
    try:
        return int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}: start with torchrun, or unset it") from error


@contextlib.contextmanager
def start(device_name: str, precision: str, deterministic: bool = False):
    """Yield the Runtime of this process; under torchrun it joins and leaves the process group."""
    device = pick_device(device_name)
    world_size = process_count()
    if device.type == "cpu":
        limit_memory()
        keep_freed_memory()
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
    try:
        if not 0 <= int(os.environ.get("RANK", 0)) < world_size:
            raise ValueError(f"RANK is {os.environ.get('RANK')}")
        store, rank, _ = next(dist.rendezvous("env://"))
    except (ValueError, dist.DistError) as error:  # a variable that torchrun sets is missing or wrong, or nobody comes
        why = str(error).splitlines()[0]
        raise UserError(f"WORLD_SIZE is {world_size}, but {why}: start with torchrun, or unset WORLD_SIZE") from error
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
    """Batch norm over the equal batches of all processes, on any device (torch's SyncBatchNorm knows only CUDA)."""

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        processes, shape = dist.get_world_size(), (1, -1, 1, 1)
        values = images.float()
        # In two steps: the mean of squares less the square of the mean loses all digits where means are large.
        mean = SumOverProcesses.apply(values.mean((0, 2, 3))) / processes
        centred = values - mean.view(shape)
        variance = SumOverProcesses.apply(centred.square().mean((0, 2, 3))) / processes
        with torch.no_grad():
            count = images.numel() // images.shape[1] * processes
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(images.dtype)


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch norm of `model` normalise over the global batch, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm
    return model
