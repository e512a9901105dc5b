"""What test.py says beside its numbers: cost, pictures, files, the table of models."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

import config
import test as test_script
import utils
from datasets import DATASETS
from evaluation import inference, report
from models import ARCHITECTURES, build_model
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from utils import Images, all_logits

CPU = Runtime(torch.device("cpu"), None)
SPEC = DATASETS["cifar10"]
KEYS = [
    "checkpoint", "role", "images", "loss", "top1", "top5", "top1_ci", "per_class", "confusion", "ece", "nll",
    "parameters", "macs", "bytes", "latency_ms", "images_per_second", "agreement", "kl_to_teacher", "contingency",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- cost and export


def save_checkpoint(folder: Path, name: str = "student", seed: int = 42, **more) -> Path:
    """An untrained model as train.py leaves a trained one."""
    role = "teacher" if name.startswith("teacher") else "student"
    torch.manual_seed(seed)
    content = {
        "role": role, "architecture": ARCHITECTURES[role], "num_classes": 10, "dataset": "cifar10",
        "kd": "temp" in more.get("options", {}), "model": build_model(role).state_dict(), "epoch": 1, "teacher": "",
        "metrics": more.pop("metrics", {"loss": 2.3, "top1": 10.0, "top5": 50.0}),
        "options": {"seed": seed, "precision": "fp32", "dataset": "cifar10"} | more.pop("options", {}),
    }  # fmt: skip
    checkpoint.save(folder / f"{name}.pt", content | more)
    return folder / f"{name}.pt"


def test_cost_counts_the_layers(tmp_path):
    model = build_model("student").eval()
    macs, parameters, side = 0, 0, 32
    for module in model.modules():  # by the layers' definitions
        if isinstance(module, torch.nn.Conv2d):
            macs += module.in_channels * module.out_channels * 9 * side**2
        elif isinstance(module, torch.nn.MaxPool2d):
            side //= 2
        elif isinstance(module, torch.nn.Linear):
            macs += module.in_features * module.out_features
        parameters += sum(p.numel() for p in module.parameters(recurse=False))
    assert inference.count_macs(model) == macs
    assert inference.count_parameters(model) == parameters
    path = save_checkpoint(tmp_path)
    seconds = inference.pass_seconds(model, 2, CPU, budget=0.05)
    assert seconds.shape == (3,) and (np.diff(seconds) >= 0).all() and seconds[0] > 0
    cost = inference.Cost(parameters, macs, path.stat().st_size, (1.0, 2.0, 3.0), (10.0, 20.0, 30.0))
    assert cost.medians()["latency_ms"] == 2 and cost.medians()["images_per_second"] == 20
    text = report.cost_text(cost, replace(cost, parameters=10 * parameters, latency_ms=(1.0, 0.5, 3.0)))
    assert "1/10 " in text and "4 x" in text and "2.00 (1.00 to 3.00)" in text


def test_logits_come_in_the_order_of_images_however_many_processes():
    class Mean(torch.nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))[:, None] * torch.arange(10.0)

    pixels = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(7, dtype=torch.int64))
    alone = all_logits(Mean(), images, SPEC, CPU)

    class Share(Runtime):  # a process of three, whose sum with the others is taken below
        def total(self, values):
            return values

    shares = [all_logits(Mean(), images, SPEC, Share(CPU.device, None, rank, 3)) for rank in range(3)]
    assert torch.equal(sum(shares), alone) and alone[:, 9].unique().numel() == 7
    assert [int(share.any(1).sum()) for share in shares] == [3, 2, 2]


def test_numbers_that_are_not_finite_are_refused():
    class Broken(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 10), float("nan"))

    images = Images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="not finite"):
        all_logits(Broken(), images, SPEC, CPU)


def test_export_runs_without_the_project(tmp_path):
    model = build_model("student").to(memory_format=torch.channels_last).eval()
    assert inference.export_model(model, tmp_path / "student.pt2", SPEC) < 1e-4
    files = {"preprocessing.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=files).module()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    assert json.loads(files["preprocessing.json"])["classes"] == list(SPEC.classes)


# ---------------------------------------------------------------------------------------------- pictures


def test_pictures_of_all_kinds(tmp_path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 200
    for suffix in ("png", "jpg", "webp"):
        Image.fromarray(red).save(tmp_path / f"red.{suffix}")
        found = inference.read_picture(tmp_path / f"red.{suffix}")
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8
        assert np.abs(found.astype(int) - (200, 0, 0)).max() < 8
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (inference.read_picture(tmp_path / "clear.png") == 255).all()  # on white, whatever lies under
    Image.new("LA", (40, 40), (0, 128)).save(tmp_path / "half.png")
    assert np.abs(inference.read_picture(tmp_path / "half.png").astype(int) - 127).max() <= 1
    Image.new("L", (9, 300), 77).save(tmp_path / "grey.png")
    assert (inference.read_picture(tmp_path / "grey.png") == 77).all()
    Image.fromarray(np.full((40, 40), 77 * 256, np.uint16)).save(tmp_path / "grey16.png")
    assert (inference.read_picture(tmp_path / "grey16.png") == 77).all()
    Image.new("RGB", (20_000, 20), (1, 2, 3)).save(tmp_path / "wide.png")
    assert (inference.read_picture(tmp_path / "wide.png") == (1, 2, 3)).all()


def test_exif_orientation_is_respected(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # white above
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    found = inference.read_picture(tmp_path / "turned.png")
    assert found[:14].max() < 10 and found[18:].min() > 245


def test_the_middle_square_is_what_is_seen(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    Image.fromarray(pixels).save(tmp_path / "three.png")
    assert (inference.read_picture(tmp_path / "three.png") == pixels[:, 32:64]).all()


def bad_pictures(folder: Path) -> dict[str, str]:
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("RGB", (1, 1)).save(folder / "point.png")
    Image.new("1", (20_000, 5_000)).save(folder / "huge.png")
    Image.new("RGB", (200, 200), "red").save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:80])
    return {
        "text.png": "no picture", "empty.png": "no picture", "point.png": "1 x 1", "huge.png": "million pixels",
        "cut.png": "damaged", "missing.png": "check its name", ".": "directory",
    }  # fmt: skip


def test_bad_pictures_give_one_line_and_2(tmp_path, capfd):
    for name, words in bad_pictures(tmp_path).items():
        arguments = ["--image", str(tmp_path / name), "--device=cpu"]
        assert test_script.main([*arguments, f"--weights_path={tmp_path}", f"--plots_path={tmp_path}"]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and words in error.lower() and str(tmp_path / name) in error


# ---------------------------------------------------------------------------------------------- test.py


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """A function that runs test.py over 20 made-up images, with few timed passes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.arange(20) % 10)
    monkeypatch.setattr(test_script, "load_images", lambda *arguments: (images, images))
    monkeypatch.setattr(inference, "pass_seconds", lambda *arguments: np.array([0.01, 0.02, 0.03]))
    folders = [f"--weights_path={tmp_path}", f"--plots_path={tmp_path / 'plots'}", "--device=cpu"]
    return lambda *arguments: test_script.main([*folders, *arguments])


def test_report_of_a_student_beside_teacher_and_control(tmp_path, evaluate, capfd):
    for name, seed, options in (("student", 1, {}), ("student_kd_t5", 2, {"temp": [5.0]}), ("teacher", 3, {})):
        save_checkpoint(tmp_path, name, seed, options=options)
    assert evaluate("--kd", "True", f"--json={tmp_path / 'new' / 'report.json'}") == 0
    output = capfd.readouterr().out
    numbers = json.loads((tmp_path / "new" / "report.json").read_text())
    assert sorted(numbers) == sorted(KEYS)
    first = f"test loss {numbers['loss']:.4f} top1 {100 * numbers['top1']:.2f}% top5 {100 * numbers['top5']:.2f}%"
    assert output.splitlines()[0] == first
    assert "without KD" in output and "not the teacher that this student learned from" in output
    assert numbers["role"] == "student" and numbers["images"] == 20 and 0 <= numbers["agreement"] <= 1
    assert np.sum(numbers["contingency"]) == np.sum(numbers["confusion"]) == 20
    assert numbers["latency_ms"] == 20 and numbers["images_per_second"] == 256 / 0.02
    assert numbers["bytes"] == (tmp_path / "student_kd_t5.pt").stat().st_size
    for figure in ("confusion", "reliability"):
        with Image.open(tmp_path / "plots" / f"student_kd_t5_{figure}.png") as picture:
            assert picture.width == 840


def test_report_without_a_teacher_leaves_fidelity_out(tmp_path, evaluate, capfd):
    save_checkpoint(tmp_path)
    assert evaluate(f"--json={tmp_path / 'report.json'}") == 0
    assert "fidelity to the teacher: left out" in capfd.readouterr().out
    assert sorted(json.loads((tmp_path / "report.json").read_text())) == sorted(KEYS[:-3])


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, evaluate, capfd):
    assert evaluate("--kd", "True", "--temp", "20") == 2
    error = capfd.readouterr().err
    assert "`python train.py --kd True --temp 20 --" in error and error.count("\n") == 1
    (tmp_path / "student.pt").write_text("no checkpoint")
    assert evaluate() == 2 and "damaged" in capfd.readouterr().err
    assert evaluate("--compare", "True") == 2 and "damaged" in capfd.readouterr().err


def test_picture_is_classified_by_student_and_teacher(tmp_path, evaluate, capfd):
    save_checkpoint(tmp_path)
    save_checkpoint(tmp_path, "teacher")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "blue.png")
    assert evaluate("--image", str(tmp_path / "blue.png")) == 0
    output = capfd.readouterr().out
    assert "Student (w/o KD)" in output and "Teacher (VGG19 with BN)" in output
    assert (tmp_path / "plots" / "student_images.png").exists()


# ---------------------------------------------------------------------------------------------- the table of models


def test_the_table_of_all(tmp_path):
    save_checkpoint(tmp_path, "teacher", metrics={"top1": 84.451, "top5": 99.22})
    for seed, without, with_kd in ((42, 70.0, 71.0), (43, 71.0, 74.0), (44, 70.0, 72.0)):
        suffix = "" if seed == 42 else f"_seed{seed}"
        save_checkpoint(tmp_path, f"student{suffix}", seed, metrics={"top1": without, "top5": 97.0})
        options = {"temp": [5.0], "alpha": 0.9}
        metrics = {"top1": with_kd, "top5": 98.0}
        save_checkpoint(tmp_path, f"student_kd_t5{suffix}", seed, options=options, metrics=metrics)
    words = ["--all", "True", "--seeds", "3", "--temp", "5", f"--weights_path={tmp_path}", f"--plots_path={tmp_path}"]
    report.write_table(config.parse_train(words))
    table = (tmp_path / "results.md").read_text()
    rows = cells(table)
    assert rows[0] == ["Model", "Top 1 Accuracy", "Top 5 Accuracy", "Parameters"]
    assert rows[2] == ["Teacher (VGG19 with BN)", "84.45%", "99.22%", "20,040,522"]
    assert rows[3][:2] == ["Student (w/o KD)", "70.33% ± 0.58"]
    assert rows[4][:2] == ["Student (with KD, Temp = 5)", "72.33% ± 1.53"]
    assert "gains +2.00 points" in table and "interval -0.48 to +4.48), within seed noise" in table
    gain = json.loads((tmp_path / "results.json").read_text())["gains"][0]
    assert gain["mean"] == pytest.approx(2) and gain["sd"] == pytest.approx(1) and gain["pairs"] == 3


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_compare_says_of_each_checkpoint_what_its_own_report_says(tmp_path, evaluate, capfd):
    assert evaluate("--compare", "True") == 2 and "train.py --all True" in capfd.readouterr().err
    reports = {}
    for name, seed, options in (("student_kd_t5", 2, {"temp": [5.0]}), ("teacher", 3, {}), ("student", 1, {})):
        save_checkpoint(tmp_path, name, seed, options=options)
    (tmp_path / "student.last.pt").write_text("a resume state is no finished checkpoint")
    for name, words in (("teacher", ["--tto"]), ("student", []), ("student_kd_t5", ["--kd"])):
        assert evaluate(*words, f"--json={tmp_path / 'report.json'}") == 0
        reports[name] = json.loads((tmp_path / "report.json").read_text())
    capfd.readouterr()
    assert evaluate("--compare", "True") == 0
    table = (tmp_path / "plots" / "comparison.md").read_text()
    assert table in capfd.readouterr().out
    rows = json.loads((tmp_path / "plots" / "comparison.json").read_text())["rows"]
    for row, (name, expected), line in zip(rows, reports.items(), cells(table)[2:], strict=True):
        assert (row["top1"], row["top5"]) == (100 * expected["top1"], 100 * expected["top5"])
        for key in ("ece", "nll", "macs", "bytes", "latency_ms", "images_per_second", "agreement", "kl_to_teacher"):
            assert row.get(key) == expected.get(key), (name, key)
        assert f"{100 * expected['ece']:.2f}%" in line and f"{expected['nll']:.4f}" in line
    assert cells(table)[0][4:] == ["ECE", "NLL", "Agreement", "KL", "MACs", "Size", "Latency", "Images/s"]
    assert cells(table)[2][6:8] == ["", ""], "the teacher is not compared with itself"
    elsewhere = (tmp_path / "teacher.pt").rename(tmp_path / "plots" / "another.pt")
    assert evaluate("--compare", "True", f"--teacher={elsewhere}") == 0
    assert (tmp_path / "plots" / "comparison.md").read_text() == table
    assert evaluate("--compare", "True", f"--teacher={tmp_path / 'student.pt'}") == 2
    assert "holds role student" in capfd.readouterr().err


def test_only_the_same_seed_and_options_are_paired():
    def content(seed, top1, **options):
        return {
            "role": "student", "num_classes": 10, "kd": "temp" in options,
            "options": {"seed": seed, "num_epochs": 60} | options, "metrics": {"top1": top1, "top5": 90.0},
        }  # fmt: skip

    kd = [content(seed, 72.0 + seed, temp=[5.0], alpha=0.9) for seed in (3, 1, 2)]
    found = report.collect([content(1, 70.0), content(2, 71.5), content(3, 60.0, num_epochs=10), *kd])
    assert found["gains"][0]["pairs"] == 2 and found["gains"][0]["mean"] == pytest.approx((3 + 2.5) / 2)
    assert [len(row["seeds"]) for row in found["rows"]] == [2, 1, 3]
    assert not report.collect([content(1, 70.0), kd[0]])["gains"]  # one pair has no spread


def test_the_comparison_has_one_mean_for_runs_that_differ_in_the_seed_alone(tmp_path, monkeypatch):
    def write_log(name: str, top1: float, kd: bool = False, split: str = "test", **options) -> None:
        options = {"seed": 42, "num_epochs": 1, **({"temp": [5.0], "alpha": 0.9} if kd else {}), **options}
        header = {"role": "student", "kd": kd, "dataset": "cifar10", "evaluated_on": split, "options": options}
        line = {"epoch": 1, split: {"top1": top1}}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(line)}\n")

    write_log("a", 50.0)
    write_log("b", 52.0, seed=43)
    write_log("c", 60.0, kd=True)
    write_log("d", 70.0, kd=True, seed=43, alpha=0.5)
    write_log("e", 99.0, split="holdout", holdout=8)
    (tmp_path / "f.jsonl").write_text('{"role": "stud')
    drawn = []
    monkeypatch.setattr(utils, "save_figure", lambda axes, path: drawn.append(axes) or path)
    logs = utils.find_logs(tmp_path, "cifar10")
    assert [path.stem for path in logs] == ["a", "b", "c", "d"]
    utils.plot_comparison(logs, tmp_path / "comparison.png")
    lines, labels = drawn[0].get_legend_handles_labels()
    assert labels == [
        "Student (w/o KD): 51.00 (mean of 2)",
        "Student (with KD, Temp = 5): 60.00",
        "Student (with KD, Temp = 5): 70.00",
    ]
    assert len({line.get_color() for line in lines}) == 3 and len(drawn[0].lines) == 4
    assert drawn[0].get_title() == "Top-1 accuracy on the test images of cifar10"


def test_a_reader_that_wants_no_more_is_no_error(digits, tmp_path):
    save_checkpoint(tmp_path, "digits_student", dataset="digits", options={"dataset": "digits"})
    arguments = f"--dataset digits --subset 40 --data_path {digits} --weights_path {tmp_path} --plots_path {tmp_path}"
    command = f"{sys.executable} {REPOSITORY / 'test.py'} {arguments} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("test loss ") and done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
