"""How fast this project trains, compared with the baseline loop, measured in the same run.

    python benchmarks/throughput.py                       the table, in a quarter of an hour on two cores
    python benchmarks/throughput.py --quick               a rough one in a few minutes
    python benchmarks/throughput.py --json rows.json      the rows, hardware and versions as JSON too
    python benchmarks/throughput.py --device cuda         further options are train.py's

The jobs of a group run in turn, several times, and each row is the ratio of two medians, so that other load on the
machine affects both sides. Ours is train.py's own loop. Images and weights are random: speed does not depend on them.
"""

import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baseline_loop import baseline_batches, baseline_model, baseline_steps

import config
from data_sets import DATA_SETS, SIDE
from evaluation.report import table
from models import build_model, build_model_of
from runtime.cli import Parser, file_name
from runtime.device import Runtime, device_title, processor
from runtime.errors import exit_code
from runtime.files import write_json
from runtime.processes import start
from train import train_epoch
from training.losses import LOSSES
from training.run import Run
from training.runs import RunConfig, plan
from utils import EVALUATION_BATCH, Images, Views, compute_logits, epoch_order

IMAGES = 50_000  # of CIFAR-10's training set
Job = Callable[[], float]  # runs once and returns its images per second


class Bench:
    """Images and sizes of this benchmark, and the jobs that it times."""

    def __init__(self, options: config.TrainOptions, runtime: Runtime, quick: bool) -> None:
        self.options, self.runtime = options, runtime
        self.repeats = 3 if quick else 7
        steps = {"teacher": 3, "student": 12} if runtime.device.type == "cpu" else {"teacher": 45, "student": 45}
        self.steps = {role: count // 3 if quick else count for role, count in steps.items()}
        self.spec = replace(DATA_SETS["cifar10"], train_images=IMAGES)
        pixels = torch.randint(256, (IMAGES, SIDE, SIDE, 3), dtype=torch.uint8)
        self.images = Images(pixels, torch.randint(10, (IMAGES,)))
        self.batch_size = self.config("student").batch_size  # of both roles' recipes
        self.batches = baseline_batches(self.images, self.spec, self.batch_size, runtime.device)

    def config(self, role: str, loss: str | None = None) -> RunConfig:
        """One run, so many epochs long that its learning rate stays low: random labels can't make it diverge."""
        options = replace(self.options, tto=role == "teacher", kd=bool(loss), loss=(loss,) if loss else None)
        (run,) = plan(options, self.spec, self.runtime.precision, self.runtime.world_size)
        return replace(run, num_epochs=100_000)

    def ours(self, role: str, loss: str | None = None) -> Job:
        """A short epoch, images per second; with a distillation loss, the teacher's logits are cached."""
        run_config, device = self.config(role, loss), self.runtime.device
        rows = torch.arange(self.steps[role] * self.batch_size) % IMAGES
        views = Views(self.images[: len(rows)], self.spec, device)
        run = Run(run_config, self.runtime, self.spec, len(rows), files=None)
        run.saved_at = float("inf")  # no saves
        logits = torch.randn(len(rows), 10).half().to(device)

        def job() -> float:
            run.begin_epoch(run.epoch + 1)
            return self.rate(len(rows), lambda: train_epoch(run, views, rows, 0, logits))

        return job

    def teacher_logits(self) -> Job:
        """The teacher's logits of new views in full batches, images per second."""
        teacher = build_model_of(self.config("teacher"), self.runtime).eval()
        count = 10 * EVALUATION_BATCH if self.runtime.device.type == "cuda" else EVALUATION_BATCH
        views = Views(self.images[:count], self.spec, self.runtime.device)
        compute = partial(compute_logits, teacher, partial(views.images, k=0), count, 10, self.runtime)
        return partial(self.rate, count, compute)

    def loader(self) -> Job:
        """The views of an epoch in batches, images per second."""
        views, epochs = Views(self.images, self.spec, self.runtime.device), itertools.count()

        def load_epoch() -> None:
            order = epoch_order(torch.arange(IMAGES), 0, next(epochs)).to(views.storage)  # as in train_epoch
            for batch in order.split(self.batch_size):
                views.images(batch, 0)

        return partial(self.rate, IMAGES, load_epoch)

    def baseline(self, role: str, kd: bool = False) -> Job:
        """Some steps of the baseline loop, images per second."""
        steps, device = self.steps["teacher" if kd else role], self.runtime.device
        model, optimizer = baseline_model(role, 10, device, lr=1e-4)
        teacher = build_model("teacher").to(device).eval() if kd else None
        train = partial(baseline_steps, model, optimizer, self.batches, device, steps, teacher)
        return partial(self.baseline_rate, steps, train)

    def baseline_loader(self) -> float:
        """A job: batches of the DataLoader, images per second."""
        count = 5 * self.repeats
        return self.baseline_rate(count, lambda: list(itertools.islice(self.batches, count)))

    def baseline_rate(self, steps: int, work: Callable[[], object]) -> float:
        """Images per second of the baseline's work; batches that its workers have prefetched are skipped, untimed."""
        list(itertools.islice(self.batches, 8))
        return self.rate(steps * self.batch_size, work)

    def rate(self, images: int, work: Callable[[], object]) -> float:
        """Images per second of some work."""
        self.runtime.synchronize()
        start = time.perf_counter()
        work()
        self.runtime.synchronize()
        return images / (time.perf_counter() - start)

    def medians(self, jobs: dict[str, Job]) -> dict[str, float]:
        """Each job's median rate over the repeats, in which all take turns; the first turn is not counted."""
        rates = {name: [] for name in jobs}
        for repeat in range(self.repeats + 1):
            for name, job in jobs.items():
                with contextlib.redirect_stdout(sys.stderr):  # the progress of a long epoch
                    rates[name].append(job())
            print(f"  {', '.join(jobs)}: {repeat}/{self.repeats}", file=sys.stderr, flush=True)
        return {name: statistics.median(values[1:]) for name, values in rates.items()}


def measure(bench: Bench) -> list[dict]:
    """All rows."""
    rate = bench.medians({"loader": bench.loader(), "DataLoader": bench.baseline_loader})
    jobs = {"teacher": bench.ours("teacher"), "baseline teacher": bench.baseline("teacher")}
    rate |= bench.medians(jobs)
    jobs = {"student": bench.ours("student"), "baseline student": bench.baseline("student")}
    jobs |= {"baseline KD": bench.baseline("student", kd=True), "logits": bench.teacher_logits()}
    rate |= bench.medians(jobs | {f"KD by {loss}": bench.ours("student", loss) for loss in ("kd", *LOSSES)})
    rate["KD, computing"] = 1 / (1 / rate["logits"] + 1 / rate["KD by kd"])
    rows = [{"name": name, "ours": rate[ours], "theirs": rate[theirs]} for name, ours, theirs in ROWS]
    return [row | {"ratio": row["ours"] / row["theirs"]} for row in rows]


# Each row's title, and the names of its two rates.
ROWS = (
    ("loader / DataLoader, 2 workers", "loader", "DataLoader"),
    ("teacher training / baseline loop", "teacher", "baseline teacher"),
    ("student training / baseline loop", "student", "baseline student"),
    ("KD, computing the logits / baseline KD loop", "KD, computing", "baseline KD"),
    ("KD, cached logits / baseline KD loop", "KD by kd", "baseline KD"),
    ("KD, cached logits / student without KD", "KD by kd", "student"),
    *((f"the same, --loss {loss}", f"KD by {loss}", "student") for loss in LOSSES),
)


def rows_table(rows: list[dict]) -> str:
    """The Markdown table of all rows."""
    cells = [[row["name"], f"{row['ours']:,.0f}", f"{row['theirs']:,.0f}", f"{row['ratio']:.2f}"] for row in rows]
    return table(["ours / theirs", "ours, img/s", "theirs, img/s", "ratio"], cells)


def report(options: config.TrainOptions, arguments) -> None:
    """Measure everything, print the table and write the rows."""
    with start(options.device, options.precision, options.deterministic) as runtime:
        rows = measure(Bench(options, runtime, arguments.quick))
        hardware = {"processor": processor(), "cores": os.cpu_count(), "device": device_title(runtime)}
    print(f"{hardware['processor']}, {hardware['cores']} cores; {hardware['device']}; torch {torch.__version__}")
    print(f"ours in {runtime.precision}, the baseline loop in float32\n")
    print(rows_table(rows))
    if arguments.json:
        about = {"hardware": hardware, "torch": str(torch.__version__), "precision": runtime.precision}
        write_json(arguments.json, {"rows": rows} | about)


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = Parser("throughput.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few minutes: few steps and repeats")
    parser.add_argument("--json", type=file_name, help="file for the rows, the hardware and the version of torch")
    arguments, further = parser.parse_known_args()
    options = config.parse_train(["--tto", "True", *further])  # rejects options that only students have
    if options.dataset != "cifar10":
        parser.error("the images are CIFAR-10's: leave --dataset out")
    return exit_code(lambda: report(options, arguments))


if __name__ == "__main__":
    sys.exit(main())
