"""What a trained model costs, and its exported form."""

import copy
import io
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_sets import SIDE
from models.vgg import Float32Linear, use_products
from runtime.device import Runtime
from runtime.errors import UserError
from runtime.files import writing


def count_parameters(model: torch.nn.Module) -> int:
    """Number of weights, frozen or not."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: torch.nn.Module, size: int = SIDE) -> int:
    """Multiply-accumulates of one image, by torch's own count of the convolutions and matrix products."""
    # Fused attention is not counted: a gradient and this backend keep torch from fusing it.
    image = torch.zeros(1, 3, size, size, device=next(model.parameters()).device, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image.clone())  # which a model may change in place
    return counter.get_total_flops() // 2


@torch.inference_mode()
def pass_seconds(model: torch.nn.Module, batch: int, runtime: Runtime, size: int, budget: float = 1.0) -> float:
    """The median seconds of a forward pass over `batch` images, timed for about `budget` seconds."""
    images = torch.randn(batch, 3, size, size, device=runtime.device).contiguous(memory_format=runtime.memory_format)
    taken: list[float] = []
    while len(taken) < 4 or (len(taken) < 60 and sum(taken) < budget):
        runtime.synchronize()
        start = time.perf_counter()
        with runtime.autocast():
            model(images)
        runtime.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[len(taken) // 4 :])  # in the first ones, kernels are chosen


def measure_cost(model: torch.nn.Module, path: Path, runtime: Runtime, size: int = SIDE) -> dict[str, float]:
    """The cost of a model on images of a size: counts, bytes of the checkpoint, and what was timed on this device."""
    batch = max(256 * SIDE**2 // size**2, 1)  # fewer large images, in the same memory
    return {
        "parameters": count_parameters(model),
        "macs": count_macs(model, size),
        "bytes": path.stat().st_size,
        "latency_ms": 1000 * pass_seconds(model, 1, runtime, size),
        "images_per_second": batch / pass_seconds(model, batch, runtime, size),
    }


def export_model(model: torch.nn.Module, path: Path, data: dict) -> float:
    """Write `model` with torch.export, dynamic batch; return how far the reloaded program's logits differ at most.

    `data` describes the data set, for the file's `preprocessing.json`. UserError if torch can't export the model.
    """
    model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
    for module in use_products(model, 0).modules():
        if isinstance(module, Float32Linear):  # all of it is float32
            module.__class__ = torch.nn.Linear
    images = torch.randn(5, 3, data["size"], data["size"], generator=torch.Generator().manual_seed(0))
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except (RuntimeError, ValueError) as error:  # of a student of the user's own
        why = str(error).partition("\n")[0]
        raise UserError(f"--export: torch.export can't export this model: {why}") from error
    preprocessing = data | {"input": "RGB, 0 to 1, (x - mean) / std"}
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"preprocessing.json": json.dumps(preprocessing)})
    reloaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    with torch.inference_mode():
        differences = [(reloaded(images[:n]) - model(images[:n])).abs().max().item() for n in (1, 2, 5)]
    if max(differences) > 1e-4:
        raise RuntimeError(f"the exported program's logits differ by {max(differences):g}")
    with writing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return max(differences)
