"""What the benchmarks compare with: the training loop of the usual PyTorch tutorials.

PIL transforms in a DataLoader, float32, SGD; momentum, weight decay and, for time to accuracy, batch size as in
kuangliu/pytorch-cifar and weiaicunzai/pytorch-cifar100.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data_sets import SIDE, DataSet, padding
from models import build_model
from models.vgg import initialise
from utils import Images

MOMENTUM, WEIGHT_DECAY, BATCH_SIZE = 0.9, 5e-4, 128


class PilImages(Dataset):
    """Images one by one through PIL, as torchvision.datasets.CIFAR10 gives them."""

    def __init__(self, images: Images, transform) -> None:
        self.data, self.targets, self.transform = images.pixels.numpy(), images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def baseline_batches(images: Images, spec: DataSet, batch_size: int, device: torch.device) -> Iterator[tuple]:
    """Endless batches from a DataLoader with 2 workers that crop, flip and normalise image by image."""
    steps = [transforms.RandomCrop(SIDE, padding=padding(SIDE))]
    steps += [transforms.RandomHorizontalFlip()] if spec.flip else []
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    loader = DataLoader(
        PilImages(images, transforms.Compose(steps)), batch_size, shuffle=True, num_workers=2, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=True,
    )  # fmt: skip
    while True:
        yield from loader


def baseline_model(role: str, num_classes: int, device: torch.device, lr: float) -> tuple[nn.Module, torch.optim.SGD]:
    """A role's network with the initialisation of torchvision's VGG (He et al., 2015), and SGD for all its weights."""
    model = build_model(role, num_classes)
    initialise(model)  # without the identity start
    model.to(device)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def baseline_steps(
    model, optimizer, batches: Iterator, device: torch.device, steps: int, teacher=None, schedule=None
) -> None:
    """Train for `steps` steps, with KD at T = 5 if there is a teacher; `schedule` is a learning rate scheduler."""
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which our side does without
    model.train()
    running_loss, correct = 0.0, 0  # the tutorials print them: each step waits for the device
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
    torch.backends.cudnn.allow_tf32 = False
