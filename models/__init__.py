"""The teacher and the student, by role."""

from torch import nn

from models.own import build_own
from models.student import StudentCNN
from models.vgg import vgg19_bn

BUILDERS = {"teacher": vgg19_bn, "student": StudentCNN}


def build_model(role: str, num_classes: int = 10) -> nn.Module:
    """A new model of a role ("teacher" | "student"): `.features`, then a linear `.classifier`; ValueError otherwise."""
    if role not in BUILDERS:
        raise ValueError(f"role must be one of {', '.join(BUILDERS)}, not {role!r}")
    return BUILDERS[role](num_classes)


def build_model_of(run) -> nn.Module:
    """A new model of a run: ours, or the user's own student; UserError if that is no classifier."""
    if run.student:
        return build_own(run.student, run.num_classes, run.size)
    return build_model(run.role, run.num_classes)
