"""Files that are never half written, locks on them, and checkpoints, which are read as written or refused in a line."""

import errno
import fcntl
import os
import sys
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from made_up import Hostile, hostile, tiny_student

from models import build_model
from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import locked, remove, writing


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
    held = PermissionError(errno.EACCES, "Access is denied")
    replace = Mock(side_effect=[held, held, DEFAULT], wraps=os.replace)  # DEFAULT: what it wraps is called
    monkeypatch.setattr(os, "replace", replace)
    with writing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and replace.call_count == 3
    monkeypatch.setattr(os, "remove", Mock(side_effect=[held, DEFAULT, DEFAULT], wraps=os.remove))
    for _ in ("there", "gone"):
        remove(tmp_path / "file")
        assert not (tmp_path / "file").exists()


def test_a_save_is_on_the_disk_before_it_replaces_the_old_file(tmp_path, monkeypatch):
    # A kill can't show this: what a process wrote outlives it in memory. A loss of power would.
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(("fsync", os.readlink(f"/proc/self/fd/{number}"))))
    monkeypatch.setattr(os, "replace", lambda source, target: done.append(("replace", str(source))))
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


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a folder" / "b").mkdir(parents=True)
    for name, tells in ((300 * "x", "File name too long"), ("a folder", "can't write .*a folder: Is a directory")):
        with pytest.raises(UserError, match=tells), writing(tmp_path / name) as temporary:
            temporary.write_text("whole")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="can't write into .*: permission denied"), writing(tmp_path / "file"):
        raise AssertionError("it was begun")


def test_a_link_stays_and_the_file_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("old")
    for name in ("file", "not yet"):
        link, target = tmp_path / f"link to {name}", tmp_path / "elsewhere" / name
        link.symlink_to(target)
        with writing(link) as temporary:
            assert target.parent in temporary.parents, "on the disk of the file, not of the link"
            temporary.write_text("new")
        assert link.is_symlink() and target.read_text() == "new"


def test_one_run_at_a_time_holds_the_lock_and_a_file_system_without_locks_stops_none(tmp_path, monkeypatch):
    path = tmp_path / "weights" / "student.pt"
    with locked(path):
        with pytest.raises(UserError, match="another run is writing .*student.pt"), locked(path):
            raise AssertionError("two held it")
        with locked(tmp_path / "weights" / "teacher.pt"):
            pass
    with locked(path):
        pass
    assert not list(path.parent.iterdir())
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with locked(path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    denied = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=denied))
    with pytest.raises(UserError, match="another run is writing .*student.pt"), locked(path):
        raise AssertionError("another process held it")


# ----------------------------------------------------------------------------------------------- checkpoints


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    # Headers and directory of the archive included: where a flip does no harm, what is read is what was written.
    path, refused = tmp_path / "small.pt", 0
    run, weight = {"role": "student", "seed": 42, "kd_weights": (0.9,)}, torch.arange(6.0)
    checkpoint.save(path, {"run": run, "model": {"weight": weight}})
    whole = path.read_bytes()
    places = [place for place in range(len(whole)) if whole[place]]  # the rest is mostly padding
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            content = checkpoint.load(path)
        except UserError:
            refused += 1
        else:
            same = content["run"] == run and torch.equal(content["model"]["weight"], weight)
            assert same, f"bit {place % 8} of byte {place}"
    assert refused > 100, "all that a checksum is of"


STATE = tiny_student().state_dict()
ADVICE = r": train it again with --resume False \(not --all\), or give another file"
DAMAGED = "is damaged, or not a file of torch.save in PyTorch 1.6 or later" + ADVICE
FOREIGN = r"file.pt is not a checkpoint of this project \(its first key is '\S+'\)" + ADVICE
WRONG = {
    "missing": (lambda at: None, "no checkpoint .*file.pt"),
    "a link to itself": (lambda at: at.symlink_to(at), "can't read .*file.pt: Too many levels of symbolic links"),
    "a folder": (lambda at: at.mkdir(), "file.pt is a folder, not a checkpoint: give a file"),
    "text": (lambda at: at.write_text("these are my notes\n"), DAMAGED),
    "a state dict": (lambda at: torch.save(STATE, at), FOREIGN),
    "code": (hostile, "file.pt"),
    "code, old style": (lambda at: torch.save([Hostile()], at, _use_new_zipfile_serialization=False), "file.pt"),
    "a whole model": (lambda at: torch.save(tiny_student(), at), "file.pt"),
}  # fmt: skip


@pytest.mark.parametrize("write, tells", WRONG.values(), ids=WRONG)
def test_a_file_that_is_no_checkpoint_is_said_to_be_what_it_is(write, tells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file.pt")
    with pytest.raises(UserError, match=tells):
        checkpoint.load(tmp_path / "file.pt")
    assert not (tmp_path / "hacked").exists(), "code in the file was run"


@pytest.mark.parametrize("model", [STATE, {"features.0.weight": "x"}, {}, "x", None])
def test_weights_that_do_not_fit_name_the_file_and_the_model(model):
    content = {"path": "w/a.pt"} | ({} if model is None else {"model": model})
    with pytest.raises(UserError, match="w/a.pt does not fit the model StudentCNN"):
        checkpoint.load_weights(build_model("student"), content)


def test_a_fingerprint_is_of_names_numbers_and_context():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    found = checkpoint.fingerprint(weights)
    assert len(found) == 16 and int(found, 16) and found == checkpoint.fingerprint(dict(weights))
    in_other_order = weights | {"a": weights["a"].T.contiguous().T}
    assert checkpoint.fingerprint(in_other_order) == found, "the order in memory is no part of it"
    others = [weights | {"a": weights["a"] + 1e-6}, {"a": weights["a"]}, {"c": weights["a"], "b": weights["b"]}]
    prints = [found, *(checkpoint.fingerprint(other) for other in others), checkpoint.fingerprint(weights, "bf16")]
    assert len(set(prints)) == len(prints)
