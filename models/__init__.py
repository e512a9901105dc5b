"""The teacher and the student, by role."""

from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.own import build_own
from models.student import StudentCNN
from models.vgg import use_products, vgg19_bn

BUILDERS = {"teacher": vgg19_bn, "student": StudentCNN}


def build_model(role: str, num_classes: int = 10) -> nn.Module:
    """A new model of a role ("teacher" | "student"): `.features`, then a linear `.classifier`; ValueError otherwise."""
    if role not in BUILDERS:
        raise ValueError(f"role must be one of {', '.join(BUILDERS)}, not {role!r}")
    return BUILDERS[role](num_classes)


def build_model_of(run, runtime) -> nn.Module:
    """A new model of a run on its device: ours, or the user's own student; UserError if that is no classifier."""
    own = run.student
    model = build_own(own, run.num_classes, run.size) if own else build_model(run.role, run.num_classes)
    use_products(model, 0 if run.compile else runtime.max_product_side)
    return convert_conv2d_weight_memory_format(model.to(runtime.device), runtime.memory_format)
