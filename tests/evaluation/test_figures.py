"""The figures of trained models: what they show, and their labels."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from made_up import KD, STUDENT, content_of, run_of, tiny_student
from matplotlib.font_manager import fontManager

import utils
from evaluation import figures
from utils import plot_curves, save_figure

CLASSES = tuple("abc")
PIXELS = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes that are drawn and saved, in order; their legends fit into the figure."""
    drawn = []

    def save(axes, path: Path) -> Path:
        drawn.append(axes)
        saved = save_figure(axes, path)
        axes.figure.draw_without_rendering()
        for box in (legend.get_window_extent() for legend in axes.figure.legends):
            assert box.x0 >= 0 and box.x1 <= axes.figure.bbox.width and box.y0 >= 0
        return saved

    for module in (figures, utils):
        monkeypatch.setattr(module, "save_figure", save)
    return drawn


@pytest.mark.parametrize("command, split", [("", "test"), ("--kd --holdout 8", "holdout")])
def test_curves_show_what_the_log_says(command, split, tmp_path, drawn):
    path, run = tmp_path / "run.jsonl", run_of(command)
    path.write_text(content_of(run, (40.0, 60.0), tiny_student())["log"])
    paths, names = plot_curves(path, tmp_path), ("accuracy", "loss")
    assert paths == [tmp_path / f"run_{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [axes.figure.get_suptitle() for axes in drawn] == [f"{run.title} on cifar10: {name}" for name in names]
    curves = {}
    for panel in (*drawn[0].figure.axes, *drawn[1].figure.axes):
        curves[panel.get_ylabel()] = {line.get_label(): line.get_ydata().tolist() for line in panel.lines}
    expected = {
        "top-1 (%)": {"train": [0.0, 0.0], split: [40.0, 60.0]},
        "top-5 (%)": {"train": [90.0, 90.0], split: [95.0, 95.0]},
        "cross-entropy (nats)": {"train": [1.0, 1.0], split: [1.1, 1.1]},
    }
    assert curves == expected | ({"soft term (nats)": {"train": [0.5, 0.5]}} if run.kd else {})


def plot_comparison(path: Path, runs: dict[str, tuple]) -> Path:
    """The comparison of runs, given by their commands and a test top-1 (%) per epoch."""
    contents = [content_of(run_of(c), tops, tiny_student()) | {"path": "student.pt"} for c, tops in runs.items()]
    return figures.plot_comparison(contents, path / "comparison.png")


def test_the_comparison_shows_runs_that_differ_in_the_seed_alone_as_one_mean_and_one_epoch_as_a_point(tmp_path, drawn):
    runs = {"": (44.0, 50.0), "--kd": (40.0, 60.0), "--seed=43": (48.0, 52.0), "--kd --seed=43 --alpha=0.5": (60, 70)}
    plot_comparison(tmp_path, runs)
    lines, labels = drawn[0].get_legend_handles_labels()
    half = "Student (with KD, Temp = 5, 0.5 KL + 0.5 CE)"
    assert labels == [f"{STUDENT}: 51.00 (mean of 2)", f"{KD}: 60.00", f"{half}: 70.00"]
    assert [line.get_ydata().tolist() for line in drawn[0].lines] == [[46, 51], [40, 60], [60, 70]]
    assert len({line.get_color() for line in lines}) == 3 and {line.get_marker() for line in lines} == {"None"}
    (band,) = drawn[0].collections
    assert band.get_datalim(drawn[0].transData).intervaly.tolist() == [44, 52]
    assert drawn[0].figure.get_suptitle() == "Accuracy and loss on the test images of cifar10"
    plot_comparison(tmp_path, {"--tto": (60.0,), "--holdout=8": (50.0,)})
    assert [line.get_marker() for line in drawn[1].lines] == ["."]
    assert drawn[1].figure.get_suptitle() == "Accuracy and loss on the held-out images of cifar10"
    teacher, student = (content_of(run_of(c), model=tiny_student()) | {"path": "x.pt"} for c in ("--tto", ""))
    figures.plot_comparison([teacher | {"log": ""}, student], tmp_path / "comparison.png")  # of a plain state dict
    assert len(drawn[2].lines) == 1


LOSSES = ["--kd"] + [f"--kd --loss={loss} --temp={temp}" for loss in ("ls", "dkd", "wttm") for temp in (2, 4, 8)]
SGD = ["", "--optimizer=sgd"]  # whose label is long: all that differs
TEMPS = [f"--kd --temp={temp} --seed={seed}" for temp in (1, 2, 4, 8, 16, 32) for seed in (1, 2)]


@pytest.mark.parametrize("commands, rows", [(LOSSES, 10), (TEMPS, 6), (SGD, 2)])
def test_a_legend_of_many_long_rows_fits_and_no_two_rows_look_alike(commands, rows, tmp_path, drawn):
    plot_comparison(tmp_path, dict.fromkeys(commands, (50.0,)))
    figure = drawn[0].figure
    assert drawn[0].get_window_extent().height > figure.bbox.height / 3
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn[0].lines}) == rows


def test_confusion_and_reliability_show_the_numbers(drawn, tmp_path):
    numbers = {"confusion": [[3, 1, 0], [0, 0, 0], [0, 0, 5]]}
    figures.plot_confusion(numbers, CLASSES, "title", tmp_path / "confusion.png")
    texts = [(*text.get_position(), text.get_text()) for text in drawn[0].texts if text.get_text()]
    assert texts == [(0, 0, "75"), (1, 0, "25"), (2, 2, "100")]
    assert drawn[0].images[0].get_array().tolist() == [[75, 25, 0], [0, 0, 0], [0, 0, 100]]
    assert drawn[0].get_xlabel() == "predicted" and drawn[0].get_ylabel() == "class"
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double()
    figures.plot_reliability(logits, torch.tensor([0, 1, 1]), "title", tmp_path / "reliability.png")
    (bars,) = drawn[1].containers
    assert [bar.get_height() for bar in bars] == [0] * 14 + [0.5]
    points = drawn[1].lines[0].get_xydata()[[4, 14]].ravel().tolist()
    assert points == pytest.approx([1 / 3, 0, 0.99975, 0.5], abs=1e-4)
    fractions = drawn[1].patches[-1].get_data().values.tolist()
    assert fractions == pytest.approx([0] * 4 + [1 / 3] + [0] * 9 + [2 / 3])


def test_a_table_is_drawn_over_the_number_of_images_and_over_the_temperature(drawn, tmp_path):
    rows = [
        {"model": f"Student (with KD, Temp = {temp}), {count:,} images", "top1": temp + 0.5, "student_images": count,
         "top1_of_seeds": [temp, temp + 1], "temp": float(temp), "teacher_entropy": temp / 10}
        for count in (5000, 150) for temp in (20, 5, 1)
    ]  # fmt: skip
    gains = [{"model": row["model"], "mean": row["temp"], "ci": [row["temp"] - 2, row["temp"] + 2]} for row in rows]
    results = {"rows": [{"model": "Student (w/o KD)", "top1": 9.0}, *rows], "gains": gains}
    path = tmp_path / "figure.png"
    assert figures.plot_images(results, path) == figures.plot_temperatures(results, path) == path
    assert drawn[0].get_legend_handles_labels()[1] == [f"Student (with KD, Temp = {temp})" for temp in (20, 5, 1)]
    points = [[[150, temp + 0.5], [5000, temp + 0.5]] for temp in (20, 5, 1)]
    assert [line.get_xydata().tolist() for line in drawn[0].lines] == points
    assert drawn[0].collections[0].get_datalim(drawn[0].transData).intervaly.tolist() == [20, 21]
    assert drawn[1].get_legend_handles_labels()[1] == [f"Student (with KD), {count} images" for count in ("5,000", 150)]
    assert drawn[1].lines[0].get_xydata().tolist() == [[1, 1], [5, 5], [20, 20]]
    ends = {(x, y + side) for x, y in ((1, 1), (5, 5), (20, 20)) for side in (-2, 2)}
    assert set(map(tuple, drawn[1].collections[0].get_paths()[0].vertices)) == ends, "the ends of the intervals"
    assert drawn[1].figure.axes[1].lines[0].get_ydata().tolist() == [0.1, 0.5, 2.0]
    few = {"rows": rows[1:3], "gains": gains}
    assert figures.plot_images(few, path) is None is figures.plot_temperatures(few, path)
    for row in rows:  # of one seed
        del row["top1_of_seeds"]
    figures.plot_images(results, path)
    assert [line.get_xydata().tolist() for line in drawn[2].lines] == points and not drawn[2].collections


def test_the_users_matplotlib_style_changes_no_figure_and_is_not_changed(tmp_path):
    (tmp_path / "run.jsonl").write_text(content_of(run_of(), model=tiny_student())["log"])

    def drawn_bytes() -> list[bytes]:
        paths = [plot_comparison(tmp_path, {"": (50.0,)}), *plot_curves(tmp_path / "run.jsonl", tmp_path)]
        return [path.read_bytes() for path in paths]

    expected, style = drawn_bytes(), {"axes.facecolor": "red", "font.family": "no such font", "savefig.bbox": "tight"}
    with matplotlib.rc_context(style | {"font.size": 30, "lines.linewidth": 9, "backend": "pdf"}):
        before = matplotlib.rcParams.copy()
        assert drawn_bytes() == expected and matplotlib.rcParams == before


@pytest.mark.parametrize("count, named, numbers", [(20, 20, 400), (21, 21, 0), (1000, 100, 0)])
def test_a_confusion_of_many_classes_stays_readable(count, named, numbers, tmp_path, drawn):
    classes = tuple(f"class $number {i}" for i in range(count))
    figures.plot_confusion({"confusion": torch.eye(count).tolist()}, classes, "title", tmp_path / "confusion.png")
    (axes,) = drawn
    for side, names in ((1, axes.get_yticklabels()), (0, axes.get_xticklabels())):
        assert [name.get_text() for name in names] == list(classes[:: count // named])
        if side == 0 and count == 20:
            continue  # these are rotated by 45 degrees
        spans = sorted(sorted(name.get_window_extent().get_points()[:, side]) for name in names)
        assert all(last <= first for (_, last), (first, _) in zip(spans, spans[1:], strict=False)), "labels overlap"
    assert len(axes.texts) == numbers


def test_of_many_classes_the_likeliest_are_shown_beside_a_picture(drawn, tmp_path):
    classes, generator = tuple(f"${i}" for i in range(100)), torch.Generator().manual_seed(0)
    answers = torch.rand(8, 2, 100, generator=generator)  # more than there are colours
    pixels = np.concatenate((PIXELS, 255 - PIXELS))
    student = "Student my_models:resnet8 (with KD, Temp = 5)"
    by_title = {f"{student}, T = {i}": answer for i, answer in enumerate(answers)}
    figures.plot_pictures(pixels, ["a.png", "b.png"], by_title, classes, tmp_path / "p.png")
    for i in (0, 1):
        picture, beside = drawn[0].figure.axes[2 * i : 2 * i + 2]
        assert (picture.images[0].get_array() == pixels[i]).all()
        likeliest = sorted(answers[0, i].argsort(descending=True)[:10].tolist())
        assert [name.get_text() for name in beside.get_yticklabels()] == [f"${j}" for j in likeliest]
        for bars, answer in zip(beside.containers, answers, strict=True):
            assert [bar.get_width() for bar in bars] == pytest.approx((100 * answer[i, likeliest]).tolist())


@pytest.mark.filterwarnings("error")  # as of a missing glyph
def test_letters_are_of_an_installed_font_or_else_the_name_is_a_number(tmp_path, drawn, monkeypatch):
    installed = ("DejaVu Sans", "STIXGeneral", "Last Resort High-Efficiency")
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name in installed])
    before = matplotlib.rcParams["font.family"]
    names = ("chat", "Ⓐ 2", "\U000f0000", "a\nb", 30 * "é")  # Ⓐ is in STIXGeneral alone
    shown = ["chat", "Ⓐ 2", "class 2", "class 3", 23 * "é" + "…"]
    figures.plot_confusion({"confusion": torch.eye(5).tolist()}, names, "title", tmp_path / "c.png")
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == shown
    assert drawn[0].get_yticklabels()[0].get_fontfamily() == ["sans-serif", "STIXGeneral"]
    answers = {"Student": torch.full((2, 5), 0.2)}
    figures.plot_pictures(PIXELS, ["a/Ⓑ.png", "\U000f0000.png"], answers, names, tmp_path / "p.png")
    pictures = drawn[1].figure.axes
    assert [pictures[0].get_title(), pictures[2].get_title()] == ["Ⓑ.png", "picture 2"]
    assert [label.get_text() for label in pictures[1].get_yticklabels()] == shown
    assert matplotlib.rcParams["font.family"] == before


def test_a_class_and_a_picture_may_have_any_name(tmp_path, drawn):
    run = run_of("", omit=("$\\frac$",))
    content = content_of(run, (50.0,), tiny_student()) | {"path": "student.pt"}
    (tmp_path / "run.jsonl").write_text(content["log"])
    plot_curves(tmp_path / "run.jsonl", tmp_path)
    figures.plot_comparison([content], tmp_path / "comparison.png")
    answers, names = {run.title: torch.full((2, 3), 1 / 3)}, ["$\\frac$.png", "_a_{b}^c ä 1%.png"]
    figures.plot_pictures(PIXELS, names, answers, CLASSES, tmp_path / "pictures.png")
    assert [axes.get_title() for axes in drawn[-1].figure.axes[::2]] == names
    content["measured"] = {"per_class": [0.5] * 10, "corrected_per_class": [0.6] * 10, "bias": [1.0]}
    content["data"]["classes"][3] = "$\\frac$"
    assert figures.plot_omitted([content], tmp_path / "omitted.png").exists()
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in drawn[-1].containers}
    expected = {"seen, uncorrected": [50] * 9, "never seen, uncorrected": [50]}
    assert heights == expected | {"seen, corrected": [60] * 9, "never seen, corrected": [60]}
