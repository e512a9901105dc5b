"""Figures of the paper's experiments: a class never seen, few images, temperatures."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.patches import Patch

from evaluation.comparison import rows_of
from evaluation.figures import CELLS_WITH_NUMBERS, NAMES_SHOWN, drawable
from runtime.cli import format_number
from training.runs import run_from
from utils import COLOURS, new_axes, new_figure, save_figure

PANELS = 8  # students in one figure of classes


@matplotlib.style.context("default")
def plot_omitted(contents: list[dict], path: Path) -> Path | None:
    """Draw the accuracy (%) on each class of students that never saw some of them; None if none are.

    A panel per row of the table, means over seeds, before and after the bias correction.
    """
    rows = [(title, row) for title, row in rows_of(contents).items() if "bias" in row[0]["measured"]][:PANELS]
    if not rows:
        return None
    classes = rows[0][1][0]["data"]["classes"]
    ticks = range(0, len(classes), math.ceil(len(classes) / NAMES_SHOWN))
    names = drawable([classes[i] for i in ticks], [f"class {i}" for i in ticks])
    figure = new_figure(0.8 + 1.7 * len(rows))
    seen, never = (COLOURS[5], COLOURS[0]), (COLOURS[4], COLOURS[1])
    for axes, (title, row) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        omit = run_from(row[0]["run"]).omit
        for i, key in enumerate(("per_class", "corrected_per_class")):
            shares = np.array([content["measured"][key] for content in row], dtype=float).mean(axis=0)
            colours = [(never if name in omit else seen)[i] for name in classes]
            axes.bar(np.arange(len(classes)) + 0.4 * i - 0.2, 100 * shares, 0.4, color=colours)
        axes.set_title(title[:100], fontsize=10)
        axes.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(-1, len(classes)), xticks=ticks)
        style = {"fontsize": 8} if len(classes) <= CELLS_WITH_NUMBERS else {"fontsize": 5, "rotation": 90}
        axes.set_xticklabels(names, **style)
        axes.grid(axis="y", alpha=0.3)
    said = [f"{which}, {when}" for which in ("seen", "never seen") for when in ("uncorrected", "corrected")]
    patches = [Patch(color=colour, label=label) for colour, label in zip((*seen, *never), said, strict=True)]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, fontsize=9)
    return save_figure(figure.axes[0], path)


def lines_of(results: dict, key: str, words: Callable[[float], str]) -> dict[str, list[dict]]:
    """The rows of a table that have a number `key`, in its order, by their label without its `words`."""
    lines: dict[str, list[dict]] = {}
    for row in sorted((row for row in results["rows"] if key in row), key=lambda row: row[key]):
        lines.setdefault(row["model"].replace(words(row[key]), ""), []).append(row)
    return lines


@matplotlib.style.context("default")
def plot_images(results: dict, path: Path) -> Path | None:
    """Draw the top-1 (%) of a table over the number of the students' images; None unless there are several.

    A line is the mean of the seeds, on a band from the lowest to the highest.
    """
    lines = lines_of(results, "student_images", lambda count: f", {count:,} images")
    counts = sorted({row["student_images"] for rows in lines.values() for row in rows})
    if len(counts) < 2:
        return None
    axes = new_axes("Students of a teacher that has seen all images", "top-1 accuracy (%)")
    for colour, (title, rows) in zip(itertools.cycle(COLOURS), lines.items(), strict=False):
        of_line = [row["student_images"] for row in rows]
        axes.plot(of_line, [row["top1"] for row in rows], marker=".", color=colour, label=title)
        seeds = [row.get("top1_of_seeds", [row["top1"]]) for row in rows]
        axes.fill_between(of_line, [*map(min, seeds)], [*map(max, seeds)], color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="training images of the student")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    return save_figure(axes, path)


@matplotlib.style.context("default")
def plot_temperatures(results: dict, path: Path) -> Path | None:
    """Draw the gain of KD in a table over T, with its interval, above the entropy of the teacher's outputs.

    None unless a line has three temperatures or more.
    """
    gains = {gain["model"]: gain for gain in results["gains"]}
    known = {"rows": [row for row in results["rows"] if row["model"] in gains and "teacher_entropy" in row]}
    lines = lines_of(known, "temp", lambda temp: f", Temp = {format_number(temp)}")
    lines = {title: rows for title, rows in lines.items() if len(rows) > 2}
    if not lines:
        return None
    above, below = new_figure(5.4).subplots(2, sharex=True, height_ratios=(3, 2))
    for colour, (title, rows) in zip(itertools.cycle(COLOURS), lines.items(), strict=False):
        temps, of_line = [row["temp"] for row in rows], [gains[row["model"]] for row in rows]
        means = [gain["mean"] for gain in of_line]
        halves = [gain["ci"][1] - gain["mean"] if "ci" in gain else 0 for gain in of_line]
        above.errorbar(temps, means, halves, marker=".", capsize=3, color=colour, label=title)
        below.plot(temps, [row["teacher_entropy"] for row in rows], marker=".", color=colour)
    above.axhline(0, color=COLOURS[6], linewidth=0.8)
    above.set(title="Gain of KD over the temperature", ylabel="points of top-1", xscale="log")
    below.set(xlabel="T", ylabel="teacher's entropy (nats)", ylim=(0, None))
    ticks = sorted({row["temp"] for rows in lines.values() for row in rows})
    below.set_xticks(ticks, [format_number(temp) for temp in ticks])
    for axes in (above, below):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return save_figure(above, path)
