"""Training speed on a CUDA card: images per second, kernels per step, and the share of the card's peak.

python tools/kernels.py                 teacher and student in bf16, fp16 and fp32, and the student with --compile
python tools/kernels.py --peak 989      beside a peak of 989 TFLOP/s (an H100 SXM, dense bf16)
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import profile

import config
from data_sets import DATA_SETS, SIDE
from evaluation.inference import count_macs
from evaluation.report import table
from runtime.processes import start
from train import train_epoch
from training.files import RunFiles
from training.plan import plan
from training.run import Run
from utils import Images, Views

STEPS = 60


def measure(words: list[str], folder: Path) -> tuple[float, float, float]:
    """Images per second, kernels per step, and FLOP per image (2 per multiply-add) of train.py's loop."""
    options = config.parse_train([*words, "--views", "16", "--num_epochs", "100000"])
    with start(options.device, options.precision) as runtime:
        (run_config,) = plan(options, DATA_SETS["cifar10"], runtime.precision, 1)
        count = STEPS * run_config.batch_size
        pixels = torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8)
        views = Views(Images(pixels, torch.randint(10, (count,))), DATA_SETS["cifar10"], runtime.device)
        run = Run(run_config, runtime, DATA_SETS["cifar10"], count, RunFiles(folder, folder, "trial"))

        def epoch() -> float:
            run.begin_epoch(run.epoch + 1)
            run.saved_at = time.monotonic() + 3600  # no saves
            begun = time.perf_counter()
            train_epoch(run, views, torch.arange(count), 0, None)
            runtime.synchronize()
            return count / (time.perf_counter() - begun)

        speed = max(epoch() for _ in range(3))
        with profile() as profiler:
            epoch()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return speed, len(kernels) / run.steps, 3 * 2 * count_macs(run.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card in half precision")
    peak = parser.parse_args().peak
    cases = [(role, ["--precision", word]) for word in ("bf16", "fp16", "fp32") for role in ("teacher", "student")]
    cases.append(("student", ["--compile", "True"]))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for role, words in cases:
            speed, kernels, flop = measure([*(["--tto", "True"] if role == "teacher" else []), *words], Path(folder))
            share = f"{100 * speed * flop / (peak * 1e12):.1f}%" if peak else ""
            rows.append([f"{role} {' '.join(words)}", f"{speed:,.0f}", f"{kernels:.0f}", share])
            print(rows[-1], flush=True)
    print(table(["training", "img/s", "kernels per step", "% of peak"], rows))


if __name__ == "__main__":
    main()
