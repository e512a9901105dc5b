"""What else could make a recipe better: levers that are not built in, on training images kept aside.

    python benchmarks/levers.py --role teacher --images 5000 --num_epochs 4 --seeds 3 --json levers.json

The recipe and three variants of it are trained from the same seeds: batches of 512, cutout (DeVries & Taylor, 2017)
and a first layer that starts as a whitening of 3 x 3 patches (K. Jordan, 2024, section 3.2). Four things can be read
off each training when it has ended: the model itself; with batch norm's statistics measured anew, as a smaller
momentum would have it; with its weights averaged over the last steps (Izmailov et al., 2018); and the mean over an
image and its mirror image, which is another measure and no better model. Nothing here sees the test set.
"""

import argparse
import contextlib
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ours import on_device, train_whole

import config
from evaluation.report import table, write_json
from runtime.device import Runtime
from training.run import Run
from utils import Images, Views, evaluate, load_images

HELD_OUT = 5_000  # the last training images
LARGE_BATCH = 512
HOLE = 16  # pixels, half an image's side
AVERAGED = 0.15  # of all steps, the last ones
MEASURED = 5_000  # views that batch norm's statistics are measured on
VARIANTS = ("recipe", f"batch {LARGE_BATCH}", "cutout", "whitened")
READINGS = ("as it ends", "statistics anew", "weights averaged", "with mirror images")


class AveragingRun(Run):
    """A run that also averages its weights over its last steps."""

    averaged = None

    def update(self, loss: torch.Tensor) -> None:
        super().update(loss)
        done = (self.epoch * self.steps + self.step + 1) / self.total_steps
        if done > 1 - AVERAGED:
            self.averaged = self.averaged or AveragedModel(self.model)
            self.averaged.update_parameters(self.model)


class ViewsWithHoles(Views):
    """Views of which each lacks a square, of the mean colour, around a random pixel."""

    def batch(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = super().batch(rows, views)
        pixels = torch.arange(images.shape[-1], device=images.device)
        centres = torch.randint(len(pixels), (2, len(images), 1), device=images.device)
        rows, columns = (pixels - centres + 0.5).abs() < HOLE / 2
        hole = rows[:, None, :, None] & columns[:, None, None, :]
        return images.masked_fill(hole, 0), labels


class WithMirrors(nn.Module):
    """A model that answers with the mean of its logits for an image and for its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return (self.model(images) + self.model(images.flip(3))) / 2


def some_batches(views: Views, seed: int) -> list[torch.Tensor]:
    """Views of training images, in batches."""
    order, view_of = views.plan(seed, 0)
    return [views.batch(rows, view_of[rows])[0] for rows in order[:MEASURED].split(500)]


def start_as_whitening(model: nn.Module, views: Views, seed: int) -> None:
    """Make the first filters the principal directions of 3 x 3 patches, of one variance each, and their negatives."""
    weight = model.features[0].weight
    images = torch.cat(some_batches(views, seed))
    patches = F.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches.T.cov())
    filters = (directions / (variances + 1e-2).sqrt()).T.unflatten(1, weight.shape[1:])
    filters = torch.cat([filters, -filters])[: len(weight)]
    with torch.no_grad():
        weight[: len(filters)] = filters


class Trial:
    """The images, and how a variant is trained on them and read."""

    def __init__(self, arguments: argparse.Namespace, options: config.TrainOptions, runtime: Runtime) -> None:
        """UserError where the data can't be had."""
        split = load_images(options.spec, options.data_path, "train", "holdout", holdout=HELD_OUT)
        self.images: Images = split[0][: arguments.images].to(runtime.device)
        self.held_out: Images = split[1].to(runtime.device)
        self.options, self.runtime = replace(options, holdout=HELD_OUT, precision=runtime.precision), runtime

    def read(self, variant: str, seed: int) -> dict[str, float]:
        """Held-out top-1 (%) of each reading of one training."""
        options = replace(self.options, seed=seed)
        if variant.startswith("batch"):
            options = replace(options, batch_size=LARGE_BATCH)
        kind = ViewsWithHoles if variant == "cutout" else Views
        views = kind(self.images, options.spec, options.views)
        run = AveragingRun(options, self.runtime, views)
        if variant == "whitened":
            start_as_whitening(run.model, views, seed)
        train_whole(run, views)
        top1 = [self.top1(run.model), 0.0, 0.0, self.top1(WithMirrors(run.model))]
        for place, model in ((1, run.model), (2, run.averaged)):
            with self.runtime.autocast():
                update_bn(some_batches(views, seed), model)
            top1[place] = self.top1(model)
        return dict(zip(READINGS, top1, strict=True))

    def top1(self, model: nn.Module) -> float:
        return 100 * evaluate(model, self.held_out, self.options.spec, self.runtime)["top1"]


def results_table(results: list[dict]) -> str:
    """A row a variant, a column a reading: mean over the seeds, and the difference from the recipe as it ends."""
    usual = {result["seed"]: result["top1"][READINGS[0]] for result in results if result["variant"] == VARIANTS[0]}
    rows = []
    for variant in dict.fromkeys(result["variant"] for result in results):
        cells = [variant]
        for reading in READINGS:
            top1 = {r["seed"]: r["top1"][reading] for r in results if r["variant"] == variant}
            gains = [value - usual[seed] for seed, value in top1.items()]
            spread = f" ± {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
            cells.append(f"{statistics.mean(top1.values()):.2f}% ({statistics.mean(gains):+.2f}{spread})")
        rows.append(cells)
    return table(["trained", *READINGS], rows)


def compare(arguments: argparse.Namespace, options: config.TrainOptions, runtime: Runtime) -> None:
    """Do the trials, print the table and keep the results."""
    trial, results = Trial(arguments, options, runtime), []
    with contextlib.redirect_stdout(sys.stderr):  # progress is no part of the table
        for seed in range(options.seed, options.seed + arguments.seeds):
            for variant in (VARIANTS[0], *arguments.variants):
                result = {"variant": variant, "seed": seed, "top1": trial.read(variant, seed)}
                print(result, flush=True)
                results.append(result)
    print(
        f"{arguments.role}, {len(trial.images):,} images, {options.num_epochs} epochs, {len(trial.held_out):,} kept "
        f"aside, {arguments.seeds} seeds: mean top-1 (and over the recipe as it ends)\n\n{results_table(results)}"
    )
    if arguments.json:
        settings = {"role": arguments.role, "images": len(trial.images), "num_epochs": options.num_epochs}
        write_json(arguments.json, settings | {"results": results})


def main(argv: list[str] | None = None) -> int:
    """Run the trials of `argv` (None: the command line), whose further options are train.py's; the exit code."""
    parser = config.Parser("levers.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=("teacher", "student"), default="teacher", help="(default: teacher)")
    parser.add_argument("--images", type=config.number(int, at_least=LARGE_BATCH), default=5_000)
    parser.add_argument("--seeds", type=config.number(int, at_least=1), default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:])
    parser.add_argument("--json", type=config.file_name, help="file for the results")
    arguments, further = parser.parse_known_args(argv)
    options = config.parse_train([*further, f"--tto={arguments.role == 'teacher'}"])
    return on_device(options, lambda runtime: compare(arguments, options, runtime))


if __name__ == "__main__":
    sys.exit(main())
