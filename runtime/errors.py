"""How a script ends: one line and exit code 2 for a user's mistake, one line for a stop, a traceback for a bug."""

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

MEMORY = "not enough memory: give train.py a smaller --batch_size (the teacher: with --tto True, not --all), a smaller "
MEMORY += "--size if the images alone do not fit (docs/own.md), or --device cpu if another device is full"
FAILURES = {  # our message for a failure of the machine, by a part of torch's message
    "DefaultCPUAllocator": MEMORY,
    "out of memory": MEMORY,  # of CUDA, MPS
    "STATUS_ALLOC_FAILED": MEMORY,  # of cuBLAS
    "CUBLAS_STATUS_NOT_INITIALIZED": MEMORY,  # no memory for its handle
    "DEVICE_ALLOCATION_FAILED": MEMORY,  # of cuDNN
    "no kernel image is available": "this PyTorch does not support this GPU: install another, or use --device cpu",
    "NVIDIA driver on your system is too old": "the NVIDIA driver is too old for this PyTorch: update one of them",
    "busy or unavailable": "another program has reserved the GPU: wait for it, or give another --device",
    "NCCL built in": "this PyTorch lacks NCCL, which several GPUs need: train on one without torchrun",
    "CUBLAS_WORKSPACE_CONFIG": "--deterministic True needs a new process: restart the notebook's kernel",
    "does not have a deterministic implementation": "leave --deterministic out: the --student can't use it",
    "finished reduction in the prior iteration": "a weight of the --student gets no gradient: freeze or remove it",
    "torch.compile is not supported": "torch.compile does not work with this Python: leave --compile out",
}


class UserError(Exception):
    """Something the user can fix; shown as one line, exit code 2."""


class Stopped(Exception):
    """A signal asked the run to stop; the argument is the signal's number."""


class StopSignal:
    """Notes SIGINT and SIGTERM in `number` (0: none came); the end of the block raises Stopped. Main thread only."""

    number = 0  # noted when it comes, acted on between two steps

    def __enter__(self) -> "StopSignal":
        caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, exception_type, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.number and exception_type is None:
            raise Stopped(self.number)

    def _note(self, number, frame) -> None:
        if self.number and "LOCAL_RANK" not in os.environ:  # torchrun passes on each signal twice
            raise KeyboardInterrupt  # asked again: stop now, not after this step
        self.number = number


def report(text: str) -> int:
    """Print a user's error as one line on stderr; return its exit code."""
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def reason(error: Exception) -> str:
    """Why a read or a write failed, in the system's words."""
    return getattr(error, "strerror", None) or "the disk is full or refuses writes"


def exit_code(main: Callable[[], None]) -> int:
    """Call `main`; return 0, or with one line on stderr 2 for what a user can fix and 128 + N for signal N."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        return report(str(error))
    except SystemExit as ended:  # another process reports the error
        return ended.code
    except KeyboardInterrupt:
        print("interrupted; rerun the command (train.py resumes unless --resume False is given)", file=sys.stderr)
        return 128 + signal.SIGINT
    except Stopped as stop:
        print("stopped; rerun the command, without --resume False, to resume", file=sys.stderr)
        return 128 + stop.args[0]
    except BrokenPipeError:  # the reader of stdout, perhaps `head`, wants no more
        discard_output()
        return 128 + 13  # SIGPIPE, a name that Windows lacks
    except Exception as error:
        if known := known_failure(error):
            return report(known)
        if not is_one_of_several():
            raise
        traceback.print_exc()  # `leave` ends one of several processes without a traceback
        return 1
    return 0


def is_one_of_several() -> bool:
    """Whether this is one of several processes, as torchrun starts them."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1"


def leave(code: int) -> None:
    """End the process with an exit code; after Ctrl-C by the signal itself, which ends a loop in a shell, too."""
    if code == 128 + signal.SIGINT and os.name == "posix" and "IPython" not in sys.modules:
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if code and is_one_of_several():  # the end of NCCL in one process would wait for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def known_failure(error: Exception) -> str | None:
    """The message for a machine failure that the user can fix; None for a bug."""
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, RuntimeError):
        for text, advice in FAILURES.items():
            if text in str(error):
                return advice
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(name.startswith("torch._inductor") for name in modules):  # not torch._dynamo, which runs the model's code
        lines = str(error).splitlines() or [type(error).__name__]
        cause = next((line for line in lines if "error: " in line), lines[0])  # the compiler's first error
        return f"--compile True failed: {cause}; leave --compile out"
    full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
    if isinstance(error, OSError) and error.filename and error.errno not in (None, errno.ENOENT):
        return f"can't use {error.filename}: {reason(error)}; give another path"
    if isinstance(error, OSError) and error.filename is None and error.errno in full:
        discard_output()
        return f"can't write to standard output: {reason(error)}; all files saved so far are complete"
    return None


def discard_output() -> None:
    """Point stdout at the null device, for the interpreter's last flush."""
    with contextlib.suppress(OSError):  # a notebook's stream has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
