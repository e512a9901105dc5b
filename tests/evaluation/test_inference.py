"""A trained model's cost, its logits, the class of a picture, and its exported program."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from made_up import CPU, random_images

from data_sets import DATA_SETS
from evaluation import inference, report
from models import build_model
from runtime.device import Runtime
from runtime.errors import UserError
from training.run import describe_data
from utils import EVALUATION_BATCH, held_out_logits

SPEC = DATA_SETS["cifar10"]


def test_the_cost_is_timed_and_told_beside_the_teachers():
    seconds = inference.pass_seconds(build_model("student").eval(), 2, CPU, 32, budget=0.05)
    assert seconds > 0
    cost = {"parameters": 300, "macs": 2e6, "bytes": 1000, "latency_ms": 2.0, "images_per_second": 20.0}
    text = report.cost_text(cost, cost | {"parameters": 3000, "latency_ms": 0.5})
    assert "1/10 " in text and "4 x" in text and "2.00 ms" in text


def test_processes_share_the_batches_and_logits_are_in_the_order_of_images():
    class Mean(torch.nn.Module):
        def forward(self, images):
            assert len(images) == EVALUATION_BATCH, "the last batch is as large as the others"
            return images.mean((1, 2, 3))[:, None] * torch.arange(10.0)

    class OneOfThree(Runtime):
        def total(self, values):
            return values  # summed below

    images = random_images(2 * EVALUATION_BATCH + 7)
    alone = held_out_logits(Mean(), images, SPEC, CPU)
    pixels = images.pixels.double() / 255
    expected = ((pixels - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)).mean((1, 2, 3))
    torch.testing.assert_close(alone[:, 1], expected, rtol=1e-4, atol=1e-5)
    shares = [held_out_logits(Mean(), images, SPEC, OneOfThree(CPU.device, None, rank, 3)) for rank in range(3)]
    assert torch.equal(sum(shares), alone)
    assert [int(share.any(1).sum()) for share in shares] == [EVALUATION_BATCH, EVALUATION_BATCH, 7]


def test_an_exported_model_runs_without_the_project_by_the_code_on_the_page(tmp_path):
    model, path = build_model("student").to(memory_format=torch.channels_last).eval(), tmp_path / "weights/student.pt2"
    assert inference.export_model(model, path, describe_data(SPEC)) < 1e-4
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(path).module()(images), model(images), rtol=1e-4, atol=1e-5)
    (code,) = re.findall("```python\n(.*?)```", (REPOSITORY / "docs" / "commands.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert sum(map(done.stdout.count, SPEC.classes)) == 8, done.stderr
    model.forward = lambda images: images if images.sum() > 0 else -images
    with pytest.raises(UserError, match="can't export this model: .+"):
        inference.export_model(model, path, describe_data(SPEC))
