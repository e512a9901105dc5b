"""Where a run runs: the device of each process, and what the processes share."""

import pytest
import torch
import torch.distributed as dist

from runtime.device import Runtime, device_title, pick_device
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("auto", {}, "cuda:0"),
        ("cuda", {}, "cuda:0"),
        ("cuda:1", {}, "cuda:1"),
        ("cpu", {}, "cpu"),
        ("auto", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cuda:1"),
        ("cpu", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "9"}, "cpu"),
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}, "3 processes need a device each.* gives 2"),
        ("cuda:1", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes need a device each.* gives 1"),
        ("cuda:2", {}, "has 2 CUDA devices"),
        ("mps", {}, "mps"),
        ("mps", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes need a device each.* gives 1"),
    ],
)
def test_each_process_has_a_device_of_its_own_with_its_number(name, environment, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            pick_device(name)
    else:
        assert str(pick_device(name)) == expected  # torch.cuda.set_device refuses one without its number


def test_a_total_leaves_the_processes_own_values_alone(monkeypatch):
    """What a run sums up goes on growing after a save, so that the sum over processes must not be put in its place."""
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.mul_(2))  # the other process has the same
    runtime = Runtime(torch.device("cpu"), None, rank=0, world_size=2)
    for dtype in (torch.float64, torch.float32, torch.int64):  # float64 on the CPU needs no conversion
        own = torch.tensor([1, 2, 3], dtype=dtype)
        assert runtime.total(own).tolist() == [2, 4, 6] and runtime.total(own).dtype == torch.float64
        assert own.tolist() == [1, 2, 3]
    alone = Runtime(torch.device("cpu"), None)
    own = torch.ones(2, dtype=torch.float64)
    alone.total(own).zero_()
    assert own.tolist() == [1, 1]


def test_a_processor_and_what_sits_beside_it_have_two_titles():
    titles = [device_title(Runtime(torch.device(kind), None)) for kind in ("cpu", "mps")]
    assert "thread" in titles[0] and titles[1].endswith(", MPS")
