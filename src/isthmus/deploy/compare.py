"""What engines compute beside what the network computes, on pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.arch.preprocess import Preprocess
from isthmus.data.augment import views
from isthmus.data.decode import Pixels
from isthmus.data.transform import centred, normalise
from isthmus.deploy.engines import Run
from isthmus.deploy.program import MORE, input_size
from isthmus.nn.network import ResNet

__all__ = [
    "Compared",
    "compare_images",
    "compare_pictures",
    "compare_pixels",
    "compare_runs",
    "logits",
    "made_up",
    "network_input",
    "relative",
]

BATCHES = (1, 3)
FEW = max(BATCHES)
LOGITS = 1e-4  # of the largest logit, where both sides are given the same numbers
LEVELS = 2.001  # grey levels before the first convolution
ROUNDING = 0.02  # of the largest logit: a value on the edge between two of the 256 steps may fall on either side
LOGITS_OF_PICTURES = 0.05  # of the largest logit, where pixels may differ by so many levels


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A comparison of a file with its network: what was compared, the largest difference, and what is allowed."""

    what: str
    difference: float
    limit: float

    def __str__(self) -> str:
        """In a line."""
        return f"{self.what}: {self.difference:.2g} (at most {self.limit:g})"


def compare_images(run: Run, reference: ResNet, pictures: Sequence[Pixels]) -> Iterator[Compared]:
    """Logits in every size of batch and picture."""
    for more in (0, MORE):
        sides = tuple(side + more for side in input_size(reference))
        images = network_input(reference, sides, pictures)
        for count in BATCHES:
            yield Compared(
                what=f"logits of {count} images of {' × '.join(map(str, sides))}",
                difference=relative(run(images[:count].numpy()), logits(reference, images[:count])),
                limit=LOGITS,
            )


def compare_pixels(run: Run, record: Preprocess, pictures: Sequence[Pixels]) -> Iterator[Compared]:
    """What the engine makes of pictures before the first convolution."""
    std = torch.tensor(record.std).mul(255)[:, None, None]
    most = max(
        float((torch.from_numpy(run(each[None])) - network_pixels(each, record)).mul(std).abs().max())
        for each in pictures
    )
    yield Compared(what=f"grey levels of {len(pictures)} pictures before the network", difference=most, limit=LEVELS)


def compare_pictures(run: Run, reference: ResNet, pictures: Sequence[Pixels]) -> Iterator[Compared]:
    """Logits of pictures in every size of batch; the best class must be the same wherever it is clear."""
    record = reference.preprocess
    for count in BATCHES:
        worst, others = 0.0, 0
        for each in pictures:
            batch = np.stack([each, each[:, ::-1], each[::-1]][:count])
            found = torch.from_numpy(run(batch))
            seen = views(torch.cat([network_pixels(one, record) for one in batch]), record.views)
            wanted = torch.stack([logits(reference, view) for view in seen]).mean(0)
            difference = relative(found.numpy(), wanted)
            worst = max(worst, difference)
            best = wanted.topk(min(2, wanted.shape[1])).values
            clear = (best[:, 0] - best[:, -1]) > 2 * difference * wanted.abs().max()
            others += int(((found.argmax(1) != wanted.argmax(1)) & clear).sum())
        yield Compared(what=f"logits of pictures, {count} at once", difference=worst, limit=LOGITS_OF_PICTURES)
        yield Compared(what=f"other classes, {count} at once", difference=others, limit=0)


def compare_runs(run: Run, other: Run, reference: ResNet, pictures: Sequence[Pixels]) -> Compared:
    """The logits of a file beside those of what it was made from, in the same engine."""
    images = network_input(reference, input_size(reference), pictures).numpy()
    difference = relative(run(images), torch.from_numpy(other(images)))
    return Compared(what="logits of the file beside those that were measured", difference=difference, limit=ROUNDING)


def network_pixels(pixels: Pixels, record: Preprocess) -> Tensor:
    """A picture as a prediction of ours sees it: (1, C, crop, crop)."""
    return normalise(torch.from_numpy(centred(np.ascontiguousarray(pixels), record))[None].permute(0, 3, 1, 2), record)


def network_input(reference: ResNet, sides: tuple[int, ...], pictures: Sequence[Pixels]) -> Tensor:
    """As many images as the largest batch asks for: pictures in their order, and numbers at random in 1D and 3D."""
    channels, record = reference.spec.in_channels, reference.preprocess
    if len(sides) != 2 or channels != len(record.channels):
        return torch.randn(FEW, channels, *sides, generator=torch.Generator().manual_seed(0))
    images = [network_pixels(each, record.at(max(sides))) for each in pictures[:FEW]]
    images = [F.interpolate(each, size=sides) if each.shape[2:] != sides else each for each in images]
    return torch.cat([images[place % len(images)] for place in range(FEW)]).contiguous()


def made_up(record: Preprocess) -> list[Pixels]:
    """Smooth colours and sharp noise, wide and tall, larger and smaller than the network's input."""
    random = torch.Generator().manual_seed(0)
    sizes = [(record.resize * 3 // 2, record.resize * 2), (record.resize * 5 // 4, record.resize), (record.crop,) * 2]
    pictures = []
    for height, width in sizes:
        coarse = torch.rand(1, len(record.channels), 8, 8, generator=random)
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
        noise = torch.rand(1, len(record.channels), height, width, generator=random)
        mixed = (smooth * 200 + noise * 55).clamp(0, 255).to(torch.uint8)
        pictures.append(np.ascontiguousarray(mixed[0].permute(1, 2, 0).numpy()))
    return pictures


@torch.no_grad()
def logits(net: ResNet, images: Tensor) -> Tensor:
    """Of normalised images, (N, classes)."""
    found: Tensor = net(images)
    return found


def relative(found: object, wanted: Tensor) -> float:
    """The largest difference over the largest value; not-a-number when either side holds one."""
    found = torch.as_tensor(found)
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
