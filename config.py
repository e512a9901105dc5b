"""Every option of train.py and test.py, declared once and checked once, and the names of all files.

Standard library only: `--help` and a wrong option answer before torch is imported.
"""

import argparse
import math
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from recipes import DATASETS, DatasetSpec

DEFAULT_SEED = 42


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


def option(default, text: str, parse=str, shapes_result: bool = False, names_files: bool = False, **keywords):
    """An option: its default, help, parser, whether a run with another value is another run, or has other files."""
    metadata = {"help": text, "parse": parse, "shapes_result": shapes_result, "names_files": names_files}
    return field(default=default, metadata=metadata | {"keywords": keywords})


@dataclass(frozen=True)
class Options:
    """What both scripts share."""

    tto: bool = option(False, "train (test) the teacher only", boolean)
    kd: bool = option(False, "distil the teacher's knowledge into the student", boolean)
    temp: tuple[float, ...] | None = option(
        None, "temperature T of the softened probabilities (default: 5; with --all: 5 20)",
        number(float, above=0, at_most=1000), shapes_result=True, nargs="+",
    )  # fmt: skip
    dataset: str = option(
        "cifar10", "data set: cifar10, or digits, which are drawn here without a download",
        shapes_result=True, names_files=True, choices=tuple(DATASETS),
    )  # fmt: skip
    data_path: Path = option(Path("data"), "folder of the data sets", Path, names_files=True)
    weights_path: Path = option(Path("weights"), "folder of the checkpoints", Path, names_files=True)
    plots_path: Path = option(Path("plots"), "folder of the logs and figures", Path, names_files=True)
    teacher: Path | None = option(
        None, "the teacher's checkpoint (default: what --tto True leaves in --weights_path)", Path, names_files=True
    )
    seed: int = option(
        DEFAULT_SEED, "seed of initial weights, order and views; another one is part of the files' names",
        number(int, at_least=0, at_most=2**31 - 1), shapes_result=True, names_files=True,
    )  # fmt: skip
    subset: int | None = option(
        None, "first N training and first N/5 test images, for a quick trial (default: all)",
        number(int, at_least=1), shapes_result=True,
    )  # fmt: skip
    device: str = option("auto", "auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps", device_name)
    precision: str = option(
        "auto", "auto (bf16 where the hardware has it), bf16 or fp32", choices=("auto", "bf16", "fp32"),
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
    def run_name(self) -> str:
        """teacher, student or student_kd_t5, with the data set before it and an unusual seed after it."""
        name = f"student_kd_t{self.temperature:g}" if self.kd else self.role
        seed = "" if self.seed == DEFAULT_SEED else f"_seed{self.seed}"
        return f"{self.spec.prefix}{name}{seed}"

    @property
    def checkpoint_path(self) -> Path:
        return self.weights_path / f"{self.run_name}.pt"

    @property
    def log_path(self) -> Path:
        return self.plots_path / f"{self.run_name}.jsonl"

    @property
    def comparison_path(self) -> Path:
        return self.plots_path / f"{self.spec.prefix}comparison.png"

    def command(self, script: str) -> str:
        """What to type to train this run (`script` "train.py") or to evaluate it ("test.py")."""
        words = ["python", script] + ["--tto True"] * self.tto + [f"--kd True --temp {self.temp[0]:g}"] * self.kd
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["names_files"] and value != f.default and (self.kd or f.name != "teacher"):
                words.append(f"--{f.name} {shlex.quote(str(value))}")
        return " ".join(words)

    @property
    def teacher_path(self) -> Path:
        """The teacher to learn from, or to be compared with."""
        return self.teacher or self.weights_path / f"{self.spec.prefix}teacher.pt"


@dataclass(frozen=True)
class TrainOptions(Options):
    """Options of train.py. `None` stands for what the recipe of data set and role says, until resolved."""

    all: bool = option(False, "everything: teacher, students without and with KD, evaluation, table", boolean)
    seeds: int = option(1, "with --all: number of seeds of the students, paired", number(int, at_least=1))
    alpha: float = option(
        0.9, "weight of the KL term, 0 to 1; 1 - alpha is the cross-entropy's",
        number(float, at_least=0, at_most=1), shapes_result=True,
    )  # fmt: skip
    num_epochs: int | None = option(
        None, "epochs (default: by data set and role: 60; for digits 9 and 4)", number(int, at_least=1),
        shapes_result=True,
    )  # fmt: skip
    batch_size: int | None = option(
        None, "images a step, over all devices (default: by data set and role)", number(int, at_least=1),
        shapes_result=True,
    )  # fmt: skip
    lr: float | None = option(
        None, "peak learning rate (default: by data set and role)", number(float, above=0), shapes_result=True
    )
    head_lr: float | None = option(
        None, "the last layer's learning rate, as a fraction of --lr (default: by data set and role)",
        number(float, above=0), shapes_result=True,
    )  # fmt: skip
    weight_decay: float | None = option(
        None, "L2 penalty on all weights but biases and batch norm (default: by data set and role)",
        number(float, at_least=0), shapes_result=True,
    )  # fmt: skip
    holdout: int = option(
        0, "evaluate on the last N training images, kept from training, instead of the test set",
        number(int, at_least=0), shapes_result=True, names_files=True,
    )  # fmt: skip
    views: int | None = option(
        None, "crops and flips drawn an image (default: all 162; for a student of digits 4 of 81)",
        number(int, at_least=1), shapes_result=True,
    )  # fmt: skip
    cache_teacher: bool = option(True, "with KD: keep the teacher's logits on disk", boolean)
    sync_bn: bool = option(False, "batch norm over the global batch on several devices", boolean)
    compile: bool = option(False, "torch.compile the model; pays on long runs", boolean)
    deterministic: bool = option(False, "bit-identical repeats on CUDA too, at some speed", boolean)
    resume: str = option(
        "auto", "auto: go on with an unfinished run; True: it must exist; False: start anew", resume_mode
    )
    save_seconds: float = option(
        300.0, "seconds between saves of the resume state within an epoch", number(float, at_least=0)
    )

    @property
    def holdout_suffix(self) -> str:
        """Part of the files' names: what one run keeps aside, another may have been trained on."""
        return f"_holdout{self.holdout}" * bool(self.holdout)

    @property
    def run_name(self) -> str:
        return super().run_name + self.holdout_suffix

    @property
    def teacher_path(self) -> Path:
        """The teacher to learn from; with --holdout one that has not seen the images kept aside either."""
        return self.teacher or self.weights_path / f"{self.spec.prefix}teacher{self.holdout_suffix}.pt"

    @property
    def resume_path(self) -> Path:
        return self.weights_path / f"{self.run_name}.last.pt"

    def resolved(self, **changes) -> "TrainOptions":
        """These options for one run, the recipe's values in place of None."""
        run = replace(self, all=False, **changes)
        recipe = asdict(run.spec.recipes[run.role])
        return replace(run, **{name: value for name, value in recipe.items() if getattr(run, name) is None})

    def runs(self) -> list["TrainOptions"]:
        """The runs to do, in order: one, or with `all` the teacher, then each seed's students."""
        if not self.all:
            return [self]
        plan = [self.resolved(tto=True, seed=DEFAULT_SEED, temp=self.temp[:1])]
        for seed in range(self.seed, self.seed + self.seeds):
            plan.append(self.resolved(seed=seed, temp=self.temp[:1]))
            plan += [self.resolved(seed=seed, kd=True, temp=(temp,)) for temp in self.temp]
        return plan

    def result_options(self) -> dict:
        """The options that shape the result, as plain values: two runs that agree in them are the same run."""
        names = [f.name for f in fields(self) if f.metadata["shapes_result"]]
        if not self.kd:
            names = [name for name in names if name not in ("temp", "alpha")]
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class TestOptions(Options):
    """Options of test.py."""

    compare: bool = option(False, "one table of all checkpoints found, and the comparison figures", boolean)
    image: tuple[Path, ...] | None = option(
        None, "pictures to classify instead of the test set (default: none)", Path, nargs="+"
    )
    json: Path | None = option(None, "file for the report's numbers (default: none)", Path)
    export: Path | None = option(None, "file for the model as a torch.export program, .pt2 (default: none)", Path)


def option_help(f) -> str:
    """What a field's option means, in which unit, and its default."""
    text = f.metadata["help"]
    return text if "(default:" in text else f"{text} (default: {f.default})"


def option_table() -> str:
    """README's Markdown table of every option, from the same text as `--help`."""
    rows = ["| option | script | meaning |", "|---|---|---|"]
    for script, options_class in (("both", Options), ("train.py", TrainOptions), ("test.py", TestOptions)):
        known = 0 if options_class is Options else len(fields(Options))
        rows += [f"| `--{f.name}` | {script} | {option_help(f)} |" for f in fields(options_class)[known:]]
    return "\n".join(rows)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(script: str, options_class: type[Options]) -> Parser:
    """The parser of one script, from the fields of its options."""
    train = "Train the teacher, or the student with or without knowledge distillation."
    description = train if script == "train.py" else "Evaluate what train.py left."
    parser = Parser(script, description=description, allow_abbrev=False)
    for f in fields(options_class):
        text = option_help(f)
        keywords = dict(f.metadata["keywords"])
        if f.metadata["parse"] is boolean:
            keywords |= {"nargs": "?", "const": True, "metavar": "True|False"}
        elif "choices" not in keywords:
            kinds = {float: "X", int: "N", Path: "PATH"}
            keywords["metavar"] = next((v for k, v in kinds.items() if k.__name__ in str(f.type)), f.name.upper())
        parser.add_argument(
            f"--{f.name}", type=f.metadata["parse"], default=f.default, help=text.replace("%", "%%"), **keywords
        )
    return parser


def parse(script: str, options_class: type[Options], argv: list[str] | None) -> tuple[Parser, Options]:
    """The parser of a script, for further errors, and its options from `argv` (None: the command line)."""
    words = sys.argv[1:] if argv is None else list(argv)
    # --num-epochs is --num_epochs
    words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words]
    parser = build_parser(script, options_class)
    values = vars(parser.parse_args(words))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if values["tto"] and values["kd"]:
        parser.error("--tto trains the teacher and --kd the student: give one of them")
    if values["temp"] is None:
        values["temp"] = (5.0, 20.0) if values.get("all") else (5.0,)
    if len(values["temp"]) > 1 and not values.get("all"):
        parser.error("--temp takes several temperatures only with --all True: give one")
    return parser, options_class(**values)


def parse_train(argv: list[str] | None = None) -> TrainOptions:
    """The options of train.py from `argv` (None: the command line); a wrong one exits with code 2."""
    parser, options = parse("train.py", TrainOptions, argv)
    if options.all and (options.tto or options.kd):
        parser.error("--all trains teacher and students: leave --tto and --kd out")
    if options.teacher and not options.kd:
        parser.error("--teacher names the teacher that --kd True learns from: give both, or leave it out")
    if options.all and options.resume == "True":
        parser.error("--all goes on with what is unfinished by itself: leave --resume out, or False to start anew")
    if options.seeds > 1 and not options.all:
        parser.error("--seeds repeats the runs of --all True: give both, or --seed for one run")
    if options.views is not None and options.views > options.spec.views:
        parser.error(f"--views: an image of {options.dataset} has {options.spec.views} views, not {options.views}")
    return options if options.all else options.resolved()


def parse_test(argv: list[str] | None = None) -> TestOptions:
    """The options of test.py from `argv` (None: the command line); a wrong one exits with code 2."""
    parser, options = parse("test.py", TestOptions, argv)
    if options.export and options.export.suffix != ".pt2":
        parser.error(f"--export writes a .pt2 file, not {options.export}")
    if (options.json or options.export) and (options.compare or options.image):
        parser.error("--json and --export go with the report of one checkpoint: leave --compare and --image out")
    return options
