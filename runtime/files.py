"""Files that are never half written, caches of arrays, and locks."""

import contextlib
import errno
import json
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from runtime.errors import UserError, reason

# What reading a damaged or foreign .npz, .pt or picture raises, in zipfile, numpy, torch and Pillow.
UNREADABLE = (OSError, ValueError, LookupError, ArithmeticError, EOFError, TypeError, AttributeError, RuntimeError)
UNREADABLE += (SyntaxError, zipfile.BadZipFile, zlib.error, struct.error)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path`, whole, if the block succeeds; UserError leaves the old file."""
    target = Path(os.path.realpath(path))  # of a link, the file it leads to
    make_folder(path.parent)
    temporary = target.parent / f".{os.urandom(8).hex()}.tmp"
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what it may write to
            os.fsync(file.fileno())
        retry(os.replace, temporary, target)
    except OSError as error:
        raise UserError(f"can't write {path}: {reason(error)}; the old file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def retry(action: Callable, *paths: Path) -> None:
    """Replace or remove a file, tried again for ten seconds: on Windows a virus scanner or OneDrive may hold it."""
    for pause in (0.1, 0.4, 1.5, 3, 5):
        with contextlib.suppress(PermissionError):
            return action(*paths)
        time.sleep(pause)
    action(*paths)


def remove(path: Path) -> None:
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError):
        retry(os.remove, path)


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to; UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't use {folder} as a folder: {reason(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"can't write into {folder}: permission denied; give another folder")


def write_json(path: Path, content: dict) -> Path:
    """Write plain values to `path` as JSON, atomically; return the path."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def check_archive(path: Path) -> None:
    """BadZipFile if a checksum is wrong, OSError; torch verifies none, NumPy only those of data it reads to the end."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile


def save_arrays(path: Path, key: str, **arrays: np.ndarray) -> None:
    """Write arrays and the key of all that they depend on, atomically and with checksums; UserError if that fails."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, key=np.array(key))


def load_arrays(path: Path, key: str) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote with this key; ValueError with the reason if missing, damaged or of another key."""
    try:
        check_archive(path)
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files if name != "key"}
    except UNREADABLE as error:
        raise ValueError(getattr(error, "strerror", None) or "it is damaged") from error
    raise ValueError("it has another key")


def take_lock(file: IO) -> None:
    """Lock an open file; OSError if another process has, or if it can't be locked."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, one run at a time; the system releases it however its holder ends."""
    make_folder(path.parent)
    lock_path = path.with_name(f"{path.name}.lock")
    with open(lock_path, "a") as file:
        try:
            take_lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                raise UserError(f"another run is writing {path}: wait for it, or stop it") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows and some shared folders refuse to remove an open file
                lock_path.unlink()
