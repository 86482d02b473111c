"""What training does to one picture, and the views a prediction may average over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from isthmus import records
from isthmus.arch.preprocess import Preprocess
from isthmus.data.decode import Pixels, pixels_of
from isthmus.data.policies import rand_augment, trivial_augment
from isthmus.data.transform import Box, centred, channels_first, cut_out, mirrored
from isthmus.errors import RecipeError
from isthmus.records import FROM_0, FROM_1, Range

__all__ = ["VIEWS", "Augment", "altered", "augmented", "random_box", "views"]

_RATIO = (3 / 4, 4 / 3)  # width over height of a random crop (Szegedy et al. 2014)
_ERASED = (0.02, 0.33)  # part of the area that random erasing takes (Zhong et al. 2017)
_ERASED_RATIO = (0.3, 3.3)  # height over width
RANGES: dict[str, Range] = {
    "policy_magnitude": ("lie in 0..10", lambda value: 0 <= value <= 10),
    "erasing": ("lie in 0..1", lambda value: 0 <= value <= 1),
    **dict.fromkeys(("pad", "policy_spread", "mixup", "cutmix"), FROM_0),
    **dict.fromkeys(("policy_layers", "repeats"), FROM_1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """What training changes about its pictures. Raises RecipeError for a setting that is impossible.

    Each picture: a crop of some part of its area, or the evaluation's crop padded and cut out elsewhere; flips and
    quarter turns, for labels that do not mind; one of the policies; erasing. Each batch: mixup and cutmix.
    """

    hflip: bool = True  # half of the pictures, as vflip
    vflip: bool = False
    rotate90: bool = False
    crop_scale: tuple[float, ...] = (0.35, 1.0)  # smallest and largest part; empty: the evaluation's centre crop
    pad: int = 0  # pixels of mean colour around that centre crop, which is then cut out of it anywhere
    policy: Literal["none", "rand", "trivial"] = "none"  # TrivialAugment has no settings
    policy_layers: int = 2
    policy_magnitude: float = 9.0  # 0..10
    policy_spread: float = 0.5  # standard deviation of the magnitude
    erasing: float = 0.0  # probability that a rectangle of mean colour covers a part
    mixup: float = 0.0  # alpha of Zhang et al. 2017; 0: none. With cutmix too, either happens to half of the batches
    cutmix: float = 0.0  # alpha of Yun et al. 2019
    repeats: int = 1  # times a picture comes in an epoch, which then sees fewer of them (Hoffer et al. 2019)

    def __post_init__(self) -> None:
        records.check_fields(self, RecipeError)
        scale = self.crop_scale
        if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise RecipeError(f"crop_scale is {scale}; it must be two parts of the area, 0 < low <= high <= 1")
        if self.pad and scale:
            raise RecipeError("pad and crop_scale both place the crop; set crop_scale = [], or pad = 0")
        records.check_ranges(self, RANGES, RecipeError)


def random_box(width: int, height: int, scale: tuple[float, ...], random: np.random.Generator) -> Box:
    """A part of the picture with its area in `scale` and its sides between 3:4 and 4:3 where the picture allows.

    Whole pixels, ten tries, then the largest centred part of an allowed shape: torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = random.uniform(scale[0], scale[1]) * width * height
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def augmented(pixels: Pixels, augment: Augment, record: Preprocess, random: np.random.Generator) -> Tensor:
    """One picture (H, W, C) as training sees it: uint8 (C, crop, crop), memory in order (crop, crop, C)."""
    if augment.crop_scale:
        height, width, _ = pixels.shape
        square = cut_out(pixels, random_box(width, height, augment.crop_scale, random), record)
    else:
        square = centred(pixels, record)
    return altered(square, augment, record, random)


def altered(pixels: Pixels, augment: Augment, record: Preprocess, random: np.random.Generator) -> Tensor:
    """What training does to the pixels (crop, crop, C) of a crop: shift, flips, turn, policy, erasing.

    Gives uint8 (C, crop, crop), memory in order (crop, crop, C).
    """
    mean = mean_colour(record)
    if augment.pad:
        pixels = shifted(pixels, augment.pad, mean, random)
    if augment.hflip and random.random() < 0.5:
        pixels = mirrored(pixels)
    if augment.vflip and random.random() < 0.5:
        pixels = pixels[::-1]
    if augment.rotate90:
        pixels = np.rot90(pixels, int(random.integers(4)))
    if augment.policy != "none":
        pixels = under_policy(pixels, augment, record, random)
    if augment.erasing and random.random() < augment.erasing:
        pixels = erased(pixels, mean, random)
    return channels_first(pixels)


def mean_colour(record: Preprocess) -> tuple[int, ...]:
    """The colour that normalises to 0, as near as 8 bits come, in the order of decoded pictures (RGB or grey)."""
    mean = record.mean[::-1] if record.channels == "BGR" else record.mean
    return tuple(round(255 * value) for value in mean)


def shifted(pixels: Pixels, pad: int, fill: tuple[int, ...], random: np.random.Generator) -> Pixels:
    """The picture padded on each side, and a part of its former size cut out anywhere (He et al. 2015, §4.2)."""
    height, width, channels = pixels.shape
    padded = np.full((height + 2 * pad, width + 2 * pad, channels), fill, np.uint8)
    padded[pad : pad + height, pad : pad + width] = pixels
    top, left = random.integers(2 * pad + 1, size=2)
    return padded[top : top + height, left : left + width]


def under_policy(pixels: Pixels, augment: Augment, record: Preprocess, random: np.random.Generator) -> Pixels:
    """The pixels after the policy; from outside comes the mean colour as in timm, or black as in torchvision."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))
    look = {"resample": Image.Resampling[record.interpolation.upper()]}
    if augment.policy == "trivial":
        return pixels_of(trivial_augment(image, random, **look))
    mean = mean_colour(record)
    return pixels_of(
        rand_augment(
            image,
            random,
            layers=augment.policy_layers,
            magnitude=augment.policy_magnitude,
            spread=augment.policy_spread,
            fillcolor=mean if len(mean) > 1 else mean[0],
            **look,
        )
    )


def erased(pixels: Pixels, fill: tuple[int, ...], random: np.random.Generator) -> Pixels:
    """The picture with a filled rectangle (Zhong et al. 2017); ten tries to fit one in, then as it is."""
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = random.uniform(*_ERASED) * height * width
        ratio = math.exp(random.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if high < height and wide < width:
            top, left = int(random.integers(height - high + 1)), int(random.integers(width - wide + 1))
            pixels = pixels.copy()
            pixels[top : top + high, left : left + wide] = fill
            break
    return pixels


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
