"""Nothing is lost: a run that was ended at any moment and resumed ends bit-equal to one that was not interrupted.

train.py with tiny models in one process, or in two as under torchrun, that sends itself a signal at a given moment.
"""

import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import run_together
from made_up import CPU, TinyTeacher, tiny_student

import models
import training.run
import utils
from runtime import checkpoint
from training.run import Run

STEM = "digits_student_kd_t5_subset40"
SIZE = "--dataset=digits --subset=40 --batch_size=8 --num_epochs=3 --device=cpu --precision=fp32"
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def call_at(owner, name: str, count: int, strike: Callable, counts=lambda *_: True, after: bool = True) -> None:
    """Call `strike` beside the call number `count` of a function, of those calls that `counts` is true of."""
    real, numbers = getattr(owner, name), itertools.count(1)

    def wrapped(*arguments, **keywords):
        struck = counts(*arguments) and next(numbers) == count
        if struck and not after:
            strike()
        result = real(*arguments, **keywords)
        if struck and after:
            strike()
        return result

    setattr(owner, name, wrapped)


MOMENTS = {
    "save": lambda strike: call_at(os, "replace", 8, strike, lambda _, path: ".last" in path.name, after=False),
    "log line": lambda strike: call_at(Run, "write_log", 3, strike),
    "end": lambda strike: call_at(os, "replace", 1, strike, lambda _, path: path.name == f"{STEM}.pt"),
    "epoch": lambda strike: call_at(Run, "record", 8, strike),
    "view": lambda strike: call_at(TinyTeacher, "forward", 4, strike),  # of 3 batches per view
    "any view": lambda strike: call_at(TinyTeacher, "forward", 1, strike, after=False),
}


def with_dropout(num_classes: int) -> torch.nn.Module:
    """A student that draws numbers in training, which a resumed run has to repeat."""
    student = tiny_student(num_classes)
    student.features.append(torch.nn.Dropout(0.5))
    return student


def prepare(moment: str, number: int) -> None:
    """In a fork: train.py saves after each step, and the first process gets a signal at a moment, if there is one."""
    Run.save_is_due = lambda run: True
    models.BUILDERS["student"] = with_dropout
    utils.EVALUATION_BATCH = 16
    if moment and os.environ.get("RANK", "0") == "0":
        MOMENTS[moment](lambda: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A function that runs train.py --kd in a folder: exit codes, stdout and stderr of its processes together."""
    command = [*SIZE.split(), f"--data_path={digits}"]

    def run(folder: Path, processes: int = 1, moment: str = "", number: int = KILL, more=()):
        how = partial(prepare, moment, number)
        return run_together(processes, "train.py", [*command, *more], folder, prepare=how)

    teacher = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    torch.save(TinyTeacher().state_dict(), teacher)
    command += ["--kd", "--views=2", f"--teacher={teacher}"]
    return run


def result(folder: Path) -> dict:
    """All that a finished run leaves, without its times: the checkpoint, the log, the logits and all names."""
    content = checkpoint.load(folder / "weights" / f"{STEM}.pt")
    assert content["log"] == (folder / "plots" / f"{STEM}.jsonl").read_text()
    header, lines = utils.parse_log(content["log"])
    said = json.loads(json.dumps({name: content[name] for name in ("run", "machine", "title")}))
    assert header == said | {"split": "test"} and content["metrics"] == lines[-1]["test"]
    assert content["seconds"] == sum(line["seconds"] for line in lines) and not list(folder.rglob("*.last.pt"))
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    lines = [{name: value for name, value in line.items() if "second" not in name} for line in lines]
    model = {name: tensor.numpy().tobytes() for name, tensor in content["model"].items()}
    logits = {path.name: np.load(path)["logits"].tobytes() for path in folder.rglob("*.npz")}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp" not in str(path)}  # of a SIGKILL
    kept = {name: content[name] for name in ("run", "machine", "title", "data", "epoch", "metrics")}
    return kept | {"header": header, "lines": lines, "model": model, "logits": logits, "names": names}


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory) -> dict[int, Path]:
    """The folders of a run in one process and of one in two that were not interrupted."""
    folders = {processes: tmp_path_factory.mktemp("uninterrupted") for processes in (1, 2)}
    for processes, folder in folders.items():
        codes, _, errors = run(folder, processes)
        assert codes == [0] * processes, errors
    return folders


@pytest.mark.parametrize(
    "processes, moment, number",
    [*((1, moment, KILL) for moment in ("save", "log line", "end", "view")), (1, "epoch", INT),
     (2, "epoch", KILL), (2, "epoch", TERM), (2, "view", TERM)],
)  # fmt: skip
def test_an_interrupted_run_resumes_bit_exactly(processes, moment, number, run, uninterrupted, tmp_path):
    codes, output, errors = run(tmp_path, processes, moment, number)
    if number == KILL:
        assert codes[0] == -KILL and not any(code == 0 for code in codes)
    else:
        assert codes == [-INT if number == INT else 128 + number] * processes, "a shell stops its loop then"
        assert errors == "stopped; rerun the command, without --resume False, to resume\n"
        where = re.search(rf"saved (weights/{STEM}\.last\.pt at epoch \d, step \d/5)\n$", output)[1]
    assert (tmp_path / "weights" / f"{STEM}.pt").exists() == (moment == "end")
    codes, again, errors = run(tmp_path, processes)
    assert codes == [0] * processes, errors
    assert f"resuming weights/{STEM}.last.pt at " in again and "may differ" not in again
    if number != KILL:
        assert f"resuming {where}\n" in again
    assert result(tmp_path) == result(uninterrupted[processes])


def test_a_student_is_bit_equal_with_logits_that_were_computed_and_read(run, uninterrupted):
    expected, of_two = map(result, uninterrupted.values())
    codes, _, errors = run(uninterrupted[1], moment="any view", more=["--resume=False"])
    assert codes == [0], "the teacher computed something: " + errors
    assert result(uninterrupted[1]) == expected and expected["logits"] == of_two["logits"]


@pytest.mark.parametrize("cost, least", [(0.001, 1.0), (0.05, 5.0)])
def test_saving_takes_a_hundredth_of_the_time_and_happens_once_a_second_at_most(cost, least, learn, monkeypatch):
    clock, saved = [0.0], []

    def record(run, *arguments, real=Run.record):
        real(run, *arguments)
        clock[0] += 0.25

    def save(path, content):
        if path.name.endswith(".last.pt"):
            saved.append(clock[0])
            clock[0] += cost

    monkeypatch.setattr(training.run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Run, "record", record)
    monkeypatch.setattr(checkpoint, "save", save)
    learn("--num_epochs=40")  # of 5 steps, 50 s in all
    between = [later - earlier - cost for earlier, later in itertools.pairwise(saved)]
    assert len(between) >= 8 and all(least - 1e-6 < seconds < least + 0.25 + 1e-6 for seconds in between)
    other_process = SimpleNamespace(runtime=replace(CPU, rank=1), saved_at=-100.0, save_seconds=0.0)
    assert not Run.save_is_due(other_process), "it writes nothing, so its saves cost nothing"


def test_a_run_that_fails_at_once_may_be_started_with_other_options(learn, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "backward_and_step", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        assert "give train.py a smaller --batch_size" in learn(code=2)
    learn("--batch_size=4")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(learn, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "save_is_due", lambda run: True)
    tells = r".*the loss of digits_student.* is (?:nan|inf) in epoch 1: .* --lr 1e\+19 --resume False .*\n"
    assert re.fullmatch(tells, error := learn("--lr=1e20", code=2)), error
    (path,) = (tmp_path / "weights").iterdir()
    state = checkpoint.load(path)
    assert state["epoch"] == 0 and state["totals"].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    before = path.read_bytes()
    monkeypatch.setattr(Run, "save_is_due", lambda run: False)
    monkeypatch.setattr("runtime.errors.StopSignal.number", 15)  # as if a signal came in the step that diverges
    assert re.fullmatch(tells, learn("--lr=1e20", code=2)) and path.read_bytes() == before
