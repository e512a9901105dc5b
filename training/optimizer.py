"""Muon for the convolutions, SGD for the rest; the learning rate of a step."""

import torch
from torch import nn

from config import TrainOptions

SGD_MOMENTUM = 0.9
MUON_MOMENTUM = 0.6
# Of a quintic that is steep at zero: three steps bring singular values near one, not to it (Jordan et al., 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 3
WARM_UP = 0.1  # fraction of all steps
TINY = 1e-7  # keeps a norm from zero


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps 0 <= step < total, then a linear decay towards zero."""
    warm_up = max(int(total * WARM_UP), 1)
    return peak * min((step + 1) / warm_up, (total - step) / max(total - warm_up, 1))


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T, nearly, of each matrix U S V^T in a batch (B, M, N), in the batch's type, by Newton-Schulz iteration.

    An iteration is X <- (a + b A + c A^2) X with A = X X^T (Bernstein & Newhouse, 2024; Jordan et al., 2024). All
    its factors are polynomials of the first A and commute, so they are gathered in one small square matrix, and
    the large one is multiplied twice however many iterations there are.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT).mT
    gram = matrices @ matrices.mT
    squared_norm = gram.diagonal(dim1=1, dim2=2).float().sum(1).clamp(min=TINY**2).to(gram.dtype).view(-1, 1, 1)
    gram = gram / squared_norm
    a, b, c = COEFFICIENTS
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product = identity / squared_norm.sqrt()
    for step in range(1, NEWTON_SCHULZ_STEPS + 1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = factor @ product
        if step < NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    return product @ matrices


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum, and in groups with a `muon_momentum` orthogonalised steps (Jordan et al., 2024).

    The step of a convolution, seen as a matrix (out, in * 3 * 3), is replaced by the nearest orthogonal matrix, so
    that all its directions are learnt at one speed, the rare ones too. Before it the weights are brought to norm
    sqrt(out): batch norm takes their scale out again, and the learning rate is relative to it.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **keywords) -> None:
        """`dtype` is that of the orthogonalisation."""
        super().__init__(groups, **keywords)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups."""
        for group in self.param_groups:
            if "muon_momentum" in group:
                self.prepare(group["params"], group["muon_momentum"])
        return super().step(closure)

    def prepare(self, weights: list[torch.Tensor], beta: float) -> None:
        """Bring weights (O, I, H, W) to their norm, and put the steps to take in place of their gradients."""
        alike: dict[torch.Size, list[torch.Tensor]] = {}
        for weight in weights:
            state = self.state[weight]
            if "muon_buffer" not in state:
                state["muon_buffer"] = torch.zeros_like(weight)
            momentum = state["muon_buffer"]
            momentum.mul_(beta).add_(weight.grad)
            weight.grad.add_(momentum, alpha=beta)  # Nesterov's
            weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=TINY))
            alike.setdefault(weight.shape, []).append(weight)
        for shape, those in alike.items():  # matrices of one shape in one product
            # In memory a channels_last weight is (O, H, W, I): that order of columns needs no transposition.
            matrices = torch.stack([weight.grad.permute(0, 2, 3, 1).flatten(1) for weight in those])
            steps = orthogonalise(matrices.to(self.dtype)).unflatten(2, (*shape[2:], shape[1])).permute(0, 1, 4, 2, 3)
            for weight, step in zip(those, steps, strict=True):
                weight.grad.copy_(step)


def make_optimizer(model: nn.Module, options: TrainOptions, dtype: torch.dtype) -> torch.optim.Optimizer:
    """What resolved options say, Muon or SGD, of a model with `.features` and a `.classifier`.

    SGD's weight decay spares biases and batch norm (He et al., 2019, section 3.1), Muon's the convolutions too, whose
    norm is kept; `dtype` is that of its orthogonalisation. Batch norm and the last layer have rates of their own,
    since SGD's steps shrink with the gradient and Muon's do not.
    """
    convolutions = [p for p in model.features.parameters() if p.ndim > 1]
    others = [p for p in model.features.parameters() if p.ndim <= 1]
    head = model.classifier
    groups = [
        {"params": convolutions, "share": 1.0, "weight_decay": options.weight_decay},
        {"params": others, "share": options.norm_lr},
        {"params": [head.weight], "share": options.head_lr, "weight_decay": options.weight_decay},
        {"params": [head.bias], "share": options.head_lr},
    ]
    fused = convolutions[0].device.type != "mps"
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=SGD_MOMENTUM, nesterov=True, fused=fused)
    # To SGD, whose momentum is then none, an orthogonalised step is just a gradient.
    groups[0] |= {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "muon_momentum": MUON_MOMENTUM}
    return Muon(groups, dtype, lr=options.lr, momentum=SGD_MOMENTUM, nesterov=True, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
