"""What throughput.py compares with: CIFAR-10 training as the usual tutorials write it, float32 and NCHW."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from config import DatasetSpec
from utils import Images


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
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
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


def plain_steps(model, optimizer, batches: Iterator, device: torch.device, steps: int, teacher=None) -> float:
    """Train for `steps` steps, distilling `teacher` (T = 5) where there is one; the running accuracy."""
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
        running_loss += loss.item()
        correct += (outputs.argmax(1) == labels).sum().item()
        total += len(labels)
    return correct / total
