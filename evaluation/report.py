"""What test.py says beyond loss, top-1 and top-5, and the table of models: words and files."""

import contextlib
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from config import Options
from evaluation.figures import find_logs, plot_comparison
from evaluation.inference import Cost, count_parameters
from evaluation.measures import BINS, paired_gain, wilson
from models import build_model
from runtime.errors import UserError, reason
from runtime.files import writing
from runtime.identity import DISTILLATION, Identity, labels

TOPS = {"top1": "top-1", "top5": "top-5"}
EXTREMES = 10  # classes at each end, where there are too many to tell of all

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
        f"{classes[i]} taken for {classes[j]} {times} times"
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


def fidelity_text(columns: dict[str, dict]) -> str:
    """The table of fidelity to the teacher; `columns` are a student's name and what `fidelity` returns."""
    rows = [
        ["top-1 agreement", *(f"{100 * f['agreement']:.2f}%" for f in columns.values())],
        ["KL(teacher, student), nats", *(f"{f['kl_to_teacher']:.4f}" for f in columns.values())],
    ]
    for i, teacher in enumerate(("right", "wrong")):
        for j, student in enumerate(("right", "wrong")):
            counts = (f"{f['contingency'][i][j]:,}" for f in columns.values())
            rows.append([f"images: teacher {teacher}, student {student}", *counts])
    return table(["Fidelity to the teacher", *columns], rows)


def cost_text(cost: Cost, teacher: Cost | None) -> str:
    """The table of costs, beside the teacher's where there is one."""

    def cells(of: Cost) -> list[str]:
        timed = ((of.latency_ms, ",.2f"), (of.images_per_second, ",.0f"))
        spread = [f"{middle:{form}} ({low:{form}} to {high:{form}})" for (low, middle, high), form in timed]
        return [f"{of.parameters:,}", f"{of.macs / 1e6:,.1f} M", f"{of.bytes / 1e6:,.2f} MB", *spread]

    names = [
        "parameters",
        "multiply-accumulates, an image",
        "checkpoint",
        "latency at batch 1, ms",
        "images/s at batch 256",
    ]
    if teacher is None:
        return table(
            ["Cost: median (quartiles)", "this model"], [list(r) for r in zip(names, cells(cost), strict=True)]
        )
    pairs = zip(cost.medians().values(), teacher.medians().values(), strict=True)
    ratios = [f"{a / b:.3g} x" if a >= b else f"1/{b / a:.3g}" for a, b in pairs]
    rows = zip(names, cells(cost), cells(teacher), ratios, strict=True)
    return table(["Cost: median (quartiles)", "student", "teacher", "ratio"], [list(row) for row in rows])


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


def is_stdout(path: Path) -> bool:
    """Whether what is written to `path` goes where this process prints."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is no such file, or no standard output
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    return False


def is_written_through(path: Path) -> bool:
    """Whether `path` is a device, a pipe or this process's own output, to which nothing is renamed."""
    return is_stdout(path) or (path.exists() and not path.is_file())


def write_json(path: Path, content: dict) -> Path:
    """Write plain values to `path` as JSON: atomically, or through it where it is a device or a pipe."""
    text = json.dumps(content, indent=1) + "\n"
    if is_stdout(path):  # a file, perhaps, that the rest of the report goes into, too
        print(text, end="")
        return path
    if is_written_through(path):
        try:
            path.write_text(text)
        except OSError as error:
            raise UserError(f"can't write {path}: {reason(error)}") from error
        return path
    with writing(path) as temporary:
        temporary.write_text(text)
    return path


# ---------------------------------------------------------------------------------------------- the table of models

# What test.py --compare adds to the table: a column's title, and how its number is written.
MEASURED = {
    "ece": ("ECE", lambda value: f"{100 * value:.2f}%"),
    "loss": ("NLL", "{:.4f}".format),
    "agreement": ("Agreement", lambda value: f"{100 * value:.2f}%"),
    "kl_to_teacher": ("KL", "{:.4f}".format),
    "macs": ("MACs", lambda value: f"{value / 1e6:,.1f} M"),
    "seconds": ("Training", "{:,.0f} s".format),
    "bytes": ("Size", lambda value: f"{value / 1e6:,.2f} MB"),
    "latency_ms": ("Latency", "{:,.2f} ms".format),
    "images_per_second": ("Images/s", "{:,.0f}".format),
}


def rows_of(contents: list[dict]) -> dict[str, list[dict]]:
    """Checkpoints by the label of their row: those that differ in the seed alone share one, copies of a run do not."""
    rows: dict[tuple, dict[int, dict]] = {}
    for content in contents:
        run, copy = content["identity"], 0
        while run["seed"] in rows.get((run.without("seed"), copy), {}):
            copy += 1
        rows.setdefault((run.without("seed"), copy), {})[run["seed"]] = content
    runs = [list(row.values()) for row in rows.values()]
    names = labels([row[0]["identity"] for row in runs])
    for i, (_, copy) in enumerate(rows):
        if copy:
            names[i] += f", {runs[i][0]['path']}"
    return dict(zip(names, runs, strict=True))


def collect(contents: list[dict]) -> dict:
    """Rows, gains and notes from finished checkpoints; accuracies in percent.

    Several seeds give means, of top-1 and top-5 a sample standard deviation too, and the gain of KD over the same
    seed's student without it: an effect of KD alone, for the two share initial weights, order and views. Another loss's
    gain over plain KD is paired like that, too.
    """
    results = {"rows": [], "gains": [], "gains_over_kd": [], "notes": []}
    rows = rows_of(contents)
    for label, runs in rows.items():
        first = runs[0]["identity"]
        with torch.device("meta"):
            parameters = count_parameters(build_model(first["role"], first["num_classes"]))
        row = {"model": label, "parameters": parameters, "seeds": [run["identity"]["seed"] for run in runs]}
        for key in [key for key in TOPS if key in runs[0]["metrics"]]:
            values = [run["metrics"][key] for run in runs]
            row[key] = statistics.mean(values)
            if len(runs) > 1:
                row |= {f"{key}_sd": statistics.stdev(values), f"{key}_of_seeds": values}
        measured = [run.get("measured", {}) for run in runs]
        row |= {key: statistics.mean(m[key] for m in measured) for key in MEASURED if all(key in m for m in measured)}
        results["rows"].append(row)
        if first["kd"]:
            if gain := gain_over(runs, contents, Identity.is_control_of):
                results["gains"].append({"model": label, **gain})
            else:
                results["notes"].append(f"{label}: no gain is shown, for {why_no_gain(runs, contents)}")
        for other, others in rows.items():
            if gain := gain_over(runs, others, Identity.is_plain_kd_beside):
                results["gains_over_kd"].append({"model": label, "over": other, **gain})
    return results


def gain_over(runs: list[dict], others: list[dict], are_paired: Callable[[Identity, Identity], bool]) -> dict | None:
    """The gain in top-1 of runs over those of `others` that are paired with them; None of fewer than two pairs."""
    pairs = []
    for run in runs:
        partners = [other for other in others if are_paired(other["identity"], run["identity"])]
        pairs += [(run["metrics"]["top1"], partner["metrics"]["top1"]) for partner in partners[:1]]
    return paired_gain(*zip(*pairs, strict=True)) if len(pairs) > 1 else None


def why_no_gain(runs: list[dict], contents: list[dict]) -> str:
    """Why students with KD have fewer than the two pairs that a gain with its interval needs."""
    run = runs[0]["identity"]
    others = [other["identity"] for other in contents if other["identity"]["role"] == "student"]
    others = [other for other in others if not other["kd"]]
    if not others:
        return "there is no student without KD"
    if any(other.is_control_of(run) for other in others):
        return "one pair has no spread: train further seeds (--seeds 3)"
    nearest = min(others, key=lambda other: len(set(other.differing(run)) - DISTILLATION))
    return f"no student without KD is its control: the nearest has {nearest.beside(run, DISTILLATION)}"


def points(gain: dict) -> str:
    """A gain and its 95 % interval, in points."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(gain["mean"], *gain["ci"])


def verdict(gain: dict) -> str:
    """Whether a loss beats the one that its gain is over."""
    if gain["within_seed_noise"]:
        return "does not beat it: within seed noise"
    return "beats it" if gain["mean"] > 0 else "is worse"


def results_text(results: dict) -> str:
    """What `collect` returns as a Markdown table, with a sentence a gain and a note."""

    def cell(row: dict, key: str) -> str:
        return f"{row[key]:.2f}%" + (f" ± {row[f'{key}_sd']:.2f}" if f"{key}_sd" in row else "")

    more = {key: column for key, column in MEASURED.items() if any(key in row for row in results["rows"])}
    gains = {gain["model"]: points(gain) for gain in results["gains"]}
    tops = [key for key in TOPS if any(key in row for row in results["rows"])]
    rows = [
        [r["model"], *(cell(r, key) for key in tops), f"{r['parameters']:,}"]
        + [gains.get(r["model"], "")] * bool(gains)
        + [form(r[key]) if key in r else "" for key, (_, form) in more.items()]
        for r in results["rows"]
    ]
    titles = [*(f"Top {key[-1]} Accuracy" for key in tops), "Parameters"]
    titles += ["Gain of KD"] * bool(gains) + [title for title, _ in more.values()]
    text = table(["Model", *titles], rows)
    for gain in results["gains"]:
        low, high = gain["ci"]
        text += (
            f"\n\n{gain['model']} gains {gain['mean']:+.2f} points of top-1 over the same seeds without KD "
            f"(n = {gain['pairs']}, sd {gain['sd']:.2f}, 95% interval {low:+.2f} to {high:+.2f})"
        ) + (", within seed noise" if gain["within_seed_noise"] else "")
    if results["gains_over_kd"]:
        rows = [[g["model"], g["over"], points(g), verdict(g)] for g in results["gains_over_kd"]]
        text += "\n\n" + table(["Loss", "Over plain KD, same seeds", "Top 1, points", ""], rows)
    for note in results["notes"]:
        text += f"\n\n{note}"
    return text + "\n"


def publish(contents: list[dict], options: Options, name: str) -> None:
    """Write the table of finished checkpoints as Markdown and JSON, draw the runs' comparison, and print the table."""
    results = collect(contents)
    text = results_text(results)
    stem = f"{options.spec.prefix}{name}{options.trial_suffix}"
    paths = [options.plots_path / f"{stem}{suffix}" for suffix in (".md", ".json")]
    with writing(paths[0]) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no text
    write_json(paths[1], results)
    images = contents[0]["identity"]["images"]
    if logs := find_logs(options.plots_path, options.dataset, options.subset, options.holdout, images):
        paths.append(plot_comparison(logs, options.comparison_path))
    print(f"{text}\nsaved {', '.join(map(str, paths))}")
