"""Every option of train.py and test.py, declared once and checked once, and the names of all files.

Standard library and the table of data sets only: `--help` and a wrong option answer before torch is imported.
"""

import argparse
import math
import os
import re
import shlex
import signal
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from datasets import DATASETS, DatasetSpec, Recipe

DEFAULT_SEED = 42
LARGEST = 2**31 - 1  # of all whole numbers: what counts with them does not overflow
OPTIMIZERS = ("muon", "sgd")
RECIPE_OPTIONS = tuple(f.name for f in fields(Recipe))


@dataclass(frozen=True)
class LossRow:
    """A loss of distillation and what its paper's code weighs it with, for CIFAR-100 and students such as VGG8."""

    function: str  # in training/losses.py
    temps: tuple[float, ...]  # --all trains a student at each
    kd_weights: tuple[float, ...]  # of each of its terms
    ce_weight: float


ALPHA, USUAL_TEMP = 0.9, 5.0  # of plain KD


def ce_weight_of(alpha: float) -> float:
    """What --alpha leaves the cross-entropy: 0.1, not 0.09999999999999998, beside 0.9."""
    return round(1 - alpha, 12)


LOSSES = {
    "kd": LossRow("kd", (USUAL_TEMP, 20.0), (ALPHA,), ce_weight_of(ALPHA)),
    "ls": LossRow("ls", (2.0,), (9.0,), 0.1),
    "dkd": LossRow("dkd", (4.0,), (1.0, 8.0), 1.0),
    "ttm": LossRow("ttm", (10.0,), (45.0,), 1.0),
    "wttm": LossRow("wttm", (5.0,), (4.0,), 1.0),
}
# Plain KD at another loss's temperature and total weight: is it the loss that helps, or its weight?
MATCHED = {
    f"kd_as_{name}": LossRow("kd", row.temps, (sum(row.kd_weights),), row.ce_weight)
    for name, row in LOSSES.items()
    if name != "kd"
}
LOSSES |= MATCHED

# ---------------------------------------------------------------------------------------------- how a value is read


def boolean(text: str) -> bool:
    """True/False, yes/no, 1/0 in any case (argparse's own `type=bool` reads "False" as True)."""
    word = text.lower()
    if word not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return word in ("true", "yes", "1")


def resume_mode(text: str) -> str:
    """The word auto, or a boolean in any spelling, as "auto", "True" or "False"."""
    return "auto" if text.lower() == "auto" else str(boolean(text))


def number(kind: type, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf):
    """A parser of finite numbers of one kind within bounds."""
    at_most = min(at_most, LARGEST) if kind is int else at_most

    def parse(text: str):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {name}, not {text!r}") from None
        if not finite or value < at_least or value <= above or value > at_most:
            bounds = [f"at least {at_least}"] if at_least > -math.inf else []
            bounds += [f"above {above}"] if above > -math.inf else []
            bounds += [f"at most {at_most}"] if at_most < math.inf else []
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, not {text}")
        return value

    return parse


def device_name(text: str) -> str:
    """auto, cpu, mps, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:N or mps, not {text!r}")
    return text


def folder_name(text: str) -> Path:
    """The path of a folder, which an empty word, perhaps an unset variable's, is not."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a folder, not ''")
    return Path(text)


def file_name(text: str) -> Path:
    """The path of a file, which is no folder."""
    path = Path(text)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:  # too long a name, a NUL in it
        raise argparse.ArgumentTypeError(f"{text!r} can't be a file's name: {error}") from None
    if is_folder or not path.name:
        raise argparse.ArgumentTypeError(f"expected the name of a file, not {text!r}")
    return path


def plain(value: float) -> str:
    """A number as one would type it, exactly: 5.0 is 5, and no two temperatures read alike."""
    return repr(value).removesuffix(".0")


def typed(value) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(typed, value))
    return plain(value) if isinstance(value, float) else shlex.quote(str(value))


def by_recipe(name: str) -> str:
    """The defaults of an option that hangs on data set and role, as `--help` shows them."""
    rows: dict[str, list[str]] = {}
    for dataset, spec in DATASETS.items():
        values = [getattr(spec.recipes[role, OPTIMIZERS[0]], name) for role in ("teacher", "student")]
        teacher, student = (spec.views if value is None else plain(value) for value in values)
        rows.setdefault(f"{teacher}" + (f" and {student}" if teacher != student else ""), []).append(dataset)
    told = "; ".join(f"{', '.join(datasets)}: {values}" for values, datasets in rows.items())
    return f"(default for teacher and student: {told if len(rows) > 1 else next(iter(rows))})"


def by_loss(name: str, kd: str) -> str:
    """The defaults of an option that hangs on the loss, as `--help` shows them; `kd` are plain KD's."""
    rows = [f"{loss} {typed(getattr(row, name))}" for loss, row in LOSSES.items() if row.function != "kd"]
    return f"(default: kd {kd}, {', '.join(rows)})"


def option(default, text: str, parse=str, **more):
    """An option: its default, help and parser; `shapes_result`: a run with another value is another run;
    `names_files`: its files are others; the rest is argparse's."""
    flags = {name: more.pop(name, False) for name in ("shapes_result", "names_files")}
    return field(default=default, metadata={"help": text, "parse": parse, "keywords": more, **flags})


# ---------------------------------------------------------------------------------------------- the options


@dataclass(frozen=True)
class Options:
    """What both scripts share."""

    tto: bool = option(False, "train (test) the teacher only", boolean)
    kd: bool = option(False, "distil the teacher's knowledge into the student", boolean)
    temp: tuple[float, ...] | None = option(
        None, f"temperature T of the softened probabilities, 0.01 to 1000 {by_loss('temps', '5, with --all 5 20')}",
        number(float, at_least=0.01, at_most=1000), shapes_result=True, nargs="+",
    )  # fmt: skip
    loss: tuple[str, ...] = option(
        ("kd",), "loss of the distillation, with --all one or more: Hinton's kd, logit standardisation (ls), decoupled "
        "KD (dkd), transformed teacher matching (ttm) and weighted (wttm); kd_as_ls and so on are kd at the weight and "
        "temperature of that one (default: kd)",
        shapes_result=True, names_files=True, nargs="+", choices=tuple(LOSSES),
    )  # fmt: skip
    dataset: str = option(
        "cifar10", "data set: cifar10, cifar100, digits, which are drawn here without a download, or folder, your own "
        "images below --data_path",
        names_files=True, choices=DATASETS,
    )  # fmt: skip
    data_path: Path = option(
        Path("data"), "folder of the data sets, or of train/<class>/<pictures> for --dataset folder", folder_name,
        names_files=True,
    )  # fmt: skip
    skip_broken: bool = option(
        False, "with --dataset folder: go on without the files that are no pictures", boolean, names_files=True
    )
    weights_path: Path = option(Path("weights"), "folder of the checkpoints", folder_name, names_files=True)
    plots_path: Path = option(Path("plots"), "folder of the logs and figures", folder_name, names_files=True)
    teacher: Path | None = option(
        None, "the teacher's checkpoint (default: what --tto True leaves in --weights_path)", file_name,
        names_files=True,
    )  # fmt: skip
    seed: int = option(
        DEFAULT_SEED, "seed of initial weights, order and views; another one is part of the files' names",
        number(int, at_least=0), shapes_result=True, names_files=True,
    )  # fmt: skip
    subset: int | None = option(
        None, "first N training and first N/5 test images, for a quick trial; part of the files' names (default: all)",
        number(int, at_least=1), shapes_result=True, names_files=True,
    )  # fmt: skip
    holdout: int = option(
        0, "evaluate on the last N training images, kept from training, instead of the test set; "
        "part of the files' names",
        number(int, at_least=0), shapes_result=True, names_files=True,
    )  # fmt: skip
    device: str = option("auto", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps", device_name)
    precision: str = option(
        "auto", "auto (bf16 where it is faster), bf16 or fp32", choices=("auto", "bf16", "fp32"),
        shapes_result=True,
    )  # fmt: skip

    @property
    def spec(self) -> DatasetSpec:
        return DATASETS[self.dataset]

    @property
    def role(self) -> str:
        return "teacher" if self.tto else "student"

    @property
    def temperature(self) -> float:
        """T of this run; only `--all` holds several."""
        return self.temp[0]

    @property
    def trial_suffix(self) -> str:
        """Part of the files' names: a trial replaces no result, and a holdout's runs share no teacher with others."""
        subset = f"_subset{self.subset}" if self.subset else ""
        holdout = f"_holdout{self.holdout}" if self.holdout else ""
        return subset + holdout

    @property
    def run_name(self) -> str:
        """teacher, student or student_kd_t5, with the data set before it, an unusual seed and a trial's size after."""
        name = f"student_{self.loss[0]}_t{plain(self.temperature)}" if self.kd else self.role
        seed = "" if self.seed == DEFAULT_SEED else f"_seed{self.seed}"
        return f"{self.spec.prefix}{name}{seed}{self.trial_suffix}"

    @property
    def checkpoint_path(self) -> Path:
        return self.weights_path / f"{self.run_name}.pt"

    @property
    def log_path(self) -> Path:
        return self.plots_path / f"{self.run_name}.jsonl"

    @property
    def comparison_path(self) -> Path:
        return self.plots_path / f"{self.spec.prefix}comparison{self.trial_suffix}.png"

    @property
    def of_teacher(self) -> "Options":
        """The options of the teacher to learn from, or to be compared with: of a trial, one of the same images."""
        return replace(self, tto=True, kd=False, loss=("kd",), seed=DEFAULT_SEED)

    @property
    def teacher_path(self) -> Path:
        return self.teacher or self.of_teacher.checkpoint_path

    @property
    def split(self) -> str:
        """What a run is evaluated on, as its log calls it."""
        return "holdout" if self.holdout else "test"

    def command(self, script: str, every: bool = False) -> str:
        """What to type to train this run (`script` "train.py") or to evaluate it ("test.py").

        With the options that name its files, or with `every` one that is not the default.
        """
        words = ["python", script]
        words += ["--tto True"] if self.tto else []
        words += ["--kd True"] if self.kd else []
        usual = self.defaults()
        if self.kd or (every and self.temp != usual["temp"]):
            words.append(f"--temp {typed(self.temp)}")
        for f in fields(self):
            value = getattr(self, f.name)
            told = f.metadata["names_files"] or every
            if f.name == "teacher" and script == "train.py" and not self.kd:
                continue  # which only a student with KD learns from
            if told and f.name not in ("tto", "kd", "temp") and value != usual[f.name]:
                words.append(f"--{f.name} {typed(value)}")
        return " ".join(words)

    def defaults(self) -> dict:
        """What each option is where the user does not give it."""
        temps = LOSSES[self.loss[0]].temps
        if not getattr(self, "all", False):
            temps = temps[:1]
        elif len(self.loss) > 1:
            temps = None  # each loss has its own
        return {f.name: f.default for f in fields(self)} | {"temp": temps}


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of train.py. `None` stands for what the recipe of data set, role and optimizer says, until resolved."""

    all: bool = option(
        False, "everything: teacher, students without and with KD, evaluation, table; --num_epochs to --views are the "
        "students', the teacher has its own recipe, or was trained before by --tto True",
        boolean,
    )  # fmt: skip
    seeds: int = option(1, "with --all: number of seeds of the students, paired", number(int, 1, at_most=1000))
    alpha: float | None = option(
        None, "with --loss kd, in short: weight of the KL term, 0 to 1; 1 - alpha is the cross-entropy's "
        f"(default: {ALPHA})",
        number(float, at_least=0, at_most=1),
    )  # fmt: skip
    kd_weight: tuple[float, ...] | None = option(
        None, "weight of the loss of distillation, of dkd two: of the target, and among the other classes "
        f"{by_loss('kd_weights', 'alpha')}",
        number(float, at_least=0, at_most=1e6), shapes_result=True, nargs="+",
    )  # fmt: skip
    ce_weight: float | None = option(
        None, f"weight of the cross-entropy beside it {by_loss('ce_weight', '1 - alpha')}",
        number(float, at_least=0, at_most=1e6), shapes_result=True,
    )  # fmt: skip
    matched: bool = option(
        False, "with --all: each other loss than kd beside plain kd at its weights and temperature", boolean
    )
    optimizer: str = option(
        OPTIMIZERS[0], "muon or sgd, each with its own recipe, of which muon's is told here",
        choices=OPTIMIZERS, shapes_result=True,
    )  # fmt: skip
    num_epochs: int | None = option(
        None, f"epochs, of a folder the more the fewer images it has {by_recipe('num_epochs')}",
        number(int, at_least=1), shapes_result=True,
    )  # fmt: skip
    batch_size: int | None = option(
        None, f"images a step, over all devices, of a small folder fewer {by_recipe('batch_size')}",
        number(int, at_least=1), shapes_result=True,
    )  # fmt: skip
    lr: float | None = option(None, f"peak learning rate {by_recipe('lr')}", number(float, above=0), shapes_result=True)
    head_lr: float | None = option(
        None, f"the last layer's learning rate, as a fraction of --lr {by_recipe('head_lr')}",
        number(float, above=0), shapes_result=True,
    )  # fmt: skip
    norm_lr: float | None = option(
        None, f"batch norm's learning rate, as a fraction of --lr {by_recipe('norm_lr')}",
        number(float, above=0), shapes_result=True,
    )  # fmt: skip
    weight_decay: float | None = option(
        None, "weight decay of the last layer, with sgd of all weights but batch norm's "
        f"{by_recipe('weight_decay')}",
        number(float, at_least=0), shapes_result=True,
    )  # fmt: skip
    views: int | None = option(
        None, f"crops and mirror images drawn an image {by_recipe('views')}", number(int, at_least=1),
        shapes_result=True,
    )  # fmt: skip
    flip: bool | None = option(
        None, "whether a mirrored image is still one of its class (default: what the data set says; folder True)",
        boolean, shapes_result=True,
    )  # fmt: skip
    cache_teacher: bool = option(True, "with KD: keep the teacher's logits on disk", boolean, shapes_result=True)
    sync_bn: bool = option(False, "batch norm over the global batch on several devices", boolean, shapes_result=True)
    compile: bool = option(False, "torch.compile the model; pays on long runs", boolean, shapes_result=True)
    deterministic: bool = option(False, "bit-identical repeats on CUDA too, at some speed", boolean, shapes_result=True)
    resume: str = option(
        "auto", "auto: go on with an unfinished run; True: it must exist; False: start anew", resume_mode
    )
    save_seconds: float = option(
        300.0, "seconds between saves of the resume state within an epoch", number(float, at_least=0)
    )

    @property
    def resume_path(self) -> Path:
        return self.weights_path / f"{self.run_name}.last.pt"

    @property
    def spec(self) -> DatasetSpec:
        row = super().spec
        return row if self.flip is None else replace(row, flip=self.flip)

    @property
    def of_teacher(self) -> "TrainOptions":
        """As there, with the recipe's own values: those that the user gave are the students'."""
        students = (*RECIPE_OPTIONS, "alpha", "kd_weight", "ce_weight", "teacher")
        own = dict.fromkeys(students) | {"temp": (USUAL_TEMP,), "cache_teacher": True}
        return replace(super().of_teacher, all=False, seeds=1, **own)

    @property
    def usual_weights(self) -> dict:
        """The weights of a run with KD where the user does not say."""
        if not self.kd:
            return {}
        if self.loss == ("kd",):
            alpha = ALPHA if self.alpha is None else self.alpha
            return {"kd_weight": (alpha,), "ce_weight": ce_weight_of(alpha)}
        row = LOSSES[self.loss[0]]
        return {"kd_weight": row.kd_weights, "ce_weight": row.ce_weight}

    @property
    def loss_function(self) -> str:
        """The name of this run's function in training/losses.py; only `--all` holds several."""
        return LOSSES[self.loss[0]].function

    def defaults(self) -> dict:
        """What each option is where the user does not give it: before `resolved` and after."""
        usual = super().defaults()
        if self.num_epochs is None or self.all or not self.spec.is_known:
            return usual
        return usual | asdict(self.spec.recipes[self.role, self.optimizer]) | self.usual_weights

    def resolved(self, spec: DatasetSpec | None = None, **changes) -> "TrainOptions":
        """These options for one run, the recipe's values in place of None; `spec` is the data set's, of a folder."""
        run = replace(self, all=False, seeds=1, **changes)
        usual = asdict((spec or self.spec).recipes[run.role, run.optimizer]) | run.usual_weights
        return replace(run, **{name: value for name, value in usual.items() if getattr(run, name) is None})

    def runs(self, spec: DatasetSpec | None = None) -> list["TrainOptions"]:
        """The runs to do, in order: one, or with `all` the teacher, then each seed's students; `spec` as there."""
        if not self.all:
            return [self.resolved(spec)]
        plan = [self.of_teacher.resolved(spec)]
        for seed in range(self.seed, self.seed + self.seeds):
            plan.append(self.resolved(spec, seed=seed, temp=(USUAL_TEMP,), loss=("kd",)))
            for loss in self.loss:
                temps = self.temp or LOSSES[loss].temps
                plan += [self.resolved(spec, seed=seed, kd=True, loss=(loss,), temp=(temp,)) for temp in temps]
        return plan

    def result_options(self) -> dict:
        """The options that shape the result, as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["shapes_result"]}
        if self.spec == super().spec:  # as the data set has it: with the option or without, one run
            del values["flip"]
        if self.views == self.spec.views:  # all of them
            values["views"] = None
        if not self.kd:
            distilling = ("temp", "loss", "kd_weight", "ce_weight", "cache_teacher")
            return {name: value for name, value in values.items() if name not in distilling}
        names = ("kd_weight", "nckd_weight")[: len(self.kd_weight)]
        weights = dict(zip(names, self.kd_weight, strict=True))
        return values | {"temp": self.temperature, "loss": self.loss_function, **weights}


@dataclass(frozen=True)
class TestOptions(Options):
    """Options of test.py."""

    checkpoint: Path | None = option(
        None, "any checkpoint to evaluate; it says itself what it is (default: the one that the other options name)",
        file_name,
    )  # fmt: skip
    compare: bool = option(False, "one table of all checkpoints found, and the comparison figures", boolean)
    image: tuple[Path, ...] | None = option(
        None, "pictures to classify instead of the test set (default: none)", file_name, nargs="+"
    )
    soften: tuple[float, ...] | None = option(
        None, "temperatures at which to draw the probabilities of --image or of four test images (default: none)",
        number(float, at_least=0.01, at_most=1000), nargs="+",
    )  # fmt: skip
    json: Path | None = option(None, "file for the report's numbers, .json (default: none)", file_name)
    export: Path | None = option(None, "file for the model as a torch.export program, .pt2 (default: none)", file_name)


# ---------------------------------------------------------------------------------------------- help and parsing

# An option that this command would ignore is a mistake: what it needs beside it, and what it can't stand beside.
NEEDS = {
    "train.py": {
        "temp": ("kd", "all"),
        "loss": ("kd", "all"),
        "alpha": ("kd", "all"),
        "kd_weight": ("kd", "all"),
        "ce_weight": ("kd", "all"),
        "matched": ("all",),
        "cache_teacher": ("kd", "all"),
        "teacher": ("kd",),
        "seeds": ("all",),
    },
    "test.py": {"temp": ("kd",), "loss": ("kd",)},
}
EXCLUDES = {
    "train.py": {"tto": ("kd", "all"), "kd": ("all",), "all": ("teacher",), "alpha": ("kd_weight", "ce_weight")},
    "test.py": {
        "tto": ("kd",),
        "checkpoint": ("tto", "kd", "temp", "loss", "seed", "dataset", "subset", "holdout", "compare"),
        "compare": ("tto", "kd", "temp", "loss", "seed", "image", "soften", "json", "export"),
        "soften": ("json", "export"),
        "image": ("subset", "holdout", "json", "export", "data_path", "skip_broken"),
    },
}


def option_help(f) -> str:
    """What a field's option means, in which unit, and its default."""
    text = f.metadata["help"]
    return text if "(default" in text else f"{text} (default: {f.default})"


def option_table() -> str:
    """The Markdown table of every option, from the same text as `--help`."""
    rows = ["| option | script | meaning |", "|---|---|---|"]
    for script, options_class in (("both", Options), ("train.py", TrainOptions), ("test.py", TestOptions)):
        known = 0 if options_class is Options else len(fields(Options))
        rows += [f"| `--{f.name}` | {script} | {option_help(f)} |" for f in fields(options_class)[known:]]
    return "\n".join(rows)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def print_help(self, file=None):
        """Help that can't be written is an error, unless its reader, perhaps `head`, has gone."""
        try:
            print(self.format_help(), end="", flush=True)
        except BrokenPipeError:
            os._exit(128 + 13)
        except OSError as error:
            self._print_message(f"{self.prog}: error: can't write to standard output: {error.strerror}\n", sys.stderr)
            os._exit(2)


def build_parser(script: str, options_class: type[Options]) -> Parser:
    """The parser of one script, from the fields of its options; what is not given is not in its result."""
    train = "Train the teacher, or the student with or without knowledge distillation."
    description = train if script == "train.py" else "Evaluate what train.py left."
    parser = Parser(script, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(options_class):
        keywords = dict(f.metadata["keywords"])
        if f.metadata["parse"] is boolean:
            keywords |= {"nargs": "?", "const": True, "metavar": "True|False"}
        elif "choices" not in keywords:
            kinds = {float: "X", int: "N", Path: "PATH"}
            keywords["metavar"] = next((v for k, v in kinds.items() if k.__name__ in str(f.type)), f.name.upper())
        parser.add_argument(f"--{f.name}", type=f.metadata["parse"], help=option_help(f).replace("%", "%%"), **keywords)
    return parser


def parse(script: str, options_class: type[Options], argv: list[str] | None) -> tuple[Parser, Options]:
    """The parser of a script, for further errors, and its options from `argv` (None: the command line)."""
    words = sys.argv[1:] if argv is None else list(argv)
    # --num-epochs is --num_epochs
    words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
    parser = build_parser(script, options_class)
    try:
        os.getcwd()
    except OSError:
        parser.error("the current folder is gone: go to another one")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(words)).items()}
    options = options_class(**given)
    check_company(parser, given)
    for name in ("temp", "loss"):
        values = given.get(name, ())
        if len(values) > 1 and not getattr(options, "all", False):
            parser.error(f"--{name} takes several values only with --all True: give one")
        if len(set(values)) < len(values):
            parser.error(f"--{name} names one twice")
    if options.skip_broken and options.dataset != "folder" and "checkpoint" not in given:
        parser.error("--skip_broken means something with --dataset folder alone: give that too, or leave it out")
    if "temp" not in given:
        options = replace(options, temp=options.defaults()["temp"])
    return parser, options


def check_company(parser: Parser, given: dict) -> None:
    """Exit with code 2 where an option lacks what it needs beside it, or stands beside what it can't."""
    asked = [name for name, value in given.items() if value is not False]
    for name in asked:
        for other in EXCLUDES[parser.prog].get(name, ()):
            if other in asked:
                parser.error(f"--{name} and --{other} do not go together: leave one of them out")
    for name in given:
        needs = NEEDS[parser.prog].get(name, ())
        if needs and not any(need in asked for need in needs):
            wanted = " or ".join(f"--{need} True" for need in needs)
            parser.error(f"--{name} means something with {wanted} alone: give that too, or leave --{name} out")


def check_weights(parser: Parser, options: TrainOptions) -> None:
    """Exit with code 2 where the weights are none of the losses'."""
    if options.alpha is not None and options.loss != ("kd",):
        parser.error("--alpha weighs --loss kd alone: leave it out (another loss has --kd_weight and --ce_weight)")
    given = options.kd_weight is not None or options.ce_weight is not None
    if given and options.matched:
        parser.error("--matched True takes each loss at its usual weights: leave --kd_weight and --ce_weight out")
    if given and len(options.loss) > 1:
        parser.error("--kd_weight and --ce_weight are those of one loss: give one --loss, or leave them out")
    count = len(LOSSES[options.loss[0]].kd_weights)
    if options.kd_weight is not None and len(options.kd_weight) != count:
        parser.error(f"--kd_weight: --loss {options.loss[0]} has {count}, not {len(options.kd_weight)}")


def parse_train(argv: list[str] | None = None) -> TrainOptions:
    """The options of train.py from `argv` (None: the command line); a wrong one exits with code 2."""
    parser, options = parse("train.py", TrainOptions, argv)
    check_weights(parser, options)
    if options.matched:
        added = tuple(f"kd_as_{loss}" for loss in options.loss if f"kd_as_{loss}" in MATCHED)
        if not added:
            parser.error("--matched True means something with another --loss than kd: give one, or leave it out")
        options = replace(options, loss=tuple(dict.fromkeys(options.loss + added)), matched=False)
    if options.all and options.resume == "True":
        parser.error("--all goes on with what is unfinished by itself: leave --resume out, or False to start anew")
    if options.seed + options.seeds - 1 > LARGEST:
        parser.error(f"--seed {options.seed} leaves no room for {options.seeds} --seeds: the last is at most {LARGEST}")
    if options.views is not None and options.views > options.spec.views:
        parser.error(f"--views: an image of {options.dataset} has {options.spec.views} views, not {options.views}")
    return options if options.all or not options.spec.is_known else options.resolved()


def parse_test(argv: list[str] | None = None) -> TestOptions:
    """The options of test.py from `argv` (None: the command line); a wrong one exits with code 2."""
    parser, options = parse("test.py", TestOptions, argv)
    if options.soften and options.teacher and not options.tto:
        parser.error("--soften asks one model: give --tto True to ask the teacher, or leave --teacher out")
    if options.tto and options.teacher and options.seed != DEFAULT_SEED:
        parser.error("--teacher names the teacher to evaluate, whatever its seed: leave --seed out")
    if options.export and options.export.suffix != ".pt2":
        parser.error(f"--export writes a .pt2 file, not {options.export}")
    if options.json and options.json.suffix not in ("", ".json"):  # a checkpoint, perhaps, that would be lost
        parser.error(f"--json writes a .json file, not {options.json}")
    return options


def answer_early(parse) -> None:
    """Parse the command line before the slow imports; whoever interrupts those gets one line, as later."""
    os.environ["MPLBACKEND"] = "agg"  # figures are files here: a notebook's own backend may not even be installed
    signal.signal(signal.SIGINT, lambda *_: (print("stopped at once", file=sys.stderr, flush=True), os._exit(130)))
    parse()
