"""All finished checkpoints of a data set at work, side by side."""

from dataclasses import replace

import torch

from config import Options
from evaluation import inference
from evaluation.measures import fidelity, measure
from runtime import checkpoint
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.processes import main_first
from utils import Images, all_logits, load_images


def as_trained(options: Options, runtime: Runtime, run: Identity) -> Runtime:
    """The runtime in which a checkpoint's log comes out again: float32, with --precision auto, if it was trained so."""
    if options.precision == "auto" and run["precision"] == "fp32":
        return replace(runtime, autocast_dtype=None)
    return runtime


def load_held_out(options: Options, runtime: Runtime) -> tuple[Images, torch.Tensor]:
    """The test images, or those that a holdout kept aside, on the device, and their labels on the CPU."""
    with main_first(runtime):
        (images,) = load_images(
            options.spec, options.data_path, options.split, subset=options.subset, holdout=options.holdout
        )
    return images.to(runtime.device), images.labels


def measure_all(contents: list[dict], options: Options, runtime: Runtime, cost: bool = False) -> list[dict]:
    """Checkpoints, teachers first, each with its `path`, with what is `measured` of them, with `cost` their speed too.

    What can't be loaded is named and left out. A student is compared with its own teacher, if that is among them, and
    one without KD with the first teacher.
    """
    images, labels = load_held_out(options, runtime)
    shown, teachers = [], {}  # the logits of each teacher, by its fingerprint
    for content in contents:
        run, path = content["identity"], content["path"]
        try:
            model, _ = inference.load_model(path, run["role"], options.dataset, options.spec, runtime.device)
        except UserError as error:  # of another version, or of weights that are no such model's
            runtime.print(f"left out: {error}")
            continue
        shown.append(content)
        its_runtime = as_trained(options, runtime, run)
        logits = all_logits(model, images, options.spec, its_runtime)
        numbers = measure(logits, labels)
        if run["role"] == "teacher":
            teachers[checkpoint.fingerprint(model.state_dict())] = logits
        elif teacher := run["teacher"] if run["kd"] else next(iter(teachers), None):
            numbers |= fidelity(logits, teachers[teacher], labels) if teacher in teachers else {}
        content["metrics"] = {key: 100 * numbers[key] for key in ("top1", "top5")}
        content["measured"] = numbers | {key: content[key] for key in ("seconds",) if key in content}
        if cost and runtime.is_main:
            content["measured"] |= inference.measure_cost(model, path, its_runtime).medians()
    return shown
