"""Figures of trained models: confusion, reliability, pictures, the comparison of runs, the paper's experiments."""

import contextlib
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from evaluation.comparison import rows_of
from evaluation.measures import BINS, reliability
from training.runs import config_of
from utils import figure_style, new_panels, parse_log, save_figure

PICTURES_SHOWN = 12  # in one figure: more make it too tall
CLASSES_SHOWN = 10  # beside a picture
FEW_CLASSES, NAMES_SHOWN = 20, 100  # with more classes: wide, no numbers; only some are named


@figure_style
def plot_confusion(numbers: dict, classes: tuple[str, ...], title: str, path: Path) -> Path:
    """Draw the confusion matrix, each row as percent of its class, numbers only if it is small; return the path."""
    few = len(classes) <= FEW_CLASSES
    ticks, names, style = class_ticks(classes)
    counts = np.array(numbers["confusion"])
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    (axes,) = new_panels(title, ["class"], "predicted", (7, 6) if few else (14, 13))
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="none")
    if few:
        for (i, j), value in np.ndenumerate(percent):
            colour = "white" if value > 50 else "black"
            axes.text(j, i, f"{value:.0f}" if value else "", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(ticks, names, **style)
    axes.set_yticks(ticks, names, fontsize=style["fontsize"])
    axes.grid(False)
    axes.figure.colorbar(picture, label="% of the class's images", shrink=1 if few else 0.5)
    return save_figure(axes, path)


@figure_style
def plot_reliability(logits: torch.Tensor, labels: torch.Tensor, title: str, path: Path) -> Path:
    """Draw accuracy against confidence (Guo et al., 2017, figure 1) and the share of images; return the path."""
    count, confidence, accuracy = (values.numpy() for values in reliability(logits, labels))
    edges = [i / BINS for i in range(BINS + 1)]
    (axes,) = new_panels(title, ["accuracy, or fraction of images"], "confidence")
    axes.bar(edges[:-1], np.nan_to_num(accuracy), 1 / BINS, align="edge", color="C5", ec="white", label="accuracy")
    axes.plot(confidence, accuracy, ".", color="C0", label="at a bin's mean confidence")
    axes.plot([0, 1], [0, 1], "--", color="C6", label="perfect calibration")
    axes.stairs(count / count.sum(), edges, color="C1", label="fraction of images")
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[i / 5 for i in range(6)])
    return save_figure(axes, path)


def class_ticks(classes: tuple[str, ...]) -> tuple[range, list[str], dict]:
    """The ticks of an x axis of classes (of many, only some), their names and the names' style; see `drawable`."""
    ticks = range(0, len(classes), math.ceil(len(classes) / NAMES_SHOWN))
    names = drawable(classes, "class")[:: ticks.step]
    if len(classes) > FEW_CLASSES:
        return ticks, names, {"fontsize": 6, "rotation": 90}
    return ticks, names, {"fontsize": 9, "rotation": 45, "ha": "right", "rotation_mode": "anchor"}


def drawable(names: Sequence[str], what: str, first: int = 0) -> list[str]:
    """Names cut to 24 letters; fonts for missing letters are added to rcParams, else a name is `what` and a number."""
    missing = set("".join(names)) - letters_of(findfont(FontProperties()))
    for face in sorted(fontManager.ttflist, key=lambda face: face.name):
        is_regular = (face.style, face.weight) == ("normal", 400) and "LastResort" not in face.fname  # it draws boxes
        if missing and is_regular and (found := missing & letters_of(face.fname)):
            missing -= found
            matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], face.name]  # of the style in use
    shown = [f"{what} {i}" if missing & set(name) else name for i, name in enumerate(names, first)]
    return [name if len(name) <= 24 else f"{name[:23]}…" for name in shown]


def letters_of(path: str) -> set[str]:
    """The letters of a font; none if it can't be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return set(map(chr, get_font(path).get_charmap()))
    return set()


@figure_style
def plot_pictures(pixels: list, names: list[str], by_model: dict, classes: tuple[str, ...], path: Path) -> Path:
    """Draw pictures (B, S, S, 3), each beside every model's probabilities for the first model's likeliest classes."""
    titles, labels = drawable([Path(name).name for name in names], "picture", 1), drawable(classes, "class")
    figure = Figure((7, 2.2 * len(names) + 0.4))
    grid = figure.subplots(len(names), 2, squeeze=False, width_ratios=(1, 2.4))
    height = 0.8 / len(by_model)
    first_model = next(iter(by_model.values()))
    for i, (left, right) in enumerate(grid):
        left.imshow(pixels[i])
        left.set_title(titles[i])
        left.axis("off")
        shown = sorted(first_model[i].topk(min(CLASSES_SHOWN, len(classes))).indices.tolist())
        places = np.arange(len(shown))
        for k, (model, probabilities) in enumerate(by_model.items()):
            right.barh(places + k * height, 100 * probabilities[i, shown].numpy(), height, align="edge", label=model)
        right.set_yticks(places + 0.4, [labels[j] for j in shown], fontsize=8)
        right.set(xlim=(0, 100), ylim=(len(shown), -0.2))  # the first class at the top
    grid[-1, 1].set_xlabel("probability (%)")
    return save_figure(grid[0, 1], path)


@figure_style
def plot_comparison(contents: list[dict], path: Path) -> Path:
    """Draw top-1 (%) and cross-entropy (nats) over the epochs of a table's runs, seeds as a mean in a band."""
    last = config_of(contents[-1])
    selection = last.subset, last.holdout
    # Left out: a teacher without a log (a plain state dict), or with one of other images than its students'.
    shown = [c for c in contents if c["log"] and (c["run"]["subset"], c["run"]["holdout"]) == selection]
    title = f"Accuracy and loss on the {'held-out' if last.holdout else 'test'} images of {last.dataset}"
    panels = new_panels(title, ["top-1 (%)", "cross-entropy (nats)"])
    for name, row in rows_of(shown).items():
        logs = [parse_log(content["log"])[1] for content in row]
        seeds = f" (mean of {len(row)})" if len(row) > 1 else ""
        for axes, key in zip(panels, ("top1", "loss"), strict=True):
            # A list per epoch, a value per seed.
            values = [[line[last.split][key] for line in epoch] for epoch in zip(*logs, strict=True)]
            label = f"{name}: {statistics.mean(values[-1]):.2f}{seeds}"
            plot_band(axes, range(1, len(values) + 1), values, marker="." if len(values) == 1 else None, label=label)
    return save_figure(panels[0], path)


def plot_band(axes, x: Sequence[float], values: list[list[float]], **style) -> None:
    """Draw a line through the mean of the values at each x, on a band from the least to the greatest."""
    (line,) = axes.plot(x, [*map(statistics.mean, values)], **style)
    if max(map(len, values)) > 1:
        axes.fill_between(x, [*map(min, values)], [*map(max, values)], color=line.get_color(), alpha=0.2, linewidth=0)


@figure_style
def plot_omitted(contents: list[dict], path: Path) -> Path | None:
    """Draw each class's accuracy (%) before and after the correction, of rows with omitted classes; None if no row."""
    rows = [(title, row) for title, row in rows_of(contents).items() if "bias" in row[0]["measured"]]
    if not rows:
        return None
    classes = contents[0]["data"]["classes"]
    ticks, names, style = class_ticks(classes)
    figure = Figure((7 if len(classes) <= FEW_CLASSES else 14, 1 + 1.5 * len(rows)))
    panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    for axes, (title, row) in zip(panels, rows, strict=True):
        omitted = np.isin(classes, config_of(row[0]).omit)
        for i, (when, key) in enumerate({"uncorrected": "per_class", "corrected": "corrected_per_class"}.items()):
            shares = 100 * np.array([content["measured"][key] for content in row], dtype=float).mean(axis=0)
            for which, colour, places in (("seen", "C0", ~omitted), ("never seen", "C1", omitted)):
                look = {"color": colour, "alpha": 0.5 + 0.5 * i, "label": f"{which}, {when}"}
                axes.bar(np.flatnonzero(places) + 0.4 * i - 0.2, shares[places], 0.4, **look)
        axes.set(title=textwrap.fill(title, 80), ylabel="accuracy (%)", ylim=(0, 100), xlim=(-1, len(classes)))
    panels[-1].set_xticks(ticks, names, **style)
    return save_figure(panels[0], path)


@figure_style
def plot_rows(
    rows: list[dict], key: str, words: str, least: int, title: str, xlabel: str, panels: dict[str, Callable], path: Path
) -> Path | None:
    """Draw numbers of a table's rows over their `key`; None if no line has `least` points.

    A line joins the rows whose titles differ only in `words`, a regular expression. `panels` has, for each y label, a
    function from a row to its values, which are drawn as a mean in a band.
    """
    lines: dict[str, list[dict]] = {}
    for row in sorted((row for row in rows if key in row), key=lambda row: row[key]):
        lines.setdefault(re.sub(words, "", row["model"]), []).append(row)
    lines = {label: line for label, line in lines.items() if len(line) >= least}
    if not lines:
        return None
    drawn = new_panels(title, [*panels], xlabel)
    for axes, values_of in zip(drawn, panels.values(), strict=True):
        for label, line in lines.items():
            plot_band(axes, [row[key] for row in line], [values_of(row) for row in line], marker=".", label=label)
        axes.set_xscale("log")
        axes.set_xticks(sorted({row[key] for line in lines.values() for row in line}))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.minorticks_off()
        if axes.dataLim.ymin < 0:
            axes.axhline(0, color="C6", linewidth=0.8)
    return save_figure(drawn[0], path)


def plot_images(results: dict, path: Path) -> Path | None:
    """Draw a table's top-1 (%) over the students' images, seeds as a mean on a band; None if no line has two points."""
    panels = {"top-1 accuracy (%)": lambda row: row.get("top1_of_seeds", [row["top1"]])}
    title, xlabel = "Accuracy over the number of the students' images", "training images of the student"
    return plot_rows(results["rows"], "student_images", r", [\d,]+ images", 2, title, xlabel, panels, path)


def plot_temperatures(results: dict, path: Path) -> Path | None:
    """Draw a table's gain of KD over T on its interval, and the teacher's entropy; None if no line has three points."""
    gains = {gain["model"]: gain.get("ci", [gain["mean"]]) for gain in results["gains"]}
    rows = [row for row in results["rows"] if row["model"] in gains]
    panels = {"gain of KD (points of top-1)": lambda row: gains[row["model"]]}
    panels["teacher's entropy (nats)"] = lambda row: [row["teacher_entropy"]]
    return plot_rows(rows, "temp", ", Temp = [^,)]+", 3, "Gain of KD over the temperature", "T", panels, path)
