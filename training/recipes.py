"""Default hyperparameters by data set, role and optimizer, and by loss. Standard library only, for `--help`."""

import math
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a training run."""

    num_epochs: int
    lr: float  # peak learning rate
    head_lr: float = 1.0  # learning rate of the last layer, as a fraction of lr
    norm_lr: float = 1.0  # of batch norm and biases, as a fraction of lr
    batch_size: int = 256  # over all devices
    weight_decay: float = 0.0
    views: int | None = None  # augmented views per image; None: all


RECIPE_FIELDS = tuple(f.name for f in fields(Recipe))
OPTIMIZERS = ("muon", "sgd")
CIFAR = {
    ("teacher", "muon"): Recipe(num_epochs=16, lr=0.1, head_lr=0.003, norm_lr=0.11),
    ("student", "muon"): Recipe(num_epochs=30, lr=0.1, head_lr=0.2, norm_lr=0.11, views=16),
    ("teacher", "sgd"): Recipe(num_epochs=60, lr=0.05, head_lr=0.05, batch_size=128, weight_decay=5e-4),
    ("student", "sgd"): Recipe(num_epochs=60, lr=0.1, batch_size=128, weight_decay=5e-4),
}
DIGITS = {
    ("teacher", "muon"): Recipe(num_epochs=3, lr=0.1, head_lr=0.003, norm_lr=0.11, batch_size=128),
    ("student", "muon"): Recipe(num_epochs=3, lr=0.1, head_lr=0.2, norm_lr=0.11, batch_size=64, views=2),
    ("teacher", "sgd"): Recipe(num_epochs=9, lr=0.05, head_lr=0.05, batch_size=64, weight_decay=5e-4),
    ("student", "sgd"): Recipe(num_epochs=4, lr=0.1, batch_size=64, weight_decay=5e-4, views=4),
}


def recipe_of(dataset: str, role: str, optimizer: str, train_images: int, student_images: int | None = None) -> Recipe:
    """A role's recipe, scaled to `student_images` or `train_images` except for all images of CIFAR or digits."""
    recipe = (DIGITS if dataset == "digits" else CIFAR)[role, optimizer]
    if student_images is None and dataset in ("cifar10", "cifar100", "digits"):
        return recipe
    if dataset == "digits":  # to at most ten times as many epochs
        return scale_recipe(recipe, student_images, made_for=5000, most=10)
    return scale_recipe(recipe, student_images or train_images)


def scale_recipe(recipe: Recipe, images: int, made_for: int = 50_000, most: float = 4) -> Recipe:
    """A recipe made for `made_for` images, scaled to `images`: as many seen in all, at most `most` times the epochs."""
    epochs = round(recipe.num_epochs * min(max(made_for / images, 0.25), most))
    power_of_two = 2 ** int(math.log2(max(images / 64, 1)))  # for 64 steps per epoch or more
    return replace(recipe, num_epochs=epochs, batch_size=min(max(power_of_two, 32), recipe.batch_size))


@dataclass(frozen=True)
class LossDefaults:
    """Temperatures and weights of a loss, except for kd from its paper's code for CIFAR-100 (docs/losses.md)."""

    function: str  # of training/losses.py
    temps: tuple[float, ...]  # see temps_of
    kd_weights: tuple[float, ...]  # one per term
    ce_weight: float


ALPHA = 0.9  # of plain KD
LOSS_DEFAULTS = {
    "kd": LossDefaults("kd", (5.0, 20.0), (ALPHA,), round(1 - ALPHA, 12)),  # 0.1, not 0.09999999999999998
    "ls": LossDefaults("ls", (2.0,), (9.0,), 0.1),
    "dkd": LossDefaults("dkd", (4.0,), (1.0, 8.0), 1.0),
    "ttm": LossDefaults("ttm", (10.0,), (45.0,), 1.0),
    "wttm": LossDefaults("wttm", (5.0,), (4.0,), 1.0),
}
# Plain KD at the temperature and total weight of another loss.
for name, row in [*LOSS_DEFAULTS.items()]:
    if name != "kd":
        LOSS_DEFAULTS[f"kd_as_{name}"] = replace(row, function="kd", kd_weights=(sum(row.kd_weights),))
TEMPS = {"cifar100": (2.0, 5.0)}  # of plain KD: 2 was best on held-out images, 5 is for comparison (docs/results.md)


def temps_of(dataset: str, loss: str) -> tuple[float, ...]:
    """The temperatures of a loss on a data set: --all trains a student at each, a single run uses the first."""
    return TEMPS.get(dataset, LOSS_DEFAULTS["kd"].temps) if loss == "kd" else LOSS_DEFAULTS[loss].temps
