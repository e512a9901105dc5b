"""Two processes through torchrun's own launcher: the same result as one, one voice, one writer."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import train
from config import parse_train
from datasets import DATASETS
from models import build_model
from runtime.device import Runtime
from runtime.files import locked
from utils import evaluate, load_images

SPEC = DATASETS["digits"]
SUBSET = 85  # 17 test images, which two processes can't share evenly
# Two halves of a batch sum up to a rounding error beside the whole, which training then amplifies: few steps and a low
# learning rate keep it small. Measured with --sync_bn: 8e-6 for any weight or running statistic; without: 4e-2 for a
# statistic, 4e-4 for a weight.
TOLERANCE = 5e-5


@pytest.fixture
def options(digits):
    """A function from a folder to the options of a student's run of 2 epochs of 5 steps that writes there."""

    def of(folder: Path, *more: str) -> list[str]:
        size = [f"--subset={SUBSET}", "--batch_size=16", "--num_epochs=2", "--lr=0.001", "--dataset=digits"]
        place = [f"--data_path={digits}", f"--weights_path={folder}", f"--plots_path={folder}"]
        return [*size, *place, "--device=cpu", "--precision=fp32", *more]

    return of


def launch(arguments: list[str], processes: int = 2) -> subprocess.Popen:
    """`torchrun --nproc_per_node=2 train.py ARGUMENTS`, started."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(REPOSITORY / "train.py"), *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends its processes too
        process.wait(60)
        raise
    return process.returncode, stdout, stderr


def checkpoint_of(arguments: list[str]) -> dict:
    return torch.load(parse_train(arguments).checkpoint_path, weights_only=True)


def epochs_of(arguments: list[str]) -> list[dict]:
    return [json.loads(line) for line in parse_train(arguments).log_path.read_text().splitlines()[1:]]


def distance(one: dict, other: dict, word: str = "") -> float:
    """The largest difference of two checkpoints' weights and running statistics with `word` in their names."""
    pairs = ((one["model"][name].double(), other["model"][name].double()) for name in one["model"] if word in name)
    return max((a - b).abs().max().item() for a, b in pairs)


def flat_metrics(line: dict) -> list[float]:
    return [*line["train"].values(), *line["test"].values(), line["lr"]]


def test_two_processes_train_what_one_does_if_batch_norm_is_synchronised(tmp_path, options):
    alone, synced, unsynced = (options(tmp_path / name) for name in ("alone", "synced", "unsynced"))
    running = [launch([*synced, "--sync_bn", "True"])]
    assert train.main(alone) == 0
    code, stdout, stderr = finish(running[0])
    assert code == 0, stderr
    apart = distance(checkpoint_of(synced), checkpoint_of(alone))
    assert apart < TOLERANCE

    # Every count is over all images, each once, on two processes as on one.
    for one, two in zip(epochs_of(alone), epochs_of(synced), strict=True):
        assert flat_metrics(two) == pytest.approx(flat_metrics(one), abs=1e-3)
    # Only the first process speaks and writes.
    assert stdout.count("epoch 1/2:") == stdout.count("saved ") == stdout.count("next: ") == 1
    names = {path.name for path in (tmp_path / "synced").iterdir()}
    assert names == {path.name for path in (tmp_path / "alone").iterdir()}

    # The tolerance has teeth: without --sync_bn the same commands end far apart.
    code, _, stderr = finish(launch(unsynced))
    assert code == 0, stderr
    for word in ("weight", "running"):
        assert distance(checkpoint_of(unsynced), checkpoint_of(alone), word) > 4 * TOLERANCE
    # Each process has batch norm statistics of its own then, but what was evaluated is what was saved.
    student = build_model("student")
    student.load_state_dict(checkpoint_of(unsynced)["model"])
    test_images = load_images(SPEC, parse_train(alone).data_path, SUBSET)[1]
    found = evaluate(student, test_images, SPEC, Runtime(torch.device("cpu"), None))
    logged = epochs_of(unsynced)[-1]["test"]
    expected = [found["loss"], 100 * found["top1"], 100 * found["top5"]]
    assert [logged[name] for name in ("loss", "top1", "top5")] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("who", ["each process", "the first process"])
def test_an_error_is_one_line_for_all_processes(tmp_path, options, who):
    if who == "each process":
        code, stdout, stderr = finish(launch(options(tmp_path, "--kd", "True")))
        expected = "train one with `python train.py --tto True"
    else:  # the others are waiting for it and must not say that they lost it
        arguments = options(tmp_path)
        with locked(parse_train(arguments).checkpoint_path):
            code, stdout, stderr = finish(launch(arguments))
        expected = "another run is writing"
    assert code != 0 and not stdout
    assert stderr.count("train.py: error: ") == 1 and expected in stderr
    assert 'train.py", line' not in stderr, stderr  # torchrun shows a traceback of its own
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pt", ".jsonl")]


def test_a_stopped_run_of_two_goes_on_as_one(tmp_path, options):
    more = ("--num_epochs=8", "--batch_size=40", "--sync_bn=True")  # 16 steps
    stopped, whole = options(tmp_path / "stopped", *more), options(tmp_path / "whole", *more)
    process = launch(stopped)
    log_path = parse_train(stopped).log_path
    deadline = time.monotonic() + 120
    while not log_path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    code, stdout, stderr = finish(process)
    assert code != 0 and stdout.count("saved ") == 1, stdout + stderr
    assert stderr.count("the same command goes on from here") == 1
    assert not parse_train(stopped).checkpoint_path.exists() and len(epochs_of(stopped)) < 8

    assert train.main(stopped) == train.main(whole) == 0
    assert distance(checkpoint_of(stopped), checkpoint_of(whole)) < 2 * TOLERANCE  # more steps, more rounding
    lines = zip(epochs_of(stopped), epochs_of(whole), strict=True)
    for one, other in lines:
        assert flat_metrics(one)[:2] == pytest.approx(flat_metrics(other)[:2], abs=0.01)
