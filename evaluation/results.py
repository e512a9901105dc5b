"""The table of models: its rows, paired gains and notes, as words, numbers and figures."""

import statistics
from collections.abc import Callable
from pathlib import Path

from evaluation.comparison import rows_of
from evaluation.figures import plot_comparison, plot_images, plot_omitted, plot_temperatures
from evaluation.measures import holm, paired_gain
from evaluation.report import NUMBERS, table
from runtime.files import write_json, writing
from training.runs import config_of, is_baseline_of, is_kd_baseline_of, why_no_baseline
from utils import parse_log

OTHER_MACHINES = "†"
# Accuracies, as measured and after the bias correction: columns with a deviation over seeds.
ACCURACIES = {"top1": "Top 1 Accuracy", "top5": "Top 5 Accuracy", "top1_omitted": "Omitted", "top1_others": "Others"}
ACCURACIES |= {"corrected_top1": "Corrected", "corrected_top1_omitted": "Corrected, omitted"}
ACCURACIES |= {"corrected_top1_others": "Corrected, others"}


def collect(contents: list[dict]) -> dict:
    """Rows, gains and notes from measured checkpoints: means over seeds and, of accuracies in percent, deviations."""
    results = {"rows": [], "gains": [], "gains_over_kd": [], "notes": []}
    rows = rows_of(contents)
    for label, row in rows.items():
        runs = [config_of(content) for content in row]
        numbers = {"model": label, "epochs": runs[0].num_epochs, "seeds": [run.seed for run in runs]}
        if runs[0].student_images:
            numbers["student_images"] = runs[0].student_images
        if len({tuple(content["machine"].values()) for content in row}) > 1:
            numbers["machines"] = sorted({f"{c['machine']['device']}, torch {c['machine']['torch']}" for c in row})
        measured = [content["measured"] for content in row]
        for key in [key for key in ACCURACIES if key in measured[0]]:
            values = [100 * m[key] for m in measured]
            numbers[key] = statistics.mean(values)
            if len(values) > 1:
                numbers |= {f"{key}_sd": statistics.stdev(values), f"{key}_of_seeds": values}
        shared = [key for key in NUMBERS if all(key in m for m in measured)]
        numbers |= {key: statistics.mean(m[key] for m in measured) for key in shared}
        if "bias" in measured[0]:
            numbers["bias"] = [statistics.mean(values) for values in zip(*(m["bias"] for m in measured), strict=True)]
        if runs[0].kd:
            numbers["temp"] = runs[0].temp
            logs = [parse_log(content["log"]) for content in row]
            softness = [lines[0]["teacher"] for _, lines in logs]  # of each seed, in its first epoch
            numbers |= {f"teacher_{key}": statistics.mean(values[key] for values in softness) for key in softness[0]}
            if "agreement" not in numbers and any(content["run"]["role"] == "teacher" for content in contents):
                results["notes"].append(f"{label}: its teacher is not in this table")
            if gains := paired_differences(row, contents, is_baseline_of):
                results["gains"].append({"model": label, **paired_gain(gains)})
            else:
                why = why_no_baseline(runs[0], [config_of(content) for content in contents])
                results["notes"].append(f"{label} has no baseline: {why}")
        for other_label, others in rows.items():
            if gains := paired_differences(row, others, is_kd_baseline_of):
                results["gains_over_kd"].append({"model": label, "over": other_label, **paired_gain(gains)})
        results["rows"].append(numbers)
    results["notes"] += table_notes(rows)
    tested = [gain for gain in results["gains_over_kd"] if "p" in gain]
    for gain, significant in zip(tested, holm([gain["p"] for gain in tested]), strict=True):
        gain["significant"] = significant
    return results


def table_notes(rows: dict[str, list[dict]]) -> list[str]:
    """The files of several teachers with their hashes; whether the rows of students have different seeds."""
    teachers = [content for row in rows.values() for content in row if config_of(content).role == "teacher"]
    students = [row for row in rows.values() if config_of(row[0]).role == "student"]
    notes = []
    if len(teachers) > 1:
        notes += [f"teacher {content['measured']['fingerprint'][:8]}: {content['path']}" for content in teachers]
    if len({tuple(config_of(content).seed for content in row) for row in students}) > 1:
        notes.append("The rows have different seeds: compare only rows with the same seeds.")
    return notes


def paired_differences(row: list[dict], others: list[dict], is_baseline: Callable) -> list[float]:
    """The differences in top-1 (points) between the runs of a row and their baselines among `others`."""
    found = []
    for content in row:
        run, folder = config_of(content), Path(content["path"]).parent
        baselines = [other for other in others if is_baseline(config_of(other), run)]
        baselines.sort(key=lambda other: Path(other["path"]).parent != folder)  # those in the run's own folder first
        if baselines:
            found.append(100 * (content["measured"]["top1"] - baselines[0]["measured"]["top1"]))
    return found


def mean_text(gain: dict) -> str:
    """A gain in points."""
    return f"{round(gain['mean'], 2) + 0.0:+.2f}"  # not -0.00


def points(gain: dict) -> str:
    """A gain in points with its 95 % interval, or without one the number of pairs."""
    interval = "one pair" if gain["pairs"] == 1 else f"{gain['pairs']} equal pairs"
    if "ci" in gain:
        interval = "{:+.2f} to {:+.2f}".format(*gain["ci"])
    return f"{mean_text(gain)} ({interval})"


def gain_text(gain: dict) -> str:
    """A gain of KD with its interval in a sentence."""
    text = f"{gain['model']} gains {mean_text(gain)} points of top-1 over the same-seed baseline without KD"
    low, high = gain["ci"]
    text += f" (n = {gain['pairs']}, sd {gain['sd']:.2f}, 95% interval {low:+.2f} to {high:+.2f})"
    return text + (", within seed noise" if low <= 0 <= high else "")


def verdict(gain: dict) -> str:
    """Whether a loss beats plain KD."""
    if "p" not in gain:
        return "not tested"
    if not gain["significant"]:
        return "not significant"
    return "better" if gain["mean"] > 0 else "worse"


def results_text(results: dict) -> str:
    """What `collect` returns as a Markdown table, with sentences on gains and notes."""
    gains = {gain["model"]: {"gain": points(gain)} for gain in results["gains"]}
    models: list[dict[str, str]] = []  # the cells of each row, by column
    for row in results["rows"]:
        cells = {"Model": row["model"] + (f" {OTHER_MACHINES}" if "machines" in row else "")}
        for key, title in ACCURACIES.items():
            deviation = f" ± {row[f'{key}_sd']:.2f}" if f"{key}_sd" in row else ""
            cells[title] = f"{row[key]:.2f}%{deviation}" if key in row else ""
        numbers = row | gains.get(row["model"], {})
        for key, (title, _, form) in NUMBERS.items():
            is_unknown = key in ("epochs", "seconds") and numbers.get(key) == 0  # of a plain state dict
            cells[title] = "" if is_unknown or key not in numbers else form(numbers[key])
        models.append(cells)
    titles = [title for title in models[0] if any(cells[title] for cells in models)]  # no empty columns
    texts = [table(titles, [[cells[title] for title in titles] for cells in models])]
    texts += [gain_text(gain) for gain in results["gains"] if "ci" in gain]
    if any(gain["pairs"] == 1 for gain in results["gains"]):
        texts.append("One pair gives no interval: add --seeds 3 to the command of --all True.")
    if results["gains_over_kd"]:
        tested = sum("p" in gain for gain in results["gains_over_kd"])
        losses = [[gain["model"], gain["over"], points(gain), verdict(gain)] for gain in results["gains_over_kd"]]
        texts.append(table(["Loss", "Over plain KD, same seeds", "Top 1, points", "Verdict"], losses))
        if tested:
            comparisons = f"{tested} comparison{'s' * (tested != 1)}"
            texts.append(f"Verdicts at the 5% level, with Holm's correction for {comparisons}.")
    for row in results["rows"]:
        if "machines" in row:
            texts.append(f"{OTHER_MACHINES} {row['model']}: runs on different machines, {'; '.join(row['machines'])}")
    return "\n\n".join(texts + results["notes"]) + "\n"


def write_table(contents: list[dict], folder: Path) -> None:
    """Write the table of measured checkpoints, its figures and its runs' logs into a folder, and print it."""
    results = collect(contents)
    text = results_text(results)
    logs = "".join(content["log"] for content in contents)
    for name, written in (("results.md", text), ("runs.jsonl", logs)):
        with writing(folder / name) as temporary:
            temporary.write_text(written, encoding="utf-8", errors="replace")  # a file's name may not be valid text
    write_json(folder / "results.json", results)
    plot_comparison(contents, folder / "comparison.png")
    for name in ("omitted.png", "images.png", "temperatures.png"):
        (folder / name).unlink(missing_ok=True)  # of an earlier table
    drawn = [plot_omitted(contents, folder / "omitted.png"), plot_images(results, folder / "images.png")]
    drawn.append(plot_temperatures(results, folder / "temperatures.png"))
    names = ["results.md", "results.json", "comparison.png", *(path.name for path in drawn if path)]
    print(f"{text}\nsaved {folder}: {', '.join(names)} and runs.jsonl")
