"""The models: what they compute, cost and start from; their exported program; small maps as a matrix product."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import REPOSITORY

from data_sets import DATA_SETS, SIDE
from evaluation import inference, report
from models import StudentCNN, build_model, vgg19_bn
from models.vgg import Conv3x3, use_products
from runtime import device
from runtime.errors import UserError
from training.run import describe_data


def test_vgg_features_are_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"], batch_norm=True).eval()
    ours = vgg19_bn().eval()
    for module in theirs:
        if isinstance(module, torch.nn.BatchNorm2d):  # no identity, so that each must be in its place
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    ours.features.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = theirs(images)
        torch.testing.assert_close(ours.features(images), expected)
        torch.testing.assert_close(ours(images), ours.classifier(expected.flatten(1)))
    assert expected.shape == (2, 512, 1, 1) and expected.std() > 0


def test_a_model_can_be_cast():
    assert build_model("student").double()(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_costs_are_what_the_docstrings_say():
    student, teacher = StudentCNN().eval(), vgg19_bn().eval()
    weights, of_teacher = inference.count_parameters(student), inference.count_parameters(teacher)
    attention = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layers = [torch.nn.ReLU(inplace=True), torch.nn.Flatten(2), torch.nn.Linear(SIDE**2, 8), attention]
    by_hand = 3 * SIDE**2 * 8 + 3 * 8 * 24 + 2 * 3 * 3 * 8 + 3 * 8 * 8 + 2 * 3 * 8 * 16  # 3 tokens of 8 numbers
    assert inference.count_macs(torch.nn.Sequential(*layers).eval().requires_grad_(False)) == by_hand
    macs, macs_of_teacher = inference.count_macs(student), inference.count_macs(teacher)
    text = " ".join(StudentCNN.__doc__.split())
    assert f"{weights:,} parameters, 1/{round(of_teacher / weights)} of the teacher's" in text
    assert f"{macs / 1e6:.1f} M multiply-accumulates" in text
    assert text.endswith(f", 1/{round(macs_of_teacher / macs)} of the teacher's.")
    said = f"{of_teacher / 1e6:.1f} M parameters, {macs_of_teacher / 1e6:.0f} M multiply-accumulates"
    assert said in vgg19_bn.__doc__


def test_a_pass_is_timed_with_all_its_images_in_the_runs_precision(monkeypatch):
    clock, seen, seconds = [0.0], [], iter((9.0, 1.0, 2.0, 4.0))

    def model(images):
        seen.append((images.shape, torch.is_autocast_enabled("cpu")))
        clock[0] += next(seconds)

    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert inference.pass_seconds(model, 2, device.Runtime(torch.device("cpu"), "bf16"), 64) == 2.0
    assert seen == 4 * [((2, 3, 64, 64), True)]


def test_the_cost_is_told_beside_the_teachers():
    cost = {"parameters": 300, "macs": 2e6, "bytes": 1000, "latency_ms": 2.0, "images_per_second": 20.0}
    text = report.cost_text(cost, cost | {"parameters": 3000, "latency_ms": 0.5})
    assert all(word in text for word in ("1/10 ", "4 x", "2.00 ms", "2.0 M"))


def test_an_exported_model_runs_without_the_project_by_the_code_on_the_page(tmp_path):
    model, path = build_model("student").to(memory_format=torch.channels_last).eval(), tmp_path / "weights/student.pt2"
    described = describe_data(DATA_SETS["cifar10"])
    assert inference.export_model(model, path, described) < 1e-4
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(path).module()(images), model(images), rtol=1e-4, atol=1e-5)
    (code,) = re.findall("```python\n(.*?)```", (REPOSITORY / "docs" / "commands.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert sum(map(done.stdout.count, described["classes"])) == 8, done.stderr
    model.forward = lambda images: images if images.sum() > 0 else -images
    with pytest.raises(UserError, match="can't export this model: .+"):
        inference.export_model(model, path, described)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_logits_are_float32_whatever_the_precision(role):
    model = build_model(role).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = model.features(images).flatten(1)
        logits = model(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(features.float(), *model.classifier.parameters()))


def test_build_model_builds_each_role_and_refuses_others():
    assert isinstance(build_model("student"), StudentCNN)
    for role in ("teacher", "student"):
        assert build_model(role, 7)(torch.zeros(2, 3, 96, 96)).shape == (2, 7)
    with pytest.raises(ValueError, match="pupil"):
        build_model("pupil")


def test_the_teachers_first_filters_pass_its_channels_on():
    torch.manual_seed(0)
    convolutions = [module for module in vgg19_bn().features if isinstance(module, torch.nn.Conv2d)]
    images = torch.randn(1, 512, 8, 8)
    for convolution in convolutions:
        inputs, outputs = convolution.in_channels, convolution.out_channels
        with torch.inference_mode():
            found = convolution(images[:, :inputs])
        torch.testing.assert_close(found[:, :inputs], images[:, :inputs])
        others = convolution.weight[inputs:]
        assert len(others) == outputs - inputs and len(convolution.bias) == outputs and not convolution.bias.any()
        if len(others):  # Kaiming's, by the outputs of the whole layer
            assert others.std().item() == pytest.approx((2 / (9 * outputs)) ** 0.5, rel=0.05)
        assert not convolution.bias.requires_grad, "batch norm would remove it again"
    assert len(convolutions) == 16 and [c.out_channels - c.in_channels for c in convolutions].count(0) == 12


def test_the_student_starts_at_random():
    torch.manual_seed(0)
    for module in StudentCNN().modules():
        if isinstance(module, torch.nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert (module.weight == 0).sum() == 0, "no filter starts as the identity"
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1) and not module.bias.any()


@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_product_passes_gradcheck_and_equals_a_convolution(size):
    torch.manual_seed(0)
    convolution = Conv3x3(3, 5, bias=True).double()
    images = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    expected = convolution(images)
    use_products(convolution, 4)
    torch.testing.assert_close(convolution(images), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(convolution, {"weight": w, "bias": b}, x),
        (images, convolution.weight, convolution.bias),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution.float()(images.float()).dtype == torch.bfloat16


def test_only_maps_up_to_the_limit_are_products(monkeypatch):
    convolution = use_products(Conv3x3(3, 4, bias=False), 4)
    monkeypatch.setattr(F, "linear", lambda *arguments: pytest.fail("computed as a product"))
    assert convolution(torch.randn(1, 3, 5, 5)).shape == (1, 4, 5, 5)
    with pytest.raises(pytest.fail.Exception):
        convolution(torch.randn(1, 3, 4, 4))
    teacher = use_products(build_model("teacher"), 4)
    assert {module.product_up_to for module in teacher.modules() if isinstance(module, Conv3x3)} == {4}


@pytest.mark.parametrize(
    ("kind", "precision", "amx", "name", "side"),
    [
        ("cpu", "bf16", True, "Intel", 4),
        ("cpu", "bf16", False, "Intel", 0),  # emulated
        ("cpu", "bf16", False, "AMD", 4),
        ("cpu", "fp32", False, "AMD", 0),
        ("cpu", "fp32", True, "Intel", 4),
        ("cuda", "bf16", True, "Intel", 0),
    ],
)
def test_where_products_are_used(monkeypatch, kind, precision, amx, name, side):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": amx, "avx512_bf16": True})
    monkeypatch.setattr(device, "processor", lambda: name)
    assert device.Runtime(torch.device(kind), precision).max_product_side == side
    monkeypatch.setattr(device.sys, "platform", "win32")
    assert kind == "cuda" or device.has_fast_bf16(torch.device(kind)) == (name == "AMD"), "AMX is for Linux"
