"""README's results are what the logs in plots/ say, and its commands are those of these logs."""

import re
import shlex
import statistics

import pytest
from conftest import REPOSITORY

import config
import report
from checkpoint import read_log
from measures import paired_gain
from utils import find_logs, run_title

README = (REPOSITORY / "README.md").read_text()
SOURCES = {"Digits": ("plots/digits_5_seeds", "digits"), "CIFAR-10": ("plots", "cifar10")}


def first_table(title: str) -> dict[str, dict[str, str]]:
    """The first table of a README section: for each model its cells by column."""
    section = README.split(f"### {title}\n")[1].split("\n#")[0]
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def logged(title: str) -> dict[str, dict]:
    """What `report.collect` needs of the runs whose logs a section's table was read from, by path."""
    folder, dataset = SOURCES[title]
    logs = {path: read_log(path) for path in find_logs(REPOSITORY / folder, dataset)}
    return {path: header | {"metrics": lines[-1]["test"]} for path, (header, lines) in logs.items()}


@pytest.mark.parametrize("title", SOURCES)
def test_every_number_of_the_results_is_its_logs_last_line(title):
    results, said = report.collect(list(logged(title).values())), first_table(title)
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
    said = first_table(title)
    for content in logged(title).values():
        assert str(content["options"]["num_epochs"]) == said[run_title(content)]["Epochs"]


def test_a_quoted_command_is_the_one_of_its_log():
    contents = logged("CIFAR-10")
    commands = [cells["Command"].strip("`") for cells in first_table("CIFAR-10").values()]
    assert len(commands) == len(contents)
    for command in commands:
        options = config.parse_train(shlex.split(command)[2:])
        wanted = options.result_options()
        made = contents[REPOSITORY / options.log_path]["options"]
        assert {name: wanted[name] for name in made if name != "precision"} == {
            name: value for name, value in made.items() if name != "precision"
        }


def test_every_figure_of_the_readme_is_there():
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(figures) >= 8
    assert [figure for figure in figures if not (REPOSITORY / figure).is_file()] == []


def test_what_the_cache_costs_is_what_the_logs_say():
    def top1(folder: str) -> list[float]:
        names = (f"digits_student_kd_t5{seed}.jsonl" for seed in ("", "_seed43", "_seed44"))
        return [read_log(REPOSITORY / "plots" / folder / name)[1][-1]["test"]["top1"] for name in names]

    on, off = top1("digits_5_seeds"), top1("digits_without_cache")
    gain = paired_gain(on, off)
    text = " ".join(README.split())
    assert f"end at {statistics.mean(on):.2f} % with the cache and {statistics.mean(off):.2f} % without" in text
    assert f"{gain['mean']:+.2f} points (95 % interval {gain['ci'][0]:+.2f} to {gain['ci'][1]:+.2f})" in text
