"""The teacher and the student, by role."""

from torch import nn

from models.convolution import use_products
from models.student import StudentCNN
from models.vgg import vgg19_bn

__all__ = ["StudentCNN", "build_model", "use_products", "vgg19_bn"]
BUILDERS = {"teacher": vgg19_bn, "student": StudentCNN}


def build_model(role: str, num_classes: int = 10) -> nn.Module:
    """A new model of a role ("teacher" | "student"): `.features`, then a linear `.classifier`; ValueError otherwise."""
    if role not in BUILDERS:
        raise ValueError(f"role must be one of {', '.join(BUILDERS)}, not {role!r}")
    return BUILDERS[role](num_classes)
