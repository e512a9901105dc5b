"""How a script ends: a user's mistake in one line and exit code 2, a stop in one line, a bug with its traceback."""

import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

import torch


class UserError(Exception):
    """Something the user can mend; shown as one line, exit code 2."""


class Stopped(Exception):
    """The run was asked to stop by a signal; its number is the argument."""


class SaidElsewhere(Exception):
    """Another process has already shown the error that this one ends with; its exit code is the argument."""


def say(text: str) -> None:
    """Print a line on stderr, where there is one that takes it: how a script ends does not hang on that."""
    if sys.stderr:
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            drop(sys.stderr)


def complain(text: str) -> int:
    """Print a user's error as one line on stderr; its exit code."""
    say(f"{os.path.basename(sys.argv[0])}: error: {' '.join(text.split())}")
    return 2


def reason(error: Exception) -> str:
    """Why a read or a write failed, in the system's words."""
    return getattr(error, "strerror", None) or "the disk is full or refuses writes"


def exit_code(main: Callable[[], None], goes_on: str = "") -> int:
    """Call `main`: 0, or after one line on stderr 2 for a UserError and 128 + its number for a stop signal.

    `goes_on` is the command that goes on after a stop. Memory that is full counts as a UserError. A reader of stdout
    that has gone ends it as SIGPIPE would, without a word.
    """
    for stream in (sys.stdout, sys.stderr):  # None where it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± loses a sign, not the table
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except SaidElsewhere as error:
        return error.args[0]
    except UserError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        say("stopped at once; a training goes on from its last save")
        return 128 + signal.SIGINT
    except Stopped as stop:
        say(f"stopped; go on with `{goes_on}`")
        return 128 + stop.args[0]
    except BrokenPipeError:  # the reader of stdout, perhaps `head`, wants no more
        drop(sys.stdout)
        return 128 + 13  # SIGPIPE, a name that Windows lacks
    except Exception as error:
        known = known_failure(error)
        if known is None:
            raise
        return complain(known)
    return 0


def known_failure(error: Exception) -> str | None:
    """What to say of an error of the machine's that the user can do something about; None for a bug."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return "not enough memory: give train.py a smaller --batch_size, or --device cpu where another one is full"
    if "C++ compiler" in text or "InvalidCxxCompiler" in text:
        return "--compile True needs a C++ compiler, and none was found: install one (g++), or leave --compile out"
    if isinstance(error, PermissionError) and error.filename:
        return f"can't use {error.filename}: {reason(error)}; give another path"
    if isinstance(error, OSError) and error.filename is None and refuses(sys.stdout):
        drop(sys.stdout)
        return f"can't write to standard output: {reason(error)}; what was saved before is whole"
    return None


def refuses(stream: TextIO | None) -> bool:
    """Whether a stream takes no more; one that does gets a line end."""
    try:
        if stream:
            os.write(stream.fileno(), b"\n")
    except ValueError:  # it is no file's
        return False
    except OSError:
        return True
    return False


def drop(stream: TextIO) -> None:
    """Let the interpreter's last flush of what could not be printed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
