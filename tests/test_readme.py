"""README's results are what the logs in plots/ say, and its commands are those of these logs."""

import re
import shlex
import statistics

import pytest
import torch
from conftest import REPOSITORY

import config
from datasets import DATASETS
from evaluation import report
from evaluation.inference import load_model
from evaluation.measures import paired_gain
from runtime.device import Runtime
from runtime.log import read_log
from utils import evaluate, find_logs, load_images, run_title

README = (REPOSITORY / "README.md").read_text()
TEXT = " ".join(README.split())  # as it reads, wherever its lines break
PLOTS = REPOSITORY / "plots"
SOURCES = {"Digits": (PLOTS / "digits_5_seeds", "digits"), "CIFAR-10": (PLOTS, "cifar10")}


def section(title: str) -> str:
    """The text of a README subsection."""
    return README.split(f"### {title}\n")[1].split("\n#")[0]


def final_top1(name: str, split: str = "test") -> float:
    """The last top-1 (%) of the log plots/<name>.jsonl."""
    return read_log(PLOTS / f"{name}.jsonl")[1][-1][split]["top1"]


def table(title: str, number: int = 0) -> dict[str, dict[str, str]]:
    """The first or a later table of a README section: for each first cell its row by column."""
    lines = list(re.finditer(r"(^\|.*\n)+", section(title), re.MULTILINE))[number][0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def logged(title: str) -> dict[str, dict]:
    """What `report.collect` needs of the runs whose logs a section's table was read from, by path."""
    folder, dataset = SOURCES[title]
    logs = {path: read_log(path) for path in find_logs(folder, dataset)}
    return {path: header | {"metrics": lines[-1]["test"]} for path, (header, lines) in logs.items()}


@pytest.mark.parametrize("title", SOURCES)
def test_every_number_of_the_results_is_its_logs_last_line(title):
    results, said = report.collect(list(logged(title).values())), table(title)
    assert said.keys() == {row["model"] for row in results["rows"]}
    for row in results["rows"]:
        cells = said[row["model"]]
        for column, key in (("Top 1 Accuracy", "top1"), ("Top 5 Accuracy", "top5")):
            spread = f" ± {row[key + '_sd']:.2f}" if len(row["seeds"]) > 1 else ""
            assert cells[column] == f"{row[key]:.2f}%{spread}"
        assert cells["Parameters"] == f"{row['parameters']:,}"
    gains = {
        gain["model"]: "{:+.2f} ({:+.2f} to {:+.2f})".format(gain["mean"], *gain["ci"]) for gain in results["gains"]
    }
    column = "Gain of KD, paired, 95% interval"
    assert gains == {model: cells[column] for model, cells in said.items() if cells.get(column)}


@pytest.mark.parametrize("title", SOURCES)
def test_every_run_of_the_results_is_as_long_as_said(title):
    said = table(title)
    for content in logged(title).values():
        assert str(content["options"]["num_epochs"]) == said[run_title(content)]["Epochs"]


def test_the_quoted_commands_are_those_of_the_logs():
    planned = {}
    for command in re.findall(r"^python train\.py .+$", section("CIFAR-10"), re.MULTILINE):
        for run in config.parse_train(shlex.split(command)[2:]).runs():
            planned.setdefault(REPOSITORY / run.log_path, run.result_options())  # --all keeps what was made before
    made = {path: content["options"] for path, content in logged("CIFAR-10").items()}
    assert {path: options | {"precision": made[path]["precision"]} for path, options in planned.items()} == made


@pytest.mark.parametrize("name", ["student", "student_kd_t5", "student_kd_t20"])
def test_a_shipped_student_is_as_good_as_its_log_says(name, cifar10):
    cpu, spec = torch.device("cpu"), DATASETS["cifar10"]
    model, content = load_model(REPOSITORY / "weights" / f"{name}.pt", "student", "cifar10", spec, cpu)
    found = evaluate(model, load_images(spec, cifar10)[1], spec, Runtime(cpu, None))
    header, lines = read_log(PLOTS / f"{name}.jsonl")
    assert content["options"] == header["options"]
    for key in ("top1", "top5"):  # in another order of additions an image or two may tip over
        assert 100 * found[key] == pytest.approx(lines[-1]["test"][key], abs=0.03)


def test_every_figure_of_the_readme_is_there():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(figures) >= 8
    assert [figure for figure in figures if not (REPOSITORY / figure).is_file()] == []


def test_what_the_cache_costs_is_what_the_logs_say():
    names = [f"digits_student_kd_t5{seed}" for seed in ("", "_seed43", "_seed44")]
    on, off = (
        [final_top1(f"{folder}/{name}") for name in names] for folder in ("digits_5_seeds", "digits_without_cache")
    )
    gain = paired_gain(on, off)
    assert f"end at {statistics.mean(on):.2f} % with the cache and {statistics.mean(off):.2f} % without" in TEXT
    assert f"{gain['mean']:+.2f} points (95 % interval {gain['ci'][0]:+.2f} to {gain['ci'][1]:+.2f})" in TEXT


def test_what_was_tried_is_what_the_trials_say():
    slow, full = (final_top1(f"trials/head_lr_{rate}", "holdout") for rate in ("0.05", "1"))
    assert f"the teacher has {slow:.2f} % right with it and {full:.2f} % without" in TEXT
    assert f"brings the student without KD to {final_top1('trials/student_all_views'):.2f} %." in TEXT


def test_what_each_teacher_gave_is_what_the_logs_say():
    alone, folders = final_top1("student"), ("trials/teacher_3_epochs_head_lr_1", "trials/teacher_3_epochs", ".")
    assert f"beside {alone:.2f} % without any" in TEXT
    for (command, row), folder in zip(table("CIFAR-10", 1).items(), folders, strict=True):
        teacher, student = (final_top1(f"{folder}/{name}") for name in ("teacher", "student_kd_t5"))
        accuracies = {"Its Top 1": f"{teacher:.2f}%", "Student, Temp = 5": f"{student:.2f}%"}
        assert row | accuracies | {"Gain": f"{student - alone:+.2f}"} == row
        made = read_log(PLOTS / folder / "teacher.jsonl")[0]["options"]
        planned = config.parse_train(shlex.split(command.strip("`"))).result_options()
        assert {name: planned[name] for name in made} | {"precision": made["precision"]} == made
