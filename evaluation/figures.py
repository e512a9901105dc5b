"""Figures of trained models: confusion, reliability, pictures, the comparison of runs, the paper's experiments."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from evaluation.comparison import rows_of
from evaluation.measures import BINS, reliability
from runtime.cli import format_number
from training.runs import run_from
from utils import figure_style, new_panels, parse_log, save_figure

PICTURES_SHOWN = 12  # in one figure: more make it too tall
CLASSES_SHOWN = 10  # beside a picture
FEW_CLASSES, NAMES_SHOWN = 20, 100  # a figure of more is wide and without numbers, and does not name each
PANELS = 8  # students in one figure of classes


@figure_style
def plot_confusion(numbers: dict, classes: tuple[str, ...], title: str, path: Path) -> Path:
    """Draw the confusion matrix, each row as percent of its class, without numbers where it is large; the path."""
    few = len(classes) <= FEW_CLASSES
    ticks, names, style = class_ticks(classes)
    counts = np.array(numbers["confusion"])
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    (axes,) = new_panels(title, ["class"], "predicted", (7, 6) if few else (14, 13))
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="none")
    for (i, j), value in np.ndenumerate(percent) if few else ():
        colour = "white" if value > 50 else "black"
        axes.text(j, i, f"{value:.0f}" if value else "", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(ticks, names, **style)
    axes.set_yticks(ticks, names, fontsize=style["fontsize"])
    axes.grid(False)
    axes.figure.colorbar(picture, label="% of the class's images", shrink=1 if few else 0.5)
    return save_figure(axes, path)


@figure_style
def plot_reliability(logits: torch.Tensor, labels: torch.Tensor, title: str, path: Path) -> Path:
    """Draw accuracy against confidence (Guo et al., 2017, figure 1) and the share of images; the figure's path."""
    count, confidence, accuracy = (values.numpy() for values in reliability(logits, labels))
    edges = [i / BINS for i in range(BINS + 1)]
    (axes,) = new_panels(title, ["accuracy, or fraction of images"], "confidence")
    style = {"align": "edge", "color": "C5", "edgecolor": "white", "label": "accuracy"}
    axes.bar(edges[:-1], np.nan_to_num(accuracy), 1 / BINS, **style)
    axes.plot(confidence, accuracy, ".", color="C0", label="at a bin's mean confidence")
    axes.plot([0, 1], [0, 1], "--", color="C6", label="perfect calibration")
    axes.stairs(count / count.sum(), edges, color="C1", label="fraction of images")
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[i / 5 for i in range(6)])
    return save_figure(axes, path)


def class_ticks(classes: tuple[str, ...]) -> tuple[range, list[str], dict]:
    """Places and names of an x axis's ticks at classes, of many at some, and the names' style; see `drawable`."""
    ticks = range(0, len(classes), math.ceil(len(classes) / NAMES_SHOWN))
    names = drawable(classes, "class")[:: ticks.step]
    if len(classes) > FEW_CLASSES:
        return ticks, names, {"fontsize": 6, "rotation": 90}
    return ticks, names, {"fontsize": 9, "rotation": 45, "ha": "right", "rotation_mode": "anchor"}


def drawable(names: Sequence[str], what: str, first: int = 0) -> list[str]:
    """Names as a figure shows them, of 24 characters at most; `what` and a number where no font has the letters.

    Call it within a style's context and before the figure is made: it adds installed fonts that have missing letters.
    """
    missing = set("".join(names)) - letters_of(findfont(FontProperties()))
    faces = [face for face in fontManager.ttflist if (face.style, face.weight) == ("normal", 400)]
    fonts = {face.name: face.fname for face in faces if "LastResort" not in face.fname}  # a box for each
    for family in sorted(fonts) if missing else ():
        if found := missing & letters_of(fonts[family]):
            missing -= found
            matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], family]
    shown = [f"{what} {i}" if missing & set(name) else name for i, name in enumerate(names, first)]
    return [name if len(name) <= 24 else f"{name[:23]}…" for name in shown]


def letters_of(path: str) -> set[str]:
    """The letters of a font; none if it can't be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return set(map(chr, get_font(path).get_charmap()))
    return set()


@figure_style
def plot_pictures(pixels: list, names: list[str], answers: dict, classes: tuple[str, ...], path: Path) -> Path:
    """Draw pictures (B, S, S, 3) beside each model's probabilities (B, C), of many classes the likeliest; the path."""
    titles, labels = drawable([Path(name).name for name in names], "picture", 1), drawable(classes, "class")
    figure = Figure((7, 2.2 * len(names) + 0.4))
    grid = figure.subplots(len(names), 2, squeeze=False, width_ratios=(1, 2.4))
    height = 0.8 / len(answers)
    for i, (left, right) in enumerate(grid):
        left.imshow(pixels[i])
        left.set_title(titles[i], fontsize=9)
        left.axis("off")
        likeliest = next(iter(answers.values()))[i].topk(min(CLASSES_SHOWN, len(classes))).indices
        shown = likeliest.sort().values
        for k, (model, probabilities) in enumerate(answers.items()):
            places = [j + (k - (len(answers) - 1) / 2) * height for j in range(len(shown))]
            right.barh(places, (100 * probabilities[i, shown]).numpy(), height, label=model)
        right.set(xlim=(0, 100), yticks=range(len(shown)))
        right.set_yticklabels([labels[j] for j in shown.tolist()])
        right.tick_params(labelsize=8)
        right.invert_yaxis()
    grid[-1, 1].set_xlabel("probability (%)")
    return save_figure(grid[0, 1], path)


@figure_style
def plot_comparison(contents: list[dict], path: Path) -> Path:
    """Draw top-1 (%) and cross-entropy (nats) over the epochs of a table's runs, seeds as a mean on a band; the path.

    A teacher without a log (a plain state dict), or with one of other images than its students', is left out.
    """
    last = run_from(contents[-1]["run"])
    images = last.subset, last.holdout
    contents = [c for c in contents if c["log"] and (c["run"]["subset"], c["run"]["holdout"]) == images]
    title = f"Accuracy and loss on the {'held-out' if last.holdout else 'test'} images of {last.dataset}"
    panels = new_panels(title, ["top-1 (%)", "cross-entropy (nats)"])
    for title, row in rows_of(contents).items():
        logs = [parse_log(content["log"])[1] for content in row]
        for axes, key in zip(panels, ("top1", "loss"), strict=True):
            values = np.array([[line[last.split][key] for line in log] for log in logs])
            epochs, mean = range(1, values.shape[1] + 1), values.mean(axis=0)
            label = f"{title}: {mean[-1]:.2f}" + (f" (mean of {len(values)})" if len(values) > 1 else "")
            (line,) = axes.plot(epochs, mean, marker="." if len(epochs) == 1 else None, label=label)
            if len(values) > 1:
                axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    return save_figure(panels[0], path)


@figure_style
def plot_omitted(contents: list[dict], path: Path) -> Path | None:
    """Draw the accuracy (%) of each class, uncorrected and corrected, of the rows that never saw some; None if none."""
    rows = [(title, row) for title, row in rows_of(contents).items() if "bias" in row[0]["measured"]][:PANELS]
    if not rows:
        return None
    classes = rows[0][1][0]["data"]["classes"]
    ticks, names, style = class_ticks(classes)
    figure = Figure((7 if len(classes) <= FEW_CLASSES else 14, 1 + 1.5 * len(rows)))
    panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    for axes, (title, row) in zip(panels, rows, strict=True):
        omitted = np.isin(classes, run_from(row[0]["run"]).omit)
        for i, (when, key) in enumerate({"uncorrected": "per_class", "corrected": "corrected_per_class"}.items()):
            shares = 100 * np.array([content["measured"][key] for content in row], dtype=float).mean(axis=0)
            for which, colour, places in (("seen", "C0", ~omitted), ("never seen", "C1", omitted)):
                look = {"color": colour, "alpha": 0.5 + 0.5 * i, "label": f"{which}, {when}"}
                axes.bar(np.flatnonzero(places) + 0.4 * i - 0.2, shares[places], 0.4, **look)
        axes.set_title(title[:100], fontsize=10)
        axes.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(-1, len(classes)))
    panels[-1].set_xticks(ticks, names, **style)
    return save_figure(panels[0], path)


def lines_of(rows: list[dict], key: str, words: Callable[[float], str], least: int) -> dict[str, list[dict]]:
    """The rows with a number `key`, in its order, by their label without its `words`; a line has `least` or more."""
    lines: dict[str, list[dict]] = {}
    for row in sorted((row for row in rows if key in row), key=lambda row: row[key]):
        lines.setdefault(row["model"].replace(words(row[key]), ""), []).append(row)
    return {title: line for title, line in lines.items() if len(line) >= least}


@figure_style
def plot_images(results: dict, path: Path) -> Path | None:
    """Draw a table's top-1 (%) over the students' images, seeds as a mean on a band; None if no line has two points."""
    lines = lines_of(results["rows"], "student_images", lambda count: f", {count:,} images", least=2)
    if not lines:
        return None
    title = "Students of a teacher that has seen all images"
    (axes,) = new_panels(title, ["top-1 accuracy (%)"], "training images of the student")
    for title, rows in lines.items():
        of_line = [row["student_images"] for row in rows]
        (line,) = axes.plot(of_line, [row["top1"] for row in rows], marker=".", label=title)
        seeds = [row.get("top1_of_seeds", [row["top1"]]) for row in rows]
        style = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        axes.fill_between(of_line, [*map(min, seeds)], [*map(max, seeds)], **style)
    axes.set_xscale("log")
    counts = sorted({row["student_images"] for rows in lines.values() for row in rows})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    return save_figure(axes, path)


@figure_style
def plot_temperatures(results: dict, path: Path) -> Path | None:
    """Draw a table's gain of KD over T, above the teacher's entropy (nats); None if no line has three points."""
    gains = {gain["model"]: gain for gain in results["gains"]}
    known = [row for row in results["rows"] if row["model"] in gains]
    lines = lines_of(known, "temp", lambda temp: f", Temp = {format_number(temp)}", least=3)
    if not lines:
        return None
    above, below = Figure((7, 5.4)).subplots(2, sharex=True, height_ratios=(3, 2))
    for title, rows in lines.items():
        temps, of_line = [row["temp"] for row in rows], [gains[row["model"]] for row in rows]
        means = [gain["mean"] for gain in of_line]
        halves = [gain["ci"][1] - gain["mean"] if "ci" in gain else 0 for gain in of_line]
        above.errorbar(temps, means, halves, marker=".", capsize=3, label=title)
        below.plot(temps, [row["teacher_entropy"] for row in rows], marker=".")
    above.axhline(0, color="C6", linewidth=0.8)
    above.set(title="Gain of KD over the temperature", ylabel="points of top-1", xscale="log")
    below.set(xlabel="T", ylabel="teacher's entropy (nats)", ylim=(0, None))
    ticks = sorted({row["temp"] for rows in lines.values() for row in rows})
    below.set_xticks(ticks, [format_number(temp) for temp in ticks])
    for axes in (above, below):
        axes.minorticks_off()
    return save_figure(above, path)
