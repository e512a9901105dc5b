"""train.py with tiny models: the loss of the loop, the files it writes, and which runs are resumed or skipped."""

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import snapshot
from made_up import CPU

import train
import training.run
import utils
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import Stopped
from training.run import load_model
from utils import load_images, parse_log

STEM = "digits_student_subset40"


def change(path: Path, part: str, **changes) -> None:
    """Let the checkpoint or resume state at `path` be of another run or machine."""
    content = torch.load(path, weights_only=True)
    content[part] |= changes
    torch.save(content, path)


def test_plain_kd_trains_with_kd_loss_of_the_images_that_the_student_sees(learn, digits, tmp_path, monkeypatch):
    learn("--tto")
    seen, asked = [], []

    def images(views, rows, k, real=utils.Views.images):
        seen.append((rows, real(views, rows, k)))
        return seen[-1][1]

    def kd_loss(student, teacher, targets, temp, alpha):
        asked.append((teacher, targets, temp, alpha))
        return 0 * student.sum() + 123.0

    teacher = load_model(checkpoint.load(tmp_path / "weights" / "digits_teacher_subset40.pt"), CPU)
    labels = load_images("digits", digits, CPU).train.labels
    monkeypatch.setattr(utils.Views, "images", images)
    monkeypatch.setattr(utils, "kd_loss", kd_loss)
    learn("--kd", "--temp=3", "--alpha=0.7", "--num_epochs=2")
    batches = [(rows, batch) for rows, batch in seen if len(rows) == 8]  # the others are the teacher's
    assert len(batches) == len(asked) == 2 * 5
    for (rows, batch), (logits, targets, *numbers) in zip(batches, asked, strict=True):
        assert torch.equal(targets, labels[rows]) and numbers == [3.0, 0.7]
        torch.testing.assert_close(logits.float(), teacher(batch), rtol=2e-3, atol=2e-3)  # in half precision
    assert len({tuple(rows.tolist()) for rows, _ in batches}) == 10, "each epoch has an order of its own"
    _, lines = parse_log((tmp_path / "plots" / "digits_student_kd_t3_subset40.jsonl").read_text())
    assert [line["train"]["loss"] for line in lines] == [123.0, 123.0]
    assert [line["lr"] for line in lines] == pytest.approx([0.1 * 5 / 9, 0.1 / 9]), "of the next or the last step"
    assert all(line["train"]["ce"] < 10 for line in lines), "CE and KL are logged as they are"
    learn()
    learn("--kd", "--loss", "ls")
    assert len(asked) == 10, "no other loss is kd_loss"
    seen.clear()
    learn("--holdout=8", "--omit=5")
    rows = torch.cat([rows for rows, _ in seen])
    assert len(rows) == 24 and rows.max() < 32 and not (labels[rows] == 5).any()


def test_bf16_learns_what_float32_learns_within_a_hosts_autocast_too(learn, tmp_path):
    losses = []
    for precision in ("fp32", "bf16", "bf16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=len(losses) == 2):
            learn(f"--precision={precision}", "--num_epochs=6", "--resume=False")
        _, lines = parse_log((tmp_path / "plots" / f"{STEM}.jsonl").read_text())
        losses.append([line["train"]["loss"] for line in lines])
    assert losses[0][-1] < 0.9 * losses[0][0] and losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_images_have_the_devices_memory_format_and_convolutions_the_runs_precision(learn, monkeypatch):
    """On MPS, batch norm computes wrong gradients of channels_last."""
    found = set()

    def forward(convolution, images, real=torch.nn.Conv2d.forward):
        result = real(convolution, images)
        found.add((images.is_contiguous(), result.dtype))
        return result

    monkeypatch.setattr(Runtime, "memory_format", torch.contiguous_format)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found.clear()
        learn(f"--precision={word}", "--resume=False")
        assert found == {(True, dtype)}


def test_with_compile_each_step_is_the_compiled_models_and_the_time_of_compiling_counts(learn, tmp_path, monkeypatch):
    clock, step_seconds = [0.0], chain([100.0], repeat(1.0))

    def compiled(model, dynamic):
        def forward(images):
            clock[0] += next(step_seconds)
            return model(images)

        return forward

    def untimed(function):
        def later(*arguments):
            clock[0] += 1000.0
            return function(*arguments)

        return later

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(training.run.time, "monotonic", lambda: clock[0])
    for name in ("epoch_view", "evaluate"):  # before and after the steps
        monkeypatch.setattr(train, name, untimed(getattr(train, name)))
    learn("--compile")
    _, (line,) = parse_log((tmp_path / "plots" / f"{STEM}.jsonl").read_text())
    assert (line["seconds"], line["images_per_second"]) == (104.0, 0.4)
    assert line["train"]["ce"] == line["train"]["loss"] and line["train"]["top5"] > 1, "in percent"


def test_a_run_in_a_thread_works_and_the_hosts_settings_are_restored(learn, monkeypatch):
    def settings() -> list:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [*handlers, torch.get_rng_state().tolist(), torch.get_num_threads()]

    torch.manual_seed(3)  # no run leaves this state
    before, during = settings(), []
    is_deterministic = torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(training.run.Run, "seed_step", lambda run: during.append(is_deterministic()))
    with ThreadPoolExecutor() as threads:
        assert threads.submit(learn, "--deterministic").result() and settings() == before
    assert learn("--deterministic", "--resume=False") and settings() == before
    assert during == [True] * 10


def test_a_finished_run_is_skipped_even_of_another_machine_and_not_overwritten_with_other_options(learn, tmp_path):
    learn()
    change(tmp_path / "weights" / f"{STEM}.pt", "machine", torch="2.11.0", device="another processor, 96 threads")
    before, output = snapshot(tmp_path), learn()
    assert re.search(f"{STEM}: already finished .*skipping; --resume False", output) and snapshot(tmp_path) == before
    error = learn("--lr=0.3", "--num_epochs=2", code=2)
    assert "finished run with num_epochs 1, not 2; lr 0.1, not 0.3" in error
    assert "--name" in error and "--resume False" in error and snapshot(tmp_path) == before
    assert learn("--lr=0.3", "--name=lr03") and before.items() <= snapshot(tmp_path).items()
    learn("--lr=1e20", "--resume=False", code=2)  # the loss is not finite
    assert checkpoint.load(tmp_path / "weights" / f"{STEM}.pt")["run"]["lr"] == 0.1, "until the new run has ended"
    learn("--lr=0.3", "--resume=False", "--precision=auto")
    run = checkpoint.load(tmp_path / "weights" / f"{STEM}.pt")["run"]
    assert run["lr"] == 0.3 and run["precision"] in ("bf16", "fp32"), "what auto was"
    change(tmp_path / "weights" / f"{STEM}.pt", "run", dropout=0.5)
    assert f"{STEM}.pt was saved by code with other settings, losses or data sets: use" in learn("--lr=0.3", code=2)


@pytest.fixture
def stopped(learn, monkeypatch, tmp_path):
    """The path of the resume state of a run that was stopped after two steps."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_or_stop", Mock(side_effect=[None, Stopped(15)]))  # called after each step
        patch.setattr(train.Progress, "step", Mock(side_effect=[None, BrokenPipeError]))  # Ctrl-C ended a `tee`, too
        learn(code=128 + 15)
    return tmp_path / "weights" / f"{STEM}.last.pt"


def test_a_run_resumes_elsewhere_and_says_that_the_result_may_differ(stopped, learn):
    machine, run = {"torch": "2.11", "device": "another"}, {"processes": 2, "sync_bn": True}
    change(stopped, "machine", **machine)
    change(stopped, "run", **run)
    line = learn().splitlines()[0]
    assert line.startswith(f"resuming weights/{STEM}.last.pt at epoch 1, step 2/5") and "the result may differ" in line
    assert all(f"{name} {value}, not " in line for name, value in (machine | run).items())
    finished = checkpoint.load(stopped.with_name(f"{STEM}.pt"))
    assert finished["run"]["processes"] == 1 and finished["machine"]["torch"] == torch.__version__
    assert not stopped.exists()


def test_an_unfinished_run_with_other_options_is_not_resumed(stopped, learn):
    change(stopped, "run", lr=0.3, processes=2)
    before, error = stopped.read_bytes(), learn(code=2)
    assert "lr 0.3, not " in error and "--resume False" in error
    assert stopped.read_bytes() == before
    assert learn("--resume=False") and not stopped.exists()
