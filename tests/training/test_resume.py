"""Nothing lost: a run ended at any moment and started again ends as if nobody had touched it, to the bit.

A few kills of each kind; tests/kill_marathon.py does more of them, through the whole command line.
"""

import json
import os
import re
import shlex
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from kill_marathon import COMMON, DISTILLED, MOMENTS, RUNS, STUDENT, assert_same_result, kill_and_go_on, result, wait
from made_up import TinyTeacher, save_run

from config import parse_train


@pytest.fixture(scope="module")
def start_script(start_script):
    """As everywhere, with models of a few thousand weights."""
    return partial(start_script, tiny=True)


@pytest.fixture(scope="module")
def student(digits) -> list[str]:
    """The command of a small student's run that saves its resume state after every step."""
    return ["train.py", *RUNS[STUDENT], *COMMON, f"--data_path={digits}"]


@pytest.fixture(scope="module")
def distilled(digits, tmp_path_factory) -> list[str]:
    """The command of a student that learns from a teacher which never learned: any logits do here."""
    path = save_run(tmp_path_factory.mktemp("teacher"), "--tto --dataset=digits", model=TinyTeacher())
    return ["train.py", *RUNS[DISTILLED], *COMMON, f"--data_path={digits}", f"--teacher={path}"]


@pytest.fixture(scope="module")
def uninterrupted(forked, tmp_path_factory):
    """A function that gives what a command's run leaves when nobody touches it; each command is run once."""
    results = {}

    def run(command: list[str], name: str):
        if name not in results:
            folder = tmp_path_factory.mktemp("uninterrupted")
            done = forked(*command, folder=folder)
            assert done.returncode == 0, done.stderr
            results[name] = result(folder, name)
        return results[name]

    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_student_ends_as_if_untouched(moment, student, uninterrupted, start_script, tmp_path):
    kill_and_go_on(lambda: start_script(*student, folder=tmp_path), tmp_path, STUDENT, moment)
    assert_same_result(tmp_path, STUDENT, uninterrupted(student, STUDENT))


@pytest.mark.parametrize("moment", ["SIGKILL in mid-save", "SIGTERM in mid-epoch"])
def test_a_killed_distillation_ends_as_if_untouched(moment, distilled, uninterrupted, start_script, tmp_path):
    kill_and_go_on(lambda: start_script(*distilled, folder=tmp_path), tmp_path, DISTILLED, moment)
    assert_same_result(tmp_path, DISTILLED, uninterrupted(distilled, DISTILLED))


def test_the_same_command_twice_is_the_same_to_the_bit(student, uninterrupted, forked, tmp_path):
    expected = uninterrupted(student, STUDENT)
    # How often the resume state is saved is no part of the result.
    assert forked(*student, "--save_seconds=300", folder=tmp_path).returncode == 0
    assert_same_result(tmp_path, STUDENT, expected)
    other = tmp_path / "other"
    other.mkdir()
    assert forked(*student, "--seed=7", folder=other).returncode == 0
    content, _ = result(other, "digits_student_seed7_subset40")
    assert any(not torch.equal(tensor, expected[0]["model"][key]) for key, tensor in content["model"].items())


def test_the_same_command_twice_in_bf16(student, forked, tmp_path):
    results = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        assert forked(*student, "--precision=bf16", "--subset=16", "--num_epochs=1", folder=folder).returncode == 0
        results.append(result(folder, "digits_student_subset16"))
    assert results[0][0]["identity"]["precision"] == "bf16"
    assert_same_result(tmp_path / "first", "digits_student_subset16", results[1])


def test_one_run_at_a_time_writes_a_checkpoint(student, start_script, forked, tmp_path):
    endless = [*student, "--num_epochs=1000"]
    state = tmp_path / "weights" / f"{STUDENT}.last.pt"
    stale = tmp_path / "weights" / f"{STUDENT}.last.pt.4194305.tmp"  # no system has a process of this number
    first = start_script(*endless, folder=tmp_path)
    wait(state.exists, first)
    second = forked(*endless, folder=tmp_path)
    assert second.returncode == 2
    assert second.stderr.splitlines() == [
        f"train.py: error: another run is writing weights/{STUDENT}.pt: wait for it, or stop it"
    ]
    assert first.alive(), "the first run goes on"
    os.kill(first.pid, signal.SIGKILL)
    assert first.end().returncode == -signal.SIGKILL
    stale.write_bytes(b"half a state")
    before = state.read_bytes()

    # Its holder is dead, so the lock is free. But it was another run that the state is of.
    refused = forked(*endless, "--lr=0.01", "--num_epochs=7", folder=tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    for told in ("num_epochs 1000, not 7", "lr 0.1, not 0.01", "--resume False"):
        assert told in refused.stderr
    assert "seed" not in refused.stderr
    assert state.read_bytes() == before

    third = start_script(*endless, "--resume=True", folder=tmp_path)
    wait(lambda: f"going on with weights/{STUDENT}.last.pt" in third.read("stdout"), third)
    wait(lambda: not stale.exists(), third)
    os.kill(third.pid, signal.SIGTERM)
    assert third.end().returncode == 128 + signal.SIGTERM

    # --resume False starts anew, over the state of the unfinished run.
    assert forked(*student, "--num_epochs=1", "--resume=False", folder=tmp_path).returncode == 0
    content, log = result(tmp_path, STUDENT)
    assert content["identity"]["num_epochs"] == 1
    assert len(log) == 2
    assert not state.exists()


def test_a_stop_says_where_the_run_goes_on(student, start_script, forked, tmp_path):
    # Saved by the signal alone, and not by the clock.
    command = [*student, "--num_epochs=1000", "--save_seconds=300"]
    run = start_script(*command, folder=tmp_path)
    log = tmp_path / "plots" / f"{STUDENT}.jsonl"
    wait(lambda: log.exists() and log.read_bytes().count(b"\n") > 2, run)
    os.kill(run.pid, signal.SIGINT)
    done = run.end()
    assert done.returncode == 128 + signal.SIGINT
    state = torch.load(tmp_path / "weights" / f"{STUDENT}.last.pt", weights_only=True)
    where = f"weights/{STUDENT}.last.pt at epoch {state['epoch'] + 1}, step {state['step']}/5"
    assert done.stdout.splitlines()[-1] == f"saved {where}"
    told = re.fullmatch(r"stopped; go on with `python (train\.py .*)`\n", done.stderr)
    assert told, done.stderr
    going_on = start_script(*shlex.split(told[1]), folder=tmp_path)
    wait(lambda: f"going on with {where}\n" in going_on.read("stdout"), going_on)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_state(student, forked, tmp_path):
    done = forked(*student, "--lr=1e20", folder=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    pattern = r"train.py: error: the loss is (nan|inf) at epoch 1, step (\d), learning rate (\S+): .*`(.*)`"
    told = re.match(pattern, done.stderr)
    assert told, done.stderr
    lower = parse_train(shlex.split(told[4])[2:])
    assert (lower.lr, lower.resume, lower.run_name) == (1e19, "False", STUDENT)
    step = int(told[2])
    assert float(told[3]) == pytest.approx(1e20 * min(step / 1, (16 - step) / 14), rel=1e-3)
    state = torch.load(tmp_path / "weights" / f"{STUDENT}.last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, step - 1), "the state of the last step whose loss was finite"
    assert not (tmp_path / "weights" / f"{STUDENT}.pt").exists()


def test_a_new_run_keeps_the_log_of_the_one_before(student, forked, tmp_path):
    log = tmp_path / "plots" / f"{STUDENT}.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"run": "before"}) + "\n" + json.dumps({"epoch": 1}) + "\n")
    before = log.read_bytes()
    # What other runs left beside it, whole or not, does not keep this one from its end.
    (log.parent / "teacher.jsonl").write_text('{"run": "teacher", "identity": {}}\n{"epoch": 1, "tra')
    (log.parent / "notes.jsonl").write_text("[1]\n[2]\n")
    done = forked(*student, "--num_epochs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert log.read_bytes() != before
    assert Path(f"{log}.previous").read_bytes() == before


def test_a_run_begun_anew_in_its_middle_leaves_the_finished_ones_log(student, start_script, forked, tmp_path):
    log = tmp_path / "plots" / f"{STUDENT}.jsonl"
    assert forked(*student, "--num_epochs=1", folder=tmp_path).returncode == 0
    finished = log.read_bytes()
    run = start_script(*student, "--num_epochs=1000", folder=tmp_path)
    wait(lambda: log.exists() and log.read_bytes() != finished and log.read_bytes().count(b"\n") > 1, run)
    os.kill(run.pid, signal.SIGKILL)
    run.end()
    assert forked(*student, "--num_epochs=1", "--resume=False", folder=tmp_path).returncode == 0
    assert Path(f"{log}.previous").read_bytes() == finished
