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
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from curves import best_points, find, means, plot, points_table, read_results, run_all, targets_table, unreached_text
from ours import on_device, train_whole
from plain import MOMENTUM, WEIGHT_DECAY, plain_batches, plain_steps

import config
from datasets import DatasetSpec
from models import build_model
from models.vgg import initialise
from runtime import checkpoint
from runtime.device import Runtime, device_title
from runtime.errors import UserError
from runtime.files import locked
from training.run import Run, identity_of
from utils import Images, Views, evaluate, load_images

HELD_OUT = 0.1  # of the training set, its last images
LENGTHS, QUICK_LENGTHS = (1, 2, 4, 8), (1, 2)  # epochs
QUICK_IMAGES = {"teacher": 1_000, "student": 4_000}

PLAIN_BATCH = 128  # both repositories', and that of the loops that were copied from them
# Peak rates: 0.1 is both repositories' for every network; chengyangfu/pytorch-vgg-cifar10 takes half of it for VGGs.
PLAIN_LR = {"teacher": 0.05, "student": 0.1}
# Part of all steps in which the rate rises: sixteen layers without a shortcut may get lost where it starts at the peak.
PLAIN_WARM_UP = {"teacher": 0.1, "student": 0.0}
SETTLED = ("tto", "kd", "all", "num_epochs", "subset", "holdout", "weights_path", "plots_path")  # options of train.py

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
            facts = {name: facts[name] for name in (*shared, "flip") if name in facts}  # an unusual flip is a fact
            facts |= {"optimizer": "sgd", "lr": training.lr, "batch_size": PLAIN_BATCH, "momentum": MOMENTUM}
            facts |= {"weight_decay": WEIGHT_DECAY, "warm_up": PLAIN_WARM_UP[self.options.role]}
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
        run = Run(options, self.runtime, views)
        seconds = train_whole(run, views)
        return run.model, seconds

    def train_plain(self, training: Training, images: Images) -> tuple[nn.Module, float]:
        """The model that the usual loop leaves, and its seconds; its workers have started before."""
        torch.manual_seed(training.seed)
        device, role, steps = self.runtime.device, self.options.role, len(images) // PLAIN_BATCH
        model = plain_model(role, len(self.spec.classes)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=training.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
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


# ---------------------------------------------------------------------------------------------- the command


def build_parser() -> config.Parser:
    """The parser of this script's own options."""
    whole = config.number(int, at_least=1)
    parser = config.Parser("time_to_accuracy.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=tuple(PLAIN_LR), default="teacher", help="(default: teacher)")
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
    ours, plain = means(points)
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
        return on_device(options, lambda runtime: compare(arguments, options, runtime))


if __name__ == "__main__":
    sys.exit(main())
