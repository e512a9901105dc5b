"""Trainings that went on for different times: their results on disk, the time to an accuracy, tables and figure."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation.report import table, write_json
from runtime.errors import UserError, reason
from utils import COLOURS, new_axes, save_figure

SIDES = {"ours": "ours", "plain": "usual loop"}  # as the tables and the figure call them
TARGET_STEPS, MOST_TARGETS = (1, 2, 5, 10), 12  # percentage points between two target accuracies, and how many

# ---------------------------------------------------------------------------------------------- results on disk


def read_results(path: Path | None) -> list[dict]:
    """The trainings that a former run finished: {"settings", "seconds", "top1"} each; UserError for another file."""
    if path is None or not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["trainings"]
        if not all(result.keys() == {"settings", "seconds", "top1"} for result in results):
            raise ValueError("other keys")
        return results
    except OSError as error:
        raise UserError(f"can't read {path}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of this benchmark: give another file by --json") from error


def run_all(wanted: list[dict], train: Callable[[int], dict[str, float]], path: Path | None) -> list[dict]:
    """The results of all wanted settings, in their order; `train` gets the place of each that is not on disk yet."""
    results = read_results(path)
    for place, settings in enumerate(wanted):
        title = f"{SIDES[settings['side']]}, {settings['num_epochs']} epochs, rate {settings['lr']:g}, seed "
        title += f"{settings['seed']} ({place + 1} of {len(wanted)})"
        found = find(results, settings)
        if found is None:
            print(title, flush=True)
            found = {"settings": settings, **train(place)}
            results.append(found)
            if path is not None:
                write_json(path, {"trainings": results})
        print(f"{title}: {found['seconds']:.1f} s, held-out top1 {100 * found['top1']:.2f}%", flush=True)
    return [find(results, settings) for settings in wanted]


def find(results: list[dict], settings: dict) -> dict | None:
    """The result with these very settings, or None."""
    return next((result for result in results if result["settings"] == settings), None)


# ---------------------------------------------------------------------------------------------- tables and figure


@dataclass(frozen=True)
class Point:
    """Trainings that differ in the seed alone: their seconds and their top-1 (%), one a seed."""

    side: str
    epochs: int
    lr: float
    seconds: tuple[float, ...]
    top1: tuple[float, ...]

    @property
    def mean(self) -> tuple[float, float]:
        """Mean seconds and mean top-1."""
        return statistics.mean(self.seconds), statistics.mean(self.top1)


def best_points(results: list[dict]) -> dict[str, list[Point]]:
    """Each side's points from short to long, of the rates that were tried at a length the best one's."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        settings = result["settings"]
        groups.setdefault((settings["side"], settings["num_epochs"], settings["lr"]), []).append(result)
    best: dict[tuple, Point] = {}
    for (side, epochs, lr), those in groups.items():
        point = Point(side, epochs, lr, tuple(r["seconds"] for r in those), tuple(100 * r["top1"] for r in those))
        rival = best.get((side, epochs))
        if rival is None or point.mean[1] > rival.mean[1]:
            best[side, epochs] = point
    return {side: sorted((p for p in best.values() if p.side == side), key=lambda p: p.epochs) for side in SIDES}


def means(points: dict[str, list[Point]]) -> list[list[tuple[float, float]]]:
    """Each side's curve of (mean seconds, mean top-1 in percent)."""
    return [[point.mean for point in points[side]] for side in SIDES]


def time_to(curve: list[tuple[float, float]], target: float) -> tuple[float, float]:
    """The least and the most seconds to a top-1, by a curve of (seconds, top-1) from short to long trainings.

    Between two points straight in top-1 over log seconds, and both the same; outside of them nothing is invented:
    below the first point it took no longer than that, above all of them it takes longer than the last.
    """
    reached = next((i for i, (_, top1) in enumerate(curve) if top1 >= target), None)
    if reached is None:
        return curve[-1][0], math.inf
    seconds, top1 = curve[reached]
    if top1 == target:
        return seconds, seconds
    if reached == 0:
        return 0.0, seconds
    before, lower = curve[reached - 1]
    part = (target - lower) / (top1 - lower)
    found = before * (seconds / before) ** part
    return found, found


def bounds_text(low: float, high: float, pattern: str) -> str:
    """A number known between bounds: itself, above the lower, below the upper, or unknown."""
    if low == high:
        return pattern.format(low)
    if low > 0 and high < math.inf:
        return f"{pattern.format(low)} to {pattern.format(high)}"
    if low > 0:
        return f"> {pattern.format(low)}"
    return f"< {pattern.format(high)}" if high < math.inf else "unknown"


def targets(*curves: list[tuple[float, float]]) -> list[int]:
    """Round accuracies (%) between the lowest and the highest of all curves, not too many of them."""
    values = [top1 for curve in curves for _, top1 in curve]
    for step in TARGET_STEPS:
        found = list(range(math.ceil(min(values) / step) * step, math.floor(max(values)) + 1, step))
        if len(found) <= MOST_TARGETS:
            break
    return found


def points_table(points: dict[str, list[Point]]) -> str:
    """Every point of both sides: mean over the seeds, and its standard deviation where there are several."""
    rows = []
    for side, those in points.items():
        for point in those:
            seconds, top1 = point.mean
            spread = f" ± {statistics.stdev(point.top1):.2f}" if len(point.top1) > 1 else ""
            cells = [SIDES[side], f"{point.epochs}", f"{point.lr:g}", f"{seconds:,.1f}", f"{top1:.2f}%{spread}"]
            rows.append(cells)
    return table(["side", "epochs", "peak rate", "seconds", "held-out top-1"], rows)


def targets_table(ours: list[tuple[float, float]], plain: list[tuple[float, float]]) -> str:
    """The seconds of both curves to each target accuracy, and how many times longer the usual loop takes."""
    rows = []
    for target in targets(ours, plain):
        (our_low, our_high), (plain_low, plain_high) = time_to(ours, target), time_to(plain, target)
        ratio = plain_low / our_high, plain_high / our_low if our_low else math.inf
        times = [bounds_text(low, high, "{:,.1f}") for low, high in ((our_low, our_high), (plain_low, plain_high))]
        rows.append([f"{target}%", *times, bounds_text(*ratio, "{:.2f}")])
    return table(["held-out top-1", "ours, s", "usual loop, s", "usual loop / ours"], rows) if rows else ""


def unreached_text(ours: list[tuple[float, float]], plain: list[tuple[float, float]]) -> str:
    """What one side's trainings never reach of the other's accuracies, in a sentence, or nothing."""
    best = {"ours": max(ours, key=lambda point: point[1]), "plain": max(plain, key=lambda point: point[1])}
    behind, ahead = sorted(best, key=lambda side: best[side][1])
    if best[behind][1] == best[ahead][1]:
        return ""
    seconds = {"ours": ours, "plain": plain}[behind][-1][0]
    return (
        f"The side '{SIDES[behind]}' reached {best[behind][1]:.2f}% at most, in trainings of up to {seconds:,.1f} s: "
        f"of its time to more, up to the other side's {best[ahead][1]:.2f}%, only a bound is known."
    )


def plot(points: dict[str, list[Point]], title: str, path: Path) -> Path:
    """Draw top-1 (%) over the seconds of training, a curve a side and a dot a training; the figure's path."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = new_axes(title, "top-1 on images kept aside (%)")
    axes.set(xscale="log", xlabel="seconds of training")
    axes.margins(0.1)  # room for the points' names
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    for colour, (side, those) in zip(COLOURS, points.items(), strict=False):
        seconds, top1 = zip(*(point.mean for point in those), strict=True)
        axes.plot(seconds, top1, color=colour, marker="o", label=SIDES[side])
        for point in those:
            axes.plot(point.seconds, point.top1, ".", color=colour, alpha=0.5)
            x, y = point.mean
            words = f"{point.epochs} epoch{'s' if point.epochs > 1 else ''}"
            axes.annotate(words, (x, y), (0, -13), textcoords="offset points", ha="center", fontsize=7, color=colour)
    return save_figure(axes, path)
