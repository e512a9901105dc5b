"""A trained model at work: its cost, its logits, pictures, the exported program."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import CPU, save_run
from PIL import Image

from datasets import DATASETS
from datasets.pictures import bombs_refused, read_picture
from evaluation import inference, report
from models import build_model
from runtime.device import Runtime
from runtime.errors import UserError
from utils import Images, all_logits

SPEC = DATASETS["cifar10"]


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
    path = save_run(tmp_path)
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


def read(path: Path) -> np.ndarray:
    with bombs_refused():
        return read_picture(path)


def test_pictures_of_all_kinds(tmp_path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 200
    for suffix in ("png", "jpg", "webp"):
        Image.fromarray(red).save(tmp_path / f"red.{suffix}")
        found = read(tmp_path / f"red.{suffix}")
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8
        assert np.abs(found.astype(int) - (200, 0, 0)).max() < 8
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read(tmp_path / "clear.png") == 255).all()  # on white, whatever lies under
    Image.new("LA", (40, 40), (0, 128)).save(tmp_path / "half.png")
    assert np.abs(read(tmp_path / "half.png").astype(int) - 127).max() <= 1
    Image.new("L", (9, 300), 77).save(tmp_path / "grey.png")
    assert (read(tmp_path / "grey.png") == 77).all()
    Image.fromarray(np.full((40, 40), 77 * 256, np.uint16)).save(tmp_path / "grey16.png")
    assert (read(tmp_path / "grey16.png") == 77).all()
    Image.new("RGB", (20_000, 20), (1, 2, 3)).save(tmp_path / "wide.png")
    assert (read(tmp_path / "wide.png") == (1, 2, 3)).all()


def test_exif_orientation_is_respected(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # white above
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    found = read(tmp_path / "turned.png")
    assert found[:14].max() < 10 and found[18:].min() > 245


def test_the_middle_square_is_what_is_seen(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    Image.fromarray(pixels).save(tmp_path / "three.png")
    assert (read(tmp_path / "three.png") == pixels[:, 32:64]).all()


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


def test_bad_pictures_are_refused_in_one_line(tmp_path):
    for name, words in bad_pictures(tmp_path).items():
        with pytest.raises(UserError) as error:
            read(tmp_path / name)
        assert words in str(error.value).lower() and str(tmp_path / name) in str(error.value)
