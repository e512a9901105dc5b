"""How a script ends: one line for a user's mistake or a stop, a traceback for a bug."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from runtime.errors import ReportedElsewhere, Stopped, UserError, exit_code, known_failure
from runtime.signals import StopSignal


def raising(error: Exception):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error, code, tells",
    [
        (UserError("one\n  line"), 2, "error: one line\n"),
        (Stopped(signal.SIGTERM), 143, "stopped; resume with `python train.py --kd True`\n"),
        (KeyboardInterrupt(), 130, "interrupted; a training resumes from its last save\n"),
        (ReportedElsewhere(143), 143, ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 2, "a smaller --batch_size"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "w/a.pt"), 2, "can't use w/a.pt: Permission denied; "),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"), 2, "--batch_size"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in config.cpp.cxx"), 2, "leave --compile out"),
    ],
)
def test_each_ending_has_its_exit_code_and_at_most_one_line(error, code, tells, capsys):
    assert exit_code(raising(error), "python train.py --kd True") == code
    told = capsys.readouterr().err
    assert tells in told and told.count("\n") == bool(tells)


def test_success_is_zero_and_a_bug_is_raised():
    assert exit_code(lambda: None) == 0
    for bug in (ValueError("x"), RuntimeError("x"), KeyError("x"), OSError(errno.ENOENT, "none", "file")):
        assert known_failure(bug) is None
        with pytest.raises(type(bug)):
            exit_code(raising(bug))


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_full_standard_output_is_known_buffered_or_not(buffering, monkeypatch):
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=buffering), write_through=not buffering)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(OSError) as error:
        print("a table", flush=True)
    assert "can't write to standard output: No space" in known_failure(error.value)
    assert known_failure(OSError(errno.EIO, "of another file", "file")) is None
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # has no file, as in a notebook
    assert known_failure(error.value) is None


def test_memory_that_really_runs_out_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert "not enough memory" in known_failure(error.value)


def test_a_compiler_that_is_really_missing_is_known(monkeypatch):
    from torch._inductor import cpp_builder, exc

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(exc.InvalidCxxCompiler) as error:
        getattr(cpp_builder.get_cpp_compiler, "__wrapped__", cpp_builder.get_cpp_compiler)()  # some versions cache it
    assert "--compile True needs a C++ compiler" in known_failure(error.value)


def test_a_second_signal_interrupts_at_once(capsys):
    def work():
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal had no effect")

    assert exit_code(work) == 130
    assert capsys.readouterr().err == "interrupted; a training resumes from its last save\n"


def test_under_torchrun_which_sends_each_signal_twice_the_second_is_ignored(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_an_interrupt_during_the_imports_is_one_line(script, tmp_path):
    # A module of this name before torch on the path interrupts whoever imports it.
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(9)\n")
    done = subprocess.run(
        [sys.executable, REPOSITORY / script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
