"""What training does to one picture, and the views a prediction may average over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from isthmus.arch.preprocess import Preprocess
from isthmus.data.transform import Box, centred, channels_first, cut_out, pixels_of
from isthmus.errors import RecipeError

__all__ = ["VIEWS", "Augment", "augmented", "random_box", "views"]

_RATIO = (3 / 4, 4 / 3)  # width over height of a random crop (Szegedy et al. 2014)


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Flips and quarter turns that are meaningless to the label, and the area of the random crop.

    `crop_scale` is the smallest and largest part of the picture's area that a crop keeps; empty, it is the evaluation's
    centre crop. Each flip happens to half of the pictures. Raises RecipeError for an impossible scale.
    """

    hflip: bool = True
    vflip: bool = False
    rotate90: bool = False
    crop_scale: tuple[float, ...] = (0.35, 1.0)

    def __post_init__(self) -> None:
        if self.crop_scale and not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise RecipeError(
                f"crop_scale is {self.crop_scale}; it must be two parts of the area, 0 < low <= high <= 1"
            )


def random_box(width: int, height: int, scale: tuple[float, ...], random: np.random.Generator) -> Box:
    """A part of the picture with its area in `scale` and its sides between 3:4 and 4:3 where the picture allows.

    Ten tries, then the largest centred part of an allowed shape, as torchvision's RandomResizedCrop; but box edges
    may fall inside a pixel, as the resampling that follows needs no whole ones.
    """
    for _ in range(10):
        area = random.uniform(scale[0], scale[1]) * width * height
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = random.uniform(0, width - wide), random.uniform(0, height - high)
            return left, top, min(left + wide, width), min(top + high, height)
    wide, high = min(width, height * _RATIO[1]), min(height, width / _RATIO[0])
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def augmented(image: Image.Image, augment: Augment, record: Preprocess, random: np.random.Generator) -> Tensor:
    """One picture as training sees it: uint8 (C, crop, crop), memory in order (crop, crop, C)."""
    if not augment.crop_scale:
        square = centred(image, record)
    else:
        square = cut_out(image, random_box(*image.size, augment.crop_scale, random), record)
    pixels = pixels_of(square)
    if augment.hflip and random.random() < 0.5:
        pixels = pixels[:, ::-1]
    if augment.vflip and random.random() < 0.5:
        pixels = pixels[::-1]
    if augment.rotate90:
        pixels = np.rot90(pixels, int(random.integers(4)))
    return channels_first(pixels)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda images: images,
    "hflip": lambda images: images.flip(-1),
    "vflip": lambda images: images.flip(-2),
    "rot180": lambda images: images.flip(-2, -1),
}
"""The views a prediction may average over; each is its own inverse."""


def views(images: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The batch (N, C, H, W) seen in each named way, in that order; raises RecipeError on an unknown name."""
    unknown = [name for name in names if name not in VIEWS]
    if unknown or not names:
        raise RecipeError(f"views are {list(names)}; name one or more of {', '.join(VIEWS)}")
    return tuple(VIEWS[name](images) for name in names)
