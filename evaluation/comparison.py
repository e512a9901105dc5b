"""All finished checkpoints of a data set at work, side by side."""

from dataclasses import replace
from pathlib import Path

import torch

from config import Options
from datasets import DatasetSpec
from evaluation.inference import load_model, measure_cost
from evaluation.measures import fidelity, measure
from evaluation.report import TOPS
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.processes import main_first
from runtime.signals import StopSignal
from utils import Images, all_logits, load_images


def as_trained(options: Options, runtime: Runtime, run: Identity) -> Runtime:
    """The runtime in which a checkpoint's log comes out again: float32, with --precision auto, if it was trained so."""
    if options.precision == "auto" and run["precision"] == "fp32":
        return replace(runtime, autocast_dtype=None)
    return runtime


def load_held_out(options: Options, spec: DatasetSpec, runtime: Runtime) -> Images:
    """The test images of a data set, or those of a holdout, on the device."""
    with main_first(runtime):
        (images,) = load_images(spec, options.data_path, options.split, subset=options.subset, holdout=options.holdout)
    return images.to(runtime.device)


def told(classes: tuple[str, ...]) -> str:
    """The first classes, and how many there are."""
    return ", ".join(classes[:5]) + (f", ... ({len(classes)})" if len(classes) > 5 else "")


def check_classes(classes: tuple[str, ...], content: dict, path: Path) -> None:
    """UserError where a checkpoint's classes are others."""
    if content["spec"].classes != classes:
        raise UserError(f"{path} knows the classes {told(content['spec'].classes)}, not {told(classes)}")


def compare_images(options: Options, found: DatasetSpec, content: dict, path: Path) -> list[str]:
    """What is to be said where a checkpoint was trained on other images than those of `found`.

    UserError where they are of other classes, or where it was trained on some that the options keep aside.
    """
    check_classes(found.classes, content, path)
    run = content["identity"]
    if run.has_seen_holdout(options.subset, options.holdout, found.train_images):
        raise UserError(f"--holdout {options.holdout}: {path} was trained on some of these images; give another one")
    return [] if found.fingerprint == run["images"] else [f"{path} was trained on other images than there are now"]


def logits_of(
    model: torch.nn.Module,
    content: dict,
    images: Images,
    options: Options,
    runtime: Runtime,
    stop: StopSignal | None = None,
) -> torch.Tensor:
    """A loaded checkpoint's logits (N, C) of images, normalised as in its training, in float32 if it was trained so.

    Raises what `all_logits` raises.
    """
    return all_logits(model, images, content["spec"], as_trained(options, runtime, content["identity"]), stop)


def measure_all(
    contents: list[dict],
    found: DatasetSpec,
    options: Options,
    runtime: Runtime,
    stop: StopSignal | None = None,
    cost: bool = False,
) -> list[dict]:
    """Checkpoints, teachers first, each with its `path`, with what is `measured` of them, with `cost` their speed too.

    They are measured on images of the data set `found`. What can't be loaded, or was trained on other ones or on these,
    is named and left out. A student is compared with its own teacher, if that is among them, and one without KD with
    the first teacher. Stopped where a signal came.
    """
    images = load_held_out(options, found, runtime)
    labels = images.labels.cpu()
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    for content in contents:
        run, path = content["identity"], content["path"]
        try:
            if other_images := compare_images(options, found, content, path):
                raise UserError(other_images[0])
            model, _ = load_model(path, run["role"], run["dataset"], runtime.device)
        except UserError as error:  # of another version, or of weights that are no such model's
            runtime.print(f"left out: {error}")
            continue
        shown.append(content)
        logits = logits_of(model, content, images, options, runtime, stop)
        numbers = measure(logits, labels)
        if run["role"] == "teacher":
            teachers[checkpoint.fingerprint(model.state_dict())] = logits
        elif teacher := run["teacher"] if run["kd"] else next(iter(teachers), None):
            numbers |= fidelity(logits, teachers[teacher], labels) if teacher in teachers else {}
        content["metrics"] = {key: 100 * numbers[key] for key in TOPS if key in numbers}
        content["measured"] = numbers | ({"seconds": content["seconds"]} if "seconds" in content else {})
        if cost and runtime.is_main:
            content["measured"] |= measure_cost(model, path, as_trained(options, runtime, run)).medians()
    return shown
