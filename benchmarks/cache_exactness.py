"""How exact the teacher cache is: what half precision and the batch's shape change in a trained teacher's logits.

    python benchmarks/cache_exactness.py                    weights/teacher.pt on CIFAR-10
    python benchmarks/cache_exactness.py --dataset digits   further options are train.py's

Each row is beside the same teacher's float32 logits of the same 2,048 training images, --batch_size at a time, as a
cold cache computes them; what a batch lacks later is computed in one of the smaller sizes.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ours import on_device

import config
from evaluation.report import table
from runtime.device import Runtime, device_title
from train import load_teacher
from training.teacher_cache import SIZES, TeacherCache
from utils import Views, load_images

IMAGES = 2048


def difference(name: str, logits: torch.Tensor, reference: torch.Tensor, temp: float) -> list[str]:
    """A row of the table: how far logits (N, C) are from the reference, and their softened probabilities, in nats."""
    changed, exact = (torch.log_softmax(values.double() / temp, 1) for values in (logits, reference))
    kl = (exact.exp() * (exact - changed)).sum(1).mean()
    gap = (logits - reference).abs()
    flips = (logits.argmax(1) != reference.argmax(1)).sum()
    return [name, f"{gap.max():.2g}", f"{gap.mean():.2g}", f"{kl:.2g}", f"{flips}"]


def measure(options: config.TrainOptions, runtime: Runtime) -> None:
    """Print the table; UserError where there is no teacher."""
    teacher, _ = load_teacher(options, options.spec, runtime)
    images = load_images(options.spec, options.data_path, "train")[0][:IMAGES].to(runtime.device)
    views = Views(images, options.spec)
    cache = TeacherCache(None, teacher, views, len(options.spec.classes), runtime)
    order, view_of = views.plan(options.seed, 0)
    whole = views.batch(order, view_of[order])[0]
    sizes = [size for size in SIZES if size != options.batch_size]
    at = {size: torch.cat([cache.compute(part) for part in whole.split(size)]).cpu() for size in sizes}
    reference = torch.cat([cache.compute(part) for part in whole.split(options.batch_size)]).cpu()
    print(f"{len(order):,} images, {options.batch_size} at a time, {device_title(runtime)}, torch {torch.__version__}")
    print(f"logits: mean size {reference.abs().mean():.2f}, standard deviation {reference.std():.2f}\n")
    changed = {"half precision": reference.half().float()} | {f"batches of {size}": at[size] for size in sizes}
    rows = [difference(name, logits, reference, options.temperature) for name, logits in changed.items()]
    print(
        table(["changed", "max logit", "mean logit", f"KL at T = {options.temperature:g}, nats", "other top-1"], rows)
    )


def main() -> int:
    """The exit code."""
    options = config.parse_train(["--kd", "True", *sys.argv[1:]])
    return on_device(options, lambda runtime: measure(options, runtime))


if __name__ == "__main__":
    sys.exit(main())
