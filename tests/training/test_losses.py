"""The losses of distillation: each against autograd of its definition in float64."""

from dataclasses import replace

import pytest
import torch
from made_up import run_of
from test_utils import random_logits

from training.losses import LOSSES, training_loss
from training.recipes import LOSS_DEFAULTS


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


@pytest.mark.parametrize("temp", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("name", LOSSES)
def test_the_terms_of_a_loss_and_their_gradients_are_those_of_its_definition(name, temp):
    student, teacher, targets = random_logits()
    leaf, slow_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    terms = LOSSES[name](leaf, teacher, targets, temp)
    expected = by_definition(name, slow_leaf, teacher, targets, temp)
    assert all(term.shape == () and term.dtype == torch.float64 for term in terms)
    for term, other in zip(terms, expected, strict=True):
        torch.testing.assert_close(term, other, rtol=1e-9, atol=1e-12)
        (found,) = torch.autograd.grad(term, leaf, retain_graph=True)
        (wanted,) = torch.autograd.grad(other, slow_leaf, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


WEIGHTS = [(loss, row.kd_weights, row.ce_weight) for loss, row in LOSS_DEFAULTS.items()]
WEIGHTS += [("kd", (0.0,), 1.0), ("kd", (1.0,), 0.0), ("dkd", (4.5, 4.5), 1.0)]


@pytest.mark.parametrize("loss, weights, ce_weight", WEIGHTS)
def test_the_training_loss_and_its_gradient_are_the_weighted_sum(loss, weights, ce_weight):
    row, (student, teacher, targets) = LOSS_DEFAULTS[loss], random_logits(batch=20)
    run = replace(run_of(f"--kd --loss {loss}"), temp=row.temps[0], kd_weights=weights, ce_weight=ce_weight)
    leaf, slow_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    total, ce, soft = training_loss(leaf, teacher, targets, run)
    terms = by_definition(row.function, slow_leaf, teacher, targets, row.temps[0])
    slow_ce = -probabilities(slow_leaf, 1.0)[torch.arange(20), targets].log().mean()
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True)) + ce_weight * slow_ce
    assert total.dtype == torch.float32 and not ce.requires_grad and not soft.requires_grad
    for found, wanted in ((total, expected), (ce, slow_ce), (soft, sum(terms))):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    total.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, slow_leaf.grad, rtol=1e-4, atol=1e-5 * slow_leaf.grad.abs().max().item())


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    student, _, targets = random_logits()
    total, ce, soft = training_loss(student, None, targets, run_of())
    assert total == ce == torch.nn.functional.cross_entropy(student.float(), targets) and soft == 0


@pytest.mark.parametrize("name", ["kd", *LOSSES])
def test_extreme_logits_give_finite_numbers(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [300.0, 0.0, 0.0]])
    total, *_ = training_loss(student, teacher, torch.tensor([1, 0]), run_of(f"--kd --loss {name} --temp 1"))
    total.backward()
    assert total.isfinite() and student.grad.isfinite().all()
