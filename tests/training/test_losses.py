"""The losses of distillation: each beside its formula, its gradient, and what it becomes at its limits."""

import numpy as np
import pytest
import torch
from test_utils import numpy_softmax, random_logits

from config import LOSSES as ROWS
from training.losses import LOSSES, dkd, kd, loss_terms, ls, ttm, wttm
from utils import kd_loss


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def z_scores(logits: np.ndarray) -> np.ndarray:
    return (logits - logits.mean(axis=1, keepdims=True)) / logits.std(axis=1, keepdims=True)


def by_definition(name: str, student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, temp: float) -> list[float]:
    """The terms in probabilities, as the papers write them, in float64."""
    if name == "ls":
        student, teacher = z_scores(student), z_scores(teacher)
    p, q = numpy_softmax(teacher, temp), numpy_softmax(student, temp)
    if name in ("kd", "ls"):
        return [temp**2 * divergence(p, q).mean()]
    if name == "dkd":
        is_target = np.eye(p.shape[1])[targets] == 1
        binary, among = [], []
        for values in (p, q):
            of_target = values[is_target][:, None]
            binary.append(np.concatenate((of_target, 1 - of_target), axis=1))
            among.append(values[~is_target].reshape(len(p), -1) / (1 - of_target))
        return [temp**2 * divergence(*pair).mean() for pair in (binary, among)]
    of_image = divergence(p, numpy_softmax(student, 1.0))
    weight = 1 if name == "ttm" else (numpy_softmax(teacher, 1.0) ** (1 / temp)).sum(axis=1)
    return [(weight * of_image).mean()]


@pytest.mark.parametrize("temp", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name, temp):
    logits = random_logits()
    terms = LOSSES[name](*logits, temp)
    assert all(term.shape == () and term.dtype == torch.float64 for term in terms)
    assert [term.item() for term in terms] == pytest.approx(by_definition(name, *(t.numpy() for t in logits), temp))


@pytest.mark.parametrize("name", LOSSES)
def test_its_gradient_is_its_own(name):
    student, teacher, targets = random_logits(batch=3, classes=5, scale=1.0)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: LOSSES[name](logits, teacher, targets, 3.0), student)


@pytest.mark.parametrize("name", ["kd", "ls", "dkd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    student, _, targets = random_logits()
    leaf = student.clone().requires_grad_()
    sum(LOSSES[name](leaf, student, targets, 5.0)).backward()
    assert leaf.grad.abs().max() < 1e-12


def test_dkd_with_the_weights_of_kd_is_kd():
    """KL = TCKD + (1 - p_target) NCKD for each image (Zhao et al., eq. 5); DKD's weights are the same for all."""
    for student, teacher, target in zip(*random_logits(batch=20), strict=True):
        image = student[None], teacher[None], target[None], 3.0
        of_target, among = dkd(*image)
        others = 1 - (teacher / 3.0).softmax(0)[target]
        torch.testing.assert_close(of_target + others * among, kd(*image)[0])


def test_dkd_of_two_classes_has_nothing_among_the_others():
    student, teacher, targets = random_logits(classes=2)
    of_target, among = dkd(student, teacher, targets, 3.0)
    torch.testing.assert_close(of_target, kd(student, teacher, targets, 3.0)[0])
    assert among == 0


def test_standardised_logits_make_ls_kd():
    student, teacher, targets = random_logits()
    standard = [torch.from_numpy(z_scores(logits.numpy())) for logits in (student, teacher)]
    torch.testing.assert_close(ls(*standard, targets, 2.0), kd(*standard, targets, 2.0))
    torch.testing.assert_close(ls(3 * student + 1, teacher, targets, 2.0), ls(student, teacher, targets, 2.0))


def test_wttm_where_all_images_weigh_one_is_ttm():
    student, teacher, targets = random_logits()
    assert wttm(student, teacher, targets, 3.0)[0] > ttm(student, teacher, targets, 3.0)[0]
    # At T = 1 a teacher's probabilities add up to one.
    torch.testing.assert_close(wttm(student, teacher, targets, 1.0), ttm(student, teacher, targets, 1.0))
    torch.testing.assert_close(ttm(student, teacher, targets, 1.0), kd(student, teacher, targets, 1.0))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_give_finite_numbers(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [300.0, 0.0, 0.0]])
    terms = LOSSES[name](student, teacher, torch.tensor([1, 0]), 1.0)
    sum(terms).backward()
    assert all(term.isfinite() for term in terms) and student.grad.isfinite().all()


def test_the_table_of_losses_has_a_weight_for_each_term():
    logits = random_logits()
    assert {row.function for row in ROWS.values()} == LOSSES.keys()
    for row in ROWS.values():
        assert len(LOSSES[row.function](*logits, 4.0)) == len(row.kd_weights)


# ---------------------------------------------------------------------------------------------- weighted


def test_the_total_is_the_weighted_sum():
    student, teacher, targets = random_logits()
    plain = torch.nn.functional.cross_entropy(student.float(), targets)
    total, ce, soft = loss_terms(student, teacher, targets, "dkd", 4.0, (2.0, 7.0), 0.5)
    of_target, among = dkd(student.float(), teacher.float(), targets, 4.0)
    assert torch.equal(ce, plain)
    torch.testing.assert_close(total, 2 * of_target + 7 * among + 0.5 * plain)
    torch.testing.assert_close(soft, of_target + among)
    assert total.dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_plain_kd_is_kd_loss_to_the_bit(alpha):
    student, teacher, targets = random_logits(batch=64)
    total, _, _ = loss_terms(student, teacher, targets, "kd", 5.0, (alpha,), round(1 - alpha, 12))
    assert torch.equal(total, kd_loss(student, teacher, targets, 5.0, alpha))


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    student, _, targets = random_logits()
    plain = torch.nn.functional.cross_entropy(student.float(), targets)
    total, ce, soft = loss_terms(student, None, targets, "kd", 5.0, None, None)
    assert torch.equal(total, plain) and torch.equal(ce, plain) and soft == 0
