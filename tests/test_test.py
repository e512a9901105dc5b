"""test.py: which checkpoint it evaluates, what it says of it, and which ones it compares."""

import contextlib
import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import CPU, TinyTeacher, fingerprint_of, options_of, random_images, save_run, tiny_student, write_log
from PIL import Image

import test as test_script
from evaluation import comparison, inference, report
from runtime import checkpoint
from runtime.errors import Stopped
from runtime.signals import StopSignal

BF16 = torch.bfloat16
KEYS = [
    "checkpoint", "role", "images", "loss", "top1", "top5", "top1_ci", "per_class", "confusion", "ece",
    "parameters", "macs", "bytes", "latency_ms", "images_per_second", "agreement", "kl_to_teacher", "contingency",
]  # fmt: skip


@pytest.fixture
def evaluate(tiny_models, tmp_path, monkeypatch):
    """A function that runs test.py over made-up images, with tiny models and few timed passes; its exit code."""
    asked = []

    def load_images(spec, folder, *splits, **which):
        asked.append((splits, which))
        return [random_images(20) for _ in splits]

    monkeypatch.setattr(comparison, "load_images", load_images)
    monkeypatch.setattr(test_script.figures, "plot_reliability", lambda logits, labels, title, path: path)
    monkeypatch.setattr(test_script.figures, "plot_confusion", lambda numbers, classes, title, path: path)
    folders = [f"--weights_path={tmp_path}", f"--plots_path={tmp_path / 'plots'}", "--device=cpu"]

    def run(*arguments: str) -> int:
        return test_script.main([*folders, *arguments])

    run.asked = asked
    return run


@pytest.fixture
def report_of(evaluate, tmp_path):
    """A function that runs test.py and gives the numbers of its report."""

    def run(*arguments: str) -> dict:
        assert evaluate(*arguments, f"--json={tmp_path / 'report.json'}") == 0
        return json.loads((tmp_path / "report.json").read_text())

    return run


# ---------------------------------------------------------------------------------------------- one checkpoint


def test_report_of_a_student_beside_teacher_and_control(tmp_path, evaluate, capfd):
    teacher = fingerprint_of(save_run(tmp_path, "--tto", weights=3))
    save_run(tmp_path, "", weights=1)
    path = save_run(tmp_path, "--kd", teacher, weights=2)
    assert evaluate("--kd", "True", f"--json={tmp_path / 'new' / 'report.json'}") == 0
    output = capfd.readouterr().out
    numbers = json.loads((tmp_path / "new" / "report.json").read_text())
    assert sorted(numbers) == sorted(KEYS)
    first = f"test loss {numbers['loss']:.4f} top1 {100 * numbers['top1']:.2f}% top5 {100 * numbers['top5']:.2f}%"
    assert output.splitlines()[0] == first
    assert "without KD" in output and "not its control" not in output and "is not the teacher" not in output
    assert numbers["role"] == "student" and numbers["images"] == 20 and 0 <= numbers["agreement"] <= 1
    assert np.sum(numbers["contingency"]) == np.sum(numbers["confusion"]) == 20
    assert numbers["latency_ms"] == 20 and numbers["images_per_second"] == 256 / 0.02
    assert numbers["bytes"] == path.stat().st_size


@pytest.mark.parametrize(
    "changes", [{"torch": "2.11.0"}, {"device": "another processor"}, {"world_size": 2}, {"lr": 0.3}, {"views": 3}]
)
def test_another_machines_or_another_recipes_student_is_no_control(changes, tmp_path, evaluate, capfd):
    teacher = fingerprint_of(save_run(tmp_path, "--tto", weights=3))
    control = save_run(tmp_path, "", weights=1, **changes)
    save_run(tmp_path, "--kd", teacher, weights=2)
    assert evaluate("--kd", "True") == 0
    output = capfd.readouterr().out
    assert "without KD" not in output
    (name, value), *_ = changes.items()
    assert f"{control} is not its control: it has " in output and f"{name} {value}, not " in output


def test_another_teacher_than_its_own_is_said_to_be_one(tmp_path, evaluate, capfd):
    save_run(tmp_path, "--tto", weights=3)
    own = save_run(tmp_path / "elsewhere", "--tto", weights=4)
    save_run(tmp_path, "--kd", fingerprint_of(own), weights=2)
    assert evaluate("--kd") == 0
    assert f"{tmp_path / 'teacher.pt'} is not the teacher that this student learned from" in capfd.readouterr().out
    assert evaluate("--kd", f"--teacher={own}") == 0
    assert "not the teacher" not in capfd.readouterr().out
    assert evaluate("--kd", f"--teacher={tmp_path / 'none.pt'}") == 2
    assert f"no teacher {tmp_path / 'none.pt'}: check its name, or leave --teacher out" in capfd.readouterr().err
    assert evaluate(f"--checkpoint={own}", f"--teacher={own}") == 2
    assert "is a teacher, which is compared with none: leave --teacher out" in capfd.readouterr().err


def test_what_has_seen_the_images_kept_aside_is_not_evaluated_on_them(tmp_path, evaluate, capfd):
    seen, fair = save_run(tmp_path, "--tto"), save_run(tmp_path, "--tto --holdout=8")
    save_run(tmp_path, "--holdout=8")
    for words in ("--tto --holdout=8", "--holdout=8"):
        assert evaluate(*words.split(), f"--teacher={seen}") == 2
        error = capfd.readouterr().err
        assert f"--holdout 8: {seen} was trained on some of these images" in error and error.count("\n") == 1
        assert evaluate(*words.split(), f"--teacher={fair}") == 0
    assert evaluate("--compare", "--holdout=8", f"--teacher={seen}") == 0
    assert f"left out: --holdout 8: {seen} was trained" in (output := capfd.readouterr().out)
    assert output.count("Student") == 1 and "Teacher" not in output
    assert evaluate("--compare", "--holdout=8", "--subset=100") == 2, "all were trained on the first 100 images"


def test_each_model_is_asked_in_the_precision_of_its_training(tmp_path, evaluate, monkeypatch):
    save_run(tmp_path, "--tto --precision=fp32")
    save_run(tmp_path, "--precision=bf16")
    monkeypatch.setattr(test_script, "start", lambda *_: contextlib.nullcontext(replace(CPU, autocast_dtype=BF16)))
    asked = []

    def all_logits(model, images, spec, runtime, stop=None):
        asked.append((type(model), runtime.precision))
        return torch.eye(10)[images.labels] + 0.0

    monkeypatch.setattr(comparison, "all_logits", all_logits)
    assert evaluate() == 0 and evaluate("--compare") == 0
    kinds = {type(tiny_student()): "bf16", TinyTeacher: "fp32"}
    assert len(asked) == 4 and all(precision == kinds[kind] for kind, precision in asked)


def test_report_without_a_teacher_leaves_fidelity_out(tmp_path, report_of, capfd):
    save_run(tmp_path)
    assert sorted(report_of()) == sorted(KEYS[:-3])
    output = capfd.readouterr().out
    assert f"the teacher is left out: no checkpoint {tmp_path / 'teacher.pt'} in " in output
    assert "make it with `python train.py --tto True --" in output


def test_a_damaged_control_leaves_the_fidelity_to_the_teacher(tmp_path, evaluate, capfd):
    save_run(tmp_path, "--tto")
    save_run(tmp_path, "--kd")
    (tmp_path / "student.pt").write_bytes(b"torn")
    assert evaluate("--kd") == 0
    output = capfd.readouterr().out
    assert f"left out: {tmp_path / 'student.pt'} is damaged" in output
    assert "this student" in output and "without KD |" not in output


def test_the_figures_are_those_of_the_checkpoint(tmp_path, evaluate, monkeypatch):
    monkeypatch.undo()  # with the real figures and images
    save_run(tmp_path)
    model, _ = inference.load_model(tmp_path / "student.pt", "student", "cifar10", "cpu")
    assert not model.training
    words = ["--device=cpu", f"--weights_path={tmp_path}", f"--plots_path={tmp_path / 'plots'}"]
    monkeypatch.setattr(comparison, "load_images", lambda *_, **which: [random_images(20)])
    monkeypatch.setattr(inference, "pass_seconds", lambda *arguments: np.array([0.01, 0.02, 0.03]))
    assert test_script.main(words) == 0
    for figure in ("confusion", "reliability"):
        with Image.open(tmp_path / "plots" / f"student_{figure}.png") as picture:
            assert picture.width == 840


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, evaluate, capfd):
    for words, command in (
        ("--kd --temp 20", "--kd True --temp 20 --"), ("--tto", "--tto True --"), ("--teacher my.pt", "--weights_path"),
        ("--subset 40 --seed 7", "--weights_path"),
    ):  # fmt: skip
        assert evaluate(*shlex.split(words)) == 2
        error = capfd.readouterr().err
        assert f"`python train.py {command}" in error and error.count("\n") == 1
        told = error[error.index("`python train.py ") :].split("`")[1]
        trains = options_of(" ".join(shlex.split(told)[2:]))
        assert trains.run_name == test_script.config.parse_test(shlex.split(words)).run_name
    save_run(tmp_path, "--kd --loss dkd")
    assert evaluate("--kd", "--loss", "dkd") == 0
    told = capfd.readouterr().out.split("`python train.py ")[1].split("`")[0]
    assert options_of(told).run_name == "teacher"
    assert evaluate("--tto", "--teacher", "my.pt") == 2
    assert "no teacher my.pt: check its name, or leave --teacher out" in capfd.readouterr().err
    (tmp_path / "student.pt").write_text("no checkpoint")
    assert evaluate() == 2 and "damaged" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["--tto", "--tto --seed 7", "", "--seed 7", "--kd", "--kd --temp 20 --seed 7", "--subset 40", "--kd --subset 40",
     "--tto --holdout 8", "--kd --temp 5.0000001"],
)  # fmt: skip
def test_each_run_is_found_by_its_options_and_by_its_file(command, tmp_path, report_of, evaluate):
    runs = ["--tto", "--tto --seed 7", "", "--seed 7", "--kd", "--kd --temp 20 --seed 7", "--subset 40",
            "--kd --subset 40", "--tto --holdout 8", "--kd --temp 5.0000001"]  # fmt: skip
    for i, run in enumerate(runs):
        save_run(tmp_path, run, weights=i)
    options = options_of(command)
    by_options = report_of(*shlex.split(command))
    assert by_options["checkpoint"] == str(tmp_path / f"{options.run_name}.pt") and by_options["role"] == options.role
    assert evaluate.asked[-1] == ((options.split,), {"subset": options.subset, "holdout": options.holdout})
    elsewhere = tmp_path / "elsewhere.bin"
    (tmp_path / f"{options.run_name}.pt").rename(elsewhere)
    by_file = report_of(f"--checkpoint={elsewhere}")
    assert evaluate.asked[-1] == evaluate.asked[0]
    assert by_file | {"checkpoint": by_options["checkpoint"]} == by_options


def test_any_checkpoint_says_itself_what_it_is(tmp_path, evaluate, report_of, capfd):
    kinds = {"--tto --dataset digits": "digits", "--dataset digits --seed 3": "digits", "--kd --temp 20": "cifar10"}
    for i, (command, title) in enumerate(kinds.items()):
        path = save_run(tmp_path, command, weights=i, name="x.pt")
        assert report_of("--checkpoint", str(path))["role"] == ("teacher" if "--tto" in command else "student")
        assert f"{path} on {title}, " in capfd.readouterr().out
    assert evaluate("--checkpoint", str(tmp_path / "none.pt")) == 2
    assert "no checkpoint" in capfd.readouterr().err
    for changes in ({"role": "pupil"}, {"dataset": "imagenet"}):
        save_run(tmp_path, "", name="x.pt", **changes)
        assert evaluate("--checkpoint", str(tmp_path / "x.pt")) == 2
        error = capfd.readouterr().err
        assert "which this version knows not" in error and error.count("\n") == 1


@pytest.fixture
def small_report(digits, tmp_path, forked):
    """A function that runs test.py in a process of its own, over 8 digits."""
    save_run(tmp_path, "--dataset=digits", name="digits_student_subset40.pt", subset=40, model=tiny_student())
    words = ["--dataset=digits", "--subset=40", f"--data_path={digits}", "--device=cpu"]
    return lambda *more, **how: forked("test.py", *words, "--weights_path=.", *more, folder=tmp_path, tiny=True, **how)


def test_only_a_file_is_replaced(tmp_path):
    assert report.is_written_through(Path("/dev/null")) and report.is_written_through(tmp_path)
    (tmp_path / "r.json").touch()
    assert not report.is_written_through(tmp_path / "r.json") and not report.is_written_through(tmp_path / "new.json")


def test_a_pipe_in_a_folder_of_others_is_written_to(small_report, tmp_path):
    (tmp_path / "closed").mkdir()
    os.mkfifo(tmp_path / "closed" / "pipe")
    (tmp_path / "closed").chmod(0o555)
    reader = os.open(tmp_path / "closed" / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert small_report("--json=closed/pipe").returncode == 0
    assert json.loads(os.read(reader, 1 << 16))["images"] == 8


def test_json_stands_beside_the_report(small_report):
    done = small_report("--json=/dev/stdout")  # which is a file here
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])["images"] == 8
    assert "test loss " in done.stdout and "Cost: median" in done.stdout


@pytest.mark.parametrize(
    "stdout, code, tells",
    [
        ("closed", 0, ""),
        ("gone", 128 + signal.SIGPIPE, ""),
        ("full", 2, "test.py: error: can't write to standard output: No space left on device; what was saved before "),
    ],
)
def test_a_report_that_nobody_can_read_is_no_bug(stdout, code, tells, small_report, tmp_path):
    done = small_report("--json=report.json", stdout=stdout)
    assert done.returncode == code and done.stderr.startswith(tells), done.stderr
    assert done.stderr.count("\n") == bool(tells)
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 8


def test_a_terminal_of_few_letters_keeps_the_table(tmp_path, forked):
    for seed, top1 in ((42, 10.0), (43, 20.0)):
        save_run(tmp_path, f"--seed={seed} --dataset=digits", top1=top1, model=tiny_student())
    save_run(tmp_path, "--dataset=digits", name="digits_\udce9.pt", model=tiny_student())  # no name in any language
    words = ["--dataset=digits", "--subset=40", "--compare", "--device=cpu", "--weights_path=.", "--data_path=."]
    done = forked("test.py", *words, folder=tmp_path, tiny=True, stdout="ascii")
    assert done.returncode == 0, done.stderr
    assert "% ? " in done.stdout and "saved " in done.stdout and done.stdout.isascii()
    table = (tmp_path / "plots" / "digits_comparison_subset40.md").read_text(encoding="utf-8")
    assert "% ± " in table and "digits_?.pt" in table


# ---------------------------------------------------------------------------------------------- pictures


def test_picture_is_classified_by_student_and_teacher(tmp_path, evaluate, capfd):
    save_run(tmp_path)
    save_run(tmp_path, "--tto")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "blue_$x$.png")
    assert evaluate("--image", str(tmp_path / "blue_$x$.png")) == 0
    output = capfd.readouterr().out
    assert "Student (w/o KD)" in output and "Teacher (VGG19 with BN)" in output and "blue_$x$.png" in output
    assert (tmp_path / "plots" / "student_images.png").exists()
    assert evaluate("--image", str(tmp_path / "blue_$x$.png"), f"--checkpoint={tmp_path / 'teacher.pt'}") == 0
    output = capfd.readouterr().out
    assert "Student" not in output and "Teacher (VGG19 with BN)" in output
    assert (tmp_path / "plots" / "teacher_images.png").exists()
    assert not evaluate.asked, "a picture needs no data set"


def test_probabilities_are_softened(tmp_path, evaluate, capfd, monkeypatch):
    save_run(tmp_path)
    save_run(tmp_path, "--tto")
    drawn = []
    monkeypatch.setattr(test_script.figures, "plot_pictures", lambda *arguments: drawn.append(arguments))
    assert evaluate("--tto", "True", "--soften", "1", "5", "20") == 0
    (pixels, names, answers, classes, path), labels = drawn[0], random_images(20).labels.tolist()
    rows = sorted(labels.index(label) for label in set(labels))[:4]
    assert (pixels == random_images(20).pixels[rows].numpy()).all() and path.name == "teacher_softened.png"
    assert names == [f"{classes[labels[row]]} (test {row})" for row in rows] and names[3] in capfd.readouterr().out
    assert list(answers) == [f"Teacher (VGG19 with BN), T = {temp}" for temp in (1, 5, 20)]
    plain, soft, _ = answers.values()
    torch.testing.assert_close(soft, (plain.log() / 5).softmax(1))
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "blue.png")
    assert evaluate("--image", str(tmp_path / "blue.png"), "--soften", "2.5") == 0
    assert list(drawn[1][2]) == ["Student (w/o KD), T = 2.5"] and drawn[1][1] == ["blue.png"]


def test_a_bad_picture_is_one_line(tmp_path, evaluate, capfd):
    (tmp_path / "text.png").write_text("no picture")
    assert evaluate("--image", str(tmp_path / "text.png")) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "no picture" in error and str(tmp_path / "text.png") in error


# ---------------------------------------------------------------------------------------------- many checkpoints


@pytest.fixture
def compare(evaluate, tmp_path, capfd):
    """A function that runs test.py --compare and gives the rows, the labels in order, and what it printed."""

    def run(*arguments: str) -> tuple[list[dict], list[str], str]:
        capfd.readouterr()
        assert evaluate("--compare", "True", *arguments) == 0
        rows = json.loads((tmp_path / "plots" / "comparison.json").read_text())["rows"]
        return rows, [row["model"] for row in rows], capfd.readouterr().out

    return run


def test_compare_says_of_each_checkpoint_what_its_own_report_says(tmp_path, evaluate, report_of, compare, capfd):
    assert evaluate("--compare", "True") == 2 and "train.py --all True" in capfd.readouterr().err
    teacher = fingerprint_of(save_run(tmp_path, "--tto", weights=3))
    save_run(tmp_path, "--kd", teacher, weights=2)
    save_run(tmp_path, weights=1)
    (tmp_path / "student.last.pt").write_text("a resume state is no finished checkpoint")
    reports = [report_of(*words) for words in (["--tto"], [], ["--kd"])]
    rows, labels, output = compare()
    table = (tmp_path / "plots" / "comparison.md").read_text()
    assert table in output and "left out" not in output
    assert labels == ["Teacher (VGG19 with BN)", "Student (w/o KD)", "Student (with KD, Temp = 5)"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    for row, expected, line in zip(rows, reports, lines[2:], strict=True):
        assert (row["top1"], row["top5"]) == (100 * expected["top1"], 100 * expected["top5"])
        for key in ("ece", "loss", "macs", "bytes", "latency_ms", "images_per_second", "agreement", "kl_to_teacher"):
            assert row.get(key) == expected.get(key), (line, key)
        assert f"{100 * expected['ece']:.2f}%" in line and f"{expected['loss']:.4f}" in line
    assert lines[0][4:] == ["ECE", "NLL", "Agreement", "KL", "MACs", "Size", "Latency", "Images/s"]
    assert lines[2][6:8] == ["", ""], "the teacher is not compared with itself"


def test_students_of_two_teachers_are_two_rows_each_beside_its_own(tmp_path, report_of, compare):
    teachers = [save_run(tmp_path, "--tto", weights=i, name=f"teacher{i}.pt", num_epochs=3 + i) for i in (1, 2)]
    students = [
        save_run(tmp_path, "--kd", fingerprint_of(teacher), weights=5, name=f"student_{i}.pt")
        for i, teacher in enumerate(teachers)
    ]
    rows, labels, _ = compare()
    assert labels[:2] == ["Teacher (VGG19 with BN), 4 epochs", "Teacher (VGG19 with BN), 5 epochs"]
    assert set(labels[2:]) == {
        f"Student (with KD, Temp = 5), teacher {fingerprint_of(teacher)[:8]}" for teacher in teachers
    }
    found = {row["model"][-8:]: row["kl_to_teacher"] for row in rows[2:]}
    for teacher, student in zip(teachers, students, strict=True):
        beside_its_own = report_of(f"--checkpoint={student}", f"--teacher={teacher}")
        assert found[fingerprint_of(teacher)[:8]] == beside_its_own["kl_to_teacher"]
    assert len(set(found.values())) == 2, "the students are the same, their teachers are not"


@pytest.mark.parametrize("place", ["weights", "elsewhere"])
def test_with_a_teacher_its_own_students_and_those_without_are_shown(place, tmp_path, compare, evaluate, capfd):
    folder = tmp_path if place == "weights" else tmp_path / "elsewhere"
    wanted = save_run(folder, "--tto", weights=1)
    other = save_run(tmp_path, "--tto --seed=7", weights=2)
    save_run(tmp_path, "", weights=3)
    save_run(tmp_path, "--kd", fingerprint_of(wanted), weights=4, name="own.pt")
    save_run(tmp_path, "--kd --temp=20", fingerprint_of(other), weights=5)
    _, labels, _ = compare(f"--teacher={wanted}")
    assert labels == ["Teacher (VGG19 with BN)", "Student (w/o KD)", "Student (with KD, Temp = 5)"]
    _, labels, _ = compare(f"--teacher={other}")
    assert labels == ["Teacher (VGG19 with BN)", "Student (w/o KD)", "Student (with KD, Temp = 20)"]
    assert evaluate("--compare", "True", f"--teacher={tmp_path / 'student.pt'}") == 2
    assert "holds role student" in capfd.readouterr().err
    assert evaluate("--compare", "True", f"--teacher={tmp_path / 'none.pt'}") == 2
    assert "no checkpoint" in capfd.readouterr().err


def test_a_stop_is_heeded_while_many_are_evaluated(tmp_path, evaluate):
    path, options = save_run(tmp_path), test_script.config.parse_test([])
    content = checkpoint.load(path) | {"path": path}
    with pytest.raises(Stopped):
        comparison.measure_all([content], options.spec, options, CPU, StopSignal(number=15))


def test_two_checkpoints_of_one_kind_are_both_shown(tmp_path, compare):
    save_run(tmp_path, weights=1)
    copy = save_run(tmp_path, weights=2, name="student_before.pt")
    save_run(tmp_path, "--seed=43", weights=3)
    save_run(tmp_path, "--views=8", weights=4, name="student_8_views.pt")
    rows, labels, _ = compare()
    assert len(set(labels)) == len(rows) == 3
    assert sum(len(row["seeds"]) for row in rows) == 4
    assert sum(label.endswith(f", {copy}") for label in labels) == 1 or "student.pt" in " ".join(labels)
    assert any("8 views" in label for label in labels) and any("16 views" in label for label in labels)


def test_what_is_none_of_ours_is_named_and_left_out(tmp_path, compare):
    save_run(tmp_path)
    foreign = {
        "a.pt": lambda path: path.write_text("notes"),
        "b.pt": lambda path: torch.save([1, 2], path),
        "c.pt": lambda path: torch.save({"features.0.weight": torch.zeros(3)}, path),
        "d.pt": lambda path: path.mkdir(),
        "e.pt": lambda path: save_run(tmp_path, name="e.pt", role="pupil"),
        "f.pt": lambda path: save_run(tmp_path, name="f.pt", architecture="student_cnn/0"),
        "g.pt": lambda path: save_run(tmp_path, name="g.pt", num_classes=100),
        "h.pt": lambda path: save_run(tmp_path, name="h.pt", model=torch.nn.Linear(2, 2)),
        "i.pt": lambda path: path.symlink_to("nowhere"),
    }
    for name, make in foreign.items():
        make(tmp_path / name)
    rows, labels, output = compare()
    assert labels == ["Student (w/o KD)"]
    for name in foreign:
        assert (
            output.count(f"left out: {tmp_path / name}")
            + output.count(f"left out: no checkpoint {tmp_path / name}")
            + (output.count(f"left out: can't read {tmp_path / name}"))
            == 1
        ), name


def test_other_images_are_compared_apart(tmp_path, compare, evaluate):
    save_run(tmp_path, weights=1)
    save_run(tmp_path, "--holdout=8", weights=2)
    save_run(tmp_path, "--dataset=digits", weights=3)
    write_log(tmp_path / "plots.jsonl")
    assert compare()[1] == ["Student (w/o KD)"]
    assert evaluate("--compare", "--holdout=8") == 0
    text = (tmp_path / "plots" / "comparison_holdout8.md").read_text()
    assert "Student (w/o KD), holdout 8" in text and text.count("Student") == 1
    assert evaluate.asked[-1] == (("holdout",), {"subset": None, "holdout": 8})
    assert evaluate("--compare", "--dataset=digits") == 0
    assert (tmp_path / "plots" / "digits_comparison.md").read_text().count("Student") == 1
