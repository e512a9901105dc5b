"""Every option of train.py and test.py, declared and checked once; None is "not given". No torch: --help is quick."""

import unicodedata
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from data_sets import DATA_SETS, SIDE, SIZES
from runtime.cli import LARGEST, Parser, boolean, file_name, folder_name, matching, number, option, parse_words
from runtime.errors import UserError
from training.recipes import ALPHA, LOSS_DEFAULTS, OPTIMIZERS
from training.runs import DEFAULT_SEED, name_of

WHAT, DATA, KD = "what to run", "data", "distillation"
RECIPE, MACHINE, FILES = "recipe; with --all, the students' (defaults: docs/options.md)", "machine", "files"
FROM_0, FROM_1 = partial(number, int, 0, LARGEST), partial(number, int, 1, LARGEST)
ABOVE_0, WEIGHT = partial(number, float, 1e-12, 1e30), partial(number, float, 0, 10**6)
TEMP, TO_1 = partial(number, float, 0.01, 1000), partial(number, float, 0, 1)
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
JSON, PT2 = partial(file_name, suffix=".json"), partial(file_name, suffix=".pt2")  # no checkpoint is overwritten
FUNCTION = partial(matching, r"\w+(\.\w+)*:\w+", "MODULE:FUNCTION, as in my_models:resnet8")
DEVICE = partial(matching, r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:N or mps")
PLAIN_WORD = partial(matching, r"(?!\.+$)[A-Za-z0-9._-]+", "letters, digits, '.', '_' and '-'")  # safe in a path


@dataclass(frozen=True)
class Options:
    """The options that both scripts share."""

    tto: bool = option(WHAT, "train or evaluate only the teacher", boolean, False)
    kd: bool = option(WHAT, "the student with knowledge distillation (default: without)", boolean, False)
    seed: int = option(WHAT, "seed of initial weights, image and view order", FROM_0, DEFAULT_SEED)
    student: str | None = option(WHAT, "your own student, MODULE:FUNCTION called with num_classes", FUNCTION)
    dataset: str = option(DATA, "cifar10, cifar100, digits (drawn, no download) or folder", str, "cifar10", DATA_SETS)
    data_path: Path = option(DATA, "data folder; your own pictures are in train/<class>/", folder_name, Path("data"))
    skip_broken: bool = option(DATA, "leave out pictures that can't be read (--dataset folder)", boolean, False)
    size: int = option(DATA, "side of an image in pixels (folder, digits): 32, 64, ..., 224", int, SIDE, SIZES)
    subset: int | None = option(DATA, "a quick trial: the first N training images and N/5 test images", FROM_1)
    holdout: int = option(DATA, "hold out the last N training images and evaluate on them", FROM_0, 0)
    omit: tuple[str, ...] | None = option(DATA, "train the student without these classes")
    student_images: tuple[int, ...] | None = option(DATA, "train the student on N images; --all: several", FROM_1)
    temp: tuple[float, ...] | None = option(KD, "temperature (default of kd: 5, CIFAR-100: 2); --all: several", TEMP)
    loss: tuple[str, ...] | None = option(KD, "kd (default), ls, dkd, ttm, wttm; --all: several", choices=LOSS_DEFAULTS)
    teacher: Path | None = option(KD, "the teacher: a checkpoint, state dict or folder of logits", folder_name)
    device: str = option(MACHINE, "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps", DEVICE, "auto")
    precision: str = option(MACHINE, "auto (bf16 where faster), bf16, fp16 (CUDA) or fp32", str, "auto", PRECISIONS)
    weights_path: Path = option(FILES, "folder of the checkpoints", folder_name, Path("weights"))
    plots_path: Path = option(FILES, "folder of the logs and figures", folder_name, Path("plots"))
    name: str | None = option(FILES, "use subfolders of this name in --weights_path and --plots_path", PLAIN_WORD)

    @property
    def weights_folder(self) -> Path:
        """Where the runs' checkpoints are."""
        return self.weights_path / (self.name or "")

    def teacher_file(self, stem: str) -> Path:
        """The teacher in the folder of --name, or else the shared one; UserError if the former is unfinished."""
        own, shared = self.weights_folder / f"{stem}.pt", self.weights_path / f"{stem}.pt"
        unfinished = own.with_suffix(".last.pt")
        if own != shared and unfinished.exists() and not own.exists():
            raise UserError(f"{unfinished} is an unfinished teacher: rerun its command (--tto True), or remove it")
        return own if own.exists() else shared

    @property
    def plots_folder(self) -> Path:
        """Where logs and figures are."""
        return self.plots_path / (self.name or "")

    def changed(self, *names: str) -> dict:
        """The options among `names` (default: data, files, device) that differ from their defaults, by name."""
        names = names or ("data_path", "skip_broken", "teacher", "device", "weights_path", "plots_path", "name")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return {name: value for name, value in values.items() if value != getattr(type(self), name)}


@dataclass(frozen=True)
class TrainOptions(Options):
    """Train the teacher, or the student with or without knowledge distillation."""

    all: bool = option(WHAT, "train the teacher and all students, evaluate them, write a table", boolean, False)
    seeds: int = option(WHAT, "with --all: number of seeds of the students", partial(number, int, 1, 1000), 1)
    resume: bool = option(WHAT, "resume an unfinished run, skip a finished one; False: restart", boolean, True)
    alpha: float | None = option(KD, f"weight of KL in --loss kd; cross-entropy has 1 - alpha (default: {ALPHA})", TO_1)
    kd_weight: tuple[float, ...] | None = option(KD, "weight of each soft term (default: docs/losses.md)", WEIGHT)
    ce_weight: float | None = option(KD, "weight of the cross-entropy (default: docs/losses.md)", WEIGHT)
    matched: bool = option(KD, "with --all: also plain kd at each loss's temperature and total weight", boolean, False)
    optimizer: str = option(RECIPE, "muon or sgd, each with a recipe; the teacher's, too", str, "muon", OPTIMIZERS)
    num_epochs: int | None = option(RECIPE, "number of epochs", FROM_1)
    batch_size: int | None = option(RECIPE, "images per step, over all devices", FROM_1)
    lr: float | None = option(RECIPE, "peak learning rate", ABOVE_0)
    head_lr: float | None = option(RECIPE, "learning rate of the last layer, as a fraction of --lr", ABOVE_0)
    norm_lr: float | None = option(RECIPE, "learning rate of batch norm and biases, as a fraction of --lr", ABOVE_0)
    weight_decay: float | None = option(RECIPE, "weight decay of the last layer; with sgd, of all matrices", WEIGHT)
    views: int | None = option(RECIPE, "number of random views (crop, mirrored or not) of each image", FROM_1)
    flip: bool | None = option(DATA, "mirror every other view; False for letters (default: by data set)", boolean)
    sync_bn: bool = option(MACHINE, "batch norm over the global batch on several CUDA devices", boolean, False)
    compile: bool = option(MACHINE, "torch.compile the model; pays off in long runs", boolean, False)
    deterministic: bool = option(MACHINE, "bit-exact repeats on CUDA too, but slower", boolean, False)

    @property
    def table_folder(self) -> Path:
        """Where the table of --all is."""
        name = replace(name_of(self), student_images=None)
        images = f"_images{'_'.join(map(str, self.student_images))}" if self.student_images else ""
        return self.plots_folder / f"results_{self.dataset}{name.student_suffix}{name.images_suffix}{images}"


@dataclass(frozen=True)
class TestOptions(Options):
    """Evaluate what train.py trained."""

    checkpoint: Path | None = option(WHAT, "any checkpoint; its settings are read from the file", file_name)
    compare: bool = option(WHAT, "one table of all checkpoints in --weights_path for these images", boolean, False)
    image: tuple[Path, ...] | None = option(WHAT, "classify these pictures instead of the test images", file_name)
    soften: tuple[float, ...] | None = option(WHAT, "plot pictures' class probabilities at these temperatures", TEMP)
    json: Path | None = option(FILES, "also write the numbers of the report to this .json file", JSON)
    export: Path | None = option(FILES, "only export the model, in float32, to this .pt2 file (torch.export)", PT2)

    @property
    def weights_folder(self) -> Path:
        """Where the checkpoint is, and its teacher if the folder has its own."""
        return self.checkpoint.parent if self.checkpoint else super().weights_folder


# An option requires one of those in its row of NEEDS, and can't be combined with any of those in EXCLUDES.
NEEDS = {"temp": "kd all", "loss": "kd all", "alpha": "kd all", "kd_weight": "kd all", "ce_weight": "kd all"}
NEEDS |= {"matched": "all", "seeds": "all", "teacher": "kd all"}  # of train.py
TEST_NEEDS = {"temp": "kd", "loss": "kd"}
EXCLUDES = {
    "tto": "kd all student omit student_images",
    "kd": "all",
    "alpha": "kd_weight ce_weight",
    "matched": "kd_weight ce_weight",
    "checkpoint": "tto kd temp loss seed dataset size subset holdout compare name omit student_images",
    "compare": "tto kd temp loss seed teacher image soften json export omit student_images",
    "soften": "json export",
    "export": "json",
    "image": "subset holdout json export data_path skip_broken",
}


def parse(script: str, options_class: type[Options], argv: list | None, needs: dict) -> tuple[Parser, Options]:
    """The parser of a script, for further errors, and its options from `argv` (None: the command line)."""
    parser, given = parse_words(script, options_class, argv, needs, EXCLUDES)
    for name in ("temp", "loss", "student_images"):
        values = given.get(name, ())
        if len(values) > 1 and not given.get("all"):
            several = " without --all True" if script == "train.py" else ""
            parser.error(f"--{name} takes one value{several}, not {len(values)}")
        if len(set(values)) < len(values):
            parser.error(f"--{name} contains a value twice: give each value once")
    options = options_class(**given)
    if options.omit:
        options = replace(options, omit=classes_of(parser, options.omit, DATA_SETS[options.dataset].classes))
    if options.skip_broken and options.dataset != "folder" and "checkpoint" not in given:
        parser.error("--skip_broken requires --dataset folder: add that, or leave --skip_broken out")
    if options.size != SIDE and options.dataset in ("cifar10", "cifar100"):
        parser.error(f"--size: the images of {options.dataset} have {SIDE} x {SIDE} pixels: leave it out")
    return parser, options


def classes_of(parser: Parser, words: tuple[str, ...], classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of --omit, by name or else number, in the data set's order; a wrong word exits with code 2."""
    if not classes:  # of a folder that was not read yet: the words are names
        return tuple(sorted({unicodedata.normalize("NFC", word) for word in words}))
    by_word = {str(i): name for i, name in enumerate(classes)} | {name: name for name in classes}
    if unknown := set(words) - by_word.keys():
        parser.error(f"--omit: no class {min(unknown)!r}: give a name such as {', '.join(classes[:10])}, or a number")
    chosen = {by_word[word] for word in words}
    if len(chosen) == len(classes):
        parser.error("--omit names all classes: name fewer of them")
    return tuple(name for name in classes if name in chosen)


def parse_train(argv: list | None = None) -> TrainOptions:
    """The options of train.py from `argv` (None: the command line); a wrong one exits with code 2."""
    parser, options = parse("train.py", TrainOptions, argv, NEEDS)
    losses = options.loss or ("kd",)
    if options.alpha is not None and losses != ("kd",):
        parser.error("--alpha is for --loss kd: leave it out, or give --kd_weight and --ce_weight")
    if len(losses) > 1 and (options.kd_weight or options.ce_weight is not None):
        parser.error("--kd_weight and --ce_weight need a single --loss: give one, or leave them out")
    count = len(LOSS_DEFAULTS[losses[0]].kd_weights)
    if options.kd_weight and len(options.kd_weight) != count:
        parser.error(f"--kd_weight: {losses[0]} has {count} terms, not {len(options.kd_weight)}")
    if options.kd_weight and options.ce_weight == 0 and not any(options.kd_weight):
        parser.error("--kd_weight and --ce_weight are all 0, which leaves no loss: give one above 0")
    if options.all and not options.resume:
        parser.error("--all True trains unfinished runs only: give another --name, not --resume False")
    if options.matched and all(LOSS_DEFAULTS[loss].function == "kd" for loss in losses):
        parser.error("--matched requires a --loss other than kd: give one, or leave --matched out")
    data_set = DATA_SETS[options.dataset]
    flip = data_set.flip if options.flip is None else options.flip
    most = replace(data_set, flip=flip, size=options.size).views
    if options.views is not None and options.views > most:
        parser.error(f"--views: an image of {options.dataset} has {most} views: give at most {most}")
    if options.alpha is not None:
        options = replace(options, kd_weight=(options.alpha,), ce_weight=round(1 - options.alpha, 12))
    return options


def parse_test(argv: list | None = None) -> TestOptions:
    """The options of test.py from `argv` (None: the command line); a wrong one exits with code 2."""
    parser, options = parse("test.py", TestOptions, argv, TEST_NEEDS)
    if (options.soften or options.export) and options.teacher and not options.tto:
        parser.error("--soften and --export use one model: leave --teacher out, or give --tto True (not --checkpoint)")
    if options.tto and options.teacher and options.seed != DEFAULT_SEED:
        parser.error("--teacher names the teacher to evaluate: leave --seed out")
    return options
