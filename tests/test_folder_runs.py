"""Your own images through train.py and test.py, with tiny models: what travels, and what a changed picture changes."""

import json
import re
import shutil

import pytest
from conftest import one_line, snapshot
from made_up import draw

import test as test_script
import train
import utils

CLASSES = ("$\\frac$ & x", "naïve chat", "日本")  # in the order of their names
WORDS = ["--dataset=folder", "--data_path=my $pictures", "--device=cpu", "--precision=fp32"]


@pytest.fixture
def root(tiny_models, no_figures, tmp_path, monkeypatch):
    """20 training and 4 test pictures of each class; the scripts run beside them, with tiny models and no figures."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(CLASSES):
        for i in range(24):
            draw(tmp_path / "my $pictures" / ("test" if i > 19 else "train") / name / f"{i}.png", seed=100 * label + i)
    return tmp_path / "my $pictures"


def learn(*words: str) -> int:
    return train.main([*WORDS, "--num_epochs=1", "--batch_size=12", "--views=2", *words])


def evaluate(*words: str) -> int:
    return test_script.main(["--device=cpu", *words])


def test_the_commands_work_and_only_training_needs_the_folder(root, tmp_path, monkeypatch, capfd):
    draw(tmp_path / "a $x$ 日.png", seed=5)
    assert learn("--all", "--temp", "5", "--seeds=2") == 0
    output = capfd.readouterr().out
    assert output.count("60 training and 12 test images of 3 classes") == 1, "it is read once for all runs"
    assert "top5" not in output and "Top 5" not in output and "Top 1 Accuracy" in output
    assert len(utils.plot_curves(tmp_path / "plots" / "folder_student.jsonl", tmp_path)) == 2
    assert evaluate(*WORDS[:2], "--kd", "--json=r.json") == 0
    told = capfd.readouterr().out
    assert told.startswith("test loss ") and "top5" not in told and "top-5" not in told
    assert all(name in told for name in CLASSES) and "top-1 agreement" in told
    assert evaluate(*WORDS[:2], "--compare") == 0 and "Student (with KD, Temp = 5)" in capfd.readouterr().out
    root.rename(tmp_path / "elsewhere")
    student = "--checkpoint=weights/folder_student_kd_t5.pt"
    assert evaluate(student, "--data_path=elsewhere", "--json=r2.json") == 0
    losses = [json.loads((tmp_path / name).read_text())["loss"] for name in ("r.json", "r2.json")]
    assert losses[0] == losses[1]
    shutil.rmtree(tmp_path / "elsewhere")
    capfd.readouterr()
    assert evaluate("--dataset=folder", "--kd", "--image", "a $x$ 日.png") == 0
    assert "Teacher" in (told := capfd.readouterr().out) and any(name in told for name in CLASSES)
    assert evaluate(student, "--export=s.pt2") == 0
    assert "not evaluated, because there is no data/train" in capfd.readouterr().out
    assert evaluate(*WORDS[:2], "--kd", "--export=s.pt2", "--json=r.json") == 2
    assert "--data_path must name a folder" in capfd.readouterr().err


def test_a_changed_picture_is_another_run(root, tmp_path, capfd):
    assert learn("--all", "--temp", "5") == 0
    draw(root / "train" / CLASSES[0] / "0.png", seed=999)
    before = snapshot(tmp_path / "weights")
    for word, tells in (
        ("--kd", "folder_student_kd_t5.pt is a finished run with images [0-9a-f]{8}, not "),
        ("--kd --temp=7", "folder_teacher.pt was trained on other images than those of folder here"),
        ("--kd=False", "folder_student.pt is a finished run with images [0-9a-f]{8}, not "),
        ("--all", "folder_teacher.pt was trained on other images"),
    ):
        assert learn(*word.split()) == 2
        assert re.search(tells, one_line(capfd)) and snapshot(tmp_path / "weights") == before
    assert evaluate(*WORDS[:2], "--kd") == 0
    assert "folder_student_kd_t5.pt was trained on other images" in capfd.readouterr().out
    assert evaluate(*WORDS[:2], "--compare") == 2, "no checkpoint is of these images"
    assert learn("--all", "--temp", "5", "--weights_path=w2") == 0
    keys = {path.name for weights in ("weights", "w2") for path in (tmp_path / weights).glob("*_logits_*")}
    assert len(keys) == 2, "other logits"


def test_other_classes_are_an_error(root, tmp_path, capfd):
    assert learn("--tto") == learn() == 0
    for split in ("train", "test"):
        (root / split / CLASSES[0]).rename(root / split / "another")
    for command in (lambda: evaluate(*WORDS[:2]), lambda: learn("--kd")):
        capfd.readouterr()
        assert command() == 2 and f"has 3 classes ({', '.join(CLASSES)}" in one_line(capfd)
