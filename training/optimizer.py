"""Muon and SGD; the learning rate of a step."""

import torch
from torch import nn

from training.runs import RunConfig

MOMENTUM = 0.9
MUON_MOMENTUM = 0.6  # of its convolutions
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
    """SGD whose every step is orthogonalised (Jordan et al., 2024), so that no gradient's size counts.

    A weight is seen as a matrix, of a convolution (out, in * 3 * 3), a vector as one row, and its step is the nearest
    orthogonal matrix: all directions are learnt at one speed, the rare ones too. A convolution is brought to norm
    sqrt(out) before it; batch norm takes that scale out again, and the learning rate is relative to it. All others'
    steps have root mean square 1, times the rate (steepest descent in a norm of the layer's own: Bernstein &
    Newhouse, 2024).
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, **keywords) -> None:
        """`dtype` is that of the orthogonalisation."""
        super().__init__(groups, **keywords)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups."""
        for group in self.param_groups:
            self.prepare(group["params"], group["muon_momentum"])
        return super().step(closure)  # to which such a step is just a gradient

    def prepare(self, weights: list[torch.Tensor], beta: float) -> None:
        """Put the steps to take in place of the gradients, and bring convolutions (O, I, H, W) to their norm."""
        alike: dict[torch.Size, list[torch.Tensor]] = {}
        for weight in weights:
            state = self.state[weight]
            if "muon_buffer" not in state:
                state["muon_buffer"] = torch.zeros_like(weight)
            momentum = state["muon_buffer"]
            momentum.mul_(beta).add_(weight.grad)
            weight.grad.add_(momentum, alpha=beta)  # Nesterov's
            alike.setdefault(weight.shape, []).append(weight)
        for shape, those in alike.items():  # matrices of one shape in one product
            # In memory a channels_last weight is (O, H, W, I): that order of columns needs no transposition.
            rows = [w.grad[None] if w.ndim == 1 else w.grad.movedim(1, -1) for w in those]
            steps = orthogonalise(torch.stack([row.flatten(1) for row in rows]).to(self.dtype))
            for weight, row, step in zip(those, rows, steps, strict=True):
                if weight.ndim == 4:
                    weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=TINY))
                else:
                    step = step * max(step.shape) ** 0.5
                weight.grad.copy_(step.view(row.shape).movedim(-1, 1).reshape(shape))


def make_optimizer(model: nn.Module, run: RunConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Muon or SGD, as the run says, for a model with `.features` and a `.classifier`.

    SGD's weight decay spares biases and batch norm (He et al., 2019, section 3.1), Muon's the convolutions too, whose
    norm is kept; `dtype` is that of its orthogonalisation.
    """
    is_muon = run.optimizer == "muon"
    trained = [p for p in model.features.parameters() if p.requires_grad]
    convolutions = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    head = model.classifier
    groups = [
        {"params": convolutions, "lr_scale": 1.0, "weight_decay": 0.0 if is_muon else run.weight_decay},
        {"params": others, "lr_scale": run.norm_lr},
        {"params": [head.weight], "lr_scale": run.head_lr, "weight_decay": run.weight_decay},
        {"params": [head.bias], "lr_scale": run.head_lr},
    ]
    fused = convolutions[0].device.type != "mps"
    if not is_muon:
        return torch.optim.SGD(groups, lr=run.lr, momentum=MOMENTUM, nesterov=True, fused=fused)
    for group in groups:
        group["muon_momentum"] = MUON_MOMENTUM if group["params"] is convolutions else MOMENTUM
    return Muon(groups, dtype, lr=run.lr, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its learning rate, as a fraction of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
