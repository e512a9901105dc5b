"""Checkpoints: plain tensors, numbers and strings, read without running code and checked by their checksums."""

import hashlib
import io
import pickle
import textwrap
import warnings
from pathlib import Path

import torch

from runtime.errors import UserError, reason
from runtime.files import UNREADABLE, check_archive, writing

RETRAIN = "train it again with --resume False (not --all), or give another file"


def save(path: Path, content: dict) -> None:
    """Write a dict of plain values and tensors to `path`, atomically."""
    buffer = io.BytesIO()  # a full disk is an OSError then, not one of torch's own writer
    torch.save(content, buffer)
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path, or_state_dict: bool = False) -> dict:
    """What `save` wrote, on the CPU, with its `path`; no code in it is run. UserError if missing, damaged or foreign.

    With `or_state_dict` also a plain state dict with the teacher's keys, as `model` and `path` alone.
    """
    advice = "give a state dict of our VGG19-BN (one Linear), or logits (docs/own.md)" if or_state_dict else RETRAIN
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint: give a file")
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how torch would read this file otherwise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: check the path") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {reason(error)}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds Python objects, not plain tensors and numbers: {advice}") from error
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged, or not a file of torch.save in PyTorch 1.6 or later: {advice}") from error
    content = content if isinstance(content, dict) else {}
    if or_state_dict and isinstance(content.get("classifier.weight"), torch.Tensor):
        return {"model": content, "path": path}
    if "run" not in content:
        found = f" (its first key is {next(iter(content))!r})" if content else ""
        raise UserError(f"{path} is not a checkpoint of this project{found}: {advice}")
    return content | {"path": path}


def load_weights(model: torch.nn.Module, content: dict) -> torch.nn.Module:
    """Put a checkpoint's weights into `model`; UserError if they don't fit."""
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        why = textwrap.shorten(str(error).partition("\n")[2], 160) or "other code saved it"
        model_name = type(model).__name__
        raise UserError(f"{content['path']} does not fit the model {model_name} ({why}): {RETRAIN}") from error
    return model


def fingerprint(state: dict[str, torch.Tensor], *context) -> str:
    """A hash of tensors, perhaps none, and of other values by their repr, as 16 hexadecimal digits."""
    digest = hashlib.sha256(repr(context).encode())
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
