"""Where a run runs: its device and precision, and what its processes share."""

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from runtime.errors import UserError


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
        summed = values.detach().cpu().to(torch.float64, copy=True)  # MPS knows no float64
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
    if kind == "cpu":
        return torch.device(name)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = torch.cuda.device_count() if kind == "cuda" and not index else 1
    if processes > devices:
        raise UserError(f"{processes} processes need a device each, --device {name} gives {devices}; try --device cpu")
    if kind == "mps":
        return torch.device(name)
    return torch.device("cuda", int(index or os.environ.get("LOCAL_RANK", 0)))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    Without the hardware for it they are emulated. Intel's processors have it twice, and only in AMX is it fast:
    their AVX512-BF16 is slower than float32, as was measured where a virtual machine hides AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return True
        return torch.cpu._is_avx512_bf16_supported() and "Intel" not in processor()
    return False


def processor() -> str:
    """The processor's name, as its maker gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_title(runtime: Runtime) -> str:
    """The device in words."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    if runtime.device.type == "mps":
        return f"{processor()}, MPS"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
