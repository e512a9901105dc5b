"""A training under way: what its processes share, and what they show."""

import pytest
import torch
import torch.distributed as dist
from made_up import options_of, random_images

import train
import training.run
from datasets import DATASETS
from runtime.device import Runtime
from runtime.errors import UserError
from training.run import Run
from utils import Views

VIEWS = Views(random_images(40), DATASETS["cifar10"])


@pytest.fixture
def make_run(tiny_models, tmp_path, monkeypatch):
    """A function that makes a run of 5 steps an epoch, as the first of a number of processes that are all alike."""
    monkeypatch.setattr(training.run, "DistributedDataParallel", lambda model: model)

    def make(world_size: int = 1, command: str = "") -> Run:
        monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(world_size))
        folders = f"--weights_path={tmp_path} --plots_path={tmp_path}"
        options = options_of(f"--batch_size=8 --num_epochs=2 --lr=0.1 {folders} {command}")
        run = Run(options, Runtime(torch.device("cpu"), None, 0, world_size), VIEWS)
        run.clock = 0.0
        return run

    return make


def step(run: Run, right: int) -> None:
    """A step of which each process counts 8 / world size images."""
    count = run.batch_size // run.runtime.world_size
    correct = torch.tensor([right / run.runtime.world_size, count], dtype=torch.float64)
    run.record(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.5), correct, count)


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_epochs_sums_are_shared_out_among_its_processes(before, after, make_run):
    run = make_run(before)
    run.log.begin({})
    for right in (4, 6):
        step(run, right)
    own = run.totals.clone()
    run.save()
    assert torch.equal(run.totals, own), "a save adds nothing to a process's own sums"
    again = make_run(after)
    again.restore()
    assert (again.epoch, again.step) == (0, 2)
    assert again.runtime.total(again.totals).tolist() == [32, 16, 8, 10, 16]
    assert "loss 2.000 top1 62.50%" in train.running_text(again)
    step(again, 8)
    assert "top1 75.00%" in train.running_text(again)
    assert again.runtime.total(again.totals).tolist() == [48, 24, 12, 18, 24]


def test_processes_must_share_a_batch_evenly(make_run):
    with pytest.raises(UserError, match="3 processes can't share batches of 8: give a multiple"):
        make_run(3)
    with pytest.raises(UserError, match="64 processes can't share batches of 64"):
        make_run(64, "--batch_size=64")  # of 40 images
    assert make_run(4).batch_size == 8 and make_run(1, "--batch_size=64").batch_size == 40


def test_the_time_left_is_told_however_long_it_is(make_run):
    run = make_run()
    run.log.begin({})
    step(run, 4)
    run.seconds = 4.0
    assert train.running_text(run).endswith("2 img/s lr 0.1000 left 0:00:36")
    run.seconds = 1e300
    assert train.running_text(run).endswith("left for ever")


def test_a_loss_that_is_not_finite_names_its_first_step(make_run):
    run = make_run()
    for loss in (1.0, 2.0, float("inf"), float("nan")):
        run.record(torch.tensor(loss), *torch.zeros(2), torch.zeros(2), 8)
    with pytest.raises(
        UserError, match=r"the loss is inf at epoch 1, step 3, .*`python train.py .*--lr 0.01 --resume.*`"
    ):
        run.check_finite()
