"""The benchmarks' arithmetic on numbers worked out by hand, their published tables, and one small run of each."""

import json
import sys

import pytest
from conftest import REPOSITORY
from made_up import CPU, cells

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import throughput
import time_to_accuracy as bench

from config import parse_train
from runtime.errors import UserError

SPEED = REPOSITORY / "results" / "speed"


def result(side: str, epochs: int, lr: float, seconds: float, top1: float) -> dict:
    return {"settings": {"side": side, "num_epochs": epochs, "lr": lr}, "seconds": seconds, "top1": top1}


def test_tables_have_the_best_rate_of_each_length_and_bounds_on_the_ratio():
    results = [result("ours", 1, 0.1, 10, 0.2), result("ours", 2, 0.1, 40, 0.6), result("baseline", 2, 0.1, 200, 0.4)]
    results += [result("baseline", 1, lr, 50, top1) for lr, top1 in ((0.05, 0.25), (0.1, 0.3), (0.2, 0.28))]
    rows = [", ".join(row) for row in cells(bench.tables(bench.best_curves(results)))]
    assert rows[2:4] == ["ours, 1, 0.1, 10.0, 20.00%", "ours, 2, 0.1, 40.0, 60.00%"]
    assert rows[4:6] == ["baseline loop, 1, 0.1, 50.0, 30.00%", "baseline loop, 2, 0.1, 200.0, 40.00%"]
    assert [row.partition(",")[0] for row in rows[8:]] == [f"{target}%" for target in range(20, 61, 5)]
    assert rows[8:10] == ["20%, 10.0, < 50.0, < 5.00", "25%, 11.9, < 50.0, < 4.20"]
    assert rows[10] == "30%, 14.1, 50.0, 3.54" and rows[-1] == "60%, 40.0, > 200.0, > 5.00"


def test_the_baseline_rate_rises_then_falls_along_a_cosine():
    assert [bench.lr_factor(step, 4, 0) for step in range(4)] == pytest.approx([1, 0.8536, 0.5, 0.1464], abs=1e-4)
    rising = [bench.lr_factor(step, 40, 0.1) for step in range(40)]
    assert rising[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rising[4:] == sorted(rising[4:], reverse=True) and 0 < rising[-1] < 0.01


def test_a_file_of_another_benchmark_is_rejected(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match="holds no results of this benchmark"):
        bench.read_results(path)


def test_the_tables_of_speed_are_those_of_the_published_runs():
    tables = [throughput.rows_table(json.loads((SPEED / "throughput.json").read_text())["rows"])]
    trainings = bench.read_results(SPEED / "time_to_accuracy.json")
    for role in ("student", "teacher"):
        tables.append(bench.tables(bench.best_curves([t for t in trainings if t["settings"]["role"] == role])))
    text = (REPOSITORY / "docs" / "speed.md").read_text()
    page = [row for row in cells(text.partition("## Small maps")[0]) if not row[0].startswith(":-")]
    assert len(page) > 15
    published = cells("\n".join(tables))
    assert [row for row in page if row not in published] == []


def test_a_small_run_of_time_to_accuracy_is_kept_and_not_repeated(digits, tiny_models, tmp_path, capfd):
    words = ["--images", "128", "--lengths", "1", "--dataset", "digits", "--device", "cpu", "--precision", "fp32"]
    words += [f"--data_path={digits}", f"--json={tmp_path / 'r.json'}", f"--figure={tmp_path / 'f.png'}"]
    outputs = []
    for _ in range(2):
        assert bench.main(words) == 0
        outputs.append(capfd.readouterr())
    assert [row[0] for row in cells(outputs[0].out)[2:4]] == ["ours", "baseline loop"]
    assert outputs[1].out == outputs[0].out and "1 epochs" in outputs[0].err and outputs[1].err == ""
    assert (tmp_path / "f.png").stat().st_size > 0
    settings = [training["settings"] for training in bench.read_results(tmp_path / "r.json")]
    assert [(s["side"], s["train_images"]) for s in settings] == [("ours", 128), ("baseline", 128), ("baseline", 128)]
    assert all(s["holdout"] == 20 for s in settings)
    assert bench.main([*words, "--images=127"]) == 2 and "fewer than a batch of 128" in capfd.readouterr().err


def test_throughput_has_a_rate_in_every_row(tiny_models, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "IMAGES", 600)
    monkeypatch.chdir(tmp_path)
    small = throughput.Bench(parse_train(["--batch_size=8"]), CPU, quick=True)
    small.repeats = 1
    rows = throughput.measure(small)
    assert len(rows) == len(throughput.ROWS) and all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    assert all(row["ratio"] == row["ours"] / row["theirs"] for row in rows)
