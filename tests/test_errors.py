"""What a user gets wrong: exit code 2, one line on stderr, and every file as it was."""

import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import assert_one_line, run_script, snapshot
from damage import QUICK, checkpoint_of, flip_bit, hostile, in_weights, link_data

import config


def each(command: str, *options: str, tells: str) -> list:
    """The command with each of several options, and what the line tells of it after its name."""
    return [(f"{command} --{option}", f"--{option.split()[0]} {tells}") for option in options]


def values(command: str, *wrong: str) -> list:
    """The command with each wrong value of its last option."""
    return [(f"{command} {value}", command.split()[-1]) for value in wrong]


NEED_KD, NEED_ALL, CLASH = "requires --kd True or --all True", "requires --all True", "can't be combined"
WRONG_OPTIONS = [
    # What can't be combined, or lacks what it needs.
    ("train.py --tto True --kd True", "--tto and --kd can't be combined"),
    ("test.py --tto True --kd True", "--tto and --kd can't be combined"),
    ("test.py --tto --student a:b", "--tto and --student can't be combined"),
    ("train.py --all True --kd True", "--kd and --all can't be combined"),
    ("train.py --all True --tto True", "--tto and --all can't be combined"),
    *[(f"test.py --{option}", f"unrecognized arguments: --{option}") for option in ("flip True", "resume True", "all")],
    *each("train.py", "temp 5", "alpha 0.5", "loss ls", "kd_weight 9", "ce_weight 1", "teacher t.pt", tells=NEED_KD),
    *each("train.py --tto True", "temp 20", tells=NEED_KD),
    *each("train.py --kd False", "temp 5", tells=NEED_KD),
    *each("train.py --kd True", "seeds 2", "matched True", tells=NEED_ALL),
    *each("train.py --kd True --alpha 0.5", "kd_weight 2", "ce_weight 2", tells=CLASH),
    *each("test.py --tto True", "temp 20", "loss ls", tells="requires --kd True"),
    *each("test.py --checkpoint my.pt", "tto True", "kd True", "seed 7", "dataset digits", "subset 40", "holdout 8",
          "compare True", "name a05", "size 64", tells=CLASH),
    *each("test.py --compare True", "tto True", "kd True", "seed 7", "image cat.png", "soften 5", "json r.json",
          "export s.pt2", tells=CLASH),
    *each("test.py --image cat.png", "subset 40", "holdout 8", "json r.json", "export s.pt2", "data_path d",
          tells=CLASH),
    *each("test.py --soften 1 5", "json r.json", "export s.pt2", tells=CLASH),
    ("test.py --soften 5 --teacher my.pt", "--soften shows one model: give --tto True"),
    ("test.py --tto True --teacher my.pt --seed 7", "--teacher names the teacher to evaluate: leave --seed out"),
    ("train.py --skip_broken True", "--skip_broken requires --dataset folder"),
    ("test.py --skip_broken True", "--skip_broken requires --dataset folder"),
    # The student's images.
    ("train.py --omit kat", "--omit: no class is called 'kat': give one of airplane, automobile, "),
    ("test.py --dataset digits --omit 10", "--omit: no class is called '10': give one of 0, 1, 2"),
    ("train.py --dataset digits --omit 0 1 2 3 4 5 6 7 8 9", "--omit names all classes"),
    *each("train.py --tto True", "omit 3", "student_images 40", tells=CLASH),
    *each("test.py --checkpoint my.pt", "omit 3", "student_images 40", tells=CLASH),
    ("train.py --student_images 40 50", "--student_images takes one value without --all True, not 2"),
    # Losses and their weights.
    ("train.py --kd True --temp 5 20", "--temp takes one value without --all True, not 2"),
    ("train.py --kd True --loss kd ls", "--loss takes one value without --all True, not 2"),
    ("train.py --all True --loss ls dkd ls", "--loss contains a value twice"),
    ("train.py --all True --temp 5 5.0", "--temp contains a value twice"),
    *[(f"train.py --all True --loss ls dkd --{weight}", "--kd_weight and --ce_weight need a single --loss") for weight
      in ("kd_weight 9", "ce_weight 1")],
    ("train.py --all True --loss kd ls --alpha 0.5", "--alpha is for --loss kd"),
    ("train.py --kd True --loss dkd --kd_weight 9", "--loss dkd takes 2 --kd_weight, not 1"),
    ("train.py --kd True --kd_weight 9 1", "--loss kd takes 1 --kd_weight, not 2"),
    ("train.py --kd True --loss dkd --kd_weight 0 0 --ce_weight 0", "--kd_weight and --ce_weight are all 0"),
    *[(f"train.py --all True --matched True{loss}", "--matched requires a --loss other than kd") for loss in (
        "", " --loss kd kd_as_ls")],
    ("train.py --all True --loss ls --matched True --kd_weight 9", "--matched and --kd_weight can't be combined"),
    # Values.
    *values("train.py --kd True --temp", "0", "nan", "inf", "abc", "1001", "''"),
    *values("test.py --soften", "0"),
    *values("train.py --kd True --alpha", "2", "-0.1"),
    *values("train.py --kd True --kd_weight", "-1"),
    *values("train.py --kd True --ce_weight", "-1"),
    *values("train.py --kd True --loss", "KD"),
    *values("train.py --num_epochs", "0", "2.5", "1" + 400 * "0", "2147483648", ""),
    *[(f"train.py --{name} 0", name) for name in (
        "batch_size", "lr", "head_lr", "norm_lr", "subset", "student_images", "seeds", "views")],
    *[(f"train.py --{name} -1", name) for name in ("weight_decay", "holdout", "seed")],
    *[(f"train.py --{name} other", name) for name in (
        "dataset", "device", "precision", "resume", "optimizer", "epochs")],
    *[(f"train.py --{name} ''", name) for name in ("weights_path", "name")],
    ("train.py --all True --seed 2147483647 --seeds 2", "--seed 2147483647 is too large for 2 --seeds"),
    ("train.py --dataset digits --views 82", "--views: an image of digits has 81 views: give at most"),
    ("train.py --flip False --views 82", "an image of cifar10 has 81 views: give"),
    ("train.py --size 64 --dataset digits --views 290", "an image of digits has 289 views: give"),
    ("train.py --size 48 --dataset digits", "--size: invalid choice: 48"),
    ("train.py --size 64", "--size: the images of cifar10 have 32 x 32 pixels: leave it out"),
    ("train.py --student resnet8", "--student: expected MODULE:FUNCTION, as in my_models:resnet8, not 'resnet8'"),
    *values("train.py --name", "..", "a/b", "'a b'"),
    *values("test.py --image", "''"),
    *values("test.py --checkpoint", "."),
    *values("test.py --json", "..", "weights/student.pt"),
    *values("test.py --export", "model.onnx"),
    ("train.py weights", "weights"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "tells"), WRONG_OPTIONS)
def test_a_wrong_option_is_one_line(command, tells, capsys):
    name, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        (config.parse_train if name == "train.py" else config.parse_test)(arguments)
    out, err = capsys.readouterr()
    assert_one_line(subprocess.CompletedProcess([], ended.value.code, out, err), tells)
    assert not out


TRAIN, KD = f"train.py {QUICK}", f"train.py {QUICK} --kd True"
NO_CIFAR10 = "no complete CIFAR10 in data, and the download from https://www.cs.toronto.edu/.* failed: "
# A command, a pattern that its error line must match, and what is done to its folder before.
WRONG_INPUTS = {
    "device": ("train.py --device cuda:99", "--device cuda:99: this machine has"),
    "device for --sync_bn": (f"{TRAIN} --sync_bn True", "--sync_bn True needs CUDA devices: leave it out"),
    "too few images": (f"{TRAIN} --omit 3 --student_images 8",
                       "--student_images 8: give at least 9, one per class, and at most the 36 that are left"),
    "weights is a file": (TRAIN, "can't use weights as a folder: ", lambda at: (at / "weights").touch()),
    "plots is a file": (TRAIN, "can't use plots as a folder: ", lambda at: (at / "plots").touch()),
    "plots of a test": ("test.py", "can't use plots as a folder: ", lambda at: (at / "plots").touch()),
    "weights is read-only": (TRAIN, "can't write into weights: perm", lambda at: (at / "weights").mkdir(0o555)),
    "plots is read-only": (TRAIN, "can't write into plots: perm", lambda at: (at / "plots").mkdir(0o555)),
    "weights is closed": (KD, "can't use weights/.*: permission", lambda at: (at / "weights").mkdir(0o600)),
    "no teacher": (f"{KD} --holdout 8 --weights_path w --seed 7",
                   "no teacher w/digits_teacher_subset40_holdout8.pt: train one with `python train.py --tto True "
                   "--dataset digits --subset 40 --holdout 8 --data_path .* --weights_path w`"),
    "a damaged teacher": (f"{KD} --teacher weights/my.pt", "weights/my.pt is damaged",
                          in_weights("my.pt", checkpoint_of("--tto", flip_bit))),
    "a damaged finished run": (TRAIN, "digits_student_subset40.pt is damaged",
                               in_weights("digits_student_subset40.pt", checkpoint_of("", flip_bit))),
    "a damaged resume state": (TRAIN, "digits_student_subset40.last.pt is damaged",
                               in_weights("digits_student_subset40.last.pt", checkpoint_of("", flip_bit))),
    "never trained": ("test.py --weights_path w",
                      "no checkpoint w/student.pt: train it with `python train.py --weights_path w`, or give"),
    "no teacher to test": ("test.py --tto True --teacher my.pt", "error: no teacher my.pt: check the name"),
    "nothing to compare": ("test.py --compare True --dataset digits --data_path {digits}",
                           "no finished checkpoint of digits in weights"),
    "data is a file": ("train.py", NO_CIFAR10, lambda at: (at / "data").touch()),
    "no data, no network": ("train.py", NO_CIFAR10),
}  # fmt: skip


@pytest.fixture
def refuse(tmp_path, digits, forked):
    """A function that asserts that a command, in the folder of the test, ends in one line and harms nothing."""

    def run(command: str, tells: str) -> None:
        name, *arguments = shlex.split(command.replace("{digits}", str(digits)))
        (tmp_path / "student.pt").write_bytes(b"a bystander")
        before = snapshot(tmp_path)
        assert_one_line(forked(name, *arguments, folder=tmp_path), tells)
        assert snapshot(tmp_path) == before, "a file was changed, removed or left behind"

    return run


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_a_wrong_input_is_one_line_and_harms_nothing(name, refuse, tmp_path):
    command, tells, *prepare = WRONG_INPUTS[name]
    for change in prepare:
        change(tmp_path)
    refuse(command, tells)


@pytest.mark.parametrize("name, damage", [("data_batch_2", flip_bit), ("test_batch", Path.unlink)])
def test_a_damaged_or_missing_file_of_the_data_is_one_line(name, damage, refuse, tmp_path, cifar10):
    file = link_data(tmp_path, cifar10) / name
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    damage(file)
    refuse("train.py", NO_CIFAR10)


def test_code_in_a_checkpoint_never_runs_in_a_process_that_a_user_starts(tmp_path):
    in_weights("teacher.pt", hostile)(tmp_path)
    assert_one_line(run_script("test.py", "--tto", cwd=tmp_path), "weights/teacher.pt holds Python objects")
    assert not (tmp_path / "hacked").exists()
