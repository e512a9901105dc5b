"""What the benchmarks compare with: training as the usual tutorials write it, and what the machine itself can do."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from datasets import PAD, SIDE, DatasetSpec
from models import build_model
from runtime.device import Runtime
from utils import Images

# -------------------------------------------------------------------------------------------- the usual loop

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of its SGD, as kuangliu/pytorch-cifar and weiaicunzai/pytorch-cifar100 have it


class PilImages(Dataset):
    """Images (N, 32, 32, 3) uint8 one by one through PIL, as torchvision.datasets.CIFAR10 gives them."""

    def __init__(self, images: Images, transform) -> None:
        self.data, self.targets, self.transform = images.pixels.numpy(), images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def plain_batches(images: Images, spec: DatasetSpec, batch_size: int, device: torch.device) -> Iterator[tuple]:
    """Batches without end from a DataLoader of 2 workers that crop, flip and normalise image by image."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(SIDE, padding=PAD),
            *([transforms.RandomHorizontalFlip()] if spec.flip else []),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    loader = DataLoader(
        PilImages(images, transform), batch_size, shuffle=True, num_workers=2, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=True,
    )  # fmt: skip
    while True:
        yield from loader


def plain_steps(
    model, optimizer, batches: Iterator, device: torch.device, steps: int, teacher=None, schedule=None
) -> float:
    """Train for `steps` steps, distilling `teacher` (T = 5) where there is one; the running accuracy (0 to 1).

    `schedule` is one of torch's, which sets the learning rate of each next step.
    """
    model.train()
    running_loss, correct, total = 0.0, 0, 0
    for _ in range(steps):
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(images)
        loss = F.cross_entropy(outputs, labels)
        if teacher is not None:
            with torch.no_grad():
                teacher_outputs = teacher(images)
            soft = F.kl_div(F.log_softmax(outputs / 5, 1), F.softmax(teacher_outputs / 5, 1), reduction="batchmean")
            loss = 0.9 * 25 * soft + 0.1 * loss
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        running_loss += loss.item()
        correct += (outputs.argmax(1) == labels).sum().item()
        total += len(labels)
    return correct / total


# -------------------------------------------------------------------------------------------- the machine


def repeated(call: Callable, amount: float, runtime: Runtime, seconds: float = 0.3) -> Callable[[], float]:
    """A job: `call` again and again for `seconds` or so; its rate, `amount` being what one call does."""

    def job() -> float:
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(3):
                call()
            runtime.synchronize()
            done += 3
        return done * amount / (time.perf_counter() - start)

    return job


def matrix_product(runtime: Runtime) -> Callable[[], float]:
    """Floating-point operations a second of one large product in the precision of training."""
    size = 8192 if runtime.device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=runtime.device, dtype=runtime.autocast_dtype)
    return repeated(lambda: a @ b, 2 * size**3, runtime)


def copy(runtime: Runtime) -> Callable[[], float]:
    """Bytes a second, read and written, of a copy that no processor cache holds."""
    source = torch.ones(1 << 26, device=runtime.device)
    target = torch.empty_like(source)
    return repeated(lambda: target.copy_(source), 2 * source.nbytes, runtime)


def cost(role: str, bytes_an_element: int) -> tuple[float, float]:
    """Operations and bytes that training on one image takes.

    Forward and backward count as three forward passes; the bytes are each layer's input read and output
    written, as if no two were fused and every one were too large for a processor cache.
    """
    model, elements = build_model(role).eval(), 0

    def count(module, inputs, output) -> None:
        nonlocal elements
        in_place = getattr(module, "inplace", False)
        elements += inputs[0].numel() + output.numel() * (not in_place)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, SIDE, SIDE))
    return 3.0 * counter.get_total_flops(), 3.0 * elements * bytes_an_element
