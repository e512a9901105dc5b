"""A download that is cut, a disk that is full: one line, nothing lost, and a later run recovers."""

import os
import re
import signal
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import assert_one_line, snapshot
from damages import QUICK, link_data
from kill_marathon import wait
from made_up import TinyTeacher, save_run

# ------------------------------------------------------------------------------ a download cut in the middle


class CutShort(socketserver.StreamRequestHandler):
    """Promise the archive, send a part of it and close the connection."""

    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 170498071\r\n\r\n" + bytes(100_000))


def test_a_cut_download_is_no_data_and_a_later_run_recovers(tmp_path, cifar10, forked):
    command = ["train.py", "--subset=16", "--batch_size=8", "--num_epochs=1", "--device=cpu"]
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), CutShort) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/cifar-10-python.tar.gz"
        done = forked(*command, folder=tmp_path, url=url)
        server.shutdown()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("train.py: error: no whole CIFAR10 in data/cifar-10-batches-py")
    assert url in line
    again = forked(*command, folder=tmp_path)
    assert_one_line(again, "no whole CIFAR10 in data/cifar-10-batches-py")  # what came is not taken for the data
    assert not (tmp_path / "weights").exists()
    link_data(tmp_path, cifar10)
    done = forked(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights" / "student_subset16.pt").exists()


# ------------------------------------------------------------------------------ a disk that is full


def quick(digits: Path, *more: str) -> list[str]:
    return ["train.py", *QUICK.format(digits=digits).split(), *more]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system with room for 3 MB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(small_disk, tmp_path, digits, forked):
    (small_disk / "digits_student_subset40.pt").write_bytes(b"finished before" * 100_000)
    before = snapshot(small_disk)
    done = forked(*quick(digits), "--weights_path", small_disk, "--save_seconds=0", folder=tmp_path)
    assert_one_line(done, rf"can't write {small_disk}/digits_student_subset40.last.pt: .*unchanged")
    after = snapshot(small_disk)
    assert before.items() <= after.items()
    assert not [path for path in after if path.endswith(".tmp")]


@pytest.mark.parametrize(
    ("file_size", "tells"),
    [
        (500_000, r"can't write weights/digits_student_subset40.last.pt: .*unchanged"),
        (400, "can't write plots/.*unchanged"),
    ],
    ids=["checkpoint", "log"],
)
def test_a_refused_write_leaves_what_was_there(file_size, tells, tmp_path, digits, forked):
    done = forked(*quick(digits), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    before = snapshot(tmp_path)
    done = forked(*quick(digits, "--lr=0.2"), folder=tmp_path, file_size=file_size)
    assert_one_line(done, tells)
    after = snapshot(tmp_path)
    assert (
        before[f"{tmp_path}/weights/digits_student_subset40.pt"]
        == after[f"{tmp_path}/weights/digits_student_subset40.pt"]
    )
    log = before[f"{tmp_path}/plots/digits_student_subset40.jsonl"]  # begun anew where the log is not what was refused
    assert after[f"{tmp_path}/plots/digits_student_subset40.jsonl{'.previous' if file_size > 1000 else ''}"] == log
    assert not [path for path in after if path.endswith(".tmp")]
    done = forked(*quick(digits, "--lr=0.2"), folder=tmp_path)
    assert done.returncode == 0, "there is room again: " + done.stderr


def test_no_room_for_the_teacher_cache_costs_the_cache_alone(tmp_path, digits, start_script):
    save_run(tmp_path / "weights", "--tto --dataset=digits --subset=2000", model=TinyTeacher())
    # 2,000 x 162 x 11 numbers of 2 bytes are 7.1 MB: more than any other file that the run writes.
    words = quick(digits, "--kd", "--subset=2000", "--num_epochs=1000", "--views=81")
    script = start_script(*words, folder=tmp_path, file_size=6_000_000, tiny=True)
    wait(lambda: "going on without it" in script.read("stdout"), script)
    os.kill(script.pid, signal.SIGTERM)
    done = script.end()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert re.search(
        r"teacher cache: can't write weights/digits_teacher_\w+\.cache: .*going on without it", done.stdout
    )
    assert not list((tmp_path / "weights").glob("*.cache*"))
    assert (tmp_path / "weights" / "digits_student_kd_t5_subset2000.last.pt").exists()
