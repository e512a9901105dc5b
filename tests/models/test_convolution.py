"""Small maps as a matrix product: the same function, gradients and training step as nn.Conv2d."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import build_model, use_products
from models.vgg import Conv3x3
from runtime import device


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_product_passes_gradcheck_and_equals_a_convolution(side):
    torch.manual_seed(0)
    convolution = Conv3x3(3, 5, bias=True).double()
    images = torch.randn(2, 3, side, side, dtype=torch.double, requires_grad=True)
    expected = convolution(images)
    use_products(convolution, 4)
    torch.testing.assert_close(convolution(images), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(convolution, {"weight": w, "bias": b}, x),
        (images, convolution.weight, convolution.bias),
    )


def test_only_maps_up_to_the_limit_are_products(monkeypatch):
    convolution = use_products(Conv3x3(3, 4, bias=False), 4)
    monkeypatch.setattr(F, "linear", lambda *arguments: pytest.fail("computed as a product"))
    assert convolution(torch.randn(1, 3, 5, 5)).shape == (1, 4, 5, 5)
    with pytest.raises(pytest.fail.Exception):
        convolution(torch.randn(1, 3, 4, 4))


def test_gradients_in_bfloat16_are_those_of_a_convolution():
    torch.manual_seed(0)
    plain = Conv3x3(64, 64, bias=False)
    products = use_products(copy.deepcopy(plain), 4)
    grads = []
    for convolution in (plain, products):
        images = torch.randn(8, 64, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            maps = convolution(images.contiguous(memory_format=torch.channels_last))
        assert maps.dtype == torch.bfloat16
        maps.float().square().sum().backward()
        grads.append((images.grad, convolution.weight.grad))
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() < 0.01 * a.norm()


def test_all_convolutions_of_a_model_are_switched():
    model = use_products(build_model("teacher"), 4)
    assert {module.product_up_to for module in model.modules() if isinstance(module, Conv3x3)} == {4}


@pytest.mark.parametrize(
    ("kind", "precision", "amx", "avx512_bf16", "name", "side"),
    [
        ("cpu", "bf16", True, True, "Intel", 4),
        ("cpu", "bf16", False, True, "Intel", 0),  # emulated
        ("cpu", "bf16", False, True, "AMD", 4),
        ("cpu", "fp32", False, True, "AMD", 0),
        ("cpu", "fp32", True, True, "Intel", 4),
        ("cpu", "fp16", True, True, "Intel", 0),
        ("cuda", "bf16", True, True, "Intel", 0),
        ("mps", "fp32", True, True, "Apple", 0),
    ],
)
def test_where_products_are_used(monkeypatch, kind, precision, amx, avx512_bf16, name, side):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(device, "processor", lambda: name)
    assert device.Runtime(torch.device(kind), device.PRECISIONS[precision]).max_product_side == side
