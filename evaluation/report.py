"""What test.py says beyond loss, top-1 and top-5, and the table of models: words and files."""

import json
import math
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.comparison import TOPS, rows_of
from evaluation.figures import plot_comparison, plot_images, plot_omitted, plot_temperatures
from evaluation.inference import Cost, medians
from evaluation.measures import BINS, holm, paired_gain, wilson
from runtime.cli import format_number
from runtime.files import writing
from training.runs import (
    KD_FIELDS,
    RunConfig,
    describe_differences,
    differences,
    is_baseline_of,
    is_plain_kd_beside,
    run_from,
)

EXTREMES = 10  # classes shown at each end, if there are too many to show all

FORMATS = {
    **dict.fromkeys(("ece", "agreement"), lambda value: f"{100 * value:.2f}%"),
    **dict.fromkeys(("loss", "kl_to_teacher"), "{:.4f}".format),
    **dict.fromkeys(("parameters", "images_per_second"), "{:,.0f}".format),
    "macs": lambda value: f"{value / 1e6:,.1f} M",
    "seconds": "{:,.0f} s".format,
    "bytes": lambda value: f"{value / 1e6:,.2f} MB",
    "latency_ms": "{:,.2f} ms".format,
}
# The titles of what is measured beside accuracy: a table's columns, and the rows of costs.
MEASURED = {
    "ece": "ECE", "loss": "NLL", "agreement": "Agreement", "kl_to_teacher": "KL", "macs": "MACs",
    "seconds": "Training", "bytes": "Size", "latency_ms": "Latency", "images_per_second": "Images/s",
}  # fmt: skip
COSTS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates per image",
    "bytes": "checkpoint",
    "latency_ms": "latency at batch 1",
    "images_per_second": "images/s in batches",
}

# ---------------------------------------------------------------------------------------------- words


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose source is aligned, so that it is the text too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rules = [f":{'-' * (widths[0] + 1)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join([row[0].ljust(widths[0]), *cells[1:]])} |")
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def accuracy_text(numbers: dict, classes: tuple[str, ...]) -> str:
    """Accuracy and calibration in words, from what `measure` returns."""
    count = numbers["images"]
    intervals = {key: wilson(round(numbers[key] * count), count) for key in TOPS if key in numbers}
    tops = [f"{TOPS[key]} {100 * low:.2f}% to {100 * high:.2f}%" for key, (low, high) in intervals.items()]
    wrong = [(row[j], i, j) for i, row in enumerate(numbers["confusion"]) for j in range(len(row)) if i != j]
    worst = [
        f"{classes[i]} predicted as {classes[j]} {times} times"
        for times, i, j in sorted(wrong, key=lambda cell: -cell[0])[:3]
        if times
    ]
    lines = [
        f"95% intervals over {count:,} images: {', '.join(tops)}",
        *per_class_lines(numbers["per_class"], classes),
        f"worst confusions: {', '.join(worst) or 'none'}",
        f"expected calibration error {100 * numbers['ece']:.2f}% ({BINS} bins)",
    ]
    return "\n".join(lines)


def per_class_lines(shares: list[float | None], classes: tuple[str, ...]) -> list[str]:
    """The accuracy (0 to 1, None where there was no image) of each class; of many, of the worst and the best."""
    named = list(zip(classes, shares, strict=True))
    parts = {"of each class": named}
    if len(classes) > 2 * EXTREMES:
        seen = sorted((pair for pair in named if pair[1] is not None), key=lambda pair: pair[1])
        parts = {f"the {EXTREMES} worst classes": seen[:EXTREMES], f"the {EXTREMES} best": seen[: -EXTREMES - 1 : -1]}
    lines = []
    for title, pairs in parts.items():
        words = (f"{name} {'no image' if share is None else f'{100 * share:.1f}%'}" for name, share in pairs)
        lines += textwrap.wrap(f"{title}: {', '.join(words)}", 110, subsequent_indent="  ")
    return lines


def bias_text(numbers: dict, omitted: tuple[str, ...]) -> str:
    """The table of top-1 with omitted classes, as it is and corrected, from what `measure_bias` returns."""
    prefixes = {"as it is": "", "after the bias correction": "corrected_"}
    prefixes = {title: prefix for title, prefix in prefixes.items() if f"{prefix}top1_others" in numbers}
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
    return (
        f"T = {format_number(temp)}: mean largest probability {numbers['confidence']:.3f}, "
        f"entropy {numbers['entropy']:.2f} of log C = {math.log(classes):.2f} nats"
    )


def fidelity_text(numbers: dict) -> str:
    """The table of a student's fidelity to its teacher, from what `fidelity` returns."""
    rows = [["top-1 agreement", f"{100 * numbers['agreement']:.2f}%"]]
    rows.append(["KL(teacher, student), nats", f"{numbers['kl_to_teacher']:.4f}"])
    for i, teacher in enumerate(("right", "wrong")):
        for j, student in enumerate(("right", "wrong")):
            rows.append([f"images: teacher {teacher}, student {student}", f"{numbers['contingency'][i][j]:,}"])
    return table(["Fidelity to the teacher", "this student"], rows)


def cost_text(cost: Cost, teacher: Cost | None) -> str:
    """The table of costs, beside the teacher's where there is one."""

    def cell(values: tuple[float, ...], form: Callable) -> str:
        low, high = form(values[0]), form(values[-1])
        return low if len(values) == 1 else f"{form(values[1])} ({low} to {high})"

    rows = [[title, cell(cost[name], FORMATS[name])] for name, title in COSTS.items()]
    if teacher is None:
        return table(["Cost: median (quartiles)", "this model"], rows)
    own, others = medians(cost), medians(teacher)
    for row, name in zip(rows, COSTS, strict=True):
        ratio = own[name] / others[name]
        row += [cell(teacher[name], FORMATS[name]), f"{ratio:.3g} x" if ratio >= 1 else f"1/{1 / ratio:.3g}"]
    return table(["Cost: median (quartiles)", "student", "teacher", "ratio"], rows)


def pictures_text(names: list[str], answers: dict[str, torch.Tensor], classes: tuple[str, ...]) -> str:
    """The three likeliest classes of each picture by each model, from its probabilities (B, C)."""
    width = max(map(len, answers))
    lines = []
    for i, name in enumerate(names):
        lines.append(name)
        for model, probabilities in answers.items():
            best = probabilities[i].topk(min(3, len(classes)))
            words = (
                f"{classes[j]} {100 * p:.1f}%" for p, j in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            lines.append(f"  {model:{width}}  {', '.join(words)}")
    return "\n".join(lines)


def write_json(path: Path, content: dict) -> Path:
    """Write plain values to `path` as JSON, atomically; the path."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


# ---------------------------------------------------------------------------------------------- the table of models

OTHER_MACHINES = "†"
# Accuracies: columns with a deviation over seeds.
ACCURACIES = {
    "top1": "Top 1 Accuracy",
    "top5": "Top 5 Accuracy",
    "top1_omitted": "Omitted",
    "top1_others": "Others",
    "corrected_top1": "Corrected",
    "corrected_top1_omitted": "Corrected, omitted",
    "corrected_top1_others": "Corrected, others",
}


def collect(contents: list[dict]) -> dict:
    """Rows, gains and notes from measured checkpoints; accuracies in percent.

    Several seeds give means, of top-1 and top-5 a sample standard deviation too, and the gain of KD over the same-seed
    baseline without it, which has the same initial weights, order and views. The gain of another loss over plain KD is
    paired like that, too, and judged with Holm's correction over all those comparisons.
    """
    results = {"rows": [], "gains": [], "gains_over_kd": [], "notes": []}
    rows = rows_of(contents)
    for label, row in rows.items():
        runs = [run_from(content["run"]) for content in row]
        numbers = {"model": label, "epochs": runs[0].num_epochs, "parameters": row[0]["measured"]["parameters"]}
        numbers["seeds"] = [run.seed for run in runs]
        if runs[0].student_images:
            numbers["student_images"] = runs[0].student_images
        if len({tuple(content["machine"].values()) for content in row}) > 1:
            numbers["machines"] = sorted({", torch ".join(c["machine"][k] for k in ("device", "torch")) for c in row})
        measured = [content["measured"] for content in row]
        for key in [key for key in ACCURACIES if key in measured[0]]:
            values = [100 * m[key] for m in measured]
            numbers[key] = statistics.mean(values)
            if len(values) > 1:
                numbers |= {f"{key}_sd": statistics.stdev(values), f"{key}_of_seeds": values}
        numbers |= {
            key: statistics.mean(m[key] for m in measured) for key in MEASURED if all(key in m for m in measured)
        }
        if "bias" in measured[0]:
            numbers["bias"] = [statistics.mean(values) for values in zip(*(m["bias"] for m in measured), strict=True)]
        results["rows"].append(numbers)
        if runs[0].kd:
            numbers |= {"temp": runs[0].temp, **teacher_softness(row)}
            differences_of_pairs = paired_differences(row, contents, is_baseline_of)
            if differences_of_pairs:
                results["gains"].append({"model": label, **paired_gain(differences_of_pairs)})
            else:
                results["notes"].append(f"{label}: no baseline, {why_no_pair(runs[0], contents)}")
        for other_label, others in rows.items():
            differences_of_pairs = paired_differences(row, others, is_plain_kd_beside)
            if differences_of_pairs:
                gain = {"model": label, "over": other_label, **paired_gain(differences_of_pairs)}
                results["gains_over_kd"].append(gain)
    tested = [gain for gain in results["gains_over_kd"] if "p" in gain]
    for gain, significant in zip(tested, holm([gain["p"] for gain in tested]), strict=True):
        gain["significant"] = significant
    return results


def teacher_softness(row: list[dict]) -> dict[str, float]:
    """The mean softness of the teacher's outputs at the temperature of a row, in the first epochs of its logs."""
    found = [json.loads(content["log"].splitlines()[1]).get("teacher") for content in row]
    if None in found:  # a log of an earlier version
        return {}
    return {f"teacher_{key}": statistics.mean(numbers[key] for numbers in found) for key in found[0]}


def paired_differences(
    row: list[dict], others: list[dict], are_paired: Callable[[RunConfig, RunConfig], bool]
) -> list[float]:
    """The differences in top-1 (points) between the runs of a row and their partners among `others`."""
    found = []
    for content in row:
        run = run_from(content["run"])
        partner = next((other for other in others if are_paired(run_from(other["run"]), run)), None)
        if partner:
            found.append(100 * (content["measured"]["top1"] - partner["measured"]["top1"]))
    return found


def why_no_pair(run: RunConfig, contents: list[dict]) -> str:
    """Why a student with KD has no baseline."""
    others = [run_from(other["run"]) for other in contents]
    others = [other for other in others if other.role == "student" and not other.kd]
    if not others:
        return "there is no student without KD"
    nearest = min(others, key=lambda other: len(differences(other, run, KD_FIELDS)))
    return f"the nearest student without KD has {describe_differences(nearest, run, KD_FIELDS)}"


def points(gain: dict) -> str:
    """A gain in points with its 95 % interval, which a single pair lacks."""
    return "{:+.2f}".format(round(gain["mean"], 2) + 0.0) + (
        " ({:+.2f} to {:+.2f})".format(*gain["ci"]) if "ci" in gain else " (one pair)"
    )


def gain_text(gain: dict) -> str:
    """A gain of KD in a sentence."""
    text = f"{gain['model']} gains {gain['mean']:+.2f} points of top-1 over the same-seed baseline without KD"
    if "ci" not in gain:
        return f"{text} (one pair, no interval: --seeds 3 gives one)"
    low, high = gain["ci"]
    text += f" (n = {gain['pairs']}, sd {gain['sd']:.2f}, 95% interval {low:+.2f} to {high:+.2f})"
    return text + (", within seed noise" if low <= 0 <= high else "")


def verdict(gain: dict) -> str:
    """Whether a loss beats plain KD."""
    if "p" not in gain:
        return "one pair: not tested"
    return ("better" if gain["mean"] > 0 else "worse") if gain["significant"] else "within seed noise"


def results_text(results: dict) -> str:
    """What `collect` returns as a Markdown table, with sentences on gains and notes."""

    def cell(row: dict, key: str) -> str:
        if key not in row:
            return ""
        return f"{row[key]:.2f}%" + (f" ± {row[f'{key}_sd']:.2f}" if f"{key}_sd" in row else "")

    more = {key: title for key, title in MEASURED.items() if any(key in row for row in results["rows"])}
    gains = {gain["model"]: points(gain) for gain in results["gains"]}
    tops = [key for key in ACCURACIES if any(key in row for row in results["rows"])]
    rows = [
        [row["model"] + (f" {OTHER_MACHINES}" if "machines" in row else ""), *(cell(row, key) for key in tops)]
        + [f"{row['parameters']:,}", f"{row['epochs']}"]
        + [gains.get(row["model"], "")] * bool(gains)
        + [FORMATS[key](row[key]) if key in row else "" for key in more]
        for row in results["rows"]
    ]
    titles = [*(ACCURACIES[key] for key in tops), "Parameters", "Epochs"]
    titles += ["Gain of KD"] * bool(gains) + list(more.values())
    texts = [table(["Model", *titles], rows), *map(gain_text, results["gains"])]
    if results["gains_over_kd"]:
        tested = sum("p" in gain for gain in results["gains_over_kd"])
        rows = [[gain["model"], gain["over"], points(gain), verdict(gain)] for gain in results["gains_over_kd"]]
        texts.append(table(["Loss", "Over plain KD, same seeds", "Top 1, points", "Verdict"], rows))
        texts.append(
            f"Verdicts at the 5% level, with Holm's correction for {tested} comparison{'' if tested == 1 else 's'}."
        )
    for row in results["rows"]:
        if "machines" in row:
            texts.append(f"{OTHER_MACHINES} {row['model']}: runs of different machines, {'; '.join(row['machines'])}")
    return "\n\n".join(texts + results["notes"]) + "\n"


def publish(contents: list[dict], folder: Path) -> None:
    """Write what the table of measured checkpoints shows into a folder, and print it.

    results.md and results.json are the table, comparison.png its runs' curves, runs.jsonl their logs. Omitted classes,
    several numbers of images and three or more temperatures have figures of their own.
    """
    results = collect(contents)
    text = results_text(results)
    for name, content in (("results.md", text), ("runs.jsonl", "".join(content["log"] for content in contents))):
        with writing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="replace")  # a file's name may be no text
    write_json(folder / "results.json", results)
    plot_comparison(contents, folder / "comparison.png")
    drawn = [
        plot_omitted(contents, folder / "omitted.png"),
        plot_images(results, folder / "images.png"),
        plot_temperatures(results, folder / "temperatures.png"),
    ]
    names = ["results.md", "results.json", "comparison.png", *(path.name for path in drawn if path)]
    print(f"{text}\nsaved {folder}: {', '.join(names)} and runs.jsonl")
