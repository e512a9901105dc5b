"""Accuracy over seconds of training: this project and the baseline loop, on held-out training images.

    python benchmarks/time_to_accuracy.py --role teacher --images 10000 --json results.json --figure teacher.png
    python benchmarks/time_to_accuracy.py --images 1000 --lengths 1 2    a rough one in a few minutes
    python benchmarks/time_to_accuracy.py --device cuda   further options are train.py's, for our side

Both sides train on the same images at each of --lengths, every length with its own learning rate schedule; the last
epoch counts. The baseline loop has a cosine schedule, and the best of its --baseline_lr counts at each length. The
seconds are those of training alone. With --json FILE each finished run is saved at once, and not repeated.
"""

import contextlib
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import baseline_loop as baseline

import config
from evaluation.report import table
from runtime.cli import Parser, file_name
from runtime.device import Runtime, device_title, machine
from runtime.errors import UserError, exit_code
from runtime.files import write_json
from runtime.processes import start
from train import train_epoch
from training.run import Run
from training.runs import plan
from utils import Views, epoch_view, evaluate, figure_style, load_images, new_panels, save_figure

# Peak learning rates, of which the best result counts, and the fraction of the steps for warm-up: VGG19, which has no
# shortcuts, learns nothing in few steps at a higher rate or without warm-up.
BASELINE_LR, BASELINE_WARM_UP = {"teacher": (0.01, 0.02), "student": (0.1, 0.2)}, {"teacher": 0.1, "student": 0.0}
FIXED_OPTIONS = ("--tto", "--kd", "--all", "--nu", "--sub", "--hold", "--size", "--omit", "--student", "--det")
SIDES = {"ours": "ours", "baseline": "baseline loop"}


def lr_factor(step: int, total: int, warm_up: float) -> float:
    """The baseline loop's learning rate as a fraction of its peak, 0 <= step < total: a linear rise, then a cosine."""
    rising = int(total * warm_up)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1))) / 2


class Bench:
    """Images, options and device of this benchmark, and how each side trains on them."""

    def __init__(self, options: config.TrainOptions, count: int | None, runtime: Runtime) -> None:
        """Train on the first `count` images (None: all that are not held out)."""
        self.runtime = runtime
        self.data = load_images(options.dataset, options.data_path, runtime, options.flip, options.skip_broken)
        whole = len(self.data.train)
        (self.run,) = plan(replace(options, holdout=whole // 10), self.data.spec, runtime.precision, 1)
        self.rows = self.data.rows(None, self.run.holdout)[:count]
        if len(self.rows) < baseline.BATCH_SIZE:
            raise UserError(f"{len(self.rows)} images are fewer than a batch of {baseline.BATCH_SIZE}: give more")
        self.held_out = self.data.held_out(None, self.run.holdout)

    def settings(self, side: str, epochs: int, lr: float | None = None) -> dict:
        """Everything that shapes a training's result, as JSON has it; `lr` is the baseline loop's."""
        run = asdict(replace(self.run, num_epochs=epochs))
        if side == "baseline":
            run = {name: run[name] for name in ("role", "dataset", "images", "holdout", "flip", "num_epochs", "seed")}
            run |= {"lr": lr, "warm_up": BASELINE_WARM_UP[self.run.role]}
        return json.loads(json.dumps({"side": side, "train_images": len(self.rows), **run, **machine(self.runtime)}))

    def train(self, settings: dict) -> dict[str, float]:
        """The seconds of a training, and its top-1 (0 to 1) on the held-out images."""
        model, seconds, runtime = (self.train_ours if settings["side"] == "ours" else self.train_baseline)(settings)
        try:
            top1 = evaluate(model, self.held_out, self.data.spec, runtime)["top1"]
        except UserError:  # it has diverged
            top1 = 0.0
        return {"seconds": seconds, "top1": top1}

    def train_ours(self, settings: dict) -> tuple[torch.nn.Module, float, Runtime]:
        """The model that train.py's loop trains, its seconds, and the runtime to evaluate it in."""
        config, seconds = replace(self.run, num_epochs=settings["num_epochs"]), 0.0
        run = Run(config, self.runtime, self.data.spec, len(self.rows), files=None)
        run.saved_at = math.inf  # no resume state is saved
        views = Views(self.data.train, self.data.spec, self.runtime.device)
        while run.epoch < config.num_epochs:
            k = epoch_view(config.views, config.flip, config.seed, run.epoch)
            train_epoch(run, views, self.rows, k, None)
            run.count_time()
            seconds += run.seconds
            run.begin_epoch(run.epoch + 1)
        return run.model, seconds, self.runtime

    def train_baseline(self, settings: dict) -> tuple[torch.nn.Module, float, Runtime]:
        """The same for the baseline loop; the DataLoader's start-up is not timed."""
        torch.manual_seed(settings["seed"])
        device, spec, images = self.runtime.device, self.data.spec, self.data.train[self.rows]
        steps, warm_up = settings["num_epochs"] * (len(images) // baseline.BATCH_SIZE), settings["warm_up"]
        model, optimizer = baseline.baseline_model(settings["role"], len(spec.classes), device, settings["lr"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, warm_up))
        with contextlib.closing(baseline.baseline_batches(images, spec, baseline.BATCH_SIZE, device)) as endless:
            batches = itertools.chain([next(endless)], endless)
            begun = time.perf_counter()
            baseline.baseline_steps(model, optimizer, batches, device, steps, schedule=schedule)
            self.runtime.synchronize()
            seconds = time.perf_counter() - begun
        return model, seconds, replace(self.runtime, precision="fp32")


def read_results(path: Path | None) -> list[dict]:
    """The runs that an earlier call finished: {"settings", "seconds", "top1"} each; UserError for another file."""
    content = json.loads(path.read_text()) if path and path.exists() else {"trainings": []}
    if "trainings" not in content:
        raise UserError(f"{path} holds no results of this benchmark: give another --json file")
    return content["trainings"]


def run_all(wanted: list[dict], train, path: Path | None) -> list[dict]:
    """The results of all wanted settings; `train` gets those that are not in the file yet."""
    results = read_results(path)
    for settings in wanted:
        if settings not in [result["settings"] for result in results]:
            print(f"{settings['side']}, {settings['num_epochs']} epochs", flush=True)
            results.append({"settings": settings, **train(settings)})
            if path is not None:
                write_json(path, {"trainings": results})
    return [result for result in results if result["settings"] in wanted]


def best_curves(results: list[dict]) -> dict[str, list[tuple[int, float, float, float]]]:
    """Each side's (epochs, lr, seconds, top-1 in percent) by length, with the best lr at each length."""
    best: dict[tuple, tuple] = {}
    for result in sorted(results, key=lambda result: result["top1"]):  # the best of a length comes last
        side, epochs, lr = (result["settings"][name] for name in ("side", "num_epochs", "lr"))
        best[side, epochs] = epochs, lr, result["seconds"], 100 * result["top1"]
    return {side: [best[key] for key in sorted(best) if key[0] == side] for side in SIDES}


def time_to(curve: list[tuple[float, float]], target: float) -> tuple[float, float]:
    """The least and the most seconds to a top-1 (%), interpolated in log seconds; 0 before the curve, inf after it."""
    reached = next((i for i, (_, top1) in enumerate(curve) if top1 >= target), None)
    if reached is None:
        return curve[-1][0], math.inf
    seconds, top1 = curve[reached]
    if reached == 0:
        return (seconds if top1 == target else 0.0), seconds
    before, lower = curve[reached - 1]
    found = before * (seconds / before) ** ((target - lower) / (top1 - lower))
    return found, found


def bounds_text(low: float, high: float, pattern: str = "{:,.1f}") -> str:
    """A number that is known between bounds."""
    if low == high:
        return pattern.format(low)
    bounds = [f"> {pattern.format(low)}"] * (low > 0) + [f"< {pattern.format(high)}"] * (high < math.inf)
    return " and ".join(bounds) or "unknown"


def tables(best: dict[str, list[tuple]]) -> str:
    """The best runs of both sides, and the seconds of each to target accuracies with their ratio."""
    cells = []
    for side, points in best.items():
        for epochs, lr, seconds, top1 in points:
            cells.append([SIDES[side], f"{epochs}", f"{lr:g}", f"{seconds:,.1f}", f"{top1:.2f}%"])
    texts = [table(["side", "epochs", "peak lr", "seconds", "held-out top-1"], cells)]
    curves, rows = [[point[2:] for point in best[side]] for side in SIDES], []
    tops = [top1 for curve in curves for _, top1 in curve]
    for target in [target for target in range(5, 100, 5) if min(tops) <= target <= max(tops)]:
        ours, theirs = (time_to(curve, target) for curve in curves)
        ratio = theirs[0] / ours[1], theirs[1] / ours[0] if ours[0] else math.inf
        rows.append([f"{target}%", bounds_text(*ours), bounds_text(*theirs), bounds_text(*ratio, "{:.2f}")])
    if rows:
        texts.append(table(["held-out top-1", "ours, s", "baseline loop, s", "baseline / ours"], rows))
    return "\n\n".join(texts)


@figure_style
def plot(best: dict[str, list[tuple]], title: str, path: Path) -> Path:
    """Draw top-1 (%) over the seconds of training, one curve per side; return the figure's path."""
    (axes,) = new_panels(title, ["top-1 on held-out images (%)"], "seconds of training")
    axes.set_xscale("log")
    axes.margins(0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    style = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    for side, points in best.items():
        (line,) = axes.plot([p[2] for p in points], [p[3] for p in points], marker="o", label=SIDES[side])
        for epochs, _, *place in points:
            axes.annotate(f"{epochs} epoch{'s' * (epochs > 1)}", place, color=line.get_color(), **style)
    return save_figure(axes, path)


def parse(argv: list[str] | None) -> tuple:
    """This script's options and train.py's; exits with code 2 if one is wrong."""
    parser = Parser("time_to_accuracy.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=tuple(BASELINE_LR), default="teacher", help="(default: teacher)")
    parser.add_argument("--lengths", type=config.FROM_1, nargs="+", help="epochs of the runs (default: 1 2 4 8)")
    parser.add_argument("--images", type=config.FROM_1, help="train on the first N (default: all but a tenth)")
    parser.add_argument("--baseline_lr", type=config.ABOVE_0, nargs="+", help="peak rates of the baseline loop")
    parser.add_argument("--json", type=file_name, help="file for the finished runs")
    parser.add_argument("--figure", type=file_name, help="file for the figure, .png")
    arguments, further = parser.parse_known_args(argv)
    if fixed := [word for word in further if word.startswith(FIXED_OPTIONS)]:
        parser.error(f"{fixed[0]} is set by this benchmark: leave it out")
    words = [*further, f"--tto={arguments.role == 'teacher'}"]
    arguments.lengths = sorted(set(arguments.lengths or (1, 2, 4, 8)))
    arguments.baseline_lr = arguments.baseline_lr or BASELINE_LR[arguments.role]
    return arguments, config.parse_train(words)


def compare(arguments, options: config.TrainOptions) -> None:
    """Do the runs, print both tables and draw the figure."""
    with start(options.device, options.precision) as runtime:
        bench = Bench(options, arguments.images, runtime)
        sides = [("ours", None), *(("baseline", lr) for lr in arguments.baseline_lr)]
        # The sides take turns: other load on the machine affects both.
        wanted = [bench.settings(side, epochs, lr) for epochs in arguments.lengths for side, lr in sides]
        with contextlib.redirect_stdout(sys.stderr):  # progress
            if runtime.device.type != "cpu":  # in a first run, which doesn't count, kernels are loaded and chosen
                for side, lr in sides[:2]:
                    bench.train(bench.settings(side, 1, lr))
            results = run_all(wanted, bench.train, arguments.json)
        best = best_curves(results)
        what = f"{bench.run.role} on {len(bench.rows):,} images of {bench.run.dataset}"
        print(f"{what}, {len(bench.held_out):,} held out, seed {bench.run.seed}; {device_title(runtime)}")
        print(f"ours in {runtime.precision}, the baseline loop in float32; torch {torch.__version__}\n\n{tables(best)}")
    if arguments.figure:
        print(f"\nsaved {plot(best, what.capitalize(), arguments.figure)}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark with `argv` (None: the command line); return the exit code."""
    arguments, options = parse(argv)
    return exit_code(lambda: compare(arguments, options))


if __name__ == "__main__":
    sys.exit(main())
