"""Training speed on a CUDA card: images per second, kernels per step, and the share of the card's peak.

python tools/kernels.py                 teacher and student in bf16, fp16 and fp32, and the student with --compile
python tools/kernels.py --peak 989      beside a peak of 989 TFLOP/s (an H100 SXM, dense bf16)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))  # throughput.py adds the project

import torch
from throughput import Bench
from torch.profiler import profile

import config
from evaluation.inference import count_macs
from evaluation.report import table
from models import build_model
from runtime.processes import start


def measure(role: str, words: list[str]) -> tuple[float, float, float]:
    """Images per second, kernels per step, and FLOP per image (2 per multiply-add) of train.py's loop."""
    options = config.parse_train(words)
    with start(options.device, options.precision) as runtime:
        bench = Bench(options, runtime, quick=False)
        epoch = bench.ours(role)
        speed = max(epoch() for _ in range(3))
        with profile() as profiler:
            epoch()
        on_card = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in on_card if not event.is_user_annotation]  # which Optimizer.step is, too
        return speed, len(kernels) / bench.steps[role], 3 * 2 * count_macs(build_model(role).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card in half precision")
    peak = parser.parse_args().peak
    cases = [(role, ["--precision", word]) for word in ("bf16", "fp16", "fp32") for role in ("teacher", "student")]
    cases.append(("student", ["--compile", "True"]))
    rows = []
    for role, words in cases:
        speed, kernels, flop = measure(role, words)
        share = f"{100 * speed * flop / (peak * 1e12):.1f}%" if peak else ""
        rows.append([f"{role} {' '.join(words)}", f"{speed:,.0f}", f"{kernels:.0f}", share])
        print(rows[-1], flush=True)
    print(table(["training", "img/s", "kernels per step", "% of peak"], rows))


if __name__ == "__main__":
    main()
