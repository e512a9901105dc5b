"""Loaders, loss, metrics and curves, each against a formula or a library written by others."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as vision
from made_up import random_images, run_of, write_log

import utils
from datasets import DATASETS, OFFSETS, PAD, SIDE
from runtime.errors import UserError
from utils import VIEWS, Normaliser, Views, kd_loss, load_images, plot_curves, topk_correct

SPEC = DATASETS["cifar10"]


def random_logits(batch: int = 6, classes: int = 10, scale: float = 4.0, seed: int = 0):
    """Student's and teacher's logits (B, C) in float64 and targets (B,)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, classes, (batch,), generator=generator)


# ---------------------------------------------------------------------------------------------- loss


def numpy_softmax(logits: np.ndarray, temp: float) -> np.ndarray:
    powers = np.exp(logits / temp - (logits / temp).max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def numpy_kd_loss(student, teacher, targets, temp: float, alpha: float) -> float:
    """The loss term by term, from the definitions, in float64."""
    student, teacher, targets = student.numpy(), teacher.numpy(), targets.numpy()
    p, q = numpy_softmax(teacher, temp), numpy_softmax(student, temp)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    ce = -np.log(numpy_softmax(student, 1.0)[np.arange(len(targets)), targets]).mean()
    return alpha * temp**2 * kl + (1 - alpha) * ce


@pytest.mark.parametrize("temp", [0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_kd_loss_is_the_formula(temp, alpha):
    student, teacher, targets = random_logits()
    loss = kd_loss(student, teacher, targets, temp, alpha)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(numpy_kd_loss(student, teacher, targets, temp, alpha), rel=1e-5)


@pytest.mark.parametrize("temp", [1.0, 5.0])
def test_kd_loss_gradient_is_the_difference_of_softmaxes(temp):
    student, teacher, targets = random_logits()
    alpha, batch = 0.7, len(targets)
    student.requires_grad_()
    kd_loss(student, teacher, targets, temp, alpha).backward()
    logits = student.detach().numpy()
    soft = temp * (numpy_softmax(logits, temp) - numpy_softmax(teacher.numpy(), temp)) / batch
    hard = (numpy_softmax(logits, 1.0) - np.eye(10)[targets.numpy()]) / batch
    np.testing.assert_allclose(student.grad.numpy(), alpha * soft + (1 - alpha) * hard, rtol=1e-4, atol=1e-7)


def test_alpha_zero_is_plain_cross_entropy():
    student, teacher, targets = random_logits()
    plain = torch.nn.functional.cross_entropy(student.float(), targets)
    assert torch.equal(kd_loss(student, teacher, targets, temp=5.0, alpha=0.0), plain)


def test_high_temperature_matches_centred_logits():
    """Hinton et al., section 2.1: as T grows, the gradient of T^2 KL goes to (z - v) / N, z and v centred."""
    student, teacher, targets = random_logits(batch=4, scale=1.0)
    student.requires_grad_()
    kd_loss(student, teacher, targets, temp=200.0, alpha=1.0).backward()
    z = student.detach() - student.detach().mean(1, keepdim=True)
    v = teacher - teacher.mean(1, keepdim=True)
    torch.testing.assert_close(student.grad, (z - v) / 10 / len(targets), rtol=0.05, atol=5e-4)


def test_kd_loss_does_not_depend_on_the_batch_size():
    student, teacher, targets = random_logits(batch=8)
    once = kd_loss(student, teacher, targets, 5.0, 0.9)
    thrice = kd_loss(student.repeat(3, 1), teacher.repeat(3, 1), targets.repeat(3), 5.0, 0.9)
    halves = [kd_loss(student[part], teacher[part], targets[part], 5.0, 0.9) for part in (slice(4), slice(4, 8))]
    assert thrice.item() == pytest.approx(once.item(), rel=1e-6)
    assert sum(halves).item() / 2 == pytest.approx(once.item(), rel=1e-6)


def test_kd_loss_is_zero_with_zero_gradient_where_the_student_is_the_teacher():
    student, _, targets = random_logits()
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, student, targets, 5.0, 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and leaf.grad.abs().max() < 1e-7


def test_kd_loss_is_computed_in_float32_whatever_comes_in():
    student, teacher, targets = (t.bfloat16() if t.is_floating_point() else t for t in random_logits(scale=20.0))
    loss = kd_loss(student, teacher, targets, 5.0, 0.9)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kd_loss(student.float(), teacher.float(), targets, 5.0, 0.9))


def test_kd_loss_of_extreme_logits_is_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = kd_loss(student, -student.detach(), torch.tensor([1]), 1.0, 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    "temp, alpha", [(0, 0.5), (-1, 0.5), (float("nan"), 0.5), (5, -0.1), (5, 1.1), (5, float("nan"))]
)
def test_kd_loss_refuses_values_out_of_range(temp, alpha):
    with pytest.raises(ValueError, match="temp|alpha"):
        kd_loss(*random_logits(), temp, alpha)


# ---------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("ks", [(1, 5), (1,), (2, 3, 10)])
def test_topk_correct_is_what_a_sort_says(ks):
    logits, _, targets = random_logits(batch=200)
    ranking = np.argsort(-logits.numpy(), axis=1)
    expected = [int((ranking[:, :k] == targets.numpy()[:, None]).any(axis=1).sum()) for k in ks]
    counts = topk_correct(logits, targets, ks)
    assert counts.tolist() == expected and counts.dtype == torch.int64


def test_topk_correct_gives_nothing_for_ties_or_nan():
    targets = torch.arange(10)
    for value in (0.0, float("nan")):
        assert topk_correct(torch.full((10, 10), value), targets).tolist() == [0, 0]
    tied = torch.zeros(1, 10)
    tied[0, :3] = 1.0
    assert topk_correct(tied, torch.tensor([0]), (1, 2, 3)).tolist() == [0, 0, 1]
    one_nan = torch.arange(10.0)[None].clone()
    one_nan[0, 3] = float("nan")
    assert topk_correct(one_nan, torch.tensor([9]), (1, 2)).tolist() == [0, 1]
    assert topk_correct(one_nan, torch.tensor([3]), (1, 5)).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------- data


def test_every_view_is_torchvisions_crop_and_flip():
    images = random_images(3)
    views = Views(images, SPEC)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    for view in range(VIEWS):
        got, labels = views.batch(torch.arange(3), torch.full((3,), view))
        assert torch.equal(labels, images.labels)
        assert got.is_contiguous(memory_format=torch.channels_last)
        offset, flip = divmod(view, 2)
        top, left = divmod(offset, OFFSETS)
        for row in range(3):
            padded = vision.pad(images.pixels[row].permute(2, 0, 1), [PAD] * 4)
            expected = vision.crop(padded, top, left, SIDE, SIDE)
            expected = vision.horizontal_flip(expected) if flip else expected
            # The difference of one rounding: x / 255 - mean is (x - 255 mean) / 255.
            torch.testing.assert_close(got[row], (expected / 255 - mean) / std, rtol=0, atol=1e-6)


def test_a_batch_holds_each_image_in_its_own_view():
    views = Views(random_images(5), SPEC)
    rows, picked = torch.tensor([4, 0, 4, 2, 1]), torch.tensor([0, 161, 161, 80, 17])
    together, labels = views.batch(rows, picked)
    for place, (row, view) in enumerate(zip(rows, picked, strict=True)):
        alone, label = views.batch(row[None], view[None])
        assert torch.equal(together[place], alone[0]) and labels[place] == label[0]


@pytest.mark.parametrize("limit", [None, 16, 5])
def test_an_epoch_is_a_function_of_seed_and_epoch(limit):
    views, again = (Views(random_images(2000), SPEC, limit) for _ in range(2))
    again.plan(seed=1, epoch=1)  # whatever was asked before
    order, view_of = views.plan(seed=3, epoch=7)
    assert torch.equal(order.sort().values, torch.arange(2000))
    assert all(torch.equal(a, b) for a, b in zip((order, view_of), again.plan(seed=3, epoch=7), strict=True))
    by_chance = 1 / 162 if limit is None else 2 / limit
    for seed, epoch in ((3, 8), (4, 7), (7, 3)):
        other_order, other_views = views.plan(seed, epoch)
        assert not torch.equal(order, other_order)
        assert (view_of == other_views).float().mean() < 1.5 * by_chance + 0.05
    assert set(view_of.tolist()) == set(range(VIEWS))
    assert 0.45 < (view_of % 2).float().mean() < 0.55


@pytest.mark.parametrize("limit", [None, 162, 161, 16, 5, 3, 2])
def test_an_image_is_mirrored_in_every_other_epoch(limit):
    views = Views(random_images(300), SPEC, limit)
    for seed in (0, 42):
        mirrored = torch.stack([views.plan(seed, epoch)[1] % 2 for epoch in range(5)])
        assert (mirrored[1:] != mirrored[:-1]).all()
        assert 0.4 < mirrored[0].float().mean() < 0.6, "half of the images begin with it"


def test_an_only_view_stays_as_it_is():
    views = Views(random_images(300), SPEC, limit=1)
    seen = torch.stack([views.plan(seed, epoch)[1] for seed in (0, 1) for epoch in range(3)])
    assert (seen == seen[0]).all()
    assert 0.4 < (seen[0] % 2).float().mean() < 0.6 and set((seen[0] // 2).tolist()) > set(range(0, 81, 8))


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("limit", [1, 2, 3, 16, 80, 161])
def test_a_limit_leaves_each_image_as_many_views_the_same_for_every_seed(limit, name):
    spec = DATASETS[name]
    views = Views(random_images(50), spec, limit)
    if limit >= spec.views:
        assert views.allowed is None
        return
    kinds = [set(row) for row in views.allowed.tolist()]
    assert all(len(kind) == limit and kind <= set(range(VIEWS)) for kind in kinds), "no view comes twice"
    assert len({frozenset(kind) for kind in kinds}) > 20, "images have views of their own"
    assert torch.equal(views.allowed, Views(random_images(50), spec, limit).allowed)
    seen = torch.stack([views.plan(seed, epoch)[1] for seed in range(2) for epoch in range(20 * min(limit, 16))])
    found = [set(column.tolist()) for column in seen.T]
    assert all(some <= kind for some, kind in zip(found, kinds, strict=True))
    if limit <= 3:
        assert found == kinds, "each of them is seen"


@pytest.mark.parametrize("limit", [None, 1, 2, 5, 80])
def test_digits_are_never_mirrored(limit):
    views = Views(random_images(300), DATASETS["digits"], limit)
    for epoch in range(4):
        assert (views.plan(0, epoch)[1] % 2 == 0).all()


def test_splits_come_as_asked_for_and_a_subset_is_a_prefix(digits):
    spec = DATASETS["digits"]
    train, test = load_images(spec, digits, "train", "test")
    assert (len(train), len(test)) == (5000, 2000)
    few_test, few = load_images(spec, digits, "test", "train", subset=43)
    assert torch.equal(few.pixels, train.pixels[:43]) and torch.equal(few.labels, train.labels[:43])
    assert torch.equal(few_test.pixels, test.pixels[:8]) and len(few_test) == 8
    kept, rest = load_images(spec, digits, "holdout", "train", subset=43, holdout=10)
    assert torch.equal(kept.pixels, train.pixels[33:43]) and torch.equal(rest.pixels, train.pixels[:33])
    assert len(load_images(spec, digits, "test", subset=3)[0]) == 1
    with pytest.raises(UserError, match="--holdout 43 leaves none of the 43"):
        load_images(spec, digits, "train", subset=43, holdout=43)


@pytest.mark.parametrize(
    "splits, halves", [("train test", "train test"), ("test", "test"), ("train holdout", "train"), ("holdout", "train")]
)
def test_only_what_is_asked_for_is_read(splits, halves, monkeypatch):
    read = []

    def cached(folder, half, count):
        read.append(half)
        return np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int64)

    monkeypatch.setattr(utils, "cached_digits", cached)
    load_images(DATASETS["digits"], Path("nowhere"), *splits.split(), holdout=8)
    assert sorted(read, reverse=True) == halves.split()


def test_each_file_of_the_data_is_read_once_for_its_sum_and_once_if_it_is_used(cifar10, monkeypatch):
    summed, unpickled = [], []

    def check_integrity(path, md5, real=torchvision.datasets.cifar.check_integrity):
        assert md5
        summed.append(Path(path).name)  # that of the classes' names, 158 bytes, is read more often
        return real(path, md5)

    def load(file, real=pickle.load, **keywords):
        unpickled.append(Path(file.name).name)
        return real(file, **keywords)

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", check_integrity)
    monkeypatch.setattr(torchvision.datasets.cifar.pickle, "load", load)
    train, test = load_images(SPEC, cifar10, "train", "test", subset=100)
    assert (len(train), len(test)) == (100, 20)
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    whole = [*batches, "test_batch"]
    assert sorted(name for name in summed if name != "batches.meta") == whole
    assert sorted(name for name in unpickled if name != "batches.meta") == whole
    summed.clear()
    unpickled.clear()
    (again,) = load_images(SPEC, cifar10, "test", subset=100)
    assert torch.equal(again.pixels, test.pixels)
    assert sorted(name for name in summed if name != "batches.meta") == whole, "in each run anew"
    assert not set(unpickled) & set(batches)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_row_is_what_the_real_data_say(name, request):
    spec, folder = DATASETS[name], request.getfixturevalue(name)
    found = getattr(torchvision.datasets, spec.torchvision_class)(folder, train=True, download=False)
    pixels = found.data
    assert spec.classes == tuple(found.classes) and spec.train_images == len(pixels)
    normalise = Normaliser(spec, torch.device("cpu"))
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in torch.from_numpy(pixels).split(1000):
        values = normalise(part).double()
        sums += torch.stack((values.mean((0, 2, 3)), values.square().mean((0, 2, 3))))
    mean, square = sums / (len(pixels) / 1000)
    assert mean.abs().max() < 1e-3
    assert ((square - mean.square()).sqrt() - 1).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    "command, split, more",
    [("", "test", []), ("--kd", "test", ["train cross-entropy", "train T² KL"]), ("--tto --holdout 8", "holdout", [])],
)
def test_curves_show_what_the_log_says(command, split, more, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    write_log(path, command, tops=(40.0, 60.0))
    drawn = {}

    def save_figure(axes, path, real=utils.save_figure):
        drawn[path.name] = axes
        return real(axes, path)

    monkeypatch.setattr(utils, "save_figure", save_figure)
    paths = plot_curves(path, tmp_path)
    assert [path.name for path in paths] == list(drawn) == ["run_accuracy.png", "run_loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    axes = drawn["run_accuracy.png"]
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert curves[f"{split} top-1"] == [40.0, 60.0] and curves[f"{split} top-5"] == [95.0, 95.0]
    assert curves["train top-1"] == [0.0, 0.0] and len(curves) == 4
    assert [line.get_label() for line in drawn["run_loss.png"].lines] == ["train loss", f"{split} loss", *more]
    assert axes.get_title() == f"{run_of(command).title} on cifar10: accuracy"
    assert axes.get_ylabel() == "accuracy (%)" and drawn["run_loss.png"].get_ylabel() == "loss (nats)"
