"""Kill runs of every kind at many moments; each, started again, must end as the run that nobody touched.

    python tests/kill_marathon.py [DATA_PATH [KILLS]]     20 kills, with the digits in ./data where not told otherwise
    python tests/kill_marathon.py DATA_PATH KILLS 2       of a run of two processes under torchrun: any one by SIGKILL

It prints a line a kill, and exits with code 1 where one differs. tests/training/test_resume.py does a few of the same
kills, of smaller models.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
COMMON = ["--dataset=digits", "--batch_size=8", "--save_seconds=0", "--device=cpu", "--precision=fp32"]
STUDENT, DISTILLED, TEACHER = "digits_student_subset40", "digits_student_kd_t5_subset16", "digits_teacher_subset16"
RUNS = {
    STUDENT: ["--subset=40", "--num_epochs=3"],
    DISTILLED: ["--kd=True", "--temp=5", "--subset=16", "--num_epochs=3", "--views=2"],
    TEACHER: ["--tto=True", "--subset=16", "--num_epochs=2"],
}
# What a log says of the effort, which a killed run spends twice, and not of the result.
EFFORT = ("seconds", "images_per_second", "teacher_cache_hits")
FINISHED_BEFORE = b"an earlier run's finished checkpoint"


class Started(Protocol):
    """A run of train.py in a process of its own."""

    pid: int

    def alive(self) -> bool: ...

    def end(self) -> subprocess.CompletedProcess: ...


# ------------------------------------------------------------------------------ moments


def wait(condition: Callable[[], bool], run: Started) -> None:
    """Look often, as some moments are short; RuntimeError where the run ends before, or none comes in five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the moment did not come")
        if not run.alive():
            raise RuntimeError(f"the run ended before the moment came: {run.end().stderr}")
        time.sleep(0.0005)


def mid_save(folder: Path, name: str, run: Started) -> None:
    """While the resume state is written, be it the first time or a later one."""
    weights = folder / "weights"
    for _ in range(random.randint(1, 4)):
        wait(lambda: not any(weights.glob(f"{name}.last.pt.*.tmp")), run)
        wait(lambda: any(weights.glob(f"{name}.last.pt.*.tmp")), run)


def after_log_line(folder: Path, name: str, run: Started) -> None:
    """When an epoch's line is in the log, and the resume state does not know of it yet."""
    log = folder / "plots" / f"{name}.jsonl"
    wait(lambda: log.exists() and log.read_bytes().count(b"\n") > 1, run)


def finished_checkpoint(folder: Path, name: str, run: Started) -> None:
    """When the finished checkpoint was just put in its place, and the figures are not drawn."""
    path = folder / "weights" / f"{name}.pt"
    wait(lambda: path.stat().st_size != len(FINISHED_BEFORE), run)


def mid_epoch(folder: Path, name: str, run: Started) -> None:
    """In the second epoch, whose order and views the first one's would be if they hung on how a run began."""
    log, state = folder / "plots" / f"{name}.jsonl", folder / "weights" / f"{name}.last.pt"
    wait(lambda: log.exists() and log.read_bytes().count(b"\n") > 1, run)
    for _ in range(random.randint(1, 2)):  # saves: the first one's end, a step of the second
        before = state.stat().st_mtime_ns
        wait(lambda b=before: state.stat().st_mtime_ns != b, run)


MOMENTS = {
    "SIGKILL in mid-save": (mid_save, signal.SIGKILL),
    "SIGKILL after a log line": (after_log_line, signal.SIGKILL),
    "SIGKILL at the very end": (finished_checkpoint, signal.SIGKILL),
    "SIGKILL in mid-epoch": (mid_epoch, signal.SIGKILL),
    "SIGTERM in mid-epoch": (mid_epoch, signal.SIGTERM),
    "SIGINT in mid-epoch": (mid_epoch, signal.SIGINT),
}

# ------------------------------------------------------------------------------ one kill


def kill_and_go_on(start: Callable[[], Started], folder: Path, name: str, moment: str) -> None:
    """Start a run over an earlier one's finished checkpoint, end it at the moment, start it again until it finishes."""
    finished = folder / "weights" / f"{name}.pt"
    finished.parent.mkdir(exist_ok=True)
    finished.write_bytes(FINISHED_BEFORE)
    reach, number = MOMENTS[moment]
    run = start()
    reach(folder, name, run)
    os.kill(run.pid, number)
    done = run.end()
    expected = (-number, 1) if number == signal.SIGKILL else (128 + number,)  # torchrun's is 1
    assert done.returncode in expected, f"exit code {done.returncode}, not of {expected}: {done.stderr}"
    if number != signal.SIGKILL:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "stopped; go on with `python train.py --" in done.stderr
    assert finished.read_bytes() == FINISHED_BEFORE or reach is finished_checkpoint, "the earlier result is gone"
    if reach is finished_checkpoint and not finished.with_name(f"{name}.last.pt").exists():
        return  # it was another process that was killed, and this one had no more to do than to finish
    done = start().end()
    assert done.returncode == 0, done.stderr
    assert finished.with_name(f"{name}.pt.previous").read_bytes() == FINISHED_BEFORE, "the earlier result is gone"


def result(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """All that a finished run leaves, without the effort: its checkpoint and its log."""
    lines = [json.loads(line) for line in (folder / "plots" / f"{name}.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key not in EFFORT} for line in lines]
    content = torch.load(folder / "weights" / f"{name}.pt", weights_only=True)
    return {key: value for key, value in content.items() if key not in EFFORT}, log


def assert_same_result(folder: Path, name: str, expected: tuple[dict, list[dict]]) -> None:
    """The weights to the bit, all else in the checkpoint, each epoch once in the log, the figures, and no leavings."""
    content, log = result(folder, name)
    differing = [key for key, tensor in expected[0]["model"].items() if not torch.equal(content["model"][key], tensor)]
    assert not differing, f"weights differ: {differing}"
    assert {**content, "model": None} == {**expected[0], "model": None}, "the checkpoint's description differs"
    epochs = [line["epoch"] for line in log[1:]]
    assert epochs == list(range(1, log[0]["identity"]["num_epochs"] + 1)), f"epochs in the log: {epochs}"
    assert log == expected[1], "the log differs"
    left = {path.name for path in (folder / "weights").iterdir() if path.suffix != ".cache"}
    assert left <= {f"{name}.pt", f"{name}.pt.previous"}, f"left behind: {left}"
    figures = {path.name for path in (folder / "plots").glob("*.png*")}
    assert figures == {f"{name}_accuracy.png", f"{name}_loss.png", f"digits_comparison_{name.split('_')[-1]}.png"}, (
        f"figures: {figures}"
    )


# ------------------------------------------------------------------------------ many


class Command:
    """`python train.py ...`, or `torchrun train.py ...` in several processes, started in a folder."""

    def __init__(self, folder: Path, arguments: list[str], processes: int) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        self.process = subprocess.Popen(
            [sys.executable, *launcher * (processes > 1), REPOSITORY / "train.py", *arguments],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of several processes any one's, whose end torchrun answers with that of all."""
        pid = self.process.pid
        return int(random.choice(Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or [pid]))

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> subprocess.CompletedProcess:
        _, errors = self.process.communicate(timeout=600)
        return subprocess.CompletedProcess([], self.process.returncode, "", errors)


def main(data_path: str = str(REPOSITORY / "data"), kills: str = "20", processes: str = "1") -> int:
    random.seed(0)
    identical, start, alone = 0, partial(Command, processes=int(processes)), processes == "1"
    runs = list(RUNS) if alone else [STUDENT]
    moments = [moment for moment, (_, number) in MOMENTS.items() if alone or number == signal.SIGKILL]
    with tempfile.TemporaryDirectory() as scratch:
        expected, teacher = {}, Path(scratch, TEACHER, "weights", f"{TEACHER}.pt")
        for name in sorted(runs, key=lambda name: name != TEACHER):
            folder = Path(scratch, name)
            arguments = [*RUNS[name], *COMMON, f"--data_path={Path(data_path).resolve()}"]
            arguments += [f"--teacher={teacher}"] * (name == DISTILLED)
            folder.mkdir()
            began = time.monotonic()
            done = start(folder, arguments).end()
            assert done.returncode == 0, done.stderr
            expected[name] = arguments, result(folder, name)
            print(f"{name}: the uninterrupted run took {time.monotonic() - began:.0f} s", flush=True)
        for number in range(int(kills)):
            name, moment = runs[number % len(runs)], moments[number // len(runs) % len(moments)]
            arguments, wanted = expected[name]
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                try:
                    kill_and_go_on(partial(start, Path(folder), arguments), Path(folder), name, moment)
                    assert_same_result(Path(folder), name, wanted)
                    identical, verdict = identical + 1, "identical"
                except (AssertionError, RuntimeError, OSError) as error:
                    verdict = f"DIFFERENT: {error}"
            print(f"{number + 1:2d}  {name:29s} {moment:25s} {verdict}", flush=True)
    print(f"{identical} of {kills} identical")
    return int(identical < int(kills))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
