"""The benchmarks' own arithmetic, on numbers worked by hand; that a cut-off run goes on; one small run."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import cifar10_as_folder
import curves
import levers
import throughput
import time_to_accuracy as bench

from datasets import DATASETS
from datasets.pictures import square
from runtime.errors import UserError
from utils import Images

OURS = [(10.0, 20.0), (40.0, 60.0)]  # seconds, top-1 in percent
UP_AND_DOWN = [(1.0, 10.0), (10.0, 50.0), (100.0, 40.0), (1000.0, 60.0)]


@pytest.mark.parametrize(
    "curve, target, expected",
    [
        (OURS, 40, 20),  # half the way up: the geometric mean of 10 and 40
        (OURS, 20, 10),
        (OURS, 60, 40),
        (OURS, 30, 10 * 4**0.25),
        (UP_AND_DOWN, 20, 10**0.25),
        (UP_AND_DOWN, 45, 10**0.875),  # the first time, not the second
        (UP_AND_DOWN, 55, 10**2.75),
    ],
)
def test_the_time_to_a_target_is_straight_on_log_seconds(curve, target, expected):
    assert curves.time_to(curve, target) == pytest.approx((expected, expected))


def test_no_time_is_extrapolated():
    assert curves.time_to(OURS, 19.9) == (0, 10)
    assert curves.time_to(OURS, 60.1) == (40, math.inf)
    assert curves.time_to([(5.0, 30.0)], 30) == (5, 5)


def test_the_middle_of_a_picture_of_cifar10_is_the_image():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    pictures = [cifar10_as_folder.picture_of(image, False, generator) for image in pixels]
    assert all(np.array_equal(square(picture), image) for picture, image in zip(pictures, pixels, strict=True))
    sizes = {picture.size for picture in pictures}
    assert len(sizes) > 20 and all(min(size) == 32 for size in sizes)
    smooth = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3) // 8
    larger = cifar10_as_folder.picture_of(smooth, True, generator)
    assert min(larger.size) > 32


def test_a_lever_is_told_by_its_mean_and_its_paired_gain():
    def result(variant, seed, *top1):
        return {"variant": variant, "seed": seed, "top1": dict(zip(levers.READINGS, top1, strict=True))}

    results = [
        result("recipe", 42, 80, 80, 81, 82),
        result("recipe", 43, 82, 82, 82, 82),
        result("cutout", 42, 79, 80, 80, 81),
        result("cutout", 43, 79, 80, 80, 81),
    ]
    assert cells(levers.results_table(results)) == [
        ["recipe", "81.00% (+0.00 ± 0.00)", "81.00% (+0.00 ± 0.00)", "81.50% (+0.50 ± 0.71)", "82.00% (+1.00 ± 1.41)"],
        ["cutout", "79.00% (-2.00 ± 1.41)", "80.00% (-1.00 ± 1.41)", "80.00% (-1.00 ± 1.41)", "81.00% (+0.00 ± 1.41)"],
    ]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_is_said_of_levers_is_what_their_trial_found(role):
    results = json.loads((REPOSITORY / "plots" / "trials" / f"levers_{role}.json").read_text())["results"]
    page = (REPOSITORY / "docs" / "recipe.md").read_text()
    for row in cells(levers.results_table(results)):
        assert f"| {' | '.join(row)} |" in page


def test_a_cut_out_square_is_of_the_mean_colour_and_no_larger_than_asked():
    images = Images(torch.full((64, 32, 32, 3), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    views = levers.ViewsWithHoles(images, DATASETS["digits"])
    batch, _ = views.batch(torch.arange(64), torch.full((64,), 80))  # the middle crop
    holes = (batch == 0).all(1)
    assert all(hole.any(1).sum() * hole.any(0).sum() == hole.sum() for hole in holes)
    assert holes.sum((1, 2)).max() == levers.HOLE**2
    assert holes.sum((1, 2)).min() < levers.HOLE**2  # one at the border


def test_the_tables_of_speed_are_those_of_their_runs():
    folder, page = REPOSITORY / "plots" / "speed", cells((REPOSITORY / "docs" / "speed.md").read_text())
    texts = [throughput.rows_table(json.loads((folder / "throughput.json").read_text())["rows"])]
    for path in folder.glob("time_to_accuracy_*.json"):
        points = curves.best_points(curves.read_results(path))
        texts += [curves.points_table(points), curves.targets_table(*curves.means(points))]
    assert len(texts) >= 3
    assert all(row in page for text in texts for row in cells(text))


def test_the_rows_in_float32_are_those_of_their_run():
    kept = json.loads((REPOSITORY / "plots" / "speed" / "throughput_float32.json").read_text())["rows"]
    page = (REPOSITORY / "docs" / "speed.md").read_text().partition("**Float32.**")[2]
    rows = [row for row in cells(page) if len(row) == 5 and row[-1][0].isdigit()]
    assert len(rows) == 8
    assert all(row in cells(throughput.rows_table(kept)) for row in rows)


def cells(text: str) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_the_ratio_is_a_bound_where_a_side_was_not_there():
    slow = [(50.0, 30.0), (200.0, 40.0)]
    assert cells(curves.targets_table(OURS, slow)) == [
        ["20%", "10.0", "< 50.0", "< 5.00"],
        ["25%", "11.9", "< 50.0", "< 4.20"],
        ["30%", "14.1", "50.0", "3.54"],
        ["35%", "16.8", "100.0", "5.95"],
        ["40%", "20.0", "200.0", "10.00"],
        ["45%", "23.8", "> 200.0", "> 8.41"],
        ["50%", "28.3", "> 200.0", "> 7.07"],
        ["55%", "33.6", "> 200.0", "> 5.95"],
        ["60%", "40.0", "> 200.0", "> 5.00"],
    ]
    assert cells(curves.targets_table([(10.0, 35.0)], [(50.0, 20.0)]))[0][1:] == ["< 10.0", "50.0", "> 5.00"]
    assert curves.bounds_text(0, math.inf, "{}") == "unknown"


def test_a_side_that_stays_behind_is_named():
    text = curves.unreached_text(OURS, [(50.0, 30.0), (200.0, 40.0)])
    assert "'usual loop' reached 40.00% at most, in trainings of up to 200.0 s" in text and "60.00%" in text
    assert curves.unreached_text(OURS, OURS) == ""


@pytest.mark.parametrize(
    "lowest, highest, expected",
    [(20, 22, [20, 21, 22]), (19.5, 22.2, [20, 21, 22]), (10, 90, [*range(10, 91, 10)]), (40.2, 40.7, [])],
)
def test_targets_are_round_and_few(lowest, highest, expected):
    assert curves.targets([(1.0, lowest)], [(1.0, highest)]) == expected


def result(side: str, epochs: int, lr: float, seed: int, seconds: float, top1: float) -> dict:
    settings = {"side": side, "num_epochs": epochs, "lr": lr, "seed": seed}
    return {"settings": settings, "seconds": seconds, "top1": top1}


def test_the_best_rate_of_the_usual_loop_counts_at_each_length():
    results = [result("ours", 1, 0.1, 42, 10, 0.5), result("ours", 1, 0.1, 43, 12, 0.54)]
    for epochs, rates in ((1, {0.1: (0.2, 0.3), 0.05: (0.3, 0.4)}), (2, {0.1: (0.6, 0.6), 0.05: (0.1, 0.9)})):
        for lr, tops in rates.items():
            results += [result("plain", epochs, lr, 42 + i, 20 * epochs, top1) for i, top1 in enumerate(tops)]
    assert cells(curves.points_table(curves.best_points(results))) == [
        ["ours", "1", "0.1", "11.0", "52.00% ± 2.83"],
        ["usual loop", "1", "0.05", "20.0", "35.00% ± 7.07"],
        ["usual loop", "2", "0.1", "40.0", "60.00% ± 0.00"],
    ]


def test_the_usual_schedule_rises_where_asked_and_falls_to_zero():
    assert [bench.plain_factor(step, 4, 0) for step in range(4)] == pytest.approx([1, 0.8536, 0.5, 0.1464], abs=1e-4)
    rising = [bench.plain_factor(step, 40, 0.1) for step in range(40)]
    assert rising[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rising[4:] == sorted(rising[4:], reverse=True) and 0 < rising[-1] < 0.01


def test_the_sides_take_turns():
    sides = [(t.side, t.epochs, t.seed, t.lr) for t in bench.plan([1, 2], range(7, 8), [0.1, 0.2])]
    plain = [[("plain", epochs, 7, lr) for lr in (0.1, 0.2)] for epochs in (1, 2)]
    assert sides == [("ours", 1, 7, None), *plain[0], ("ours", 2, 7, None), *plain[1]]


def test_what_is_done_is_not_done_again(tmp_path):
    path, called = tmp_path / "results.json", []
    wanted = [result("ours", epochs, 0.1, 42, 0, 0)["settings"] for epochs in (1, 2, 3)]

    def train(place: int) -> dict[str, float]:
        called.append(place)
        if called == [0, 1]:
            raise KeyboardInterrupt
        return {"seconds": 10.0 + place, "top1": 0.5}

    with pytest.raises(KeyboardInterrupt):
        curves.run_all(wanted, train, path)
    assert [r["seconds"] for r in curves.run_all(wanted, train, path)] == [10, 11, 12]
    assert called == [0, 1, 1, 2]
    curves.run_all(wanted, train, path)
    curves.run_all([wanted[1] | {"lr": 0.2}], train, path)  # other settings are another training
    assert called == [0, 1, 1, 2, 0]
    assert len(json.loads(path.read_text())["trainings"]) == 4


@pytest.mark.parametrize("content", ["", "[]", '{"trainings": [{}]}', '{"trainings": [1]}', '{"rows": []}'])
def test_a_file_that_is_none_of_its_own_is_left_alone(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no results of this benchmark"):
        curves.read_results(path)


def test_a_small_run_and_again(digits, tmp_path, capfd):
    words = f"--images 128 --lengths 1 --dataset digits --device cpu --precision fp32 --data_path {digits}".split()
    files = [f"--json={tmp_path / 'r.json'}", f"--figure={tmp_path / 'f.png'}"]
    assert bench.main([*words, *files]) == 0
    done = capfd.readouterr()
    assert bench.main([*words, *files]) == 0
    again = capfd.readouterr()
    assert [row[0] for row in cells(done.out.split("\n\n")[1])] == ["ours", "usual loop"]
    assert again.out == done.out and "epoch 1/1" in done.err and "epoch 1/1" not in again.err
    assert (tmp_path / "f.png").stat().st_size > 0
    settings = [training["settings"] for training in json.loads((tmp_path / "r.json").read_text())["trainings"]]
    assert [(s["side"], s["images"], s["holdout"]) for s in settings] == [("ours", 128, 500), ("plain", 128, 500)]


@pytest.mark.parametrize("words", ["--tto True", "--num_epochs 3", "--kd=True", "--images 100", "--rolle teacher"])
def test_a_wrong_option_exits_with_code_2(words, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        bench.parse(words.split(), str(tmp_path))
