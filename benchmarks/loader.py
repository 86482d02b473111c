"""How fast pictures become batches: our loader against torchvision's ImageFolder in torch's DataLoader.

python benchmarks/loader.py [--pictures 2000] [--rounds 7] [--folder FOLDER]
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from isthmus.arch.preprocess import IMAGENET
from isthmus.data.augment import Augment, augmented, random_box
from isthmus.data.cache import Resized
from isthmus.data.decode import decode
from isthmus.data.loader import Loader
from isthmus.data.order import sample_generator
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_pictures
from isthmus.data.transform import cut_out, normalise
from isthmus.runtime import cores, keep_freed_memory
from measure import ratios, spread, write_result
from photographs import write_photographs

BATCH = 64
WORKERS = (0, 1, 2, 3)
AUGMENT = Augment(hflip=True, crop_scale=(0.08, 1.0))
CONTENT = {
    "normalised": [transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std)],
    "uint8": [transforms.PILToTensor()],
}

Epoch = Callable[[int], int]
"""Goes through an epoch by its number and gives the pictures that came."""


def stock(folder: Path, workers: int, content: str) -> Epoch:
    """The loader of torchvision's training examples; its workers live from epoch to epoch."""
    crop = [transforms.RandomResizedCrop(IMAGENET.crop), transforms.RandomHorizontalFlip()]
    data = ImageFolder(str(folder), transforms.Compose(crop + CONTENT[content]))
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    return lambda _: sum(len(images) for images, _ in loader)


class Decoded(Dataset[tuple[torch.Tensor, int]]):
    """Our decoding and crops, for the processes of torch's DataLoader."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        random = sample_generator(0, 0, index)
        pixels = augmented(decode(self.pictures.read(index)), AUGMENT, IMAGENET, random)
        return pixels, int(self.pictures.labels[index])


def processes(pictures: Pictures, workers: int) -> Epoch:
    """What our threads do, done by the processes of DataLoader."""
    loader = DataLoader(
        Decoded(pictures), BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    return lambda _: sum(len(images) for images, _ in loader)


def ours(loader: Loader, *, floats: bool) -> Epoch:
    """Our loader's uint8 batches, or normalised into one buffer as training does it."""

    def go(epoch: int) -> int:
        seen, buffer = 0, torch.empty(0)
        for batch in loader.epoch(epoch):
            if floats:
                if buffer.shape != batch.images.shape:
                    buffer = torch.empty_like(batch.images, dtype=torch.float32)
                normalise(batch.images, IMAGENET, out=buffer)
            seen += len(batch.images)
        return seen

    return go


def rate(epoch: Epoch, number: int) -> float:
    """Pictures a second in one epoch."""
    gc.collect()
    begun = time.perf_counter()
    return epoch(number) / (time.perf_counter() - begun)


def resize_differences(pictures: Pictures, count: int) -> Iterator[np.ndarray]:
    """Grey levels between our crops and Pillow's antialiased ones of the same boxes."""
    for index in range(count):
        pixels, random = decode(pictures.read(index)), sample_generator(0, 0, index)
        box = random_box(pixels.shape[1], pixels.shape[0], AUGMENT.crop_scale, random)
        size = (IMAGENET.crop, IMAGENET.crop)
        theirs = Image.fromarray(pixels).crop(box).resize(size, Image.Resampling.BILINEAR)
        yield np.abs(cut_out(pixels, box, IMAGENET).astype(int) - np.asarray(theirs))


def main() -> None:
    """Measure the rates and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7, help="alternated epochs of each loader (default 7)")
    parser.add_argument("--folder", type=Path, help="pictures in class folders, instead of those made for this")
    options = parser.parse_args()
    keep_freed_memory()  # as a run does; DataLoader's workers inherit it
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "pictures"
        if options.folder is None:
            write_photographs(folder, options.pictures)
        pictures = open_pictures(str(folder))
        size = statistics.fmean(len(pictures.read(index)) for index in range(len(pictures)))
        make = partial(Loader, pictures=pictures, record=IMAGENET, batch_size=BATCH, train=True, augment=AUGMENT)
        best = {}
        for content in CONTENT:
            tried = {workers: stock(folder, workers, content) for workers in WORKERS}
            found = {workers: [rate(epoch, number) for number in range(2)][1:] for workers, epoch in tried.items()}
            best[content] = max(found, key=lambda workers: statistics.median(found[workers]))
        os.environ["ISTHMUS_CACHE"] = str(Path(temporary) / "cache")
        cache = Resized(pictures, IMAGENET.resize, IMAGENET)
        loaders = {
            "torchvision": stock(folder, best["normalised"], "normalised"),
            "uint8": ours(make(), floats=False),
            "normalised": ours(make(), floats=True),
            "torchvision uint8": stock(folder, best["uint8"], "uint8"),
            "uint8, by processes": processes(pictures, cores()),
            "cached uint8": ours(make(resized=cache), floats=False),
            "cached normalised": ours(make(resized=cache), floats=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for number in range(options.rounds + 1):
            for name, epoch in loaders.items():
                found_rate = rate(epoch, number)
                if number:
                    rates[name].append(found_rate)
        differences = [levels.ravel() for levels in resize_differences(pictures, 100)]
    against, levels = rates["torchvision"], np.concatenate(differences)
    write_result(
        "loader",
        f"Pictures become batches faster than in torchvision's ImageFolder and torch's DataLoader on {cores()} cores",
        {
            "normalised float32 batches / the same of ImageFolder + DataLoader": {
                **spread(ratios(rates["normalised"], against)),
                "target": "≥ 2.0",
            },
            "uint8 batches / normalised ones of ImageFolder + DataLoader": {
                **spread(ratios(rates["uint8"], against)),
                "target": "≥ 2.3",
            },
            "uint8 batches / uint8 ones of ImageFolder + DataLoader": spread(
                ratios(rates["uint8"], rates["torchvision uint8"])
            ),
            "uint8 batches by our threads / by DataLoader's processes from our functions": spread(
                ratios(rates["uint8"], rates["uint8, by processes"])
            ),
            "normalised, from the resized cache / ImageFolder + DataLoader": {
                **spread(ratios(rates["cached normalised"], against)),
                "target": "≥ 4",
            },
            "uint8, from the resized cache / ImageFolder + DataLoader": {
                **spread(ratios(rates["cached uint8"], against)),
                "target": "≥ 4",
            },
        },
        rows=[{"loader": name, "pictures a second": spread(values)} for name, values in rates.items()],
        note=(
            f"{len(pictures)} JPEGs of {size / 1000:.0f} kB on average, in the page cache; RandomResizedCrop 224 of "
            f"0.08 to 1 of the area, flip, batches of {BATCH}; DataLoader with {best['normalised']} persistent workers "
            f"({best['uint8']} for uint8), the best of {WORKERS}. Rounds are interleaved and a ratio is taken round by "
            f"round. Our crops against Pillow's antialiased ones of the same boxes: {(levels > 0).mean():.1%} of the "
            f"values differ, by {levels.max()} grey level at most. From the cache, crops are cut from pictures whose "
            f"shorter side is {IMAGENET.resize} px."
        ),
    )


if __name__ == "__main__":
    main()
