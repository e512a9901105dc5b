"""The losses of distillation that need logits alone, a table name -> function.

Each takes the logits of student and teacher (B, C), targets (B,) int64 and a temperature T > 0, and returns its
terms, scalars in nats, which `--kd_weight` weighs. What the papers' own code does beside the formula (DKD's warm-up of
its weight over the first epochs) is left out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from utils import soft_target_loss

Terms = tuple[torch.Tensor, ...]


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) (B,) of log-probabilities (B, C)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def kd(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Soft targets: T^2 KL(teacher_T || student_T) (Hinton, Vinyals & Dean, 2014, section 2)."""
    return (soft_target_loss(student, teacher, temp),)


def ls(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Logit standardisation: KD on each image's z-scores over the classes (Sun et al., CVPR 2024, algorithm 1)."""
    student, teacher = (F.layer_norm(logits, logits.shape[1:], eps=1e-12) for logits in (student, teacher))
    return kd(student, teacher, targets, temp)


def dkd(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Decoupled KD: T^2 KL of the target against the rest, and within the rest (Zhao et al., CVPR 2022, eq. 7)."""
    others = torch.arange(student.shape[1] - 1, device=targets.device)
    others = others + (others >= targets[:, None])  # (B, C - 1): every class but the target
    binary, among = [], []
    for logits in (teacher, student):
        log_p = F.log_softmax(logits / temp, dim=1)
        of_others = log_p.gather(1, others)
        of_any_other = of_others.logsumexp(1, keepdim=True)
        binary.append(torch.cat((log_p.gather(1, targets[:, None]), of_any_other), dim=1))
        among.append(of_others - of_any_other)
    return temp**2 * divergence(*binary).mean(), temp**2 * divergence(*among).mean()


def to_softened_teacher(student: torch.Tensor, teacher: torch.Tensor, temp: float) -> torch.Tensor:
    """KL(teacher_T || student_1) of each image (B,)."""
    return divergence(F.log_softmax(teacher / temp, dim=1), F.log_softmax(student, dim=1))


def ttm(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Transformed teacher matching: KL(teacher_T || student_1) (Zheng & Yang, ICLR 2024, section 3)."""
    return (to_softened_teacher(student, teacher, temp).mean(),)


def wttm(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """TTM, each image weighted by the sum of its teacher's probabilities to the 1/T (the same, section 4)."""
    weight = (F.log_softmax(teacher, dim=1) / temp).exp().sum(1)
    return ((weight * to_softened_teacher(student, teacher, temp)).mean(),)


LOSSES: dict[str, Callable[..., Terms]] = {"kd": kd, "ls": ls, "dkd": dkd, "ttm": ttm, "wttm": wttm}


def loss_terms(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: torch.Tensor,
    loss: str,
    temp: float,
    kd_weights: tuple[float, ...],
    ce_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, CE, soft) of logits (B, C) and targets (B,): scalars in nats, of which the total alone has a gradient.

    `soft` is the sum of the loss's terms before they are weighted. Without a teacher the total is the CE, soft 0.
    """
    student_logits = student_logits.float()
    ce = F.cross_entropy(student_logits, targets)
    if teacher_logits is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    terms = LOSSES[loss](student_logits, teacher_logits.float(), targets, temp)
    total = ce_weight * ce
    for weight, term in zip(kd_weights, terms, strict=True):
        total = total + weight * term
    return total, ce.detach(), sum(terms).detach()
