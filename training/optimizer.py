"""Muon and SGD; the learning rate of a step."""

import torch
import torch.nn.functional as F
from torch import nn

from training.runs import RunConfig

MOMENTUM = 0.9
MUON_MOMENTUM = 0.6  # of its convolutions
# Of a quintic that is steep at zero: three steps bring singular values near one, not to it (Jordan et al., 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 3
WARM_UP = 0.1  # fraction of all steps
TINY = 1e-7  # keeps a norm from zero
SMALLEST_GRAM = 64  # rows of a Gram matrix; smaller ones are padded


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps 0 <= step < total, then a linear decay towards zero."""
    warm_up = max(int(total * WARM_UP), 1)
    return peak * min((step + 1) / warm_up, (total - step) / max(total - warm_up, 1))


def set_norms(tensors: list[torch.Tensor], norms: list[float]) -> None:
    """Scale each tensor to a norm of its own, in place; zeros stay zeros."""
    found = torch._foreach_norm(tensors)
    torch._foreach_clamp_min_(found, TINY)
    torch._foreach_div_(found, norms)
    torch._foreach_div_(tensors, found)


def newton_schulz(gram: torch.Tensor) -> torch.Tensor:
    """The polynomial P (B, M, M) of Gram matrices A = X X^T, trace(A) = 1, for which P X is nearly orthogonal.

    An iteration is X <- (a + b A + c A^2) X (Bernstein & Newhouse, 2024; Jordan et al., 2024). The factors of all
    iterations are polynomials of the first A and commute, so X itself is multiplied only once, by their product.
    """
    a, b, c = COEFFICIENTS
    product = None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor.bmm(product)
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor.bmm(gram).bmm(factor)
    return product


def orthogonalise(matrices: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Replace each matrix U S V^T (M, N) of norm 1 by nearly U V^T, in place; computed in `dtype`.

    Matrices of one shape are one batch, and all Gram matrices that have one size when padded with zeros are another:
    a GPU waits for the number of these products, not for their size.
    """
    alike: dict[torch.Size, list[torch.Tensor]] = {}
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        alike.setdefault(wide.shape, []).append(wide)
    by_size: dict[int, list[torch.Tensor]] = {}
    for (side, _), same in alike.items():
        size = max(SMALLEST_GRAM, 2 ** (side - 1).bit_length())
        by_size.setdefault(size, []).append(torch.stack(same).to(dtype))
    results = {}
    for size, batches in by_size.items():
        grams = [pad(batch.bmm(batch.mT), size) for batch in batches]
        products = newton_schulz(torch.cat(grams)).split([len(batch) for batch in batches])
        for batch, product in zip(batches, products, strict=True):
            side = batch.shape[1]
            results[batch.shape[1:]] = product[:, :side, :side].bmm(batch).unbind()
    targets = [matrix for same in alike.values() for matrix in same]
    torch._foreach_copy_(targets, [result for shape in alike for result in results[shape]])


def pad(squares: torch.Tensor, size: int) -> torch.Tensor:
    """Square matrices (B, M, M) padded with zeros to (B, size, size)."""
    missing = size - squares.shape[1]
    return F.pad(squares, (0, missing, 0, missing)) if missing else squares


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A view (O, everything else) of a weight or gradient, its columns in the order of memory."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.movedim(1, -1)
    return weight.flatten(1)


class Muon(torch.optim.Optimizer):
    """SGD whose every step is orthogonalised (Jordan et al., 2024), so that no gradient's size counts.

    A weight is seen as a matrix, of a convolution (out, in * 3 * 3), and its step is the nearest orthogonal matrix: all
    directions are learnt at one speed, the rare ones too. A convolution is brought to norm sqrt(out) before it; batch
    norm takes that scale out again, and the learning rate is relative to it. All others' steps, vectors' too, have root
    mean square 1, times the rate (steepest descent in a norm of the layer's own: Bernstein & Newhouse, 2024).
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, lr: float) -> None:
        """Groups with "momentum" and "keeps_norm"; `dtype` is that of the orthogonalisation."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of all groups. The gradients are used up."""
        for group in self.param_groups:
            weights, beta = group["params"], group["momentum"]
            momenta = [self.momentum_of(weight) for weight in weights]
            steps = [weight.grad for weight in weights]
            torch._foreach_mul_(momenta, beta)
            torch._foreach_add_(momenta, steps)
            torch._foreach_add_(steps, momenta, alpha=beta)  # Nesterov's
            if group["keeps_norm"]:
                set_norms(weights, [len(weight) ** 0.5 for weight in weights])
        steps = [weight.grad for group in self.param_groups for weight in group["params"]]
        set_norms(steps, [1.0 if step.ndim > 1 else len(step) ** 0.5 for step in steps])
        orthogonalise([as_matrix(step) for step in steps if step.ndim > 1], self.dtype)
        for group in self.param_groups:
            weights, steps = group["params"], [weight.grad for weight in group["params"]]
            if steps[0].ndim > 1 and not group["keeps_norm"]:
                torch._foreach_mul_(steps, [max(step.shape) ** 0.5 for step in steps])
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, steps, alpha=-group["lr"])

    def momentum_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The momentum of a weight, zeros at first."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


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
    if not is_muon:
        return torch.optim.SGD(groups, lr=run.lr, momentum=MOMENTUM, nesterov=True)
    for group in groups:
        group["keeps_norm"] = group["params"] is convolutions
        group["momentum"] = MUON_MOMENTUM if group["keeps_norm"] else MOMENTUM
    return Muon(groups, dtype, lr=run.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its learning rate, as a fraction of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
