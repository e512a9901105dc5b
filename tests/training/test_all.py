"""`train.py --all`: every run once, whenever it is stopped; and what makes a gain of KD a paired one."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from kill_marathon import result, wait

import train
import utils
from runtime import checkpoint

RUNS = ["teacher", "student", "student_kd_t5", "student_seed43", "student_kd_t5_seed43"]


@pytest.fixture(scope="module")
def start_script(start_script):
    """As everywhere, with models of a few thousand weights."""
    return partial(start_script, tiny=True)


@pytest.fixture(scope="module")
def command(digits) -> list[str]:
    """The command of five runs of a second each."""
    size = ["--subset=40", "--batch_size=8", "--num_epochs=1", "--seeds=2", "--temp=5", "--views=2"]
    return ["train.py", "--all", "--dataset=digits", *size, f"--data_path={digits}", "--device=cpu", "--precision=fp32"]


def table_of(folder: Path) -> dict:
    """The table's numbers, without the effort."""
    table = json.loads((folder / "plots" / "digits_results_subset40.json").read_text())
    for row in table["rows"]:
        assert row.pop("seconds") > 0
    return table


def test_stopped_after_each_phase_it_gives_the_same_table(command, start_script, forked, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    done = forked(*command, folder=whole)
    assert done.returncode == 0, done.stderr
    assert "Student (with KD, Temp = 5)" in done.stdout and "over the same seeds without KD" in done.stdout
    for name in RUNS:
        run, path = start_script(*command, folder=stopped), stopped / "weights" / f"digits_{name}_subset40.pt"
        wait(path.exists, run)
        os.kill(run.pid, signal.SIGKILL)
        run.end()
    done = forked(*command, folder=stopped)
    assert done.returncode == 0, done.stderr
    # The last one was killed when its checkpoint was in place, before its figures were: they are drawn now.
    assert [line for line in done.stdout.splitlines() if "finished before, kept" in line] == [
        f"digits_{name}_subset40: finished before, kept" for name in RUNS[:-1]
    ]
    assert table_of(stopped) == table_of(whole)
    for name in RUNS:
        (found, log), (wanted, wanted_log) = (result(folder, f"digits_{name}_subset40") for folder in (stopped, whole))
        assert all(torch.equal(found["model"][key], tensor) for key, tensor in wanted["model"].items()), name
        assert log == wanted_log, name
    assert {path.name for path in (stopped / "plots").iterdir()} == {path.name for path in (whole / "plots").iterdir()}
    assert not list((stopped / "weights").glob("*.last.pt*"))


def test_with_a_holdout_the_students_learn_from_a_teacher_that_has_not_seen_it_either(command, forked, tmp_path):
    assert forked(*command, "--seeds=1", "--deterministic", folder=tmp_path).returncode == 0
    before = snapshot(tmp_path)
    done = forked(*command, "--seeds=1", "--holdout=8", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert before.items() <= snapshot(tmp_path).items(), "what was made with all images stays"
    teacher, student = (
        checkpoint.load(tmp_path / "weights" / f"digits_{name}_subset40_holdout8.pt") for name in RUNS[::2][:2]
    )
    assert student["identity"]["teacher"] == checkpoint.fingerprint(teacher["model"])
    text = (tmp_path / "plots" / "digits_results_subset40_holdout8.md").read_text()
    assert text.count(", subset 40, holdout 8 ") == 3
    done = forked("test.py", "--compare", *command[2:3], command[-3], "--subset=40", "--device=cpu", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Student (with KD, Temp = 5), subset 40" in done.stdout and "holdout" not in done.stdout


def test_students_of_a_seed_differ_in_the_loss_alone(command, tiny_models, tmp_path, monkeypatch):
    begun, seen, losses = [], [], []

    def train_epoch(run, views, teacher, stop, real=train.train_epoch):
        begun.append((run.options.run_name, {key: value.clone() for key, value in run.model.state_dict().items()}))
        seen.append([])
        real(run, views, teacher, stop)
        losses.append(run.losses.tolist())

    def batch(views, rows, view_of, real=utils.Views.batch):
        seen[-1].append((rows.tolist(), view_of.tolist()))
        return real(views, rows, view_of)

    monkeypatch.setattr(train, "plot_curves", lambda *_: [])
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(utils.Views, "batch", batch)
    folders = [f"--weights_path={tmp_path}", f"--plots_path={tmp_path}"]
    assert train.main([*command[1:], *folders, "--loss", "kd", "dkd"]) == 0
    names = [name.removeprefix("digits_").removesuffix("_subset40") for name, _ in begun]
    first = ["student", "student_kd_t5", "student_dkd_t5"]
    assert names == ["teacher"] * 3 + first + [f"{name}_seed43" for name in first], "the teacher's are 3 epochs"
    begun, seen, losses = begun[2:], seen[2:], losses[2:]
    for student, other in ((1, 2), (1, 3), (4, 5), (4, 6)):  # of each seed, without KD and with
        assert all(torch.equal(begun[other][1][key], value) for key, value in begun[student][1].items())
        assert len(seen[student]) == 5 and seen[other] == seen[student]
        assert losses[other] != losses[student]
    assert losses[2] != losses[3] and seen[1] != seen[4], "another seed, another order"
    assert any(not torch.equal(begun[4][1][key], value) for key, value in begun[1][1].items())
    text = (tmp_path / "digits_results_subset40.md").read_text()
    assert "Student (with DKD, Temp = 5, 1 TCKD + 8 NCKD + 1 CE), subset 40 | Student (with KD, Temp = 5), sub" in text
    assert all(title in text for title in ("ECE", "NLL", "Agreement", "KL", "Training", "Gain of KD"))
