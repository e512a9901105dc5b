"""The options: how they may be typed, and what answers before torch is imported. Wrong ones: tests/test_errors.py."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPOSITORY
from made_up import run_of

import config
from config import parse_test, parse_train

SLOW = {"torch", "torchvision", "numpy", "matplotlib", "PIL", "tqdm"}


@pytest.mark.parametrize("parse", [parse_train, parse_test])
def test_booleans_mean_what_they_say(parse):
    assert parse([]).kd is False and parse(["--kd"]).kd is True
    for meant, words in ((True, ("True", "true", "TRUE", "yes", "1")), (False, ("False", "false", "FALSE", "no", "0"))):
        assert all(parse(["--kd", word]).kd is parse([f"--kd={word}"]).kd is meant for word in words)


def test_hyphens_and_underscores_are_the_same_in_a_name_not_in_a_value_and_a_tilde_is_the_home_folder(monkeypatch):
    options = parse_train(["--num-epochs", "3", "--weights-path=a-b"])
    assert options == parse_train(["--num_epochs", "3", "--weights_path=a-b"])
    assert options.num_epochs == 3 and str(options.weights_path) == "a-b"
    monkeypatch.setenv("HOME", "/home/me")
    options = parse_test(["--weights_path=~/x", "--image", "~/x.png"])
    assert (options.weights_path, options.image) == (Path("/home/me/x"), (Path("/home/me/x.png"),))


def test_arguments_from_python_may_be_numbers_and_paths():
    options = parse_train(["--subset", 200, "--kd", True, "--temp", 2.5, "--weights_path", Path("w")])
    assert (options.subset, options.kd, options.temp, options.weights_path) == (200, True, (2.5,), Path("w"))


def test_an_omitted_class_is_a_name_or_else_a_number():
    assert (
        parse_train(["--omit", "dog", "--omit", "3", "cat"]).omit
        == ("cat", "dog")
        == parse_test(["--omit", "5", "3"]).omit
    )
    assert parse_train(["--dataset=folder", "--omit", "cafe\u0301"]).omit == ("caf\u00e9",), "as names of folders"
    assert len(run_of(f"--dataset=cifar100 --omit {' '.join(map(str, range(99)))}").stem) < 80, "a name of a file"
    assert config.classes_of(None, ("1", "2"), ("2", "1", "x", "y")) == ("2", "1"), "a name is tried first"


def test_compatible_options_are_accepted():
    for command in (
        "train.py --kd True --loss dkd --kd_weight 0 0 --ce_weight 1",
        "train.py --tto True --kd False --flip False --views 81 --dataset digits --size 224",
        "train.py --student torchvision.models:mobilenet_v3_small",
        "train.py --dataset digits --flip True --views 162 --all True --alpha 0",
        "test.py --checkpoint my.pt --skip_broken True --teacher t.pt --json r.json",
    ):
        script, *words = shlex.split(command)
        (parse_train if script == "train.py" else parse_test)(words)


@pytest.mark.parametrize("script, options", [("train.py", config.TrainOptions), ("test.py", config.TestOptions)])
def test_help_tells_every_option_and_default_and_needs_no_torch_nor_does_a_wrong_option(script, options):
    for word, code in (("--help", 0), ("--x", 2)):
        # Python itself lists on stderr what it imports: a sure sign, where a stopwatch is not.
        command, environment = [sys.executable, "-X", "importtime", script, word], {**os.environ, "COLUMNS": "80"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, env=environment)
        imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip() for line in imports}
        assert done.returncode == code and "training.runs" in imported and not imported & SLOW
        entries = re.findall(r"^  --.*\n(?: {24}.*\n)*", done.stdout, re.MULTILINE)
        assert all(entry.count("\n") <= 2 for entry in entries)
        assert len(entries) == (len(fields(options)) if word == "--help" else 0)
        for f in fields(options) if word == "--help" else ():
            meaning, default = f.metadata["help"], f" (default: {f.default})"
            assert f"--{f.name} " in done.stdout and meaning in " ".join(done.stdout.split())
            assert meaning.endswith(default) == (f.default not in (None, False)), "0 is False"
