"""The models: what they compute, cost and start from."""

import pytest
import torch
import torchvision

from data_sets import SIDE
from evaluation.inference import count_macs, count_parameters
from models import BUILDERS, StudentCNN, build_model, vgg19_bn


def test_vgg_features_are_torchvisions():
    torch.manual_seed(0)
    with torch.device("meta"):  # its classifier of 124 M weights is never filled in
        theirs = torchvision.models.vgg19_bn(weights=None).features
    theirs, ours = theirs.to_empty(device="cpu").eval(), vgg19_bn().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
        if isinstance(module, torch.nn.BatchNorm2d):  # no identity, so that each must be in its place
            module.reset_parameters()
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


def test_costs_are_what_the_docstrings_say():
    student, teacher = StudentCNN().eval(), vgg19_bn().eval()
    weights, of_teacher = count_parameters(student), count_parameters(teacher)
    macs, macs_of_teacher = count_macs(student), count_macs(teacher)
    text = " ".join(StudentCNN.__doc__.split())
    assert f"{weights:,} parameters, 1/{round(of_teacher / weights)} of the teacher's" in text
    assert f"{macs / 1e6:.1f} M multiply-accumulates" in text
    assert text.endswith(f", 1/{round(macs_of_teacher / macs)} of the teacher's.")
    said = f"{of_teacher / 1e6:.1f} M parameters, {macs_of_teacher / 1e6:.0f} M multiply-accumulates"
    assert said in vgg19_bn.__doc__


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_logits_are_float32_whatever_the_precision(role):
    model = build_model(role).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = model.features(images).flatten(1)
        logits = model(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, torch.nn.functional.linear(features.float(), *model.classifier.parameters()))
    assert not torch.equal(logits, logits.bfloat16().float())


def test_build_model_builds_each_role_and_refuses_others():
    assert isinstance(build_model("student"), StudentCNN)
    for role, size in (("teacher", SIDE), ("teacher", 96), ("student", SIDE), ("student", 96)):
        assert build_model(role, 7)(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert set(BUILDERS) == {"teacher", "student"}
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
