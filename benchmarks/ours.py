"""This project's own side of the benchmarks: train.py's loop from start to end, on the device that the options name."""

from collections.abc import Callable

from config import TrainOptions
from runtime.device import Runtime
from runtime.errors import exit_code
from runtime.processes import start
from runtime.signals import StopSignal
from train import train_epoch
from training.run import Run
from utils import Views


def train_whole(run: Run, views: Views) -> float:
    """Train until the run's end, without evaluation and files; the seconds that its epochs took."""
    stop, seconds = StopSignal(), 0.0
    while run.epoch < run.options.num_epochs:
        train_epoch(run, views, None, stop)
        seconds += run.seconds
        run.begin_epoch(run.epoch + 1)
    return seconds


def on_device(options: TrainOptions, work: Callable[[Runtime], None]) -> int:
    """Call `work` with the device of these options; the exit code, a user's mistake in one line."""

    def started() -> None:
        with start(options.device, options.precision, options.deterministic) as runtime:
            work(runtime)

    return exit_code(started)
