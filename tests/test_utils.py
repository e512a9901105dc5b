"""Loaders, loss, metrics, models and schedule, each against a formula or a library written by others."""

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as vision
from torch.utils.flop_counter import FlopCounterMode

from config import parse_train
from datasets import DATASETS, OFFSETS, PAD, SIDE
from models import ARCHITECTURES, StudentCNN, build_model, vgg19_bn
from runtime.device import pick_device
from runtime.errors import UserError
from training.optimizer import make_optimizer
from utils import VIEWS, Images, Normaliser, Views, kd_loss, loss_terms, topk_correct

SPEC = DATASETS["cifar10"]


def random_images(count: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 10, (count,), generator=generator))


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


def test_alpha_zero_is_plain_cross_entropy_and_no_teacher_is_too():
    student, teacher, targets = random_logits()
    plain = torch.nn.functional.cross_entropy(student.float(), targets)
    assert torch.equal(kd_loss(student, teacher, targets, temp=5.0, alpha=0.0), plain)
    loss, ce, kl = loss_terms(student, None, targets, temp=5.0, alpha=0.9)
    assert torch.equal(loss, plain) and torch.equal(ce, plain) and kl == 0


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


def test_an_epoch_is_a_function_of_seed_and_epoch():
    views, again = Views(random_images(2000), SPEC), Views(random_images(2000), SPEC)
    order, view_of = views.plan(seed=3, epoch=7)
    assert torch.equal(order.sort().values, torch.arange(2000))
    assert all(torch.equal(a, b) for a, b in zip((order, view_of), again.plan(seed=3, epoch=7), strict=True))
    for seed, epoch in ((3, 8), (4, 7), (7, 3)):
        other_order, other_views = views.plan(seed, epoch)
        assert not torch.equal(order, other_order)
        assert (view_of == other_views).float().mean() < 0.05  # by chance: 1 / 162
    assert set(view_of.tolist()) == set(range(VIEWS))
    assert 0.45 < (view_of % 2).float().mean() < 0.55


def test_a_limit_leaves_each_image_few_views_the_same_for_every_seed():
    views = Views(random_images(50), SPEC, limit=3)
    seen = torch.stack([views.plan(seed, epoch)[1] for seed in range(3) for epoch in range(20)])
    kinds = [set(column.tolist()) for column in seen.T]
    assert all(len(kind) == 3 for kind in kinds) and len({frozenset(kind) for kind in kinds}) > 40
    assert Views(random_images(50), SPEC, limit=VIEWS).allowed is None


def test_digits_are_never_mirrored():
    spec = DATASETS["digits"]
    for limit in (None, 5):
        view_of = Views(random_images(300), spec, limit).plan(0, 0)[1]
        assert (view_of % 2 == 0).all()


def test_normalised_training_set_has_mean_zero_and_deviation_one(cifar10):
    pixels = torchvision.datasets.CIFAR10(cifar10, train=True, download=False).data
    normalise = Normaliser(SPEC, torch.device("cpu"))
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for part in torch.from_numpy(pixels).split(1000):
        values = normalise(part).double()
        sums += torch.stack((values.mean((0, 2, 3)), values.square().mean((0, 2, 3))))
    mean, square = sums / (len(pixels) / 1000)
    assert mean.abs().max() < 1e-3
    assert ((square - mean.square()).sqrt() - 1).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------- models and schedule


def test_vgg_features_are_torchvisions():
    torch.manual_seed(0)
    with torch.device("meta"):  # its classifier of 124 M weights is never filled in
        theirs = torchvision.models.vgg19_bn(weights=None).features
    theirs, ours = theirs.to_empty(device="cpu").eval(), vgg19_bn().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
        if isinstance(module, torch.nn.BatchNorm2d):  # none the identity, so that each must be in its place
            module.reset_parameters()
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    ours.features.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = theirs(images)
        torch.testing.assert_close(ours.features(images), expected)
        torch.testing.assert_close(ours(images), ours.classifier(expected.flatten(1)))
    assert expected.shape == (2, 512, 1, 1) and expected.std() > 0


def cost(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters and multiply-accumulates an image."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def test_costs_are_what_the_docstrings_say():
    student_parameters, student_macs = cost(StudentCNN())
    teacher_parameters, teacher_macs = cost(vgg19_bn())
    assert student_parameters <= 300_000
    text = " ".join(StudentCNN.__doc__.split())
    assert f"{student_parameters:,} parameters" in text
    assert f"{student_macs / 1e6:.1f} M multiply-accumulates" in text
    assert f"1/{round(teacher_parameters / student_parameters)} of the teacher's" in text
    assert f"1/{round(teacher_macs / student_macs)} of the teacher's" in text
    text = " ".join(vgg19_bn.__doc__.split())
    assert f"{teacher_parameters / 1e6:.1f} M parameters" in text
    assert f"{teacher_macs / 1e6:.0f} M multiply-accumulates" in text


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_logits_are_float32_whatever_the_precision(role):
    model = build_model(role).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = model.features(images).flatten(1)
        logits = model(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, torch.nn.functional.linear(features.float(), *model.classifier.parameters()))
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("auto", {}, "cuda:0"),
        ("cuda", {}, "cuda:0"),
        ("cuda:1", {}, "cuda:1"),
        ("cpu", {}, "cpu"),
        ("auto", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cuda:1"),
        ("cpu", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "9"}, "cpu"),
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}, "3 processes need a CUDA device each.* gives 2"),
        ("cuda:1", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes need a CUDA device each.* gives 1"),
        ("cuda:2", {}, "has 2 CUDA devices"),
    ],
)
def test_each_process_has_a_device_of_its_own_with_its_number(name, environment, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            pick_device(name)
    else:
        assert str(pick_device(name)) == expected  # torch.cuda.set_device refuses one without its number


def test_build_model_knows_the_roles_and_nothing_else():
    assert isinstance(build_model("student"), StudentCNN)
    assert build_model("teacher", 7)(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 7)
    assert build_model("student", 7)(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 7)
    assert set(ARCHITECTURES) == {"teacher", "student"} == set(DATASETS["cifar10"].recipes)
    with pytest.raises(ValueError, match="pupil"):
        build_model("pupil")


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_learning_rate_warms_up_and_decays_to_nearly_zero(total):
    factors = [learning_rate_factor(step, total) for step in range(total)]
    peak = factors.index(max(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) == 1 if total != 2 else max(factors) <= 1
    if total >= 1000:
        assert peak == 0.1 * total - 1 and factors[0] < 0.02 and factors[-1] < 0.002


def test_weight_decay_spares_biases_and_the_last_layer_has_its_own_rate():
    options = parse_train(["--tto", "--lr=0.2", "--head_lr=0.1", "--weight_decay=0.3"])
    model = build_model("teacher")
    groups = make_optimizer(model, options, torch.device("cpu")).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        rate = 0.2 * 0.1 if name.startswith("classifier") else 0.2
        assert found[id(p)] == (rate, 0.3 if name.endswith("weight") and p.ndim > 1 else 0.0), name
