"""The data sets, one row each. Standard library only: `--help` reads this table."""

from dataclasses import dataclass

SIDE = 32  # of an image, in pixels, unless --size says more
SIZES = tuple(range(SIDE, 225, SIDE))  # which VGG19's five pools divide by 32
# How a picture of any size becomes an image: data_sets/pictures.py.
PICTURES = "upright by its EXIF, shortest side to {} (bicubic), centre crop, transparency on white, RGB"


@dataclass(frozen=True)
class DataSet:
    """One data set: its classes, and mean and standard deviation of the training pixels (RGB, 0 to 1)."""

    name: str
    source: str  # a class of torchvision.datasets, "digits" or "folder"
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = True  # whether a mirrored image still belongs to its class
    size: int = SIDE  # of an image, in pixels
    fingerprint: str = ""  # a hash of all images and labels, once they are read
    train_images: int = 0  # once they are read

    @property
    def views(self) -> int:
        """Crops of an image at every offset, times 2 if it may be mirrored."""
        return (2 * padding(self.size) + 1) ** 2 * (1 + self.flip)


def padding(size: int) -> int:
    """Pixels added on each side of an image before a random crop."""
    return size // 8


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
ROWS = (  # name, source, classes, mean, standard deviation
    DataSet("cifar10", "CIFAR10", CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    DataSet("cifar100", "CIFAR100", tuple(CIFAR100.split()), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    DataSet("digits", "digits", tuple("0123456789"), flip=False),
    DataSet("folder", "folder"),
)
DATA_SETS = {row.name: row for row in ROWS}
