"""The data sets, a row each, and what a model trains with on them where the user does not say."""

from dataclasses import dataclass

SIDE = 32  # of an image, in pixels
PAD = 4  # pixels around an image that is cropped at random
OFFSETS = 2 * PAD + 1  # crop positions along one axis
CROPS = OFFSETS**2


@dataclass(frozen=True)
class Recipe:
    """What a model trains with where the user does not say."""

    num_epochs: int
    lr: float  # peak
    head_lr: float = 1.0  # the last layer's learning rate, as a fraction of lr
    batch_size: int = 256  # over all devices
    weight_decay: float = 5e-4
    views: int | None = None  # an image is seen in; None: all


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

    @property
    def views(self) -> int:
        """Random crops of an image (9 x 9), times 2 where it may be mirrored."""
        return CROPS * (2 if self.flip else 1)


CIFAR_RECIPES = {
    ("teacher", "muon"): Recipe(num_epochs=16, lr=0.1, head_lr=0.025),
    ("student", "muon"): Recipe(num_epochs=30, lr=0.1, views=16),
    ("teacher", "sgd"): Recipe(num_epochs=60, lr=0.05, head_lr=0.05, batch_size=128),
    ("student", "sgd"): Recipe(num_epochs=60, lr=0.1, batch_size=128),
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
            ("teacher", "muon"): Recipe(num_epochs=3, lr=0.1, head_lr=0.025, batch_size=128),
            ("student", "muon"): Recipe(num_epochs=4, lr=0.1, batch_size=64, views=2),
            ("teacher", "sgd"): Recipe(num_epochs=9, lr=0.05, head_lr=0.05, batch_size=64),
            ("student", "sgd"): Recipe(num_epochs=4, lr=0.1, batch_size=64, views=4),
        },
        torchvision_class=None,
        train_images=5_000,
        flip=False,
        prefix="digits_",
    ),
}
