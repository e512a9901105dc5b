"""What a user, a disk, a network or a library gets wrong: exit code 2, one line on stderr, and every file as it was."""

import ast
import errno
import importlib
import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
from functools import partial
from http.client import HTTPException
from unittest.mock import Mock
from urllib.error import HTTPError

import pytest
import torch
import torchvision
from conftest import REPOSITORY, assert_one_line, run_together, snapshot
from made_up import CPU, damaged, hostile

import config
import test as test_script
import train
from runtime.errors import Stopped, StopSignal, UserError, exit_code, known_failure
from utils import load_images


def each(command: str, *options: str, tells: str = "") -> list:
    """The command with each of several options, and what the line tells: the option's name, then `tells`."""
    return [(f"{command} --{option}", f"--{option.split()[0]}{tells}") for option in options]


NEED_KD, NEED_ALL, CLASH = " requires --kd True or --all True", " requires --all True", " can't be combined"
WRONG_OPTIONS = [
    # What can't be combined, or lacks what it needs.
    *each("train.py --tto True", "kd True", "all True", "student a:b", "omit 3", "student_images 40", tells=CLASH),
    *each("train.py --kd True", "all True", tells=CLASH),
    *each("train.py", "temp 5", "alpha 0.5", "loss ls", "kd_weight 9", "ce_weight 1", "teacher t.pt", tells=NEED_KD),
    *each("train.py --kd False", "temp 5", tells=NEED_KD),
    *each("train.py --kd True", "seeds 2", "matched True", tells=NEED_ALL),
    *each("train.py --kd True --alpha 0", "kd_weight 2", "ce_weight 2", tells=CLASH),
    *each("test.py --tto True", "temp 20", "loss ls", tells=" requires --kd True"),
    *each("test.py --checkpoint my.pt", "tto True", "kd True", "temp 5", "loss ls", "seed 7", "dataset digits",
          "size 64", "subset 40", "holdout 8", "compare True", "name a05", "omit 3", "student_images 40", tells=CLASH),
    *each("test.py --compare True", "tto True", "kd True", "temp 5", "loss ls", "seed 7", "image cat.png", "soften 5",
          "json r.json", "export s.pt2", "omit 3", "student_images 40", "teacher t.pt", tells=CLASH),
    *each("test.py --image cat.png", "subset 40", "holdout 8", "json r.json", "export s.pt2", "data_path d",
          "skip_broken", tells=CLASH),
    *each("test.py --soften 1 5", "json r.json", "export s.pt2", tells=CLASH),
    *each("test.py --export s.pt2", "json r.json", tells=CLASH),
    ("test.py --soften 5 --teacher my.pt", "--soften and --export use one model: leave --teacher out"),
    ("test.py --export t.pt2 --teacher my.pt", "--soften and --export use one model: leave --teacher out"),
    ("test.py --tto True --teacher my.pt --seed 7", "--teacher names the teacher to evaluate: leave --seed out"),
    *[(f"{script} --skip_broken", "--skip_broken requires --dataset folder") for script in ("train.py", "test.py")],
    # The student's images.
    ("train.py --omit kat", "--omit: no class 'kat': give a name such as airplane, automobile, "),
    ("test.py --dataset digits --omit 10", "--omit: no class '10': give a name such as 0, 1, 2"),
    ("train.py --dataset digits --omit 0 1 2 3 4 5 6 7 8 9", "--omit names all classes"),
    ("train.py --student_images 40 50", "--student_images takes one value without --all True, not 2"),
    # Losses and their weights.
    ("train.py --kd True --temp 5 20", "--temp takes one value without --all True, not 2"),
    ("train.py --all True --loss ls dkd ls", "--loss contains a value twice"),
    *[(f"train.py --all True --loss ls dkd --{weight}", "--kd_weight and --ce_weight need a single --loss") for weight
      in ("kd_weight 9", "ce_weight 1")],
    ("train.py --all True --loss kd ls --alpha 0.5", "--alpha is for --loss kd"),
    ("train.py --kd True --loss dkd --kd_weight 9", "--kd_weight: dkd has 2 terms, not 1"),
    ("train.py --kd True --loss dkd --kd_weight 0 0 --ce_weight 0", "--kd_weight and --ce_weight are all 0"),
    *[(f"train.py --all True --matched True{loss}", "--matched requires a --loss other than kd") for loss in (
        "", " --loss kd kd_as_ls")],
    *each("train.py --all True --loss ls --matched True", "kd_weight 9", "ce_weight 1", tells=CLASH),
    # Values.
    *each("train.py --kd True", "temp 0", "temp nan", "temp inf", "temp abc", "temp 1001", "temp ''", "alpha 2",
          "alpha -0.1", "kd_weight -1", "ce_weight -1", "loss KD"),
    *each("train.py", "num_epochs 0", "num_epochs 2.5", f"num_epochs 1{400 * '0'}", "num_epochs 2147483648",
          "num_epochs", "batch_size 0", "lr 0", "head_lr 0", "norm_lr 0", "subset 0", "student_images 0", "views 0",
          "weight_decay -1", "holdout -1", "seed -1", "dataset other", "device other", "precision other",
          "resume other", "optimizer other", "epochs other", "seeds 0", "weights_path ''", "name ''", "name ..",
          "name a/b", "name 'a b'"),
    *each("test.py", "soften 0", "image ''", "checkpoint .", "json ..", "json weights/student.pt", "export model.onnx"),
    ("train.py --all True --resume False", "--all True trains unfinished runs only: give another --name"),
    ("train.py --dataset digits --views 82", "--views: an image of digits has 81 views: give at most"),
    ("train.py --flip False --views 82", "an image of cifar10 has 81 views: give"),
    ("train.py --size 64 --dataset digits --views 290", "an image of digits has 289 views: give"),
    ("train.py --size 48 --dataset digits", "--size: invalid choice: 48"),
    ("train.py --size 64", "--size: the images of cifar10 have 32 x 32 pixels: leave it out"),
    ("train.py --student resnet8", "--student: expected MODULE:FUNCTION, as in my_models:resnet8, not 'resnet8'"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "tells"), WRONG_OPTIONS)
def test_a_wrong_option_is_one_line(command, tells, capsys):
    name, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        (config.parse_train if name == "train.py" else config.parse_test)(arguments)
    out, err = capsys.readouterr()
    assert_one_line(ended.value.code, err, tells)
    assert not out


QUICK = "--dataset digits --subset 40 --batch_size 8 --num_epochs 1 --device cpu --precision fp32 --data_path {digits}"
TRAIN, KD, STEM = f"train.py {QUICK}", f"train.py {QUICK} --kd True", "digits_student_subset40"
NO_CIFAR10 = "no complete CIFAR10 in data, and the download from https://www.cs.toronto.edu/.* failed: "
# A command, a pattern that its error line must match, and what is done to its folder before.
WRONG_INPUTS = {
    "device for --sync_bn": (f"{TRAIN} --sync_bn True", "--sync_bn True needs CUDA devices: leave it out"),
    "plots is a file": (f"{TRAIN} --resume False", "can't use plots as a folder: ", lambda at: (at / "plots").touch(),
                        lambda at: damaged(at / f"weights/{STEM}.last.pt")),
    "a damaged teacher": (KD, "teacher_subset40.pt is damaged.*: train it again",
                          lambda at: damaged(at / "weights/digits_teacher_subset40.pt")),
    "plots of a test": ("test.py", "can't use plots as a folder: ", lambda at: (at / "plots").touch()),
    "no teacher": (f"{KD} --holdout 8 --weights_path w --seed 7 --flip True",
                   "no teacher w/digits_teacher_subset40_holdout8.pt: train one with `python train.py --tto True "
                   "--dataset digits --subset 40 --holdout 8 --data_path .* --weights_path w --flip True`"),
    "no teacher, no data": ("train.py --kd True", "no teacher weights/teacher.pt: train one with `python train.py --"),
    "a damaged finished run": (TRAIN, f"{STEM}.pt is damaged", lambda at: damaged(at / f"weights/{STEM}.pt")),
    "a damaged resume state": (TRAIN, "last.pt is damaged", lambda at: damaged(at / f"weights/{STEM}.last.pt")),
    "never trained": ("test.py --weights_path w",
                      "no checkpoint w/student.pt: train it with `python train.py --weights_path w`, or name its"),
    "data is a file": ("train.py", f"{NO_CIFAR10}can't use data as a folder: ", lambda at: (at / "data").touch()),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_a_wrong_input_is_one_line_and_harms_nothing(name, digits, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    command, tells, *prepare = WRONG_INPUTS[name]
    for change in prepare:
        change(tmp_path)
    (tmp_path / "student.pt").write_bytes(b"a bystander")
    script, *words = argv = shlex.split(command.replace("{digits}", shlex.quote(str(digits))))
    monkeypatch.setattr(sys, "argv", argv)  # its name begins the line
    before = snapshot(tmp_path)
    assert_one_line(2, output_of(train.main if script == "train.py" else test_script.main, words, 2), tells)
    assert snapshot(tmp_path) == before, "a file was changed, removed or left behind"


@pytest.mark.parametrize(
    "error, tells",
    [
        (HTTPException("cut"), "no complete CIFAR10 in .* failed: cut; rerun"),
        (EOFError(), "no complete CIFAR10 in .* failed: EOFError; rerun"),
        (ImportError("No module named 'scipy'"), "CIFAR10 needs another package: No module named 'scipy'"),
    ],
)
def test_data_that_cannot_be_read_or_downloaded_are_one_line(error, tells, tmp_path, monkeypatch):
    def fail(root, train, download):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(UserError, match=tells):
        load_images("cifar10", tmp_path, CPU)


def test_code_in_a_checkpoint_never_runs_in_a_process_that_a_user_starts(tmp_path):
    (tmp_path / "weights").mkdir()
    hostile(tmp_path / "weights" / "teacher.pt")
    notebook = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as one sets it for its shell
    command = [sys.executable, REPOSITORY / "test.py", "--tto"]
    done = subprocess.run(command, cwd=tmp_path, env=notebook, capture_output=True, text=True, timeout=300)
    assert_one_line(done.returncode, done.stderr, "weights/teacher.pt holds Python objects")
    assert not (tmp_path / "hacked").exists()


def test_a_full_disk_leaves_all_files_as_they_were(learn, tmp_path, digits):
    again = ["--lr=0.2", "--resume=False"]
    words = [*shlex.split(QUICK.format(digits=shlex.quote(str(digits)))), *again]
    learn()
    for file_size, tells in ((400, f"plots/{STEM}.jsonl"), (5000, f"weights/{STEM}.pt")):
        before = snapshot(tmp_path)
        # Python ignores SIGXFSZ, so that a write beyond the limit is an OSError, as on a full disk.
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_size, file_size))
        (code,), _, err = run_together(1, "train.py", words, tmp_path, prepare=limit)
        assert_one_line(code, err, f"can't write {tells}: .*unchanged")
        after = snapshot(tmp_path)
        if file_size > 400:  # the log of the new run was begun
            log = str(tmp_path / "plots" / f"{STEM}.jsonl")
            assert after.pop(log) != before.pop(log)
        assert after == before
    learn(*again)  # the disk has space again


# ----------------------------------------------------------------------------------------------- how a script ends


def test_each_ending_has_its_exit_code_and_one_line(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # a bug would be a traceback there; of one process: tests/test_test.py
    for error, code, tells in (
        (UserError("one\n  line"), 2, "error: one line\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the command (train.py resumes unless --resume False is given)"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "w/a.pt"), 2, "can't use w/a.pt: File name too long; give"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 2, "a smaller --batch_size"),
        (torch.AcceleratorError("CUDA error: no kernel image is available\nfor"), 2, "not support this GPU"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "w/a.pt"), 2, "can't use w/a.pt: Permission denied; "),
    ):
        assert exit_code(Mock(side_effect=error)) == code, tells
        told = capsys.readouterr().err
        assert tells in told and told.count("\n") == 1, tells


def test_success_is_zero_and_a_bug_is_raised(capsys):  # with a stdout that has no file, as in a notebook
    assert exit_code(lambda: None) == 0
    missing, unknown = OSError(errno.ENOENT, "none", "file"), OSError(errno.EIO, "not of stdout")
    http = HTTPError("https://x", 404, "Not Found", {}, None)  # whose URL is a file name
    for bug in (ValueError("x"), RuntimeError("x"), KeyError("x"), missing, unknown, http):
        assert known_failure(bug) is None
        with pytest.raises(type(bug)):
            exit_code(Mock(side_effect=bug))


def test_memory_that_really_runs_out_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert "not enough memory" in known_failure(error.value)


COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "g++ 12"; exit;; esac
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
    monkeypatch.setenv("TORCH_WARM_POOL", "0")  # no workers for a program that is never compiled
    without_headers = tmp_path / "g++"
    without_headers.write_text(COMPILER)
    without_headers.chmod(0o755)
    settings = {"cpp.cxx": (compiler or shlex.quote(str(without_headers)),), "fx_graph_cache": False}
    inductor = importlib.import_module("torch._inductor.config")
    with inductor.patch(settings), pytest.raises(Exception) as error:  # noqa: B017 - torch's own
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
    with pytest.raises(Stopped), StopSignal() as stop:  # raised at the end, after which nobody would ask
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def test_before_the_training_a_signal_interrupts_at_once(learn, monkeypatch):
    monkeypatch.setattr(train, "load_images", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may ignore
    try:
        learn(code=130)
    finally:
        signal.signal(signal.SIGINT, before)


INTERRUPT = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell may ignore
INTERRUPT += "os.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(9)\n"


@pytest.mark.parametrize(
    "happens, code, tells",
    [
        (INTERRUPT, -2, "interrupted\n"),
        ("raise OSError(30, 'Read-only')", 2, "train.py: error: can't start: [Errno 30] Read-only; set TMPDIR to a "),
        ("__version__ = '2.8.0+cpu'", 2, "train.py: error: can't start: torch 2.8.0+cpu is too old; install the pac"),
        ("raise RuntimeError('No nms')", 2, "train.py: error: can't start: No nms; install the packages with `pip "),
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
