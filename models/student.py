"""The student: a plain convolutional network, small enough to train in seconds per epoch."""

from torch import nn

from models.vgg import Float32Linear, initialise, make_layers

WIDTHS = ((32, 32), (64, 64), (128, 128))


class StudentCNN(nn.Module):
    """Images (B, 3, S, S) -> logits (B, num_classes).

    Three stages of two conv-BN-ReLU at 32, 64 and 128 channels with a 2 x 2 max pool between them, no residual block,
    global average pooling (Lin et al., 2014, section 3.2) and one linear layer: 288,746 parameters, 1/69 of the
    teacher's, and 38.6 M multiply-accumulates per image of 32 x 32, 1/10 of the teacher's.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = make_layers(WIDTHS, bias=False)
        self.features[-1] = nn.AdaptiveAvgPool2d(1)  # in place of the last max pool
        self.classifier = Float32Linear(WIDTHS[-1][-1], num_classes)
        initialise(self)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))
