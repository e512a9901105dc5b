"""The table of models, the gains, and the report's files."""

import json
import os
from pathlib import Path

import pytest
from made_up import facts_of

import config
from evaluation import report
from runtime.identity import Identity

OTHER_MACHINES = [{"torch": "2.11.0"}, {"device": "another processor"}, {"world_size": 2}]


def content(command: str = "", top1: float = 70.0, teacher: str = "1f3a" * 4, path: str = "x.pt", **changes) -> dict:
    """What `collect` needs of a checkpoint of `train.py COMMAND`."""
    facts = facts_of(command, teacher if "--kd" in command else "", **changes)
    return {"identity": Identity(facts), "metrics": {"top1": top1, "top5": 97.0}, "path": path}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_the_table_of_all(tmp_path, capsys):
    contents = [content("--tto", 84.451)]
    for seed, without, with_kd in ((42, 70.0, 71.0), (43, 71.0, 74.0), (44, 70.0, 72.0)):
        contents += [content(f"--seed={seed}", without), content(f"--kd --seed={seed}", with_kd)]
    options = config.parse_train(["--all", "--seeds=3", "--temp=5", f"--plots_path={tmp_path}"])
    report.publish(contents, options, "results")
    table = (tmp_path / "results.md").read_text()
    rows = cells(table)
    assert rows[0] == ["Model", "Top 1 Accuracy", "Top 5 Accuracy", "Parameters", "Gain of KD"]
    assert rows[2] == ["Teacher (VGG19 with BN)", "84.45%", "97.00%", "20,040,522", ""]
    assert rows[3][:2] == ["Student (w/o KD)", "70.33% ± 0.58"]
    assert rows[4][:2] == ["Student (with KD, Temp = 5)", "72.33% ± 1.53"]
    assert [row[4] for row in rows[2:]] == ["", "", "+2.00 (-0.48 to +4.48)"]
    assert "gains +2.00 points" in table and "interval -0.48 to +4.48), within seed noise" in table
    results = json.loads((tmp_path / "results.json").read_text())
    gain = results["gains"][0]
    assert gain["mean"] == pytest.approx(2) and gain["sd"] == pytest.approx(1) and gain["pairs"] == 3
    assert not results["notes"] and table in capsys.readouterr().out


def test_of_few_classes_there_is_no_top_5():
    contents = [content("--tto"), content(), content("--seed=43"), content("--kd")]
    for one in contents:
        del one["metrics"]["top5"]
    rows = cells(report.results_text(report.collect(contents)))
    assert rows[0] == ["Model", "Top 1 Accuracy", "Parameters"]
    assert rows[3] == ["Student (w/o KD)", "70.00% ± 0.00", "288,746"]


def test_of_many_classes_the_ends_are_told():
    shares = [i / 100 for i in range(100)]
    shares[3] = None  # no image of it
    lines = report.per_class_lines(shares, tuple(f"c{i}" for i in range(100)))
    worst, best = " ".join(lines).replace("   ", " ").split("the 10 best: ")
    assert worst.split() == f"the 10 worst classes: {words([0, 1, 2, 4, 5, 6, 7, 8, 9, 10])}".split()
    assert best.split() == words(range(99, 89, -1)).split()
    assert max(map(len, lines)) <= 110
    assert report.per_class_lines([0.5, None], ("a", "b")) == ["of each class: a 50.0%, b no image"]


def words(classes) -> str:
    return ", ".join(f"c{i} {i}.0%" for i in classes)


def test_a_trials_table_replaces_no_other(tmp_path):
    for words, name in ((["--subset=40"], "results_subset40"), (["--holdout=8", "--dataset=digits"], None)):
        options = config.parse_train(["--all", *words, f"--plots_path={tmp_path}"])
        report.publish([content(" ".join(words))], options, "results")
        assert (tmp_path / f"{name or 'digits_results_holdout8'}.md").exists()
    assert not (tmp_path / "results.md").exists() and not (tmp_path / "digits_results.md").exists()


def test_another_loss_is_paired_with_plain_kd_at_its_usual_weights_and_at_the_others():
    contents = [content("--tto"), *(content(f"--seed={seed}", 70.0) for seed in (1, 2))]
    for loss, tops in {
        "kd": (72.0, 73.0), "kd --temp=20": (72.0, 75.0), "kd_as_dkd": (71.0, 72.0), "dkd": (74.0, 75.1),
        "kd --temp=4": (60.0, 61.0), "kd --temp=4 --alpha=0.5": (60.0, 61.0), "kd --views=8": (60.0, 61.0),
        "wttm": (60.0, 61.2),
    }.items():  # fmt: skip
        contents += [content(f"--kd --seed={s} --loss={loss}", top) for s, top in zip((1, 2), tops, strict=True)]
    found = report.collect(contents)
    dkd = "Student (with DKD, Temp = 4, 1 TCKD + 8 NCKD + 1 CE)"
    over = {gain["over"]: gain["mean"] for gain in found["gains_over_kd"] if gain["model"] == dkd}
    assert over == {
        "Student (with KD, Temp = 5), 16 views": pytest.approx(2.05),
        "Student (with KD, Temp = 20)": pytest.approx(1.05),
        "Student (with KD, Temp = 4, 9 KL + 1 CE)": pytest.approx(3.05),
        "Student (with KD, Temp = 4)": pytest.approx(14.05),
    }
    assert {gain["model"] for gain in found["gains_over_kd"]} == {
        dkd, "Student (with WTTM, Temp = 5, 4 WTTM + 1 CE)",
    }  # fmt: skip
    table = cells(report.results_text(found))
    verdicts = {row[1]: row[-1] for row in table if row[0] == dkd and row[1] in over}
    assert verdicts.pop("Student (with KD, Temp = 20)") == "does not beat it: within seed noise"
    assert set(verdicts.values()) == {"beats it"}
    assert [row[-1] for row in table if row[0].startswith("Student (with WTTM") and row[1] in over][:1] == ["is worse"]


def test_only_the_same_seed_and_options_are_paired():
    kd = [content(f"--kd --seed={seed}", 72.0 + seed) for seed in (3, 1, 2)]
    others = [content("--seed=1", 70.0), content("--seed=2", 71.5), content("--seed=3 --num_epochs=10", 60.0)]
    found = report.collect([*others, *kd])
    assert found["gains"][0]["pairs"] == 2 and found["gains"][0]["mean"] == pytest.approx((3 + 2.5) / 2)
    assert [len(row["seeds"]) for row in found["rows"]] == [2, 1, 3]
    alone = report.collect([content("--seed=1", 70.0), kd[1]])
    assert not alone["gains"] and "one pair has no spread: train further seeds" in alone["notes"][0]
    assert alone["notes"][0] in report.results_text(alone)


@pytest.mark.parametrize("machine", OTHER_MACHINES, ids=lambda machine: next(iter(machine)))
def test_a_student_of_another_machine_is_no_control_and_a_note_says_why(machine):
    """Such is a student that was shipped, or one of one process beside distilled ones of two."""
    (name, value), *_ = machine.items()
    controls = [content(f"--seed={seed}", 70.0, **machine) for seed in (1, 2, 3)]
    kd = [content(f"--kd --seed={seed}", 72.0 + seed) for seed in (1, 2, 3)]
    found = report.collect([*controls, *kd])
    assert not found["gains"]
    here = kd[0]["identity"][name]
    assert found["notes"] == [
        "Student (with KD, Temp = 5): no gain is shown, for no student without KD is its control: "
        f"the nearest has {name} {value}, not {here}"
    ]
    same = report.collect([*controls, *(content(f"--kd --seed={seed}", 72.0 + seed, **machine) for seed in (1, 2, 3))])
    assert same["gains"][0]["pairs"] == 3 and not same["notes"]


def test_the_note_names_the_nearest_student():
    far, near = content("--seed=7 --lr=0.3 --num_epochs=2"), content("--seed=7")
    found = report.collect([far, near, content("--kd")])
    assert found["notes"][0].endswith("the nearest has seed 7, not 42")
    assert report.collect([content("--kd")])["notes"][0].endswith("there is no student without KD")


def test_students_of_two_teachers_are_two_rows_each_with_its_gain():
    contents = [content(f"--seed={seed}", 70.0 + seed) for seed in (1, 2)]
    for teacher, gains in (("1f3a" * 4, (2, 4)), ("77aa" * 4, (-1, 1))):
        contents += [content(f"--kd --seed={s}", 70.0 + s + g, teacher) for s, g in zip((1, 2), gains, strict=True)]
    found = report.collect(contents)
    labels = [row["model"] for row in found["rows"]]
    assert labels == ["Student (w/o KD)"] + [
        f"Student (with KD, Temp = 5), teacher {teacher}" for teacher in ("1f3a1f3a", "77aa77aa")
    ]
    assert [(gain["model"], gain["mean"], gain["pairs"]) for gain in found["gains"]] == [
        (labels[1], 3, 2), (labels[2], 0, 2),
    ]  # fmt: skip


def test_two_copies_of_a_run_are_two_rows_and_none_is_lost():
    copies = [content(top1=top1, path=f"{name}.pt") for name, top1 in (("student", 70.0), ("old", 60.0), ("b", 50.0))]
    found = report.collect([*copies, content("--seed=43", 80.0)])
    assert [(row["model"], row["top1"]) for row in found["rows"]] == [
        ("Student (w/o KD)", 75.0), ("Student (w/o KD), old.pt", 60.0), ("Student (w/o KD), b.pt", 50.0),
    ]  # fmt: skip


def test_rows_say_what_sets_them_apart():
    kd = [content("--kd"), content("--kd --alpha=0.5"), content("--kd --temp=20"), content("--kd --views=8")]
    labels = [row["model"] for row in report.collect([content("--tto"), content(), *kd])["rows"]]
    assert labels[0] == "Teacher (VGG19 with BN)" and labels[1] == "Student (w/o KD)"
    assert "Student (with KD, Temp = 20)" in labels and len(set(labels)) == 6
    assert "Student (with KD, Temp = 5, 0.5 KL + 0.5 CE)" in labels and any("8 views" in label for label in labels)


# ---------------------------------------------------------------------------------------------- files


def test_json_goes_where_it_is_sent(tmp_path, capfd):
    values = {"top1": 0.5}
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "target.json")
    for path in (tmp_path / "plain.json", link, tmp_path / "x**y", tmp_path / "new" / "folder" / "r.json"):
        assert report.write_json(path, values) == path
        assert json.loads(path.read_text()) == values
    assert link.is_symlink() and json.loads((tmp_path / "real" / "target.json").read_text()) == values
    assert not list(tmp_path.rglob("*.tmp"))
    report.write_json(tmp_path / "plain.json", {"top1": 1})
    assert json.loads((tmp_path / "plain.json").read_text()) == {"top1": 1}


def test_json_to_a_pipe_goes_through_it(tmp_path):
    read, write = os.pipe()
    report.write_json(Path(f"/dev/fd/{write}"), {"top1": 0.5})
    os.close(write)
    with os.fdopen(read) as pipe:
        assert json.load(pipe) == {"top1": 0.5}
