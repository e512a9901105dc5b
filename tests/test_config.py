"""The options: what a user may type, what is refused, and what answers before torch is imported."""

import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_script
from made_up import run_of

import config
import test
import train
from config import parse_test, parse_train
from runtime.errors import Stopped

SLOW = {"torch", "torchvision", "numpy", "matplotlib", "PIL", "tqdm"}


# ---------------------------------------------------------------------------------------------- how it is typed


@pytest.mark.parametrize("name", ["tto", "kd"])
@pytest.mark.parametrize("parse", [parse_train, parse_test])
def test_booleans_mean_what_they_say(parse, name):
    assert not getattr(parse([]), name)
    assert getattr(parse([f"--{name}"]), name) is True
    for word in ("True", "true", "TRUE", "yes", "1"):
        assert getattr(parse([f"--{name}", word]), name) is True
    for word in ("False", "false", "FALSE", "no", "0"):
        assert getattr(parse([f"--{name}", word]), name) is False
        assert getattr(parse([f"--{name}={word}"]), name) is False


def test_hyphens_and_underscores_are_the_same():
    hyphens = parse_train(["--num-epochs", "3", "--weights-path=a-b", "--batch_size", "8"])
    underscores = parse_train(["--num_epochs", "3", "--weights_path=a-b", "--batch-size", "8"])
    assert hyphens == underscores
    assert hyphens.num_epochs == 3
    assert str(hyphens.weights_path) == "a-b", "a value's hyphens stay"


def test_arguments_from_python_may_be_numbers_and_paths(monkeypatch, capsys):
    words = ["--subset", 200, "--kd", True, "--temp", 2.5, "--weights_path", Path("w")]
    for parse in (parse_train, parse_test):
        options = parse(words)
        assert (options.subset, options.kd, options.temp, options.weights_path) == (200, True, (2.5,), Path("w"))
    parsed = []

    def stop(options):
        parsed.append(options)
        raise Stopped(15)

    for script, name in ((train, "train_all"), (test, "run")):
        monkeypatch.setattr(script, name, stop)
        assert script.main(words) == 128 + 15
    assert parsed == [parse_train(words), parse_test(words)]
    assert "`python train.py --subset 200 --kd True --temp 2.5 --weights_path w`" in capsys.readouterr().err


def test_nothing_is_filled_in_that_was_not_typed():
    folders = {f"{name}_path": Path(name) for name in ("data", "weights", "plots")}
    shared = {"dataset": "cifar10", "size": 32, "device": "auto", "precision": "auto", **folders}
    trained = {"seeds": 1, "resume": True, "optimizer": "muon"}
    assert {name: value for name, value in asdict(parse_train([])).items() if value} == shared | trained
    assert {name: value for name, value in asdict(parse_test([])).items() if value} == shared
    assert parse_train([]).flip is None and parse_train(["--flip", "False"]).flip is False


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for parse, names in (
        (parse_train, ("data_path", "weights_path", "plots_path", "teacher")),
        (parse_test, ("checkpoint", "json", "export", "image")),
    ):
        for name in names:
            ending = {"json": ".json", "export": ".pt2"}.get(name, "")
            words = [f"--{name}=~/x{ending}", *(["--kd"] if name == "teacher" else [])]
            assert getattr(parse(words), name) in (Path(f"/home/me/x{ending}"), (Path("/home/me/x"),))
    assert parse_train(["--data_path=~no-such-user/x"]).data_path == Path("~no-such-user/x")


@pytest.mark.parametrize("parse", [parse_train, parse_test])
def test_a_name_is_a_folder_below_weights_and_plots(parse):
    options = parse(["--name=a-0.5", "--weights_path=w"])
    assert (options.weights_folder, options.plots_folder) == (Path("w/a-0.5"), Path("plots/a-0.5"))
    assert (parse([]).weights_folder, parse([]).plots_folder) == (Path("weights"), Path("plots"))


def test_an_omitted_class_is_a_name_or_else_a_number():
    assert parse_train(["--omit", "dog", "3", "cat"]).omit == ("cat", "dog") == parse_test(["--omit", "5", "3"]).omit
    assert len(run_of(f"--dataset=cifar100 --omit {' '.join(map(str, range(99)))}").stem) < 80, "a name of a file"
    assert config.classes_of(None, ("1", "2"), ("2", "1", "x", "y")) == ("2", "1"), "a name is tried first"


@pytest.mark.parametrize("words", ["--resume False", "--resume=no", "--resume FALSE"])
def test_the_command_that_resumes_does_not_restart(words):
    typed = shlex.split(f"--kd True {words} --temp 5 --weights_path 'a b'")
    assert parse_train(typed).resume is False
    resume = shlex.split(train.resume_command(typed))
    assert resume[:2] == ["python", "train.py"]
    assert parse_train(resume[2:]) == parse_train(["--kd", "--temp", "5", "--weights_path", "a b"])


# ---------------------------------------------------------------------------------------------- what is refused


# The long list is that of tests/test_errors.py; here are cases of several options.
REFUSED = [
    ("train.py --all True --tto True", "--tto and --all can't be combined"),
    ("train.py --all True --temp 5 5.0", "--temp contains a value twice"),
    ("train.py --kd True --loss dkd --kd_weight 0 0 --ce_weight 0", "are all 0, which leaves no loss"),
    ("train.py --all True --loss kd ls --ce_weight 1", "--kd_weight and --ce_weight need a single --loss"),
    ("train.py --all True --matched True --loss kd kd_as_ls", "--matched requires another --loss than kd"),
    ("train.py --flip False --views 82", "an image of cifar10 has 81 views, not 82"),
    ("train.py --resume auto", "--resume: expected True or False, not 'auto'"),
    ("train.py --name 'a b'", "--name: expected letters, digits, '.', '_' and '-', not 'a b'"),
    ("train.py --size 48 --dataset digits", "--size: invalid choice: 48"),
    ("train.py --size 64", "--size: the images of cifar10 have 32 x 32 pixels: leave it out"),
    ("train.py --size 64 --dataset digits --views 290", "an image of digits has 289 views, not 290"),
    ("train.py --student resnet8", "--student: expected MODULE:FUNCTION, as in my_models:resnet8, not 'resnet8'"),
    ("test.py --tto --student a:b", "--tto and --student can't be combined"),
    ("train.py --name ~", "--name: expected letters"),
    *((f"test.py --{option}", f"unrecognized arguments: --{option}") for option in ("flip True", "resume True", "all")),
]


def refuse(parse, words: list[str], tells: str, capsys) -> None:
    """Exit code 2 and one line that says `tells`."""
    with pytest.raises(SystemExit, match="^2$"):
        parse(words)
    out, err = capsys.readouterr()
    script = "train.py" if parse is parse_train else "test.py"
    assert not out and err.startswith(f"{script}: error: ") and err.count("\n") == 1 and tells in err


@pytest.mark.parametrize("command, tells", REFUSED)
def test_wrong_options_are_one_line_and_exit_code_2(command, tells, capsys):
    script, *words = shlex.split(command)
    refuse(parse_train if script == "train.py" else parse_test, words, tells, capsys)


@pytest.mark.parametrize(
    "command",
    [
        "train.py --all True --teacher my.pt --temp 5 20 --loss kd ls --seeds 3 --matched True --name a05",
        "train.py --kd True --loss dkd --kd_weight 0 0 --ce_weight 1",
        "train.py --tto True --kd False --flip False --views 81",
        "train.py --dataset digits --flip True --views 162",
        "train.py --seed 0 --seeds 1 --all True --alpha 0",
        "test.py --compare True --teacher my.pt --subset 40 --name a05",
        "test.py --checkpoint my.pt --skip_broken True --teacher t.pt --json r.json",
        "test.py --tto True --teacher my.pt --soften 1 5 20",
    ],
)
def test_what_belongs_together_is_accepted(command):
    script, *words = shlex.split(command)
    (parse_train if script == "train.py" else parse_test)(words)


def test_a_current_folder_that_was_removed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    refuse(parse_test, [], "the current folder does not exist any more", capsys)


# ---------------------------------------------------------------------------------------------- help and imports


@pytest.mark.parametrize("arguments, code", [("train.py --help", 0), ("test.py --help", 0), ("train.py --x", 2)])
def test_help_and_wrong_options_answer_without_torch(arguments, code):
    # Python itself lists on stderr what it imports: a sure sign, where a stopwatch is not.
    command = [sys.executable, "-X", "importtime", *shlex.split(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == code
    assert "argparse" in imported and not imported & SLOW


@pytest.mark.parametrize("module", ["config", "training.runs", "training.recipes"])
def test_options_and_plan_need_the_standard_library_only(module):
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    imported = set(done.stdout.split())
    assert "data_sets" in imported or module == "training.recipes"
    assert not imported & SLOW


@pytest.mark.parametrize("script, options", [("train.py", config.TrainOptions), ("test.py", config.TestOptions)])
def test_help_tells_every_option_and_default(script, options):
    text = " ".join(run_script(script, "--help", env={"COLUMNS": "1000"}).stdout.split())
    for f in fields(options):
        meaning = f.metadata["help"] + (f" (default: {f.default})" if f.default not in (None, False, ()) else "")
        assert f"--{f.name} " in text and meaning in text


def test_the_rules_name_declared_options_only():
    for script, options in (("train.py", config.TrainOptions), ("test.py", config.TestOptions)):
        for rules in (config.NEEDS[script], config.EXCLUDES[script]):
            named = {*rules, *(other for others in rules.values() for other in others)}
            assert named <= {f.name for f in fields(options)}
