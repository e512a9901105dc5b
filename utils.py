"""CIFAR-10 in memory, the distillation loss, the metrics and the curves: functions of tensors and paths."""

import contextlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.ticker
import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from checkpoint import read_log, writing
from digits import cached_digits
from recipes import OFFSETS, PAD, DatasetSpec
from runtime import Runtime, Stopped, StopSignal, UserError

EVALUATION_BATCH = 500
SIDE = 32  # of an image, in pixels
VIEWS = 2 * OFFSETS**2  # 9 x 9 crops, each as it is and mirrored

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


def load_images(spec: DatasetSpec, folder: Path, subset: int | None = None, holdout: int = 0) -> tuple[Images, Images]:
    """The images to train on and to evaluate on, on the CPU.

    `subset` keeps the first N training and N/5 test images. `holdout` evaluates on the last N training
    images, kept from training; the test images are then not returned. UserError where the data can't be had.
    """
    if spec.torchvision_class is None:
        splits = [cached_digits(folder, split, count) for split, count in (("train", 5000), ("test", 2000))]
    else:
        splits = [torchvision_split(spec, folder, train) for train in (True, False)]
    train, test = (Images(torch.from_numpy(pixels), torch.from_numpy(labels)) for pixels, labels in splits)
    if subset:
        train, test = train[:subset], test[: max(subset // 5, 1)]
    if holdout >= len(train):
        raise UserError(f"--holdout {holdout} leaves none of the {len(train)} training images: give less")
    return (train[:-holdout], train[-holdout:]) if holdout else (train, test)


def torchvision_split(spec: DatasetSpec, folder: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of one split, downloaded by torchvision where they are not there, MD5-checked."""
    dataset_class = getattr(torchvision.datasets, spec.torchvision_class)
    needed = folder / dataset_class.base_folder
    try:
        dataset = dataset_class(folder, train=train, download=True)
        return dataset.data, np.asarray(dataset.targets, dtype=np.int64)
    except Exception as error:  # a network, a disk or an archive fails in many ways
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no whole {spec.torchvision_class} in {needed}, and no download from {dataset_class.url}: {why}; "
            f"run again with a network, put {dataset_class.filename} into {folder}, or give its folder by --data_path"
        ) from error


class Views:
    """Every random crop and mirror image of a set of images; view = (dy * 9 + dx) * 2 + flip.

    An epoch's order and views are a function of (seed, epoch) alone and views belong to images, not to
    positions: all processes agree without talking, and a resumed run repeats nothing and skips nothing.
    """

    def __init__(self, images: Images, spec: DatasetSpec, limit: int | None = None) -> None:
        self.labels = images.labels
        device = images.pixels.device
        self.padded = F.pad(images.pixels, (0, 0, PAD, PAD, PAD, PAD))
        # The window of 32 rows of 96 bytes that starts at each padded pixel: picking a crop is 32 block copies.
        self.width = self.padded.shape[2]
        last_start = self.labels.numel() * self.width**2 - (SIDE - 1) * (self.width + 1)
        self.windows = self.padded.as_strided((last_start, SIDE, SIDE * 3), (3, self.width * 3, 1))
        self.normalise = Normaliser(spec, device)
        self.choices = torch.arange(0, VIEWS, 1 if spec.flip else 2)
        # The views that --views K leaves an image are the same for every seed, so that all share a cache.
        self.allowed = None
        if limit is not None and limit < len(self.choices):
            ranks = torch.rand(len(self), len(self.choices), generator=torch.Generator().manual_seed(0))
            self.allowed = self.choices[ranks.topk(limit).indices]

    def __len__(self) -> int:
        return len(self.labels)

    def plan(self, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the images (N,) and the view of each image (N,), both int64 on the CPU."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(self), generator=generator)
        if self.allowed is None:
            picks = torch.randint(len(self.choices), (len(self),), generator=generator)
            return order, self.choices[picks]
        picks = torch.randint(self.allowed.shape[1], (len(self), 1), generator=generator)
        return order, self.allowed.gather(1, picks)[:, 0]

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


def loss_terms(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, targets: torch.Tensor, temp: float, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, CE, KL) of logits (B, C) and targets (B,): scalars in nats, of which the loss alone has a gradient.

    KL is already times T^2. Without a teacher the loss is the CE, and KL is 0.
    """
    student_logits = student_logits.float()
    ce = F.cross_entropy(student_logits, targets)
    if teacher_logits is None:
        return ce, ce.detach(), torch.zeros_like(ce)
    student = F.log_softmax(student_logits / temp, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temp, dim=1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temp**2
    return alpha * kl + (1 - alpha) * ce, ce.detach(), kl.detach()


def kd_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temp: float, alpha: float
) -> torch.Tensor:
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, a scalar in nats, in float32.

    Logits (B, C), targets (B,) int64. T^2 keeps the soft targets' gradient at the size of the hard ones'
    (Hinton, Vinyals & Dean, 2014, section 2). ValueError where temp <= 0 or alpha is outside [0, 1].
    """
    if not temp > 0:
        raise ValueError(f"temp must be above 0, not {temp}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within [0, 1], not {alpha}")
    return loss_terms(student_logits, teacher_logits, targets, temp, alpha)[0]


# ---------------------------------------------------------------------------------------------- metrics


def topk_correct(logits: torch.Tensor, targets: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> torch.Tensor:
    """How many of logits (B, C) have their target (B,) among the k highest: one count a k, int64.

    A tie counts against the target, and so does a NaN: constant logits score nothing by luck.
    """
    of_target = logits.gather(1, targets[:, None])
    ahead = (~(logits < of_target)).sum(1) - 1
    return torch.stack([(ahead < k).sum() for k in ks])


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
    if parts:
        logits[rows] = torch.cat(parts).cpu().double()
    logits = runtime.total(logits)  # another process's rows are zeros here
    if not logits.isfinite().all():
        raise UserError("the model answers with numbers that are not finite: train it anew with a lower --lr")
    return logits


def evaluate(
    model: torch.nn.Module, images: Images, spec: DatasetSpec, runtime: Runtime, stop: StopSignal | None = None
) -> dict[str, float]:
    """Mean cross-entropy (nats), top-1 and top-5 (0 to 1) over all images; raises what `all_logits` raises."""
    model.eval()
    runtime.share_buffers(model)  # what is evaluated is what the first process saves
    logits, labels = all_logits(model, images, spec, runtime, stop), images.labels.cpu()
    top1, top5 = (count / len(labels) for count in topk_correct(logits, labels).tolist())
    return {"loss": F.cross_entropy(logits, labels).item(), "top1": top1, "top5": top5}


# ---------------------------------------------------------------------------------------------- curves

# Okabe & Ito's colours, told apart by the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def run_title(content: dict) -> str:
    """A run's name, from its checkpoint or its log's header: role, KD, and how its images depart from the whole set."""
    options = content["options"]
    title = "Teacher (VGG19 with BN)" if content["role"] == "teacher" else "Student (w/o KD)"
    if content.get("kd"):
        title = f"Student (with KD, Temp = {options['temp'][0]:g})"
    return title + "".join(f", {key} {options[key]}" for key in ("subset", "holdout") if options.get(key))


def same_but(content: dict, *names: str) -> str:
    """A key that runs share if they agree in role and options other than those named."""
    options = {key: value for key, value in content["options"].items() if key not in names}
    return json.dumps([content["role"], options], sort_keys=True)


def new_axes(title: str, ylabel: str):
    """A figure of README width with labelled axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="epoch", ylabel=ylabel)
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
    if header["kd"]:
        panels["loss"][1].update(ce=("cross-entropy", "--"), kl=("T² KL", ":"))
    paths = []
    for panel, (ylabel, curves) in panels.items():
        axes = new_axes(f"{run_title(header)} on {header['dataset']}: {panel}", ylabel)
        for key, (label, style) in curves.items():
            for colour, split in zip(COLOURS, ("train", header["evaluated_on"]), strict=False):
                if lines and key in lines[0][split]:
                    values = [line[split][key] for line in lines]
                    axes.plot(epochs, values, style, color=colour, marker=".", label=f"{split} {label}")
        paths.append(save_figure(axes, out_dir / f"{log_path.stem}_{panel}.png"))
    return paths


def find_logs(folder: Path, dataset: str) -> list[Path]:
    """The logs in `folder` of runs on a data set that were evaluated on its test images, with an epoch or more."""
    logs = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        # Another run may have been killed in mid-line, or just be writing one: that is no fault of this one.
        with contextlib.suppress(UserError, KeyError, TypeError):
            header, lines = read_log(path)
            if lines and header["dataset"] == dataset and header["evaluated_on"] == "test":
                logs.append(path)
    return logs


def plot_comparison(log_paths: list[Path], figure_path: Path) -> Path:
    """Draw the test top-1 (%) of runs on one data set, those that differ in the seed alone in one colour; the path."""
    kinds: dict[str, list[tuple[dict, list[dict]]]] = {}
    for path in log_paths:
        header, lines = read_log(path)
        kinds.setdefault(same_but(header, "seed"), []).append((header, lines))
    axes = new_axes("Top-1 accuracy on the test images", "accuracy (%)")
    for colour, runs in zip(itertools.cycle(COLOURS), kinds.values(), strict=False):
        header = runs[0][0]
        axes.set_title(f"Top-1 accuracy on the test images of {header['dataset']}")
        last = [lines[-1]["test"]["top1"] for _, lines in runs]
        label = f"{run_title(header)}: {np.mean(last):.2f}" + (f" (mean of {len(runs)})" if len(runs) > 1 else "")
        for _, lines in runs:
            axes.plot(
                [line["epoch"] for line in lines], [line["test"]["top1"] for line in lines], color=colour, label=label
            )
            label = None
    return save_figure(axes, figure_path)
