"""Nothing lost: a run ended at any moment and started again ends as if nobody had touched it, to the bit.

A few kills of each kind; tests/kill_marathon.py does more of them, through the whole command line.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from kill_marathon import COMMON, MOMENTS, RUNS, assert_same_result, kill_and_go_on, result, wait

from models import ARCHITECTURES, build_model
from runtime import checkpoint
from runtime.errors import exit_code
from runtime.files import keep_previous, writing
from runtime.log import RunLog, read_log
from runtime.signals import StopSignal


@pytest.fixture(scope="module")
def student(cifar10) -> list[str]:
    """The command of a small student's run that saves its resume state after every step."""
    return ["train.py", *RUNS["student"], *COMMON, f"--data_path={cifar10}"]


@pytest.fixture(scope="module")
def distilled(cifar10, tmp_path_factory) -> list[str]:
    """The command of a student that learns from a teacher which never learned: any logits do here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    content = {"role": "teacher", "architecture": ARCHITECTURES["teacher"], "num_classes": 10, "dataset": "cifar10"}
    checkpoint.save(path, content | {"options": {}, "model": build_model("teacher").state_dict()})
    return ["train.py", *RUNS["student_kd_t5"], *COMMON, f"--data_path={cifar10}", f"--teacher={path}"]


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
    kill_and_go_on(lambda: start_script(*student, folder=tmp_path), tmp_path, "student", moment)
    assert_same_result(tmp_path, "student", uninterrupted(student, "student"))


@pytest.mark.parametrize("moment", ["SIGKILL in mid-save", "SIGTERM in mid-epoch"])
def test_a_killed_distillation_ends_as_if_untouched(moment, distilled, uninterrupted, start_script, tmp_path):
    kill_and_go_on(lambda: start_script(*distilled, folder=tmp_path), tmp_path, "student_kd_t5", moment)
    assert_same_result(tmp_path, "student_kd_t5", uninterrupted(distilled, "student_kd_t5"))


def test_the_same_command_twice_is_the_same_to_the_bit(student, uninterrupted, forked, tmp_path):
    expected = uninterrupted(student, "student")
    # How often the resume state is saved is no part of the result.
    assert forked(*student, "--save_seconds=300", folder=tmp_path).returncode == 0
    assert_same_result(tmp_path, "student", expected)
    other = tmp_path / "other"
    other.mkdir()
    assert forked(*student, "--seed=7", folder=other).returncode == 0
    content, _ = result(other, "student_seed7")
    assert any(not torch.equal(tensor, expected[0]["model"][key]) for key, tensor in content["model"].items())


def test_the_same_command_twice_in_bf16(student, forked, tmp_path):
    results = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        assert forked(*student, "--precision=bf16", "--subset=16", "--num_epochs=1", folder=folder).returncode == 0
        results.append(result(folder, "student"))
    assert results[0][0]["options"]["precision"] == "bf16"
    assert_same_result(tmp_path / "first", "student", results[1])


def test_one_run_at_a_time_writes_a_checkpoint(student, start_script, forked, tmp_path):
    endless = [*student, "--num_epochs=1000"]
    state = tmp_path / "weights" / "student.last.pt"
    stale = tmp_path / "weights" / "student.last.pt.4194305.tmp"  # no system has a process of this number
    first = start_script(*endless, folder=tmp_path)
    wait(state.exists, first)
    second = forked(*endless, folder=tmp_path)
    assert second.returncode == 2
    assert second.stderr.splitlines() == [
        "train.py: error: another run is writing weights/student.pt: wait for it, or stop it"
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
    for told in ("--num_epochs 1000, not 7", "--lr 0.1, not 0.01", "--resume False"):
        assert told in refused.stderr
    assert "seed" not in refused.stderr
    assert state.read_bytes() == before

    third = start_script(*endless, "--resume=True", folder=tmp_path)
    wait(lambda: "going on with weights/student.last.pt" in third.read("stdout"), third)
    wait(lambda: not stale.exists(), third)
    os.kill(third.pid, signal.SIGTERM)
    assert third.end().returncode == 128 + signal.SIGTERM

    # --resume False starts anew, over the state of the unfinished run.
    assert forked(*student, "--num_epochs=1", "--resume=False", folder=tmp_path).returncode == 0
    content, log = result(tmp_path, "student")
    assert content["options"]["num_epochs"] == 1
    assert len(log) == 2
    assert not state.exists()


def test_a_stop_says_where_the_run_goes_on(student, start_script, forked, tmp_path):
    # Saved by the signal alone, and not by the clock.
    command = [*student, "--num_epochs=1000", "--save_seconds=300"]
    run = start_script(*command, folder=tmp_path)
    log = tmp_path / "plots" / "student.jsonl"
    wait(lambda: log.exists() and log.read_bytes().count(b"\n") > 2, run)
    os.kill(run.pid, signal.SIGINT)
    done = run.end()
    assert done.returncode == 128 + signal.SIGINT
    state = torch.load(tmp_path / "weights" / "student.last.pt", weights_only=True)
    where = f"weights/student.last.pt at epoch {state['epoch'] + 1}, step {state['step']}/5"
    assert done.stdout.splitlines()[-1] == f"saved {where}"
    going_on = start_script(*command, folder=tmp_path)
    wait(lambda: f"going on with {where}\n" in going_on.read("stdout"), going_on)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_state(student, forked, tmp_path):
    done = forked(*student, "--lr=1e20", folder=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    pattern = r"train.py: error: the loss is (nan|inf) at epoch 1, step (\d), learning rate (\S+): .*--lr below 1e\+20"
    told = re.match(pattern, done.stderr)
    assert told, done.stderr
    step = int(told[2])
    assert float(told[3]) == pytest.approx(1e20 * min(step / 1, (16 - step) / 14), rel=1e-3)
    state = torch.load(tmp_path / "weights" / "student.last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, step - 1), "the state of the last step whose loss was finite"
    assert not (tmp_path / "weights" / "student.pt").exists()


# ------------------------------------------------------------------------------ the files themselves


def test_what_is_being_written_replaces_the_old_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with writing(path) as temporary:
        assert temporary.parent == path.parent, "a rename is atomic within one file system"
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    with pytest.raises(ZeroDivisionError), writing(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"whole"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_save_is_on_the_disk_before_it_replaces_the_old_file(tmp_path, monkeypatch):
    # A kill can't show this: what a process wrote outlives it in memory. A loss of power would.
    done = []

    def fsync(descriptor, real=os.fsync):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    def replace(source, target, real=os.replace):
        done.append(("replace", str(source)))
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"model": {}})
    temporary = done[0][1]
    assert temporary.startswith(f"{path}.")
    assert done == [("fsync", temporary), ("replace", temporary), ("fsync", str(tmp_path))]
    done.clear()
    log = RunLog(tmp_path / "log.jsonl")
    log.append({"epoch": 1})
    assert [word for word, _ in done] == ["fsync", "replace", "fsync"], "so is a line of the log"


@pytest.mark.parametrize("meanwhile", ["another run's", "cut", "longer", "removed"])
def test_a_resumed_run_has_its_own_log_whatever_became_of_the_file(meanwhile, tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.begin({"run": "student"})
    log.append({"epoch": 1})
    saved = log.text
    log.append({"epoch": 2})
    if meanwhile == "removed":
        log.path.unlink()
    else:
        longer = log.text + '{"epoch": 3, "half a li'
        log.path.write_text({"another run's": '{"run": "other"}\n', "cut": saved[:-5], "longer": longer}[meanwhile])
    again = RunLog(log.path)
    again.write(saved)
    again.append({"epoch": 2, "again": True})
    assert read_log(log.path) == ({"run": "student"}, [{"epoch": 1}, {"epoch": 2, "again": True}])


def test_what_a_new_run_replaces_stays_as_the_previous_one(tmp_path):
    path = tmp_path / "teacher.pt"
    for epochs in (60, 2, 1):
        keep_previous(path)
        checkpoint.save(path, {"model": {}, "options": {}, "epoch": epochs})
    assert checkpoint.load(path)["epoch"] == 1
    assert checkpoint.load(tmp_path / "teacher.pt.previous")["epoch"] == 2


def test_a_second_signal_does_not_wait_for_the_next_step(capsys):
    def work():
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal had no effect")

    assert exit_code(work) == 130
    assert capsys.readouterr().err == "stopped at once; a training goes on from its last save\n"


def test_a_full_device_is_one_line_that_says_what_to_do(capsys):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    assert exit_code(work) == 2
    assert "--batch_size" in capsys.readouterr().err


def test_temporaries_of_the_living_are_left_alone(tmp_path):
    path = tmp_path / "state.pt"
    dead, living, other = (tmp_path / f"state.pt.{word}.tmp" for word in ("4194305", str(os.getppid()), "my notes"))
    for file in (dead, living, other):
        file.write_bytes(b"half")
    checkpoint.save(path, {"model": {}})
    assert {file.name for file in tmp_path.iterdir()} == {"state.pt", living.name, other.name}


def test_a_new_run_keeps_the_log_of_the_one_before(student, forked, tmp_path):
    log = tmp_path / "plots" / "student.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"run": "before"}) + "\n" + json.dumps({"epoch": 1}) + "\n")
    before = log.read_bytes()
    # What other runs left beside it, whole or not, does not keep this one from its end.
    (log.parent / "teacher.jsonl").write_text('{"run": "teacher", "dataset": "cifar10"}\n{"epoch": 1, "tra')
    (log.parent / "notes.jsonl").write_text("[1]\n[2]\n")
    done = forked(*student, "--num_epochs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert log.read_bytes() != before
    assert Path(f"{log}.previous").read_bytes() == before


def test_a_run_begun_anew_in_its_middle_leaves_the_finished_ones_log(student, start_script, forked, tmp_path):
    log = tmp_path / "plots" / "student.jsonl"
    assert forked(*student, "--num_epochs=1", folder=tmp_path).returncode == 0
    finished = log.read_bytes()
    run = start_script(*student, "--num_epochs=1000", folder=tmp_path)
    wait(lambda: log.exists() and log.read_bytes() != finished and log.read_bytes().count(b"\n") > 1, run)
    os.kill(run.pid, signal.SIGKILL)
    run.end()
    assert forked(*student, "--num_epochs=1", "--resume=False", folder=tmp_path).returncode == 0
    assert Path(f"{log}.previous").read_bytes() == finished
