"""Files that are never half written, and locks on them."""

import errno
import fcntl
import os

import pytest

from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import locked, writing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "student.pt"
    path.write_bytes(b"old")
    with writing(path) as temporary:
        assert tmp_path in temporary.parents, "a rename is atomic within one file system only"
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.rglob("*.pt")) == [path], "test.py --compare must not find the other"
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, raised in ((KeyboardInterrupt, KeyboardInterrupt), (full, UserError)):
        with pytest.raises(raised), writing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error
        assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_virus_scanner_holds_for_a_moment_is_replaced(tmp_path, monkeypatch):
    held = [PermissionError(errno.EACCES, "Access is denied")] * 2

    def replace(source, target, real=os.replace):
        if held:
            raise held.pop()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with writing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and not held


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
    checkpoint.save(tmp_path / "state.pt", {"model": {}})
    temporary = done[0][1]
    assert done == [("fsync", temporary), ("replace", temporary)]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_permissions_are_those_that_the_umask_leaves(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with writing(tmp_path / "new" / "file") as temporary:
            temporary.write_text("whole")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == mode


def test_two_runs_that_write_one_file_do_not_break_each_other(tmp_path):
    path = tmp_path / "file"
    with writing(path) as later:
        later.write_bytes(b"later")
        with writing(path) as earlier:
            earlier.write_bytes(b"earlier")
        assert path.read_bytes() == b"earlier"
    assert path.read_bytes() == b"later" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "a folder" / "b").mkdir(parents=True)
    for name, tells in ((300 * "x", "File name too long"), ("a file/x", "can't use .*a file as a folder: "),
                        ("a folder", "can't write .*a folder: Is a directory")):  # fmt: skip
        with pytest.raises(UserError, match=tells), writing(tmp_path / name) as temporary:
            temporary.write_text("whole")


def test_a_link_stays_and_the_file_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere" / "not yet")
    for path in (link, dangling):
        with writing(path) as temporary:
            assert target.parent in temporary.parents, "on the disk of the file, not of the link"
            temporary.write_text("new")
        assert path.is_symlink() and path.read_text() == "new"
    assert target.read_text() == (tmp_path / "elsewhere" / "not yet").read_text() == "new"


def test_one_run_at_a_time_holds_the_lock_and_nothing_is_left_of_it(tmp_path):
    path = tmp_path / "weights" / "student.pt"
    with locked(path):
        with pytest.raises(UserError, match="another run is writing .*student.pt"), locked(path):
            raise AssertionError("two held it")
        with locked(tmp_path / "weights" / "teacher.pt"):
            pass
    with locked(path):
        pass
    assert not list(path.parent.iterdir())


def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "student.pt"):
        pass
