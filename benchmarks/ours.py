"""This project's own side of the benchmarks: train.py's loop, on the device that the options name."""

from collections.abc import Callable

import torch

from config import TrainOptions
from runtime.device import Runtime
from runtime.errors import exit_code
from runtime.processes import start
from train import train_epoch
from training.run import Run
from utils import Views, epoch_view


def train_whole(run: Run, views: Views, rows: torch.Tensor) -> float:
    """Train a teacher, or a student without KD, to the end, without evaluation; the seconds of its epochs."""
    config, seconds = run.config, 0.0
    while run.epoch < config.num_epochs:
        k = epoch_view(config.views, config.flip, config.seed, run.epoch)
        train_epoch(run, views, rows, k, None)
        run.count_time()
        seconds += run.seconds
        run.begin_epoch(run.epoch + 1)
    return seconds


def on_device(options: TrainOptions, work: Callable[[Runtime], None]) -> int:
    """Call `work` with the device of these options; the exit code, a user's mistake in one line."""

    def started() -> None:
        with start(options.device, options.precision, options.deterministic) as runtime:
            work(runtime)

    return exit_code(started)
