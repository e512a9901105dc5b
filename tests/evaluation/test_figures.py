"""The figures of trained models: what they show, and what they call it."""

import matplotlib
import numpy as np
import pytest
import torch
from made_up import write_log
from PIL import Image

from evaluation import figures

CLASSES = tuple("abc")


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes of what is drawn, in order; nothing is written."""
    axes = []
    monkeypatch.setattr(figures, "save_figure", lambda of, path: axes.append(of) or path)
    return axes


def test_the_comparison_has_one_mean_for_runs_that_differ_in_the_seed_alone(tmp_path, drawn):
    write_log(tmp_path / "a.jsonl", tops=(50.0,))
    write_log(tmp_path / "b.jsonl", "--seed=43", tops=(52.0,))
    write_log(tmp_path / "c.jsonl", "--kd", tops=(40.0, 60.0))
    write_log(tmp_path / "d.jsonl", "--kd --seed=43 --alpha=0.5", tops=(70.0,))
    write_log(tmp_path / "e.jsonl", "--kd --seed=43", tops=(30.0,))  # under way
    logs = figures.find_logs(tmp_path, "cifar10")
    figures.plot_comparison(logs, tmp_path / "comparison.png")
    lines, labels = drawn[0].get_legend_handles_labels()
    assert labels == [
        "Student (w/o KD): 51.00 (mean of 2)",
        "Student (with KD, Temp = 5): 60.00",
        "Student (with KD, Temp = 5, 0.5 KL + 0.5 CE): 70.00",
    ]
    assert len({line.get_color() for line in lines}) == len(drawn[0].lines) == 3
    (band,) = drawn[0].collections
    assert band.get_datalim(drawn[0].transData).intervaly.tolist() == [50, 52]
    assert drawn[0].get_title() == "Top-1 accuracy on the test images of cifar10"


def test_a_run_of_one_epoch_is_seen(tmp_path, drawn):
    logs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    write_log(logs[0], tops=(50.0,))
    write_log(logs[1], "--kd", tops=(40.0, 60.0))
    figures.plot_comparison(logs, tmp_path / "comparison.png")
    assert [line.get_marker() for line in drawn[0].lines] == [".", "None"]


def test_only_logs_of_these_images_with_an_epoch_are_compared(tmp_path, drawn):
    commands = {
        "a": "", "b": "--subset=40", "c": "--holdout=8", "d": "--subset=40 --holdout=8", "e": "--dataset=digits",
        "f": "--kd --subset=40",
    }  # fmt: skip
    for name, command in commands.items():
        write_log(tmp_path / f"{name}.jsonl", command)
    write_log(tmp_path / "begun.jsonl", tops=())
    (tmp_path / "torn.jsonl").write_text('{"role": "stud')
    (tmp_path / "old.jsonl").write_text('{"role": "student", "options": {}}\n{"epoch": 1}\n')
    (tmp_path / "notes.jsonl").write_text("[1]\n[2]\n")
    for i, line in enumerate(('{"epoch": 1}', '{"epoch": 1, "test": {"top1": "good"}}', 100_000 * "[")):
        (tmp_path / f"damaged{i}.jsonl").write_text(f"{(tmp_path / 'a.jsonl').read_text()}{line}\n")

    def found(*images) -> str:
        return "".join(path.stem for path in figures.find_logs(tmp_path, *images))

    assert found("cifar10") == found("cifar10", None, 0) == "a"
    assert (found("cifar10", 40), found("cifar10", None, 8), found("cifar10", 40, 8)) == ("bf", "c", "d")
    assert found("digits") == "e" and found("digits", 40) == "" and found("cifar10", 41) == ""
    figures.plot_comparison(figures.find_logs(tmp_path, "cifar10", None, 8), tmp_path / "comparison.png")
    assert drawn[0].get_title() == "Top-1 accuracy on the images kept aside of cifar10"


def test_confusion_and_reliability_show_the_numbers(drawn, tmp_path):
    numbers = {"confusion": [[3, 1, 0], [0, 0, 0], [0, 0, 5]]}
    figures.plot_confusion(numbers, CLASSES, "title", tmp_path / "confusion.png")
    texts = [text.get_text() for text in drawn[0].texts]
    assert texts == ["75", "25", "", "", "", "", "", "", "100"]
    assert drawn[0].get_xlabel() == "predicted" and drawn[0].get_ylabel() == "class"
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]]).double()
    figures.plot_reliability(logits, torch.tensor([0, 1]), "title", tmp_path / "reliability.png")
    (bars,) = drawn[1].containers
    assert [bar.get_height() for bar in bars] == [0] * 14 + [0.5]


def test_a_users_own_style_is_none_of_a_figures(tmp_path):
    write_log(tmp_path / "log.jsonl")
    drawn = []
    for style in ({}, {"axes.facecolor": "red", "font.family": "no such font", "savefig.bbox": "tight"}):
        with matplotlib.rc_context(style):
            drawn.append(figures.plot_comparison([tmp_path / "log.jsonl"], tmp_path / "comparison.png").read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("count, named, numbers", [(20, 20, 400), (21, 21, 0), (100, 100, 0), (1000, 100, 0)])
def test_a_confusion_of_many_classes_stays_readable(count, named, numbers, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        figures, "save_figure", lambda axes, path, real=figures.save_figure: kept.append(axes) or real(axes, path)
    )
    classes = tuple(f"class $number {i}" for i in range(count))
    figures.plot_confusion({"confusion": torch.eye(count).tolist()}, classes, "title", tmp_path / "confusion.png")
    (axes,) = kept
    for side, names in ((1, axes.get_yticklabels()), (0, axes.get_xticklabels())):
        assert [name.get_text() for name in names] == list(classes[:: count // named])
        if side == 0 and count == 20:
            continue  # they are aslant
        spans = sorted(sorted(name.get_window_extent().get_points()[:, side]) for name in names)
        assert all(last <= first for (_, last), (first, _) in zip(spans, spans[1:], strict=False)), "one over another"
    assert len(axes.texts) == numbers


def test_of_many_classes_the_likeliest_stand_beside_a_picture(drawn, tmp_path):
    classes, generator = tuple(f"${i}" for i in range(100)), torch.Generator().manual_seed(0)
    answers = torch.rand(8, 1, 100, generator=generator)  # more than there are colours
    pixels = [np.zeros((32, 32, 3), np.uint8)]
    by_title = {f"T = {i}": answer for i, answer in enumerate(answers)}
    figures.plot_pictures(pixels, ["a.png"], by_title, classes, tmp_path / "p.png")
    beside = drawn[0].figure.axes[1]
    likeliest = sorted(answers[0, 0].argsort(descending=True)[:10].tolist())
    assert [name.get_text() for name in beside.get_yticklabels()] == [f"${i}" for i in likeliest]
    for bars, answer in zip(beside.containers, answers, strict=True):
        assert [bar.get_width() for bar in bars] == pytest.approx((100 * answer[0, likeliest]).tolist())


@pytest.mark.parametrize("name", ["a$b$.png", "$.png", "_x.png", "$\\frac$.png", "a_{b}^c.png", "ä 1%.png"])
def test_pictures_have_any_name(name, tmp_path, monkeypatch):
    titles = []

    def save_figure(axes, path, real=figures.save_figure):
        titles.append(axes.get_title())
        return real(axes, path)

    monkeypatch.setattr(figures, "save_figure", save_figure)
    answers = {"Student": torch.full((1, 3), 1 / 3), "_Teacher $x$": torch.tensor([[0.5, 0.5, 0.0]])}
    path = figures.plot_pictures([np.zeros((32, 32, 3), np.uint8)], [name], answers, CLASSES, tmp_path / "p.png")
    with Image.open(path) as picture:
        assert picture.width == 840
    assert titles == [name]
