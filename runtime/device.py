"""The device and precision of a run, and what its processes share."""

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from runtime.errors import StopSignal, UserError

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # autocast's type, None: it is off


@dataclass(frozen=True)
class Runtime:
    """The device, the precision as --precision names it, this process's place among all, and the stop signal."""

    device: torch.device
    precision: str = "fp32"
    rank: int = 0
    world_size: int = 1
    stop: StopSignal = field(default_factory=StopSignal, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def memory_format(self) -> torch.memory_format:
        """The fastest correct format of images and convolution weights on this device."""
        half_on_cuda = self.device.type == "cuda" and self.precision != "fp32"
        return torch.channels_last if half_on_cuda or self.device.type == "cpu" else torch.contiguous_format

    @property
    def product_dtype(self) -> torch.dtype:
        """The type of Muon's matrix products, which rounding does not harm: in float32 runs bfloat16 where fast."""
        return AUTOCAST_DTYPES[self.precision] or (torch.bfloat16 if has_fast_bf16(self.device) else torch.float32)

    @property
    def max_product_side(self) -> int:
        """The largest map side at which convolutions are faster as matrix products, for any batch (docs/speed.md)."""
        is_faster = has_fast_bf16(self.device) if self.precision == "bf16" else "Intel" in processor()
        return 4 if self.device.type == "cpu" and is_faster else 0

    def autocast(self) -> torch.autocast:
        """The context of every forward pass; a cache of cast weights would live as long as a caller's own autocast."""
        dtype = AUTOCAST_DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False)

    @contextlib.contextmanager
    def repeatable_logits(self):
        """Within the block, cuDNN computes the same logits for the same batch; its settings are restored."""
        cudnn = torch.backends.cudnn  # whose own context manager would turn it off
        before = cudnn.benchmark, cudnn.deterministic
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before

    def agree(self, *numbers: float) -> list[float]:
        """The maximum of each number over all processes, so that all of them decide alike."""
        shared = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def check_same(self, *seen) -> None:
        """UserError if the processes have seen different things, as each reads the files itself."""
        number = zlib.crc32(repr(seen).encode())
        highest, minus_lowest = self.agree(number, -number)
        if highest != -minus_lowest:
            what = "the processes have different images, checkpoints or precisions"
            raise UserError(f"{what}: rerun, or give --precision fp32")

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the CPU."""
        summed = values.detach().to("cpu", copy=True)
        if self.world_size > 1:
            dist.all_reduce(summed)
        return summed

    def print(self, *lines: str) -> None:
        """Print lines, once for all processes."""
        if self.is_main and lines:
            print(*lines, sep="\n", flush=True)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the first: without --sync_bn each has its own batch norm statistics."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device: what follows may read a clock."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def pick_device(word: str) -> torch.device:
    """The device of a --device word; UserError if absent, or if MPS fails a trial step ("auto" takes the CPU)."""
    kind, _, index = word.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        advice = f"give a number below {count}" if count else "check the driver and the torch build (docs/commands.md)"
        found = f"torch {torch.__version__} finds {count} CUDA devices"
        raise UserError(f"--device {word}: {found}: {advice}, or try --device cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = torch.cuda.device_count() if kind == "cuda" and not index else 1
    if kind != "cpu" and processes > devices:
        raise UserError(f"{processes} processes need one device each: --device {word} has {devices}; try --device cpu")
    if kind == "mps" and (error := training_error(torch.device(kind))):
        fails = f"a trial step of training fails with torch {torch.__version__} ({error})"
        if word == "mps":
            raise UserError(f"--device mps: {fails}; try --device cpu")
        print(f"MPS is not used: {fails}", flush=True)
        kind = "cpu"
    if kind == "cuda":
        return torch.device(kind, int(index or os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device(kind)


def training_error(device: torch.device) -> str:
    """What is wrong with a training step of a small network on a device, compared with the CPU's, or ""."""

    def gradients(device: torch.device) -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            images = torch.randn(4, 3, 8, 8)
            model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
        model.to(device)(images.to(device)).square().mean().backward()
        return [weight.grad.cpu() for weight in model.parameters()]

    try:
        found = gradients(device)
    except RuntimeError as error:  # also a NotImplementedError
        return str(error).splitlines()[0]
    expected = gradients(torch.device("cpu"))
    largest = max(gradient.norm() for gradient in expected)  # the first bias's, which batch norm cancels, is noise
    errors = [float((got - wanted).norm() / largest) for got, wanted in zip(found, expected, strict=True)]
    if all(error < 0.01 for error in errors):  # False for NaN
        return ""
    return f"gradients differ from the CPU's by {100 * max(errors):.0f}%"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32: of CPUs, AMX (Linux) and AMD's AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    avx512 = has.get("avx512_bf16", False)  # ARM has neither key
    amx = has.get("amx_tile", False) and sys.platform == "linux"  # on Windows it may crash (oneDNN #5689)
    return device.type == "cpu" and (amx or (avx512 and "Intel" not in processor()))


def processor() -> str:
    """The processor's name, as its maker gives it."""
    if platform.system() == "Darwin":
        return subprocess.getoutput("/usr/sbin/sysctl -n machdep.cpu.brand_string")
    with contextlib.suppress(OSError, IndexError):  # IndexError: an ARM processor has none there
        return re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0].strip()
    return platform.processor() or platform.machine()


def machine(runtime: Runtime) -> dict[str, str]:
    """What a checkpoint and a log say of the machine of a run: {"torch": version, "device": title}."""
    return {"torch": str(torch.__version__), "device": device_title(runtime)}


def device_title(runtime: Runtime) -> str:
    """The device in words."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    if runtime.device.type == "mps":
        return f"{processor()}, MPS"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def keep_freed_memory() -> None:
    """Reuse freed memory: Linux would zero its pages again, which takes a quarter of a student's time on a Xeon."""
    m_trim_threshold, m_mmap_threshold = -1, -3  # of glibc's malloc.h; mallopt(3) refuses the size before glibc 2.35
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and mallopt(m_mmap_threshold, 1 << 30):  # at 32 x 32 pixels no step needs larger blocks
        mallopt(m_trim_threshold, -1)  # keep all
