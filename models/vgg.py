"""VGG19 with batch normalisation (Simonyan & Zisserman, 2015, table 1, configuration E)."""

import torch
import torch.nn.functional as F
from torch import nn

CONFIGURATION_E = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)  # widths, one row per resolution


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution, (B, I, H, W) -> (B, O, H, W); a matrix product for small maps on a CPU (docs/speed.md)."""

    product_up_to = 0  # the largest map side that is computed as a product; see `use_products`

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        if max(height, width) > self.product_up_to:
            return super().forward(images)
        # Nine shifted maps side by side times the weights, (B H W, 9 I) x (9 I, O), in the order of channels_last.
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        shifts = [padded[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(shifts, dim=3), weight, self.bias).permute(0, 3, 1, 2)


def use_products(model: nn.Module, up_to: int) -> nn.Module:
    """Let a model compute convolutions of maps up to this side (0: none) as matrix products, in place."""
    for module in model.modules():
        if isinstance(module, Conv3x3):
            module.product_up_to = up_to
    return model


class Float32Linear(nn.Linear):
    """A linear layer without autocast: logits rounded to bfloat16 would often tie."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def initialise(model: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al., 2015), small linear weights; batch norm stays as torch makes it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def make_layers(rows: tuple[tuple[int, ...], ...], bias: bool) -> nn.Sequential:
    """3 x 3 convolutions, a max pool after each row; with biases the state dict has the keys of torchvision's VGG."""
    layers: list[nn.Module] = []
    channels = 3
    for row in rows:
        for width in row:
            convolution = Conv3x3(channels, width, bias)
            if bias:  # frozen at zero: batch norm cancels a bias, so its gradient would be rounding noise
                nn.init.zeros_(convolution.bias).requires_grad_(False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """Images (B, 3, S, S) -> logits (B, num_classes); five pools leave S / 32 cells per side, which are averaged."""

    def __init__(self, rows: tuple[tuple[int, ...], ...], num_classes: int) -> None:
        super().__init__()
        self.features = make_layers(rows, bias=True)
        self.classifier = Float32Linear(rows[-1][-1], num_classes)
        initialise(self)
        # At first each convolution's first filters copy its input channels (K. Jordan, 2024; docs/recipe.md).
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight.data[: module.in_channels])

    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))


def vgg19_bn(num_classes: int = 10) -> nn.Module:
    """VGG19-BN: 20.0 M parameters, 398 M multiply-accumulates per image of 32 x 32."""
    return VGG(CONFIGURATION_E, num_classes)
