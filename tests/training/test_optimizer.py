"""The optimizer, each step against a plain computation, and the learning rate."""

import copy

import numpy as np
import pytest
import torch
from made_up import run_of
from torch.utils._python_dispatch import TorchDispatchMode

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
    set_norms,
)
from training.recipes import OPTIMIZERS

LR, HEAD_LR, NORM_LR, WEIGHT_DECAY = 0.2, 0.1, 3.0, 0.3
NUMBERS = f"--lr {LR} --head_lr {HEAD_LR} --norm_lr {NORM_LR} --weight_decay {WEIGHT_DECAY}"
RUNS = {optimizer: run_of(f"--optimizer {optimizer} {NUMBERS}") for optimizer in OPTIMIZERS}
RATES = [0.2, 0.1, 0.05]


# ---------------------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_learning_rate_warms_up_and_decays_to_nearly_zero(total):
    rates = [learning_rate(step, total, 0.4) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 0.4 for rate in rates) and max(rates) == 0.4
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if total >= 1000:
        assert peak == 0.1 * total - 1 and rates[0] < 0.02 * 0.4 and rates[-1] < 0.002 * 0.4
        warm, cold = np.diff(rates[: peak + 1]), np.diff(rates[peak + 1 :])
        assert np.allclose(warm, warm[0]) and np.allclose(cold, cold[0]), "both ways in a straight line"


# ---------------------------------------------------------------------------------------------- orthogonalise


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The quintic a s + b s^3 + c s^5 on the singular values of a matrix of norm 1, step after step, in float64."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-300)
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


SHAPES = [(5, 12), (12, 5), (5, 12), (70, 80), (1, 1)]  # two of one shape, one whose Gram matrix is larger


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.06)])
def test_orthogonalise_is_the_quintic_of_the_singular_values(dtype, tolerance, scale):
    generator = torch.Generator().manual_seed(0)
    matrices = [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    matrices.append(torch.zeros(5, 12, dtype=torch.float64))
    expected = [by_singular_values(matrix) for matrix in matrices]
    set_norms(matrices, [1.0] * len(matrices))
    orthogonalise(matrices, getattr(torch, dtype))
    for matrix, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix, wanted, rtol=0, atol=tolerance)
    assert not matrices[-1].any() and not expected[-1].any()


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


def lr_scale_of(name: str, p: torch.Tensor) -> float:
    """The fraction of the learning rate that a parameter of a model is meant to have."""
    if name.startswith("classifier"):
        return HEAD_LR
    return 1.0 if p.ndim > 1 else NORM_LR


def test_muon_against_a_plain_computation():
    model = tiny_model()
    steps, before = gradients(model, len(RATES)), copy.deepcopy(model)
    optimizer = make_optimizer(model, RUNS["muon"], torch.float32)
    take_steps(model, optimizer, steps, RATES)
    for place, (name, weight) in enumerate(before.named_parameters()):
        weight, momentum = weight.detach().double(), 0.0
        beta = MUON_MOMENTUM if weight.ndim == 4 else MOMENTUM
        decay = WEIGHT_DECAY if name == "classifier.weight" else 0.0
        for values, rate in zip(steps, RATES, strict=True):
            gradient = values[place].double()
            momentum = beta * momentum + gradient
            step = gradient + beta * momentum
            if weight.ndim == 1:
                step = step / step.square().mean().sqrt()
            else:  # any order of a filter's numbers does: orthogonalising commutes with a permutation of the columns
                step = by_singular_values(step.flatten(1)).view(weight.shape)
            if weight.ndim == 2:
                step = step * max(weight.shape) ** 0.5
            if weight.ndim == 4:
                weight = weight / weight.norm() * len(weight) ** 0.5
            weight = weight - rate * lr_scale_of(name, weight) * (step + decay * weight)
        found = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(found, weight.float(), rtol=0, atol=3e-4, msg=name)
        assert found.is_contiguous(memory_format=torch.channels_last) or found.ndim < 4


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_parameter_of_the_real_models_has_its_own_decay_rate_and_momentum(optimizer, role):
    with torch.device("meta"):
        model = build_model(role)
    made = make_optimizer(model, RUNS[optimizer], torch.float32)
    set_learning_rate(made, 0.5 * LR)
    assert type(made) is {"muon": Muon, "sgd": torch.optim.SGD}[optimizer]
    found = {id(p): group for group in made.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in made.param_groups) == len(found) == len(trained)
    for name, p in trained:
        head, group = name.startswith("classifier"), found[id(p)]
        assert group["lr"] == 0.5 * LR * lr_scale_of(name, p), name
        decays = p.ndim > 1 and (head or optimizer == "sgd")  # Muon keeps the norm of a convolution
        assert group["weight_decay"] == (WEIGHT_DECAY if decays else 0.0), name
        momentum = MUON_MOMENTUM if p.ndim == 4 else MOMENTUM
        if optimizer == "muon":
            assert (group["momentum"], group["keeps_norm"]) == (momentum, p.ndim == 4), name
        else:
            assert (group["momentum"], group["nesterov"]) == (MOMENTUM, True), name


class CountLaunches(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [value.alias_info for value in function._schema.returns]
        self.count += not any(alias and not alias.is_write for alias in returned)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("role, most", [("student", 100), ("teacher", 130)])
def test_a_step_launches_few_kernels(role, most):
    with torch.device("meta"):
        model = build_model(role).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, RUNS["muon"], torch.bfloat16)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()  # makes the momenta
        with CountLaunches() as launches:
            optimizer.step()
    assert 40 < launches.count <= most
