"""The teacher's logits, paid for once: a file that remembers them for each (image, view).

The teacher is in evaluation mode, so its logits for a view never change. The file's name is a fingerprint
of all they depend on (weights, data, padding, normalisation, precision, torch, device) and of the views that there is
a place for: another teacher never reads it.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch

from runtime.device import Runtime
from runtime.errors import UserError, reason
from runtime.files import make_folder
from utils import Views

# A record's last word is the XOR of its logits' bits with this: zeros, or a record torn by a crash or by
# two writers, do not fit their seal and count as not filled.
SEAL = np.uint16(0xA5C3)
WORTH_SAYING = 10**9  # bytes
SIZES = (2, 8, 32)  # what a batch lacks is padded to one of these or to a multiple of the last: few kernels to tune


class TeacherCache:
    """Logits (N, K, C) of the K views of each image in half precision, filled as views are first seen.

    Processes share them through a file.
    """

    def __init__(self, path: Path | None, teacher: torch.nn.Module, views: Views, num_classes: int, runtime: Runtime):
        """`path` None keeps nothing; where the file can't be made, neither, it says so, and the logits are the same."""
        self.teacher, self.views, self.runtime, self.num_classes = teacher, views, runtime, num_classes
        self.hits = self.misses = 0
        self.records, self.rounds = None, path is not None
        if path is not None:
            shape = (len(views), views.per_image, num_classes + 1)
            size = 2 * math.prod(shape)
            if size > WORTH_SAYING and not path.exists():
                runtime.print(f"teacher cache: {path} takes {size / 1e9:.1f} GB; a smaller --views makes it smaller")
            try:
                self.records = open_records(path, shape)
            except (UserError, OSError) as error:
                runtime.print(f"teacher cache: {error}; going on without it")

    def logits(self, rows: torch.Tensor, views: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (B, C), float32 on the device, of image rows (B,) seen in views (B,), on the CPU."""
        if self.records is None:
            self.misses += len(rows)
            logits = self.compute(images)
            return logits.half().float() if self.rounds else logits
        rows, columns = rows.numpy(), self.views.columns(rows, views).numpy()
        records = self.records[rows, columns]
        missing = np.flatnonzero(seal(records[:, :-1]) != records[:, -1])
        self.misses += len(missing)
        self.hits += len(rows) - len(missing)
        if len(missing):
            few = torch.from_numpy(missing).to(images.device)
            fresh = self.compute(images) if len(missing) == len(rows) else self.compute_padded(images[few])
            fresh = fresh.half().cpu().numpy().view(np.uint16)
            records[missing] = np.concatenate((fresh, seal(fresh)[:, None]), axis=1)
            self.records[rows[missing], columns[missing]] = records[missing]
        # What was just computed is rounded like what is read back: a run is the same whatever was cached.
        halves = torch.from_numpy(np.ascontiguousarray(records[:, :-1]).view(np.float16))
        device = self.runtime.device
        return halves.to(device, non_blocking=device.type == "cuda").float()

    def compute(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (B, C), float32, of images (B, 3, 32, 32)."""
        with torch.inference_mode(), self.runtime.autocast():
            return self.teacher(images).float()

    def compute_padded(self, images: torch.Tensor) -> torch.Tensor:
        """As `compute`, in a batch of a size of SIZES, or a multiple of the last."""
        count = len(images)
        size = next((size for size in SIZES if count <= size), -(-count // SIZES[-1]) * SIZES[-1])
        if count < size:
            images = torch.cat((images, images[:1].expand(size - count, -1, -1, -1)))
            images = images.contiguous(memory_format=torch.channels_last)
        return self.compute(images)[:count]

    def hit_rate(self) -> float:
        """The fraction of logits since the last call that needed no forward pass."""
        hits, misses = self.runtime.total(torch.tensor([self.hits, self.misses])).tolist()
        self.hits = self.misses = 0
        return hits / max(hits + misses, 1)


def seal(logits: np.ndarray) -> np.ndarray:
    """The word (B,) that goes with half-precision logits (B, C) given as uint16."""
    return np.bitwise_xor.reduce(logits, axis=1) ^ SEAL


def open_records(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Map the file of records, made whole first: a full disk shows here, not as a crash in mid-run."""
    size = 2 * math.prod(shape)
    make_folder(path.parent)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")
    try:
        # Zeros are appended and the file never replaced: of processes that make it at once, all map the same one.
        with open(path, "ab", buffering=0) as file:
            while (missing := size - os.fstat(file.fileno()).st_size) > 0:
                file.write(bytes(min(missing, 1 << 20)))
        return np.memmap(path, dtype=np.uint16, mode="r+", shape=shape)
    except OSError as error:
        if path.exists() and path.stat().st_size < size:
            path.unlink()
        raise UserError(f"can't write {path}: {reason(error)}") from error
