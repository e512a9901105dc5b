"""A data set of torchvision that is not in the table yet: one row, as docs/data.md shows it, is all it takes."""

import re

import numpy as np
import torchvision
from conftest import REPOSITORY
from made_up import CPU
from PIL import Image

import test as test_script
import train
from data_sets import DATA_SETS, DataSet
from runtime import checkpoint
from utils import load_images


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


def row_of_the_docs() -> DataSet:
    text = (REPOSITORY / "docs" / "data.md").read_text()
    return eval(re.search(r"```python\n(DataSet\(.*?\)),\n```", text, re.DOTALL)[1])


def test_a_row_is_all_it_takes(tiny_models, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torchvision.datasets, "SVHN", DrawnSVHN)
    monkeypatch.setitem(DATA_SETS, "svhn", row_of_the_docs())
    monkeypatch.chdir(tmp_path)
    words = ["--dataset=svhn", "--device=cpu", "--precision=fp32"]
    assert train.main([*words, "--all", "--temp", "5", "--num_epochs=1", "--batch_size=20"]) == 0
    assert checkpoint.load(tmp_path / "weights" / "svhn_student.pt")["data"]["classes"] == list("0123456789")
    assert test_script.main([*words, "--kd"]) == 0
    assert test_script.main([*words, "--compare"]) == 0
    assert "Student (with KD, Temp = 5)" in capfd.readouterr().out
    images, drawn = load_images("svhn", tmp_path, CPU).test, DrawnSVHN("", "test", download=True)
    assert images.labels.tolist() == drawn.labels.tolist() and images.pixels.shape == (60, 32, 32, 3)
    assert np.array_equal(images.pixels, drawn.data.transpose(0, 2, 3, 1))
