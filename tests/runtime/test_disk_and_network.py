"""A download that breaks off, a disk that is full: one line, nothing lost, and a later run recovers."""

import socketserver
import threading

import pytest
from conftest import assert_one_line, snapshot
from damage import QUICK, link_data


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


@pytest.mark.parametrize("file_size, tells", [(5000, "weights/{}.last.pt"), (400, "plots/{}.jsonl")])
def test_a_full_disk_leaves_all_files_as_they_were(file_size, tells, tmp_path, digits, forked):
    words, stem = QUICK.format(digits=digits).split(), "digits_student_subset40"
    again = ["train.py", *words, "--lr=0.2", "--resume=False"]
    assert forked("train.py", *words, folder=tmp_path, tiny=True).returncode == 0
    before = snapshot(tmp_path)
    done = forked(*again, folder=tmp_path, file_size=file_size, tiny=True)
    assert_one_line(done, f"can't write {tells.format(stem)}: .*unchanged")
    after = snapshot(tmp_path)
    if file_size > 400:  # the log of the new run was begun
        log = str(tmp_path / "plots" / f"{stem}.jsonl")
        assert after.pop(log) != before.pop(log)
    assert after == before
    done = forked(*again, folder=tmp_path, tiny=True)
    assert done.returncode == 0, "the disk has space again: " + done.stderr
