"""The distillation losses that need only logits (docs/losses.md).

Plain KD is `utils.kd_loss`. The others are functions in a table: each takes logits of student and teacher (B, C),
targets (B,) int64 and a temperature T > 0, and returns its terms, scalars in nats, which `--kd_weight` weights.
"""

import torch
import torch.nn.functional as F

import utils
from training.recipes import LOSS_DEFAULTS
from training.runs import RunConfig

Terms = tuple[torch.Tensor, ...]


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) (B,) of log-probabilities (B, C)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def ls(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Logit standardisation: KD on each image's z-scores over the classes (Sun et al., CVPR 2024, algorithm 1)."""
    student, teacher = (F.layer_norm(logits, logits.shape[1:], eps=1e-12) for logits in (student, teacher))
    return (utils.soft_target_loss(student, teacher, temp),)


def dkd(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Decoupled KD: T^2 KL of the target against the rest, and within the rest (Zhao et al., CVPR 2022, eq. 7)."""
    others = torch.arange(student.shape[1] - 1, device=targets.device)
    others = others + (others >= targets[:, None])  # (B, C - 1): every class but the target
    binary, among = [], []  # log-probabilities of student and teacher
    for logits in (student, teacher):
        log_p = F.log_softmax(logits / temp, dim=1)
        log_p_others = log_p.gather(1, others)
        log_p_rest = log_p_others.logsumexp(1, keepdim=True)
        binary.append(torch.cat((log_p.gather(1, targets[:, None]), log_p_rest), dim=1))
        among.append(log_p_others - log_p_rest)
    return temp**2 * divergence(*binary).mean(), temp**2 * divergence(*among).mean()


def kl_to_softened_teacher(student: torch.Tensor, teacher: torch.Tensor, temp: float) -> torch.Tensor:
    """KL(teacher_T || student_1) of each image (B,)."""
    return divergence(F.log_softmax(student, dim=1), F.log_softmax(teacher / temp, dim=1))


def ttm(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """Transformed teacher matching: KL(teacher_T || student_1) (Zheng & Yang, ICLR 2024, section 3)."""
    return (kl_to_softened_teacher(student, teacher, temp).mean(),)


def wttm(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temp: float) -> Terms:
    """TTM, each image weighted by the sum over classes of softmax(teacher)^(1/T) (Zheng & Yang, section 4)."""
    weight = (F.log_softmax(teacher, dim=1) / temp).exp().sum(1)
    return ((weight * kl_to_softened_teacher(student, teacher, temp)).mean(),)


LOSSES = {"ls": ls, "dkd": dkd, "ttm": ttm, "wttm": wttm}


def training_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, targets: torch.Tensor, config: RunConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the CE and the sum of the unweighted terms (0 without KD), in nats, of logits (B, C), targets (B,)."""
    student_logits = student_logits.float()
    ce = F.cross_entropy(student_logits, targets)
    if not config.kd:
        return ce, ce.detach(), torch.zeros_like(ce)
    teacher_logits = teacher_logits.float()
    function = LOSS_DEFAULTS[config.loss].function
    if function == "kd":
        total = config.kd_weights[0] + config.ce_weight  # kd_loss has weights that sum to 1; those of kd_as_dkd don't
        alpha = config.kd_weights[0] / total
        loss = total * utils.kd_loss(student_logits, teacher_logits, targets, config.temp, alpha)
        soft = utils.soft_target_loss(student_logits.detach(), teacher_logits, config.temp)  # again, for the log
        return loss, ce.detach(), soft
    terms = LOSSES[function](student_logits, teacher_logits, targets, config.temp)
    weighted = (weight * term for weight, term in zip(config.kd_weights, terms, strict=True))
    return sum(weighted, config.ce_weight * ce), ce.detach(), sum(terms).detach()
