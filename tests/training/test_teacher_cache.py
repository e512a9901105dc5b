"""The teacher's remembered logits: exact, never confused, shared, and harmless when the disk is not."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS, room
from made_up import CLASSES, CPU, TinyTeacher, random_images
from torch import nn

import models
import train
from config import parse_train
from datasets import DATASETS
from runtime.checkpoint import save
from training import teacher_cache
from training.teacher_cache import TeacherCache, open_records
from utils import VIEWS, Views

SPEC = DATASETS["cifar10"]
COUNT = 24


def make_teacher(seed: int = 0) -> TinyTeacher:
    torch.manual_seed(seed)
    return TinyTeacher().eval().requires_grad_(False)


def make_cache(path: Path | None, teacher: nn.Module | None = None, count: int = COUNT) -> TeacherCache:
    return TeacherCache(path, teacher or make_teacher(), Views(random_images(count), SPEC), CLASSES, CPU)


def ask(cache: TeacherCache, rows: list[int], views: list[int]) -> torch.Tensor:
    rows, views = torch.tensor(rows), torch.tensor(views)
    return cache.logits(rows, views, cache.views.batch(rows, views)[0])


ROWS, PICKED = list(range(12)), [7 * row % VIEWS for row in range(12)]


# ---------------------------------------------------------------------------------------------- exact


def test_a_hit_gives_bit_for_bit_what_the_miss_gave(tmp_path):
    cache, uncached = make_cache(tmp_path / "a.cache"), make_cache(None)
    missed, direct = ask(cache, ROWS, PICKED), ask(uncached, ROWS, PICKED)
    assert cache.hit_rate() == 0 and len(cache.teacher.seen) == 1
    hit = ask(cache, ROWS, PICKED)
    assert cache.hit_rate() == 1 and len(cache.teacher.seen) == 1
    again = make_cache(tmp_path / "a.cache")
    assert torch.equal(ask(again, ROWS, PICKED), missed) and not again.teacher.seen
    assert torch.equal(hit, missed) and missed.dtype == torch.float32
    assert torch.equal(missed, direct.half().float())
    assert not torch.equal(ask(again, ROWS, [view + 1 for view in PICKED]), missed) and again.hit_rate() == 0.5


def test_half_precision_costs_at_most_its_unit_roundoff(tmp_path):
    rounded, exact = ask(make_cache(tmp_path / "a.cache"), ROWS, PICKED), ask(make_cache(None), ROWS, PICKED)
    assert 0 < ((rounded - exact) / exact).abs().max() <= 2**-11
    soft, soft_exact = (torch.softmax(logits / 5, dim=1) for logits in (rounded, exact))
    assert (soft - soft_exact).abs().max() < 1e-4


def test_logits_of_a_real_teacher_hardly_depend_on_the_batch(tmp_path):
    torch.manual_seed(0)
    teacher = models.build_model("teacher").to(memory_format=torch.channels_last)
    cache = make_cache(None, teacher, count=8)
    images = cache.views.batch(torch.arange(8), torch.arange(8))[0]
    with torch.no_grad():
        teacher.train()(images)  # running statistics of these images, so that the logits differ from one another
    teacher.eval()
    padded = cache.compute_padded(images)
    with torch.inference_mode():
        alone = torch.cat([teacher(image[None]) for image in images])
    assert ((padded - alone).abs().max() / alone.std()) < 1e-4  # half precision itself: 5e-4


# ---------------------------------------------------------------------------------------------- never confused


def test_zeros_are_not_taken_for_logits_and_logits_may_be_zero(tmp_path):
    teacher = make_teacher()
    teacher.classifier.weight.zero_()
    teacher.classifier.bias.zero_()
    cache = make_cache(tmp_path / "a.cache", teacher)
    assert not cache.records.any()  # as the disk gave it
    for expected in (0.0, 1.0):
        assert torch.equal(ask(cache, ROWS, PICKED), torch.zeros(len(ROWS), CLASSES))
        assert cache.hit_rate() == expected


def test_only_what_is_missing_is_computed(tmp_path):
    cache = make_cache(tmp_path / "a.cache")
    ask(cache, ROWS[::2], PICKED[::2])
    cache.hit_rate()
    cache.teacher.seen.clear()
    filled = ask(cache, ROWS, PICKED)
    assert cache.hit_rate() == 0.5
    missing = torch.tensor(ROWS[1::2]), torch.tensor(PICKED[1::2])
    (seen,) = cache.teacher.seen
    assert len(seen) == 8, "six are missing"
    assert torch.equal(seen[: len(missing[0])], cache.views.batch(*missing)[0])
    assert torch.equal(filled, ask(make_cache(None), ROWS, PICKED).half().float())


def test_forward_passes_come_in_few_sizes():
    cache = make_cache(None)
    images = cache.views.batch(torch.zeros(200, dtype=torch.int64), torch.zeros(200, dtype=torch.int64))[0]
    for count in (1, 3, 32, 33, 128, 129, 200):
        logits = cache.compute_padded(images[:count])
        assert logits.shape == (count, CLASSES)
        assert cache.teacher.seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert [len(seen) for seen in cache.teacher.seen] == [2, 8, 32, 64, 128, 160, 224]


def test_a_batch_that_is_all_new_is_computed_as_it_is(tmp_path):
    for path in (None, tmp_path / "a.cache"):
        cache = make_cache(path)
        ask(cache, ROWS, PICKED)
        assert [len(seen) for seen in cache.teacher.seen] == [len(ROWS)], "padded to 32 it would cost more than twice"


@pytest.mark.parametrize("first, last", [(0, 1), (3, 7), (10, 11), (5, 11)])
def test_a_torn_record_is_computed_again(tmp_path, first, last):
    """Words `first` to `last` of eleven never reached the disk: they hold zeros, or what was there before."""
    cache = make_cache(tmp_path / "a.cache")
    whole = ask(cache, ROWS, PICKED)
    other = ask(make_cache(tmp_path / "b.cache", make_teacher(seed=1)), ROWS, PICKED)
    for words in (0, other.half().numpy().view(np.uint16)[3, 0]):
        cache.hit_rate()
        cache.records[ROWS[3], PICKED[3], first:last] = words
        again = make_cache(tmp_path / "a.cache")
        assert torch.equal(ask(again, ROWS, PICKED), whole)
        assert again.misses == 1 and again.hits == len(ROWS) - 1
        assert torch.equal(ask(cache, ROWS, PICKED), whole) and cache.hit_rate() == 1


@pytest.mark.parametrize("flip", [True, False])
def test_a_limit_leaves_a_place_for_its_views_alone(flip, tmp_path):
    views = Views(random_images(COUNT), replace(SPEC, flip=flip), limit=5)
    cache = TeacherCache(tmp_path / "a.cache", make_teacher(), views, CLASSES, CPU)
    assert (tmp_path / "a.cache").stat().st_size == COUNT * 5 * (CLASSES + 1) * 2
    rows, whole = list(range(COUNT)), {}
    for column in range(5):
        whole[column] = ask(cache, rows, views.allowed[:, column].tolist())
        assert cache.hit_rate() == 0, "each view has a place of its own"
    for column in range(5):
        assert torch.equal(ask(cache, rows, views.allowed[:, column].tolist()), whole[column])
        expected = ask(make_cache(None), rows, views.allowed[:, column].tolist())
        assert torch.equal(whole[column], expected.half().float())
    assert cache.hit_rate() == 1


def test_a_large_file_is_said_before_it_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache, "WORTH_SAYING", COUNT * VIEWS * (CLASSES + 1) * 2 - 1)

    said = []

    def open_records(path, shape, real=teacher_cache.open_records):
        said.append((path.name, path.exists(), "0.0 GB" in capsys.readouterr().out))
        return real(path, shape)

    monkeypatch.setattr(teacher_cache, "open_records", open_records)
    for _ in range(2):
        make_cache(tmp_path / "a.cache")
    make_cache(tmp_path / "b.cache", count=COUNT - 1)
    once_and_not_of_a_small_one = [("a.cache", False, True), ("a.cache", True, False), ("b.cache", False, False)]
    assert said == once_and_not_of_a_small_one


# ---------------------------------------------------------------------------------------------- shared


def fill(path: Path, start, name: str, results) -> None:
    """In a process of its own: ask for every image in many views at the same time as another process."""
    torch.set_num_threads(1)
    start.wait(60)
    cache = make_cache(path)
    order = np.random.default_rng(hash(name) % 1000).permutation(40)
    logits = {int(view): ask(cache, list(range(COUNT)), [int(view)] * COUNT).numpy() for view in order}
    results.put((name, logits))


def test_two_processes_share_the_file(tmp_path):
    path, start, results = tmp_path / "a.cache", FORKS.Barrier(2), FORKS.Queue()
    processes = [FORKS.Process(target=fill, args=(path, start, name, results)) for name in ("one", "two")]
    for process in processes:
        process.start()
    got = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    after = make_cache(path)
    for view in range(40):
        here = ask(after, list(range(COUNT)), [view] * COUNT).numpy()
        assert np.array_equal(got["one"][view], here) and np.array_equal(got["two"][view], here)
    assert after.misses == 0


def test_a_file_that_another_process_is_still_making_is_the_same_file(tmp_path):
    path, shape = tmp_path / "a.cache", (3, VIEWS, CLASSES + 1)
    path.write_bytes(bytes(100))
    inode = path.stat().st_ino
    ours, theirs = open_records(path, shape), open_records(path, shape)
    ours[2, 161, 10] = 7
    assert theirs[2, 161, 10] == 7 and path.stat().st_ino == inode and path.stat().st_size == ours.nbytes


# ---------------------------------------------------------------------------------------------- no place to write


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path, capsys):
    with room(10_000):
        cache = make_cache(tmp_path / "a.cache")
    said = capsys.readouterr().out
    assert "going on without it" in said and str(tmp_path / "a.cache") in said and said.count("\n") == 1
    for _ in range(2):
        # As they would be in the file, so that the run's result is the same.
        assert torch.equal(ask(cache, ROWS, PICKED), ask(make_cache(None), ROWS, PICKED).half().float())
    assert cache.hit_rate() == 0 and not list(tmp_path.iterdir())


def test_a_place_for_no_file_is_said_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # which to open would wait for a reader
    for name in ("file/a.cache", "folder", "pipe"):
        cache = make_cache(tmp_path / name)
        assert capsys.readouterr().out.endswith("; going on without it\n")
        assert ask(cache, ROWS, PICKED).shape == (len(ROWS), CLASSES)


# ---------------------------------------------------------------------------------------------- through train.main


@pytest.fixture
def distil(tiny_models, tmp_path, monkeypatch):
    """A function that runs train.main on random images and tiny models, and returns the checkpoint's path."""
    teachers = []
    load_teacher = train.load_teacher

    def keep_teacher(*arguments):
        loaded = load_teacher(*arguments)
        teachers.append((loaded[0], copy.deepcopy(loaded[0].state_dict())))
        return loaded

    monkeypatch.setattr(train, "finish", lambda run: save(run.options.checkpoint_path, run.state()))  # no figures
    monkeypatch.setattr(train, "load_images", lambda *_, **which: [random_images(40), random_images(8, seed=1)])
    monkeypatch.setattr(train, "load_teacher", keep_teacher)

    def run(*arguments: str) -> Path:
        command = ["--num_epochs=2", "--batch_size=8", "--device=cpu", "--precision=fp32", "--resume=False"]
        command += [f"--weights_path={tmp_path}", f"--plots_path={tmp_path / 'plots'}", *arguments]
        assert train.main(command) == 0
        return parse_train(command).checkpoint_path

    run.teachers = teachers
    return run


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_distillation_leaves_the_teacher_as_it_was(distil):
    distil("--tto")
    for extra in ([], ["--cache_teacher=False"]):
        distil("--kd", *extra)
        teacher, before = distil.teachers.pop()
        after = teacher.state_dict()
        assert teacher.seen and before.keys() == after.keys() and "features.1.running_mean" in before
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(module.training for module in teacher.modules())
        assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_warm_cache_changes_no_bit_of_the_student_and_no_cache_hardly_one(distil):
    distil("--tto")
    student = ("--kd", "--lr=0.02")  # batches of 8 make much of a rounding
    cold, computed = weights_of(distil(*student)), len(distil.teachers[-1][0].seen)
    warm, computed_again = weights_of(distil(*student)), len(distil.teachers[-1][0].seen)
    assert computed == 10 and computed_again == 0
    assert all(torch.equal(cold[name], warm[name]) for name in cold)
    without = weights_of(distil(*student, "--cache_teacher=False"))
    for name in cold:
        torch.testing.assert_close(without[name], cold[name], rtol=0, atol=2e-3)
    other = weights_of(distil(*student, "--temp=1"))
    assert len(distil.teachers[-1][0].seen) == 0  # another temperature, the same logits
    assert not torch.allclose(other["classifier.weight"], cold["classifier.weight"], rtol=0, atol=2e-3)


def test_other_views_have_another_file(distil, tmp_path):
    distil("--tto")
    for number, limit in enumerate((16, 2, 162)):
        distil("--kd", f"--views={limit}")
        assert len(distil.teachers[-1][0].seen) == 10 and len(list(tmp_path.glob("*.cache"))) == number + 1
    assert max(path.stat().st_size for path in tmp_path.glob("*.cache")) == 40 * VIEWS * (CLASSES + 1) * 2


def test_another_teacher_has_another_file(distil, tmp_path):
    distil("--tto")
    distil("--kd")
    (first,) = tmp_path.glob("*.cache")
    content = first.read_bytes()
    distil("--tto", "--seed=1")
    distil("--kd", f"--teacher={tmp_path / 'teacher_seed1.pt'}")
    assert len(distil.teachers[-1][0].seen) == 10
    assert len(list(tmp_path.glob("*.cache"))) == 2 and first.read_bytes() == content
    assert first.stat().st_size == 40 * 16 * (CLASSES + 1) * 2, "a place for each view that an image is left"


def test_a_first_step_that_was_all_compiling_has_no_speed_to_show(distil, monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(
        train.Progress, "step", lambda _: True
    )  # a compilation takes longer than the 30 s between lines
    distil("--compile")
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("compiled in ") for line in lines)
    assert sum("img/s lr" in line for line in lines) == 2 * 5 - 1
