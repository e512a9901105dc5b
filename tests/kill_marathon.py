"""End real runs at random moments, by hand: each, resumed until it finishes, must end bit-equal to one left alone.

    python tests/kill_marathon.py [DATA_PATH [ROUNDS [PROCESSES]]]      default: digits in ./data, 10 rounds, 1 process

It prints one line per round, and exits with code 1 if one differs. tests/training/test_resume.py ends tiny models at
chosen moments instead.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = ["--dataset=digits", "--batch_size=64", "--device=cpu", "--precision=fp32"]
RUNS = {  # in this order: the student with KD learns from the teacher
    "digits_teacher_subset128": ["--tto=True", "--subset=128", "--num_epochs=2"],
    "digits_student_subset1280": ["--subset=1280", "--num_epochs=4"],
    "digits_student_kd_t5_subset128": ["--kd=True", "--subset=128", "--num_epochs=60", "--views=4"],
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def train(folder: Path, words: list[str], processes: int, patience: float | None = None) -> int:
    """Train in a folder; with `patience`, the run gets a random signal after that many seconds. Its exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, REPOSITORY / "train.py", *words]
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = run.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        number, pid = random.choice(SIGNALS), run.pid
        if number == signal.SIGKILL and processes > 1:  # of any process; the launcher ends the others
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(random.choice(children or [pid]))
        os.kill(pid, number)
        _, errors = run.communicate()
        if "Traceback" in errors and processes == 1:
            raise AssertionError(errors) from None
        return -number
    if run.returncode:
        raise AssertionError(errors)
    return 0


def result(folder: Path, name: str) -> tuple[dict, list[dict]]:
    """The weights of a finished run, and its log without the times."""
    lines = map(json.loads, (folder / "plots" / f"{name}.jsonl").read_text().splitlines())
    log = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    return torch.load(folder / "weights" / f"{name}.pt", weights_only=True)["model"], log


def main(data_path: str = "data", rounds: str = "10", processes: str = "1") -> int:
    """Rounds of one run each; the exit code."""
    random.seed(0)
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        whole.mkdir()
        expected, seconds, commands = {}, {}, {}
        for name, words in RUNS.items():
            teacher = [f"--teacher={whole}/weights/digits_teacher_subset128.pt"] * ("_kd_" in name)
            commands[name] = [*words, *SIZE, *teacher, f"--data_path={Path(data_path).resolve()}"]
            began = time.monotonic()
            train(whole, commands[name], int(processes))
            expected[name], seconds[name] = result(whole, name), time.monotonic() - began
            print(f"{name}: {seconds[name]:.0f} s uninterrupted", flush=True)
        for i in range(int(rounds)):
            name, kills, verdict = list(RUNS)[i % len(RUNS)], 0, "bit-equal"
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                while kills < 20 and train(
                    Path(folder), commands[name], int(processes), random.uniform(2, seconds[name])
                ):
                    kills += 1
                train(Path(folder), commands[name], int(processes))
                weights, log = result(Path(folder), name)
                same = all(torch.equal(weights[key], tensor) for key, tensor in expected[name][0].items())
                if not same or log != expected[name][1]:
                    different, verdict = different + 1, "DIFFERENT"
            print(f"{i + 1:2d}  {name:32s} {kills} interruptions: {verdict}", flush=True)
    print(f"{different} of {rounds} rounds differ")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
