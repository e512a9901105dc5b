"""A trained model's cost, its logits, the class of a picture, and its exported program."""

import json

import numpy as np
import pytest
import torch
from made_up import CPU, TinyTeacher, random_images

from data_sets import DATA_SETS
from evaluation import inference, report
from models import build_model
from runtime.device import Runtime
from runtime.errors import UserError
from training.run import describe_data
from utils import EVALUATION_BATCH, Images, held_out_logits

SPEC = DATA_SETS["cifar10"]


def test_cost_counts_the_layers():
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
    seconds = inference.pass_seconds(model, 2, CPU, budget=0.05)
    assert seconds.shape == (3,) and (np.diff(seconds) >= 0).all() and seconds[0] > 0
    cost = {"parameters": (parameters,), "macs": (macs,), "bytes": (1000,), "latency_ms": (1.0, 2.0, 3.0)}
    cost["images_per_second"] = (10.0, 20.0, 30.0)
    assert inference.medians(cost)["latency_ms"] == 2 and inference.medians(cost)["parameters"] == parameters
    text = report.cost_text(cost, cost | {"parameters": (10 * parameters,), "latency_ms": (1.0, 0.5, 3.0)})
    assert "1/10 " in text and "4 x" in text and "2.00 ms (1.00 ms to 3.00 ms)" in text


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


def test_logits_that_are_not_finite_are_an_error():
    class Broken(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 10), float("nan"))

    images = Images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="not finite: train it again with a lower --lr"):
        held_out_logits(Broken(), images, SPEC, CPU)


def test_a_pictures_probabilities_are_those_of_its_logits_softened():
    model, images = TinyTeacher().eval(), random_images(3)
    logits = held_out_logits(model, images, SPEC, CPU)
    for temp in (1.0, 5.0):
        found = inference.classify(model, images.pixels.numpy(), SPEC, CPU, temp)
        torch.testing.assert_close(found, (logits / temp).softmax(1), rtol=1e-4, atol=1e-6)


def test_export_runs_without_the_project(tmp_path):
    model = build_model("student").to(memory_format=torch.channels_last).eval()
    assert inference.export_model(model, tmp_path / "student.pt2", describe_data(SPEC)) < 1e-4
    files = {"preprocessing.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=files).module()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    preprocessing = json.loads(files["preprocessing.json"])
    assert preprocessing["classes"] == list(SPEC.classes) and preprocessing["mean"] == list(SPEC.mean)
