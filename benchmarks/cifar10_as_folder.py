"""Write CIFAR-10 as pictures of odd sizes, for --dataset folder to be held against --dataset cifar10.

    python benchmarks/cifar10_as_folder.py FOLDER                  all 60,000 images, some 270 MB
    python benchmarks/cifar10_as_folder.py FOLDER --images 2000    the 2,000 and 400 of --subset 2000
    python benchmarks/cifar10_as_folder.py FOLDER --resized        pictures of which the very pixels do not come back

Each image is the middle of a longer picture, so that what `--dataset folder` makes of it are the very pixels: read back
and compared. With --resized it is enlarged to an odd size before. The commands to compare are printed.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from datasets import DATASETS, SIDE
from datasets.folder import read_folder
from runtime.device import Runtime
from runtime.errors import UserError, exit_code
from runtime.files import make_folder
from runtime.progress import Progress
from utils import Images, load_images

LONGEST_BORDER, LARGEST = 24, 3 * SIDE  # pixels


def picture_of(pixels: np.ndarray, resized: bool, generator: np.random.Generator) -> Image.Image:
    """A picture whose middle square is the image (32, 32, 3), perhaps enlarged, between two borders of noise."""
    if resized:
        side = int(generator.integers(SIDE + 1, LARGEST))
        pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    border = int(generator.integers(LONGEST_BORDER))
    noise = generator.integers(0, 256, (2, border, len(pixels), 3), dtype=np.uint8)
    if generator.integers(2):
        return Image.fromarray(np.concatenate((noise[0], pixels, noise[1])))
    return Image.fromarray(np.concatenate((noise[0].swapaxes(0, 1), pixels, noise[1].swapaxes(0, 1)), axis=1))


def write_pictures(halves: dict[str, Images], folder: Path, resized: bool) -> None:
    """One PNG an image, FOLDER/<half>/<class>/<number>.png."""
    classes, generator = DATASETS["cifar10"].classes, np.random.default_rng(0)
    for half, images in halves.items():
        for name in classes:
            make_folder(folder / half / name)
        with Progress(f"writing {half}", len(images), True, unit="file") as progress:
            for i, (pixels, label) in enumerate(zip(images.pixels.numpy(), images.labels.tolist(), strict=True)):
                picture = picture_of(pixels, resized, generator)
                picture.save(folder / half / classes[label] / f"{i:05}.png", compress_level=1)
                if progress.step():
                    progress.show("")


def count_equal(halves: dict[str, Images], folder: Path) -> tuple[int, int]:
    """How many of the images come back as they were with their label, and how many there are."""
    spec, notes = read_folder(folder, True, False, Runtime(torch.device("cpu"), None))
    print("\n".join(notes))
    equal = 0
    for half, images in halves.items():
        there = sorted(zip(map(bytes, images.pixels.numpy()), images.labels.tolist(), strict=True))
        back = sorted(zip(map(bytes, spec.halves[half][0]), spec.halves[half][1].tolist(), strict=True))
        equal += sum(a == b for a, b in zip(there, back, strict=True))
    return equal, sum(map(len, halves.values()))


def main() -> None:
    """UserError where the folder is there already, or there is no CIFAR-10."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go; must not be there yet")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="folder of CIFAR-10")
    parser.add_argument("--images", type=int, help="first N training and N/5 test images (default: all)")
    parser.add_argument("--resized", action="store_true", help="enlarge each image to an odd size before")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise UserError(f"{arguments.folder} is there already: give a new folder")
    loaded = load_images(DATASETS["cifar10"], arguments.data_path, "train", "test", subset=arguments.images)
    halves = dict(zip(("train", "test"), loaded, strict=True))
    write_pictures(halves, arguments.folder, arguments.resized)
    equal, count = count_equal(halves, arguments.folder)
    print(f"{equal:,} of {count:,} images come back to the bit; now compare")
    same = " --num_epochs 8 --batch_size 64" if arguments.images else ""  # a small folder has a recipe of its own
    subset = f" --subset {arguments.images}" if arguments.images else ""
    print(f"python train.py --dataset folder --data_path {shlex.quote(str(arguments.folder))}{same}")
    print(f"python train.py --dataset cifar10 --data_path {shlex.quote(str(arguments.data_path))}{subset}{same}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
