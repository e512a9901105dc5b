"""Numbers that logits and repeated runs give: pure functions of tensors and lists, no files, no options."""

import math
import statistics

import torch
import torch.nn.functional as F

from utils import loss_and_accuracies

BINS = 15  # of equal width, as in Guo et al. (2017)
Z = statistics.NormalDist().inv_cdf(0.975)


def predictions(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The class (N,) with the highest logit of (N, C); a tie with the label (N,) goes against it, as in top-1."""
    rival = logits.scatter(1, labels[:, None], -math.inf).max(1)
    right = logits.gather(1, labels[:, None])[:, 0] > rival.values
    return torch.where(right, labels, rival.indices)


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval, within 0 to 1, of a fraction of `count` >= 1 trials (Wilson, 1927)."""
    share, z2 = correct / count, Z**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def reliability(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, mean confidence and accuracy (15,) of bins ((m - 1) / 15, m / 15], NaN if empty (Guo et al., 2017)."""
    confidence = logits.double().softmax(1).amax(1)
    right = (predictions(logits, labels) == labels).double()
    bin_of = (confidence * BINS).ceil().long() - 1
    count = torch.bincount(bin_of, minlength=BINS)
    confidence, accuracy = (torch.bincount(bin_of, values, BINS) / count for values in (confidence, right))
    return count, confidence, accuracy


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Expected calibration error, 0 to 1: the bins' |accuracy - confidence|, by images (Guo et al., 2017, eq. 3)."""
    count, confidence, accuracy = reliability(logits, labels)
    return float(((accuracy - confidence).abs() * count).nansum() / count.sum())


def measure(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """All that logits (N, C) and labels (N,) say of a model: fractions 0 to 1, nats, counts, as plain values."""
    count, classes = logits.shape
    numbers = {"images": count, **loss_and_accuracies(logits, labels)}
    numbers["top1_ci"] = list(wilson(round(numbers["top1"] * count), count))
    pairs = labels * classes + predictions(logits, labels)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).tolist()  # of label, prediction
    per_class = [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)]
    return numbers | {"per_class": per_class, "confusion": confusion, "ece": calibration_error(logits, labels)}


def fidelity(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Top-1 agreement of logits (N, C) with the teacher's, and KL(teacher || student) in nats (Stanton et al., 2021).

    `contingency` counts images: rows the teacher right, wrong; columns the student right, wrong.
    """
    student, teacher = predictions(logits, labels), predictions(teacher_logits, labels)
    log_p, log_q = (F.log_softmax(values.double(), 1) for values in (teacher_logits, logits))
    cells = 2 * (teacher != labels).long() + (student != labels).long()
    agreement = (student == teacher).double().mean().item()
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    contingency = torch.bincount(cells, minlength=4).view(2, 2).tolist()
    return {"agreement": agreement, "kl_to_teacher": kl, "contingency": contingency}


def softness(logits: torch.Tensor, temp: float) -> dict[str, float]:
    """How soft the softmax of logits (N, C) / T is: mean largest probability `confidence`, mean `entropy` in nats."""
    log_p = F.log_softmax(logits.float() / temp, dim=1)
    p = log_p.exp()
    return {"confidence": p.amax(1).mean().item(), "entropy": -(p * log_p).sum(1).mean().item()}


def bias_correction(logits: torch.Tensor, labels: torch.Tensor, omitted: list[int]) -> torch.Tensor:
    """What to add to logits (C,) so that classes never seen in training are predicted as often as they occur.

    From logits (N, C) and labels (N,) of the whole training set (the paper, section 3, used the test set): the mean
    probability of each of the `omitted` classes becomes its share of the images. Classes without an image get 0.
    """
    logits = logits.double()
    shares = labels.bincount(minlength=logits.shape[1]).double() / len(labels)
    classes = [i for i in omitted if shares[i] > 0]
    others = [i for i in range(logits.shape[1]) if i not in classes]
    # The other classes enter as one: their logits do not change.
    together = torch.cat((logits[:, others].logsumexp(1, keepdim=True), logits[:, classes]), dim=1)
    offsets = torch.zeros(logits.shape[1], dtype=torch.float64)
    for _ in range(10_000):  # all offsets move together, until none moves
        log_mean = F.log_softmax(together, dim=1)[:, 1:].logsumexp(0) - math.log(len(labels))
        step = shares[classes].log() - log_mean
        together[:, 1:] += step
        offsets[classes] += step
        if (step.abs() < 1e-6).all():
            break
    return offsets


def measure_omitted(logits: torch.Tensor, labels: torch.Tensor, omitted: list[int]) -> dict[str, float]:
    """Top-1 (0 to 1) of logits (N, C) on the images of the omitted classes and on the others, where there are any."""
    right = (predictions(logits, labels) == labels).double()
    is_omitted = torch.isin(labels, torch.tensor(omitted))
    parts = {"top1_omitted": right[is_omitted], "top1_others": right[~is_omitted]}
    return {name: values.mean().item() for name, values in parts.items() if len(values)}


def two_sided_p(t: float, freedom: int) -> float:
    """The probability of a |t| at least as large under Student's distribution (A&S, 26.7)."""
    angle, odd = math.atan(abs(t) / math.sqrt(freedom)), freedom % 2
    term = math.cos(angle) if odd else 1.0  # of a series in cos(angle)^2
    total = 0.0
    for i in range(odd, freedom - 1, 2):
        total += term
        term *= (i + 1) / (i + 2) * math.cos(angle) ** 2
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if odd else within)


def t_quantile(freedom: int) -> float:
    """The t for which 95 % of Student's distribution lie between -t and t, by bisection."""
    low, high = 0.0, 13.0  # the largest is 12.7, with one degree of freedom
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if two_sided_p(t, freedom) > 0.05 else (low, t)
    return low


def paired_gain(gains: list[float]) -> dict:
    """Mean of paired differences; unless all are equal, also deviation, 95 % interval and p by Student's t."""
    pairs, mean = len(gains), statistics.mean(gains)
    deviation = statistics.stdev(gains) if pairs > 1 else 0.0
    if deviation < 1e-9:  # one, or several that are equal by chance
        return {"pairs": pairs, "mean": mean}
    error = deviation / math.sqrt(pairs)
    half, p = t_quantile(pairs - 1) * error, two_sided_p(mean / error, pairs - 1)
    return {"pairs": pairs, "mean": mean, "sd": deviation, "ci": [mean - half, mean + half], "p": p}


def holm(ps: list[float], level: float = 0.05) -> list[bool]:
    """Which of several tests are significant at a family-wise level, by their p (Holm, 1979)."""
    significant = [False] * len(ps)
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):  # from the smallest p on
        if ps[i] > level / (len(ps) - rank):
            break
        significant[i] = True
    return significant
