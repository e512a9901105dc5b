"""`train.py --all`: every run once, whenever it is stopped; and what makes a gain of KD a paired one."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from kill_marathon import result, wait

import config
import train
import utils
from runtime import checkpoint
from runtime.device import Runtime

RUNS = ["teacher", *(f"student{kd}{seed}" for seed in ("", "_seed43") for kd in ("", "_kd_t5", "_kd_t20"))]


@pytest.fixture(scope="module")
def command(digits) -> list[str]:
    """The command of seven runs of a second each."""
    # At the recipe's rate so few steps give a teacher whose logits are beyond half precision.
    size = ["--subset=40", "--batch_size=8", "--num_epochs=1", "--lr=0.01", "--seeds=2", "--views=2"]
    return ["train.py", "--all", "--dataset=digits", *size, f"--data_path={digits}", "--device=cpu", "--precision=fp32"]


def table_of(folder: Path) -> tuple[str, dict]:
    plots = folder / "plots"
    return (plots / "digits_results.md").read_text(), json.loads((plots / "digits_results.json").read_text())


def test_stopped_after_each_phase_it_gives_the_same_table(command, start_script, forked, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    done = forked(*command, folder=whole)
    assert done.returncode == 0, done.stderr
    assert "Student (with KD, Temp = 20)" in done.stdout and "over the same seeds without KD" in done.stdout
    for name in RUNS:
        run, path = start_script(*command, folder=stopped), stopped / "weights" / f"digits_{name}.pt"
        wait(path.exists, run)
        os.kill(run.pid, signal.SIGKILL)
        run.end()
    done = forked(*command, folder=stopped)
    assert done.returncode == 0, done.stderr
    # The last one was killed when its checkpoint was in place, before its figures were: they are drawn now.
    assert [line for line in done.stdout.splitlines() if "finished before, kept" in line] == [
        f"digits_{name}: finished before, kept" for name in RUNS[:-1]
    ]
    assert table_of(stopped) == table_of(whole)
    for name in RUNS:
        (found, log), (wanted, wanted_log) = (result(folder, f"digits_{name}") for folder in (stopped, whole))
        assert all(torch.equal(found["model"][key], tensor) for key, tensor in wanted["model"].items()), name
        assert log == wanted_log, name
    assert {path.name for path in (stopped / "plots").iterdir()} == {path.name for path in (whole / "plots").iterdir()}
    assert not list((stopped / "weights").glob("*.last.pt*"))


def test_with_a_holdout_the_students_learn_from_a_teacher_that_has_not_seen_it_either(command, forked, tmp_path):
    whole = forked(*command, "--seeds=1", "--temp", "5", folder=tmp_path)
    assert whole.returncode == 0, whole.stderr
    before = table_of(tmp_path)
    done = forked(*command, "--seeds=1", "--temp", "5", "--holdout=8", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python test.py" not in done.stdout
    teacher, student = (
        checkpoint.load(tmp_path / "weights" / f"digits_{name}_holdout8.pt") for name in ("teacher", "student_kd_t5")
    )
    assert student["teacher"] == checkpoint.fingerprint(teacher["model"])
    assert table_of(tmp_path) == before
    text = (tmp_path / "plots" / "digits_results_holdout8.md").read_text()
    assert text.count(", subset 40, holdout 8 ") == 3
    done = forked("test.py", "--compare", *command[2:3], command[-3], "--subset=40", "--device=cpu", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Student (with KD, Temp = 5), subset 40" in done.stdout and "holdout" not in done.stdout


def test_students_of_a_seed_differ_in_the_loss_alone(command, tmp_path, monkeypatch):
    begun, seen, losses = [], [], []

    def train_epoch(run, views, teacher, stop, real=train.train_epoch):
        begun.append((run.options.run_name, {key: value.clone() for key, value in run.model.state_dict().items()}))
        seen.append([])
        real(run, views, teacher, stop)
        losses.append(run.losses.tolist())

    def batch(views, rows, view_of, real=utils.Views.batch):
        seen[-1].append((rows.tolist(), view_of.tolist()))
        return real(views, rows, view_of)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(utils.Views, "batch", batch)
    folders = [f"--weights_path={tmp_path}", f"--plots_path={tmp_path}"]
    assert train.main([*command[1:], *folders]) == 0
    longer, same = (config.parse_train([*command[1:], *folders, f"--num_epochs={n}"]).runs()[0] for n in (2, 1))
    runtime = Runtime(torch.device("cpu"), None)
    assert train.is_finished(same, runtime) and not train.is_finished(longer, runtime), "a teacher trained too shortly"
    names = [name for name, _ in begun]
    assert names == [f"digits_{name}" for name in RUNS]
    for first in (1, 4):  # of each seed, the student without KD
        for other in (first + 1, first + 2):
            assert all(torch.equal(begun[other][1][key], value) for key, value in begun[first][1].items())
            assert len(seen[first]) == 5 and seen[other] == seen[first]
            assert losses[other] != losses[first]
    assert seen[1] != seen[4], "another seed, another order"
    assert any(not torch.equal(begun[4][1][key], value) for key, value in begun[1][1].items())
