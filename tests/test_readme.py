"""README and docs: their tables are the published results; their links, options and commands exist."""

import json
import math
import re
import shlex
from dataclasses import fields, replace

import options_page
import pytest
import torch
from conftest import REPOSITORY
from made_up import CPU, cells, runs_of

import config
import test
from evaluation.measures import paired_gain
from evaluation.results import points, results_text
from runtime import checkpoint
from runtime.cli import typed
from training import optimizer
from training.recipes import LOSS_DEFAULTS
from training.run import load_model, spec_of
from training.runs import RunConfig, config_of, is_baseline_of
from training.teacher_logits import Teacher
from utils import Views, evaluate, kd_loss, load_images, loss_and_accuracies

RESULTS = REPOSITORY / "results"
PAGES = {page.name: page.read_text() for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))}


def section(page: str, heading: str) -> str:
    """The text below a heading of a page, up to the next heading."""
    return PAGES[page].partition(f"\n{heading}\n")[2].partition("\n#")[0]


TABLES = {
    "cifar10": section("README.md", "### CIFAR-10"),
    "cifar100": section("README.md", "### CIFAR-100"),
    "digits": section("results.md", "## Digits"),
    "digits_omit": section("paper.md", "## A class without training images"),
    "cifar10_omit": section("paper.md", "### The same on CIFAR-10"),
}
CURVES = {
    "digits_images": section("paper.md", "## Few images"),
    "digits_temperature": section("paper.md", "## The temperature"),
}
SECTIONS = TABLES | CURVES
SECTIONS["cifar100_holdout"] = section("results.md", "### How to choose T")
SECTIONS["cifar10_holdout"] = re.search(r"\(`(python train.*)`", SECTIONS["cifar100_holdout"])[1]
SECTIONS["cifar10_e32"] = re.search(r"\(`(python train.*)`", section("results.md", "## CIFAR-10"))[1]
SECTIONS["cifar100_e60"] = section("results.md", "### 60 epochs")


def one_line(text: str) -> str:
    return " ".join(text.split())


def table(text: str) -> dict[str, dict[str, str]]:
    """The first table of models in a text: for each first cell its row by column."""
    head, _, *rows = cells(re.search(r"^\| Model .*\n(\|.*\n)+", text, re.MULTILINE)[0])
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def published(name: str) -> dict:
    """The numbers of a published table."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def logs_of(dataset: str) -> dict[RunConfig, list[dict]]:
    """The runs of a published table, each with the lines of its epochs."""
    runs = {}
    for line in map(json.loads, (RESULTS / dataset / "runs.jsonl").read_text().splitlines()):
        if "run" in line:
            run = config_of(line)
            assert (line["title"], line["split"], [*line["machine"]]) == (run.title, run.split, ["torch", "device"])
            runs[run] = []
        else:
            runs[run].append(line)
    return runs


@pytest.mark.parametrize("name", [*(f"{name}/results" for name in SECTIONS), "losses/digits", "losses/cifar100"])
def test_a_published_table_shows_its_numbers(name):
    assert (RESULTS / f"{name}.md").read_text() == results_text(published(name))


@pytest.mark.parametrize("dataset", TABLES)
def test_the_table_on_the_page_is_the_published_one(dataset):
    said, known = table(TABLES[dataset]), table((RESULTS / dataset / "results.md").read_text())
    assert said.keys() == known.keys() and len(said) == 4
    for model, row in said.items():
        assert len(row) == 6 and row == {column: known[model][column] for column in row}


def test_the_curves_on_the_page_are_the_published_ones():
    for dataset, key in (("digits_images", "student_images"), ("digits_temperature", "temp")):
        rows, gains = (published(f"{dataset}/results")[name] for name in ("rows", "gains"))
        with_kd = [row for row in rows if "temp" in row]
        lines = {"gain, points": map(points, gains)}
        if key == "temp":
            lines["T"] = (f"{row['temp']:g}" for row in with_kd)
            lines["mean largest probability"] = (f"{row['teacher_confidence']:.3f}" for row in with_kd)
            lines["entropy (at most 2.30 nats)"] = (f"{row['teacher_entropy']:.2f}" for row in with_kd)
        else:
            without = [row for row in rows if key in row and "temp" not in row]
            lines["training images"] = (f"{row[key]:,}" for row in without)
            for title, of_line in (("without KD", without), ("with KD, T = 5", with_kd)):
                lines[title] = (f"{row['top1']:.2f} ± {row['top1_sd']:.2f}" for row in of_line)
        for title, texts in lines.items():
            assert f"\n| {title} | {' | '.join(texts)} |\n" in CURVES[dataset]


@pytest.mark.parametrize("dataset", SECTIONS)
def test_the_published_numbers_are_those_of_the_logs(dataset):
    results, top1 = published(f"{dataset}/results"), {}
    for run, lines in logs_of(dataset).items():
        assert [line["epoch"] for line in lines] == list(range(1, run.num_epochs + 1))
        top1[run] = lines[-1][run.split]["top1"]
    found = sorted((run.title, run.seed) for run in top1)
    assert sorted((row["model"], seed) for row in results["rows"] for seed in row["seeds"]) == found
    for row in results["rows"]:
        tops = [top for run, top in top1.items() if run.title == row["model"]]
        assert math.isclose(row["top1"], sum(tops) / len(tops))
    for gain in results["gains"]:
        of_row = [run for run in top1 if run.title == gain["model"]]
        pairs = [top1[run] - top1[other] for run in of_row for other in top1 if is_baseline_of(other, run)]
        assert points(gain) == points(paired_gain(pairs))


@pytest.mark.parametrize("dataset", SECTIONS)
def test_the_quoted_commands_plan_the_published_runs(dataset):
    found, planned = {replace(run, teacher=None) for run in logs_of(dataset)}, set()
    first = next(iter(found))
    for command in re.findall(r"^`?python train\.py ([^`\n]+)`?$", SECTIONS[dataset], re.MULTILINE):
        planned |= {*runs_of(command, images=first.images, precision=first.precision)}
    assert planned == found


def test_the_times_and_accuracies_in_the_text_are_those_of_the_logs():
    for dataset, prefix in (("cifar10", ""), ("cifar100", "cifar100_")):
        minutes = {run.stem: sum(line["seconds"] for line in lines) / 60 for run, lines in logs_of(dataset).items()}
        teacher = minutes.pop(f"{prefix}teacher")
        assert f"{teacher:.0f} minutes, the nine students {sum(minutes.values()) / 60:.1f} hours" in TABLES[dataset]
    tops = {row["model"]: row["top1"] for row in published("cifar10/results")["rows"]}
    without, _, kd = (f"{row['corrected_top1_omitted']:.0f} %" for row in published("digits_omit/results")["rows"][1:])
    said = f"with KD at T = 20 gets {kd} of the test 3s right, and one without KD {without} ("
    assert said in one_line(PAGES["README.md"])
    biases = ["{:+.2f}".format(*row["bias"]) for row in published("digits_omit/results")["rows"][1:]]
    assert "Corrected by {1} (T = 5) and {2} (T = 20)".format(*biases) in (page := one_line(PAGES["paper.md"]))
    assert f"the correction, {biases[0]}, costs the other classes more" in page
    page = one_line(SECTIONS["cifar100_holdout"])
    held_out = published("cifar100_holdout/results")
    teacher, *students = ({"of_seed_42": row.get("top1_of_seeds", [row["top1"]])[0]} | row for row in held_out["rows"])
    without_kd, *with_kd = (row for row in students if " KL" not in row["model"])
    without_kd = without_kd["of_seed_42"]
    assert f"(teacher {teacher['top1']:.2f} %, student without KD {without_kd:.2f} %)" in page
    gains = [points(gain) if "ci" in gain else f"{gain['mean']:+.2f}" for gain in held_out["gains"]]
    assert f"T = 2 gains {gains[4]} points and T = 1.5 {gains[1]}." in page
    assert f"alpha 0.5 gains {gains[2]} points and alpha 1 (no labels) {gains[3]}: no clear difference." in page
    lines = {"T": [f"{row['temp']:g}" for row in with_kd]}
    lines["the teacher's mean largest probability"] = [f"{row['teacher_confidence']:.2f}" for row in with_kd]
    lines["its entropy (at most log C = 4.61 nats)"] = [f"{row['teacher_entropy']:.2f}" for row in with_kd]
    lines["gain of KD in held-out top-1, CIFAR-100"] = [f"{row['of_seed_42'] - without_kd:+.2f}" for row in with_kd]
    on_cifar10 = published("cifar10_holdout/results")
    *lines["the same, CIFAR-10"], of_20 = (f"{gain['mean']:+.2f}" for gain in on_cifar10["gains"])
    teacher, without_kd = (f"{row['top1']:.2f} %" for row in on_cifar10["rows"][:2])
    assert f"a teacher of {teacher}, {without_kd} without KD)" in page and f"T = 20 gains {of_20[1:]} points" in page
    assert all(f"| {title} | {' | '.join(texts)} |" in page.replace("*", "") for title, texts in lines.items())
    _, without_kd, with_kd = published("cifar100_e60/results")["rows"]
    said = f"{with_kd['top1']:.2f} % with KD and {without_kd['top1']:.2f} % without"
    assert said in one_line(SECTIONS["cifar100_e60"])
    after_16, after_32 = tops["Teacher (VGG19 with BN)"], published("cifar10_e32/results")["rows"][0]["top1"]
    assert f"this one has {after_16:.2f} % after 16 and {after_32:.2f} % after 32" in one_line(PAGES["results.md"])


def test_the_published_students_and_logits_are_as_accurate_as_the_logs_say(cifar10):
    logs, data = (RESULTS / "cifar10" / "runs.jsonl").read_text(), load_images("cifar10", cifar10, CPU)
    for name in ("student", "student_kd_t5", "student_kd_t20"):
        content = checkpoint.load(test.PUBLISHED / "cifar10" / f"{name}.pt")
        assert config_of(content).stem == name and content["log"] in logs
        assert json.loads(content["log"].splitlines()[-1])["test"] == content["metrics"]
        assert content["run"]["images"] == data.spec.fingerprint
        found = evaluate(load_model(content, CPU), data.test[:400], spec_of(content), CPU)
        assert 100 * found["top1"] == pytest.approx(content["metrics"]["top1"], abs=4.5)  # of a few images
    teacher = Teacher(RESULTS / "cifar10" / "teacher_logits", data.spec, CPU, REPOSITORY / "weights", None)
    teacher.check_views(8)
    views = Views(data.train, data.spec, CPU.device)
    assert all(len(teacher.view_logits(k, views, torch.arange(50_000))) == 50_000 for k in range(8))
    top1 = 100 * loss_and_accuracies(teacher.test_logits(data.test), data.test.labels)["top1"]
    assert top1 == pytest.approx(published("cifar10/results")["rows"][0]["top1"], abs=0.02)  # in half precision


def test_the_comparison_of_losses_is_the_published_one():
    text, known = one_line(section("losses.md", "## Results")), table((RESULTS / "losses" / "digits.md").read_text())
    teacher, without_kd, *others = known.items()
    assert f"a teacher of {teacher[1]['Top 1 Accuracy'][:-1]} %" in text
    assert f"without KD the student has {without_kd[1]['Top 1 Accuracy'].partition('%')[0]} %" in text
    assert len(others) == 10
    over_kd = published("losses/digits")["gains_over_kd"]
    assert not any(gain["significant"] and gain["mean"] > 0 for gain in over_kd), "no loss is better than plain KD"
    (said,) = re.findall(r"([\d.]+) points \(([-+][\d.]+) to ([-+][\d.]+)\)", text)
    assert "+{} ({} to {})".format(*said) in map(points, over_kd)
    cifar100 = published("losses/cifar100")
    tops = {row["model"]: f"{row['top1']:.2f} %" for row in cifar100["rows"]}
    _, without_kd, kd, *_ = tops
    assert kd.endswith("Temp = 2)") and f"reaches {tops[kd]} (one seed; {tops[without_kd]} without KD" in text
    matched = {gain["model"]: gain["over"] for gain in cifar100["gains_over_kd"]}  # the last one of each loss
    for loss, over in matched.items():
        name = loss.split("with ")[1].split(",")[0]
        assert re.search(rf"{name} {tops[loss]} \((its matched KD )?{tops[over]}\)", text)


def test_the_table_of_losses_has_their_defaults():
    rows = [row for row in cells(PAGES["losses.md"].replace("`", "")) if row[0] in LOSS_DEFAULTS and len(row) == 6]
    said = {name: (temp.split()[0], kd, ce) for name, _, temp, kd, ce, _ in rows}
    for name, row in LOSS_DEFAULTS.items():
        defaults = row.temps[0], row.kd_weights, row.ce_weight
        assert name.startswith("kd_as_") or said[name] == tuple(map(typed, defaults))


def test_the_loss_on_the_page_is_the_one_that_trains():
    code = re.search(r"```python\n(.*?)```", section("README.md", "## How it works"), re.DOTALL)[1]
    student, teacher = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0))
    names = {"student_logits": student, "teacher_logits": teacher, "labels": torch.arange(8), "temp": 5.0}
    names |= {"alpha": 0.9, "F": torch.nn.functional}
    exec(code, names)
    torch.testing.assert_close(names["loss"], kd_loss(student, teacher, torch.arange(8), 5.0, 0.9))


def test_every_link_and_option_on_the_pages_exists():
    known = {f.name for options in (config.TrainOptions, config.TestOptions) for f in fields(options)}
    benchmarks = "".join(path.read_text() for path in (REPOSITORY / "benchmarks").glob("*.py"))
    known |= {*re.findall(r'add_argument\(\s*"--(\w+)"', benchmarks), "nproc_per_node", "num-epochs"}
    for name, text in PAGES.items():
        folder = REPOSITORY if name == "README.md" else REPOSITORY / "docs"
        for target in re.findall(r"\[[^]]*\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (folder / target).is_file(), f"{name}: {target}"
        assert {*re.findall(r"--([a-z][\w-]*)", text)} <= known, name


COMMANDS = {*re.findall(r"(?:^|`|&& )(python t\w+\.py[^`\n]*)", "\n".join(PAGES.values()), re.MULTILINE)}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_parses(command):
    _, script, *words = shlex.split(command.replace("FILE", "x.pt"), comments=True)
    (config.parse_train if script == "train.py" else config.parse_test)(words)


def test_the_pages_are_short_and_the_options_page_is_generated():
    assert PAGES["README.md"].count("\n") <= 150
    assert sum(text.count("\n") for text in PAGES.values()) - PAGES["README.md"].count("\n") <= 600
    assert PAGES["options.md"] == options_page.page()


def test_the_momenta_on_the_page_are_the_optimizers():
    said = re.findall(r"The momentum is (\d\.\d+)", PAGES["recipe.md"])
    assert said == [str(optimizer.MUON_MOMENTUM), str(optimizer.MOMENTUM)]
