"""How a script ends: one line for a user's mistake or a stop, a traceback for a bug."""

import ast
import errno
import importlib
import io
import os
import runpy
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
        (KeyboardInterrupt(), 130, "interrupted; rerun the command to resume training from its last save\n"),
        (ReportedElsewhere(143), 143, ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 2, "a smaller --batch_size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.04 GB)"), 2, "a smaller --batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), 2, "a smaller --batch_size"),
        (torch.AcceleratorError("CUDA error: no kernel image is available\nfor"), 2, "not support this GPU"),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), 2, "give another"),
        (RuntimeError("Distributed package doesn't have NCCL built in"), 2, "this PyTorch lacks NCCL"),
        (RuntimeError("torch.compile is not supported on Python 3.99+"), 2, "leave --compile out"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "w/a.pt"), 2, "can't use w/a.pt: Permission denied; "),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"), 2, "--batch_size"),
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


COMPILER = """#!/bin/sh
case "$*" in *--version*) exec g++ --version;; esac
echo "x.cpp:1:10: fatal error: Python.h: No such file" >&2; exit 1
"""


@pytest.mark.parametrize("broken", ["no compiler", "no headers", "no folder", "our own code"])
def test_a_compilation_that_really_fails_is_known_and_a_bug_in_a_model_is_none(broken, monkeypatch, tmp_path):
    compiler, shape = tmp_path / "g++", 2 if broken == "our own code" else 3
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    settings = {"cpp.cxx": ("no-such-compiler" if broken == "no compiler" else str(compiler),), "fx_graph_cache": False}
    folder = tmp_path / "file" if broken == "no folder" else tmp_path
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    tells = {"no compiler": "No working C", "no headers": "x.cpp:1:10: fatal error: Python.h: No such file;",
             "no folder": f"{folder}"}  # fmt: skip
    config = importlib.import_module("torch._inductor.config")
    with config.patch(settings), pytest.raises(Exception) as error:  # noqa: B017 - torch's own
        torch.compile(lambda x: (x @ torch.ones(shape, 3)).sin())(torch.ones(1, 3))
    torch._dynamo.reset()
    told = known_failure(error.value)
    if broken == "our own code":
        assert told is None
    else:
        assert told.startswith("--compile True failed: ") and told.endswith("; leave --compile out")
        assert tells[broken] in told and "\n" not in told


def test_a_second_signal_interrupts_at_once(capsys):
    def work():
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal had no effect")

    assert exit_code(work) == 130
    assert capsys.readouterr().err == "interrupted; rerun the command to resume training from its last save\n"


def test_under_torchrun_which_sends_each_signal_twice_the_second_is_ignored(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize("happens, code, tells", [
    ("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(9)\n", 130, "interrupted\n"),
    ("raise OSError(30, 'Read-only file system')", 2, "{script}: error: can't start: [Errno 30] Read-only file system; "
     "set TMPDIR to a folder that can be written to\n"),
    ("raise ImportError(\"No module named 'torch'\")", 2, "{script}: error: can't start: No module named 'torch'; "
     "install what it needs with `pip install -r requirements.txt`\n"),
])  # fmt: skip
def test_what_happens_during_the_imports_is_one_line(script, happens, code, tells, tmp_path):
    (tmp_path / "torch.py").write_text(happens)  # before torch on the path
    done = subprocess.run(
        [sys.executable, REPOSITORY / script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", tells.format(script=script))


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_an_old_python_is_one_line(script, monkeypatch, capsys):
    ast.parse((REPOSITORY / script).read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 20))
    monkeypatch.setitem(sys.modules, "config", None)  # can't be imported
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPOSITORY / script))
    assert capsys.readouterr() == ("", f"{script}: error: this needs Python 3.10 or later\n")
