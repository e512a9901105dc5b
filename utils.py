"""Images in memory, the distillation loss, the metrics and the curves: functions of tensors and paths."""

import hashlib
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.style
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data_sets import DATA_SETS, SIDE, DataSet, padding
from data_sets.digits import cached_digits
from data_sets.downloaded import read_torchvision
from data_sets.folder import read_folder
from data_sets.pictures import check_memory
from runtime.checkpoint import fingerprint
from runtime.device import Runtime
from runtime.errors import Stopped, UserError
from runtime.files import writing
from runtime.progress import Progress

EVALUATION_BATCH = 500  # images of 32 x 32; of larger ones fewer, with as many pixels in all
DIGITS_IMAGES = {"train": 5000, "test": 2000}


# ---------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class Images:
    """Images in memory: pixels (N, S, S, 3) uint8 and labels (N,) int64, on one device."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> "Images":
        return Images(self.pixels[rows], self.labels[rows])


@dataclass(frozen=True)
class Data:
    """A data set as it was read, on the CPU, and what the user should be told about it."""

    spec: DataSet
    train: Images
    test: Images
    notes: tuple[str, ...] = ()

    def rows(
        self, subset: int | None, holdout: int, omit: tuple[str, ...] = (), student_images: int | None = None
    ) -> torch.Tensor:
        """The rows of `train` (N,) to train on: the first `subset` (None: all) without the last `holdout` of these.

        Without the classes in `omit`; of the rest `student_images` (None: all), balanced. UserError if too few.
        """
        count = min(subset or len(self.train), len(self.train))
        if holdout >= count:
            raise UserError(f"--holdout {holdout} leaves none of the {count} training images: give a smaller number")
        all_labels = self.train.labels[: count - holdout]
        rows = (~torch.isin(all_labels, self.class_indices(omit))).nonzero()[:, 0]
        if not len(rows):
            raise UserError(f"--omit {' '.join(omit)} leaves no training image: omit fewer classes")
        if student_images is None:
            return rows
        labels = all_labels[rows]
        classes = labels.unique()
        if not len(classes) <= student_images <= len(rows):
            bounds = f"at least {len(classes)}, one per class, and at most the {len(rows)} that are left"
            raise UserError(f"--student_images {student_images}: give {bounds}")
        earlier = torch.empty_like(labels)  # for each image the number of earlier ones of its class
        for label in classes:
            earlier[labels == label] = torch.arange(int((labels == label).sum()))
        balanced = earlier.argsort(stable=True)  # the first of each class, then the second of each, ...
        return rows[balanced[:student_images]].sort().values

    def class_indices(self, classes: tuple[str, ...]) -> torch.Tensor:
        """The numbers (K,) of classes; UserError if there is no such class."""
        if unknown := set(classes) - set(self.spec.classes):
            known = ", ".join(self.spec.classes[:10])
            raise UserError(f"--omit: {self.spec.name} has no class {min(unknown)!r}: give a name such as {known}")
        return torch.tensor([self.spec.classes.index(name) for name in classes], dtype=torch.int64)

    def held_out(self, subset: int | None, holdout: int) -> Images:
        """The images to evaluate on: the holdout if there is one, else the test images (the first `subset` // 5)."""
        if holdout:
            first = len(self.rows(subset, holdout))  # after all that are trained on
            return self.train[first : first + holdout]
        return self.test[: max(subset // 5, 1)] if subset else self.test


def load_images(
    name: str, folder: Path, runtime: Runtime, flip: bool | None = None, skip_broken: bool = False, size: int = SIDE
) -> Data:
    """The data set `name` in `folder`, downloaded or drawn if missing, its spec complete; UserError if that fails."""
    spec, notes = replace(DATA_SETS[name], size=size), []
    if not runtime.is_main:
        runtime.barrier()  # the first process downloads, others wait
    if spec.source == "folder":
        classes, arrays, notes = read_folder(folder, skip_broken, size, runtime.is_main)
        spec = replace(spec, classes=classes)
    elif spec.source == "digits":
        check_memory(sum(DIGITS_IMAGES.values()), size)
        arrays = {split: cached_digits(folder, split, count, size) for split, count in DIGITS_IMAGES.items()}
    else:
        arrays = read_torchvision(spec, folder)
    if runtime.is_main:
        runtime.barrier()
    train, test = (Images(*map(torch.from_numpy, arrays[split])) for split in ("train", "test"))  # pixels, labels
    digest = hashlib.sha256(repr(spec.classes).encode())
    for tensor in (train.pixels, train.labels, test.pixels, test.labels):
        digest.update(tensor.numpy())
    mean, std = (spec.mean, spec.std) if spec.mean else pixel_statistics(train.pixels)
    flip = spec.flip if flip is None else flip
    spec = replace(spec, mean=mean, std=std, flip=flip, fingerprint=digest.hexdigest()[:16], train_images=len(train))
    return Data(spec, train, test, tuple(notes))


def pixel_statistics(pixels: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, 0 to 1, of pixels (N, H, W, 3) uint8."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    channels = (pixels[..., i].flatten() for i in range(3))
    shares = [torch.bincount(channel, minlength=256).double() / len(channel) for channel in channels]
    means = [float(share @ levels) for share in shares]
    variances = [float(share @ (levels - mean) ** 2) for share, mean in zip(shares, means, strict=True)]
    return tuple(means), tuple(max(variance**0.5, 1 / 255) for variance in variances)  # 0 for pictures of one colour


# ---------------------------------------------------------------------------------------------- views
def seed_of(*key) -> int:
    """A seed that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def seeded_generator(*key) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone."""
    return torch.Generator().manual_seed(seed_of(*key))


def epoch_order(rows: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Image rows (N,) in the order of an epoch, a function of (seed, epoch)."""
    return rows[torch.randperm(len(rows), generator=seeded_generator("order", seed, epoch))]


def epoch_view(count: int, flip: bool, seed: int, epoch: int) -> int:
    """The k of an epoch's views, 0 <= k < count: all k in random order, then again in another random order."""
    cycle, place = divmod(epoch, count)
    views = torch.randperm(count, generator=seeded_generator("views", seed, cycle))
    if flip:  # even and odd k alternate: with an even count, an image is mirrored in every other epoch
        views[0::2], views[1::2] = views[views % 2 == 0], views[views % 2 == 1]
    return int(views[place])


class Views:
    """The random crops and mirror images of a training set: each image has its own 1st, 2nd, ... view.

    A view is (dy * offsets + dx) * 2 + mirrored. An image's k-th view depends on its row, the training set's shape and
    `flip`, and on no seed, so all students share it and the teacher's logits for it.
    """

    def __init__(self, images: Images, spec: DataSet, device: torch.device) -> None:
        self.flip = spec.flip
        # Where images are stored: MPS can't gather from overlapping windows.
        self.storage = torch.device("cpu") if device.type == "mps" else device
        self.labels = images.labels.to(device)
        side, pad = images.pixels.shape[2], padding(images.pixels.shape[2])
        self.offsets = 2 * pad + 1  # crop positions along one axis
        self.padded = F.pad(images.pixels, (0, 0, pad, pad, pad, pad)).to(self.storage)
        # One overlapping window per padded pixel: index_select copies a crop as `side` contiguous rows.
        self.width = self.padded.shape[2]
        windows = len(images) * self.width**2 - (side - 1) * (self.width + 1)  # the last one ends with the last pixel
        self.windows = self.padded.as_strided((windows, side, side * 3), (3, self.width * 3, 1))
        self.normalise = Normaliser(spec, device)
        generator = seeded_generator("views of images")
        self.crops = torch.randperm(self.offsets**2, generator=generator).to(self.storage)
        self.mirrored_first = torch.randint(2, (len(images),), generator=generator).to(self.storage)
        first_crops = torch.randint(len(self.crops), (len(images), 2), generator=generator)  # plain, mirrored
        self.first_crops = first_crops.to(self.storage)

    def __len__(self) -> int:
        return len(self.labels)

    def view_of(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """The k-th view (B,) of image rows (B,): every other k mirrored, all different until all are used."""
        if self.flip:  # plain and mirrored views alternate
            mirrored, turn = (self.mirrored_first[rows] + k) % 2, k // 2
        else:
            mirrored, turn = torch.zeros_like(rows), k
        place = (self.first_crops[rows, mirrored] + turn) % len(self.crops)
        return 2 * self.crops[place] + mirrored

    def images(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Image rows (B,) in their k-th view, normalised (B, 3, S, S) channels_last."""
        rows = rows.to(self.storage, non_blocking=True)
        views = self.view_of(rows, k)
        offset, mirrored = views // 2, views % 2 == 1
        top, left = offset // self.offsets, offset % self.offsets
        crops = self.windows.index_select(0, (rows * self.width + top) * self.width + left)
        flipped = crops.unflatten(2, (-1, 3)).flip(2).flatten(2)
        # Chosen eight bytes at a time: byte by byte takes longer than all the rest.
        words = torch.where(mirrored.view(-1, 1, 1), flipped.view(torch.int64), crops.view(torch.int64))
        return self.normalise(words.view(torch.uint8).unflatten(2, (-1, 3)))


class Normaliser:
    """Pixels (B, S, S, 3) uint8 -> (B, 3, S, S) float32 of mean 0 and deviation 1, channels_last, on the device."""

    def __init__(self, spec: DataSet, device: torch.device) -> None:
        mean, std = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
        # For a whole row of pixels at once: three numbers at a time take seven times as long.
        self.scale, self.shift = (1 / (255 * std)).repeat(spec.size), (-mean / std).repeat(spec.size)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.to(self.scale.device).flatten(2).float().mul_(self.scale).add_(self.shift)
        return values.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def fingerprint_views() -> str:
    """A hash of views of made-up images, which changes with the augmentation and with torch's random numbers."""
    pixels = torch.arange(4 * SIDE * SIDE * 3).remainder(251).to(torch.uint8).view(4, SIDE, SIDE, 3)
    spec = DataSet("made up", "", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    views = Views(Images(pixels, torch.zeros(4, dtype=torch.int64)), spec, torch.device("cpu"))
    shown = torch.stack([views.images(torch.arange(4), k) for k in range(8)])
    return fingerprint({"views": (255 * shown).round().to(torch.uint8)})


# ---------------------------------------------------------------------------------------------- loss
def soft_target_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temp: float) -> torch.Tensor:
    """T^2 KL(teacher_T || student_T) of logits (B, C), a scalar in nats.

    T^2 keeps the ratio of this term's gradient to CE's about constant (Hinton, Vinyals & Dean, 2014, section 2).
    """
    student = F.log_softmax(student_logits / temp, dim=1)
    teacher = F.log_softmax(teacher_logits / temp, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temp**2


def kd_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temp: float, alpha: float
) -> torch.Tensor:
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, a scalar in nats, in float32.

    Logits (B, C), those of the teacher without gradients, targets (B,) int64. ValueError if temp is not positive and
    finite, alpha is outside [0, 1], or the logits differ in shape.
    """
    if not 0 < temp < math.inf:
        raise ValueError(f"temp must be positive and finite, not {temp}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1], not {alpha}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of shape {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)} differ")
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    ce = F.cross_entropy(student_logits, targets)
    return alpha * soft_target_loss(student_logits, teacher_logits, temp) + (1 - alpha) * ce


# ---------------------------------------------------------------------------------------------- metrics
def topk_correct(logits: torch.Tensor, targets: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> torch.Tensor:
    """How many of logits (B, C) have their target (B,) among the k highest, int64 (K,); ties and NaN go against it."""
    of_target = logits.gather(1, targets[:, None])
    ahead = (~(logits < of_target)).sum(1) - 1  # ties and NaN are not less; the target is not ahead of itself
    return torch.stack([(ahead < k).sum() for k in ks])


def loss_and_accuracies(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Mean cross-entropy (nats), top-1 and, with more than five classes, top-5 (0 to 1) of logits (B, C)."""
    loss = F.cross_entropy(logits.double(), targets).item()
    top1, top5 = (count / len(targets) for count in topk_correct(logits, targets).tolist())
    return {"loss": loss, "top1": top1} | ({"top5": top5} if logits.shape[1] > 5 else {})


@torch.no_grad()
def compute_logits(
    model: torch.nn.Module, images_of: Callable, count: int, num_classes: int, runtime: Runtime, title: str = ""
) -> torch.Tensor:
    """Logits (count, num_classes), float32 on every process's CPU, of images (B, 3, S, S) = images_of(rows (B,)).

    All batches have one size, so the logits depend neither on the count nor on how many processes share the batches.
    With a `title`, progress is shown. Stopped after a signal; UserError if a logit isn't finite.
    """
    logits = torch.zeros(count, num_classes, device=runtime.device)
    size = images_of(torch.zeros(1, dtype=torch.int64)).shape[-1]
    batch_size = max(EVALUATION_BATCH * SIDE**2 // size**2, 1)
    starts = range(0, count, batch_size)
    shown = bool(title) and runtime.is_main
    with runtime.repeatable_logits(), Progress(title, len(starts), shown, unit="batch") as progress:
        for start in starts[runtime.rank :: runtime.world_size]:
            rows = torch.arange(start, start + batch_size).clamp(max=count - 1)  # the last batch repeats the last image
            images = images_of(rows).contiguous(memory_format=runtime.memory_format)
            with runtime.autocast():
                logits[start : start + batch_size] = model(images)[: count - start]  # without waiting for the device
            if runtime.stop.number:
                break
            progress.step()
    if signal_number := runtime.agree(runtime.stop.number)[0]:
        raise Stopped(int(signal_number))
    logits = runtime.total(logits)  # rows of other processes are zeros here
    if not logits.sum().isfinite():  # finite only if every logit is
        raise UserError("the model's logits are not finite: train it again with a lower --lr")
    return logits


def logits_of(model: torch.nn.Module, images: Images, spec: DataSet, runtime: Runtime) -> torch.Tensor:
    """The logits (N, C) of images as they are, not augmented; see `compute_logits`."""
    normalise = Normaliser(spec, runtime.device)
    return compute_logits(model, lambda rows: normalise(images.pixels[rows]), len(images), len(spec.classes), runtime)


def evaluate(model: torch.nn.Module, images: Images, spec: DataSet, runtime: Runtime) -> dict[str, float]:
    """`loss_and_accuracies` of a model on images as they are, not augmented; the model stays in eval mode."""
    model.eval()
    runtime.share_buffers(model)  # so that what is evaluated is what the first process saves
    return loss_and_accuracies(logits_of(model, images, spec, runtime), images.labels)


# ---------------------------------------------------------------------------------------------- curves
# Okabe & Ito's colours, which colour-blind people can tell apart; further lines are dashed.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LOOKS = matplotlib.cycler(linestyle=["-", "--", ":", "-."]) * matplotlib.cycler(color=COLOURS)
SETTINGS = {"axes.prop_cycle": LOOKS, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3}
SETTINGS |= {"figure.constrained_layout.use": True, "axes.titlesize": 9, "text.parse_math": False}  # names may hold a $
figure_style = matplotlib.style.context(["default", SETTINGS])  # for all figures, whatever the user's own style


def new_panels(title: str, ylabels: list[str], xlabel: str = "epoch", size: tuple[float, float] = (7, 4.2)) -> list:
    """A new figure's axes, one for each y label; 7 inches are the README's width."""
    figure = Figure(size)
    panels = figure.subplots(1, len(ylabels), squeeze=False)[0].tolist()
    figure.suptitle(textwrap.fill(title, 68))
    for axes, ylabel in zip(panels, ylabels, strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.locator_params("x", integer=True)
    return panels


def save_figure(axes, path: Path) -> Path:
    """Write the figure of `axes`, whose labels are the legend below it, to `path` as PNG, atomically."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [textwrap.fill(label, 85) for label in labels]
    if labels:
        lines = sum(label.count("\n") + 1 for label in labels)
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.17 * lines)
        axes.figure.legend(handles, labels, loc="outside lower center", fontsize=9)
    with writing(path) as temporary:
        axes.figure.savefig(temporary, dpi=120, format="png")
    return path


def parse_log(text: str) -> tuple[dict, list[dict]]:
    """The header of a run's log, and the line of each epoch."""
    header, *lines = map(json.loads, text.splitlines())
    return header, lines


@figure_style
def plot_curves(log_path: Path, out_dir: Path) -> list[Path]:
    """Draw a run's accuracy (%) and loss (nats) over its epochs from its log; return the figures' paths."""
    log_path, out_dir = Path(log_path), Path(out_dir)
    header, lines = parse_log(log_path.read_text())
    split, epochs = header["split"], [line["epoch"] for line in lines]
    # Figure -> panel (its y label) -> curve -> key in a line of the log. On `split`, "loss" is the cross-entropy.
    figures = {
        "accuracy": {"top-1 (%)": {"train": "top1", split: "top1"}, "top-5 (%)": {"train": "top5", split: "top5"}},
        "loss": {"cross-entropy (nats)": {"train": "ce", split: "loss"}, "soft term (nats)": {"train": "kl"}},
    }
    paths = []
    for name, panels in figures.items():
        # Only what the log has: top-5 with more than five classes, the soft term with KD.
        shown = [ylabel for ylabel, curves in panels.items() if all(curves["train"] in line["train"] for line in lines)]
        drawn = new_panels(f"{header['title']} on {header['run']['dataset']}: {name}", shown)
        for axes, ylabel in zip(drawn, shown, strict=True):
            for which, key in panels[ylabel].items():
                axes.plot(epochs, [line[which][key] for line in lines], marker=".", label=which)
        paths.append(save_figure(drawn[0], out_dir / f"{log_path.stem}_{name}.png"))
    return paths
