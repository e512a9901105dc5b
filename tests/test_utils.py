"""Loaders, views, losses and metrics, each against a formula or a slow computation of its own."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from made_up import CPU, TinyTeacher, random_images, run_of

import utils
from data_sets import DATA_SETS
from runtime.errors import UserError
from training.losses import LOSSES, training_loss
from training.recipes import LOSS_DEFAULTS
from utils import Data, Images, Normaliser, Views, epoch_order, epoch_view, kd_loss, load_images, topk_correct

SPEC = DATA_SETS["cifar10"]


def random_logits(batch: int = 6, scale: float = 4.0):
    """Student's and teacher's logits (B, 10) in float64 and targets (B,)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, batch, 10, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, 10, (batch,), generator=generator)


def test_kd_loss_is_computed_in_float32_for_the_student_alone_and_refuses_wrong_values():
    student, teacher, targets = (t.bfloat16() if t.is_floating_point() else t for t in random_logits(scale=20.0))
    loss = kd_loss(student, teacher, targets, 5.0, 0.9)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kd_loss(student.float(), teacher.float(), targets, 5.0, 0.9))
    kd_loss(student.requires_grad_(), teacher.requires_grad_(), targets, 5.0, 0.9).backward()
    assert student.grad is not None and teacher.grad is None
    for temp, alpha in ((0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (5, -0.1), (5, 1.1), (5, math.nan)):
        with pytest.raises(ValueError, match="temp|alpha"):
            kd_loss(student, teacher, targets, temp, alpha)
    with pytest.raises(ValueError, match=r"\(6, 10\) and \(6, 1\) differ"):
        kd_loss(student, teacher[:, :1], targets, 5.0, 0.9)


def probabilities(logits: torch.Tensor, temp: float) -> torch.Tensor:
    return (logits / temp).exp() / (logits / temp).exp().sum(1, keepdim=True)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(1)


def by_definition(name: str, student, teacher, targets, temp: float) -> list[torch.Tensor]:
    """The terms in probabilities, as the papers write them."""
    if name == "ls":
        student, teacher = ((z - z.mean(1, True)) / z.std(1, keepdim=True, correction=0) for z in (student, teacher))
    p, q = probabilities(teacher, temp), probabilities(student, temp)
    if name in ("kd", "ls"):
        return [temp**2 * divergence(p, q).mean()]
    if name == "dkd":
        is_target = torch.eye(p.shape[1])[targets] == 1
        binary, among = [], []
        for values in (p, q):
            of_target = values[is_target][:, None]
            binary.append(torch.cat((of_target, 1 - of_target), dim=1))
            among.append(values[~is_target].view(len(p), -1) / (1 - of_target))
        return [temp**2 * divergence(*pair).mean() for pair in (binary, among)]
    weight = 1 if name == "ttm" else (probabilities(teacher, 1.0) ** (1 / temp)).sum(1)
    return [(weight * divergence(p, probabilities(student, 1.0))).mean()]


WEIGHTS = [(loss, row.kd_weights, row.ce_weight) for loss, row in LOSS_DEFAULTS.items()]
WEIGHTS += [("kd", (0.0,), 1.0), ("kd", (1.0,), 0.0), ("dkd", (4.5, 4.5), 1.0)]


@pytest.mark.parametrize("temp", [0.5, 4.0])
@pytest.mark.parametrize("loss, weights, ce_weight", WEIGHTS)
def test_the_training_loss_and_its_gradient_are_the_weighted_sum_of_the_terms(loss, weights, ce_weight, temp):
    row, (student, teacher, targets) = LOSS_DEFAULTS[loss], random_logits(batch=20)
    run = replace(run_of(f"--kd --loss {loss}"), temp=temp, kd_weights=weights, ce_weight=ce_weight)
    leaf, slow_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    total, ce, soft = training_loss(leaf, teacher, targets, run)
    terms = by_definition(row.function, slow_leaf, teacher, targets, temp)
    slow_ce = -probabilities(slow_leaf, 1.0)[torch.arange(20), targets].log().mean()
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True)) + ce_weight * slow_ce
    assert total.dtype == torch.float32 and not ce.requires_grad and not soft.requires_grad
    for found, wanted in ((total, expected), (ce, slow_ce), (soft, sum(terms))):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    total.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, slow_leaf.grad, rtol=1e-4, atol=1e-5 * slow_leaf.grad.abs().max().item())


@pytest.mark.parametrize("name", ["kd", *LOSSES])
def test_extreme_logits_give_finite_numbers(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [300.0, 0.0, 0.0]])
    total, *_ = training_loss(student, teacher, torch.tensor([1, 0]), run_of(f"--kd --loss {name} --temp 1"))
    total.backward()
    assert total.isfinite() and student.grad.isfinite().all()


def test_topk_correct_is_what_a_sort_says_and_ties_and_nan_count_against_the_target():
    logits, _, targets = random_logits(batch=200)
    ranking, ks = np.argsort(-logits.numpy(), axis=1), (1, 2, 3, 5, 10)
    expected = [int((ranking[:, :k] == targets.numpy()[:, None]).any(axis=1).sum()) for k in ks]
    counts = topk_correct(logits, targets, ks)
    assert counts.tolist() == expected and counts.dtype == torch.int64
    assert topk_correct(logits, targets).tolist() == [expected[0], expected[3]], "top 1 and top 5"
    for value in (0.0, float("nan")):
        assert topk_correct(torch.full((10, 10), value), torch.arange(10)).tolist() == [0, 0]
    for row, target in (([1.0, 1.0, 0.0], 0), ([0.0, float("nan"), 1.0], 2)):
        assert topk_correct(torch.tensor([row]), torch.tensor([target]), (1, 2)).tolist() == [0, 1]


@pytest.mark.parametrize("classes", [5, 6])
def test_evaluate_is_cross_entropy_and_accuracy_over_all_images(classes, monkeypatch):
    monkeypatch.setattr(utils, "EVALUATION_BATCH", 8)
    images = random_images(20)
    images = Images(images.pixels, images.labels % classes)
    spec = replace(SPEC, classes=SPEC.classes[:classes])
    torch.manual_seed(0)
    model = TinyTeacher(classes)  # evaluate has to switch off its dropout and batch statistics
    settings = []
    model.register_forward_hook(lambda *_: settings.append(torch.backends.cudnn.deterministic))
    found = utils.evaluate(model, images, spec, CPU)
    assert settings == [True] * 3, "on CUDA the same batch gives the same logits"
    assert [len(batch) for batch in model.seen] == [8, 8, 8], "the last batch is filled up: logits depend on its size"
    with torch.no_grad():
        logits = model.eval()(Normaliser(SPEC, CPU.device)(images.pixels)).double()
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-6)
    assert found["top1"] == pytest.approx((logits.argmax(1) == images.labels).double().mean().item())
    assert ("top5" in found) == (classes > 5), "of five classes the top five are always right"
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite: train it again with a lower --lr"):
        utils.evaluate(model, images, spec, CPU)


def slow_view(pixels: np.ndarray, view: int) -> np.ndarray:
    """An image (S, S, 3) uint8 in a view (3, S, S), normalised: padded by S / 8, cropped, mirrored in numpy."""
    size, pad = len(pixels), len(pixels) // 8
    padded = np.zeros((size + 2 * pad, size + 2 * pad, 3))
    padded[pad:-pad, pad:-pad] = pixels
    crop, mirrored = divmod(view, 2)
    top, left = divmod(crop, 2 * pad + 1)
    values = padded[top : top + size, left : left + size]
    values = values[:, ::-1] if mirrored else values
    return ((values / 255 - SPEC.mean) / SPEC.std).transpose(2, 0, 1)


@pytest.mark.parametrize("size, shown", [(32, range(162)), (64, range(0, 578, 31)), (224, [0, 6497])])
def test_every_view_is_padded_cropped_and_mirrored_as_in_numpy(size, shown):
    images, rows, spec = random_images(3, size=size), torch.tensor([2, 0, 2, 1]), replace(SPEC, size=size)
    views = Views(images, spec, CPU.device)
    assert torch.equal(views.labels, images.labels) and len(views) == 3 and spec.views > max(shown)
    for k in shown:
        got = views.images(rows, k)
        assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32
        for image, row, view in zip(got, rows, views.view_of(rows, k).tolist(), strict=True):
            expected = slow_view(images.pixels[row].numpy(), view)
            np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec, kinds", [(SPEC, range(162)), (replace(SPEC, flip=False), range(0, 162, 2))])
def test_an_image_has_all_views_once_and_every_other_one_mirrored(spec, kinds):
    views, rows = Views(random_images(300), spec, CPU.device), torch.arange(300)
    table = torch.stack([views.view_of(rows, k) for k in range(spec.views)])
    assert (table.sort(0).values == torch.tensor(kinds)[:, None]).all()
    mirrored = table % 2
    for k in (1, 2):
        assert len({*(table[k] // 2 - table[0] // 2).tolist()}) > 20, "the next crop is another one for each image"
    if spec.flip:
        assert (mirrored[1:] != mirrored[:-1]).all()
        assert 0.4 < mirrored[0].float().mean() < 0.6, "half of the images begin mirrored"
    assert len(set(table[0].tolist())) > 60 and len(set(table[1].tolist())) > 60, "images have views of their own"
    torch.manual_seed(3)  # the generator of all others has no say
    others, few = Views(random_images(300, seed=1), spec, CPU.device), torch.tensor([49, 0, 49, 7])
    assert torch.equal(others.view_of(few, 5), table[5, few]), "it depends on the row and k alone"


@pytest.mark.parametrize("count, flip", [(1, True), (2, True), (5, True), (16, True), (162, True), (16, False)])
def test_an_epochs_view_runs_through_all_views_before_one_repeats(count, flip, seed=42):
    cycles = [[epoch_view(count, flip, seed, cycle * count + i) for i in range(count)] for cycle in range(2)]
    assert [sorted(cycle) for cycle in cycles] == [list(range(count))] * 2
    if flip:
        assert all(k % 2 == i % 2 for cycle in cycles for i, k in enumerate(cycle)), "mirrored and not by turns"
    if count > 2:
        assert cycles[0] != cycles[1] and cycles[0] != [epoch_view(count, flip, seed + 1, i) for i in range(count)]
        assert cycles[0] != sorted(cycles[0])


def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    rows = torch.arange(100, 1100)
    order = epoch_order(rows, 3, 7)
    assert torch.equal(order.sort().values, rows)
    torch.manual_seed(0)
    assert torch.equal(epoch_order(rows, 3, 7), order)
    for seed, epoch in ((3, 8), (4, 7), (7, 3), (0, 0)):
        assert not torch.equal(epoch_order(rows, seed, epoch), order)


def test_a_subset_is_the_first_images_and_a_holdout_the_last_of_these():
    data = Data(SPEC, random_images(50), random_images(20, seed=1))
    assert data.rows(None, 0).tolist() == list(range(50)) and data.rows(40, 8).tolist() == list(range(32))
    assert data.rows(1000, 0).tolist() == list(range(50))
    for subset, holdout, expected in (
        (None, 0, data.test), (40, 0, data.test[:8]), (3, 0, data.test[:1]),
        (None, 8, data.train[42:50]), (40, 8, data.train[32:40]),
    ):  # fmt: skip
        found = data.held_out(subset, holdout)
        assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.labels, expected.labels)
    with pytest.raises(UserError, match="--holdout 40 leaves none of the 40 training images"):
        data.rows(40, 40)


def test_a_student_sees_no_image_of_the_omitted_classes_and_the_first_of_each_other_in_turn():
    labels = torch.tensor([0, 0, 0, 1, 2, 1, 0, 2, 1, 3])
    data = Data(replace(SPEC, classes=tuple("abcd")), Images(torch.zeros(10, 1), labels), random_images(1))
    assert data.rows(None, 0, ("b", "d")).tolist() == [0, 1, 2, 4, 6, 7]
    assert data.rows(9, 1, ("b",)).tolist() == [0, 1, 2, 4, 6, 7]
    in_turn = {4: [0, 3, 4, 9], 5: [0, 1, 3, 4, 9], 7: [0, 1, 3, 4, 5, 7, 9], 8: [0, 1, 2, 3, 4, 5, 7, 9]}
    for count, rows in in_turn.items():
        assert data.rows(None, 0, (), count).tolist() == rows
    assert torch.equal(data.rows(None, 0, (), 10), data.rows(None, 0))
    assert data.rows(None, 0, ("a",), 3).tolist() == [3, 4, 9]
    assert data.held_out(None, 2).labels.tolist() == [1, 3], "also images of omitted classes"
    for omit, count, tells in (
        (("a",), 2, "--student_images 2: give at least 3, one per class, and at most the 6 that are left"),
        ((), 11, "--student_images 11: give at least 4, one per class, and at most the 10"),
        (("e",), None, "--omit: cifar10 has no class 'e': give a name such as a, b, c, d"),
        (tuple("abcd"), None, "--omit a b c d leaves no training image"),
    ):
        with pytest.raises(UserError, match=tells):
            data.rows(None, 0, omit, count)


def test_the_fingerprint_of_a_data_set_is_of_all_pixels_labels_and_classes(digits, monkeypatch):
    images = {"train": random_images(9), "test": random_images(4, seed=1)}
    arrays = {split: (half.pixels.numpy(), half.labels.numpy()) for split, half in images.items()}
    monkeypatch.setattr(utils, "cached_digits", lambda folder, split, count, size: arrays[split])
    found = [load_images("digits", digits, CPU).spec]
    assert found[0].train_images == 9 and len(found[0].fingerprint) == 16
    assert (found[0].mean, found[0].std) == utils.pixel_statistics(images["train"].pixels)
    for array in (*arrays["train"], *arrays["test"]):
        array[-1] ^= 1
        found.append(load_images("digits", digits, CPU).spec)
    monkeypatch.setitem(DATA_SETS, "digits", replace(DATA_SETS["digits"], classes=tuple("abcdefghij")))
    found.append(load_images("digits", digits, CPU).spec)
    assert len({spec.fingerprint for spec in found}) == len(found) == 6
    assert load_images("digits", digits, CPU, flip=True).spec == replace(found[-1], flip=True)


def test_mean_and_deviation_are_of_all_pixels_and_a_single_colour_has_a_deviation():
    pixels = random_images(20).pixels
    values = pixels.flatten(0, 2).double() / 255
    mean, std = utils.pixel_statistics(pixels)
    assert mean == pytest.approx(values.mean(0).tolist()) and std == pytest.approx(values.std(0, correction=0).tolist())
    assert utils.pixel_statistics(pixels * 0 + 51) == (pytest.approx((0.2,) * 3), (1 / 255,) * 3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_row_is_what_the_real_data_say_without_the_file_of_class_names(name, request, tmp_path):
    for file in request.getfixturevalue(name).glob("cifar-*/*[!a]"):  # not batches.meta or meta
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        (tmp_path / file.parent.name / file.name).symlink_to(file.resolve())
    data = load_images(name, tmp_path / file.parent.name, CPU)
    mean, std = utils.pixel_statistics(data.train.pixels)
    assert data.spec.mean == pytest.approx(mean, abs=5e-4) and data.spec.std == pytest.approx(std, abs=5e-4)
    assert (len(data.train), len(data.test), data.spec.train_images) == (50_000, 10_000, 50_000)
    assert torch.bincount(data.test.labels).tolist() == [10_000 // len(data.spec.classes)] * len(data.spec.classes)
    log = (REPOSITORY / "results" / name / "runs.jsonl").read_text()
    assert f'"images": "{data.spec.fingerprint}"' in log, "pixels, labels and names of classes are the published ones"
