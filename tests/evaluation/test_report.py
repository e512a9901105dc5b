"""The table of models, its gains and notes, and the files that are published."""

import json

import pytest
import torch
from made_up import KD, STUDENT, TEACHER, cells, content_of, run_of, tiny_student

from evaluation import report
from evaluation.results import collect, results_text, write_table


def content(command: str = "", top1: float = 70.0, path: str = "x.pt", device: str = "a CPU", **changes) -> dict:
    """A measured checkpoint of `train.py COMMAND`, with `changes` of its run."""
    measured = {"top1": top1 / 100, "top5": 0.97, "parameters": 1000, "fingerprint": "1f3a" * 4}
    more = {"measured": measured, "path": path, "machine": {"torch": "2.14", "device": device}}
    return content_of(run_of(command, **changes), (top1,), MODEL) | more


MODEL = tiny_student()


def test_write_table_writes_the_table_its_numbers_the_figure_and_all_logs(tmp_path, capsys):
    contents = [content("--tto", 84.451)]
    for seed, without, with_kd in ((42, 70.0, 71.0), (43, 71.0, 74.0), (44, 70.0, 72.0)):
        contents += [content(f"--seed={seed}", without), content(f"--kd --seed={seed}", with_kd)]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "omitted.png").write_text("of an earlier table")
    write_table(contents, tmp_path / "results")
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"results.md", "results.json", "comparison.png", "runs.jsonl"}
    table = (tmp_path / "results" / "results.md").read_text()
    rows = cells(table)
    assert rows[0] == ["Model", "Top 1 Accuracy", "Top 5 Accuracy", "Parameters", "Epochs", "Gain of KD"]
    assert rows[2] == [TEACHER, "84.45%", "97.00%", "1,000", "16", ""]
    assert rows[3][:2] == [STUDENT, "70.33% ± 0.58"]
    assert rows[4][:2] == [KD, "72.33% ± 1.53"]
    assert [row[5] for row in rows[2:]] == ["", "", "+2.00 (-0.48 to +4.48)"]
    told = "over the same-seed baseline without KD (n = 3, sd 1.00, 95% interval -0.48 to +4.48), within seed noise"
    assert f"{KD} gains +2.00 points of top-1 {told}" in table
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["gains"][0]["mean"] == pytest.approx(2) and results["gains"][0]["pairs"] == 3
    assert results["rows"][1]["top1_of_seeds"] == [70.0, 71.0, 70.0] and results["rows"][1]["seeds"] == [42, 43, 44]
    assert results["notes"] == [f"{KD}: its teacher is not in this table"] and table in capsys.readouterr().out
    assert (tmp_path / "results" / "runs.jsonl").read_text() == "".join(c["log"] for c in contents)


def test_the_figure_shows_the_rows_of_the_table_and_a_copy_of_a_run_is_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("evaluation.figures.save_figure", lambda axes, path: drawn.append(axes))
    contents = [
        content("--tto"), content(top1=60.0, path="a.pt"), content(top1=50.0, path="copy.pt"),
        content(top1=40.0, path="b.pt"), content("--seed=43", 70.0), content("--kd"), content("--kd --views=8"),
    ]  # fmt: skip
    write_table(contents, tmp_path)
    rows = {row["model"]: f"{row['top1']:.2f}" for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    labels = [label.removesuffix(" (mean of 2)").split(": ") for label in drawn[0].get_legend_handles_labels()[1]]
    assert dict(labels) == rows and len(labels) == 6
    copies = [(f"{STUDENT}, .", "65.00"), (f"{STUDENT}, copy.pt", "50.00"), (f"{STUDENT}, b.pt", "40.00")]
    assert [*rows.items()][1:4] == copies


def test_one_pair_has_a_difference_and_no_interval_or_verdict():
    found = collect([content(), content("--kd", 70.5), content("--kd --loss=dkd", 71.5)])
    text = results_text(found)
    assert cells(text)[3][-1] == "+0.50 (one pair)" and not found["notes"]
    assert cells(text)[-1] == [DKD, KD, "+1.00 (one pair)", "not tested"]
    assert "\nOne pair gives no interval: add --seeds 3 to the command of --all True.\n" in text
    assert not any(words in text for words in ("seed noise", f"{KD} gains", "Holm"))


def test_runs_of_another_folder_are_another_row_with_its_own_baseline():
    old = [content(top1=60.0, path="w/a.pt")]
    new = [content(f"--seed={seed} {kd}", 70.0 + 2 * bool(kd), f"w/v2/{seed}{kd}.pt")
           for seed in (42, 43) for kd in ("", "--kd")]  # fmt: skip
    found = collect([*old, *new])
    assert [(row["seeds"], row["top1"]) for row in found["rows"]] == [([42], 60), ([42, 43], 70), ([42, 43], 72)]
    assert found["gains"][0]["mean"] == pytest.approx(2)
    assert "+2.00 (2 equal pairs)" in results_text(found) and "One pair" not in results_text(found)


def test_only_the_same_seed_and_options_are_paired_and_each_teachers_students_have_a_gain():
    kd = [content(f"--kd --seed={seed}", 72.0 + seed) for seed in (3, 1, 2)]
    others = [content("--seed=1", 70.0), content("--seed=2", 71.5), content("--seed=3 --num_epochs=10", 60.0)]
    found = collect([*others, *kd, content("--kd --temp=20 --seed=1", 69.0, teacher="1f3a" * 4)])
    first, second = found["gains"]
    assert first["pairs"] == 2 and first["mean"] == pytest.approx((3 + 2.5) / 2)
    labels = f"{KD}, teacher bbbbbbbb", "Student (with KD, Temp = 20), teacher 1f3a1f3a"
    assert (first["model"], second["model"]) == labels, "a figure over T must not join them"
    assert (second["pairs"], second["mean"]) == (1, pytest.approx(-1))
    assert [len(row["seeds"]) for row in found["rows"]] == [2, 1, 3, 1]


@pytest.mark.parametrize("name, value", [("processes", 2), ("precision", "bf16"), ("views", 3), ("seed", 7)])
def test_a_note_says_why_there_is_no_pair(name, value):
    far, near = content(lr=0.3, num_epochs=2, **{name: value}), content(**{name: value})
    kd = content("--kd")
    found = collect([far, near, kd])
    note = f"{KD} has no baseline: the nearest student without KD has {name} {value}, not {kd['run'][name]}"
    assert not found["gains"] and found["notes"][0] == note and f"\n{note}\n" in results_text(found)
    different = "The rows have different seeds: compare only rows with the same seeds."
    assert found["notes"][1:] == [different] * (name == "seed")
    assert collect([content("--tto"), kd])["notes"][-1].endswith("there is no student without KD")


def test_runs_of_another_machine_are_paired_and_a_row_of_two_machines_is_marked():
    without = [content(f"--seed={seed}", 70.0, device="a GPU" if seed == 2 else "a CPU") for seed in (1, 2)]
    kd = [content(f"--kd --seed={seed}", 71.0 + seed, device="a GPU") for seed in (1, 2)]
    for one, number in zip(kd, (0.5, 0.7), strict=True):
        one["measured"] |= {"loss": number, "bias": [number]}
    found = collect([*without, *kd])
    assert found["rows"][1]["loss"] == pytest.approx(0.6) and found["rows"][1]["bias"] == pytest.approx([0.6])
    assert found["gains"][0]["pairs"] == 2
    text = results_text(found)
    assert [row[0] for row in cells(text)[2:]] == [f"{STUDENT} †", KD]
    assert f"† {STUDENT}: runs on different machines, a CPU, torch 2.14; a GPU, torch 2.14" in text
    assert text.count("†") == 2


# ---------------------------------------------------------------------------------------------- other losses

DKD = "Student (with DKD, Temp = 4, 1 TCKD + 8 NCKD + 1 CE)"


def of_seeds(command: str, *tops: float) -> list[dict]:
    return [content(f"{command} --seed={seed}", top1) for seed, top1 in enumerate(tops, 1)]


def test_another_loss_is_paired_with_each_row_of_plain_kd():
    contents = [*of_seeds("--kd", 72.0, 73.0), *of_seeds("--kd --temp=20", 72.0, 75.0)]
    gains = collect(contents + of_seeds("--kd --loss=dkd", 74.0, 75.1))["gains_over_kd"]
    found = [(gain["model"], gain["over"], round(gain["mean"], 9)) for gain in gains]
    assert found == [(DKD, KD, 2.05), (DKD, "Student (with KD, Temp = 20)", 1.05)]


def test_verdicts_are_corrected_for_the_number_of_comparisons_in_the_table():
    kd = of_seeds("--kd", 70.0, 70.0, 70.0)
    dkd = of_seeds("--kd --loss=dkd", 71.0, 71.5, 71.4)  # t = 8.5 with 2 degrees of freedom: p = 0.0136
    wttm = of_seeds("--kd --loss=wttm", 71.0, 71.0, 71.9)  # t = 4.33: p = 0.0493, by itself below 0.05
    ttm = of_seeds("--kd --loss=ttm", 70.5, 69.5, 70.1)
    ls = of_seeds("--kd --loss=ls", 69.0, 69.02, 69.01)  # p = 0.00003

    def verdicts(*rows) -> dict[str, str]:
        text = results_text(collect([one for row in (kd, *rows) for one in row]))
        assert f"Verdicts at the 5% level, with Holm's correction for {len(rows)} comparison" in text
        return {row[0].split(",")[0].split()[-1]: row[-1] for row in cells(text) if len(row) == 4 and row[1] == KD}

    assert verdicts(dkd) == {"DKD": "better"} and verdicts(wttm) == {"WTTM": "better"}
    expected = {"DKD": "better", "WTTM": "not significant", "TTM": "not significant", "LS": "worse"}
    assert verdicts(dkd, wttm, ttm, ls) == expected


def test_of_many_classes_the_worst_are_listed():
    shares = [i / 100 for i in range(100)]
    shares[3] = None  # there is no image of it
    lines = report.per_class_lines(shares, tuple(f"c{i}" for i in range(100)))
    worst = ", ".join(f"c{i} {i}.0%" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10))
    assert " ".join(lines).split() == f"accuracy of the 10 worst classes: {worst}".split()
    assert max(map(len, lines)) <= 110
    assert report.per_class_lines([0.5, None], ("a", "b")) == ["accuracy of each class: a 50.0%, b no image"]


def test_reports_tell_the_class_from_the_prediction_and_the_teacher_from_the_student():
    numbers = {"images": 4, "top1": 0.75, "per_class": [1.0, 0.0, 1.0], "ece": 0.25}
    text = report.accuracy_text(numbers | {"confusion": [[2, 1, 0], [3, 0, 0], [0, 2, 1]]}, ("a", "b", "c"))
    worst = "worst confusions: b predicted as a 3 times, c predicted as b 2 times, a predicted as b 1 times\n"
    assert "top-1 30.06% to 95.44%" in text and worst in text and "calibration error 25.00% (15 bins)" in text
    text = report.fidelity_text({"agreement": 0.5, "kl_to_teacher": 1.0, "contingency": [[1, 2], [3, 4]]})
    assert ["images: teacher right, student wrong", "2"] in cells(text)
    by_model = {"A": torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.6, 0.3, 0.1, 0.0]])}
    text = report.pictures_text(["x.png", "y.png"], by_model, tuple("abcd"))
    assert text == "x.png\n  A  c 70.0%, b 20.0%, a 10.0%\ny.png\n  A  a 60.0%, b 30.0%, c 10.0%"
