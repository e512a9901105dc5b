"""Two processes, once through torchrun's own launcher: every image counted once, one voice, one writer.

That they resume bit-exactly, alone or as two: tests/training/test_resume.py.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import REPOSITORY, run_together
from made_up import CPU, tiny_student

import models
import train
import utils
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.files import locked
from runtime.processes import start
from training.run import Run
from utils import load_images, parse_log

SUBSET = 85  # 17 test images, which two processes can't share evenly
STEM = f"digits_student_subset{SUBSET}"


def without_batch_norm(num_classes: int) -> torch.nn.Module:
    """A student whose gradient over a batch is the mean of those over its halves."""
    student = tiny_student(num_classes)
    student.features[1] = torch.nn.Identity()
    return student


def prepare(student) -> None:
    """In a fork: a student of a few thousand weights, evaluated in batches that both processes share."""
    utils.EVALUATION_BATCH = 5
    models.BUILDERS["student"] = student


def fail_in_one() -> None:
    """In a fork: the first step of the second process raises an error."""
    prepare(tiny_student)
    if os.environ["RANK"] == "1":
        Run.backward_and_step = Mock(side_effect=RuntimeError("a bug"))


@pytest.fixture
def options(digits):
    """A function from a folder to the options of a student's run of 2 epochs of 5 steps that writes there."""
    size = [f"--subset={SUBSET}", "--batch_size=16", "--num_epochs=2", "--dataset=digits", f"--data_path={digits}"]
    machine = ["--device=cpu", "--precision=fp32"]
    return lambda folder, *more: [*size, *machine, f"--weights_path={folder}", f"--plots_path={folder}", *more]


def pair(folder: Path, words: list[str], student=tiny_student) -> tuple[list[int], str, str]:
    """Run train.py in two processes, as torchrun does: exit codes, stdout and stderr of both."""
    return run_together(2, "train.py", words, folder, prepare=partial(prepare, student))


def result(folder: Path) -> tuple[dict, list[dict]]:
    """The weights of the finished run, and the lines of its log."""
    return checkpoint.load(folder / f"{STEM}.pt")["model"], parse_log((folder / f"{STEM}.jsonl").read_text())[1]


def test_two_processes_train_what_one_does(tmp_path, options, monkeypatch):
    monkeypatch.setitem(models.BUILDERS, "student", without_batch_norm)
    more = ("--optimizer=sgd", "--lr=0.1")  # Muon makes much of a rounding: its steps are of one size
    assert train.main(options(tmp_path / "one", *more)) == 0
    codes, output, errors = pair(tmp_path, options(tmp_path / "two", *more), without_batch_norm)
    assert codes == [0, 0], errors
    (one, lines), (two, other_lines) = (result(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    for line, other in zip(lines, other_lines, strict=True):
        for part in ("train", "test"):
            assert other[part] == pytest.approx(line[part], abs=1e-4), "every image is counted once"
    assert output.count("epoch 1/2:") == output.count("saved ") == output.count("evaluate it with") == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert "Warning" not in errors


@pytest.mark.parametrize("more, tells", [(["--kd"], "train one with `python"), ([], "another run is writing")])
def test_an_error_is_one_line_for_all_processes(tmp_path, options, more, tells):
    # The first process alone meets the lock; the others are waiting for it and must not say that they lost it.
    with locked(tmp_path / f"{STEM}.pt"):
        codes, output, errors = pair(tmp_path, options(tmp_path, *more))
    assert codes == [2, 2] and not output
    assert errors.count("\n") == 1 and errors.startswith("train.py: error: ") and tells in errors, errors
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pt", ".jsonl")]


def test_a_bug_in_one_process_is_told_once_and_ends_all(tmp_path, options):
    codes, _, errors = run_together(2, "train.py", options(tmp_path), tmp_path, prepare=fail_in_one)
    assert codes == [2, 1] and re.search("^Traceback[^\0]*RuntimeError: a bug\n$", errors), errors
    assert errors.count("Traceback") == 1, errors


def test_two_processes_make_the_table_and_save_what_they_evaluated(tmp_path, options, digits):
    codes, output, errors = pair(tmp_path, options(tmp_path, "--all", "--temp=5"))
    assert codes == [0, 0] and output.count("Gain of KD") == 1, errors
    weights, lines = result(tmp_path)
    assert checkpoint.load(tmp_path / f"{STEM}.pt")["run"]["processes"] == 2
    student = tiny_student()
    student.load_state_dict(weights)
    data = load_images("digits", digits, CPU)
    found = utils.evaluate(student, data.held_out(SUBSET, 0), data.spec, CPU)
    told = "each process has batch norm statistics of its own"
    assert lines[-1]["test"] == pytest.approx(train.percent(found), abs=1e-6), told
    words = [word for word in options(tmp_path, "--kd") if not word.startswith(("--batch_size", "--num_epochs"))]
    codes, output, errors = run_together(2, "test.py", words, tmp_path)
    assert codes == [0, 0] and output.count("test loss ") == 1, errors


def test_processes_that_have_seen_different_things_end(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers, operation=None: asked.append(operation))
    assert Runtime(CPU.device, world_size=2).agree(3, -1) == [3, -1] and asked == [torch.distributed.ReduceOp.MAX]
    Runtime.check_same(SimpleNamespace(agree=lambda *numbers: numbers), "a", 1)
    with pytest.raises(UserError, match="the processes have different images"):
        Runtime.check_same(SimpleNamespace(agree=lambda number, minus: (number, minus + 1)), "a", 1)


def test_a_run_that_torchrun_stops_is_saved_and_says_where(tmp_path, options):
    arguments = options(tmp_path, "--num_epochs=1000")
    words = ["--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2", REPOSITORY / "train.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words], **how)
    log = tmp_path / f"{STEM}.jsonl"
    deadline = time.monotonic() + 240
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=240)
    assert process.returncode and output.count("saved ") == 1, output + errors
    assert errors.count("stopped; rerun the command, without --resume False, to resume") == 1
    state = torch.load(tmp_path / f"{STEM}.last.pt", weights_only=True)
    where = f"{STEM}.last.pt at epoch {state['epoch'] + 1}, step {state['step']}/5"
    assert output.endswith(f"{where}\n") and not (tmp_path / f"{STEM}.pt").exists()


def test_an_incomplete_environment_of_torchrun_is_one_line(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value, missing in (("WORLD_SIZE", "2", "RANK"), ("RANK", "0", "MASTER_ADDR")):
        monkeypatch.setenv(name, value)
        tells = f"WORLD_SIZE is 2, but .*{missing}.*: start with torchrun, or unset WORLD_SIZE"
        with pytest.raises(UserError, match=tells), start("cpu", "fp32"):
            raise AssertionError("it has begun")
