"""Checkpoints: plain tensors, numbers and strings that say themselves what they are."""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import matplotlib
import numpy
import torch
import torchvision

from datasets import DATASETS
from runtime.errors import UserError, reason
from runtime.files import writing
from runtime.identity import Identity

FORMAT = 2


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    modules = (torch, torchvision, numpy, matplotlib)
    return {module.__name__: str(module.__version__) for module in modules}


def save(path: Path, content: dict) -> None:
    """Write a dict of plain values and tensors to `path`, atomically and durably."""
    buffer = io.BytesIO()  # a disk that is full is an OSError then, not one of the many of torch's own writer
    torch.save({"format": FORMAT, **content}, buffer)
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path, **expected) -> dict:
    """Read what `save` wrote, tensors on the CPU, its `identity` as an Identity; no code in the file is ever run.

    `spec` is then the data set as the checkpoint has it, or None where this version knows none of that name.

    UserError where the file is missing, damaged, of a newer format, or says of itself something else
    than `expected` (`role="teacher"`, `dataset="cifar10"`, ...).
    """
    wanted = "expected a checkpoint of this project" + "".join(f", {k} {v}" for k, v in expected.items())
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not check the CRCs
                raise zipfile.BadZipFile(f"{damaged} fails its check sum")
            if any(entry.external_attr for entry in archive.infolist()):  # what is called a folder, torch does not read
                raise zipfile.BadZipFile("an entry has attributes, which torch never writes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how torch would read this file otherwise
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["format"]
        content["model"]  # noqa: B018
        if found in (1, FORMAT):
            run = Identity(content["identity"] if found == FORMAT else facts_of_format_1(content))
            row = DATASETS.get(run["dataset"])
            content |= {"identity": run, "spec": row and row.described(content.get("data"))}
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {reason(error)}") from error
    except Exception as error:  # what a damaged file leads to is anybody's guess
        raise UserError(f"{path} is damaged or no checkpoint; {wanted}") from error
    if found not in (1, FORMAT):
        raise UserError(f"{path} has format {found}, this version reads up to {FORMAT}: update the project")
    if content["spec"]:
        expected["num_classes"] = len(content["spec"].classes)
    for name, value in expected.items():
        if content["identity"][name] != value:
            raise UserError(f"{path} holds {name} {content['identity'][name]}; {wanted}")
    return content


def facts_of_format_1(content: dict) -> dict:
    """The facts of a run before there was Muon, when its checkpoint did not say on what machine it ran."""
    options = dict(content["options"])
    options |= {"temp": options["temp"][0], "teacher": content["teacher"]} if content["kd"] else {}
    described = {name: content[name] for name in ("role", "architecture", "num_classes", "dataset", "kd")}
    return {**described, "optimizer": "sgd", **options, "torch": content["versions"].get("torch")}


def load_weights(model: torch.nn.Module, content: dict, path: Path) -> torch.nn.Module:
    """Put a checkpoint's weights into `model`; UserError where they don't fit."""
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the model {type(model).__name__}: damaged or of another version"
        ) from error
    return model


def fingerprint(state: dict[str, torch.Tensor], *context) -> str:
    """A hash of weights, and of whatever else logits depend on, as 16 hexadecimal digits."""
    digest = hashlib.sha256(repr(context).encode())
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
