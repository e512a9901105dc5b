"""README's and docs' results are what the logs in plots/ say, and their commands are those of these logs."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import config
from datasets import DATASETS
from evaluation.figures import find_logs
from evaluation.inference import load_model
from evaluation.measures import paired_gain
from evaluation.report import collect, points
from runtime.device import Runtime
from runtime.identity import Identity
from runtime.log import read_log
from training.optimizer import VERSIONS
from utils import evaluate, load_images

PAGES = {page.name: page.read_text() for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))}


def section(page: str, heading: str) -> str:
    """What stands on a page below a heading, up to the next one."""
    return PAGES[page].partition(f"\n{heading}\n")[2].partition("\n#")[0]


PLOTS = REPOSITORY / "plots"
GAIN = "Gain of KD, paired, 95% interval"
# Where each table of results stands, and the logs of its runs.
RESULTS = {
    "cifar10": section("README.md", "### CIFAR-10"),
    "short": section("results.md", "## CIFAR-10, short runs"),
    "cifar100": section("README.md", "### CIFAR-100"),
    "digits": section("results.md", "## Digits"),
}
LOGS = {dataset: find_logs(PLOTS, dataset) for dataset in RESULTS}
LOGS["short"] = [PLOTS / "teacher.jsonl", *find_logs(PLOTS / "short", "cifar10")]


def cells_of(row: str) -> list[str]:
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in row.removeprefix("|").removesuffix("|").split("|")]


def table(text: str) -> dict[str, dict[str, str]]:
    """The first table of results in a text: for each first cell its row by column."""
    lines = re.search(r"^\| Model.*\n(\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    head, _, *rows = map(cells_of, lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def run_of_log(path: Path) -> dict:
    """What `collect` needs of a run, from its log."""
    header, lines = read_log(path)
    return {"identity": Identity(header["identity"]), "metrics": lines[-1][header["evaluated_on"]], "path": path}


def runs_in(folder: Path) -> list[dict]:
    """What `collect` needs of all runs whose logs are in a folder."""
    return [run_of_log(path) for path in sorted(folder.glob("*.jsonl"))]


def curve(name: str) -> list[float]:
    """Each epoch's top-1 (%) in a log in plots/, of any version."""
    return [line["test"]["top1"] for line in read_log(PLOTS / f"{name}.jsonl")[1]]


def last(name: str) -> float:
    """The last epoch's."""
    return curve(name)[-1]


def logged(name: str) -> list[dict]:
    """What `collect` needs of the runs of a table, from their logs."""
    contents = [run_of_log(path) for path in LOGS[name]]
    return sorted(contents, key=lambda content: (content["identity"]["role"] != "teacher", content["identity"]["seed"]))


def tops_and_gains(contents: list[dict]) -> tuple[dict[str, float], dict[str, float]]:
    """Each model's mean top-1 (%), and its mean gain by KD in points, of these runs."""
    found = collect(contents)
    tops = {row["model"]: row["top1"] for row in found["rows"]}
    return tops, {gain["model"]: gain["mean"] for gain in found["gains"]}


def gains_of(results: dict) -> dict[str, str]:
    """Each model's gain by KD as a table says it, from what `collect` returns."""
    return {gain["model"]: points(gain) for gain in results["gains"]}


@pytest.mark.parametrize("name", RESULTS)
def test_every_number_of_the_results_is_its_logs_last_line(name):
    results, said = collect(logged(name)), table(RESULTS[name])
    assert said.keys() == {row["model"] for row in results["rows"]}
    gains = gains_of(results)
    assert gains
    for row in results["rows"]:
        cells = said[row["model"]]
        for column, key in (("Top 1 Accuracy", "top1"), ("Top 5 Accuracy", "top5")):
            spread = f" ± {row[key + '_sd']:.2f}" if len(row["seeds"]) > 1 else ""
            assert cells[column] == f"{row[key]:.2f}%{spread}"
        assert cells["Parameters"] == f"{row['parameters']:,}"
        assert cells[GAIN] == gains.get(row["model"], "")


@pytest.mark.parametrize("name", RESULTS)
def test_every_run_of_the_results_is_as_long_as_said(name):
    said = table(RESULTS[name])
    for content in logged(name):
        assert str(content["identity"]["num_epochs"]) == said[content["identity"].title]["Epochs"]


@pytest.mark.parametrize("table_name", RESULTS)
def test_the_quoted_commands_are_those_of_the_logs(table_name):
    planned = {}
    for command in re.findall(r"^python train\.py .+$", RESULTS[table_name], re.MULTILINE):
        for run in config.parse_train(shlex.split(command)[2:]).runs():
            options = run.result_options() | {"optimizer": VERSIONS[run.optimizer]}
            planned.setdefault(run.run_name, options)  # --all keeps the teacher that was made before
    made = {content["path"].stem: content["identity"] for content in logged(table_name)}
    assert planned.keys() == made.keys()
    for name, options in planned.items():
        run = made[name]
        assert {key: run[key] for key in options} == options | {"precision": run["precision"]}, name


def minutes(path: Path) -> float:
    """How long the epochs of a log's run took."""
    return sum(line["seconds"] for line in read_log(path)[1]) / 60


def test_what_readme_says_of_cifar10_is_in_the_logs():
    tops, _ = tops_and_gains(logged("cifar10"))
    teacher, student = tops["Teacher (VGG19 with BN)"], tops["Student (with KD, Temp = 5)"]
    names = ("teacher", "student_kd_t5", "student_kd_t20")
    of_teacher, first, further = (f"{minutes(PLOTS / f'{name}.jsonl'):.0f}" for name in names)
    top = " ".join(PAGES["README.md"].partition("## Results")[0].split())
    assert f"the teacher reaches {teacher:.1f} % in {of_teacher} minutes" in top
    assert f"a first student taught by it {student:.1f} % in {first} more, a further one in {further}" in top
    assert f"this one has {teacher:.2f} % after 16" in " ".join(PAGES["results.md"].split())
    text = " ".join(RESULTS["cifar10"].split())
    took = {path.stem: minutes(path) for path in LOGS["cifar10"] if path.stem != "teacher"}
    assert f"The teacher took {of_teacher} minutes, the nine students {sum(took.values()) / 60:.1f} hours" in text
    asked = [f"{took.pop(name):.0f}" for name in ("student_kd_t5", "student_kd_t5_seed43")]
    each = f"{min(took.values()):.0f} to {max(took.values()):.0f} minutes each"
    assert f"{each}, but {' and '.join(asked)} the first two at T = 5" in text


@pytest.mark.parametrize("name", ["student", "student_kd_t5", "student_kd_t20"])
def test_a_shipped_student_is_as_good_as_its_log_says(name, cifar10):
    cpu, spec = torch.device("cpu"), DATASETS["cifar10"]
    model, content = load_model(REPOSITORY / "weights" / f"{name}.pt", "student", "cifar10", cpu)
    header, lines = read_log(PLOTS / f"{name}.jsonl")
    assert content["identity"] == Identity(header["identity"])
    assert content["metrics"] == lines[-1]["test"]
    images = load_images(spec, cifar10, "test")[0][:2000]
    found = evaluate(model, images, spec, Runtime(cpu, None))
    assert 100 * found["top1"] == pytest.approx(lines[-1]["test"]["top1"], abs=2.5)  # of a fifth of the images


def test_what_is_quoted_of_the_first_version_is_in_its_logs():
    text = " ".join((PAGES["results.md"] + PAGES["cache.md"]).split())

    trials = ("teacher_3_epochs_head_lr_1", "teacher_3_epochs", "teacher_6_epochs")
    teachers, students = (
        [f"{last(f'first_version/{trial}/{run}'):.2f}" for trial in trials] for run in ("teacher", "student_kd_t5")
    )
    assert f"{last('first_version/teacher_6_epochs/student'):.2f} % without KD" in text
    assert f"teachers of {teachers[0]}, {teachers[1]} and {teachers[2]} %" in text
    assert f"students of {students[0]}, {students[1]} and {students[2]} % at T = 5" in text
    seeds = ("", "_seed43", "_seed44")
    sides = [
        [last(f"first_version/digits_{w}_cache/digits_student_kd_t5{seed}") for seed in seeds]
        for w in ("with", "without")
    ]
    gain = paired_gain(*sides)
    assert f"ended at {statistics.mean(sides[0]):.2f} % and {statistics.mean(sides[1]):.2f} %" in text
    assert f"{gain['mean']:+.2f} points (95 % interval {gain['ci'][0]:+.2f} to {gain['ci'][1]:+.2f})" in text


def row_of_losses(row: dict, gain: dict) -> str:
    """How docs/losses.md shows a student by some loss."""
    loss, temp, terms = re.fullmatch(r"Student \(with (\w+), Temp = ([\d.]+)(?:, (.+))?\)", row["model"]).groups()
    cells = [f"{loss}, {temp}", terms or "0.9 KL + 0.1 CE", f"{row['top1']:.2f}% ± {row['top1_sd']:.2f}", points(gain)]
    return f"| {' | '.join(cells)} | {100 * row['ece']:.2f}% | {row['loss']:.4f} |"


@pytest.mark.parametrize(
    "title, file", [("Digits", "digits/digits_results.json"), ("CIFAR-10", "cifar10/results.json")]
)
def test_the_comparison_of_losses_is_what_its_logs_say(title, file):
    path = PLOTS / "losses" / file
    found = collect(runs_in(path.parent))
    kept = json.loads(path.read_text())  # with what logs have not: ECE and NLL
    tops = {row["model"]: row["top1"] for row in kept["rows"]}
    assert {row["model"]: row["top1"] for row in found["rows"]} == pytest.approx(tops)
    rows, gains = {row["model"]: row for row in kept["rows"]}, {gain["model"]: gain for gain in kept["gains"]}
    assert len(gains) == len(rows) - 2 == 10  # all but the teacher and the student without KD
    text = section("losses.md", f"## {title}")
    for model, gain in gains.items():
        assert row_of_losses(rows[model], gain) in text
    assert f"a teacher of {tops['Teacher (VGG19 with BN)']:.2f} %" in text
    assert f"without KD ({tops['Student (w/o KD)']:.2f} %)" in text
    for gain in kept["gains_over_kd"]:
        ahead = gain["mean"] > 0 and not gain["within_seed_noise"]
        assert ("{:.2f} points ({:+.2f} to {:+.2f})".format(gain["mean"], *gain["ci"]) in text) == ahead, gain


def test_what_is_said_of_kd_on_cifar100_is_in_its_logs():
    text = " ".join(PAGES["losses.md"].split())

    now = gains_of(collect(logged("cifar100")))
    t5, t20 = (now[f"Student (with KD, Temp = {temp})"] for temp in (5, 20))
    assert f"{t5} points at T = 5 and {t20} at T = 20" in text
    kd, control = curve("cifar100_student_kd_t5"), curve("cifar100_student")
    assert f"({kd[1]:.2f} against {control[1]:.2f} % after 2 epochs, seed 42)" in text
    assert f"({kd[2]:.2f} against {control[2]:.2f} %)" in text
    assert f"a teacher of {last('cifar100_teacher'):.2f} % after 5" in text
    took = {path.stem: minutes(path) for path in LOGS["cifar100"]}
    of_teacher = took.pop("cifar100_teacher")
    said = f"{of_teacher:.0f} minutes for the teacher and {sum(took.values()):.0f} for the nine students"
    assert said in " ".join(RESULTS["cifar100"].split())

    before, gains = tops_and_gains(runs_in(PLOTS / "losses" / "cifar100"))
    better, _ = tops_and_gains(runs_in(PLOTS / "losses" / "cifar100" / "better_rates"))
    teacher, without, best = "Teacher (VGG19 with BN)", "Student (w/o KD)", max(before.values())
    assert f"5 epochs, a teacher of {better[teacher]:.2f} %" in text
    assert f"the student without KD had {before[without]:.2f} %" in text and f"to {best:.2f} %." in text
    t5, t20 = (gains[f"Student (with KD, Temp = {temp})"] for temp in (5, 20))
    dkd = gains["Student (with DKD, Temp = 4, 1 TCKD + 8 NCKD + 1 CE)"]
    matched = gains["Student (with KD, Temp = 4, 9 KL + 1 CE)"]
    assert f"lost {-t5:.2f} (T = 5) and {-t20:.2f} points (T = 20)" in text
    assert f"DKD at its paper's weights gained {dkd:.2f}" in text and f"gained {matched:.2f}, to" in text
    assert f"had {better[without]:.2f} %, more than any" in text and better[without] > best


RECIPE_ROWS = [cells_of(line) for line in PAGES["recipe.md"].splitlines() if line.startswith("|")]

# The rows of docs/recipe.md that tell of trials, with the names of the logs in the place of their top-1.
TRIALS = """
SGD at the convolutions' rate | student_head_lr_1_norm_lr_1 | cifar100_student_head_lr_1
SGD at the rates chosen from seventeen trials, 30 and 20 times as high | student_head_lr_20_norm_lr_30 \
 | cifar100_student_head_lr_20_norm_lr_30
Muon, `--head_lr 0.1` | | cifar100_student_muon_2_head_lr_0.1
Muon, `--head_lr 0.2`, the recipe | student_muon_2 | cifar100_student_muon_2
Muon, `--head_lr 0.4` | | cifar100_student_muon_2_head_lr_0.4
SGD at the convolutions' rate | student_batch_32_rates_1_1
SGD, 30 and 20 times as high | student_batch_32_rates_20_30
SGD, an eighth of these | student_batch_32_rates_2.5_3.75
Muon, the recipe | student_batch_32_muon_2
SGD at the convolutions' rate and a fortieth of it | teacher_4_epochs_12500_images |
SGD at 10 times the convolutions' rate and a fortieth of it | teacher_norm_lr_10 |
SGD at 10 times the convolutions' rate and a tenth of it | | digits_teacher_norm_lr_10
Muon, `--norm_lr 0.15 --head_lr 0.003`, the recipe | teacher_muon_2 | digits_teacher_muon_2
the same, digits in 2 epochs instead of 3 | | digits_teacher_muon_2_2_epochs
SGD, its best rates | 3 | 10 | digits_student_rates_3_10_seed42 | digits_student_rates_3_10_seed43
Muon | 0.05 | 0.15 | digits_student_muon_2_head_lr_0.05_seed42 | digits_student_muon_2_head_lr_0.05_seed43
Muon | 0.1 | 0.15 | digits_student_muon_2_head_lr_0.1_seed42 | digits_student_muon_2_head_lr_0.1_seed43
Muon, the recipe | 0.2 | 0.15 | digits_student_muon_2_head_lr_0.2_seed42 | digits_student_muon_2_head_lr_0.2_seed43
Muon, the recipe, with KD at T = 5 | 0.2 | 0.15 | digits_student_muon_2_kd_seed42 | digits_student_muon_2_kd_seed43
Muon | 0.4 | 0.15 | digits_student_muon_2_head_lr_0.4_seed42 | digits_student_muon_2_head_lr_0.4_seed43
Muon | 0.1 | 0.05 | digits_student_muon_2_norm_lr_0.05_seed42 | digits_student_muon_2_norm_lr_0.05_seed43
Muon | 0.1 | 0.5 | digits_student_muon_2_norm_lr_0.5_seed42 | digits_student_muon_2_norm_lr_0.5_seed43
0.05 | student_lr_0.05
0.1, the recipe's | student_lr_0.1
0.2 | student_lr_0.2
"""


def test_every_trial_of_the_recipe_is_what_its_log_says():
    top1 = {}
    for path in (PLOTS / "trials").glob("*.jsonl"):
        header, lines = read_log(path)
        assert len(lines) == header["identity"]["num_epochs"]
        top1[path.stem] = f"{lines[-1]['holdout']['top1']:.2f}"
    named = [cells_of(f"{row} |") for row in TRIALS.strip().splitlines()]
    assert {cell for row in named for cell in row} >= top1.keys(), "each trial has its row"
    for row in named:
        assert [top1.get(cell, cell) for cell in row] in RECIPE_ROWS


def test_what_was_tried_to_gain_more_is_what_its_logs_say():
    found = collect(runs_in(PLOTS / "gain"))
    gains = gains_of(found)
    assert len(found["rows"]) > 3
    for row in found["rows"]:
        top1 = dict(zip(row["seeds"], row.get("top1_of_seeds", [row["top1"]]), strict=True))
        tops = [f"{top1[seed]:.2f}" if seed in top1 else "" for seed in (42, 43, 44)]
        model = row["model"].removesuffix(", subset 15000, holdout 5000")
        assert [model, *tops, gains.get(row["model"], "")] in RECIPE_ROWS


def test_every_figure_and_every_link_is_there():
    figures = 0
    for name, text in PAGES.items():
        folder = REPOSITORY if name == "README.md" else REPOSITORY / "docs"
        for mark, target in re.findall(r"(!?)\[[^]]*\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (folder / target).is_file(), f"{name}: {target}"
            figures += bool(mark)
    assert figures >= 6


COMMANDS = {line for text in PAGES.values() for line in re.findall(r"^python (?:train|test)\.py.*", text, re.MULTILINE)}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_can_be_typed(command):
    _, script, *words = shlex.split(command, comments=True)
    (config.parse_train if script == "train.py" else config.parse_test)(words)


def test_readme_is_short_and_docs_hold_the_option_table():
    assert PAGES["README.md"].count("\n") <= 180
    assert config.option_table() in PAGES["options.md"]
