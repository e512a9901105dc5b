"""One process, or several under torchrun: how they begin and end. The caller's settings of torch are restored."""

import contextlib
import os
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.device import Runtime, has_fast_bf16, keep_freed_memory, pick_device
from runtime.errors import Stopped, UserError

LONGEST_WAIT = timedelta(days=1)  # while the first process downloads or reads pictures
# Operators with fp32_precision, torch's newer switch for TF32: always set to "ieee" here.
FLOAT32_OPERATORS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
FLOAT32_OPERATORS += (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)


def change_settings(stack: contextlib.ExitStack, deterministic: bool) -> None:
    """Set torch's global settings until `stack` is left; the caller's would change the results, or fail."""
    cudnn, device = torch.backends.cudnn, torch.get_default_device()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    stack.callback(torch.set_default_device, None if device.type == "cpu" else device)
    stack.callback(torch.use_deterministic_algorithms, algorithms[0], warn_only=algorithms[1])
    changed = [(cudnn, "benchmark"), (cudnn, "deterministic"), (torch.utils.deterministic, "fill_uninitialized_memory")]
    for owner, name in changed:
        stack.callback(setattr, owner, name, getattr(owner, name))
    for operator in FLOAT32_OPERATORS:
        stack.callback(setattr, operator, "fp32_precision", operator.fp32_precision)
    # torch.compile reads torch's older interface, which fails where the caller has used the newer one.
    with contextlib.suppress(RuntimeError):
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    with contextlib.suppress(RuntimeError):
        stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling is slow, and changes no result here
    if deterministic:
        name = "CUBLAS_WORKSPACE_CONFIG"
        before = {name: os.environ[name]} if name in os.environ else {}
        stack.callback(os.environ.update, before)  # after the next line's
        stack.callback(os.environ.pop, name, None)
        os.environ[name] = ":4096:8"
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    cudnn.allow_tf32 = False
    for operator in FLOAT32_OPERATORS:
        operator.fp32_precision = "ieee"
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())


def pick_precision(word: str, device: torch.device) -> str:
    """The precision of a --precision word on a device; UserError if the device lacks it."""
    if word == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a CUDA device: leave it out")
    if word != "auto":
        return word
    return "bf16" if has_fast_bf16(device) else "fp32"


@contextlib.contextmanager
def start(device_name: str, precision: str, deterministic: bool = False):
    """Yield the Runtime of this process; under torchrun it joins and leaves the process group."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    with contextlib.ExitStack() as stack:
        change_settings(stack, deterministic)
        device = pick_device(device_name)
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        runtime = Runtime(device, pick_precision(precision, device))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if device.type == "cpu":
            keep_freed_memory()
        if world_size > 1:
            runtime = stack.enter_context(process_group(runtime, world_size))
        yield runtime


@contextlib.contextmanager
def process_group(runtime: Runtime, world_size: int):
    """Yield the Runtime of this process among `world_size` ones."""
    try:
        store, rank, _ = next(dist.rendezvous("env://"))
        store.set_timeout(LONGEST_WAIT)
    except (ValueError, dist.DistError) as error:  # a variable of torchrun is missing or wrong, or no process comes
        why = str(error).splitlines()[0]
        raise UserError(f"WORLD_SIZE is {world_size}, but {why}: start with torchrun, or unset WORLD_SIZE") from error
    backend = "cpu:gloo,cuda:nccl" if runtime.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, timeout=LONGEST_WAIT, rank=rank, world_size=world_size)
        yield replace(runtime, rank=rank, world_size=world_size)
    except Exception as error:
        # Others may fail, too, by the same error or by losing a failed peer: the first one here reports it.
        lost_peer = isinstance(error, RuntimeError) and "gloo" in str(error)
        own_errors = 0 if lost_peer else 1
        if store.add("failed", own_errors) > own_errors:  # another process has an error of its own, and reports it
            raise SystemExit(128 + error.args[0] if isinstance(error, Stopped) else 2) from error
        raise
    else:  # after an error in one process, NCCL would wait for the others here
        dist.destroy_process_group()
