"""How exact the teacher cache is: what half precision and the batch's shape change in a trained teacher's logits.

    python benchmarks/cache_exactness.py                    weights/teacher.pt on CIFAR-10
    python benchmarks/cache_exactness.py --dataset digits   further options are train.py's

Each row is beside the same teacher's float32 logits of the same 2,048 training images, 128 at a time.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
import runtime as rt
from teacher_cache import SIZES, TeacherCache
from train import load_teacher
from utils import Views, load_images

IMAGES = 2048


def difference(logits: torch.Tensor, reference: torch.Tensor, temp: float) -> str:
    """A row's cells: how far logits (N, C) are from the reference, and the softened probabilities in nats."""
    student, teacher = (torch.log_softmax(values.double() / temp, 1) for values in (logits, reference))
    kl = (teacher.exp() * (teacher - student)).sum(1).mean().item()
    gap = (logits - reference).abs()
    changed = (logits.argmax(1) != reference.argmax(1)).sum().item()
    return f"{gap.max():.2g} | {gap.mean():.2g} | {kl:.2g} | {changed}"


def measure(options: config.TrainOptions, runtime: rt.Runtime) -> None:
    teacher, _ = load_teacher(options, runtime)
    images = load_images(options.spec, options.data_path)[0][:IMAGES].to(runtime.device)
    views = Views(images, options.spec)
    cache = TeacherCache(None, teacher, views, len(options.spec.classes), runtime)
    order, view_of = views.plan(options.seed, 0)
    whole = views.batch(order, view_of[order])[0]
    at = {size: torch.cat([cache.compute(part) for part in whole.split(size)]).cpu() for size in SIZES}
    reference = at[SIZES[-1]]
    print(f"{len(order):,} images, {rt.device_title(runtime)}, torch {torch.__version__}")
    print(f"logits: mean size {reference.abs().mean():.2f}, standard deviation {reference.std():.2f}\n")
    print(f"| changed | max logit | mean logit | KL at T = {options.temperature:g} (nats) | other top-1 |")
    print("|:--|--:|--:|--:|--:|")
    print(f"| half precision | {difference(reference.half().float(), reference, options.temperature)} |")
    for size in SIZES[:-1]:
        print(f"| batches of {size} | {difference(at[size], reference, options.temperature)} |")


def main() -> int:
    options = config.parse_train(["--kd", "True", *sys.argv[1:]])

    def work() -> None:
        with rt.start(options.device, options.precision) as runtime:
            measure(options, runtime)

    return rt.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
