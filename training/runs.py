"""What a run is, and which runs belong together. No torch: config.py imports this for `--help`.

A RunName names a run's files, a RunConfig is all that shapes its result; `plan` makes them from the options.
"""

import hashlib
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace

from data_sets import DATA_SETS, SIDE, DataSet
from runtime.cli import format_number, typed
from runtime.errors import UserError
from training.recipes import LOSS_DEFAULTS, RECIPE_FIELDS, Recipe, recipe_of, temps_of

DEFAULT_SEED = 42
MAX_OMITTED_BYTES = 80  # bytes of the omitted classes in a file name
UNKNOWN = "unknown"  # the images of a teacher that is a plain state dict


@dataclass(frozen=True)
class RunName:
    """What a run's files are named after."""

    dataset: str = "cifar10"
    role: str = "student"  # or "teacher"
    loss: str | None = None  # of distillation; None: without KD
    temp: float | None = None
    seed: int = DEFAULT_SEED
    subset: int | None = None
    holdout: int = 0
    omit: tuple[str, ...] = ()  # classes of which a student sees no training image
    student_images: int | None = None  # how many training images a student sees; None: all
    student: str | None = None  # MODULE:FUNCTION of the user's own; None: ours, or a teacher
    size: int = SIDE  # of the images, in pixels

    @property
    def kd(self) -> bool:
        """Whether this is a student with KD."""
        return self.loss is not None

    @property
    def teacher_name(self) -> "RunName":
        """The teacher to learn from, with the same --subset and --holdout; its seed is always the default one."""
        return RunName(self.dataset, "teacher", subset=self.subset, holdout=self.holdout, size=self.size)

    @property
    def split(self) -> str:
        """What the run is evaluated on: "test" or "holdout"."""
        return "holdout" if self.holdout else "test"

    @property
    def omitted(self) -> str:
        """The omitted classes in words, or if there are many, their number and a hash of their names."""
        words = " ".join(self.omit)
        if len(words.encode()) <= MAX_OMITTED_BYTES:
            return words
        return f"{len(self.omit)} classes {hashlib.sha256(words.encode()).hexdigest()[:8]}"

    @property
    def images_suffix(self) -> str:
        """What the choice of images adds to file names: nothing for all images at the default size."""
        size = f"_size{self.size}" if self.size != SIDE else ""
        subset = f"_subset{self.subset}" if self.subset else ""
        holdout = f"_holdout{self.holdout}" if self.holdout else ""
        omit = f"_omit_{self.omitted.replace(' ', '_')}" if self.omitted else ""
        images = f"_images{self.student_images}" if self.student_images else ""
        return size + subset + holdout + omit + images

    @property
    def student_suffix(self) -> str:
        """What a user's own student adds to file names."""
        return f"_{self.student.replace(':', '.')}" if self.student else ""

    @property
    def stem(self) -> str:
        """The file name without its suffix: teacher, student or student_kd_t5, and what differs from the defaults."""
        kd = f"_{self.loss}_t{format_number(self.temp)}" if self.kd else ""
        seed = "" if self.seed == DEFAULT_SEED else f"_seed{self.seed}"
        dataset = "" if self.dataset == "cifar10" else f"{self.dataset}_"
        return f"{dataset}{self.role}{self.student_suffix}{kd}{seed}{self.images_suffix}"

    def command(self, script: str, **more) -> str:
        """The command that trains ("train.py") or evaluates ("test.py") this run; without KD it has no --teacher."""
        options = {"tto": True} if self.role == "teacher" else {}
        if self.kd:
            loss = {} if self.loss == "kd" else {"loss": self.loss}
            options = {"kd": True, **loss, "temp": self.temp}
        names = ("dataset", "seed", "subset", "holdout", "omit", "student_images", "student", "size")
        options |= {name: getattr(self, name) for name in names if getattr(self, name) != getattr(RunName, name)}
        options |= {name: value for name, value in more.items() if self.kd or name != "teacher"}
        return " ".join(["python", script, *(f"--{name} {typed(value)}" for name, value in options.items())])


@dataclass(frozen=True, kw_only=True)
class RunConfig(Recipe, RunName):
    """Everything that shapes a run's result, as plain values; the machine does not belong to it."""

    num_classes: int
    images: str  # the fingerprint of the data set, or UNKNOWN
    flip: bool
    optimizer: str
    kd_weights: tuple[float, ...]  # without KD ()
    ce_weight: float  # without KD 1.0
    sync_bn: bool
    compile: bool
    deterministic: bool
    precision: str
    processes: int
    teacher: str | None = None  # the fingerprint of its weights, once it is loaded
    teacher_unknown: bool = False  # whether its teacher's training images are unknown
    student_layers: str = ""  # of the user's own student, the fingerprint of its layers, once it is imported

    @property
    def is_default_kd(self) -> bool:
        """Whether the loss is plain KD at its default weights."""
        default = LOSS_DEFAULTS["kd"]
        return (self.loss, self.kd_weights, self.ce_weight) == ("kd", default.kd_weights, default.ce_weight)

    @property
    def title(self) -> str:
        """The run in a table or a figure, without its seed; with the loss's weights unless it is default plain KD."""
        student = f"Student {self.student}" if self.student else "Student"
        kd = "w/o KD"
        if self.kd:
            function = LOSS_DEFAULTS[self.loss].function
            kd = f"with {function.upper()}, Temp = {format_number(self.temp)}"
        if self.kd and not self.is_default_kd:
            default_terms = (self.loss.upper(),) * len(self.kd_weights)
            terms = {"kd": ("KL",), "dkd": ("TCKD", "NCKD")}.get(function, default_terms)
            weighted = zip((*self.kd_weights, self.ce_weight), (*terms, "CE"), strict=True)
            kd += ", " + " + ".join(f"{format_number(weight)} {term}" for weight, term in weighted)
        title = "Teacher (VGG19 with BN)" if self.role == "teacher" else f"{student} ({kd})"
        title += f", omit {self.omitted}" if self.omit else ""
        title += f", {self.student_images:,} images" if self.student_images else ""
        names = [name for name in ("size", "subset", "holdout") if getattr(self, name) != getattr(RunName, name)]
        title += "".join(f", {name} {getattr(self, name)}" for name in names)
        title += ", images unknown" if self.images == UNKNOWN else ""
        return title + (", teacher's images unknown" if self.teacher_unknown else "")


def name_of(options) -> RunName:
    """The run that the options of either script name; of several losses, temperatures or image counts, the first."""
    loss, temp = None, None
    if options.kd:
        loss = options.loss[0] if options.loss else "kd"
        temp = (options.temp or temps_of(options.dataset, loss))[0]
    return RunName(
        dataset=options.dataset, role="teacher" if options.tto else "student", loss=loss, temp=temp, seed=options.seed,
        subset=options.subset, holdout=options.holdout, omit=options.omit or (), student=options.student,
        student_images=options.student_images[0] if options.student_images else None, size=options.size,
    )  # fmt: skip


def plan(options, spec: DataSet, precision: str, processes: int) -> list[RunConfig]:
    """The runs that the options of train.py ask for: one, or with --all the teacher, then the students of each seed."""
    first = name_of(options)
    names = [first]
    if options.all:
        names = [] if options.teacher else [first.teacher_name]
        losses = options.loss or ("kd",)
        if options.matched:
            losses += tuple(f"kd_as_{loss}" for loss in losses if LOSS_DEFAULTS[loss].function != "kd")
        for seed in range(first.seed, first.seed + options.seeds):
            for images in options.student_images or (None,):
                student = replace(first, seed=seed, student_images=images)
                names.append(student)  # without KD
                for loss in dict.fromkeys(losses):  # each once, also one that was typed and is matched
                    for temp in options.temp or temps_of(options.dataset, loss):
                        names.append(replace(student, loss=loss, temp=temp))
    return [resolve(name, options, spec, precision, processes) for name in names]


def resolve(name: RunName, options, spec: DataSet, precision: str, processes: int) -> RunConfig:
    """The RunConfig of a RunName: what was typed, and the recipe's values where nothing was typed."""
    recipe = asdict(recipe_of(name.dataset, name.role, options.optimizer, spec.train_images, name.student_images))
    if not (options.all and name.role == "teacher"):  # with --all these options are the students'
        recipe |= {f: getattr(options, f) for f in RECIPE_FIELDS if getattr(options, f) is not None}
    recipe["views"] = recipe["views"] or spec.views
    kd_weights, ce_weight = (), 1.0
    if name.kd:
        kd_weights = options.kd_weight or LOSS_DEFAULTS[name.loss].kd_weights
        ce_weight = LOSS_DEFAULTS[name.loss].ce_weight if options.ce_weight is None else options.ce_weight
    return RunConfig(
        **asdict(name), **recipe, kd_weights=kd_weights, ce_weight=ce_weight,
        num_classes=len(spec.classes), images=spec.fingerprint, flip=spec.flip, precision=precision,
        processes=processes, sync_bn=options.sync_bn and processes > 1,
        optimizer=options.optimizer, compile=options.compile, deterministic=options.deterministic,
    )  # fmt: skip


def config_of(content: dict) -> RunConfig:
    """The run of a checkpoint, or of a log's header; UserError if other code saved it."""
    with suppress(TypeError, AttributeError):  # a field is missing, or unknown, or it is not a dict
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in content["run"].items()}
        run = RunConfig(**values)
        if run.dataset in DATA_SETS and run.loss in (None, *LOSS_DEFAULTS):
            return run
    what = "was saved by code with other settings, losses or data sets"
    raise UserError(f"{content['path']} {what}: use that code, or train it again with --resume False (not --all)")


LOSS_FIELDS = {"loss", "temp", "kd_weights", "ce_weight"}
KD_FIELDS = LOSS_FIELDS | {"teacher", "teacher_unknown"}


def differences(run: RunConfig, other: RunConfig, ignoring: set[str] = frozenset()) -> list[str]:
    """The names of the fields in which two runs differ."""
    names = [f.name for f in fields(RunConfig) if f.name not in ignoring]
    return [name for name in names if getattr(run, name) != getattr(other, name)]


def describe_differences(run: RunConfig, other: RunConfig, ignoring: set[str] = frozenset()) -> str:
    """How `run` differs from another, in words: `num_epochs 30, not 16`."""
    names = differences(run, other, ignoring)
    return "; ".join(f"{name} {value_text(run, name)}, not {value_text(other, name)}" for name in names)


def value_text(run: RunConfig, name: str) -> str:
    """The value of a field in words; of a hash, the first half."""
    value = getattr(run, name)
    if re.fullmatch("[0-9a-f]{16}", str(value)):
        return value[:8]
    return typed(value) or "none"  # an empty tuple


def is_baseline_of(baseline: RunConfig, run: RunConfig) -> bool:
    """Whether `baseline` is the same-seed baseline without KD of `run`, which has KD."""
    return run.kd and not baseline.kd and not differences(baseline, run, KD_FIELDS)


def why_no_baseline(run: RunConfig, others: list[RunConfig]) -> str:
    """Why a student with KD has no baseline among others."""
    others = [other for other in others if other.role == "student" and not other.kd]
    if not others:
        return "there is no student without KD"
    nearest = min(others, key=lambda other: len(differences(other, run, KD_FIELDS)))
    return f"the nearest student without KD has {describe_differences(nearest, run, KD_FIELDS)}"


def is_kd_baseline_of(baseline: RunConfig, run: RunConfig) -> bool:
    """Whether `baseline`, plain KD at default weights or matched to `run`, is the baseline of `run`, another loss."""
    same_weights = sum(baseline.kd_weights) == sum(run.kd_weights) and baseline.ce_weight == run.ce_weight
    is_matched = baseline.loss == f"kd_as_{run.loss}" and baseline.temp == run.temp and same_weights
    has_other_loss = run.kd and LOSS_DEFAULTS[run.loss].function != "kd"
    return (baseline.is_default_kd or is_matched) and has_other_loss and not differences(baseline, run, LOSS_FIELDS)


def saw_held_out(run: RunConfig, name: RunName, train_images: int) -> bool:
    """Whether `run` was trained on images that `name` holds out, the last ones of the training images."""
    seen = min(run.subset or train_images, train_images) - run.holdout
    first_held_out = min(name.subset or train_images, train_images) - name.holdout
    return name.holdout > 0 and seen > first_held_out


def row_order(run: RunName) -> tuple:
    """A run's place in a table: teacher first, then student, loss (none first), T, omitted classes, images, seed."""
    loss = list(LOSS_DEFAULTS).index(run.loss) if run.kd else -1
    return run.role != "teacher", run.student or "", loss, run.temp or 0.0, run.omit, run.student_images or 0, run.seed


# A label does not list these fields for runs whose titles differ: the titles say enough.
TITLE_FIELDS = {f.name for f in fields(RunName)} | {"kd_weights", "ce_weight", "student_layers"}
TITLE_FIELDS |= {"images", "teacher_unknown"}
SCALED = {"num_epochs", "batch_size"}  # nor these, if the students' numbers of images differ: recipe_of scales them


def row_labels(runs: list[RunConfig]) -> list[str]:
    """A label for each of a table's rows: its run's title, then other fields in which it differs from similar rows."""
    labels = []
    for run in runs:
        names = set()
        comparable = [other for other in runs if (other.role, other.kd) == (run.role, run.kd)]
        for other in comparable:
            ignoring = TITLE_FIELDS if other.student_images == run.student_images else TITLE_FIELDS | SCALED
            ignoring = {"seed"} if other.title == run.title else ignoring
            names.update(differences(run, other, ignoring))
        values = [f"{f.name} {value_text(run, f.name)}" for f in fields(RunConfig) if f.name in names]
        labels.append(", ".join([run.title, *values]))
    return labels
