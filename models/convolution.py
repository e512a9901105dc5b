"""A convolution that computes small maps as a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution, (B, I, H, W) -> (B, O, H, W); of small maps on a CPU as a matrix product (docs/speed.md)."""

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
    """Let a model compute maps up to a side (0: none) as products, in place."""
    for module in model.modules():
        if isinstance(module, Conv3x3):
            module.product_up_to = up_to
    return model
