"""The options: read as a user spells them, declared once, answered before torch is imported."""

import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY, run_script

import config
from config import parse_test, parse_train
from datasets import DATASETS

TRUE, FALSE = ("True", "true", "TRUE", "yes", "Yes", "1"), ("False", "false", "FALSE", "no", "No", "0")


@pytest.mark.parametrize("name", ["tto", "kd"])
@pytest.mark.parametrize("parse", [parse_train, parse_test])
def test_booleans_mean_what_they_say(parse, name):
    assert not getattr(parse([]), name)
    assert getattr(parse([f"--{name}"]), name) is True
    for word in TRUE:
        assert getattr(parse([f"--{name}", word]), name) is True
    for word in FALSE:
        assert getattr(parse([f"--{name}", word]), name) is False
        assert getattr(parse([f"--{name}={word}"]), name) is False


def test_hyphens_and_underscores_are_the_same():
    hyphens = parse_train(["--num-epochs", "3", "--weights-path=a-b", "--batch_size", "8"])
    underscores = parse_train(["--num_epochs", "3", "--weights_path=a-b", "--batch-size", "8"])
    assert hyphens == underscores
    assert hyphens.num_epochs == 3
    assert str(hyphens.weights_path) == "a-b", "a value's hyphens are its own"


def test_defaults():
    options = parse_train([])
    assert (options.tto, options.kd, options.temp, options.alpha) == (False, False, (5.0,), 0.9)
    assert (options.dataset, options.seed, options.device, options.precision) == ("cifar10", 42, "auto", "auto")
    for name in ("data", "weights", "plots"):
        assert str(getattr(options, f"{name}_path")) == name
    assert options.resume == "auto"
    assert options.save_seconds == 300
    recipe = DATASETS["cifar10"].recipes["student"]
    assert (options.num_epochs, options.batch_size) == (recipe.num_epochs, recipe.batch_size)
    assert (options.lr, options.weight_decay) == (recipe.lr, recipe.weight_decay)
    assert parse_train(["--tto"]).lr == DATASETS["cifar10"].recipes["teacher"].lr
    assert parse_train(["--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "student"),
        (["--tto", "True"], "teacher"),
        (["--tto", "True", "--temp", "20"], "teacher"),
        (["--kd", "True"], "student_kd_t5"),
        (["--kd", "True", "--temp", "5"], "student_kd_t5"),
        (["--kd", "True", "--temp", "20"], "student_kd_t20"),
        (["--kd", "True", "--temp", "2.5"], "student_kd_t2.5"),
        (["--seed", "7"], "student_seed7"),
        (["--seed", "42"], "student"),
        (["--kd", "True", "--seed", "0"], "student_kd_t5_seed0"),
        (["--dataset", "digits", "--tto", "True"], "digits_teacher"),
        (["--dataset", "digits", "--kd", "True", "--seed", "7"], "digits_student_kd_t5_seed7"),
    ],
)
def test_each_run_has_its_own_files(arguments, name):
    train_options, test_options = parse_train(arguments), parse_test(arguments)
    assert str(train_options.checkpoint_path) == f"weights/{name}.pt"
    assert str(train_options.log_path) == f"plots/{name}.jsonl"
    assert str(train_options.resume_path) == f"weights/{name}.last.pt"
    assert test_options.checkpoint_path == train_options.checkpoint_path


def test_with_a_holdout_files_and_teacher_are_others():
    options = parse_train(["--kd", "--holdout", "5000"])
    assert str(options.checkpoint_path) == "weights/student_kd_t5_holdout5000.pt"
    assert str(options.teacher_path) == "weights/teacher_holdout5000.pt"
    assert str(parse_train(["--kd", "--holdout", "5000", "--teacher", "my.pt"]).teacher_path) == "my.pt"


@pytest.mark.parametrize(
    "arguments",
    [
        "--tto",
        "",
        "--kd --temp 20",
        "--dataset digits --kd --seed 7",
        "--weights_path 'my weights' --plots_path p --data_path d --kd --teacher t.pt",
    ],
)
def test_the_commands_that_train_tells_find_what_it_wrote(arguments):
    options = parse_train(shlex.split(arguments))
    for script, parse in (("train.py", parse_train), ("test.py", parse_test)):
        words = shlex.split(options.command(script))
        assert words[:2] == ["python", script]
        again = parse(words[2:])
        for name in ("checkpoint_path", "teacher_path", "log_path", "data_path"):
            assert getattr(again, name) == getattr(options, name)


def test_all_plans_every_run_once():
    plan = parse_train(["--all", "--temp", "5", "20", "--seeds", "2", "--num_epochs", "1"]).runs()
    names = ["student", "student_kd_t5", "student_kd_t20"]
    assert [run.run_name for run in plan] == ["teacher", *names, *(f"{name}_seed43" for name in names)]
    assert {run.num_epochs for run in plan} == {1}
    assert len({run.checkpoint_path for run in plan}) == len(plan)


@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--no_such_option"], 2), (["--tto", "True", "--kd", "True"], 2)]
)
def test_help_and_wrong_options_answer_without_torch(script, arguments, code):
    # Python itself lists on stderr what it imports: a sure sign, where a stopwatch is not.
    command = [sys.executable, "-X", "importtime", REPOSITORY / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == code
    assert "argparse" in imported
    assert not imported & {"torch", "torchvision", "numpy", "matplotlib", "tqdm"}


@pytest.mark.parametrize(("script", "options"), [("train.py", config.TrainOptions), ("test.py", config.TestOptions)])
def test_help_tells_every_option_and_default(script, options):
    text = " ".join(run_script(script, "--help", env={"COLUMNS": "1000"}).stdout.split())
    for name in options.__dataclass_fields__:
        assert f"--{name} " in text
    for _, _, meaning in (row.strip("| ").split(" | ") for row in rows_for(script)):
        assert meaning in text


def rows_for(script: str) -> list[str]:
    rows = config.option_table().splitlines()[2:]
    return [row for row in rows if row.split(" | ")[1] in (script, "both")]


def test_option_table_is_what_is_declared():
    for script, options in (("train.py", config.TrainOptions), ("test.py", config.TestOptions)):
        names = [row.strip("| ").split(" | ")[0] for row in rows_for(script)]
        assert names == [f"`--{name}`" for name in options.__dataclass_fields__]


def test_readme_holds_the_option_table():
    assert config.option_table() in (REPOSITORY / "README.md").read_text()
