"""What test.py says beyond loss, top-1 and top-5, and the table of models: words, figures and files."""

import json
import statistics
import textwrap
from pathlib import Path

import numpy as np
import torch

import checkpoint
from config import Options, TrainOptions
from inference import Cost, count_parameters
from measures import BINS, paired_gain, reliability, wilson
from models import build_model
from utils import COLOURS, find_logs, new_axes, plot_comparison, run_title, same_but, save_figure

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
    intervals = (wilson(round(numbers[key] * count), count) for key in ("top1", "top5"))
    top1, top5 = (f"{100 * low:.2f}% to {100 * high:.2f}%" for low, high in intervals)
    per_class = ", ".join(
        f"{name} {'no image' if share is None else f'{100 * share:.1f}%'}"
        for name, share in zip(classes, numbers["per_class"], strict=True)
    )
    wrong = [(row[j], i, j) for i, row in enumerate(numbers["confusion"]) for j in range(len(row)) if i != j]
    worst = [
        f"{classes[i]} taken for {classes[j]} {times} times"
        for times, i, j in sorted(wrong, key=lambda cell: -cell[0])[:3]
        if times
    ]
    lines = [
        f"95% intervals over {count:,} images: top-1 {top1}, top-5 {top5}",
        *textwrap.wrap(f"of each class: {per_class}", 110, subsequent_indent="  "),
        f"worst confusions: {', '.join(worst) or 'none'}",
        f"calibration: negative log-likelihood {numbers['nll']:.4f} nats, "
        f"expected calibration error {100 * numbers['ece']:.2f}% ({BINS} bins)",
    ]
    return "\n".join(lines)


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


def pictures_text(paths: tuple[Path, ...], answers: dict[str, torch.Tensor], classes: tuple[str, ...]) -> str:
    """The three likeliest classes of each picture by each model, from its probabilities (B, C)."""
    width = max(map(len, answers))
    lines = []
    for i, path in enumerate(paths):
        lines.append(str(path))
        for model, probabilities in answers.items():
            best = probabilities[i].topk(min(3, len(classes)))
            words = (
                f"{classes[j]} {100 * p:.1f}%" for p, j in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            lines.append(f"  {model:{width}}  {', '.join(words)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- figures

PICTURES_SHOWN = 12  # in one figure, lest it be too tall to look at


def plot_confusion(numbers: dict, classes: tuple[str, ...], title: str, path: Path) -> Path:
    """Draw the confusion matrix, each row as percent of its class; the figure's path."""
    axes = new_axes(title, "class")
    counts = torch.tensor(numbers["confusion"], dtype=torch.float64)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    picture = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    for i, row in enumerate(percent.tolist()):
        for j, value in enumerate(row):
            colour = "white" if value > 50 else "black"
            axes.text(j, i, f"{value:.0f}" if value else "", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted", xticks=range(len(classes)), yticks=range(len(classes)))
    axes.set_xticklabels(classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticklabels(classes)
    axes.grid(False)
    axes.figure.set_size_inches(7, 6)
    axes.figure.colorbar(picture, label="% of the class's images")
    return save_figure(axes, path)


def plot_reliability(logits: torch.Tensor, labels: torch.Tensor, title: str, path: Path) -> Path:
    """Draw accuracy against confidence (Guo et al., 2017, figure 1) and the share of images; the figure's path."""
    count, confidence, accuracy = (values.numpy() for values in reliability(logits, labels))
    edges = [i / BINS for i in range(BINS + 1)]
    axes = new_axes(title, "accuracy, or fraction of images")
    axes.bar(
        edges[:-1],
        np.nan_to_num(accuracy),
        1 / BINS,
        align="edge",
        color=COLOURS[5],
        edgecolor="white",
        label="accuracy",
    )
    axes.plot(confidence, accuracy, ".", color=COLOURS[0], label="at a bin's mean confidence")
    axes.plot([0, 1], [0, 1], "--", color=COLOURS[6], label="perfect calibration")
    axes.stairs(count / count.sum(), edges, color=COLOURS[1], label="fraction of images")
    axes.set(xlabel="confidence", xlim=(0, 1), ylim=(0, 1), xticks=[i / 5 for i in range(6)])
    return save_figure(axes, path)


def plot_pictures(pixels: list, names: list[str], answers: dict, classes: tuple[str, ...], path: Path) -> Path:
    """Draw pictures (B, 32, 32, 3) as the models see them beside each model's probabilities (B, C); the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), 2, squeeze=False, width_ratios=(1, 2.4))
    height = 0.8 / len(answers)
    for i, (left, right) in enumerate(grid):
        left.imshow(pixels[i])
        left.set_title(textwrap.shorten(names[i], 30), fontsize=9)
        left.axis("off")
        for k, (model, probabilities) in enumerate(answers.items()):
            places = [j + (k - (len(answers) - 1) / 2) * height for j in range(len(classes))]
            right.barh(places, (100 * probabilities[i]).numpy(), height, color=COLOURS[k], label=model)
        right.set(xlim=(0, 100), yticks=range(len(classes)), yticklabels=classes)
        right.tick_params(labelsize=8)
        right.invert_yaxis()
        right.grid(axis="x", alpha=0.3)
    figure.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    grid[-1, 1].set_xlabel("probability (%)")
    return save_figure(grid[0, 0], path)  # whose legend is the figure's


def write_json(path: Path, content: dict) -> Path:
    """Write plain values to `path` as JSON, atomically."""
    with checkpoint.writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


# ---------------------------------------------------------------------------------------------- the table of models


def place_in_table(content: dict) -> tuple:
    """A checkpoint's sort key: the teacher, the student without KD, then by temperature, then by seed."""
    return content["role"] != "teacher", content["options"].get("temp", [0]), content["options"]["seed"]


# What test.py --compare adds to the table: a column's title, and how its number is written.
MEASURED = {
    "ece": ("ECE", lambda value: f"{100 * value:.2f}%"),
    "nll": ("NLL", "{:.4f}".format),
    "agreement": ("Agreement", lambda value: f"{100 * value:.2f}%"),
    "kl_to_teacher": ("KL", "{:.4f}".format),
    "macs": ("MACs", lambda value: f"{value / 1e6:,.1f} M"),
    "bytes": ("Size", lambda value: f"{value / 1e6:,.2f} MB"),
    "latency_ms": ("Latency", "{:,.2f} ms".format),
    "images_per_second": ("Images/s", "{:,.0f}".format),
}


def collect(contents: list[dict]) -> dict:
    """Rows and gains from finished checkpoints, those that differ in the seed alone in one row; accuracies in percent.

    Several seeds give means, of top-1 and top-5 a sample standard deviation too, and the gain of KD over the same
    seed's student without it: an effect of KD alone, for the two share initial weights, order and views.
    """
    groups: dict[str, dict[int, dict]] = {}
    for content in contents:
        groups.setdefault(same_but(content, "seed"), {})[content["options"]["seed"]] = content
    rows, gains = [], []
    for runs in groups.values():
        first = next(iter(runs.values()))
        with torch.device("meta"):
            parameters = count_parameters(build_model(first["role"], first["num_classes"]))
        row = {"model": run_title(first), "parameters": parameters, "seeds": list(runs)}
        for key in ("top1", "top5"):
            values = [run["metrics"][key] for run in runs.values()]
            row[key] = statistics.mean(values)
            if len(runs) > 1:
                row |= {f"{key}_sd": statistics.stdev(values), f"{key}_of_seeds": values}
        measured = [run.get("measured", {}) for run in runs.values()]
        row |= {key: statistics.mean(m[key] for m in measured) for key in MEASURED if all(key in m for m in measured)}
        rows.append(row)
        control = groups.get(same_but(first, "seed", "temp", "alpha"), {})
        pairs = [seed for seed in runs if seed in control]
        if first.get("kd") and len(pairs) > 1:
            tops = ([of[seed]["metrics"]["top1"] for seed in pairs] for of in (runs, control))
            gains.append({"model": row["model"], **paired_gain(*tops)})
    return {"rows": rows, "gains": gains}


def results_text(results: dict) -> str:
    """What `collect` returns as a Markdown table, with a sentence a gain."""

    def cell(row: dict, key: str) -> str:
        return f"{row[key]:.2f}%" + (f" ± {row[f'{key}_sd']:.2f}" if f"{key}_sd" in row else "")

    more = {key: column for key, column in MEASURED.items() if any(key in row for row in results["rows"])}
    rows = [
        [r["model"], cell(r, "top1"), cell(r, "top5"), f"{r['parameters']:,}"]
        + [form(r[key]) if key in r else "" for key, (_, form) in more.items()]
        for r in results["rows"]
    ]
    titles = [title for title, _ in more.values()]
    text = table(["Model", "Top 1 Accuracy", "Top 5 Accuracy", "Parameters", *titles], rows)
    for gain in results["gains"]:
        low, high = gain["ci"]
        text += (
            f"\n\n{gain['model']} gains {gain['mean']:+.2f} points of top-1 over the same seeds without KD "
            f"(n = {gain['pairs']}, sd {gain['sd']:.2f}, 95% interval {low:+.2f} to {high:+.2f})"
        ) + (", within seed noise" if gain["within_seed_noise"] else "")
    return text + "\n"


def publish(contents: list[dict], options: Options, name: str) -> None:
    """Print the table of finished checkpoints, write it as Markdown and JSON, and draw the runs' comparison."""
    results = collect(contents)
    text = results_text(results)
    print(text)
    paths = [options.plots_path / f"{options.spec.prefix}{name}{suffix}" for suffix in (".md", ".json")]
    with checkpoint.writing(paths[0]) as temporary:
        temporary.write_text(text)
    write_json(paths[1], results)
    if logs := find_logs(options.plots_path, options.dataset):
        paths.append(plot_comparison(logs, options.comparison_path))
    print(f"saved {', '.join(map(str, paths))}")


def write_table(options: TrainOptions) -> None:
    """Publish the table of the runs of `train.py --all`; UserError where one of them is not finished."""
    runs = options.runs()
    contents = [checkpoint.load(run.checkpoint_path, role=run.role, dataset=run.dataset) for run in runs]
    publish(contents, options, f"results{options.holdout_suffix}")
