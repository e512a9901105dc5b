"""A student of the user's own: imported by its name, checked, and given logits in float32."""

import importlib
import os
import sys

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.vgg import Float32Linear
from runtime.errors import UserError

MODEL_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, LookupError, ImportError, OSError)


def build_own(name: str, num_classes: int, size: int) -> nn.Module:
    """The model that MODULE:FUNCTION returns, its last linear layer in float32; UserError if it is no classifier."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(f"--student {name} can't be imported: {error}") from error
    images = torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    try:
        model = builder(num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"--student {name} returns a {type(model).__name__}, not a torch.nn.Module")
        with torch.no_grad():
            other = builder(num_classes=num_classes).train()  # not `model`, whose batch norm this would change
            outputs = [model.eval()(images), other(images)]
            outputs.append(convert_conv2d_weight_memory_format(model, torch.channels_last)(images))  # as in most runs
    except MODEL_ERRORS as error:
        called = f"num_classes={num_classes} and images {tuple(images.shape)}"
        raise UserError(f"--student {name} fails with {called}: {error}") from error
    if not {*model.parameters()}.isdisjoint(other.parameters()):  # a run would continue an earlier one's weights
        raise UserError(f"--student {name} returns the same weights in each call: make a new model")
    for output in outputs:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if found != (2, num_classes):
            raise UserError(f"--student {name} returns {found} for 2 images, not a tensor of {(2, num_classes)}")
    layer = last_linear(model)
    if layer is None or layer.out_features != num_classes:
        raise UserError(f"--student {name} must end in a trainable nn.Linear with {num_classes} outputs")
    if type(layer) is nn.Linear:
        layer.__class__ = Float32Linear  # the same weights and names, another forward
    return model.train()


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The last linear layer with a weight to train, in the order of the modules: that of the logits."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layers = [m for m in linear if isinstance(m.weight, nn.Parameter) and m.weight.requires_grad]
    return layers[-1] if layers else None
