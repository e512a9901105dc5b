"""The data sets, a row each, and what a model trains with on them where the user does not say."""

import math
from dataclasses import dataclass, field, replace

SIDE = 32  # of an image, in pixels
PAD = 4  # pixels around an image that is cropped at random
OFFSETS = 2 * PAD + 1  # crop positions along one axis
CROPS = OFFSETS**2
# How a picture of any size becomes an image: datasets/pictures.py.
PICTURES = "upright by its EXIF, shortest side to 32 (bicubic), centre crop, transparency on white, RGB"


@dataclass(frozen=True)
class Recipe:
    """What a model trains with where the user does not say."""

    num_epochs: int
    lr: float  # peak
    head_lr: float = 1.0  # the last layer's learning rate, as a fraction of lr
    norm_lr: float = 1.0  # batch norm's
    batch_size: int = 256  # over all devices
    weight_decay: float = 0.0
    views: int | None = None  # an image is seen in; None: all


def scaled(recipe: Recipe, images: int) -> Recipe:
    """CIFAR-10's recipe for another number of training images: as many images are seen in all, within bounds.

    Not more than four times as many epochs and not less than a quarter, in batches of at most a 64th of the images
    (a power of two, 32 to the recipe's).
    """
    epochs = round(recipe.num_epochs * min(max(50_000 / images, 0.25), 4))
    batch_size = min(max(2 ** int(math.log2(max(images / 64, 1))), 32), recipe.batch_size)
    return replace(recipe, num_epochs=epochs, batch_size=batch_size)


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: classes, the training set's mean and std (RGB, 0 to 1), recipes. A new one is a new row."""

    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    recipes: dict[tuple[str, str], Recipe]  # by role and optimizer
    torchvision_class: str | None  # None: drawn by digits.py
    train_images: int
    flip: bool = True  # whether a mirrored image is still one of its class
    prefix: str = ""  # put before the names of its files
    fingerprint: str | None = None  # of a folder's images
    halves: dict | None = field(default=None, repr=False, compare=False)  # and these, as they were read

    @property
    def is_known(self) -> bool:
        """Whether the row says all; a folder's says it when the images were read."""
        return bool(self.classes)

    @property
    def views(self) -> int:
        """Random crops of an image (9 x 9), times 2 where it may be mirrored."""
        return CROPS * (2 if self.flip else 1)

    def description(self) -> dict:
        """What a checkpoint says of it, in plain values: all that is needed to use a model without the images."""
        words = {"classes": list(self.classes), "mean": list(self.mean), "std": list(self.std)}
        return words | {"flip": self.flip, "pictures": PICTURES}

    def described(self, said: dict | None) -> "DatasetSpec":
        """This row with what a `description` says; of an older version's checkpoint, which has none, the row itself.

        ValueError or TypeError where it is none.
        """
        if said is None:
            return self
        numbers = [float(number) for name in ("mean", "std") for number in said[name]]
        if not (all(map(math.isfinite, numbers)) and len(numbers) == 6 and min(numbers[3:]) > 0):
            raise ValueError(f"mean and std are {numbers}")
        if not all(isinstance(name, str) for name in said["classes"]):
            raise ValueError("a class without a name")
        changes = {"mean": tuple(numbers[:3]), "std": tuple(numbers[3:]), "flip": bool(said["flip"])}
        return replace(self, classes=tuple(said["classes"]), **changes)


CIFAR_RECIPES = {
    ("teacher", "muon"): Recipe(num_epochs=16, lr=0.1, head_lr=0.003, norm_lr=0.15),
    ("student", "muon"): Recipe(num_epochs=30, lr=0.1, head_lr=0.2, norm_lr=0.15, views=16),
    ("teacher", "sgd"): Recipe(num_epochs=60, lr=0.05, head_lr=0.05, batch_size=128, weight_decay=5e-4),
    ("student", "sgd"): Recipe(num_epochs=60, lr=0.1, batch_size=128, weight_decay=5e-4),
}
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
DATASETS = {
    "cifar10": DatasetSpec(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        recipes=CIFAR_RECIPES,
        torchvision_class="CIFAR10",
        train_images=50_000,
    ),
    "cifar100": DatasetSpec(
        classes=tuple(CIFAR100_CLASSES.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        recipes=CIFAR_RECIPES,
        torchvision_class="CIFAR100",
        train_images=50_000,
        prefix="cifar100_",
    ),
    "digits": DatasetSpec(
        classes=tuple("0123456789"),
        mean=(0.3102, 0.3113, 0.3128),
        std=(0.1987, 0.1973, 0.1982),
        recipes={
            ("teacher", "muon"): Recipe(num_epochs=3, lr=0.1, head_lr=0.003, norm_lr=0.15, batch_size=128),
            ("student", "muon"): Recipe(num_epochs=3, lr=0.1, head_lr=0.2, norm_lr=0.15, batch_size=64, views=2),
            ("teacher", "sgd"): Recipe(num_epochs=9, lr=0.05, head_lr=0.05, batch_size=64, weight_decay=5e-4),
            ("student", "sgd"): Recipe(num_epochs=4, lr=0.1, batch_size=64, weight_decay=5e-4, views=4),
        },
        torchvision_class=None,
        train_images=5_000,
        flip=False,
        prefix="digits_",
    ),
    # Your own images, which say what is empty here: folder.py.
    "folder": DatasetSpec(
        classes=(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        recipes=CIFAR_RECIPES,  # for 50,000 images
        torchvision_class=None,
        train_images=0,
        prefix="folder_",
    ),
}
