"""The options: read as a user spells them, declared once, answered before torch is imported."""

import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from conftest import REPOSITORY, assert_one_line, run_script

import config
from config import parse_test, parse_train
from datasets import DATASETS, Recipe

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


def test_a_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(SystemExit, match="2"):
        parse_test([])
    assert capsys.readouterr().err == "test.py: error: the current folder is gone: go to another one\n"


def test_defaults():
    options = parse_train([])
    assert (options.tto, options.kd, options.temp, options.alpha) == (False, False, (5.0,), None)
    assert (options.dataset, options.seed, options.device, options.precision) == ("cifar10", 42, "auto", "auto")
    for name in ("data", "weights", "plots"):
        assert str(getattr(options, f"{name}_path")) == name
    assert options.resume == "auto"
    assert options.save_seconds == 300
    recipe = DATASETS["cifar10"].recipes["student", "muon"]
    assert (options.num_epochs, options.batch_size) == (recipe.num_epochs, recipe.batch_size)
    assert (options.lr, options.weight_decay) == (recipe.lr, recipe.weight_decay)
    assert parse_train(["--tto"]).lr == DATASETS["cifar10"].recipes["teacher", "muon"].lr
    assert parse_train(["--optimizer=sgd"]).num_epochs == DATASETS["cifar10"].recipes["student", "sgd"].num_epochs
    assert parse_train(["--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "student"),
        (["--tto", "True"], "teacher"),
        (["--tto", "True", "--seed", "7"], "teacher_seed7"),
        (["--kd", "True"], "student_kd_t5"),
        (["--kd", "True", "--temp", "5"], "student_kd_t5"),
        (["--kd", "True", "--temp", "20"], "student_kd_t20"),
        (["--kd", "True", "--temp", "2.5"], "student_kd_t2.5"),
        (["--kd", "True", "--temp", "5.0000001"], "student_kd_t5.0000001"),
        (["--kd", "True", "--temp", "1e3"], "student_kd_t1000"),
        (["--kd", "True", "--temp", "1e-2"], "student_kd_t0.01"),
        (["--subset", "40"], "student_subset40"),
        (["--tto", "True", "--subset", "40"], "teacher_subset40"),
        (["--kd", "True", "--subset", "40", "--holdout", "8", "--seed", "7"], "student_kd_t5_seed7_subset40_holdout8"),
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


@pytest.mark.parametrize("parse", [parse_train, parse_test])
def test_a_trial_has_a_teacher_and_a_comparison_of_its_own(parse):
    for words, suffix in (([], ""), (["--holdout=5000"], "_holdout5000"), (["--subset=40"], "_subset40")):
        options = parse(["--kd", "--seed=7", *words])
        assert str(options.teacher_path) == f"weights/teacher{suffix}.pt"
        assert str(options.comparison_path) == f"plots/comparison{suffix}.png"
        assert str(parse(["--kd", *words, "--teacher", "my.pt"]).teacher_path) == "my.pt"
    assert parse(["--holdout=5000"]).split == "holdout" and parse(["--subset=40"]).split == "test"


@pytest.mark.parametrize(
    "arguments",
    [
        "--tto",
        "",
        "--kd --temp 20",
        "--dataset digits --kd --seed 7",
        "--tto --seed 7 --holdout 5000",
        "--subset 40 --seed 7",
        "--kd --temp 5.0000001 --subset 4000 --holdout 80",
        "--weights_path 'my weights' --plots_path p --data_path d --kd --teacher t.pt",
        "--kd --loss ls",
        "--kd --loss kd_as_dkd --temp 3 --kd_weight 2",
    ],
)
def test_the_commands_that_train_tells_find_what_it_wrote(arguments):
    options = parse_train(shlex.split(arguments))
    for script, parse in (("train.py", parse_train), ("test.py", parse_test)):
        words = shlex.split(options.command(script))
        assert words[:2] == ["python", script]
        again = parse(words[2:])
        for name in ("checkpoint_path", "teacher_path", "log_path", "data_path", "split", "comparison_path"):
            assert getattr(again, name) == getattr(options, name)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--tto --seed 7 --device cpu --deterministic --compile",
        "--kd --temp 0.1 --alpha 0.30000000000000004 --cache_teacher False --views 162 --lr 1e-05",
        "--optimizer sgd --num_epochs 60 --weight_decay 0 --sync_bn True --save_seconds 0.5",
        "--num_epochs 30 --data_path 'my data' --precision bf16 --subset 40 --holdout 8",
        "--all --seeds 3 --temp 2 7.5 --num_epochs 5",
        "--all --seed 43 --dataset digits",
        "--kd --loss dkd --kd_weight 1 4 --ce_weight 0.5 --temp 3",
        "--all --loss kd ls wttm --seeds 2",
        "--all --loss ttm --kd_weight 9",
    ],
)
def test_the_command_that_goes_on_is_the_same_run(arguments):
    options = parse_train(shlex.split(arguments))
    words = shlex.split(options.command("train.py", every=True))
    assert words[:2] == ["python", "train.py"]
    assert parse_train(words[2:]) == options
    assert "--help" not in words and len(words) <= 2 + 2 * len(shlex.split(arguments)), "what is usual is left out"


def test_all_plans_every_run_once():
    plan = parse_train(["--all", "--temp", "5", "20", "--seeds", "2", "--num_epochs", "1"]).runs()
    names = ["student", "student_kd_t5", "student_kd_t20"]
    assert [run.run_name for run in plan] == ["teacher", *names, *(f"{name}_seed43" for name in names)]
    assert len({run.checkpoint_path for run in plan}) == len(plan)
    assert [run.kd for run in plan] == [False, False, True, True, False, True, True]
    assert not any(run.all or run.seeds > 1 for run in plan)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_all_gives_the_teacher_its_own_recipe_and_the_students_the_users(dataset, optimizer):
    words = [
        "--num_epochs=1",
        "--lr=9",
        "--head_lr=0.7",
        "--norm_lr=7",
        "--batch_size=3",
        "--views=2",
        "--weight_decay=0.1",
    ]
    same = [
        "--all",
        f"--dataset={dataset}",
        f"--optimizer={optimizer}",
        "--subset=40",
        "--holdout=8",
        "--precision=fp32",
    ]
    teacher, *students = parse_train([*same, *words, "--seed=43", "--alpha=0.5", "--temp", "20"]).runs()
    recipe = DATASETS[dataset].recipes["teacher", optimizer]
    assert {name: getattr(teacher, name) for name in config.RECIPE_OPTIONS} == asdict(recipe)
    (alone,) = parse_train(["--tto", *same[1:]]).runs()
    assert teacher.result_options() == alone.result_options() and teacher.checkpoint_path == alone.checkpoint_path
    assert [student.seed for student in students] == [43, 43] and [s.temp for s in students] == [(5.0,), (20.0,)]
    for student in students:
        assert (student.num_epochs, student.batch_size, student.lr) == (1, 3, 9)
        assert (student.head_lr, student.norm_lr, student.views, student.weight_decay) == (0.7, 7, 2, 0.1)
        assert (student.holdout, student.subset) == (8, 40)
        assert student.teacher_path == teacher.checkpoint_path


def test_each_loss_has_its_own_temperatures_and_weights():
    plan = parse_train(["--all", "--loss", "kd", "ls", "dkd", "--matched"]).runs()
    assert [(run.run_name, run.temp, run.kd_weight, run.ce_weight) for run in plan if run.kd] == [
        ("student_kd_t5", (5.0,), (0.9,), 0.1), ("student_kd_t20", (20.0,), (0.9,), 0.1),
        ("student_ls_t2", (2.0,), (9.0,), 0.1), ("student_dkd_t4", (4.0,), (1.0, 8.0), 1.0),
        ("student_kd_as_ls_t2", (2.0,), (9.0,), 0.1), ("student_kd_as_dkd_t4", (4.0,), (9.0,), 1.0),
    ]  # fmt: skip
    assert [run.loss_function for run in plan if run.kd] == ["kd", "kd", "ls", "dkd", "kd", "kd"]
    assert [run.run_name for run in parse_train(["--all", "--loss", "kd", "ls", "--temp", "3"]).runs()[2:]] == [
        "student_kd_t3", "student_ls_t3",
    ]  # fmt: skip
    alone = parse_train(["--kd", "--loss", "dkd"])
    assert alone.result_options() == plan[5].result_options()
    assert alone.result_options().items() >= {("loss", "dkd"), ("kd_weight", 1.0), ("nckd_weight", 8.0)}
    by_hand = parse_train(["--kd", "--temp=2", "--kd_weight=9"]).result_options()
    assert by_hand == plan[6].result_options()
    assert parse_train(["--kd", "--alpha=0.3"]).result_options() == parse_train(
        ["--kd", "--kd_weight=0.3", "--ce_weight=0.7"]
    ).result_options()  # fmt: skip


def test_a_folder_has_its_recipe_when_its_images_are_counted():
    options = parse_train(["--dataset=folder", "--data_path=d", "--flip=False", "--lr=0.5"])
    words = shlex.split(options.command("train.py", every=True))
    assert words[2:] == ["--dataset", "folder", "--data_path", "d", "--lr", "0.5", "--flip", "False"]
    spec = replace(DATASETS["folder"], recipes={("student", "muon"): Recipe(num_epochs=3, lr=0.1, batch_size=7)})
    (run,) = options.runs(spec)
    assert (run.num_epochs, run.batch_size, run.lr, run.head_lr) == (3, 7, 0.5, 1.0)
    assert run.command("test.py") == "python test.py --dataset folder --data_path d"


def test_a_data_sets_own_mirroring_is_the_same_run_said_or_not():
    for dataset, own in (("cifar10", True), ("digits", False), ("folder", True)):
        usual, said, other = (
            parse_train([f"--dataset={dataset}", *words]) for words in ([], [f"--flip={own}"], [f"--flip={not own}"])
        )
        assert usual.result_options() == said.result_options() and "flip" not in usual.result_options()
        assert other.result_options()["flip"] is not own and other.spec.flip is not own and said.spec == usual.spec
    assert parse_train(["--dataset=digits", "--flip=True", "--views=162"]).spec.views == 162


def test_all_views_are_the_same_run_said_or_not():
    said, usual, fewer = (
        parse_train(["--tto", *words]).result_options() for words in (["--views=162"], [], ["--views=8"])
    )
    assert said == usual != fewer


def test_only_what_shapes_a_result_is_told_of_it():
    student, distilled = parse_train([]).result_options(), parse_train(["--kd"]).result_options()
    weights = {("kd_weight", 0.9), ("ce_weight", 0.1)}
    assert distilled.items() - student.items() == {("temp", 5.0), ("loss", "kd"), ("cache_teacher", True), *weights}
    assert student.keys() < distilled.keys()
    for name in ("device", "weights_path", "resume", "save_seconds", "teacher", "all", "seeds", "tto", "kd"):
        assert name not in distilled
    assert {"seed", "subset", "holdout", "precision", "optimizer", *config.RECIPE_OPTIONS} < student.keys()


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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_cannot_be_written_is_said(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, REPOSITORY / "train.py", "--help"], env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert_one_line(done, "can't write to standard output: No space left")


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


def test_every_option_that_a_command_may_ignore_is_declared():
    for script, options in (("train.py", config.TrainOptions), ("test.py", config.TestOptions)):
        for rules in (config.NEEDS[script], config.EXCLUDES[script]):
            assert {*rules, *(other for others in rules.values() for other in others)} <= {
                *options.__dataclass_fields__
            }
