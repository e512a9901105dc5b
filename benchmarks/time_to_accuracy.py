"""How good after how many seconds of training: this project beside the usual loop, on training images kept aside.

    python benchmarks/time_to_accuracy.py --role teacher --images 10000 --json teacher.json --figure teacher.png
    python benchmarks/time_to_accuracy.py --quick         a rough one in a few minutes
    python benchmarks/time_to_accuracy.py --device cuda   further options are train.py's, for our side

Both sides train on the same images at each of --lengths, every length with a whole schedule of its own, because the
accuracy in the middle of a schedule says little; the last epoch counts. Ours is train.py's own loop and recipe. The
usual loop is plain.py's with what the well-known CIFAR repositories do (kuangliu/pytorch-cifar,
weiaicunzai/pytorch-cifar100): SGD, batch 128, a cosine to zero. Of several --plain_lr the best at each length counts:
chosen on the images on which it is reported, in favour of the usual loop. The seconds are those of training alone,
without evaluation and compilation. Nothing here sees the test set.

With --json FILE each finished training is on disk at once, and the same command goes on where it was cut off.
"""

import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plain import plain_batches, plain_steps

import config
from datasets import DatasetSpec
from evaluation.report import table
from models import build_model
from models.vgg import initialise
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import UserError, exit_code, reason
from runtime.files import locked, writing
from runtime.processes import start
from runtime.signals import StopSignal
from train import train_epoch
from training.run import Run, identity_of
from utils import COLOURS, Images, Views, evaluate, load_images, new_axes, save_figure

SIDES = {"ours": "ours", "plain": "usual loop"}  # as the tables and the figure call them
HELD_OUT = 0.1  # of the training set, its last images
LENGTHS, QUICK_LENGTHS = (1, 2, 4, 8), (1, 2)  # epochs
QUICK_IMAGES = {"teacher": 1_000, "student": 4_000}

# What both repositories do, and the loops that were copied from them.
PLAIN_BATCH, PLAIN_MOMENTUM, PLAIN_WEIGHT_DECAY = 128, 0.9, 5e-4
# Peak rates: 0.1 is both repositories' for every network; chengyangfu/pytorch-vgg-cifar10 takes half of it for VGGs.
PLAIN_LR = {"teacher": 0.05, "student": 0.1}
# Part of all steps in which the rate rises: sixteen layers without a shortcut may get lost where it starts at the peak.
PLAIN_WARM_UP = {"teacher": 0.1, "student": 0.0}
SETTLED = ("tto", "kd", "all", "num_epochs", "subset", "holdout", "weights_path", "plots_path")  # options of train.py
TARGET_STEPS, MOST_TARGETS = (1, 2, 5, 10), 12  # percentage points between two target accuracies, and how many

# ---------------------------------------------------------------------------------------------- trainings


@dataclass(frozen=True)
class Training:
    """One training to do: its side, its length in epochs, its seed, and the usual loop's peak rate."""

    side: str
    epochs: int
    seed: int
    lr: float | None = None  # None: our recipe's


def plan(lengths: list[int], seeds: range, rates: list[float]) -> list[Training]:
    """All trainings, the sides in turn: what else the machine does meets both."""
    trainings = []
    for seed, epochs in itertools.product(seeds, lengths):
        trainings.append(Training("ours", epochs, seed))
        trainings += [Training("plain", epochs, seed, lr) for lr in rates]
    return trainings


def plain_model(role: str, num_classes: int) -> nn.Module:
    """A role's network with the initialisation that torchvision's VGG has (He et al., 2015), and no identities."""
    model = build_model(role, num_classes)
    initialise(model)
    return model


def plain_factor(step: int, total: int, warm_up: float) -> float:
    """What the peak rate is multiplied by at step 0 <= step < total: a linear rise, then a cosine to zero."""
    rising = int(total * warm_up)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1))) / 2


class Bench:
    """Images, options and device of this benchmark, and how each side trains on them."""

    def __init__(self, options: config.TrainOptions, count: int | None, runtime: Runtime) -> None:
        """Train on the first `count` images (None: all that are not kept aside); UserError where there are fewer."""
        everything = load_images(options.spec, options.data_path, "train")[0]
        held_out = int(len(everything) * HELD_OUT)
        most = len(everything) - held_out
        if count is not None and count > most:
            raise UserError(f"--images {count}: there are {most}, for {held_out} are kept aside; give less")
        self.images, self.held_out = everything[:most][:count], everything[most:].to(runtime.device)
        self.options = replace(options, holdout=held_out, precision=runtime.precision)
        self.spec: DatasetSpec = options.spec
        self.runtime = runtime

    def our_options(self, training: Training) -> config.TrainOptions:
        return replace(self.options, num_epochs=training.epochs, seed=training.seed)

    def settings(self, training: Training) -> dict:
        """All that a training's result hangs on, as JSON knows it."""
        facts = identity_of(self.our_options(training), self.spec, self.runtime).facts
        if training.side == "plain":
            shared = ("role", "architecture", "dataset", "num_epochs", "seed", "holdout", "torch", "device")
            facts = {name: facts[name] for name in shared}
            facts |= {"optimizer": "sgd", "lr": training.lr, "batch_size": PLAIN_BATCH, "momentum": PLAIN_MOMENTUM}
            facts |= {"weight_decay": PLAIN_WEIGHT_DECAY, "warm_up": PLAIN_WARM_UP[self.options.role]}
        facts |= {"side": training.side, "images": len(self.images), "versions": checkpoint.versions()}
        return json.loads(json.dumps(facts))

    def train(self, training: Training) -> dict[str, float]:
        """The seconds of a training, and its top-1 (0 to 1) on the images kept aside."""
        if training.side == "ours":
            model, seconds = self.train_ours(self.our_options(training), self.images)
            return {"seconds": seconds, "top1": evaluate(model, self.held_out, self.spec, self.runtime)["top1"]}
        model, seconds = self.train_plain(training, self.images)
        try:
            in_float32 = replace(self.runtime, autocast_dtype=None)
            top1 = evaluate(model, self.held_out, self.spec, in_float32)["top1"]
        except UserError:  # it has diverged, and a NaN names no class
            top1 = 0.0
        return {"seconds": seconds, "top1": top1}

    def train_ours(self, options: config.TrainOptions, images: Images) -> tuple[nn.Module, float]:
        """The model that train.py's loop leaves, and the seconds it counted itself."""
        views = Views(images.to(self.runtime.device), self.spec, options.views)
        run, stop, seconds = Run(options, self.runtime, views), StopSignal(), 0.0
        while run.epoch < options.num_epochs:
            train_epoch(run, views, None, stop)
            seconds += run.seconds
            run.begin_epoch(run.epoch + 1)
        return run.model, seconds

    def train_plain(self, training: Training, images: Images) -> tuple[nn.Module, float]:
        """The model that the usual loop leaves, and its seconds; its workers have started before."""
        torch.manual_seed(training.seed)
        device, role, steps = self.runtime.device, self.options.role, len(images) // PLAIN_BATCH
        model = plain_model(role, len(self.spec.classes)).to(device)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=training.lr, momentum=PLAIN_MOMENTUM, weight_decay=PLAIN_WEIGHT_DECAY
        )
        total, warm_up = steps * training.epochs, PLAIN_WARM_UP[role]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: plain_factor(step, total, warm_up))
        with contextlib.closing(plain_batches(images, self.spec, PLAIN_BATCH, device)) as endless, default_float32():
            batches = itertools.chain([next(endless)], endless)
            self.runtime.synchronize()
            begun = time.perf_counter()
            for epoch in range(1, training.epochs + 1):
                top1 = plain_steps(model, optimizer, batches, device, steps, schedule=schedule)
                taken = time.perf_counter() - begun
                print(f"epoch {epoch}/{training.epochs}: train top1 {100 * top1:.2f}%, {taken:.1f} s", flush=True)
            self.runtime.synchronize()
            return model, time.perf_counter() - begun

    def warm_up(self) -> None:
        """One step of each side, not counted: kernels are chosen, memory is taken."""
        options = replace(self.options, num_epochs=1)
        self.train_ours(options, self.images[: options.batch_size])
        self.train_plain(Training("plain", 1, options.seed, lr=1e-3), self.images[:PLAIN_BATCH])


@contextlib.contextmanager
def default_float32():
    """Convolutions as torch does them where nobody asks: on CUDA in TF32, which this project turns off for fp32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# ---------------------------------------------------------------------------------------------- results on disk


def read_results(path: Path | None) -> list[dict]:
    """The trainings that a former run finished: {"settings", "seconds", "top1"} each; UserError for another file."""
    if path is None or not path.exists():
        return []
    try:
        results = json.loads(path.read_text())["trainings"]
        if not all(result.keys() == {"settings", "seconds", "top1"} for result in results):
            raise ValueError("other keys")
        return results
    except OSError as error:
        raise UserError(f"can't read {path}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of this benchmark: give another file by --json") from error


def write_results(path: Path | None, results: list[dict]) -> None:
    """Keep all results, atomically."""
    if path is not None:
        with writing(path) as temporary:
            temporary.write_text(json.dumps({"trainings": results}, indent=1) + "\n")


def run_all(wanted: list[dict], train: Callable[[int], dict[str, float]], path: Path | None) -> list[dict]:
    """The results of all wanted settings, in their order; `train` gets the place of each that is not on disk yet."""
    results = read_results(path)
    for place, settings in enumerate(wanted):
        title = f"{SIDES[settings['side']]}, {settings['num_epochs']} epochs, rate {settings['lr']:g}, seed "
        title += f"{settings['seed']} ({place + 1} of {len(wanted)})"
        found = find(results, settings)
        if found is None:
            print(title, flush=True)
            found = {"settings": settings, **train(place)}
            results.append(found)
            write_results(path, results)
        print(f"{title}: {found['seconds']:.1f} s, held-out top1 {100 * found['top1']:.2f}%", flush=True)
    return [find(results, settings) for settings in wanted]


def find(results: list[dict], settings: dict) -> dict | None:
    """The result with these very settings, or None."""
    return next((result for result in results if result["settings"] == settings), None)


# ---------------------------------------------------------------------------------------------- tables and figure


@dataclass(frozen=True)
class Point:
    """Trainings that differ in the seed alone: their seconds and their top-1 (%), one a seed."""

    side: str
    epochs: int
    lr: float
    seconds: tuple[float, ...]
    top1: tuple[float, ...]

    @property
    def mean(self) -> tuple[float, float]:
        """Mean seconds and mean top-1."""
        return statistics.mean(self.seconds), statistics.mean(self.top1)


def best_points(results: list[dict]) -> dict[str, list[Point]]:
    """Each side's points from short to long, of the rates that were tried at a length the best one's."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        settings = result["settings"]
        groups.setdefault((settings["side"], settings["num_epochs"], settings["lr"]), []).append(result)
    best: dict[tuple, Point] = {}
    for (side, epochs, lr), those in groups.items():
        point = Point(side, epochs, lr, tuple(r["seconds"] for r in those), tuple(100 * r["top1"] for r in those))
        rival = best.get((side, epochs))
        if rival is None or point.mean[1] > rival.mean[1]:
            best[side, epochs] = point
    return {side: sorted((p for p in best.values() if p.side == side), key=lambda p: p.epochs) for side in SIDES}


def time_to(curve: list[tuple[float, float]], target: float) -> tuple[float, float]:
    """The least and the most seconds to a top-1, by a curve of (seconds, top-1) from short to long trainings.

    Between two points straight in top-1 over log seconds, and both the same; outside of them nothing is invented:
    below the first point it took no longer than that, above all of them it takes longer than the last.
    """
    reached = next((i for i, (_, top1) in enumerate(curve) if top1 >= target), None)
    if reached is None:
        return curve[-1][0], math.inf
    seconds, top1 = curve[reached]
    if top1 == target:
        return seconds, seconds
    if reached == 0:
        return 0.0, seconds
    before, lower = curve[reached - 1]
    part = (target - lower) / (top1 - lower)
    found = before * (seconds / before) ** part
    return found, found


def bounds_text(low: float, high: float, pattern: str) -> str:
    """A number known between bounds: itself, above the lower, below the upper, or unknown."""
    if low == high:
        return pattern.format(low)
    if low > 0 and high < math.inf:
        return f"{pattern.format(low)} to {pattern.format(high)}"
    if low > 0:
        return f"> {pattern.format(low)}"
    return f"< {pattern.format(high)}" if high < math.inf else "unknown"


def targets(*curves: list[tuple[float, float]]) -> list[int]:
    """Round accuracies (%) between the lowest and the highest of all curves, not too many of them."""
    values = [top1 for curve in curves for _, top1 in curve]
    for step in TARGET_STEPS:
        found = list(range(math.ceil(min(values) / step) * step, math.floor(max(values)) + 1, step))
        if len(found) <= MOST_TARGETS:
            break
    return found


def points_table(points: dict[str, list[Point]]) -> str:
    """Every point of both sides: mean over the seeds, and its standard deviation where there are several."""
    rows = []
    for side, those in points.items():
        for point in those:
            seconds, top1 = point.mean
            spread = f" ± {statistics.stdev(point.top1):.2f}" if len(point.top1) > 1 else ""
            cells = [SIDES[side], f"{point.epochs}", f"{point.lr:g}", f"{seconds:,.1f}", f"{top1:.2f}%{spread}"]
            rows.append(cells)
    return table(["side", "epochs", "peak rate", "seconds", "held-out top-1"], rows)


def targets_table(ours: list[tuple[float, float]], plain: list[tuple[float, float]]) -> str:
    """The seconds of both curves to each target accuracy, and how many times longer the usual loop takes."""
    rows = []
    for target in targets(ours, plain):
        (our_low, our_high), (plain_low, plain_high) = time_to(ours, target), time_to(plain, target)
        ratio = plain_low / our_high, plain_high / our_low if our_low else math.inf
        times = [bounds_text(low, high, "{:,.1f}") for low, high in ((our_low, our_high), (plain_low, plain_high))]
        rows.append([f"{target}%", *times, bounds_text(*ratio, "{:.2f}")])
    return table(["held-out top-1", "ours, s", "usual loop, s", "usual loop / ours"], rows) if rows else ""


def unreached_text(ours: list[tuple[float, float]], plain: list[tuple[float, float]]) -> str:
    """What one side's trainings never reach of the other's accuracies, in a sentence, or nothing."""
    best = {"ours": max(ours, key=lambda point: point[1]), "plain": max(plain, key=lambda point: point[1])}
    behind, ahead = sorted(best, key=lambda side: best[side][1])
    if best[behind][1] == best[ahead][1]:
        return ""
    seconds = {"ours": ours, "plain": plain}[behind][-1][0]
    return (
        f"The side '{SIDES[behind]}' reached {best[behind][1]:.2f}% at most, in trainings of up to {seconds:,.1f} s: "
        f"of its time to more, up to the other side's {best[ahead][1]:.2f}%, only a bound is known."
    )


def plot(points: dict[str, list[Point]], title: str, path: Path) -> Path:
    """Draw top-1 (%) over the seconds of training, a curve a side and a dot a training; the figure's path."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = new_axes(title, "top-1 on images kept aside (%)")
    axes.set(xscale="log", xlabel="seconds of training")
    axes.margins(0.1)  # room for the points' names
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    for colour, (side, those) in zip(COLOURS, points.items(), strict=False):
        seconds, top1 = zip(*(point.mean for point in those), strict=True)
        axes.plot(seconds, top1, color=colour, marker="o", label=SIDES[side])
        for point in those:
            axes.plot(point.seconds, point.top1, ".", color=colour, alpha=0.5)
            x, y = point.mean
            words = f"{point.epochs} epoch{'s' if point.epochs > 1 else ''}"
            axes.annotate(words, (x, y), (0, -13), textcoords="offset points", ha="center", fontsize=7, color=colour)
    return save_figure(axes, path)


# ---------------------------------------------------------------------------------------------- the command


def build_parser() -> config.Parser:
    """The parser of this script's own options."""
    whole = config.number(int, at_least=1)
    parser = config.Parser("time_to_accuracy.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=tuple(PLAIN_LR), default="student", help="(default: student)")
    parser.add_argument("--lengths", type=whole, nargs="+", help="epochs of the trainings (default: 1 2 4 8)")
    parser.add_argument("--seeds", type=whole, default=1, help="trainings of each kind (default: 1)")
    parser.add_argument(
        "--images", type=config.number(int, at_least=PLAIN_BATCH),
        help="train on the first N images (default: all but the last tenth, which is kept aside)",
    )  # fmt: skip
    parser.add_argument(
        "--plain_lr", type=config.number(float, above=0), nargs="+",
        help="peak rates of the usual loop, of which at each length the best one counts (default: by role: "
        f"{', '.join(f'{role} {lr:g}' for role, lr in PLAIN_LR.items())})",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few minutes: lengths 1 2 and few images")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--json", type=config.file_name, help="file that keeps each finished training")
    parser.add_argument("--figure", type=config.file_name, help="file for the figure, .png")
    return parser


def parse(argv: list[str] | None, folder: str) -> tuple:
    """Our own options, defaults filled in, and train.py's, whose files go to `folder`; exits with code 2 if wrong."""
    parser = build_parser()
    arguments, further = parser.parse_known_args(argv)
    for word in further:
        if word.partition("=")[0].lstrip("-").replace("-", "_") in SETTLED:
            parser.error(f"{word} is not for this benchmark: see --role, --lengths and --images")
    words = [*further, f"--tto={arguments.role == 'teacher'}", f"--data_path={arguments.data_path}"]
    options = config.parse_train([*words, f"--weights_path={folder}", f"--plots_path={folder}"])
    usual_lengths = QUICK_LENGTHS if arguments.quick else LENGTHS
    arguments.lengths = sorted(set(arguments.lengths or usual_lengths))
    arguments.plain_lr = list(dict.fromkeys(arguments.plain_lr or [PLAIN_LR[arguments.role]]))
    if arguments.quick and arguments.images is None:
        arguments.images = QUICK_IMAGES[arguments.role]
    return arguments, options


def compare(arguments, options: config.TrainOptions, runtime: Runtime) -> None:
    """Do the trainings, print both tables and draw the figure."""
    if runtime.world_size > 1:
        raise UserError("this benchmark compares on one device: start it without torchrun")
    bench = Bench(options, arguments.images, runtime)
    seeds = range(options.seed, options.seed + arguments.seeds)
    trainings = plan(arguments.lengths, seeds, arguments.plain_lr)
    wanted = [bench.settings(training) for training in trainings]
    with contextlib.ExitStack() as stack:
        if arguments.json:
            stack.enter_context(locked(arguments.json))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # progress is no part of the tables
        if any(find(read_results(arguments.json), settings) is None for settings in wanted):
            bench.warm_up()
        results = run_all(wanted, lambda place: bench.train(trainings[place]), arguments.json)
    points = best_points(results)
    ours, plain = ([point.mean for point in points[side]] for side in SIDES)
    rates = ", ".join(f"{lr:g}" for lr in arguments.plain_lr)
    what = f"{options.role} on {len(bench.images):,} images of {options.dataset}"
    print(
        f"{what}, {len(bench.held_out):,} kept aside, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; "
        f"{device_title(runtime)}, torch {torch.__version__}\n"
        f"ours with {options.optimizer} in {runtime.precision}; the usual loop in float32, peak rates tried: {rates}\n"
    )
    texts = (points_table(points), targets_table(ours, plain), unreached_text(ours, plain))
    print("\n\n".join(text for text in texts if text))
    if arguments.figure:
        print(f"\nsaved {plot(points, what.capitalize(), arguments.figure)}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark with `argv` (None: the command line); the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        arguments, options = parse(argv, folder)

        def work() -> None:
            with start(options.device, options.precision, options.deterministic) as runtime:
                compare(arguments, options, runtime)

        return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
