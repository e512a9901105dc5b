"""Files that are never half written, and locks on them."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError, reason


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it, durably, if the block succeeds.

    Temporary, fsync, replace, fsync of the folder: at any moment `path` is the old file or the new one,
    whole; where `path` is a link, the file it leads to. A full disk or a read-only folder is a UserError and
    leaves the old file.
    """
    given, path = path, Path(os.path.realpath(path))
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        for stale in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # of runs that were killed in mid-save
            pid = stale.name.split(".")[-2]
            if pid.isdecimal() and not process_lives(int(pid)):
                stale.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what it may write to
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"can't write {given}: {reason(error)}; what was there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def process_lives(pid: int) -> bool:
    """Whether a process of this machine has this number; on Windows, where asking would be a signal, True."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to; UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't use {folder} as a folder: {reason(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"can't write into {folder}: permission denied; give another folder")


def keep_previous(path: Path) -> None:
    """Let the file at `path` stay as `<name>.previous` when it is replaced; UserError where no copy can be written."""
    previous = path.with_name(path.name + ".previous")
    if not path.exists():
        return
    try:
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    except OSError:  # on a file system without links
        with writing(previous) as temporary:
            shutil.copyfile(path, temporary)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`'s lock, one run at a time; the system releases it however its holder ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    make_folder(path.parent)
    lock_path = path.with_name(f"{path.name}.lock")
    try:
        file = open(lock_path, "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"can't write into {path.parent}: {reason(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                raise BlockingIOError  # its holder has just ended and removed the name that was opened here
        except (BlockingIOError, FileNotFoundError):
            raise UserError(f"another run is writing {path}: wait for it, or stop it") from None
        except OSError:
            pass  # a file system that has no locks, as Windows has none
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)
