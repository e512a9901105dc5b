"""What test.py says beyond loss, top-1 and top-5, in words, and the formats of numbers."""

import math
import textwrap

import torch

from evaluation.measures import BINS, wilson
from runtime.cli import format_number

TOPS = {"top1": "top-1", "top5": "top-5"}
WORST_SHOWN = 10  # classes, where there are more than twice as many
NUMBERS = {  # beside accuracies: the title of a table's column, that of a row of costs, and the format
    "parameters": ("Parameters", "parameters", "{:,.0f}".format),
    "epochs": ("Epochs", "", str),
    "gain": ("Gain of KD", "", str),
    "ece": ("ECE", "", "{:.2%}".format),
    "loss": ("NLL", "", "{:.4f}".format),
    "agreement": ("Agreement", "", "{:.2%}".format),
    "kl_to_teacher": ("KL", "", "{:.4f}".format),
    "macs": ("MACs", "multiply-accumulates per image", lambda value: f"{value / 1e6:,.1f} M"),
    "seconds": ("Training", "", "{:,.0f} s".format),
    "bytes": ("Size", "checkpoint", lambda value: f"{value / 1e6:,.2f} MB"),
    "latency_ms": ("Latency", "latency at batch 1", "{:,.2f} ms".format),
    "images_per_second": ("Images/s", "images/s in batches", "{:,.0f}".format),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its source aligned to be readable as plain text; numbers to the right."""
    first, *others = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    row_format = f"| {{:<{first}}} |" + "".join(f" {{:>{width}}} |" for width in others)  # | {:<12} | {:>6} |
    rule = f"|:{'-' * (first + 1)}|" + "".join(f"{'-' * (width + 1)}:|" for width in others)
    return "\n".join([row_format.format(*header), rule, *(row_format.format(*row) for row in rows)])


def accuracy_text(numbers: dict, classes: tuple[str, ...]) -> str:
    """Accuracy and calibration in words, from what `measure` returns."""
    count = numbers["images"]
    intervals = {key: wilson(round(numbers[key] * count), count) for key in TOPS if key in numbers}
    tops = [f"{TOPS[key]} {100 * low:.2f}% to {100 * high:.2f}%" for key, (low, high) in intervals.items()]
    wrong = [(n, i, j) for i, row in enumerate(numbers["confusion"]) for j, n in enumerate(row) if n and i != j]
    wrong.sort(key=lambda cell: cell[0], reverse=True)  # which leaves equal ones in order
    worst = [f"{classes[i]} predicted as {classes[j]} {n} times" for n, i, j in wrong[:3]]
    lines = [f"95% intervals over {count:,} images: {', '.join(tops)}", *per_class_lines(numbers["per_class"], classes)]
    lines.append(f"worst confusions: {', '.join(worst) or 'none'}")
    lines.append(f"expected calibration error {100 * numbers['ece']:.2f}% ({BINS} bins)")
    return "\n".join(lines)


def per_class_lines(shares: list[float | None], classes: tuple[str, ...]) -> list[str]:
    """The accuracy of each class, or if there are many, of the worst; a share (0 to 1) is None without an image."""
    title, pairs = "accuracy of each class", list(zip(classes, shares, strict=True))
    if len(classes) > 2 * WORST_SHOWN:
        seen = [(name, share) for name, share in pairs if share is not None]
        title = f"accuracy of the {WORST_SHOWN} worst classes"
        pairs = sorted(seen, key=lambda pair: pair[1])[:WORST_SHOWN]
    words = (f"{name} {'no image' if share is None else f'{100 * share:.1f}%'}" for name, share in pairs)
    return textwrap.wrap(f"{title}: {', '.join(words)}", 110, subsequent_indent="  ")


def bias_text(numbers: dict, omitted: tuple[str, ...]) -> str:
    """The table of top-1 with omitted classes, uncorrected and corrected, from what `measure_checkpoint` says."""
    prefixes = {"uncorrected": ""} | ({"after the bias correction": "corrected_"} if "bias" in numbers else {})
    rows = []
    for title, key in {"all classes": "top1", "omitted": "top1_omitted", "others": "top1_others"}.items():
        if key in numbers:
            rows.append([title, *(f"{100 * numbers[prefix + key]:.2f}%" for prefix in prefixes.values())])
    text = table([f"Top-1 without {', '.join(omitted)} in training", *prefixes], rows)
    offsets = zip(omitted, numbers.get("bias", ()), strict=False)
    added = ", ".join(f"{name} {offset:+.2f}" for name, offset in offsets)
    return f"{text}\nadded to the logits: {added or 'none, the student was trained on other images'}"


def softness_text(numbers: dict, temp: float, classes: int) -> str:
    """What `softness` returns, in words."""
    entropy = f"entropy {numbers['entropy']:.2f} out of log C = {math.log(classes):.2f} nats"
    return f"T = {format_number(temp)}: mean largest probability {numbers['confidence']:.3f}, {entropy}"


def fidelity_text(numbers: dict) -> str:
    """The table of a student's fidelity to its teacher, from what `fidelity` returns."""
    rows = [["top-1 agreement", f"{100 * numbers['agreement']:.2f}%"]]
    rows.append(["KL(teacher, student), nats", f"{numbers['kl_to_teacher']:.4f}"])
    for i, teacher in enumerate(("right", "wrong")):
        for j, student in enumerate(("right", "wrong")):
            rows.append([f"images: teacher {teacher}, student {student}", f"{numbers['contingency'][i][j]:,}"])
    return table(["Fidelity to the teacher", "this student"], rows)


def cost_text(cost: dict[str, float], teacher: dict[str, float] | None) -> str:
    """The table of costs, beside the teacher's where there is one."""
    columns, rows = ["student", "teacher", "ratio"] if teacher else ["this model"], []
    for name, value in cost.items():
        _, title, form = NUMBERS[name]
        rows.append([title, form(value)])
        if teacher:
            ratio = value / teacher[name]
            rows[-1] += [form(teacher[name]), f"{ratio:.3g} x" if ratio >= 1 else f"1/{1 / ratio:.3g}"]
    return table(["Cost", *columns], rows)


def pictures_text(names: list[str], by_model: dict[str, torch.Tensor], classes: tuple[str, ...]) -> str:
    """The three likeliest classes of each picture by each model, from its probabilities (B, C)."""
    width = max(map(len, by_model))
    lines = []
    for i, name in enumerate(names):
        lines.append(name)
        for model, probabilities in by_model.items():
            best = probabilities[i].topk(min(3, len(classes))).indices.tolist()
            words = (f"{classes[j]} {probabilities[i, j]:.1%}" for j in best)
            lines.append(f"  {model:{width}}  {', '.join(words)}")
    return "\n".join(lines)
