"""The user's own student, teacher, image size, data set and pictures, through both scripts with tiny models."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPOSITORY, snapshot
from made_up import CPU, TinyTeacher, draw
from PIL import Image

import test as test_script
import train
from data_sets import DATA_SETS, DataSet, pictures
from models import build_own
from runtime import checkpoint
from runtime.errors import UserError
from utils import load_images, plot_curves

MODULE = """
import torch
from torch import nn

def net(num_classes):
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(32, num_classes))

no_call = lambda classes: net(classes)
no_module = lambda num_classes: [num_classes]
no_shape = lambda num_classes: net(num_classes + 1)
no_linear = lambda num_classes: net(num_classes).requires_grad_(False)

class Net(nn.Module):
    def __init__(self, num_classes, heads):
        super().__init__()
        self.body, self.head, self.heads = nn.Conv2d(3, 2, 3, padding=1), nn.Linear(2048, num_classes), heads

    def forward(self, images):
        logits = self.head(self.body(images).view(len(images), -1) if not self.heads else self.body(images).flatten(1))
        return (logits, logits) if self.heads and self.training else logits

same = net(10)
no_new_weights = lambda num_classes: same

class Lazy(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))
        self.filters = nn.Parameter(torch.zeros(2, 2, 2, 3, 3))  # which have no channels_last
no_weight = lambda num_classes: nn.Sequential(
    nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3072, num_classes)))
no_view = lambda num_classes: Net(num_classes, heads=False)
no_heads = lambda num_classes: Net(num_classes, heads=True)

class Standardised(nn.Conv2d):
    def forward(self, images):
        means = self.weight.view(len(self.weight), -1).mean(1)
        return nn.functional.conv2d(images, self.weight - means.view(-1, 1, 1, 1), self.bias)

no_weight_view = lambda num_classes: nn.Sequential(Standardised(3, 2, 32), nn.Flatten(), nn.Linear(2, num_classes))
"""


@pytest.fixture
def mine(learn, tmp_path, monkeypatch):
    """my_models.py in the current folder; `learn` of tests/conftest.py."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(MODULE)
    return learn


@pytest.fixture
def evaluate(output_of):
    """A function that runs test.py and gives its output."""
    return lambda *words, code=0: output_of(test_script.main, ["--device=cpu", *words], code)


def test_an_own_student_at_an_own_size(mine, evaluate, digits):
    words = ["--dataset=digits", "--subset=40", "--size=64", "--student=my_models:net"]
    data = f"--data_path={digits}"
    assert "Student my_models:net (with KD, Temp = 5), size 64, subset 40" in mine("--all", "--temp=5", *words[2:])
    names = ("teacher", "student_my_models.net", "student_my_models.net_kd_t5")
    files = {f"digits_{name}_size64_subset40.pt" for name in names}
    assert {path.name for path in Path("weights").glob("*.pt")} == files
    table = json.loads(Path("plots/results_digits_my_models.net_size64_subset40/results.json").read_text())
    assert [row["parameters"] for row in table["rows"][1:]] == [570, 570]
    output = evaluate(data, *words, "--kd", "--json=r.json")
    assert output.startswith("test loss") and "top-1 agreement" in output and "images/s in batches" in output
    numbers = json.loads(Path("r.json").read_text())
    assert (numbers["macs"], numbers["images_per_second"]) == (31 * 31 * 8 * 27 + 320, 64 / 0.02)
    assert evaluate(*words, "--kd", "--export=s.pt2", "--plots_path=p").startswith("saved s.pt2 of weights/")
    assert not Path("p").exists() and not Path("data").exists(), "an export needs no images and draws none"
    files = {"preprocessing.json": ""}
    exported = torch.export.load("s.pt2", extra_files=files)
    assert exported.module()(torch.zeros(3, 3, 64, 64)).shape == (3, 10)
    said = json.loads(files["preprocessing.json"])
    assert said["size"] == 64 and "shortest side to 64 " in said["pictures"]
    draw(Path("a.png"), seed=1)
    path = "weights/digits_student_my_models.net_kd_t5_size64_subset40.pt"
    left_out = "is a model of my_models:net: give --student my_models:net to use it"
    assert left_out not in evaluate(data, *words, "--compare") and left_out in evaluate(data, *words[:3], "--compare")
    table = json.loads(Path("plots/comparison_digits_size64_subset40/results.json").read_text())
    assert table["rows"][0]["macs"] == 31 * 31 * 4 * 27 + 9000
    assert "Teacher" in evaluate(f"--checkpoint={path}", words[3], "--image=a.png")
    for command, tells in (
        ([f"--checkpoint={path}"], "is a model of my_models:net: give --student my_models:net"),
        ([f"--checkpoint={path}", "--student=my_models:other"], "is a model of my_models:net: give"),
        (["--checkpoint=weights/digits_teacher_size64_subset40.pt", words[3]], "is not a student of your own"),
    ):
        assert tells in evaluate(data, *command, code=2)
    Path("my_models.py").write_text(MODULE.replace("nn.BatchNorm2d(8)", "nn.Identity()"))
    del sys.modules["my_models"]
    error = evaluate(data, f"--checkpoint={path}", words[3], code=2)
    assert "does not fit the model Sequential (Unexpected key" in error
    assert "is a finished run with student_layers" in mine(*words[2:], code=2)
    wider = MODULE.replace("8, 3, 2), nn.BatchNorm2d(8)", "9, 3, 2), nn.BatchNorm2d(9)")
    Path("my_models.py").write_text(wider.replace("Linear(32,", "Linear(36,"))
    del sys.modules["my_models"]
    assert "is a finished run with student_layers" in mine(*words[2:], code=2), "the same names, other shapes"


UNUSABLE = {
    "no_such:net": "can't be imported: No module named 'no_such'",
    "my_models:nothing": "can't be imported: module 'my_models' has no attribute 'nothing'",
    "my_models:no_call": "fails with num_classes=10 .*unexpected keyword",
    "my_models:no_module": "returns a list, not a torch.nn.Module",
    "my_models:no_shape": r"returns \(2, 11\) for 2 images, not a tensor of \(2, 10\)",
    "my_models:no_linear": "must end in a trainable nn.Linear with 10 outputs",
    "my_models:no_view": r"and images \(2, 3, 32, 32\): .*Use .reshape",
    "my_models:no_weight_view": r"and images \(2, 3, 32, 32\): .*Use .reshape",
    "my_models:no_weight": "must end in a trainable nn.Linear with 10 outputs",
    "my_models:no_heads": "returns tuple for 2 images",
    "my_models:no_new_weights": "returns the same weights in each call: make a new model",
}


@pytest.mark.parametrize("student", UNUSABLE)
def test_a_student_that_can_not_learn_is_one_line(student, mine, tmp_path):
    error = mine("--all", f"--student={student}", code=2)
    assert re.search(UNUSABLE[student], error) and not (tmp_path / "weights").exists()


def test_its_logits_are_float32_whatever_the_precision(mine):
    for name in ("net", "Lazy"):
        model = build_own(f"my_models:{name}", 10, 32)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.training and model(torch.randn(2, 3, 32, 32)).dtype == torch.float32


def test_a_plain_state_dict_teaches_and_its_images_are_unknown(learn):
    torch.manual_seed(0)
    for classes in (10, 7):
        torch.save(TinyTeacher(classes).state_dict(), f"state{classes}.pt")
    torch.save({"classifier.weight": torch.zeros(10, 4)}, "half.pt")
    torch.save({"fc.weight": torch.zeros(10, 4)}, "resnet.pt")
    output = learn("--all", "--temp", "5", "--teacher=state10.pt")
    assert "Teacher (VGG19 with BN), subset 40, images unknown" in output
    assert "Student (with KD, Temp = 5), subset 40, teacher's images unknown" in output
    learn("--tto")
    for teacher, size, tells in (
        ("state7.pt", 32, "does not fit the model"),
        ("half.pt", 32, "does not fit the model"),
        ("resnet.pt", 32, "(its first key is 'fc.weight'): give a state dict of our VGG19-BN (one Linear), or"),
        ("weights/digits_teacher_subset40.pt", 64, "was trained on images of 32 x 32 pixels, not 64 x 64"),
    ):
        assert tells in learn("--kd", f"--size={size}", f"--teacher={teacher}", code=2)


def test_what_does_not_fit_into_memory_is_said_before_it_is_read(learn, monkeypatch):
    monkeypatch.setattr(pictures, "available_memory", lambda: 8 * 10**6)
    tells = "120 images of 96 x 96 pixels need 0.0 GB of memory, and 0.0 GB are free"
    assert tells in learn("--size=96", code=2)


class DrawnSVHN:
    """Torchvision's SVHN without its files: splits by name, pixels (N, 3, 32, 32), labels and no targets."""

    def __init__(self, root, split="train", download=False):
        if not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        generator = np.random.default_rng(split == "test")
        self.data = generator.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
        self.labels = generator.integers(0, 10, 60)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index].transpose(1, 2, 0)), int(self.labels[index])

    def __len__(self):
        return len(self.data)


def test_a_row_as_the_docs_show_it_is_all_that_a_new_data_set_takes(tiny_models, no_figures, tmp_path, monkeypatch):
    row = re.search(r"```python\n(DataSet\(.*?\)),\n```", (REPOSITORY / "docs" / "own.md").read_text(), re.DOTALL)[1]
    monkeypatch.setattr(torchvision.datasets, "SVHN", DrawnSVHN)
    monkeypatch.setitem(DATA_SETS, "svhn", eval(row, {"DataSet": DataSet}))
    monkeypatch.chdir(tmp_path)
    words = ["--dataset=svhn", "--device=cpu", "--precision=fp32"]
    assert train.main([*words, "--all", "--temp", "5", "--num_epochs=1", "--batch_size=20"]) == 0
    assert checkpoint.load(tmp_path / "weights" / "svhn_student.pt")["data"]["classes"] == list("0123456789")
    assert test_script.main([*words, "--kd"]) == 0
    images, drawn = load_images("svhn", tmp_path, CPU).test, DrawnSVHN("", "test", download=True)
    order = np.random.default_rng(0).permutation(60)
    assert images.labels.tolist() == drawn.labels[order].tolist(), "SVHN's labels are not sorted, others' are"
    assert np.array_equal(images.pixels, drawn.data.transpose(0, 2, 3, 1)[order])
    assert load_images("svhn", tmp_path, CPU, size=64).test.pixels.shape == (60, 64, 64, 3)
    monkeypatch.setattr(DrawnSVHN, "__getitem__", Mock(side_effect=OSError("image file is truncated")))
    with pytest.raises(UserError, match="can't read SVHN in .*: image file is truncated; remove it"):
        load_images("svhn", tmp_path, CPU)


# ---------------------------------------------------------------------------------------------- own pictures

CLASSES = ("$\\frac$ & x", "naïve chat", "日本")  # in the order of their names
PICTURES = ["--dataset=folder", "--data_path=my $pictures"]


@pytest.fixture
def root(tiny_models, no_figures, tmp_path, monkeypatch):
    """20 training and 4 test pictures of each class; the scripts run beside them, with tiny models and no figures."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(CLASSES):
        for i in range(24):
            draw(tmp_path / "my $pictures" / ("test" if i > 19 else "train") / name / f"{i}.png", seed=100 * label + i)
    return tmp_path / "my $pictures"


@pytest.fixture
def train_on_pictures(root, output_of):
    """A function that runs train.py over the pictures for one epoch and gives its output."""
    options = [*PICTURES, "--device=cpu", "--precision=fp32", "--num_epochs=1", "--batch_size=12", "--views=2"]
    return lambda *words, code=0: output_of(train.main, [*options, *words], code)


def test_the_commands_work_and_only_training_needs_the_folder(root, train_on_pictures, evaluate, tmp_path):
    draw(tmp_path / "a $x$ 日.png", seed=5)
    output = train_on_pictures("--all", "--temp", "5", "--seeds=2")
    assert output.count("60 training and 12 test images of 3 classes") == 1, "it is read once for all runs"
    assert "top5" not in output and "Top 5" not in output and "Top 1 Accuracy" in output
    assert len(plot_curves(tmp_path / "plots" / "folder_student.jsonl", tmp_path)) == 2
    told = evaluate(*PICTURES, "--kd", "--json=r.json")
    assert told.startswith("test loss ") and "top5" not in told and "top-5" not in told
    assert all(name in told for name in CLASSES) and "top-1 agreement" in told
    assert "Student (with KD, Temp = 5)" in evaluate(*PICTURES, "--compare")
    (root / "train" / CLASSES[0] / "broken.png").write_text("no picture")
    told = train_on_pictures("--seed=43", "--skip_broken", "--flip=False", "--weights_path=w w", "--name=a")
    assert checkpoint.load(Path("w w/a/folder_student_seed43.pt"))["run"]["flip"] is False
    command = re.search("evaluate it with `python test.py (.*)`", told)[1]
    assert evaluate(*shlex.split(command)).startswith("test loss ")
    (root / "train" / CLASSES[0] / "broken.png").unlink()
    root.rename(tmp_path / "elsewhere")
    student = "--checkpoint=weights/folder_student_kd_t5.pt"
    evaluate(student, "--data_path=elsewhere", "--json=r2.json")
    losses = [json.loads((tmp_path / name).read_text())["loss"] for name in ("r.json", "r2.json")]
    assert losses[0] == losses[1]
    shutil.rmtree(tmp_path / "elsewhere")
    told = evaluate("--dataset=folder", "--kd", "--image", "a $x$ 日.png")
    assert "Teacher" in told and any(name in told for name in CLASSES)
    assert "--data_path must name a folder" in evaluate(*PICTURES, "--kd", code=2)


def test_a_changed_picture_is_another_run_and_other_classes_are_an_error(root, train_on_pictures, evaluate, tmp_path):
    train_on_pictures("--all", "--temp", "5")
    draw(root / "train" / CLASSES[0] / "0.png", seed=999)
    before = snapshot(tmp_path / "weights")
    for word, tells in (
        ("--kd", "folder_student_kd_t5.pt is a finished run with images .*: the images have changed, so give "),
        ("--kd --temp=7", "folder_teacher.pt was trained on other images than those of folder here"),
        ("--all", "folder_student.pt is a finished run with images [0-9a-f]{8}, not "),
    ):
        assert re.search(tells, train_on_pictures(*word.split(), code=2)) and snapshot(tmp_path / "weights") == before
    assert "folder_student_kd_t5.pt was trained on other images" in evaluate(*PICTURES, "--kd")
    evaluate(*PICTURES, "--compare", code=2)  # no checkpoint is of these images
    train_on_pictures("--all", "--temp", "5", "--weights_path=w2")
    keys = {path.name for weights in ("weights", "w2") for path in (tmp_path / weights).glob("*_logits_*")}
    assert len(keys) == 2, "other logits"
    for split in ("train", "test"):
        (root / split / CLASSES[0]).rename(root / split / "another")
    assert f"has 3 classes ({', '.join(CLASSES)}" in evaluate(*PICTURES, code=2)
    for split in ("train", "test"):
        shutil.rmtree(root / split / "another")
    assert "--loss ls standardises two logits" in train_on_pictures("--all", "--loss", "kd", "ls", code=2)
