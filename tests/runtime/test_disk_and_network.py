"""A download that breaks off, a disk that is full: one line, nothing lost, and a later run recovers."""

import socketserver
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import assert_one_line, snapshot
from damages import QUICK, link_data


class BreaksOff(socketserver.StreamRequestHandler):
    """Promise the archive, send a part of it and close the connection."""

    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 170498071\r\n\r\n" + bytes(100_000))


def test_a_download_that_breaks_off_leaves_no_data_and_a_later_run_recovers(tmp_path, cifar10, forked):
    command = ["train.py", "--subset=16", "--batch_size=8", "--num_epochs=1", "--device=cpu"]
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), BreaksOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/cifar-10-python.tar.gz"
        done = forked(*command, folder=tmp_path, url=url)
        server.shutdown()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"train.py: error: no complete CIFAR10 in data, and the download from {url} failed: ")
    again = forked(*command, folder=tmp_path)
    assert_one_line(again, "no complete CIFAR10 in data")  # the part that came is not taken for the data
    assert not (tmp_path / "weights").exists()
    link_data(tmp_path, cifar10)
    done = forked(*command, folder=tmp_path, tiny=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights" / "student_subset16.pt").exists()


def quick(digits: Path, *more: str) -> list[str]:
    return ["train.py", *QUICK.format(digits=digits).split(), *more]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_all_files_as_they_were(small_disk, tmp_path, digits, forked):
    (small_disk / "another_run.pt").write_bytes(b"weights" * 300_000)
    before = snapshot(small_disk)
    done = forked(*quick(digits), "--weights_path", small_disk, folder=tmp_path)
    assert_one_line(done, rf"can't write {small_disk}/digits_student_subset40.last.pt: .*unchanged")
    assert snapshot(small_disk) == before


@pytest.mark.parametrize(
    ("file_size", "tells"),
    [
        (5000, r"can't write weights/digits_student_subset40.last.pt: .*unchanged"),
        (400, "can't write plots/digits_student_subset40.jsonl: .*unchanged"),
    ],
    ids=["checkpoint", "log"],
)
def test_a_write_that_fails_leaves_what_was_there(file_size, tells, tmp_path, digits, forked):
    done = forked(*quick(digits), folder=tmp_path, tiny=True)
    assert done.returncode == 0, done.stderr
    before = snapshot(tmp_path)
    log = str(tmp_path / "plots" / "digits_student_subset40.jsonl")
    again = quick(digits, "--lr=0.2", "--resume=False")
    assert_one_line(forked(*again, folder=tmp_path, file_size=file_size, tiny=True), tells)
    after = snapshot(tmp_path)
    if file_size > 400:  # the log of the new run was begun
        assert after.pop(log) != before.pop(log)
    assert after == before
    done = forked(*again, folder=tmp_path, tiny=True)
    assert done.returncode == 0, "the disk has space again: " + done.stderr
