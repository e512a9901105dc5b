"""How fast this project trains, beside what it is compared with, measured in the same run.

    python benchmarks/throughput.py                       the table, in a quarter of an hour on two cores
    python benchmarks/throughput.py --quick               a rough one in a few minutes
    python benchmarks/throughput.py --json rows.json      the rows, hardware and versions as JSON too
    python benchmarks/throughput.py --device cuda         further options are train.py's

All jobs of a group are run in turn, several times, and each row is the ratio of two medians: whatever else
the machine does meets both sides. Ours is train.py's own loop (loader, optimizer, schedule, metrics, progress).
"""

import argparse
import contextlib
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ours import on_device
from plain import MOMENTUM, WEIGHT_DECAY, copy, cost, matrix_product, plain_batches, plain_steps, repeated

import config
import train
from datasets import SIDE
from evaluation.report import table, write_json
from models import build_model
from runtime import checkpoint, processes
from runtime.device import Runtime, device_title, processor
from runtime.signals import StopSignal
from training.losses import LOSSES
from training.optimizer import set_learning_rate
from training.run import Run
from utils import Images, Views, load_images

OTHER_LOSSES = [loss for loss in LOSSES if loss != "kd"]
IMAGES = 50_000  # of CIFAR-10's training set
Job = Callable[[], float]  # runs once and returns a rate: images, operations or bytes a second


class Bench:
    """Images, options and sizes of this benchmark, and the jobs it times."""

    def __init__(
        self, arguments: argparse.Namespace, options: dict[str, config.TrainOptions], runtime: Runtime
    ) -> None:
        """`options` are those of each role, resolved by its own recipe."""
        self.options, self.runtime, self.quick = options, runtime, arguments.quick
        self.spec = options["student"].spec
        fast = runtime.device.type == "cuda"
        self.repeats = 3 if self.quick else 7
        self.teacher_steps = (10 if fast else 1) if self.quick else (45 if fast else 3)
        self.student_steps = (10 if fast else 3) if self.quick else (45 if fast else 12)
        self.loaders: dict[str, Iterator] = {}  # the usual ones, by role; their workers live as long as they do
        if arguments.data_path:
            self.images = load_images(self.spec, arguments.data_path, "train")[0]
        else:
            shape = (IMAGES, SIDE, SIDE, 3)
            self.images = Images(torch.randint(256, shape, dtype=torch.uint8), torch.randint(10, (IMAGES,)))

    def run_options(self, role: str, **changes) -> config.TrainOptions:
        """Options of one run, so many epochs long that its learning rate stays low: random labels can't diverge it."""
        return self.options[role].resolved(num_epochs=100_000, precision=self.runtime.precision, **changes)

    def ours(self, role: str, steps: int, cache: str = "", **changes) -> Job:
        """Our epoch of `steps` steps, images a second; with KD its `cache` is "cold" or "warm" each time."""
        place = self.options[role].weights_path / cache  # a cold cache is removed, a warm one is not
        options = self.run_options(role, kd=bool(cache), weights_path=place, **changes)
        count = min(steps * options.batch_size, len(self.images))
        views = Views(self.images[:count].to(self.runtime.device), options.spec, options.views)
        run, stop = Run(options, self.runtime, views, teacher_id=cache), StopSignal()
        if cache:
            teacher = build_model("teacher").to(self.runtime.device, memory_format=torch.channels_last)
            teacher.eval().requires_grad_(False)

        def job() -> float:
            if cache == "cold":
                for path in options.weights_path.glob("*.cache"):
                    path.unlink()
            run.begin_epoch(run.epoch if cache else run.epoch + 1)  # with a cache the same views again
            logits = train.make_cache(run, teacher, views) if cache else None
            self.runtime.synchronize()
            start = time.perf_counter()
            train.train_epoch(run, views, logits, stop)
            self.runtime.synchronize()
            return count / (time.perf_counter() - start)

        return job

    def optimizer(self, role: str) -> Job:
        """The optimizer alone, steps a second; what gradients it is given makes no difference to its time."""
        options = self.run_options(role)
        views = Views(self.images[: options.batch_size].to(self.runtime.device), options.spec)
        run = Run(options, self.runtime, views)
        set_learning_rate(run.optimizer, run.lr)
        for parameter in run.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return repeated(run.optimizer.step, 1, self.runtime)

    def usual_batches(self, role: str) -> Iterator:
        """The DataLoader's batches without end, of the size that a role's recipe has."""
        if role not in self.loaders:
            size = self.options[role].batch_size
            self.loaders[role] = plain_batches(self.images, self.spec, size, self.runtime.device)
        return self.loaders[role]

    def plain(self, role: str, steps: int, kd: bool = False) -> Job:
        """The usual loop for `steps` steps, images a second."""
        device, batch_size = self.runtime.device, self.options[role].batch_size
        model, batches = build_model(role).to(device), self.usual_batches(role)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        teacher = build_model("teacher").to(device).eval() if kd else None

        def job() -> float:
            self.runtime.synchronize()
            start = time.perf_counter()
            plain_steps(model, optimizer, batches, device, steps, teacher)
            return steps * batch_size / (time.perf_counter() - start)

        return job

    def our_loader(self, count: int = IMAGES) -> Job:
        """An epoch's plan and all its batches, images a second."""
        batch_size = self.options["student"].batch_size
        views = Views(self.images[:count].to(self.runtime.device), self.spec)
        epochs = itertools.count()

        def job() -> float:
            start = time.perf_counter()
            order, view_of = views.plan(0, next(epochs))
            for rows in order.split(batch_size):
                views.batch(rows, view_of[rows])
            self.runtime.synchronize()
            return len(views) / (time.perf_counter() - start)

        return job

    def plain_loader(self) -> Job:
        """Batches of the DataLoader, images a second; what its workers had in store is taken first, untimed."""
        steps, batch_size = 15 if self.quick else 75, self.options["student"].batch_size
        batches = self.usual_batches("student")

        def job() -> float:
            for _ in range(8):
                next(batches)
            start = time.perf_counter()
            for _ in range(steps):
                next(batches)
            return steps * batch_size / (time.perf_counter() - start)

        return job

    def medians(self, jobs: dict[str, Job]) -> dict[str, float]:
        """Each job's median rate over the repeats, in which all take turns; a first turn is not counted."""
        rates = {name: [] for name in jobs}
        for repeat in range(self.repeats + 1):
            for name, job in jobs.items():
                with contextlib.redirect_stdout(sys.stderr):  # a long epoch's progress is no part of the table
                    rates[name].append(job())
            print(f"  {', '.join(jobs)}: {repeat}/{self.repeats}", file=sys.stderr, flush=True)
        return {name: statistics.median(values[1:]) for name, values in rates.items()}


def measure(bench: Bench, command: list[str]) -> list[dict]:
    """All rows; `command` runs this script anew, for what needs a process of its own."""
    rate = measure_rates(bench)
    bench.loaders.clear()  # ends their workers
    rate["peak memory ours"] = in_process(command, "memory ours")
    rate["peak memory plain"] = in_process(command, "memory plain", give_back=True)
    device = bench.runtime.device
    if device.type == "cpu" or (bench.options["student"].device in ("auto", "cuda") and torch.cuda.device_count() > 1):
        rate["student alone"] = in_process(command, "speed student")
        rate["2 processes"] = in_process(command, "speed student", processes=2)
    if device.type == "cpu":
        rate["student, memory given back"] = in_process(command, "speed student", give_back=True)
        rate["teacher alone"] = in_process(command, "speed teacher")
        rate["teacher, memory given back"] = in_process(command, "speed teacher", give_back=True)
    rate |= derived(bench, rate)
    return [
        {"name": name, "ours": rate[ours], "theirs": rate[theirs], "unit": unit, "ratio": rate[ours] / rate[theirs]}
        for name, ours, theirs, unit in row_names(bench.options["student"].batch_size)
        if ours in rate and theirs in rate
    ]


def measure_rates(bench: Bench) -> dict[str, float]:
    """The median rate of every job of this process, in groups that take turns."""
    student, teacher, batch = bench.student_steps, bench.teacher_steps, bench.options["student"].batch_size
    rate = bench.medians(
        {
            "our loader": bench.our_loader(),
            "our loader, 5,000 images": bench.our_loader(5_000),
            "DataLoader": bench.plain_loader(),
        }
    )
    rate |= bench.medians(
        {
            "teacher": bench.ours("teacher", teacher),
            "teacher's optimizer": bench.optimizer("teacher"),
            "plain teacher": bench.plain("teacher", teacher),
            "matrix product": matrix_product(bench.runtime),
            "copy": copy(bench.runtime),
        }
    )
    rate |= bench.medians(
        {
            "student": bench.ours("student", student),
            "student's optimizer": bench.optimizer("student"),
            "plain student": bench.plain("student", student),
            "KD cold": bench.ours("student", student, "cold"),
            "KD warm": bench.ours("student", student, "warm"),
            "plain KD": bench.plain("student", teacher, kd=True),
            "small batch": bench.ours("student", 4 * student, batch_size=batch // 4),
            "large batch": bench.ours("student", max(student // 4, 1), batch_size=batch * 4),
            "many images": bench.ours("student", 4 * student),
        }
    )
    # A group of their own, for a few percent are looked for: far from each other in a long round, they drown.
    losses = {f"KD by {loss}": bench.ours("student", student, "warm", loss=(loss,)) for loss in OTHER_LOSSES}
    return rate | bench.medians({"student beside losses": bench.ours("student", student), **losses})


def derived(bench: Bench, rate: dict[str, float]) -> dict[str, float]:
    """What follows from the rates measured: the layers' operations and bytes a second, times of steps and epochs."""
    found = {"peak GFLOP/s": rate["matrix product"] / 1e9, "peak GB/s": rate["copy"] / 1e9}
    for role in ("teacher", "student"):
        operations, traffic = cost(role, bytes_an_element=2 if bench.runtime.precision == "bf16" else 4)
        found |= {f"{role} GFLOP/s": operations * rate[role] / 1e9, f"{role} GB/s": traffic * rate[role] / 1e9}
        found[f"step of {role}"] = 1000 * bench.options[role].batch_size / rate[role]
        found[f"step of {role}'s optimizer"] = 1000 / rate[f"{role}'s optimizer"]
    losses = [f"KD by {loss}" for loss in OTHER_LOSSES]
    jobs = ("our loader", "student", "KD warm", "student beside losses", *losses)
    return found | {f"epoch of {job}": IMAGES / rate[job] for job in jobs}


def row_names(batch: int) -> tuple[tuple[str, str, str, str], ...]:
    """Each row's title, the names of its two rates and their unit; `batch` is the student's."""
    return (
        ("loader / DataLoader, 2 workers", "our loader", "DataLoader", "img/s"),
        ("teacher training / plain loop", "teacher", "plain teacher", "img/s"),
        ("student training / plain loop", "student", "plain student", "img/s"),
        ("KD, cold cache / plain KD loop", "KD cold", "plain KD", "img/s"),
        ("KD, warm cache / plain KD loop", "KD warm", "plain KD", "img/s"),
        ("KD epoch, warm cache / student epoch, both ours", "epoch of KD warm", "epoch of student", "s"),
        *(
            (f"the same, --loss {loss}", f"epoch of KD by {loss}", "epoch of student beside losses", "s")
            for loss in OTHER_LOSSES
        ),
        ("loader / student epoch, both ours", "epoch of our loader", "epoch of student", "s"),
        ("optimizer / training step, teacher, both ours", "step of teacher's optimizer", "step of teacher", "ms"),
        ("optimizer / training step, student, both ours", "step of student's optimizer", "step of student", "ms"),
        ("teacher training / matrix product", "teacher GFLOP/s", "peak GFLOP/s", "GFLOP/s"),
        ("teacher's layers in memory / copy", "teacher GB/s", "peak GB/s", "GB/s"),
        ("student training / matrix product", "student GFLOP/s", "peak GFLOP/s", "GFLOP/s"),
        ("student's layers in memory / copy", "student GB/s", "peak GB/s", "GB/s"),
        (f"student, batch {batch // 4} / {batch}", "small batch", "student", "img/s"),
        (f"student, batch {batch * 4} / {batch}", "large batch", "student", "img/s"),
        ("student, four times the images / once", "many images", "student", "img/s"),
        ("loader, 50,000 images / 5,000", "our loader", "our loader, 5,000 images", "img/s"),
        ("student, 2 processes / 1", "2 processes", "student alone", "img/s"),
        ("teacher training, freed memory kept / given back", "teacher alone", "teacher, memory given back", "img/s"),
        ("student training, freed memory kept / given back", "student alone", "student, memory given back", "img/s"),
        ("teacher training / plain loop, peak memory", "peak memory ours", "peak memory plain", "MiB"),
    )


def in_process(command: list[str], work: str, processes: int = 1, give_back: bool = False) -> float:
    """The number that this script prints under torchrun with `--work`, the processor's cores shared out.

    With `give_back` it gives freed memory back to the system, as a program does that sets nothing.
    """
    threads = max(torch.get_num_threads() // processes, 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = ["--work", work, *(["--give_back"] if give_back else [])]
    done = subprocess.run([*launcher, *command, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def do_work(bench: Bench, work: str) -> None:
    """Print the images a second of a role's training, or the peak memory of the teacher's in MiB."""
    what, whose = work.split()
    if what == "speed":
        steps = bench.teacher_steps if whose == "teacher" else bench.student_steps
        result = bench.medians({whose: bench.ours(whose, steps)})[whose]
    else:
        device = bench.runtime.device
        if whose == "ours":
            resident = Views(bench.images.to(device), bench.spec)  # a real run has all images there
            bench.ours("teacher", 3)()
            del resident
        else:
            bench.plain("teacher", 3)()
        if device.type == "cuda":
            result = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            result = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    bench.runtime.print(str(result))


def rows_table(rows: list[dict]) -> str:
    """The Markdown table of all rows."""
    cells = []
    for row in rows:
        rates = [f"{row[side]:,.{0 if row[side] >= 1000 else 2}f}" for side in ("ours", "theirs")]
        cells.append([row["name"], *rates, row["unit"], f"{row['ratio']:.3g}"])
    return table(["ours / theirs", "ours", "theirs", "unit", "ratio"], cells)


def report(bench: Bench, json_path: Path | None) -> None:
    """Measure everything, print the table and keep the rows."""
    rows = measure(bench, sys.argv)
    hardware = {"processor": processor(), "cores": os.cpu_count(), "device": device_title(bench.runtime)}
    print(f"{hardware['processor']}, {hardware['cores']} cores; {hardware['device']}; torch {torch.__version__}\n")
    print(rows_table(rows))
    if json_path:
        facts = {"hardware": hardware, "versions": checkpoint.versions(), "quick": bench.quick}
        write_json(json_path, {"rows": rows, **facts})


def main() -> int:
    """The exit code."""
    parser = config.Parser("throughput.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few minutes: few steps and repeats")
    parser.add_argument("--json", type=config.file_name, help="file for the rows, the hardware and the versions")
    parser.add_argument("--data_path", type=Path, help="folder of the real CIFAR-10 (default: random images)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--give_back", action="store_true", help=argparse.SUPPRESS)
    arguments, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [*further, f"--weights_path={folder}", f"--plots_path={folder}"]
        options = {"student": config.parse_train(words), "teacher": config.parse_train(["--tto", "True", *words])}
        if options["student"].dataset != "cifar10":
            parser.error("the images are CIFAR-10's: leave --dataset out")
        if arguments.give_back:
            processes.keep_freed_memory = lambda: None

        def work(runtime: Runtime) -> None:
            bench = Bench(arguments, options, runtime)
            if arguments.work:
                do_work(bench, arguments.work)
            else:
                report(bench, arguments.json)

        return on_device(options["student"], work)


if __name__ == "__main__":
    sys.exit(main())
