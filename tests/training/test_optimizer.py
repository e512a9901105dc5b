"""The optimizer, each step against a plain computation, and the learning rate."""

import copy

import numpy as np
import pytest
import torch
from made_up import tiny_student

from config import OPTIMIZERS, TrainOptions
from models import build_model
from training.optimizer import (
    COEFFICIENTS,
    MOMENTUM,
    MUON_MOMENTUM,
    NEWTON_SCHULZ_STEPS,
    Muon,
    learning_rate,
    make_optimizer,
    orthogonalise,
    set_learning_rate,
)

LR, HEAD_LR, NORM_LR, WEIGHT_DECAY = 0.2, 0.1, 3.0, 0.3
OPTIONS = {
    optimizer: TrainOptions(optimizer=optimizer, lr=LR, head_lr=HEAD_LR, norm_lr=NORM_LR, weight_decay=WEIGHT_DECAY)
    for optimizer in OPTIMIZERS
}


# ---------------------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_learning_rate_warms_up_and_decays_to_nearly_zero(total):
    rates = [learning_rate(step, total, 0.4) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 0.4 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == 0.4
    if total >= 1000:
        assert peak == 0.1 * total - 1 and rates[0] < 0.02 * 0.4 and rates[-1] < 0.002 * 0.4
        warm, cold = np.diff(rates[: peak + 1]), np.diff(rates[peak + 1 :])
        assert np.allclose(warm, warm[0]) and np.allclose(cold, cold[0])  # both ways in a straight line


# ---------------------------------------------------------------------------------------------- orthogonalise


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The quintic a s + b s^3 + c s^5 on the singular values of a matrix of norm 1, step after step, in float64."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-300)
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("rows, columns", [(5, 12), (12, 5), (7, 7), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_orthogonalise_is_the_quintic_of_the_singular_values(rows, columns, scale):
    generator = torch.Generator().manual_seed(0)
    batch = scale * torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    expected = torch.stack([by_singular_values(matrix) for matrix in batch])
    torch.testing.assert_close(orthogonalise(batch), expected, rtol=0, atol=1e-6)  # norms are summed in float32
    torch.testing.assert_close(orthogonalise(batch.float()), expected.float(), rtol=0, atol=1e-4)


def test_orthogonalise_brings_singular_values_near_one():
    matrix = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(orthogonalise(matrix)[0])
    assert found.min() > 0.6 and found.max() < 1.3
    assert torch.linalg.svdvals(matrix[0] / matrix.norm()).max() < 0.5


def test_orthogonalise_in_bfloat16_is_nearly_the_same():
    batch = torch.randn(2, 8, 30, generator=torch.Generator().manual_seed(0))
    rough = orthogonalise(batch.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), orthogonalise(batch), rtol=0, atol=0.03)


def test_orthogonalise_leaves_zeros_and_keeps_a_batch_apart():
    batch = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    batch[1] = 0
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonalise(batch.to(dtype))
        assert found.isfinite().all() and not found[1].any() and found[0].any() and found[2].any()
    torch.testing.assert_close(orthogonalise(batch)[:1], orthogonalise(batch[:1]))


# ---------------------------------------------------------------------------------------------- a step


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    features = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
    features += [torch.nn.Conv2d(8, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3)]
    parts = {"features": torch.nn.Sequential(*features), "classifier": torch.nn.Linear(8, 10)}
    return torch.nn.ModuleDict(parts).to(memory_format=torch.channels_last)


def gradients(model: torch.nn.Module, steps: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)]


def take_steps(model: torch.nn.Module, optimizer, steps: list[list[torch.Tensor]], rates: list[float]) -> None:
    for values, rate in zip(steps, rates, strict=True):
        for p, gradient in zip(model.parameters(), values, strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)  # in the weight's order in memory, as autograd leaves it
        set_learning_rate(optimizer, rate)
        optimizer.step()


def share_of(name: str, p: torch.Tensor) -> float:
    """The part of the learning rate that a parameter of a model is meant to have."""
    if name.startswith("classifier"):
        return HEAD_LR
    return 1.0 if p.ndim > 1 else NORM_LR


RATES = [0.2, 0.1, 0.05]


def test_muon_against_a_plain_computation():
    model = tiny_model()
    steps, before = gradients(model, len(RATES)), copy.deepcopy(model)
    optimizer = make_optimizer(model, OPTIONS["muon"], torch.float32)
    assert isinstance(optimizer, Muon)
    take_steps(model, optimizer, steps, RATES)
    for place, (name, weight) in enumerate(before.named_parameters()):
        weight, momentum = weight.detach().double(), 0.0
        beta = MUON_MOMENTUM if weight.ndim == 4 else MOMENTUM
        decay = WEIGHT_DECAY if name == "classifier.weight" else 0.0
        for values, rate in zip(steps, RATES, strict=True):
            gradient = values[place].double()
            momentum = beta * momentum + gradient
            # Any order of a filter's numbers does: orthogonalising commutes with a permutation of the columns.
            matrix = (gradient + beta * momentum).flatten(1 if weight.ndim > 1 else 0)
            matrix = matrix.view(-1, matrix.shape[-1])
            step = by_singular_values(matrix).view(weight.shape)
            if weight.ndim == 4:
                weight = weight / weight.norm() * len(weight) ** 0.5
            else:
                step = step * max(matrix.shape) ** 0.5
            weight = weight - rate * share_of(name, weight) * (step + decay * weight)
        found = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(found, weight.float(), rtol=0, atol=3e-4, msg=name)
        assert found.is_contiguous(memory_format=torch.channels_last) or found.ndim < 4


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_muon_asks_no_gradient_for_its_size(scale):
    model, other = tiny_model(), tiny_model()
    steps = gradients(model, len(RATES))
    take_steps(model, make_optimizer(model, OPTIONS["muon"], torch.float32), steps, RATES)
    scaled = [[scale * gradient for gradient in values] for values in steps]
    take_steps(other, make_optimizer(other, OPTIONS["muon"], torch.float32), scaled, RATES)
    for p, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_sgd_is_torchs(role):
    torch.manual_seed(0)
    model = build_model(role) if role == "student" else tiny_model()
    reference, steps = copy.deepcopy(model), gradients(model, len(RATES))
    optimizer = make_optimizer(model, OPTIONS["sgd"], torch.float32)
    assert type(optimizer) is torch.optim.SGD
    take_steps(model, optimizer, steps, RATES)
    groups = []  # one for each parameter
    for name, p in reference.named_parameters():
        groups.append({"params": [p], "share": share_of(name, p), "weight_decay": WEIGHT_DECAY if p.ndim > 1 else 0.0})
    take_steps(reference, torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True), steps, RATES)
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_parameter_has_the_decay_and_the_rate_that_are_meant_for_it(optimizer):
    with torch.device("meta"):
        model = build_model("teacher")
    made = make_optimizer(model, OPTIONS[optimizer], torch.float32)
    set_learning_rate(made, 0.5 * LR)
    found = {id(p): group for group in made.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in made.param_groups) == len(found) == len(trained)
    for name, p in trained:
        head, group = name.startswith("classifier"), found[id(p)]
        assert group["lr"] == 0.5 * LR * share_of(name, p), name
        decays = p.ndim > 1 and (head or optimizer == "sgd")  # Muon keeps the norm of a convolution
        assert group["weight_decay"] == (WEIGHT_DECAY if decays else 0.0), name
        momentum = MUON_MOMENTUM if optimizer == "muon" and p.ndim == 4 else MOMENTUM
        assert group.get("muon_momentum", group["momentum"]) == momentum, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_to_the_bit(optimizer, tmp_path):
    def make(model):
        return make_optimizer(model, OPTIONS[optimizer], torch.float32)

    untouched, stopped = tiny_model(), tiny_model()
    steps = gradients(untouched, len(RATES))
    take_steps(untouched, make(untouched), steps, RATES)
    before = make(stopped)
    take_steps(stopped, before, steps[:2], RATES[:2])
    torch.save({"model": stopped.state_dict(), "optimizer": before.state_dict()}, tmp_path / "state.pt")
    again = tiny_model()
    state, optimizer_again = torch.load(tmp_path / "state.pt", weights_only=True), make(again)
    again.load_state_dict(state["model"])
    optimizer_again.load_state_dict(state["optimizer"])
    take_steps(again, optimizer_again, steps[2:], RATES[2:])
    fresh = tiny_model()
    fresh.load_state_dict(state["model"])
    take_steps(fresh, make(fresh), steps[2:], RATES[2:])
    for (name, p), q, r in zip(again.named_parameters(), untouched.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not torch.equal(p, r), f"the momentum of {name} is no part of the state"


def test_muon_learns():
    torch.manual_seed(0)
    model = tiny_student().to(memory_format=torch.channels_last)
    labels = torch.arange(40) % 10
    images = torch.randn(10, 3, 1, 1)[labels] + 0.3 * torch.randn(40, 3, 32, 32)  # each class of its own colour
    options = TrainOptions(lr=0.1, head_lr=1.0, norm_lr=1.0, weight_decay=0.0)
    optimizer = make_optimizer(model, options, torch.float32)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
