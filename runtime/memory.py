"""What a process takes of the machine's memory, and what it gives back."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, for mallopt(3)
GIBIBYTE = 1 << 30


def limit_memory() -> None:
    """Let Linux refuse memory that the machine has not: an error, where it would kill the process without a word."""
    if sys.platform != "linux":
        return
    import resource  # which Windows has not

    try:
        free = kilobytes("/proc/meminfo", "MemAvailable") + kilobytes("/proc/meminfo", "SwapFree")
        there = 1024 * (free + kilobytes("/proc/self/status", "VmData"))
    except (OSError, StopIteration):  # a sandbox without these tables
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or there < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (there, hard))


def kilobytes(path: str, name: str) -> int:
    """A number of one of Linux's tables; StopIteration where it has none of that name."""
    with open(path) as table:
        return next(int(line.split()[1]) for line in table if line.startswith(f"{name}:"))


def keep_freed_memory() -> None:
    """Let the process reuse the memory that it frees, where malloc would give large blocks back to Linux at once.

    Each training step asks for the same blocks again; from Linux they come page by page, every page zeroed, which
    takes a quarter of a student's time on a CPU (docs/speed.md). Needs glibc 2.35 or later, else nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and mallopt(M_MMAP_THRESHOLD, GIBIBYTE):  # a larger block is a data set, and no step's
        mallopt(M_TRIM_THRESHOLD, -1)  # keep all
