"""How a script ends: one line for a user's mistake or a stop, a traceback for a bug."""

import ast
import errno
import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import REPOSITORY

from runtime.errors import Stopped, StopSignal, UserError, exit_code, known_failure


@pytest.mark.parametrize(
    "error, code, tells",
    [
        (UserError("one\n  line"), 2, "error: one line\n"),
        (Stopped(signal.SIGTERM), 143, "stopped; rerun the command to resume (without --resume False)\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the command (train.py resumes from its last save)\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 2, "a smaller --batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), 2, "a smaller --batch_size"),
        (torch.AcceleratorError("CUDA error: no kernel image is available\nfor"), 2, "not support this GPU"),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), 2, "give another"),
        (RuntimeError("Distributed package doesn't have NCCL built in"), 2, "this PyTorch lacks NCCL"),
        (RuntimeError("torch.compile is not supported on Python 3.99+"), 2, "leave --compile out"),
        (RuntimeError("Expected to have finished reduction in the prior iteration before"), 2, "gets no gradient"),
        (RuntimeError("x_cuda does not have a deterministic implementation, but you"), 2, "leave --deterministic out"),
        (RuntimeError("Deterministic behavior [...] set CUBLAS_WORKSPACE_CONFIG=:4096:8"), 2, "restart the notebook"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "w/a.pt"), 2, "can't use w/a.pt: Permission denied; "),
    ],
)
def test_each_ending_has_its_exit_code_and_at_most_one_line(error, code, tells, capsys):
    assert exit_code(Mock(side_effect=error)) == code
    told = capsys.readouterr().err
    assert tells in told and told.count("\n") == bool(tells)


def test_success_is_zero_and_a_bug_is_raised(capsys):  # with a stdout that has no file, as in a notebook
    assert exit_code(lambda: None) == 0
    missing, unknown = OSError(errno.ENOENT, "none", "file"), OSError(errno.EIO, "not of stdout")
    for bug in (ValueError("x"), RuntimeError("x"), KeyError("x"), missing, unknown):
        assert known_failure(bug) is None
        with pytest.raises(type(bug)):
            exit_code(Mock(side_effect=bug))


def test_memory_that_really_runs_out_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert "not enough memory" in known_failure(error.value)


COMPILER = """#!/bin/sh
case "$*" in *--version*) exec g++ --version;; esac
echo "x.cpp:1:10: fatal error: Python.h: No such file" >&2; exit 1
"""


@pytest.mark.parametrize(
    "compiler, size, tells",
    [
        ("no-such-compiler", 3, "No working C"),
        ("", 3, "x.cpp:1:10: fatal error: Python.h: No such file"),
        ("", 2, None),  # a bug in a model
    ],
)
def test_a_compilation_that_fails_is_known_and_a_bug_in_a_model_is_none(compiler, size, tells, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    without_headers = tmp_path / "g++"
    without_headers.write_text(COMPILER)
    without_headers.chmod(0o755)
    settings = {"cpp.cxx": (compiler or str(without_headers),), "fx_graph_cache": False}
    config = importlib.import_module("torch._inductor.config")
    with config.patch(settings), pytest.raises(Exception) as error:  # noqa: B017 - torch's own
        torch.compile(lambda x: (x @ torch.ones(size, 3)).sin())(torch.ones(1, 3))
    torch._dynamo.reset()
    told = known_failure(error.value)
    one_line = f"--compile True failed: .*{tells}.*; leave --compile out"
    assert re.fullmatch(one_line, told) if tells else told is None


def test_a_second_signal_interrupts_at_once_but_not_under_torchrun_which_sends_each_twice(monkeypatch):
    def work():
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.number == signal.SIGINT
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert exit_code(work) == 130 and signal.getsignal(signal.SIGINT) == before
    monkeypatch.setenv("LOCAL_RANK", "0")
    with StopSignal() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM


INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(9)\n"


@pytest.mark.parametrize(
    "happens, code, tells",
    [
        (INTERRUPT, 130, "interrupted\n"),
        ("raise OSError(30, 'Read-only')", 2, "train.py: error: can't start: [Errno 30] Read-only; set TMPDIR to a "),
        ("raise ImportError('No torch')", 2, "train.py: error: can't start: No torch; install the packages with `pip "),
    ],
)
def test_what_happens_during_the_imports_is_one_line(happens, code, tells, tmp_path):
    (tmp_path / "torch.py").write_text(happens)  # before torch on the path
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, REPOSITORY / "train.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(tells)


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_an_old_python_is_one_line(script, monkeypatch, capsys):
    ast.parse((REPOSITORY / script).read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 20))
    monkeypatch.setitem(sys.modules, "config", None)  # can't be imported
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPOSITORY / script))
    assert capsys.readouterr() == ("", f"{script}: error: this needs Python 3.10 or later\n")
