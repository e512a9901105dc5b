"""The optimizer, each step against a plain computation, and the learning rate."""

import copy

import numpy as np
import pytest
import torch
from made_up import run_of
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from training import optimizer as opt
from training.recipes import OPTIMIZERS

LR, HEAD_LR, NORM_LR, WEIGHT_DECAY = 0.2, 0.1, 3.0, 0.3
NUMBERS = f"--lr {LR} --head_lr {HEAD_LR} --norm_lr {NORM_LR} --weight_decay {WEIGHT_DECAY}"
RUNS = {optimizer: run_of(f"--optimizer {optimizer} {NUMBERS}") for optimizer in OPTIMIZERS}
RATES = [0.2, 0.1, 0.05]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_learning_rate_warms_up_and_decays_to_nearly_zero(total):
    rates = [opt.learning_rate(step, total, 0.4) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 0.4 for rate in rates) and max(rates) == 0.4
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if total >= 1000:
        assert peak == 0.1 * total - 1 and rates[0] < 0.02 * 0.4 and rates[-1] < 0.002 * 0.4
        warm, cold = np.diff(rates[: peak + 1]), np.diff(rates[peak + 1 :])
        assert np.allclose(warm, warm[0]) and np.allclose(cold, cold[0]), "both ways in a straight line"


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The quintic a s + b s^3 + c s^5 on the singular values of a matrix of norm 1, step after step, in float64."""
    a, b, c = opt.COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-300)
    for _ in range(opt.NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.06)])
def test_orthogonalise_is_the_quintic_of_the_singular_values(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 12), (12, 5), (5, 12), (70, 80), (1, 1)]  # two of one shape, one whose Gram matrix is larger
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    matrices[1], matrices[2] = 1e-4 * matrices[1], 1e4 * matrices[2]
    matrices.append(torch.zeros(5, 12, dtype=torch.float64))
    expected = [by_singular_values(matrix) for matrix in matrices]
    opt.set_norms(matrices, [1.0] * len(matrices))
    opt.orthogonalise(matrices, getattr(torch, dtype))
    for matrix, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix, wanted, rtol=0, atol=tolerance)
    assert not matrices[-1].any() and not expected[-1].any()


def lr_scale_of(name: str, p: torch.Tensor) -> float:
    """The fraction of the learning rate that a parameter of a model is meant to have."""
    if name.startswith("classifier"):
        return HEAD_LR
    return 1.0 if p.numel() > len(p) else NORM_LR


class Layers(torch.nn.Module):
    """Layers with and without a batch norm after them, then the last layer; one gets no gradient and one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.depthwise, self.norm_too = torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8)
        self.alone, self.wide = torch.nn.Conv2d(8, 8, 3, groups=8, bias=False), torch.nn.Conv2d(8, 4, 1)
        self.attention, self.layer_norm = torch.nn.MultiheadAttention(8, 2), torch.nn.LayerNorm(8)
        self.token = torch.nn.Parameter(torch.full((1, 1, 8), 1e-6))
        self.scale = torch.nn.Parameter(torch.ones(8, 1, 1))
        self.unused, self.frozen = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).requires_grad_(False)
        self.classifier = torch.nn.Linear(8, 10)


def test_only_a_batch_norm_in_train_mode_frees_a_scale_even_with_children():
    first, second, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)
    norm.activation = torch.nn.ReLU()  # a child, as timm's have
    model = torch.nn.Sequential(first, norm, second, torch.nn.BatchNorm2d(4).eval())
    assert opt.weights_before_batch_norm(model) == {first.weight}


def test_muon_against_a_plain_computation():
    model, generator = Layers().to(memory_format=torch.channels_last), torch.Generator().manual_seed(1)
    before, optimizer = copy.deepcopy(model), opt.make_optimizer(model, RUNS["muon"], torch.float32)
    steps = [[torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in RATES]
    for values, rate in zip(steps, RATES, strict=True):
        for (name, p), gradient in zip(model.named_parameters(), values, strict=True):
            if not name.startswith("unused"):
                p.grad = torch.empty_like(p).copy_(gradient)  # in the weight's order in memory, as autograd leaves it
        opt.set_learning_rate(optimizer, rate)
        optimizer.step()
    for place, (name, weight) in enumerate(before.named_parameters()):
        layer, weight, momentum = name.partition(".")[0], weight.detach().double(), 0.0
        is_vector = name.endswith("bias") or layer in ("norm", "norm_too", "layer_norm", "scale")
        beta = opt.MOMENTUM if is_vector or layer == "classifier" else opt.MUON_MOMENTUM
        initial_norm = weight.norm().item() if layer != "token" else 0.01 * weight.numel() ** 0.5
        for values, rate in zip(steps, RATES, strict=True):
            gradient = values[place].double()
            momentum = beta * momentum + gradient
            step = gradient + beta * momentum
            if is_vector:
                step = step / step.square().mean().sqrt()
            elif layer in ("depthwise", "alone"):
                step = step / torch.linalg.vector_norm(step, dim=(1, 2, 3), keepdim=True)
            else:  # any order of a filter's numbers does: orthogonalising commutes with a permutation of the columns
                step = by_singular_values(step.flatten(1)).view(weight.shape)
            if name == "classifier.weight":
                step = step * max(weight.shape) ** 0.5 + WEIGHT_DECAY * weight
            elif layer in ("convolution", "depthwise") and not is_vector:
                weight = weight / weight.norm() * len(weight) ** 0.5
            elif not is_vector:
                step = step / step.norm() * initial_norm
            if layer not in ("unused", "frozen"):
                weight = weight - rate * lr_scale_of(name, weight) * step
        found = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(found, weight.float(), rtol=0, atol=3e-4, msg=name)
        assert found.is_contiguous(memory_format=torch.channels_last) or found.ndim < 4


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_parameter_of_the_real_models_has_its_own_decay_rate_and_momentum(optimizer, role):
    with torch.device("meta"):
        model = build_model(role)
    made = opt.make_optimizer(model, RUNS[optimizer], torch.float32)
    opt.set_learning_rate(made, 0.5 * LR)
    assert type(made) is {"muon": opt.Muon, "sgd": torch.optim.SGD}[optimizer]
    found = {id(p): group for group in made.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in made.param_groups) == len(found) == len(trained)
    for name, p in trained:
        head, group = name.startswith("classifier"), found[id(p)]
        assert group["lr"] == 0.5 * LR * lr_scale_of(name, p), name
        decays = p.ndim > 1 and (head or optimizer == "sgd")  # Muon keeps the norm of a convolution
        assert group["weight_decay"] == (WEIGHT_DECAY if decays else 0.0), name
        momentum = opt.MUON_MOMENTUM if p.ndim == 4 and optimizer == "muon" else opt.MOMENTUM
        assert (group["momentum"], group["keeps_norm"]) == (momentum, p.ndim == 4), name
    assert optimizer == "muon" or made.defaults["nesterov"]


class CountOperations(TorchDispatchMode):
    """Counts the operations that run on a GPU, all but views; one on a list of tensors counts once."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [value.alias_info for value in function._schema.returns]
        self.count += not any(alias and not alias.is_write for alias in returned)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("role, most", [("student", 100), ("teacher", 130)])
def test_a_step_has_few_operations(role, most):
    with torch.device("meta"):
        model = build_model(role).to(memory_format=torch.channels_last)
        optimizer = opt.make_optimizer(model, RUNS["muon"], torch.bfloat16)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with CountOperations() as operations:
            optimizer.step()
    assert 40 < operations.count <= most
