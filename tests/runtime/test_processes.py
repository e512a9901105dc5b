"""Two processes, once through torchrun's own launcher: the same result as one, one voice, one writer."""

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
import torch.distributed as dist
from conftest import FORKS, REPOSITORY
from torch import nn

import train
from config import parse_train
from datasets import DATASETS
from models import build_model
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.files import locked
from runtime.processes import start, sync_batch_norm
from utils import evaluate, load_images

SPEC = DATASETS["digits"]
SUBSET = 85  # 17 test images, which two processes can't share evenly
# Two halves of a batch sum up to a rounding error beside the whole, which training then amplifies, Muon more than SGD:
# its steps are of one size however small a gradient is. Few steps and a low learning rate keep it small. Measured with
# --sync_bn: 6e-5 to 1.1e-4 for any weight or running statistic, by the number of threads; without: 7e-2 for a
# statistic, 1.3e-3 for a weight.
TOLERANCE = 2e-4


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


@pytest.fixture
def pair(start_script, tmp_path):
    """A function that runs train.py in two processes, as torchrun does: exit codes, stdout and stderr of both."""

    def run(arguments: list[str]) -> tuple[list[int], str, str]:
        # As with torchrun, the store where they meet outlives them.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        scripts = [
            start_script(
                "train.py", *arguments, folder=tmp_path, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in ("0", "1")
        ]
        done = [script.end(240) for script in scripts]
        return [d.returncode for d in done], "".join(d.stdout for d in done), "".join(d.stderr for d in done)

    return run


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


def test_two_processes_train_what_one_does_if_batch_norm_is_synchronised(tmp_path, options, pair):
    alone, synced, unsynced = (options(tmp_path / name) for name in ("alone", "synced", "unsynced"))
    assert train.main(alone) == 0
    codes, stdout, stderr = pair([*synced, "--sync_bn", "True"])
    assert codes == [0, 0], stderr
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
    codes, _, stderr = pair(unsynced)
    assert codes == [0, 0], stderr
    for word in ("weight", "running"):
        assert distance(checkpoint_of(unsynced), checkpoint_of(alone), word) > 4 * TOLERANCE
    # Each process has batch norm statistics of its own then, but what was evaluated is what was saved.
    student = build_model("student")
    student.load_state_dict(checkpoint_of(unsynced)["model"])
    test_images = load_images(SPEC, parse_train(alone).data_path, "test", subset=SUBSET)[0]
    found = evaluate(student, test_images, SPEC, Runtime(torch.device("cpu"), None))
    logged = epochs_of(unsynced)[-1]["test"]
    expected = [found["loss"], 100 * found["top1"], 100 * found["top5"]]
    assert [logged[name] for name in ("loss", "top1", "top5")] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("who", ["each process", "the first process"])
def test_an_error_is_one_line_for_all_processes(tmp_path, options, pair, who):
    if who == "each process":
        codes, stdout, stderr = pair(options(tmp_path, "--kd", "True"))
        expected = "train one with `python train.py --tto True"
    else:  # the others are waiting for it and must not say that they lost it
        arguments = options(tmp_path)
        with locked(parse_train(arguments).checkpoint_path):
            codes, stdout, stderr = pair(arguments)
        expected = "another run is writing"
    assert codes == [2, 2] and not stdout
    assert stderr.count("\n") == 1 and stderr.startswith("train.py: error: ") and expected in stderr, stderr
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
    assert stderr.count("stopped; go on with `torchrun --nproc_per_node=2 train.py") == 1
    assert not parse_train(stopped).checkpoint_path.exists() and len(epochs_of(stopped)) < 8

    assert train.main(stopped) == train.main(whole) == 0
    assert distance(checkpoint_of(stopped), checkpoint_of(whole)) < 2 * TOLERANCE  # more steps, more rounding
    lines = zip(epochs_of(stopped), epochs_of(whole), strict=True)
    for one, other in lines:
        assert flat_metrics(one)[:2] == pytest.approx(flat_metrics(other)[:2], abs=0.01)


@pytest.mark.parametrize(
    "environment, tells",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but .*RANK.*: start with torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but .*MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': start with torchrun, or unset it"),
    ],
)
def test_half_of_what_torchrun_sets_is_said_to_be_missing(environment, tells, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=tells), start("cpu", "fp32"):
        raise AssertionError("it has begun")


# ---------------------------------------------------------------------------------------------- batch norm


CHANNELS = 3


def make_norm() -> nn.BatchNorm2d:
    """Batch norm whose weights and statistics are none of the usual."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(CHANNELS, momentum=0.3)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def normalise(norm: nn.Module, images: torch.Tensor, slopes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What two steps in training give: outputs, statistics and the gradients of a loss of these slopes."""
    images = images.clone(memory_format=torch.channels_last).requires_grad_()
    norm(images.detach() / 2)
    output = norm(images)
    (output * slopes).sum().backward()
    found = {"output": output, "images": images.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= {"mean": norm.running_mean, "variance": norm.running_var, "in use": norm.eval()(images)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def normalise_half(rank: int, store: Path, images: torch.Tensor, slopes: torch.Tensor, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = sync_batch_norm(nn.Sequential(make_norm()))
    half = slice(rank * len(images) // 2, (rank + 1) * len(images) // 2)
    found = normalise(model[0], images[half], slopes[half])
    results.put((rank, type(model[0]).__name__, {name: tensor.numpy() for name, tensor in found.items()}))
    dist.destroy_process_group()


@pytest.mark.parametrize("mean, tolerance", [(0.0, 1e-5), (1e4, 1e-2)])
def test_batch_norm_over_two_processes_is_that_of_the_whole_batch(mean, tolerance, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = mean + torch.randn(6, CHANNELS, 4, 4, generator=generator)
    slopes = torch.randn(images.shape, generator=generator)
    results = FORKS.Queue()
    arguments = tmp_path / "store", images, slopes, results
    processes = [FORKS.Process(target=normalise_half, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    (_, kind, first), (_, _, second) = sorted((results.get(timeout=120) for _ in processes), key=lambda one: one[0])
    for process in processes:
        process.join(60)
    assert kind == "SyncedBatchNorm"
    expected = normalise(make_norm().double(), images.double(), slopes.double())
    for name, value in expected.items():
        parts = [torch.from_numpy(part[name]) for part in (first, second)]
        if name in ("output", "images", "in use"):
            found = torch.cat(parts)
        elif name in ("weight", "bias"):
            found = sum(parts)  # DistributedDataParallel brings them together
        else:
            assert torch.equal(*parts), "both processes have the same statistics"
            found = parts[0]
        scale = mean if name == "mean" and mean else value.abs().max()
        assert (found - value).abs().max() < tolerance * scale, name
