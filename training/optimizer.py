"""Muon and SGD; the learning rate of a step."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.own import last_linear
from training.runs import RunConfig

MOMENTUM = 0.9
MUON_MOMENTUM = 0.6  # of all matrices except the last layer's
# Of a quintic that is steep at zero: three steps bring singular values near one, not to it (Jordan et al., 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 3
TINY = 1e-7  # keeps a norm from zero
SMALLEST_GRAM = 64  # rows of a Gram matrix; smaller ones are padded


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps 0 <= step < total, then a linear decay towards zero."""
    warm_up = max(total // 10, 1)
    return peak * min((step + 1) / warm_up, (total - step) / max(total - warm_up, 1))


def set_norms(tensors: list[torch.Tensor], norms: list[float]) -> None:
    """Scale the i-th tensor to norm norms[i], in place; zeros stay zeros."""
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

    Matrices of one shape are one batch, and so are Gram matrices of one padded size: a GPU is slow at many small ones.
    """
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}  # the matrices, turned so that they are not taller than wide
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        by_shape.setdefault(wide.shape, []).append(wide)
    batches = {shape: torch.stack(same).to(dtype) for shape, same in by_shape.items()}
    shapes_of: dict[int, list[torch.Size]] = {}  # by the padded size of their Gram matrices
    for shape in batches:
        size = max(SMALLEST_GRAM, 2 ** (shape[0] - 1).bit_length())  # a power of two
        shapes_of.setdefault(size, []).append(shape)
    targets, results = [], []
    for size, shapes in shapes_of.items():
        grams = [F.pad(batches[shape].bmm(batches[shape].mT), (0, size - shape[0]) * 2) for shape in shapes]
        products = newton_schulz(torch.cat(grams)).split([len(gram) for gram in grams])
        for shape, product in zip(shapes, products, strict=True):
            targets += by_shape[shape]
            results += product[:, : shape[0], : shape[0]].bmm(batches[shape]).unbind()
    torch._foreach_copy_(targets, results)


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A view (O, everything else) of a weight or gradient, its columns in the order of memory."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.movedim(1, -1)
    return weight.flatten(1)


def is_vector(weight: torch.Tensor) -> bool:
    """Whether a weight is one number per channel, not a matrix: a bias, or the scale of a norm or layer."""
    return weight.ndim == 0 or weight.numel() == len(weight)


def is_depthwise(weight: torch.Tensor) -> bool:
    """Whether a weight (O, 1, H, W) is depthwise: one independent filter per channel."""
    return weight.ndim == 4 and weight.shape[1] == 1 and not is_vector(weight)


class Muon(torch.optim.Optimizer):
    """SGD with orthogonalised steps, whose size does not depend on the gradient's (docs/recipe.md).

    A weight is treated as a matrix, (out, in * 3 * 3) for a convolution. Its step is nearly the orthogonal matrix
    nearest to the momentum; that of a depthwise convolution has norm 1 per filter. In a group with "keeps_norm", a
    batch norm follows and cancels the weights' scale: before each step they are scaled to norm sqrt(out). In a group
    with "relative", none follows: a step has its weight's initial norm. Steps of the last layer and of vectors have
    root mean square 1. All steps are multiplied by the learning rate.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, lr: float) -> None:
        """Groups with "momentum", "keeps_norm" and perhaps "relative"; `dtype` is that of the orthogonalisation."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.dtype = dtype
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
                if group.get("relative"):  # to the initial norm; weights near zero count as 0.01 each
                    norm, size = weight.detach().norm().item(), weight.numel() ** 0.5
                    self.state[weight]["norm"] = norm if norm > 0.001 * size else 0.01 * size

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of all groups, which overwrites the gradients."""
        moved = []  # each group that moves, with its weights that have a gradient
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            moved.append((group, weights))
            beta = group["momentum"]
            momenta = [self.state[weight]["momentum"] for weight in weights]
            steps = [weight.grad for weight in weights]  # which become the steps, in place
            torch._foreach_mul_(momenta, beta)
            torch._foreach_add_(momenta, steps)
            torch._foreach_add_(steps, momenta, alpha=beta)  # Nesterov's
            if group["keeps_norm"]:
                set_norms(weights, [len(weight) ** 0.5 for weight in weights])
        self.normalise([weight.grad for _, weights in moved for weight in weights])
        for group, weights in moved:
            steps = [weight.grad for weight in weights]
            if group.get("relative"):
                set_norms(steps, [self.state[weight]["norm"] for weight in weights])
            elif not group["keeps_norm"] and not is_vector(steps[0]):  # the last layer: root mean square 1
                torch._foreach_mul_(steps, [max(step.shape) ** 0.5 for step in steps])
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, steps, alpha=-group["lr"])

    def normalise(self, steps: list[torch.Tensor]) -> None:
        """Orthogonalise matrices, bring vectors to root mean square 1 and depthwise filters to norm 1, in place."""
        set_norms(steps, [step.numel() ** 0.5 if is_vector(step) else 1.0 for step in steps])
        matrices = [as_matrix(step) for step in steps if not is_vector(step) and not is_depthwise(step)]
        if matrices:
            orthogonalise(matrices, self.dtype)
        for filters in (as_matrix(step) for step in steps if is_depthwise(step)):
            filters.div_(filters.norm(dim=1, keepdim=True).clamp_(min=TINY))


def weights_before_batch_norm(model: nn.Module) -> set[nn.Parameter]:
    """The weights of the layers that a batch norm follows in the order of the modules, so that their scale is free."""
    # timm's batch norms have children. A batch norm kept in eval() cancels no scale.
    leaves = [module for module in model.modules() if isinstance(module, _BatchNorm) or not [*module.children()]]
    followed = [leaf for leaf, after in itertools.pairwise(leaves) if isinstance(after, _BatchNorm) and after.training]
    return {module.weight for module in followed if hasattr(module, "weight")}


def make_optimizer(model: nn.Module, config: RunConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer that a run names, Muon (its products in `dtype`) or SGD; the last linear layer gives the logits."""
    is_muon = config.optimizer == "muon"
    head, before_batch_norm = last_linear(model), weights_before_batch_norm(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    body = [p for p in trained if p is not head.weight and p is not head.bias]
    matrices = [p for p in body if not is_vector(p)]
    decay = 0.0 if is_muon else config.weight_decay  # of matrices; vectors have none (He et al., 2019, section 3.1)
    groups = [
        {"params": [p for p in matrices if p in before_batch_norm], "weight_decay": decay, "keeps_norm": True},
        {"params": [p for p in body if is_vector(p)], "lr_scale": config.norm_lr},
        {"params": [head.weight], "lr_scale": config.head_lr, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p is head.bias], "lr_scale": config.head_lr},
        {"params": [p for p in matrices if p not in before_batch_norm], "weight_decay": decay, "relative": True},
    ]
    groups = [{"lr_scale": 1.0, "keeps_norm": False} | group for group in groups if group["params"]]
    if not is_muon:
        return torch.optim.SGD(groups, lr=config.lr, momentum=MOMENTUM, nesterov=True)
    for group in groups:
        group["momentum"] = MUON_MOMENTUM if group["keeps_norm"] or group.get("relative") else MOMENTUM
    return Muon(groups, dtype, lr=config.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its learning rate, as a fraction of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
