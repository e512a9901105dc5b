"""Files that are never half written: checkpoints, resume states and the run's log of JSON lines."""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy
import torch
import torchvision

from runtime import UserError

FORMAT = 1


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    modules = (torch, torchvision, numpy, matplotlib)
    return {module.__name__: str(module.__version__) for module in modules}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it, durably, if the block succeeds.

    Temporary, fsync, replace, fsync of the folder: at any moment `path` is the old file or the new one,
    whole. A full disk or a read-only folder is a UserError and leaves the old file.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        for stale in path.parent.glob(f"{path.name}.*.tmp"):  # of runs that were killed in mid-save
            pid = stale.name.split(".")[-2]
            if pid.isdecimal() and not process_lives(int(pid)):
                stale.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what it may write to
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's zip writer reports a failed write as a RuntimeError
        if isinstance(error, OSError) or "file write failed" in str(error) or "unexpected pos" in str(error):
            raise UserError(f"can't write {path}: {reason(error)}; what was there is unchanged") from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def reason(error: Exception) -> str:
    """Why a read or a write failed, in the system's words."""
    return getattr(error, "strerror", None) or "the disk is full or refuses writes"


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
    """Let the file at `path` stay as `<name>.previous` when it is replaced, on file systems that can."""
    previous = path.with_name(path.name + ".previous")
    with contextlib.suppress(OSError):
        if path.exists():
            previous.unlink(missing_ok=True)
            os.link(path, previous)


def save(path: Path, content: dict) -> None:
    """Write a dict of plain values and tensors to `path`, atomically and durably."""
    with writing(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load(path: Path, **expected) -> dict:
    """Read what `save` wrote, tensors on the CPU; no code in the file is ever run.

    UserError where the file is missing, damaged, of a newer format, or says of itself something else
    than `expected` (`role="teacher"`, `dataset="cifar10"`, ...).
    """
    wanted = "expected a checkpoint of this project" + "".join(f", {k} {v}" for k, v in expected.items())
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not check the CRCs
                raise zipfile.BadZipFile(f"{damaged} fails its check sum")
            if any(entry.external_attr for entry in archive.infolist()):  # what is called a folder, torch does not read
                raise zipfile.BadZipFile("an entry has attributes, which torch never writes")
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["format"]
        content["model"], content["options"]  # noqa: B018
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {reason(error)}") from error
    except Exception as error:  # what a damaged file leads to is anybody's guess
        raise UserError(f"{path} is damaged or no checkpoint; {wanted}") from error
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(f"{path} has format {found}, this version reads up to {FORMAT}: update the project")
    for key, value in expected.items():
        if content.get(key) != value:
            raise UserError(f"{path} holds {key} {content.get(key)}; {wanted}")
    return content


def load_weights(model: torch.nn.Module, content: dict, path: Path) -> torch.nn.Module:
    """Put a checkpoint's weights into `model`; UserError where they don't fit."""
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the model {type(model).__name__}: damaged or of another version"
        ) from error
    return model


def fingerprint(state: dict[str, torch.Tensor], *context) -> str:
    """A hash of weights, and of whatever else logits depend on, as 16 hexadecimal digits."""
    digest = hashlib.sha256(repr(context).encode())
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        except OSError:
            raise UserError(f"another run is writing {path}: wait for it, or stop it") from None
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)


class RunLog:
    """The run's JSON lines: a header, then one line an epoch, each on disk before the next step is taken.

    The run's resume state holds its `text`, too: whatever became of the file meanwhile, it is written anew.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, ""

    def begin(self, header: dict, keep_old: bool = True) -> None:
        """Start with the header line; an older log with epochs may be moved aside. UserError where that fails."""
        self.text = json.dumps(header) + "\n"
        with writing(self.path) as temporary:
            temporary.write_text(self.text)
            if keep_old and self.path.exists() and self.path.read_bytes().count(b"\n") > 1:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))

    def append(self, line: dict) -> None:
        """Add an epoch's line; UserError where that fails."""
        self.write(self.text + json.dumps(line) + "\n")

    def write(self, text: str) -> None:
        """Make `text` the whole log; UserError where that fails."""
        with writing(self.path) as temporary:
            temporary.write_text(text)
        self.text = text


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's header and its epochs; UserError where it is missing or not such a log."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return lines[0], lines[1:]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"can't read the log {path}: {reason(error) if isinstance(error, OSError) else 'damaged'}"
        ) from error
