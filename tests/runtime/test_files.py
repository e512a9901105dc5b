"""Files that are never half written."""

import errno
import fcntl
import os

import pytest
from made_up import facts_of

from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import keep_previous, locked, writing
from runtime.log import RunLog


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


def test_temporaries_of_the_living_are_left_alone(tmp_path):
    path = tmp_path / "state.pt"
    dead, living, other = (tmp_path / f"state.pt.{word}.tmp" for word in ("4194305", str(os.getppid()), "my notes"))
    for file in (dead, living, other):
        file.write_bytes(b"half")
    checkpoint.save(path, {"model": {}})
    assert {file.name for file in tmp_path.iterdir()} == {"state.pt", living.name, other.name}


@pytest.mark.parametrize("has_links", [True, False])
def test_what_a_new_run_replaces_stays_as_the_previous_one(has_links, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "teacher.pt"
    for epochs in (60, 2, 1):
        keep_previous(path)
        checkpoint.save(path, {"model": {}, "identity": facts_of("--tto"), "epoch": epochs})
    assert checkpoint.load(path)["epoch"] == 1
    assert checkpoint.load(tmp_path / "teacher.pt.previous")["epoch"] == 2


def test_a_name_that_is_too_long_for_a_temporary_is_said(tmp_path):
    with pytest.raises(UserError, match="File name too long"), writing(tmp_path / (250 * "x")) as temporary:
        temporary.write_text("whole")


@pytest.mark.parametrize("name", ["x**y", "[a]", "a b?", "..x", "-n", "ä", "100%"])
def test_a_name_is_a_name_and_no_pattern(name, tmp_path):
    path = tmp_path / name
    stale, other = tmp_path / f"{name}.4194305.tmp", tmp_path / "a.4194305.tmp"
    for file in (stale, other):
        file.write_text("half")
    with writing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert {file.name for file in tmp_path.iterdir()} == {name, other.name}


def test_a_link_stays_and_the_file_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with writing(link) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == link.read_text() == "new"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere" / "not yet")
    with writing(dangling) as temporary:
        temporary.write_text("new")
    assert dangling.is_symlink() and (tmp_path / "elsewhere" / "not yet").read_text() == "new"


def test_the_lock_is_one_run_at_a_times_and_leaves_nothing(tmp_path):
    path = tmp_path / "weights" / "student.pt"
    with locked(path):
        with pytest.raises(UserError, match="another run is writing .*student.pt"), locked(path):
            raise AssertionError("two held it")
        with locked(tmp_path / "weights" / "teacher.pt"):
            pass
    with locked(path):
        pass
    assert not list(path.parent.iterdir())


def test_where_there_are_no_locks_a_run_goes_on_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "student.pt"):
        held = True
    assert held
