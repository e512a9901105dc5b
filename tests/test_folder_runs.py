"""Your own images through train.py and test.py, with tiny models: what travels, and what a changed picture changes."""

import json
import shutil

import pytest
import torch
from conftest import snapshot
from made_up import FOLDER_CLASSES as CLASSES
from made_up import draw, lay_out, save_run, tiny_student

import test as test_script
import train
from datasets import DATASETS
from runtime import checkpoint

WORDS = ["--dataset=folder", "--data_path=my $pictures", "--device=cpu", "--precision=fp32"]
SIZE = ["--num_epochs=1", "--batch_size=12"]


@pytest.fixture
def root(tiny_models, tmp_path, monkeypatch):
    """Sixty pictures of three classes; the scripts run beside them, with tiny models."""
    monkeypatch.chdir(tmp_path)
    return lay_out(tmp_path / "my $pictures")


def learn(*words: str) -> int:
    return train.main([*WORDS, *SIZE, *words])


def evaluate(*words: str) -> int:
    return test_script.main(["--device=cpu", *words])


def test_the_commands_work_and_only_training_needs_the_folder(root, tmp_path, capfd):
    draw(tmp_path / "a $x$ 日.png", seed=5)
    assert learn("--all", "--temp", "5", "--seeds=2") == 0
    output = capfd.readouterr().out
    assert output.count("60 training and 12 test images of 3 classes") == 1, "it is read once for all runs"
    assert "top5" not in output and "Top 5" not in output and "Top 1 Accuracy" in output
    assert evaluate(*WORDS[:2], "--kd", "--json=r.json") == 0
    report = capfd.readouterr().out
    assert report.startswith("test loss ") and "top5" not in report and "top-5" not in report
    assert all(name in report for name in CLASSES) and "without KD" in report
    assert evaluate(*WORDS[:2], "--compare") == 0 and "Student (with KD, Temp = 5)" in capfd.readouterr().out
    numbers = json.loads((tmp_path / "r.json").read_text())
    root.rename(tmp_path / "elsewhere")
    assert evaluate("--checkpoint=weights/folder_student_kd_t5.pt", "--data_path=elsewhere", "--json=r2.json") == 0
    assert json.loads((tmp_path / "r2.json").read_text())["loss"] == numbers["loss"]
    shutil.rmtree(tmp_path / "elsewhere")
    capfd.readouterr()
    assert evaluate("--dataset=folder", "--kd", "--image", "a $x$ 日.png") == 0
    assert "Teacher" in (told := capfd.readouterr().out) and any(name in told for name in CLASSES)
    (tmp_path / "data").mkdir()
    assert evaluate("--checkpoint=weights/folder_student_kd_t5.pt", "--export=s.pt2") == 0
    assert "not evaluated, for there is no data/train" in capfd.readouterr().out
    files = {"preprocessing.json": ""}
    torch.export.load("s.pt2", extra_files=files)
    said, spec = json.loads(files["preprocessing.json"]), checkpoint.load("weights/folder_student_kd_t5.pt")["spec"]
    assert tuple(said["classes"]) == CLASSES and tuple(said["mean"]) == spec.mean and "EXIF" in said["pictures"]
    assert evaluate(*WORDS[:2], "--kd", "--export=s.pt2", "--json=r.json") == 2
    assert "no folder" in capfd.readouterr().err


def test_a_changed_picture_is_another_run(root, tmp_path, capfd):
    assert learn("--all", "--temp", "5") == 0
    assert learn("--all", "--temp", "5") == 0
    assert capfd.readouterr().out.count("finished before, kept") == 3
    draw(root / "train" / CLASSES[0] / "0.png", seed=999)
    before = snapshot(tmp_path / "weights")
    assert learn("--kd") == 2
    error = capfd.readouterr().err
    assert "was trained on other images than my $pictures holds now" in error and error.count("\n") == 1
    assert snapshot(tmp_path / "weights") == before
    assert evaluate(*WORDS[:2], "--kd") == 0
    assert "student_kd_t5.pt was trained on other images than there are now" in capfd.readouterr().out
    assert evaluate(*WORDS[:2], "--compare") == 2, "no checkpoint is of these images"
    caches = set((tmp_path / "weights").glob("*.cache"))
    assert learn("--all", "--temp", "5") == 0
    assert "kept" not in capfd.readouterr().out
    assert len(set((tmp_path / "weights").glob("*.cache")) - caches) == 1
    assert learn("--all", "--temp", "5", "--flip=False") == 0, "another use of the same pictures"
    assert "kept" not in capfd.readouterr().out


def test_an_unfinished_run_of_other_pictures_is_not_gone_on_with(root, monkeypatch, capfd):
    def end_epoch(*arguments):
        raise train.Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(train, "end_epoch", end_epoch)
        assert learn() == 128 + 15
    (root / "train" / CLASSES[0] / "0.png").unlink()
    capfd.readouterr()
    assert learn() == 2
    error = capfd.readouterr().err
    assert "the unfinished run weights/folder_student.last.pt has images " in error and error.count("\n") == 1
    assert learn("--resume=False") == 0


def test_a_holdout_counts_the_folders_own_images(root, tmp_path, capfd):
    assert learn("--tto") == 0
    assert learn("--kd", "--holdout=8", "--teacher=weights/folder_teacher.pt") == 2
    assert "was trained on images that --holdout 8 keeps aside" in capfd.readouterr().err
    assert learn("--tto", "--holdout=8") == learn("--kd", "--holdout=8") == 0
    assert learn("--kd", "--subset=60", "--holdout=8", "--teacher=weights/folder_teacher_holdout8.pt") == 0


def test_other_classes_are_refused(root, tmp_path, capfd):
    assert learn() == 0
    (root / "train" / CLASSES[0]).rename(root / "train" / "another")
    (root / "test" / CLASSES[0]).rename(root / "test" / "another")
    capfd.readouterr()
    assert evaluate(*WORDS[:2]) == 2
    error = capfd.readouterr().err
    assert f"knows the classes {', '.join(CLASSES)}, not another, " in error and error.count("\n") == 1


def test_an_old_control_or_teacher_beside_it_does_not_stop_a_report(root, tmp_path, capfd):
    def rename(old: str, new: str) -> None:
        for half in ("train", "test"):
            (root / half / old).rename(root / half / new)

    assert learn("--all", "--temp", "5") == 0
    rename(CLASSES[0], "another")
    assert learn("--tto") == learn("--kd") == 0
    capfd.readouterr()
    assert evaluate(*WORDS[:2], "--kd") == 0
    report = capfd.readouterr().out
    assert "folder_student.pt is not its control: it has images " in report and "this student" in report
    rename("another", "a third")
    assert learn() == 0
    capfd.readouterr()
    why = f"weights/folder_teacher.pt knows the classes another, {', '.join(CLASSES[1:])}, not "
    assert evaluate(*WORDS[:2]) == 0
    assert f"the teacher is left out: {why}" in capfd.readouterr().out
    draw(tmp_path / "a.png", seed=5)
    assert evaluate("--dataset=folder", "--image=a.png") == 0
    told = capfd.readouterr().out
    assert f"the teacher is left out: {why}" in told and "Student" in told and "Teacher (" not in told
    for word in (WORDS[1], "--image=a.png"):
        assert evaluate(WORDS[0], word, "--teacher=weights/folder_teacher.pt") == 2, "what is named is needed"
        assert why in capfd.readouterr().err


WHOLE = DATASETS["cifar10"].description()


@pytest.mark.parametrize(
    "data",
    [3, {}, *(WHOLE | changes for changes in ({"classes": [1, 2]}, {"mean": [0.5] * 2}, {"std": [0.5, 0.5, 0.0]},
                                              {"mean": [float("nan")] * 3}, {"classes": None}))],
)  # fmt: skip
def test_a_description_that_is_none_is_refused(data, tmp_path, capfd):
    path = save_run(tmp_path, model=tiny_student())
    content = torch.load(path, weights_only=True)
    assert checkpoint.load(path)["spec"] == DATASETS["cifar10"], "of an older version, which has none"
    torch.save(content | {"data": WHOLE}, path)
    assert checkpoint.load(path)["spec"] == DATASETS["cifar10"]
    torch.save(content | {"data": data}, path)
    assert evaluate(f"--checkpoint={path}") == 2
    assert "damaged or no checkpoint" in capfd.readouterr().err
