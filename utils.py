"""Images in memory, the distillation loss, the metrics and the curves: functions of tensors and paths."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import matplotlib.ticker
import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from datasets import CROPS, OFFSETS, PAD, SIDE, DatasetSpec
from datasets.digits import cached_digits
from datasets.pictures import square
from runtime.device import Runtime
from runtime.errors import Stopped, UserError
from runtime.files import writing
from runtime.identity import Identity
from runtime.log import read_log
from runtime.signals import StopSignal

EVALUATION_BATCH = 500
VIEWS = 2 * CROPS  # each crop as it is and mirrored
FEW_CLASSES = 5  # of which every image has its class among the five likeliest: top-5 says nothing

# ---------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Images:
    """A data set in memory: pixels (N, 32, 32, 3) uint8 and labels (N,) int64, on one device."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Images":
        return Images(self.pixels[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


def load_images(
    spec: DatasetSpec, folder: Path, *splits: str, subset: int | None = None, holdout: int = 0
) -> list[Images]:
    """The images of each of `splits`, on the CPU: "train", "holdout" or "test".

    `subset` keeps the first N training and N/5 test images; "holdout" are the last `holdout` training images, which
    "train" is then without. UserError where the data can't be had.
    """
    halves = read_images(spec, folder, {"test" if split == "test" else "train" for split in splits})
    if subset:
        sizes = {"train": subset, "test": max(subset // 5, 1)}
        halves = {half: images[: sizes[half]] for half, images in halves.items()}
    if holdout and "train" in halves:
        train, kept = halves["train"], len(halves["train"]) - holdout
        if kept < 1:
            raise UserError(f"--holdout {holdout} leaves none of the {len(train)} training images: give less")
        halves |= {"train": train[:kept], "holdout": train[kept:]}
    return [halves[split] for split in splits]


def read_images(spec: DatasetSpec, folder: Path, halves: set[str]) -> dict[str, Images]:
    """The whole training set ("train") or test set ("test"), each if asked for."""
    if not spec.is_known:
        raise UserError("--dataset folder is for train.py and test.py, which read the folder first")
    if spec.halves:
        read = spec.halves
    elif spec.torchvision_class is None:
        read = {half: cached_digits(folder, half, {"train": spec.train_images, "test": 2000}[half]) for half in halves}
    else:
        read = read_torchvision(spec, folder, sorted(halves))
    return {half: Images(*map(torch.from_numpy, read[half])) for half in halves}


def read_torchvision(spec: DatasetSpec, folder: Path, halves: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels and labels of each half, downloaded by torchvision where they are not there, MD5-checked.

    What is not 32 x 32 pixels of RGB already becomes so as pictures do.
    """
    dataset_class = getattr(torchvision.datasets, spec.torchvision_class)

    class CheckedOnce(dataset_class):
        """The data set, its files read for their check sums until they were found whole: twice a half otherwise."""

        whole = False

        def _check_integrity(self) -> bool:
            CheckedOnce.whole = CheckedOnce.whole or super()._check_integrity()
            return CheckedOnce.whole

    CheckedOnce.__name__ = dataset_class.__name__  # which some name their folder after
    by_split = "split" in inspect.signature(dataset_class).parameters
    needed, url = folder / getattr(dataset_class, "base_folder", ""), getattr(dataset_class, "url", "its source")
    put = f"put {dataset_class.filename} into {folder}, " if hasattr(dataset_class, "filename") else ""
    try:
        asked = {half: {"split": half} if by_split else {"train": half == "train"} for half in halves}
        return {half: as_arrays(CheckedOnce(folder, download=True, **which)) for half, which in asked.items()}
    except Exception as error:  # a network, a disk or an archive fails in many ways
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no whole {spec.torchvision_class} in {needed}, and no download from {url}: {why}; "
            f"run again with a network, {put}or give its folder by --data_path"
        ) from error


def as_arrays(found: torchvision.datasets.VisionDataset) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 32, 32, 3) uint8 and labels (N,) int64 of a data set that gives pictures and classes' numbers."""
    pixels = getattr(found, "data", None)
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (SIDE, SIDE, 3):
        return pixels, np.asarray(found.targets, dtype=np.int64)
    pixels, labels = np.empty((len(found), SIDE, SIDE, 3), np.uint8), np.empty(len(found), np.int64)
    for i in range(len(found)):
        picture, labels[i] = found[i]
        pixels[i] = square(picture)
    return pixels, labels


class Views:
    """Every random crop and mirror image of a set of images; view = (dy * 9 + dx) * 2 + flip.

    An epoch's order and views are a function of (seed, epoch) alone and views belong to images, not to
    positions: all processes agree without talking, and a resumed run repeats nothing and skips nothing. An image
    that is mirrored in one epoch is not in the next, so that two epochs show more of it than by chance (K. Jordan,
    "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, section 3.6).
    """

    def __init__(self, images: Images, spec: DatasetSpec, limit: int | None = None) -> None:
        self.labels, self.spec = images.labels, spec
        device = images.pixels.device
        self.padded = F.pad(images.pixels, (0, 0, PAD, PAD, PAD, PAD))
        # The window of 32 rows of 96 bytes that starts at each padded pixel: picking a crop is 32 block copies.
        self.width = self.padded.shape[2]
        last_start = self.labels.numel() * self.width**2 - (SIDE - 1) * (self.width + 1)
        self.windows = self.padded.as_strided((last_start, SIDE, SIDE * 3), (3, self.width * 3, 1))
        self.normalise = Normaliser(spec, device)
        self.flip = spec.flip
        # The views that --views K leaves an image are the same for every seed, so that all share a cache.
        limited = limit is not None and limit < spec.views
        self.allowed = self.choose_views(limit) if limited else None

    def choose_views(self, limit: int) -> torch.Tensor:
        """`limit` views of each image (N, limit): crops at random, and every other one mirrored."""
        generator = torch.Generator().manual_seed(0)
        columns = torch.arange(limit)
        if not self.flip:
            return 2 * torch.rand(len(self), CROPS, generator=generator).topk(limit).indices
        crops = torch.rand(len(self), 2, CROPS, generator=generator).topk((limit + 1) // 2).indices
        mirrored = (columns + torch.randint(2, (len(self), 1), generator=generator)) % 2
        return 2 * crops[:, columns % 2, columns // 2] + mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def plan(self, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the images (N,) and the view of each image (N,), both int64 on the CPU."""
        count, generator = len(self), torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(count, generator=generator)
        if self.allowed is None:
            crops = torch.randint(CROPS, (count,), generator=generator)
            mirrored_first = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
            return order, 2 * crops + (mirrored_first + epoch) % 2 * self.flip
        # Every other column is mirrored: the even ones are for one epoch, the odd ones for the next.
        limit = self.allowed.shape[1]
        stride = 2 if self.flip and limit > 1 else 1
        first = epoch % stride
        columns = first + stride * torch.randint(len(range(first, limit, stride)), (count,), generator=generator)
        return order, self.allowed.gather(1, columns[:, None])[:, 0]

    def columns(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """The place (B,) of each view (B,) among the `per_image` ones that its image row (B,) is left."""
        return views if self.allowed is None else (self.allowed[rows] == views[:, None]).nonzero()[:, 1]

    @property
    def per_image(self) -> int:
        """How many views an image has a place for."""
        return VIEWS if self.allowed is None else self.allowed.shape[1]

    def batch(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image rows (B,) in their views (B,), normalised (B, 3, 32, 32) channels_last, and their labels (B,)."""
        device = self.labels.device
        rows, views = (values.to(device, non_blocking=device.type == "cuda") for values in (rows, views))
        top, left, flip = views // 2 // OFFSETS, views // 2 % OFFSETS, views % 2 == 1
        crops = self.windows.index_select(0, (rows * self.width + top) * self.width + left)
        mirrored = crops.unflatten(2, (SIDE, 3)).flip(2).flatten(2)
        # Chosen eight bytes at a time: byte by byte takes longer than all the rest.
        words = torch.where(flip.view(-1, 1, 1), mirrored.view(torch.int64), crops.view(torch.int64))
        return self.normalise(words.view(torch.uint8).unflatten(2, (SIDE, 3))), self.labels[rows]


class Normaliser:
    """Pixels (B, H, W, 3) uint8 -> (B, 3, H, W) float32 of mean 0 and std 1, channels_last without a copy."""

    def __init__(self, spec: DatasetSpec, device: torch.device) -> None:
        mean, std = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
        # For a whole row of pixels, so that a processor works on many at once: three numbers take seven times as long.
        self.scale, self.shift = (1 / (255 * std)).repeat(SIDE), (-mean / std).repeat(SIDE)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.flatten(2).float().mul_(self.scale).add_(self.shift)
        return values.unflatten(2, (SIDE, 3)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------- loss


def soft_target_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temp: float) -> torch.Tensor:
    """T^2 KL(teacher_T || student_T) of logits (B, C), a scalar in nats.

    T^2 keeps the soft targets' gradient at the size of the hard ones' (Hinton, Vinyals & Dean, 2014, section 2).
    """
    student = F.log_softmax(student_logits / temp, dim=1)
    teacher = F.log_softmax(teacher_logits / temp, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temp**2


def kd_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temp: float, alpha: float
) -> torch.Tensor:
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, a scalar in nats, in float32.

    Logits (B, C), targets (B,) int64. ValueError where temp <= 0 or alpha is outside [0, 1].
    """
    if not temp > 0:
        raise ValueError(f"temp must be above 0, not {temp}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1], not {alpha}")
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    ce = F.cross_entropy(student_logits, targets)
    return alpha * soft_target_loss(student_logits, teacher_logits, temp) + (1 - alpha) * ce


# ---------------------------------------------------------------------------------------------- metrics


def topk_correct(logits: torch.Tensor, targets: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> torch.Tensor:
    """How many of logits (B, C) have their target (B,) among the k highest: one count a k, int64.

    A tie counts against the target, and so does a NaN: constant logits score nothing by luck.
    """
    of_target = logits.gather(1, targets[:, None])
    ahead = (~(logits < of_target)).sum(1) - 1
    return torch.stack([(ahead < k).sum() for k in ks])


def accuracies(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Top-1 and, of more than five classes, top-5 (0 to 1) of logits (B, C) and targets (B,)."""
    top1, top5 = (count / len(targets) for count in topk_correct(logits, targets).tolist())
    return {"top1": top1} | ({"top5": top5} if logits.shape[1] > FEW_CLASSES else {})


@torch.inference_mode()
def all_logits(
    model: torch.nn.Module, images: Images, spec: DatasetSpec, runtime: Runtime, stop: StopSignal | None = None
) -> torch.Tensor:
    """The logits (N, C) of all images in their order, float64 on every process's CPU, each computed once.

    Stopped where a signal came, UserError where a logit is not finite.
    """
    normalise = Normaliser(spec, images.pixels.device)
    rows = torch.arange(runtime.rank, len(images), runtime.world_size)
    parts = []
    for part in rows.to(images.pixels.device).split(EVALUATION_BATCH):
        with runtime.autocast():
            parts.append(model(normalise(images.pixels[part])))
        if stop is not None and stop.number and runtime.world_size == 1:
            raise Stopped(stop.number)
    logits = torch.zeros(len(images), len(spec.classes), dtype=torch.float64)
    logits[rows] = torch.cat(parts).cpu().double()
    logits = runtime.total(logits)  # another process's rows are zeros here
    if not logits.isfinite().all():
        raise UserError("the model answers with numbers that are not finite: train it anew with a lower --lr")
    return logits


def evaluate(
    model: torch.nn.Module, images: Images, spec: DatasetSpec, runtime: Runtime, stop: StopSignal | None = None
) -> dict[str, float]:
    """Mean cross-entropy (nats), top-1 and, of more than five classes, top-5 (0 to 1) over all images.

    Raises what `all_logits` raises.
    """
    model.eval()
    runtime.share_buffers(model)  # what is evaluated is what the first process saves
    logits, labels = all_logits(model, images, spec, runtime, stop), images.labels.cpu()
    return {"loss": F.cross_entropy(logits, labels).item(), **accuracies(logits, labels)}


# ---------------------------------------------------------------------------------------------- curves

# Okabe & Ito's colours, told apart by the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(height: float):
    """A figure of README width, drawn without a display, the same whatever a user's matplotlibrc says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    figure = Figure(figsize=(7, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(title: str, ylabel: str):
    """The labelled axes of a figure whose only ones they are."""
    axes = new_figure(4.2).add_subplot(title=title, xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return axes


def save_figure(axes, path: Path) -> Path:
    """Write the figure of `axes` to `path` as PNG, atomically."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9)
    with writing(path) as temporary:
        axes.figure.savefig(temporary, dpi=120, format="png")
    return path


def plot_curves(log_path: Path, out_dir: Path) -> list[Path]:
    """Draw a run's accuracy (%) and loss (nats) over its epochs from its JSON lines; the figures' paths."""
    log_path, out_dir = Path(log_path), Path(out_dir)
    header, lines = read_log(log_path)
    epochs = [line["epoch"] for line in lines]
    panels = {
        "accuracy": ("accuracy (%)", {"top1": ("top-1", "-"), "top5": ("top-5", "--")}),
        "loss": ("loss (nats)", {"loss": ("loss", "-")}),
    }
    identity = Identity(header["identity"])
    if identity["kd"]:
        soft = "T² KL" if identity["loss"] == "kd" else identity["loss"].upper()
        panels["loss"][1].update(ce=("cross-entropy", "--"), kl=(soft, ":"))
    paths = []
    for panel, (ylabel, curves) in panels.items():
        axes = new_axes(f"{identity.title} on {identity['dataset']}: {panel}", ylabel)
        for key, (label, style) in curves.items():
            for colour, split in zip(COLOURS, ("train", header["evaluated_on"]), strict=False):
                if lines and key in lines[0][split]:
                    values = [line[split][key] for line in lines]
                    axes.plot(epochs, values, style, color=colour, marker=".", label=f"{split} {label}")
        paths.append(save_figure(axes, out_dir / f"{log_path.stem}_{panel}.png"))
    return paths
