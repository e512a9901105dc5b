"""The teacher and the student, by role."""

from torch import nn

from models.student import StudentCNN
from models.vgg import vgg19_bn

__all__ = ["ARCHITECTURES", "StudentCNN", "build_model", "vgg19_bn"]

BUILDERS = {"teacher": vgg19_bn, "student": StudentCNN}
# What a checkpoint says it holds; a change that old weights no longer fit gets a new number.
ARCHITECTURES = {"teacher": "vgg19_bn/1", "student": "student_cnn/1"}


def build_model(role: str, num_classes: int = 10) -> nn.Module:
    """A new model of a role ("teacher" | "student"): `.features`, then a linear `.classifier`; ValueError otherwise."""
    if role not in BUILDERS:
        raise ValueError(f"role must be one of {', '.join(BUILDERS)}, not {role!r}")
    return BUILDERS[role](num_classes)
