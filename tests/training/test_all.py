"""`train.py --all`: every run once, whenever it is stopped; and what makes a gain of KD a paired one."""

import json
import re
from pathlib import Path

import pytest
from conftest import snapshot

import train
import utils
from runtime import checkpoint
from runtime.errors import Stopped

RUNS = ["teacher", "student_seed7", "student_kd_t5_seed7", "student_seed8", "student_kd_t5_seed8"]
ALL = ["--all", "--temp", "5"]


def load(name: str, trial: str = "_subset40", folder: str = "weights") -> dict:
    return checkpoint.load(Path(folder, f"digits_{name}{trial}.pt"))


def table_of(folder: Path) -> dict:
    """The numbers of the table, without the times."""
    table = json.loads((folder / "plots" / "results_digits_subset40" / "results.json").read_text())
    for row in table["rows"]:
        assert row.pop("seconds") > 0
    return table


def test_stopped_after_each_run_it_gives_the_same_table(learn, tmp_path, monkeypatch):
    words = [*ALL, "--seed=7", "--seeds=2"]
    output = learn(*words)
    assert output.startswith("5 runs, 0 of them finished\n") and "Gain of KD" in output
    assert "the teacher is weights/digits_teacher_subset40.pt (seed 42, num_epochs " in output
    assert len(re.findall(r"img/s, about \d:\d\d:\d\d left for all runs\n", output)) == 3, "but the last run's"
    expected, weights = table_of(tmp_path), [checkpoint.fingerprint(load(name)["model"]) for name in RUNS]
    assert [row["seeds"] for row in expected["rows"]] == [[42], [7, 8], [7, 8]] and len(expected["gains"]) == 1
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    monkeypatch.chdir(stopped)

    def train_one(*arguments, real=train.train_run):
        real(*arguments)
        raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_run", train_one)
        for _ in RUNS:
            learn(*words, code=128 + 15)
    assert (output := learn(*words)).startswith("4 runs, 4 of them finished\n")
    assert re.findall(r"(\S+): already finished", output) == [f"digits_{run}_subset40" for run in RUNS[1:]]
    Path("weights/digits_student_kd_t5_seed7_subset40.pt").rename("kd.pt")
    Path("weights/digits_student_seed7_subset40.pt").unlink()

    def train_beside_another(*arguments, real=train.train_run):
        Path("kd.pt").rename("weights/digits_student_kd_t5_seed7_subset40.pt")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_run", train_beside_another)
        learn(*words)  # a run that finished meanwhile is not trained again
    assert table_of(stopped) == expected
    assert [checkpoint.fingerprint(load(name)["model"]) for name in RUNS] == weights


def test_the_papers_experiments(learn, tmp_path):
    words = ["--omit", "5", "--student_images", "20", "27", "--temp", "1", "2", "20"]
    told, folder = learn("--all", *words, "--seeds=2"), tmp_path / "plots/results_digits_subset40_omit_5_images20_27"
    figures = {"omitted.png", "images.png", "temperatures.png"}
    assert figures < {path.name for path in folder.iterdir()} and ", omitted.png, images.png, temp" in told
    results = json.loads((folder / "results.json").read_text())
    assert [gain["pairs"] for gain in results["gains"]] == [2] * 6, "each with the baselines of its own images"
    teacher, *rows = results["rows"]
    assert teacher["model"].endswith(", subset 40") and "bias" not in teacher and len(rows) == 8
    for row in rows:
        assert re.search(r", omit 5, 2[07] images, subset 40$", row["model"]) and len(row["bias"]) == 1
        assert 8 * row["top1"] == pytest.approx(row["top1_omitted"] + 7 * row["top1_others"])  # one of 8 is a 5
        assert {"corrected_top1", "corrected_top1_omitted", "corrected_top1_others_sd"} < set(row)
    softness = json.loads(load("student_kd_t20", "_subset40_omit_5_images20")["log"].splitlines()[1])["teacher"]
    words = "teacher at T = 20: mean largest probability {confidence:.3f}, entropy {entropy:.2f} out of log C = 2.30"
    assert words.format(**softness) in told
    entropies = [row["teacher_entropy"] for row in rows if row.get("temp") and row["student_images"] == 27]
    assert entropies == sorted(entropies) and entropies[0] < entropies[2] - 0.01, "softer at a higher temperature"
    assert "_omit_5_images20: 20 images, " in told and "_omit_5_images27: 27 images, " in told


def test_students_of_a_seed_differ_in_the_loss_alone(learn, monkeypatch):
    seen, runs = [], {}

    def train_epoch(run, *arguments, real=train.train_epoch):
        weights = checkpoint.fingerprint(run.model.state_dict())
        seen.clear()
        real(run, *arguments)
        runs[run.config.stem] = weights, [*seen], run.totals[0].item()

    def images(views, rows, k, real=utils.Views.images):
        seen.append((rows.tolist(), k))
        return real(views, rows, k)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(utils.Views, "images", images)
    learn(*ALL, "--seeds=2", "--loss", "kd", "dkd", "--flip", "--views=162")
    names = [f"student{kd}{seed}" for seed in ("", "_seed43") for kd in ("", "_kd_t5", "_dkd_t5")]
    assert [*runs] == [f"digits_{name}_subset40" for name in ("teacher", *names)]
    _, *students = runs.values()
    for (start, batches, loss), *with_kd in (students[:3], students[3:]):
        for kd_start, kd_batches, kd_loss in with_kd:
            assert kd_start == start and kd_loss != loss
            assert len(batches) == 5 and kd_batches == batches, "the same batches in the same views"
        assert with_kd[0][2] != with_kd[1][2]
    assert students[3][0] != students[0][0]
    assert students[3][1][0][0] != students[0][1][0][0], "another seed, another order"
    found = [students[i][1][0][1] for i in (0, 3)]
    assert found == [utils.epoch_view(162, True, seed, 0) for seed in (42, 43)], "and other views"


def test_it_distils_the_teacher_that_is_there_and_replaces_no_students_of_another(learn, tmp_path):
    learn("--tto", "--num_epochs=2")
    learn(*ALL)
    teacher = checkpoint.fingerprint(load("teacher")["model"])
    assert load("teacher")["run"]["num_epochs"] == 2 and load("student_kd_t5")["run"]["teacher"] == teacher
    assert load("student")["run"]["teacher"] is None, "it may have been trained alone"
    before = snapshot(tmp_path / "weights")
    assert learn(*ALL).count("already finished") == 2 and snapshot(tmp_path / "weights") == before
    learn("--tto", "--resume=False", "--num_epochs=1")
    Path("weights/digits_student_subset40.pt").unlink()
    error = learn(*ALL, code=2)
    assert not Path("weights/digits_student_subset40.pt").exists(), "it is told before a training"
    assert f"teacher {teacher[:8]}, not " in error and "--name" in error and "--resume False" in error
    assert load("student_kd_t5")["run"]["teacher"] == teacher
    Path("weights/digits_teacher_subset40.last.pt").write_text("a longer training, interrupted")
    new = [*ALL, "--name=new", "--num_epochs=3"]
    learn(*new)
    assert load("teacher")["run"]["num_epochs"] == 1 and load("student", folder="weights/new")["run"]["num_epochs"] == 3
    assert load("student_kd_t5", folder="weights/new")["run"]["teacher"] != teacher
    learn("--seed=44", "--num_epochs=2", "--name=new")
    state = load("student_seed44", folder="weights/new")
    for _ in ("finished", "unfinished"):
        before = snapshot(tmp_path)
        learn(*new, "--seeds=3", code=2)  # seed 44 has other options
        assert snapshot(tmp_path) == before, "told before seed 43 is trained"
        state["path"].unlink(missing_ok=True)
        state.pop("metrics", None)
        checkpoint.save(state["path"].with_suffix(".last.pt"), {k: v for k, v in state.items() if k != "path"})


def test_students_of_a_name_share_the_teacher_unless_the_folder_has_its_own(learn, tmp_path):
    learn(*ALL)
    before = snapshot(tmp_path)
    learn(*ALL, "--name=a05", "--alpha=0.5")
    named = snapshot(tmp_path)
    new = [Path(path).relative_to(tmp_path) for path in named.keys() - before.keys()]
    assert {path.parts[:2] for path in new} == {("weights", "a05"), ("plots", "a05")}
    assert not any("teacher" in path.name for path in new), "the teacher and its logits are shared"
    assert Path("plots/a05/results_digits_subset40/results.md") in new
    assert Path("plots/a05/digits_student_subset40_loss.png") in new
    teacher = checkpoint.fingerprint(load("teacher")["model"])
    assert load("student_kd_t5", folder="weights/a05")["run"]["teacher"] == teacher
    learn("--tto", "--seed=42", "--lr=0.05", "--name=own")
    own = Path("weights/own/digits_teacher_subset40.pt")
    own.rename(own.with_suffix(".last.pt"))  # as if it were unfinished
    for words in (["--kd"], ALL):
        assert "own/digits_teacher_subset40.last.pt is an unfinished teacher: " in learn(*words, "--name=own", code=2)
    own.with_suffix(".last.pt").rename(own)
    assert "the teacher is weights/own/digits_teacher_subset40.pt (seed 42, num_epochs " in learn(*ALL, "--name=own")
    named = snapshot(tmp_path)
    learn(*ALL, "--holdout=8")
    assert before.items() <= named.items() <= snapshot(tmp_path).items(), "what was there stays"
    teacher, student = (load(name, "_subset40_holdout8") for name in ("teacher", "student_kd_t5"))
    assert teacher["run"]["holdout"] == 8 and student["run"]["teacher"] == checkpoint.fingerprint(teacher["model"])
    folder = Path("plots/results_digits_subset40_holdout8")
    assert (folder / "results.md").read_text().count(", subset 40, holdout 8 ") >= 3
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows[1]["loss"] == pytest.approx(load("student", "_subset40_holdout8")["metrics"]["loss"])


def test_all_with_a_teacher_trains_no_other_and_shows_it_in_the_table(learn, tmp_path):
    assert "no checkpoint none.pt" in learn(*ALL, "--teacher=none.pt", code=2) and not Path("weights").exists()
    learn("--tto", "--subset=80", "--holdout=8")
    path = Path("weights/digits_teacher_subset80_holdout8.pt").rename("mine.pt")
    learn(*ALL, f"--teacher={path}")  # all are evaluated on the students' images
    assert not list(tmp_path.glob("weights/*teacher*.pt"))
    rows = table_of(tmp_path)["rows"]
    assert [row["model"].split(" (")[0] for row in rows] == ["Teacher", "Student", "Student"]
    assert all("agreement" in row for row in rows[1:])
    assert rows[1]["loss"] == pytest.approx(load("student")["metrics"]["loss"]), "on the student's test images"
