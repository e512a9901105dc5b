"""Whether a data set's images fit into memory, asked before they are read."""

import os
import re
from contextlib import suppress
from pathlib import Path

from data_sets import padding
from runtime.errors import UserError

WORTH_TELLING = 1e9  # bytes


def check_memory(images: int, size: int) -> None:
    """Print what so many images need, as they are and padded, if that is above 1 GB; UserError if it isn't there."""
    needed = 3 * images * (size**2 + (size + 2 * padding(size)) ** 2)
    available = available_memory()
    words = f"{images:,} images of {size} x {size} pixels need {needed / 1e9:.1f} GB of memory"
    if available is not None and needed > available:
        raise UserError(f"{words}, and {available / 1e9:.1f} GB are free: give a smaller --size, or fewer images")
    if needed > WORTH_TELLING and os.environ.get("RANK", "0") == "0":  # of several processes the first
        print(words, flush=True)


def available_memory() -> int | None:
    """Bytes that Linux can give away; None on other systems."""
    with suppress(OSError):
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024 * int(found[1]) if found else None
    return None
