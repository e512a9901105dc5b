"""test.py: which checkpoint it evaluates, what it reports, and which checkpoints it compares."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_together
from made_up import CPU, KD, STUDENT, TEACHER, TinyTeacher, cells, content_of, random_images, run_of, tiny_student
from PIL import Image

import config
import test as test_script
from data_sets import DATA_SETS
from evaluation import comparison, figures
from evaluation.measures import bias_correction
from runtime import checkpoint
from training.run import describe_data
from training.runs import name_of
from training.teacher_logits import write_logits
from utils import Data, load_images, parse_log

KEYS = {
    "checkpoint", "role", "run", "images", "loss", "top1", "top5", "top1_ci", "per_class", "confusion", "ece",
    "parameters", "macs", "bytes", "latency_ms", "images_per_second", "notes", "device", "precision",
}  # fmt: skip
FIDELITY = {"agreement", "kl_to_teacher", "contingency"}


def made_up_data(name: str) -> Data:
    """20 test images, which run_of's fingerprint names as those of its runs."""
    numbers = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "fingerprint": "a" * 16, "train_images": 50_000}
    return Data(replace(DATA_SETS[name], **numbers), random_images(50, 1), random_images(20))


DATA = made_up_data("cifar10")


@pytest.fixture
def evaluate(tiny_models, no_figures, tmp_path, monkeypatch, output_of):
    """A function that runs test.py in a folder over made-up images, with tiny models, and gives its output."""
    monkeypatch.setattr(test_script, "load_images", lambda name, *_, **__: made_up_data(name))
    monkeypatch.setattr(test_script, "PUBLISHED", tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    return lambda *words, code=0: output_of(test_script.main, ["--device=cpu", "--precision=fp32", *words], code)


def report() -> dict:
    """The numbers that the last --json=report.json wrote."""
    return json.loads(Path("report.json").read_text())


@pytest.fixture
def report_of(evaluate):
    """A function that runs test.py and gives the numbers of its report."""
    return lambda *words: evaluate(*words, "--json=report.json") and report()


def save(command: str = "", name: str = "", folder: str = "weights", weights: int = 0, **changes) -> Path:
    """The checkpoint of `train.py COMMAND`, in the folder of the test, with `changes` of its run."""
    run = run_of(command, **changes)
    path = Path(folder, name or f"{run.stem}.pt")
    data = {"data": describe_data(made_up_data(run.dataset).spec)}
    checkpoint.save(path, content_of(run, weights=weights) | data)
    return path


def fingerprint_of(path: Path) -> str:
    return checkpoint.fingerprint(checkpoint.load(path)["model"])


def test_the_first_line_repeats_the_logs_last_line(learn, output_of, digits):
    words = ["--dataset=digits", f"--data_path={digits}", "--subset=40", "--device=cpu", "--precision=fp32"]
    for which, split in (("--tto", "test"), ("--kd", "test"), ("--holdout=6", "holdout")):
        told = learn(which, "--num_epochs=2")
        output = output_of(test_script.main, [*words, which, "--json=report.json"])
        name = name_of(config.parse_test([*words, which])).stem
        _, lines = parse_log(Path("plots", f"{name}.jsonl").read_text())
        logged, numbers = lines[-1][split], report()
        assert numbers["images"] == (6 if split == "holdout" else 8)
        assert logged == {"loss": numbers["loss"], "top1": 100 * numbers["top1"], "top5": 100 * numbers["top5"]}
        first = f"{split} loss {logged['loss']:.4f} top1 {logged['top1']:.2f}% top5 {logged['top5']:.2f}%\n"
        assert f" top1 {lines[-1]['train']['top1']:.2f}%, {first[:-1]}, " in told, "the epoch's line, too"
        assert output.startswith(first) and f"plots/{name}_confusion.png, plots/{name}_reliability.png" in output


def test_report_of_a_student_and_its_fidelity_to_the_teacher(evaluate):
    own, other = save("--tto", weights=3), save("--tto", "other.pt", weights=4)
    path = save("--kd", weights=2, teacher=fingerprint_of(own))
    output = evaluate("--kd", "True", "--json=new/report.json")
    numbers = json.loads(Path("new/report.json").read_text())
    assert set(numbers) == KEYS | FIDELITY
    assert "not compared with" not in output and not numbers["notes"]
    assert numbers["role"] == "student" and numbers["images"] == 20
    assert np.sum(numbers["contingency"]) == np.sum(numbers["confusion"]) == 20
    assert numbers["latency_ms"] == 20 and numbers["images_per_second"] == 256 / 0.02
    assert numbers["bytes"] == path.stat().st_size
    (agreement,) = [line for line in output.splitlines() if "top-1 agreement" in line]
    assert agreement.split("|")[2].strip() == f"{100 * numbers['agreement']:.2f}%"
    assert f"{other} is not the teacher that this student learned from" in evaluate("--kd", f"--teacher={other}")
    content = checkpoint.load(path)
    content["data"]["mean"] = [0.1, 0.1, 0.1]
    checkpoint.save(path, {name: value for name, value in content.items() if name != "path"})
    evaluate("--kd", "--json=report.json")
    assert report()["loss"] != numbers["loss"], "normalised as in its training"
    copy = save("--kd", folder="weights/a05")
    save("--tto", folder="weights/a05", weights=9)
    output = evaluate(f"--checkpoint={copy}")
    assert "saved plots/a05/student_kd_t5_confusion.png, " in output
    assert "weights/a05/teacher.pt is not the teacher that this student learned from" in output


def test_a_student_with_omitted_classes_is_reported_before_and_after_the_correction(evaluate, monkeypatch):
    words = ["--holdout=20", "--omit", "3", "dog", "--json=report.json"]
    save("--holdout=20 --omit cat dog", weights=3)

    def logits_that_never_favour_them(model, images, *_):
        return (4.0 * torch.eye(10)[images.labels] - 8.0 * torch.eye(10)[[3, 5]].sum(0)).double()

    monkeypatch.setattr(comparison, "logits_of", logits_that_never_favour_them)
    output, numbers = evaluate(*words), report()
    corrected = {f"corrected_{name}" for name in ("top1", "top1_omitted", "top1_others", "per_class")}
    assert set(numbers) == KEYS | corrected | {"top1_omitted", "top1_others", "bias"}
    logits = logits_that_never_favour_them(None, DATA.train[:30])
    assert numbers["bias"] == pytest.approx(bias_correction(logits, DATA.train[:30].labels, [3, 5])[[3, 5]].tolist())
    assert re.search(r"Top-1 without cat, dog in training \| +uncorrected \| after the bias correction \|", output)
    cat, dog = numbers["bias"]
    assert f"added to the logits: cat {cat:+.2f}, dog {dog:+.2f}\n" in output
    assert Path("plots/student_holdout20_omit_cat_dog_omitted.png").exists()
    assert [numbers[key] for key in ("top1_omitted", "corrected_top1_omitted", "corrected_top1")] == [0, 1, 1]
    assert ["omitted", "0.00%", "100.00%"] in cells(output)
    save("--holdout=20 --omit cat dog", weights=3, images="c" * 16)
    output = evaluate(*words)
    assert set(report()) == KEYS | {"top1_omitted", "top1_others"}
    assert "added to the logits: none, the student was trained on other images\n" in output


def test_a_teacher_that_cannot_be_used_is_left_out_and_a_named_one_is_an_error(evaluate):
    save()
    Path("weights/torn.pt").write_text("torn")
    save("--tto --dataset=cifar100", "others.pt")
    save(name="pupil.pt")
    save("--tto", "elsewhere.pt", images="c" * 16)
    for name, tells in {
        "none.pt": "no checkpoint weights/none.pt: ",
        "torn.pt": "weights/torn.pt is damaged",
        "others.pt": "the teacher weights/others.pt has 100 classes (apple, aquarium_fish, baby, ...) that are not ",
        "pupil.pt": "the teacher weights/pupil.pt is a student: give another --teacher",
        "elsewhere.pt": "the teacher weights/elsewhere.pt was trained on other images than those of cifar10 here: ",
    }.items():
        Path("weights/teacher.pt").unlink(missing_ok=True)
        if (file := Path("weights", name)).exists():
            Path("weights/teacher.pt").symlink_to(file.name)
        output = evaluate("--json=report.json")
        assert set(report()) == KEYS
        told = tells.replace(name, "teacher.pt").replace("no checkpoint", "no teacher")  # which names the command
        assert f"not compared with the teacher: {told}" in output and "Fidelity" not in output
        Path("report.json").unlink()
        assert tells in evaluate(f"--teacher={file}", "--json=report.json", code=2)
        assert not Path("report.json").exists()


def test_a_folder_of_logits_is_a_teacher_without_a_cost(evaluate):
    teacher = save("--tto", weights=3)
    path = save("--kd", weights=2, teacher="of its model")
    costs = {row[0]: row[1:] for row in cells(evaluate("--kd", f"--teacher={teacher}", "--json=report.json"))}
    sizes = [f"{file.stat().st_size / 1e6:,.2f} MB" for file in (path, teacher)]
    assert costs["parameters"] == ["322", "9,130", "1/28.4"] and costs["checkpoint"][:2] == sizes
    beside_its_model = report()
    model = TinyTeacher()
    model.load_state_dict(checkpoint.load(teacher)["model"])
    logits = comparison.logits_of(model.eval(), DATA.test, DATA.spec, CPU)
    for folder, name, given in (("my_logits", "test", logits), ("few", "test", logits[:12]), ("none", "00", logits)):
        write_logits(Path(folder), f"{name}.npz", given, DATA.spec, "mine")
    output, beside_its_logits = evaluate("--kd", "--teacher=my_logits", "--json=report.json"), report()
    assert "ratio |" not in output and "is not the teacher" not in output
    assert {key: beside_its_logits[key] for key in FIDELITY} == {key: beside_its_model[key] for key in FIDELITY}
    save("--holdout=4")
    assert "my_logits has no logits of held-out images" in evaluate("--holdout=4", "--teacher=my_logits")
    for name, tells in (("few", "has the logits of 12 images, not 20"), ("none", "none/test.npz: No such file")):
        output = evaluate("--kd", f"--teacher={name}")
        assert tells in output and "\nnot compared with the teacher: " in output and "Fidelity" not in output


def test_nothing_is_evaluated_on_held_out_images_that_it_was_trained_on(evaluate):
    seen, fair = save("--tto"), save("--tto --holdout=8")
    save("--holdout=8")
    error = evaluate("--holdout=8", f"--teacher={seen}", code=2)
    assert f"the teacher {seen} was trained on images that --holdout 8 holds out: " in error
    assert str(seen) not in evaluate("--holdout=8", f"--teacher={fair}") + evaluate("--compare", "--holdout=8")
    error = evaluate("--tto", "--holdout=8", f"--teacher={seen}", code=2)
    assert "contains teacher, not teacher_holdout8: give --checkpoint" in error


def test_each_model_is_evaluated_in_the_precision_of_its_training(evaluate, monkeypatch):
    save("--tto", precision="fp32")
    save(precision="bf16")
    assert comparison.as_trained(CPU, run_of(precision="fp16")) == CPU, "a CPU is slow in float16"
    bf16 = replace(CPU, precision="bf16")
    monkeypatch.setattr(test_script, "start", lambda *_: contextlib.nullcontext(bf16))
    found = []

    def logits_of(model, images, spec, runtime):
        found.append((type(model), runtime.precision))
        return torch.eye(10)[images.labels] + 0.0

    monkeypatch.setattr(comparison, "logits_of", logits_of)
    for words in (["--tto"], [], ["--compare"], ["--tto", "--precision=bf16"]):
        assert test_script.main(["--device=cpu", *words]) == 0
    assert found == 2 * [(TinyTeacher, "fp32"), (type(tiny_student()), "bf16")] + [(TinyTeacher, "bf16")]


def test_each_run_is_found_by_its_options_and_by_its_file(report_of):
    commands = ["--tto", "--tto --seed 7", "", "--kd", "--kd --temp 20 --seed 7", "--kd --subset 40",
                "--tto --holdout 8", "--kd --temp 5.0000001", "--dataset digits"]  # fmt: skip
    for i, command in enumerate(commands):
        save(command, weights=i)
        save(command, folder="weights/a05", weights=50 + i)
    losses = set()
    for command in commands:
        name = name_of(config.parse_test(command.split()))
        by_options = report_of(*command.split())
        path = Path("weights", f"{name.stem}.pt")
        assert by_options["checkpoint"] == str(path) and by_options["role"] == name.role
        path.rename("elsewhere.bin")
        by_file = report_of("--checkpoint=elsewhere.bin")
        assert by_file | {"checkpoint": str(path)} == by_options
        Path("elsewhere.bin").rename(path)
        losses.add(by_options["loss"])
    assert len(losses) == len(commands)
    assert report_of("--name=a05")["checkpoint"] == "weights/a05/student.pt"
    assert report_of("--name=new", "--tto")["checkpoint"] == "weights/teacher.pt", "--all shares it"


def test_without_a_checkpoint_of_ones_own_the_published_one_is_evaluated(report_of, evaluate, tmp_path):
    published = save(folder=tmp_path / "published" / "cifar10", weights=1)
    save("--kd", folder=published.parent, weights=2)
    lines = evaluate("--json=report.json").splitlines()
    assert report()["checkpoint"] == str(published)
    assert lines[0] == f"weights/student.pt does not exist: evaluating the published {published}"
    assert lines[1].startswith("test loss ")
    assert report_of("--kd", "True")["checkpoint"].endswith("published/cifar10/student_kd_t5.pt")
    for words in ("--weights_path=weights", "--name=a05", "--tto", "--seed=7", "--kd --temp=7", "--dataset=digits"):
        evaluate(*words.split(), code=0 if words == "--weights_path=weights" else 2)  # the default
    save(weights=3)
    assert "published" not in evaluate("--json=report.json")
    assert report()["checkpoint"] == "weights/student.pt"


FULL = "test.py: error: can't write to standard output: No space left on device; all files saved so far are complete\n"


@pytest.mark.parametrize("stdout, code, stderr", [("gone", 128 + 13, ""), ("full", 2, FULL), ("ascii", 0, "")])
def test_a_table_that_cannot_be_printed_is_in_its_file(stdout, code, stderr, digits, tiny_models, tmp_path):
    spec = load_images("digits", digits, CPU).spec
    for seed in (42, 43):
        save(f"--dataset=digits --subset=40 --seed={seed}", folder=tmp_path / "weights", images=spec.fingerprint)
    words = ["--compare", "--dataset=digits", "--subset=40", f"--data_path={digits}", "--device=cpu"]
    codes, output, errors = run_together(1, "test.py", words, tmp_path, stdout=stdout)
    assert (codes, errors) == ([code], stderr)
    table = (tmp_path / "plots" / "comparison_digits_subset40" / "results.md").read_text(encoding="utf-8")
    assert "% ± " in table
    if stdout == "ascii":
        assert "% ? " in output and "saved " in output and output.isascii()


def test_a_picture_is_classified_by_student_and_teacher_without_a_data_set(evaluate, monkeypatch):
    monkeypatch.setattr(test_script, "load_images", None)
    save()
    save("--tto")
    Image.new("RGB", (50, 40), "blue").save("blue_$x$.png")
    output = evaluate("--image", "blue_$x$.png")
    assert STUDENT in output and TEACHER in output and "blue_$x$.png" in output
    assert Path("plots/student_images.png").exists()
    output = evaluate("--image", "blue_$x$.png", "--checkpoint=weights/teacher.pt")
    assert "Student" not in output and TEACHER in output
    assert Path("plots/teacher_images.png").exists()
    error = evaluate("--image=blue_$x$.png", "--checkpoint=weights/teacher.pt", "--teacher=x", code=2)
    assert "weights/teacher.pt is a teacher: leave --teacher out" in error
    save("--kd", teacher="another")
    told = "weights/teacher.pt is not the teacher that this student learned from"
    assert told in evaluate("--kd", "--image", "blue_$x$.png")
    Path("weights/teacher.pt").unlink()
    told = "not compared with the teacher: no teacher weights/teacher.pt"
    assert told in evaluate("--image", "blue_$x$.png")
    Path("text.png").write_text("no picture")
    assert evaluate("--image", *13 * ["blue_$x$.png"]).endswith("saved plots/student_images.png (the first 12)\n")
    told = "error: text.png: damaged, or not a picture that Pillow can read\n"
    assert evaluate("--image", "text.png", code=2).endswith(told)


def test_probabilities_are_softened(evaluate, monkeypatch):
    save()
    save("--tto")
    drawn = []
    monkeypatch.setattr(figures, "plot_pictures", lambda *arguments: drawn.append(arguments))
    told = evaluate("--tto", "True", "--soften", "1", "5", "20")
    (pixels, names, answers, classes, path), labels = drawn[0], DATA.test.labels.tolist()
    rows = sorted(labels.index(label) for label in set(labels))[:4]
    assert (pixels == DATA.test.pixels[rows].numpy()).all() and path.name == "teacher_softened.png"
    assert names == [f"{classes[labels[row]]} (test {row})" for row in rows] and names[3] in told
    assert told.startswith("over 20 images:\nT = 1: mean largest probability ")
    assert told.count(" out of log C = 2.30") == 3
    assert list(answers) == [f"{TEACHER}, T = {temp}" for temp in (1, 5, 20)]
    plain, soft, _ = answers.values()
    torch.testing.assert_close(soft, (plain.log() / 5).softmax(1))
    Image.new("RGB", (50, 40), "blue").save("blue.png")
    evaluate("--image", "blue.png", "--soften", "2.5")
    evaluate("--image", "blue.png")
    softened, answers = drawn[1][2], drawn[2][2]
    assert drawn[1][1] == ["blue.png"] and list(softened) == [f"{STUDENT}, T = 2.5"]
    assert list(answers) == [STUDENT, TEACHER]
    torch.testing.assert_close(softened[f"{STUDENT}, T = 2.5"], (answers[STUDENT].log() / 2.5).softmax(1))


@pytest.fixture
def compare(evaluate):
    """A function that runs test.py --compare and gives the rows, their labels in order, and what it printed."""

    def run(*arguments) -> tuple[list[dict], list[str], str]:
        output = evaluate("--compare", "True", *arguments)
        folder = output.split("\nsaved ")[1].split(":")[0]
        rows = json.loads(Path(folder, "results.json").read_text())["rows"]
        assert Path(folder, "results.md").read_text() in output
        return rows, [row["model"] for row in rows], output

    return run


def test_compare_shows_of_each_checkpoint_the_numbers_of_its_report(report_of, compare):
    teacher = fingerprint_of(save("--tto", weights=3))
    save("--kd", weights=2, teacher=teacher)
    save(weights=1)
    Path("weights/student.last.pt").write_text("the resume state of an unfinished run")
    reports = [report_of(*words) for words in (["--tto"], [], ["--kd"])]
    rows, labels, output = compare()
    assert not any(one["notes"] for one in reports)
    assert "left out" not in output and "not in this table" not in output and "plots/comparison_cifar10" in output
    assert labels == [TEACHER, STUDENT, KD]
    lines = cells(output)
    titles = "Gain of KD|ECE|NLL|Agreement|KL|MACs|Training|Size|Latency|Images/s"
    assert "|".join(lines[0][5:]) == titles
    for row, expected, line in zip(rows, reports, lines[2:], strict=True):
        assert (row["top1"], row["top5"]) == (100 * expected["top1"], 100 * expected["top5"])
        for key in ("ece", "loss", "macs", "bytes", "latency_ms", "images_per_second", "agreement"):
            assert row.get(key) == expected.get(key), (line, key)
        if "agreement" in row:
            assert row["kl_to_teacher"] == pytest.approx(expected["kl_to_teacher"], rel=1e-2)
        assert f"{100 * expected['ece']:.2f}%" in line and f"{expected['loss']:.4f}" in line
    assert lines[2][8:10] == ["", ""], "the teacher is not compared with itself"


def test_compare_shows_the_runs_of_the_folders_and_of_the_images_that_its_options_name(compare, evaluate):
    save(weights=1)
    save("--holdout=8", weights=2)
    save("--dataset=digits", weights=3)
    save("--kd", weights=2)
    save("--kd --alpha=0.5", folder="weights/a05", weights=3)
    save("--kd --alpha=0.5 --seed=43", folder="weights/a05", weights=4)
    rows, labels, _ = compare()
    half = "Student (with KD, Temp = 5, 0.5 KL + 0.5 CE)"
    assert set(labels) == {STUDENT, KD, half} and [42, 43] in [row["seeds"] for row in rows]
    for option, label, folder in (
        ("--name=a05", half, "a05/comparison_cifar10"),
        ("--holdout=8", f"{STUDENT}, holdout 8", "comparison_cifar10_holdout8"),
        ("--dataset=digits", STUDENT, "comparison_digits"),
    ):
        _, labels, output = compare(option)
        assert labels == [label] and f"saved plots/{folder}:" in output
    save("--tto", weights=5)
    Path("weights/a05/teacher.last.pt").write_text("an unfinished teacher")
    _, labels, output = compare("--name=a05")
    assert labels == [TEACHER, half] and f"{half}: its teacher is not in this table\n" in output
    save("--tto", folder="weights/a05", weights=6)
    assert compare("--name=a05")[1] == [TEACHER, half], "its own teacher, not that of all folders"
    assert "no finished checkpoint of cifar10 in weights/a50" in evaluate("--compare", "--name=a50", code=2)


def test_students_of_two_teachers_are_two_rows_each_beside_its_own(report_of, compare):
    teachers = [save("--tto", f"teacher{i}.pt", weights=i, num_epochs=3 + i) for i in (1, 2)]
    own = {fingerprint_of(teacher): teacher for teacher in teachers}
    students = {which: save("--kd", f"student_{i}.pt", weights=5, teacher=which) for i, which in enumerate(own)}
    rows, labels, output = compare()
    assert labels[:2] == [f"{TEACHER}, num_epochs {count}" for count in (4, 5)]
    assert set(labels[2:]) == {f"{KD}, teacher {which[:8]}" for which in own}
    assert all(f"\nteacher {which[:8]}: {path}\n" in output for which, path in own.items())
    found = {row["model"][-8:]: row["kl_to_teacher"] for row in rows[2:]}
    for which, student in students.items():
        beside_its_own = report_of(f"--checkpoint={student}", f"--teacher={own[which]}")
        assert found[which[:8]] == pytest.approx(beside_its_own["kl_to_teacher"], rel=1e-2)
    first, second = found.values()
    assert first != pytest.approx(second, rel=0.05), "the students are the same, their teachers are not"
    save(weights=5)
    Path("weights/elsewhere").mkdir()
    Path("weights/student_0.pt").rename("weights/elsewhere/student.pt")
    kl = compare()[0][2]["kl_to_teacher"]
    assert kl == pytest.approx(second, rel=0.01), "a baseline is compared with the teacher of its student with KD"


def test_what_cannot_be_compared_is_named_and_left_out(compare, evaluate):
    save()
    Path("weights/a.pt").write_text("notes")
    unfinished = content_of(run_of("--tto"))
    del unfinished["metrics"]
    checkpoint.save(Path("weights/f.pt"), unfinished)
    checkpoint.save(Path("weights/d.pt"), content_of(run_of("--seed=7"), model=torch.nn.Linear(2, 2)))
    save("--seed=8", "e.pt", images="c" * 16)
    diverged = content_of(run_of("--seed=9"))
    diverged["model"]["classifier.bias"] += torch.nan
    checkpoint.save(Path("weights/h.pt"), diverged)
    of_a_branch = content_of(run_of("--kd"))
    of_a_branch["run"]["loss"] = "mine"
    checkpoint.save(Path("weights/g.pt"), of_a_branch)
    checkpoint.save(Path("weights/j.pt"), {"run": 3, "metrics": {}, "model": {}})
    _, labels, output = compare()
    lines = [line for line in output.splitlines() if line.startswith("left out: ")]
    assert labels == [STUDENT] and len(lines) == 7
    assert sorted(re.search(r"weights/(\w)\.pt", line)[1] for line in lines) == [*"adefghj"]
    assert "weights/f.pt is an unfinished run: rerun" in evaluate("--checkpoint=weights/f.pt", code=2)
